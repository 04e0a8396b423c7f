//! Gives a range of guest memory back to the host. The guest keeps the addresses and reads zero
//! there. The one place that knows how, because it depends on what is behind the memory: anonymous
//! pages, huge ones, a file shared with another process, an image that is mapped privately.
use std::io;

use rustix::io::retry_on_intr;
use rustix::mm::{Advice, madvise};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::GuestRam;
use crate::memory::{Behind, GuestRegion};
use crate::sys::map::{Access, Pages, zeroes};

/// The pages of `MAP_HUGE_2MB`.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Why memory was not given back. It is as it was, as far as it had not been given back before.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// Part of the range is not RAM.
    #[error("{len:#x} bytes at {start:#x} are not wholly RAM")]
    NotRam {
        /// First byte.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// Pages of a file.
    #[error("memory that is a file's cannot be given back")]
    File,
    /// The host did not take it.
    #[error("the host does not take {len:#x} bytes at {start:#x}: {source}")]
    Host {
        /// First byte.
        start: u64,
        /// Bytes.
        len: u64,
        /// What it said.
        source: io::Error,
    },
}

/// Gives back all pages that are wholly in the `len` bytes at `start`, which must be RAM; says how
/// many bytes that were. Pages that the range only touches stay, so that of huge pages nothing may
/// be left to give.
pub fn discard(mem: &GuestRam, start: GuestAddress, len: u64) -> Result<u64, DiscardError> {
    let not_ram = DiscardError::NotRam { start: start.0, len };
    let (Some(end), Ok(count)) = (start.0.checked_add(len), usize::try_from(len)) else {
        return Err(not_ram);
    };
    if !mem.check_range(start, count) {
        return Err(not_ram);
    }
    let mut at = start.0;
    let mut freed: u64 = 0;
    while at < end {
        let Some((region, offset)) = mem.to_region_addr(GuestAddress(at)) else {
            return Err(not_ram);
        };
        let here = region.len().saturating_sub(offset.0).min(end.saturating_sub(at));
        freed = freed.saturating_add(discard_in(region, offset.0, here)?);
        at = at.saturating_add(here.max(1));
    }
    Ok(freed)
}

/// The part of a range that is in one region: `len` bytes at `offset`, which are in it.
fn discard_in(region: &GuestRegion, offset: u64, len: u64) -> Result<u64, DiscardError> {
    // Anonymous pages are dropped at once: what is only marked free (MADV_FREE) is not seen to be
    // returned, and reads zero or not as the host pleases. Of shared memory, dropping would only
    // undo our mapping: the pages have to go from the file.
    // Of an image, dropping would bring the image's pages back: zeroes are mapped over it.
    let backing = region.backing();
    let advice = match backing.behind() {
        Behind::Anonymous => Some(Advice::LinuxDontNeed),
        Behind::Shared => Some(Advice::LinuxRemove),
        Behind::Image => None,
        Behind::File => return Err(DiscardError::File),
    };
    let page = match backing.pages() {
        Pages::Huge2M => HUGE_PAGE_BYTES,
        Pages::Normal | Pages::Transparent => rustix::param::page_size() as u64,
    };
    let end = offset.saturating_add(len);
    let first = offset.checked_next_multiple_of(page).unwrap_or(end);
    let end = end.saturating_sub(end.checked_rem(page).unwrap_or(0));
    let bytes = end.saturating_sub(first);
    if bytes == 0 {
        return Ok(0);
    }
    let start = region.start_addr().0.saturating_add(first);
    let not_ram = || DiscardError::NotRam { start, len: bytes };
    let position = usize::try_from(first).map_err(|_| not_ram())?;
    let size = usize::try_from(bytes).map_err(|_| not_ram())?;
    // Nothing, of memory that could be plugged but is not.
    let memory = region.get_slice(MemoryRegionAddress(first), size).map_err(|_| not_ram())?;
    // Before, so that whoever reads the bitmap meanwhile does not miss the change.
    region.bitmap().mark_dirty(position, size);
    let at = memory.ptr_guard_mut().as_ptr().cast();
    let done = match advice {
        #[expect(unsafe_code, reason = "mmap of zeroes")]
        // SAFETY: as below.
        None => unsafe { zeroes(backing, position, at, size, Access::ReadWrite) },
        #[expect(unsafe_code, reason = "madvise")]
        // SAFETY: the range is whole pages of a mapping that outlives the slice, and it is guest
        // memory: that its contents change is what everybody who reads it has to expect of the guest
        // anyway, and nobody holds a reference to it.
        Some(advice) => unsafe { retry_on_intr(|| madvise(at, size, advice)) }
            .map(|()| true)
            .map_err(Into::into),
    };
    match done {
        Ok(true) => Ok(bytes),
        // So many places that no more can be had: these pages stay.
        Ok(false) => Ok(0),
        Err(source) => Err(DiscardError::Host { start, len: bytes, source }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use std::sync::Arc;

    use vm_memory::mmap::{GuestRegionMmap, MmapRegion, MmapRegionBuilder};
    use vm_memory::{Bytes, FileOffset, GuestMemoryMmap};

    use super::*;
    use crate::memory::{Backing, FileMemory, Leases, PluggedMemory};
    use crate::sys::map::{ALIGNMENT, Access, Mapping};

    const PAGE: u64 = 4096;
    /// RAM: two pieces side by side, a hole, a third.
    const PIECES: [(u64, u64); 3] = [(0, 4), (4, 4), (16, 4)];
    /// Where a device's memory is.
    const OWN: u64 = 1 << 32;

    fn mapping(pages: u64, flags: i32, file: Option<FileOffset>) -> MmapRegion<()> {
        let size = usize::try_from(pages * PAGE).unwrap();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let region = MmapRegionBuilder::<()>::new(size);
        let region = region.with_mmap_prot(prot).with_mmap_flags(flags);
        match file {
            Some(file) => region.with_file_offset(file).build().unwrap(),
            None => region.build().unwrap(),
        }
    }

    fn full(regions: Vec<GuestRegionMmap<()>>) -> GuestRam {
        let ram = GuestRam::new(&GuestMemoryMmap::from_regions(regions).unwrap()).unwrap();
        for region in ram.iter() {
            let len = usize::try_from(region.len()).unwrap();
            ram.write_slice(&vec![7; len], region.start_addr()).unwrap();
        }
        ram
    }

    fn anonymous() -> GuestRam {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let region = |(start, pages)| {
            let start = GuestAddress(start * PAGE);
            GuestRegionMmap::new(mapping(pages, flags, None), start).unwrap()
        };
        full(PIECES.map(region).into())
    }

    /// Which pages of RAM are zero.
    fn zero_pages(ram: &GuestRam) -> Vec<u64> {
        let pages = ram.iter().flat_map(|r| {
            let first = r.start_addr().0 / PAGE;
            first..first + r.len() / PAGE
        });
        let is_zero = |page: &u64| {
            let mut bytes = [1; 4096];
            ram.read_slice(&mut bytes, GuestAddress(page * PAGE)).unwrap();
            assert!(bytes == [0; 4096] || bytes == [7; 4096], "page {page} is neither");
            bytes == [0; 4096]
        };
        pages.filter(is_zero).collect()
    }

    #[test]
    fn what_is_given_back_reads_zero() {
        let ram = anonymous();
        assert_eq!(discard(&ram, GuestAddress(PAGE), 2 * PAGE).unwrap(), 2 * PAGE);
        assert_eq!(zero_pages(&ram), [1, 2]);
        ram.write_obj(9u8, GuestAddress(PAGE)).unwrap();
        assert_eq!(ram.read_obj::<u16>(GuestAddress(PAGE)).unwrap(), 9);
    }

    #[test]
    fn what_is_given_back_is_recorded_as_written() {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let region = GuestRegionMmap::new(mapping(8, flags, None), GuestAddress(0)).unwrap();
        let backing = Arc::new(Backing::of(&region.get_mmap()).recording());
        let ram = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        let ram = GuestRam::backed(&ram, [backing.clone()]).unwrap();
        discard(&ram, GuestAddress(PAGE), 3 * PAGE + 5).unwrap();
        assert_eq!(backing.written().as_ref().unwrap().take(), [0b1110]);
    }

    #[test]
    fn a_range_may_cross_from_one_piece_to_the_next() {
        let ram = anonymous();
        assert_eq!(discard(&ram, GuestAddress(2 * PAGE), 4 * PAGE).unwrap(), 4 * PAGE);
        assert_eq!(zero_pages(&ram), [2, 3, 4, 5]);
    }

    #[test]
    fn only_whole_pages_go() {
        let ram = anonymous();
        assert_eq!(discard(&ram, GuestAddress(1), 2 * PAGE).unwrap(), PAGE);
        assert_eq!(zero_pages(&ram), [1]);
        for (start, len) in [(PAGE * 16, PAGE - 1), (PAGE * 16 + 1, PAGE), (PAGE * 16, 0)] {
            assert_eq!(discard(&ram, GuestAddress(start), len).unwrap(), 0);
        }
        assert_eq!(zero_pages(&ram), [1]);
    }

    #[test]
    fn what_is_not_wholly_ram_is_refused_as_a_whole() {
        let ram = anonymous();
        let end = 20 * PAGE;
        for (start, len) in [
            (7 * PAGE, 2 * PAGE),
            (8 * PAGE, PAGE),
            (15 * PAGE, 2 * PAGE),
            (end - PAGE, 2 * PAGE),
            (end, PAGE),
            (0, u64::MAX),
            (u64::MAX, PAGE),
            (u64::MAX - PAGE + 1, PAGE),
        ] {
            let e = discard(&ram, GuestAddress(start), len).unwrap_err();
            assert!(matches!(e, DiscardError::NotRam { .. }), "{start:#x}+{len:#x}: {e}");
        }
        assert_eq!(zero_pages(&ram), [0; 0]);
    }

    fn memory_file(pages: u64) -> FileOffset {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("discard", flags).unwrap());
        file.set_len(pages * PAGE).unwrap();
        FileOffset::new(file, 0)
    }

    #[test]
    fn shared_memory_goes_from_the_file() {
        let file = memory_file(4);
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.file().metadata().unwrap());
        let region = mapping(4, libc::MAP_SHARED, Some(file.clone()));
        let ram = full(vec![GuestRegionMmap::new(region, GuestAddress(0)).unwrap()]);
        assert_eq!(blocks(), 4 * 8);
        assert_eq!(discard(&ram, GuestAddress(PAGE), 2 * PAGE).unwrap(), 2 * PAGE);
        // Looked at first: who reads a hole of shared memory fills it.
        assert_eq!(blocks(), 2 * 8);
        assert_eq!(zero_pages(&ram), [1, 2]);
    }

    #[test]
    fn zeroes_come_over_an_image() {
        let file = memory_file(4);
        std::os::unix::fs::FileExt::write_all_at(file.file(), &[9; 4 << 12], 0).unwrap();
        let region = mapping(4, libc::MAP_PRIVATE, Some(file.clone()));
        let regions = vec![GuestRegionMmap::new(region, GuestAddress(0)).unwrap()];
        let ram = GuestRam::new(&GuestMemoryMmap::from_regions(regions).unwrap()).unwrap();
        ram.write_obj(7u8, GuestAddress(PAGE)).unwrap();
        assert_eq!(discard(&ram, GuestAddress(PAGE), 2 * PAGE).unwrap(), 2 * PAGE);
        let bytes = |at| ram.read_obj::<u16>(GuestAddress(at)).unwrap();
        assert_eq!([PAGE - 1, PAGE, 2 * PAGE, 3 * PAGE].map(bytes), [9, 0, 0, 0x0909]);
        let backing = ram.find_region(GuestAddress(0)).unwrap().backing();
        assert_eq!(backing.vacated(), Some(vec![6]));
        ram.write_obj(0x0102u16, GuestAddress(2 * PAGE)).unwrap();
        assert_eq!(bytes(2 * PAGE), 0x0102);
        let mut image = [0; 4 << 12];
        std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut image, 0).unwrap();
        assert_eq!(image, [9; 4 << 12]);
    }

    /// RAM, and a piece of it that a device has brought along, full.
    fn with_own(pages: Pages, plugged: std::ops::Range<u64>) -> GuestRam {
        // Ordinary pages that are said to be huge: the host's pool may be empty.
        let mapping = Mapping::anonymous(4 * ALIGNMENT, Pages::Normal, Access::ReadWrite).unwrap();
        let memory = PluggedMemory::new(mapping.saying(pages), ALIGNMENT);
        memory.plug(plugged.clone());
        let region = GuestRegion::plugged(GuestAddress(OWN), Arc::new(memory));
        let ram = anonymous().with(region, Arc::new(Leases::default())).unwrap();
        for block in plugged {
            let start = GuestAddress(OWN + block * ALIGNMENT);
            ram.write_slice(&vec![7; usize::try_from(ALIGNMENT).unwrap()], start).unwrap();
        }
        ram
    }

    #[test]
    fn huge_pages_go_as_a_whole_or_stay() {
        let ram = with_own(Pages::Huge2M, 0..4);
        for (start, len) in [(PAGE, HUGE_PAGE_BYTES), (0, HUGE_PAGE_BYTES - PAGE)] {
            assert_eq!(discard(&ram, GuestAddress(OWN + start), len).unwrap(), 0);
        }
        let len = 3 * HUGE_PAGE_BYTES;
        assert_eq!(discard(&ram, GuestAddress(OWN + PAGE), len).unwrap(), 2 * HUGE_PAGE_BYTES);
        let first = |block| ram.read_obj::<u8>(GuestAddress(OWN + block * ALIGNMENT)).unwrap();
        assert_eq!([0, 1, 2, 3].map(first), [7, 0, 0, 7]);
    }

    #[test]
    fn what_is_not_plugged_is_not_ram() {
        let ram = with_own(Pages::Normal, 1..3);
        for (start, len) in [(0, PAGE), (ALIGNMENT - PAGE, 2 * PAGE), (3 * ALIGNMENT, PAGE)] {
            let e = discard(&ram, GuestAddress(OWN + start), len).unwrap_err();
            assert!(matches!(e, DiscardError::NotRam { .. }), "{start:#x}: {e}");
        }
        let freed = discard(&ram, GuestAddress(OWN + 2 * ALIGNMENT - PAGE), 2 * PAGE).unwrap();
        assert_eq!(freed, 2 * PAGE);
        let at = |offset| ram.read_obj::<u8>(GuestAddress(OWN + offset)).unwrap();
        assert_eq!([ALIGNMENT, 2 * ALIGNMENT - PAGE, 2 * ALIGNMENT].map(at), [7, 0, 0]);
    }

    #[test]
    fn the_file_of_a_device_is_not_ram() {
        let file = memory_file(ALIGNMENT / PAGE);
        let mapping = Mapping::file(file.file(), ALIGNMENT, ALIGNMENT, Access::ReadWrite).unwrap();
        let region = GuestRegion::file(GuestAddress(OWN), Arc::new(FileMemory::new(mapping)));
        let ram = anonymous().with(region, Arc::new(Leases::default())).unwrap();
        let e = discard(&ram, GuestAddress(OWN), PAGE).unwrap_err();
        assert!(matches!(e, DiscardError::NotRam { .. }), "{e}");
    }
}
