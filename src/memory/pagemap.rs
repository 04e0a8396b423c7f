//! Which pages of a private mapping this process has touched, and which of them it has written: the
//! kernel's page map (Documentation/admin-guide/mm/pagemap.rst).
//!
//! Linux 6.7 finds them itself, page table by page table; before that each page's entry is read.
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::process::DumpableBehavior;

const PATH: &str = "/proc/self/pagemap";
/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// Bytes of an entry of the page map.
const ENTRY: usize = 8;
/// Entries read at once.
const BATCH: usize = 4096;
/// Runs asked for at once.
const RUNS: usize = 512;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// How a page was touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    /// It is the file's.
    Read,
    /// It is a copy of this process's own.
    Written,
}

/// Pages in a row that were touched in the same way: addresses in this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) range: Range<u64>,
    pub(crate) touch: Touch,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Opens this process's page map.
pub(crate) fn open() -> io::Result<File> {
    let opened = File::open(PATH);
    let is_denied = opened.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied);
    let behavior = rustix::process::dumpable_behavior();
    if !is_denied || behavior != Ok(DumpableBehavior::NotDumpable) {
        return opened;
    }
    // Of a process that nobody may debug, root owns it (proc(5)), and this one is jailed. For this moment it may be
    // debugged, by its own user, who is in the jail alone.
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    let opened = File::open(PATH);
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    opened
}

/// This process's page map.
#[derive(Debug)]
pub(crate) struct PageMap(File);

impl PageMap {
    pub(crate) fn open() -> io::Result<Self> {
        open().map(Self)
    }

    /// The pages of `range` that were touched.
    pub(crate) fn touched(&self, range: Range<u64>) -> io::Result<Vec<Run>> {
        self.find(range, None)
    }

    /// The pages of `range` that were written.
    pub(crate) fn written(&self, range: Range<u64>) -> io::Result<Vec<Run>> {
        self.find(range, Some(Touch::Written))
    }

    fn find(&self, range: Range<u64>, only: Option<Touch>) -> io::Result<Vec<Run>> {
        match self.scan(range.clone(), only) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                self.read(range, only)
            }
            scanned => scanned,
        }
    }

    fn scan(&self, range: Range<u64>, only: Option<Touch>) -> io::Result<Vec<Run>> {
        let mut found = Runs::default();
        let mut regions = vec![PageRegion::default(); RUNS];
        let mut start = range.start;
        // Written: touched, and not the file's.
        let not_of_file = if only == Some(Touch::Written) { PAGE_IS_FILE } else { 0 };
        while start < range.end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start,
                end: range.end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: RUNS as u64,
                category_inverted: not_of_file,
                category_mask: not_of_file,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_FILE,
                ..ScanArg::default()
            };
            // SAFETY: the structure is the kernel's, and it writes as many regions as it is told that
            // there are.
            let count = unsafe {
                libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, std::ptr::from_mut(&mut arg))
            };
            let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
            for region in regions.iter().take(count) {
                let touch = match region.categories & PAGE_IS_FILE {
                    0 => Touch::Written,
                    _ => Touch::Read,
                };
                found.push(region.start..region.end, touch);
            }
            if arg.walk_end <= start {
                return Err(io::Error::other("PAGEMAP_SCAN does not get on"));
            }
            start = arg.walk_end;
        }
        Ok(found.0)
    }

    fn read(&self, range: Range<u64>, only: Option<Touch>) -> io::Result<Vec<Run>> {
        let mut found = Runs::default();
        let mut entries = vec![[0; ENTRY]; BATCH];
        let mut at = range.start;
        while at < range.end {
            let left = (range.end - at).div_ceil(PAGE);
            let count = usize::try_from(left).map_or(BATCH, |left| left.min(BATCH));
            let batch = &mut entries[..count];
            self.0.read_exact_at(batch.as_flattened_mut(), at / PAGE * ENTRY as u64)?;
            for entry in batch.iter().map(|entry| u64::from_le_bytes(*entry)) {
                let touch = match entry & OF_FILE {
                    0 => Touch::Written,
                    _ => Touch::Read,
                };
                let is_wanted = only.is_none_or(|only| only == touch);
                if entry & (PRESENT | SWAPPED) != 0 && is_wanted {
                    found.push(at..at + PAGE, touch);
                }
                at += PAGE;
            }
        }
        Ok(found.0)
    }
}

/// Runs that grow at their end.
#[derive(Default)]
struct Runs(Vec<Run>);

impl Runs {
    fn push(&mut self, range: Range<u64>, touch: Touch) {
        match self.0.last_mut() {
            Some(last) if last.range.end == range.start && last.touch == touch => {
                last.range.end = range.end;
            }
            _ => self.0.push(Run { range, touch }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::mmap::MmapRegion;
    use vm_memory::{Bytes, FileOffset, VolatileMemory};

    use super::*;

    const PAGES: usize = 2000;
    const PAGE_LEN: usize = 4096;

    fn mapping() -> MmapRegion {
        let fd = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(&vec![7; PAGES * PAGE_LEN]).unwrap();
        let (both, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        let file = Some(FileOffset::new(file, 0));
        MmapRegion::build(file, PAGES * PAGE_LEN, both, private).unwrap()
    }

    /// Both ways to find them agree, and find what was written, and some of what was read.
    #[test]
    fn finds_what_was_touched() {
        let mapping = mapping();
        let base = mapping.as_ptr() as u64;
        let page = |n: usize| base + n as u64 * PAGE;
        let slice = mapping.as_volatile_slice();
        for n in (0..1500).step_by(2) {
            slice.write_obj(1_u8, n * PAGE_LEN).unwrap();
        }
        slice.write(&[1; 3 * PAGE_LEN], 1600 * PAGE_LEN).unwrap();
        let _: u8 = slice.read_obj(1900 * PAGE_LEN).unwrap();
        let (map, all) = (PageMap::open().unwrap(), base..page(PAGES));
        let written = map.written(all.clone()).unwrap();
        let run = |first, count, touch| Run { range: page(first)..page(first + count), touch };
        let mut expected: Vec<_> =
            (0..1500).step_by(2).map(|n| run(n, 1, Touch::Written)).collect();
        expected.push(run(1600, 3, Touch::Written));
        assert_eq!(written, expected);
        let touched = map.touched(all.clone()).unwrap();
        let is_read = |run: &Run| run.touch == Touch::Read && run.range.contains(&page(1900));
        assert!(touched.iter().any(is_read), "{touched:?}");
        assert_eq!(touched.iter().filter(|run| run.touch == Touch::Written).count(), 751);
        for only in [None, Some(Touch::Written)] {
            assert_eq!(map.read(all.clone(), only).unwrap(), map.find(all.clone(), only).unwrap());
        }
        assert_eq!(map.written(page(1)..page(2)).unwrap(), []);
    }
}
