//! Physical memory: identity mapped, so an address is a pointer. Reads of tables, MMIO, and a bump allocator over the
//! RAM behind the image.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::boot::BootInfo;

/// Where the allocator goes on and where it must stop.
static NEXT: AtomicU64 = AtomicU64::new(0);
static LIMIT: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
    static mut pdpt: [u64; 512];
}

/// First address of the image and the first behind it.
pub fn image() -> (u64, u64) {
    (&raw const image_start as u64, &raw const image_end as u64)
}

/// Gives the allocator the RAM between the image and the end of its range, the initrd or 4 GiB.
pub(crate) fn init(boot: &BootInfo) {
    let end = image().1;
    let range = boot.memory().iter().find(|r| r.is_ram() && r.start <= end && end <= r.end());
    let mut limit = range.map_or(end, |r| r.end()).min(1 << 32);
    if let Some((initrd, _)) = boot.initrd
        && initrd >= end
    {
        limit = limit.min(initrd);
    }
    NEXT.store(end, Ordering::Relaxed);
    LIMIT.store(limit, Ordering::Relaxed);
}

/// Bytes the allocator has left.
pub fn available() -> u64 {
    LIMIT.load(Ordering::Relaxed).saturating_sub(NEXT.load(Ordering::Relaxed))
}

/// Zeroed bytes, page aligned, never freed. Panics when RAM runs out.
pub fn allocate(len: usize) -> &'static mut [u8] {
    let start = NEXT.load(Ordering::Relaxed).next_multiple_of(4096);
    let end = start + len as u64;
    assert!(end <= LIMIT.load(Ordering::Relaxed), "out of guest memory");
    NEXT.store(end, Ordering::Relaxed);
    // SAFETY: RAM that nothing else uses and that is handed out once.
    unsafe {
        (start as *mut u8).write_bytes(0, len);
        core::slice::from_raw_parts_mut(start as *mut u8, len)
    }
}

/// Identity maps the GiB around an address above 4 GiB, below 512 GiB, in 2 MiB pages; below 4 GiB all is mapped.
pub fn map_gib(address: u64) {
    let gib = (address >> 30) as usize;
    assert!(gib < 512, "{address:#x} is out of the page tables' reach");
    let entry = (&raw mut pdpt).cast::<u64>().wrapping_add(gib);
    // SAFETY: our own table, inside it by the assertion; an entry only ever turns from absent to present, so no TLB
    // entry goes stale.
    unsafe {
        if entry.read_volatile() & 1 == 0 {
            let directory = allocate(4096);
            for (i, page) in directory.chunks_exact_mut(8).enumerate() {
                let flags_and_frame = (gib << 30 | i << 21) as u64 | 0x87;
                page.copy_from_slice(&flags_and_frame.to_le_bytes());
            }
            entry.write_volatile(directory.as_ptr() as u64 | 7);
        }
    }
}

/// Reads a value that may be unaligned.
///
/// # Safety
/// `address` must be that of a readable `T`.
pub unsafe fn read_at<T: Copy>(address: u64) -> T {
    // SAFETY: the caller's promise; memory is identity mapped.
    unsafe { (address as *const T).read_unaligned() }
}

/// Defines an access to device memory as one plain `mov`, which every instruction emulator knows; the compiler could
/// otherwise merge it into a `cmp` or widen it.
macro_rules! mmio {
    ($read:ident, $write:ident, $int:ty, $class:ident, $load:literal, $store:literal) => {
        pub fn $read(address: usize) -> $int {
            let value: $int;
            // SAFETY: device registers and holes only; ordinary memory is never read this way by mistake, as a
            // read changes nothing.
            unsafe { asm!($load, out($class) value, in(reg) address, options(nostack)) };
            value
        }

        pub fn $write(address: usize, value: $int) {
            // SAFETY: the address is a device register or a hole, where Rust has no objects.
            unsafe { asm!($store, in(reg) address, in($class) value, options(nostack)) };
        }
    };
}

mmio!(mmio_read8, mmio_write8, u8, reg_byte, "mov {}, [{}]", "mov [{}], {}");
mmio!(mmio_read16, mmio_write16, u16, reg, "mov {:x}, [{}]", "mov [{}], {:x}");
mmio!(mmio_read32, mmio_write32, u32, reg, "mov {:e}, [{}]", "mov [{}], {:e}");
mmio!(mmio_read64, mmio_write64, u64, reg, "mov {}, [{}]", "mov [{}], {}");
