//! A mapping of the host that changes while it is in use: pieces of it become accessible, give their
//! memory back, or go away. Guest RAM proper, which never changes, is rust-vmm's `MmapRegion`.
//!
//! Whoever takes access away sees to it that nobody is in the middle of one: a system call then gets
//! EFAULT, an ordinary access is the end of the process ([`crate::memory::Leases`]).
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::io::retry_on_intr;
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect,
};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

use crate::memory::{Backing, Behind};
use crate::{GuestBitmap, GuestSlice};

/// What mappings are aligned to, here and in the guest: the size of a huge page.
pub const ALIGNMENT: u64 = 2 << 20;

/// Which pages are behind a mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// As the host is set up.
    #[default]
    Normal,
    /// Transparent huge pages are asked for.
    Transparent,
    /// Pages of 2 MiB of the host's pool.
    Huge2M,
}

/// What may be done with a piece of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    None,
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
}

impl Access {
    fn prot(self) -> ProtFlags {
        match self {
            Self::None => ProtFlags::empty(),
            Self::Read => ProtFlags::READ,
            Self::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        }
    }

    fn mprotect(self) -> MprotectFlags {
        match self {
            Self::None => MprotectFlags::empty(),
            Self::Read => MprotectFlags::READ,
            Self::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
        }
    }
}

/// A range of the process's address space, unmapped when dropped. Not in core dumps.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
    backing: Backing,
}

#[expect(unsafe_code, reason = "a pointer that is an address, not a reference")]
// SAFETY: the range is this value's own, and its bytes are accessed through volatile slices and
// system calls only, which any thread may do.
unsafe impl Send for Mapping {}
#[expect(unsafe_code, reason = "a pointer that is an address, not a reference")]
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Anonymous private memory of `len` bytes, all zero, none of it taken from the host yet.
    pub fn anonymous(len: u64, pages: Pages, access: Access) -> Result<Self> {
        let mut mapping = Self::reserve(len)?;
        mapping.backing = Backing::new(len, Behind::Anonymous, pages);
        mapping.renew(access)?;
        Ok(mapping)
    }

    /// Maps anonymous memory of the same pages, all zero, in the place of everything. However often it
    /// was divided, it is one mapping afterwards.
    pub fn renew(&self, access: Access) -> Result<()> {
        let (all, pages) = (0..self.len(), self.backing.pages());
        let mut flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        if pages == Pages::Huge2M {
            flags |= MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        }
        self.map_anonymous(all.clone(), flags, access)?;
        self.backing.set_behind(Behind::Anonymous);
        if pages == Pages::Transparent {
            self.advise(all.clone(), Advice::LinuxHugepage)?;
        }
        self.advise(all, Advice::LinuxDontDump)
    }

    /// `file`, shared with everybody who maps it, and zeroes after its first `file_len` bytes to
    /// fill `len`.
    pub fn file(file: &File, file_len: u64, len: u64, access: Access) -> Result<Self> {
        let mut mapping = Self::reserve(len)?;
        mapping.backing = Backing::new(len, Behind::File, Pages::Normal);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        mapping.map_anonymous(0..len, flags, access)?;
        let (start, count) = mapping.place(0..file_len)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        #[expect(unsafe_code, reason = "mmap over a range of our own")]
        // SAFETY: the range lies in this mapping, which nobody else knows of yet.
        unsafe {
            retry_on_intr(|| mmap(start, count, access.prot(), flags, file.as_fd(), 0))?;
        }
        mapping.advise(0..len, Advice::LinuxDontDump)?;
        Ok(mapping)
    }

    /// Address space of `len` bytes, which a huge page can begin in, without access.
    fn reserve(len: u64) -> Result<Self> {
        let too_big = || Error::from(ErrorKind::OutOfMemory);
        let len = usize::try_from(len).map_err(|_| too_big())?;
        let align = usize::try_from(ALIGNMENT).map_err(|_| too_big())?;
        let whole = len.checked_add(align).filter(|_| len > 0).ok_or_else(too_big)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let none = ProtFlags::empty();
        #[expect(unsafe_code, reason = "mmap and munmap of address space")]
        // SAFETY: a new mapping where the kernel likes; what is cut off before and behind the
        // aligned part lies in it, and nobody else knows of it.
        unsafe {
            let base = retry_on_intr(|| mmap_anonymous(std::ptr::null_mut(), whole, none, flags))?;
            let before = base.align_offset(align).min(align);
            let start = base.wrapping_byte_add(before);
            let behind = align.saturating_sub(before);
            if before > 0 {
                rustix::mm::munmap(base, before)?;
            }
            if behind > 0 {
                rustix::mm::munmap(start.wrapping_byte_add(len), behind)?;
            }
            let start = NonNull::new(start.cast()).ok_or_else(too_big)?;
            let backing = Backing::new(len as u64, Behind::Anonymous, Pages::Normal);
            Ok(Self { start, len, backing })
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether it has no bytes: never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What is behind it.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// The same mapping, which records from now on what husk writes.
    #[must_use]
    pub fn recording(mut self) -> Self {
        let none = Backing::new(0, Behind::Anonymous, Pages::Normal);
        self.backing = std::mem::replace(&mut self.backing, none).recording();
        self
    }

    /// The same mapping, said to be of other pages: for tests where the host has none of them.
    #[cfg(test)]
    pub(crate) fn saying(self, pages: Pages) -> Self {
        let mut mapping = self;
        mapping.backing = Backing::new(mapping.len(), Behind::Anonymous, pages);
        mapping
    }

    /// Where the byte at `offset` is in this process: for KVM.
    pub fn host_address(&self, offset: u64) -> u64 {
        (self.start.as_ptr() as u64).wrapping_add(offset)
    }

    /// `count` bytes from `offset`, if there are so many.
    pub fn slice(&self, offset: u64, count: usize) -> Option<GuestSlice<'_>> {
        let offset = usize::try_from(offset).ok()?;
        offset.checked_add(count).filter(|&end| end <= self.len)?;
        let start = self.start.as_ptr().wrapping_add(offset);
        #[expect(unsafe_code, reason = "bytes that the guest changes at any time")]
        // SAFETY: the range lies in the mapping, which lives as long as the slice borrows it, and
        // only volatile accessors are made of it.
        Some(unsafe {
            VolatileSlice::with_bitmap(start, count, self.backing.written().slice_at(offset), None)
        })
    }

    /// Changes what may be done with a piece.
    pub fn protect(&self, piece: Range<u64>, access: Access) -> Result<()> {
        let (start, len) = self.place(piece)?;
        #[expect(unsafe_code, reason = "mprotect of a range of our own")]
        // SAFETY: the range lies in this mapping, of whose bytes nobody holds a reference.
        unsafe {
            retry_on_intr(|| mprotect(start, len, access.mprotect()))?;
        }
        Ok(())
    }

    /// Gives the memory behind a piece of a mapping that is not a file's back: it reads as zeroes
    /// afterwards. `access` is what may be done with it, before and after.
    pub fn discard(&self, piece: Range<u64>, access: Access) -> Result<()> {
        let (start, len) = self.place(piece.clone())?;
        let offset = usize::try_from(piece.start).map_err(|_| ErrorKind::InvalidInput)?;
        self.backing.written().mark_dirty(offset, len);
        match self.backing.behind() {
            Behind::Image => {
                #[expect(unsafe_code, reason = "mmap over a range of our own")]
                // SAFETY: the range lies in this mapping, of whose bytes nobody holds a reference.
                let is_done = unsafe { zeroes(&self.backing, offset, start, len, access) };
                let too_many = || Error::other("too many places of an image have been given back");
                is_done?.then_some(()).ok_or_else(too_many)
            }
            Behind::Anonymous | Behind::Shared | Behind::File => {
                self.advise(piece, Advice::LinuxDontNeed)
            }
        }
    }

    /// Takes memory for a piece now, so that it cannot be missing later.
    pub fn populate(&self, piece: Range<u64>) -> Result<()> {
        self.advise(piece, Advice::LinuxPopulateWrite)
    }

    /// Puts nothing in the place of everything, so that what was mapped is let go.
    pub fn vacate(&self) -> Result<()> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        self.map_anonymous(0..self.len(), flags, Access::None)
    }

    fn map_anonymous(&self, piece: Range<u64>, flags: MapFlags, access: Access) -> Result<()> {
        let (start, len) = self.place(piece)?;
        #[expect(unsafe_code, reason = "mmap over a range of our own")]
        // SAFETY: the range lies in this mapping, of whose bytes nobody holds a reference.
        unsafe {
            retry_on_intr(|| mmap_anonymous(start, len, access.prot(), flags | MapFlags::FIXED))?;
        }
        Ok(())
    }

    fn advise(&self, piece: Range<u64>, advice: Advice) -> Result<()> {
        let (start, len) = self.place(piece)?;
        #[expect(unsafe_code, reason = "madvise of a range of our own")]
        // SAFETY: the range lies in this mapping, of whose bytes nobody holds a reference.
        unsafe {
            retry_on_intr(|| madvise(start, len, advice))?;
        }
        Ok(())
    }

    /// Start and length of a piece, for a system call.
    fn place(&self, piece: Range<u64>) -> Result<(*mut std::ffi::c_void, usize)> {
        let outside = || Error::from(ErrorKind::InvalidInput);
        let len = piece.end.checked_sub(piece.start).ok_or_else(outside)?;
        if piece.end > self.len() {
            return Err(outside());
        }
        let offset = usize::try_from(piece.start).map_err(|_| outside())?;
        let len = usize::try_from(len).map_err(|_| outside())?;
        Ok((self.start.as_ptr().wrapping_add(offset).cast(), len))
    }
}

/// Maps zeroes, of which none is taken from the host yet, over `len` bytes at `start` of an image that
/// is mapped privately, and says so in its `backing`, where they are at `offset`. False, and nothing has
/// changed, if there are too many such places.
///
/// # Safety
/// The range is whole pages of guest memory, which nobody holds a reference to.
#[expect(unsafe_code, reason = "mmap over a range of guest memory")]
pub(super) unsafe fn zeroes(
    backing: &Backing,
    offset: usize,
    start: *mut std::ffi::c_void,
    len: usize,
    access: Access,
) -> Result<bool> {
    let pages = backing.pages();
    let mut flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
    if pages == Pages::Huge2M {
        flags |= MapFlags::HUGETLB | MapFlags::HUGE_2MB;
    }
    // SAFETY: the caller says what the range is.
    let map = || unsafe { retry_on_intr(|| mmap_anonymous(start, len, access.prot(), flags)) };
    if !backing.vacate(offset, len, || map().map(drop))? {
        return Ok(false);
    }
    // SAFETY: as above; neither advice changes what is there.
    unsafe {
        if pages == Pages::Transparent {
            retry_on_intr(|| madvise(start, len, Advice::LinuxHugepage))?;
        }
        retry_on_intr(|| madvise(start, len, Advice::LinuxDontDump))?;
    }
    Ok(true)
}

/// A piece of RAM at `offset` of what `written` records the writes to.
pub(crate) fn recorded<'a>(
    slice: VolatileSlice<'a>,
    written: &'a GuestBitmap,
    offset: usize,
) -> GuestSlice<'a> {
    let (start, len) = (slice.ptr_guard_mut().as_ptr(), slice.len());
    #[expect(unsafe_code, reason = "the same piece, with a bitmap")]
    // SAFETY: the bytes are those of a slice that lives as long.
    unsafe {
        VolatileSlice::with_bitmap(start, len, written.slice_at(offset), None)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "munmap of a range of our own")]
        // SAFETY: the range is this value's own, and slices of it borrow it.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        if let Err(e) = unmapped {
            log::error!("cannot unmap {} bytes: {e}", self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    const LEN: u64 = 2 * ALIGNMENT;

    #[test]
    fn is_aligned_and_zero() {
        let mapping = Mapping::anonymous(LEN, Pages::Normal, Access::ReadWrite).unwrap();
        assert!(mapping.host_address(0).is_multiple_of(ALIGNMENT));
        let slice = mapping.slice(LEN - 8, 8).unwrap();
        assert_eq!(slice.read_obj::<u64>(0).unwrap(), 0);
        assert!(mapping.slice(LEN - 8, 9).is_none());
        assert!(mapping.slice(u64::MAX, 1).is_none());
        assert!(Mapping::anonymous(u64::MAX, Pages::Normal, Access::None).is_err());
        assert!(Mapping::anonymous(0, Pages::Normal, Access::None).is_err());
    }

    #[test]
    fn gives_memory_back_and_lets_nothing_else_go() {
        let mapping = Mapping::anonymous(LEN, Pages::Normal, Access::ReadWrite).unwrap();
        let word = |at| mapping.slice(at, 8).unwrap();
        word(0).write_obj(7u64, 0).unwrap();
        word(ALIGNMENT).write_obj(8u64, 0).unwrap();
        mapping.discard(0..ALIGNMENT, Access::ReadWrite).unwrap();
        assert_eq!(word(0).read_obj::<u64>(0).unwrap(), 0);
        assert_eq!(word(ALIGNMENT).read_obj::<u64>(0).unwrap(), 8);
        mapping.protect(0..LEN, Access::Read).unwrap();
        mapping.protect(0..ALIGNMENT, Access::ReadWrite).unwrap();
        mapping.populate(0..ALIGNMENT).unwrap();
        assert!(mapping.populate(0..LEN).is_err());
        assert!(mapping.discard(LEN..LEN + 4096, Access::ReadWrite).is_err());
    }

    #[test]
    fn what_husk_writes_is_recorded() {
        let mapping = Mapping::anonymous(LEN, Pages::Normal, Access::ReadWrite).unwrap();
        let mapping = mapping.recording();
        let words = || mapping.backing().written().as_ref().unwrap().take();
        mapping.slice(3 * 4096 + 8, 8192).unwrap().write_obj(7u8, 4096).unwrap();
        assert_eq!(words()[0], 1 << 4);
        let _: u8 = mapping.slice(0, 1).unwrap().read_obj(0).unwrap();
        assert!(words().iter().all(|word| *word == 0));
        mapping.discard(ALIGNMENT..ALIGNMENT + 2 * 4096, Access::ReadWrite).unwrap();
        assert_eq!(words()[8], 3);
    }

    #[test]
    fn a_file_is_shared_and_padded() {
        let fd = rustix::fs::memfd_create("map", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(&[7; 6000]).unwrap();
        let mapping = Mapping::file(&file, 6000, ALIGNMENT, Access::ReadWrite).unwrap();
        let byte = |at| mapping.slice(at, 1).unwrap();
        assert_eq!(byte(5999).read_obj::<u8>(0).unwrap(), 7);
        assert_eq!(byte(6000).read_obj::<u8>(0).unwrap(), 0);
        assert_eq!(byte(ALIGNMENT - 1).read_obj::<u8>(0).unwrap(), 0);
        byte(1).write_obj(9u8, 0).unwrap();
        let mut first = [0; 2];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0).unwrap();
        assert_eq!(first, [7, 9]);
        mapping.vacate().unwrap();
    }
}
