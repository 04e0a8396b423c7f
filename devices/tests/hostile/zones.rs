//! Guest memory with red zones around it: a byte that a device writes outside of RAM is found.
//!
//! ```text
//!   zone │ LOW │ zone │ HIGH │ zone        one mapping; all zones hold a pattern
//! ```
//! Under AddressSanitizer the zones are poisoned besides, so that reading there is found as well.
#![expect(unsafe_code, reason = "guest memory whose neighbours are known")]

use std::sync::Arc;

use devices::GuestRam;
use devices::memory::Backing;
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::driver::{HIGH, LOW};

const ZONE: usize = 64 << 10;
const PATTERN: u8 = 0xc5;

#[cfg(husk_asan)]
unsafe extern "C" {
    fn __asan_poison_memory_region(at: *const u8, len: usize);
    fn __asan_unpoison_memory_region(at: *const u8, len: usize);
}

/// The mapping. It stays for the rest of the process: guest memory in it may outlive a case.
#[derive(Debug)]
pub(crate) struct Zones {
    start: usize,
}

impl Zones {
    /// Zeroed RAM of the driver's layout, whose written pages are recorded, and what is around it.
    pub(crate) fn new() -> (GuestRam, Self) {
        let len = Self::places().map(|(_, len)| len).sum::<usize>();
        let prot = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        let flags = rustix::mm::MapFlags::PRIVATE | rustix::mm::MapFlags::NORESERVE;
        // SAFETY: a new mapping, at no particular address.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, flags) };
        let zones = Self { start: start.unwrap() as usize };
        for zone in zones.all() {
            // SAFETY: the mapping's own bytes, which nobody has been given yet.
            unsafe { std::slice::from_raw_parts_mut(zone as *mut u8, ZONE) }.fill(PATTERN);
        }
        zones.poison();
        let regions = [(ZONE, LOW), (2 * ZONE + bytes(LOW), HIGH)].map(|(offset, piece)| {
            let at = (zones.start + offset) as *mut u8;
            let (prot, flags) = (prot.bits().cast_signed(), flags.bits().cast_signed());
            // SAFETY: inside the mapping, which is never unmapped, and no part of a zone.
            let region = unsafe { MmapRegion::<()>::build_raw(at, bytes(piece), prot, flags) };
            GuestRegionMmap::new(region.unwrap(), GuestAddress(piece.0)).unwrap()
        });
        let ram = GuestMemoryMmap::from_regions(regions.into()).unwrap();
        let recording = |region: &GuestRegionMmap<()>| Backing::of(&region.get_mmap()).recording();
        let backings: Vec<_> = ram.iter().map(|region| Arc::new(recording(region))).collect();
        debug_assert!(ram.iter().all(|region| region.len() > 0));
        (GuestRam::backed(&ram, backings).unwrap(), zones)
    }

    /// Fails if anything has been written outside of RAM.
    #[track_caller]
    pub(crate) fn assert_untouched(&self) {
        self.unpoison();
        for zone in self.all() {
            // SAFETY: the mapping's own bytes; a device that writes there is what is looked for, and
            // whatever it makes of them fails the test.
            let bytes = unsafe { std::slice::from_raw_parts(zone as *const u8, ZONE) };
            let at = bytes.iter().position(|byte| *byte != PATTERN);
            assert_eq!(at, None, "a byte outside of RAM was written");
        }
        self.poison();
    }

    fn places() -> impl Iterator<Item = (usize, usize)> {
        [ZONE, bytes(LOW), ZONE, bytes(HIGH), ZONE].into_iter().scan(0, |at, len| {
            let start = *at;
            *at += len;
            Some((start, len))
        })
    }

    fn all(&self) -> impl Iterator<Item = usize> {
        Self::places().step_by(2).map(|(offset, _)| self.start + offset)
    }

    fn poison(&self) {
        #[cfg(husk_asan)]
        for zone in self.all() {
            // SAFETY: the mapping's own bytes, which only `assert_untouched` may read.
            unsafe { __asan_poison_memory_region(zone as *const u8, ZONE) };
        }
    }

    fn unpoison(&self) {
        #[cfg(husk_asan)]
        for zone in self.all() {
            // SAFETY: as above.
            unsafe { __asan_unpoison_memory_region(zone as *const u8, ZONE) };
        }
    }
}

fn bytes(piece: (u64, u64)) -> usize {
    usize::try_from(piece.1).unwrap()
}

/// What the suite looks for it finds; a sanitizer would find it sooner.
#[cfg(not(husk_asan))]
#[test]
fn a_byte_outside_of_ram_is_found() {
    let _alone = crate::bench::alone();
    let (_ram, zones) = Zones::new();
    zones.assert_untouched();
    for zone in zones.all().collect::<Vec<_>>() {
        for at in [zone, zone + ZONE - 1] {
            // SAFETY: a byte of a zone, which is the mapping's own.
            unsafe { (at as *mut u8).write(0) };
            assert!(std::panic::catch_unwind(|| zones.assert_untouched()).is_err());
            // SAFETY: as above.
            unsafe { (at as *mut u8).write(PATTERN) };
        }
    }
    zones.assert_untouched();
}
