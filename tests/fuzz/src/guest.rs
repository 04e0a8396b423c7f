//! Guest RAM: two pieces with a hole between them, each between pages that nobody may touch. What is touched outside
//! of RAM is a fault then, where AddressSanitizer knows nothing of memory that was mapped.
//!
//! There is one for the whole process, because making it costs more than most inputs. Between inputs what was written
//! is made zero again, as husk has recorded it; that it has recorded everything is checked.
use std::sync::{Arc, OnceLock};

use devices::GuestRam;
use devices::memory::{Backing, PAGE};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// The lower piece: first address and length.
pub const LOW: (u64, u64) = (0, 0x2_0000);
/// The upper piece.
pub const HIGH: (u64, u64) = (0x4_0000, 0x2_0000);
/// Where memory lies that a device brings along.
pub const OWN: GuestAddress = GuestAddress(4 << 30);
/// Bytes before and behind each piece.
const GUARD: usize = 1 << 20;
static ZEROES: [u8; 0x2_0000] = [0; 0x2_0000];

/// RAM that is all zero.
pub fn ram() -> GuestRam {
    let ram = ram_as_it_is();
    clear(&ram);
    ram
}

/// RAM with what is in it.
pub fn ram_as_it_is() -> GuestRam {
    static RAM: OnceLock<GuestRam> = OnceLock::new();
    let ram = RAM.get_or_init(|| {
        let region = |(start, len)| {
            let region = GuestRegionMmap::new(guarded(len), GuestAddress(start));
            Arc::new(region.expect("its end is no overflow"))
        };
        let pieces = vec![region(LOW), region(HIGH)];
        let ram = GuestMemoryMmap::from_arc_regions(pieces).expect("they do not overlap");
        let backings = ram.iter().map(|r| Arc::new(Backing::of(&r.get_mmap()).recording()));
        GuestRam::backed(&ram, backings.collect::<Vec<_>>()).expect("the same regions")
    });
    ram.clone()
}

pub(crate) fn guarded(len: u64) -> MmapRegion<()> {
    let len = usize::try_from(len).expect("it is small");
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, of which the middle becomes accessible; it is never unmapped.
    unsafe {
        let none = std::ptr::null_mut();
        let base = libc::mmap(none, len + 2 * GUARD, libc::PROT_NONE, flags, -1, 0);
        assert_ne!(base, libc::MAP_FAILED, "no memory");
        let start = base.cast::<u8>().add(GUARD);
        assert_eq!(libc::mprotect(start.cast(), len, prot), 0);
        MmapRegion::build_raw(start, len, prot, flags).expect("it is aligned")
    }
}

fn clear(ram: &GuestRam) {
    for region in ram.iter() {
        let host = region.host() as *mut u8;
        let written = region.backing().written().as_ref().map(|pages| pages.take());
        let words = written.unwrap_or_default();
        for (word, bits) in words.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
                // SAFETY: pages of the region, of which nobody has a reference.
                unsafe { host.add((64 * word + bit) * PAGE).write_bytes(0, PAGE) };
            }
        }
        let len = usize::try_from(region.len()).expect("it is small");
        // SAFETY: it is all of the region.
        assert!(unsafe { is_zero(host, len) }, "a write to RAM was not recorded");
    }
}

/// Whether there is nothing in memory: quickly, for it is asked often.
///
/// # Safety
/// There are `len` bytes at `host`.
pub(crate) unsafe fn is_zero(host: *const u8, len: usize) -> bool {
    let pieces = (0..len).step_by(ZEROES.len()).map(|at| (at, ZEROES.len().min(len - at)));
    // SAFETY: both are as long as that.
    pieces.into_iter().all(|(at, len)| unsafe {
        libc::memcmp(host.add(at).cast(), ZEROES.as_ptr().cast(), len) == 0
    })
}

/// Whether `len` bytes at `addr` are RAM.
pub fn is_ram(addr: u64, len: u64) -> bool {
    [LOW, HIGH].iter().any(|(start, size)| {
        addr >= *start && addr.checked_add(len).is_some_and(|end| end <= start + size)
    })
}
