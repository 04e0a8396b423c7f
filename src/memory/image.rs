//! Puts an image of memory behind guest memory: most of it is one file, mapped privately; what lies over
//! it, in the files of snapshots of what has changed, is mapped or copied over that.
#![expect(unsafe_code, reason = "maps over guest memory")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::thread;

use devices::memory::{Behind, GuestRegion};
use devices::sys::map::Pages;
use rustix::io::retry_on_intr;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};
use vm_memory::GuestMemoryRegion;
use vm_memory::mmap::MmapRegion;

use crate::config::HugePages;
use crate::snapshot::{MemoryImage, Segment};

/// The shortest segment that is mapped: shorter ones are copied, which costs a page fault less each.
const MAPPED_MIN: u64 = 64 << 10;
/// Most segments that are mapped: a process has 65,530 mappings.
const MAPPED_MAX: usize = 4096;
/// Bytes of a huge page.
const HUGE: u64 = 2 << 20;
/// Threads that copy: more of them wait for memory.
const COPIERS_MAX: usize = 4;

/// Lays what is over the image's file over `region`, which is all mapped from `start` of the file, and
/// which nobody uses yet.
pub(super) fn lay_over(image: &MemoryImage, start: u64, region: &MmapRegion) -> io::Result<()> {
    // SAFETY: the range is all of the region, of which nobody has a reference.
    unsafe { over(image, start, region.as_ptr().addr() as u64, region.size() as u64) }
}

/// Whether `file` can be mapped as RAM in such pages: no file system has huge pages but those in memory.
pub(super) fn can_be_mapped(file: &File, pages: HugePages) -> io::Result<bool> {
    // linux/magic.h
    const TMPFS: u64 = 0x0102_1994;
    const HUGETLBFS: u64 = 0x9584_58f6;
    let kind = rustix::fs::fstatfs(file)?.f_type.cast_unsigned();
    Ok(match pages {
        HugePages::None => true,
        HugePages::Transparent => kind == TMPFS,
        HugePages::Hugetlb2M => kind == HUGETLBFS,
    })
}

/// Copies the image into `region`, which nobody uses yet, on as many threads as are of use.
pub(super) fn copy_into(image: &MemoryImage, start: u64, region: &MmapRegion) -> io::Result<()> {
    let threads = thread::available_parallelism().map_or(1, |count| count.get().min(COPIERS_MAX));
    let (host, len) = (region.as_ptr().addr() as u64, region.size() as u64);
    let share = (len / threads as u64).next_multiple_of(HUGE).max(HUGE);
    thread::scope(|scope| {
        let mut shares = Vec::new();
        let mut offset = 0;
        while offset < len {
            let count = share.min(len - offset);
            // SAFETY: the range is a part of the region that no other thread has.
            let copy = move || unsafe { copy_all(image, start + offset, host + offset, count) };
            shares.push(thread::Builder::new().name("husk_copy".into()).spawn_scoped(scope, copy)?);
            offset += count;
        }
        let panicked = |_| Err(io::Error::other("a thread that copies panicked"));
        shares.into_iter().try_for_each(|share| share.join().unwrap_or_else(panicked))
    })
}

/// Gives what is plugged of `region` the contents that the image has from `start` on.
pub(super) fn fill(image: &MemoryImage, start: u64, region: &GuestRegion) -> io::Result<()> {
    let backing = region.backing();
    let is_mapped = backing.pages() != Pages::Huge2M;
    for (offset, len) in region.present() {
        let (at, host) = (start + offset, region.host() + offset);
        // SAFETY: the range is plugged guest memory, of which nobody has a reference.
        unsafe {
            match is_mapped {
                true => {
                    map(&image.file, at, host, len)?;
                    over(image, at, host, len)?;
                }
                false => copy_all(image, at, host, len)?,
            }
        }
    }
    if is_mapped {
        backing.set_behind(Behind::Image);
    }
    Ok(())
}

/// Maps the image, which has `region` from `start` on, over a part of the region that nobody uses now.
pub(super) fn map_again(
    image: &MemoryImage,
    start: u64,
    region: &GuestRegion,
    part: Range<u64>,
) -> io::Result<()> {
    let (at, host, len) = (start + part.start, region.host() + part.start, part.end - part.start);
    // SAFETY: the range is guest memory, of which nobody has a reference.
    unsafe {
        map(&image.file, at, host, len)?;
        over(image, at, host, len)
    }
}

/// Copies again what of the image is copied rather than mapped over `region`.
pub(super) fn copy_again(image: &MemoryImage, start: u64, region: &GuestRegion) -> io::Result<()> {
    let shortest = shortest_mapped(&image.over);
    for (whole, part) in clipped(&image.over, start, region.len()) {
        if whole.len < shortest {
            let to = region.host() + (part.start - start);
            // SAFETY: the part is clipped to the region, which nobody uses now.
            unsafe { put(&part, to)? };
        }
    }
    Ok(())
}

/// Lays over `len` bytes at `host`, which are mapped from `start` of the image's file.
///
/// # Safety
/// The range is guest memory that nobody uses yet.
unsafe fn over(image: &MemoryImage, start: u64, host: u64, len: u64) -> io::Result<()> {
    let shortest = shortest_mapped(&image.over);
    for (whole, part) in clipped(&image.over, start, len) {
        let to = host + (part.start - start);
        // By the whole segment, however little of it is in the range: `copy_again` has to know what
        // became of it.
        let is_mapped = whole.len >= shortest;
        // SAFETY: the part is clipped to the range.
        unsafe {
            match &part.from {
                Some(file) if is_mapped => map(file, part.start, to, part.len)?,
                None if is_mapped => map_zeroes(to, part.len)?,
                _ => put(&part, to)?,
            }
        }
    }
    Ok(())
}

/// How long a segment must be to be mapped, so that there are not too many.
fn shortest_mapped(over: &[Segment]) -> u64 {
    let mut shortest = MAPPED_MIN;
    while over.iter().filter(|segment| segment.len >= shortest).count() > MAPPED_MAX {
        shortest *= 2;
    }
    shortest
}

/// The segments in `len` bytes at `start`, and the part of each that is there.
fn clipped(over: &[Segment], start: u64, len: u64) -> impl Iterator<Item = (&Segment, Segment)> {
    let end = start + len;
    let first = over.partition_point(move |segment| segment.end() <= start);
    let here = over.iter().skip(first).take_while(move |segment| segment.start < end);
    here.map(move |segment| {
        let from = segment.start.max(start);
        let len = segment.end().min(end) - from;
        (segment, Segment { start: from, len, from: segment.from.clone() })
    })
}

/// # Safety
/// As of [`over`].
unsafe fn map(file: &File, start: u64, host: u64, len: u64) -> io::Result<()> {
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    let flags = flags | MapFlags::FIXED | MapFlags::NORESERVE;
    let (to, len) = (host as *mut std::ffi::c_void, usize_of(len)?);
    // SAFETY: the caller says what the range is.
    unsafe {
        retry_on_intr(|| mmap(to, len, access, flags, file.as_fd(), start))?;
        retry_on_intr(|| madvise(to, len, Advice::LinuxDontDump))?;
    }
    Ok(())
}

/// # Safety
/// As of [`over`].
unsafe fn map_zeroes(host: u64, len: u64) -> io::Result<()> {
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    let flags = flags | MapFlags::FIXED | MapFlags::NORESERVE;
    let (to, len) = (host as *mut std::ffi::c_void, usize_of(len)?);
    // SAFETY: the caller says what the range is.
    unsafe {
        retry_on_intr(|| mmap_anonymous(to, len, access, flags))?;
        retry_on_intr(|| madvise(to, len, Advice::LinuxDontDump))?;
    }
    Ok(())
}

/// Copies what the image holds, for memory that cannot be mapped from a file.
///
/// # Safety
/// As of [`over`].
unsafe fn copy_all(image: &MemoryImage, start: u64, host: u64, len: u64) -> io::Result<()> {
    let end = start + len;
    let first = image.extents.partition_point(|extent| extent.end() <= start);
    let here = image.extents.iter().skip(first).take_while(|extent| extent.start < end);
    for extent in here {
        let from = extent.start.max(start);
        let count = extent.end().min(end) - from;
        // SAFETY: the extent is clipped to the range.
        unsafe { copy(&image.file, from, host + (from - start), count)? };
    }
    for (_, part) in clipped(&image.over, start, len) {
        let to = host + (part.start - start);
        // SAFETY: the part is clipped to the range.
        unsafe { put(&part, to)? };
    }
    Ok(())
}

/// Copies a segment to its place.
///
/// # Safety
/// As of [`over`].
unsafe fn put(segment: &Segment, to: u64) -> io::Result<()> {
    // SAFETY: the caller says what the range is.
    unsafe {
        match &segment.from {
            Some(file) => copy(file, segment.start, to, segment.len),
            None => {
                std::ptr::write_bytes(to as *mut u8, 0, usize_of(segment.len)?);
                Ok(())
            }
        }
    }
}

/// # Safety
/// As of [`over`].
unsafe fn copy(file: &File, start: u64, host: u64, len: u64) -> io::Result<()> {
    // SAFETY: the caller says what the range is; nobody else has a reference to it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(host as *mut u8, usize_of(len)?) };
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, start)
}

fn usize_of(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(io::Error::other)
}
