//! A disk image or block device: opened, locked against others, read and written at byte offsets.
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::file::{self, Access, Kind, OpenError};
use super::overlay::{Keeping, LayerError, Overlay, Place};
use super::passed;
use crate::sys::rw::{self, IoSlices, Lock};
use crate::sys::uring::Direction;

/// Bytes per sector: what sizes are multiples of.
pub const SECTOR_SIZE: u64 = 512;

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Why a disk was refused.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened, or is no disk.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its size is no number of sectors.
    #[error("{path} has {size} bytes, which is not a positive multiple of {SECTOR_SIZE}")]
    Size {
        /// The path.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Nothing to map, or more than there are addresses.
    #[error("{path} has {size} bytes, which cannot be mapped")]
    NotMappable {
        /// The path.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// Another drive or process uses it, and one of the two would write.
    #[error("{0} is in use by another drive or process")]
    InUse(PathBuf),
    /// What is to be written over it cannot be opened.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The host failed.
    #[error("cannot {what} {path}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
}

/// An open, locked disk.
#[derive(Debug)]
pub struct Disk {
    file: Arc<File>,
    /// The open file description that carries the lock. Not `file` itself after [`Self::reopen`]
    /// of the same file: the lock of the first would refuse the second.
    lock: Arc<File>,
    identity: Identity,
    size: u64,
    access: Access,
    /// A flush failed: what was written before may be lost, so no later flush may claim success.
    has_lost_writes: AtomicBool,
    /// What is written, if it does not go to the file. Used by the worker while there is one, which has
    /// it for itself then.
    overlay: Option<Mutex<Overlay>>,
}

impl Disk {
    /// Opens and locks `path`: for reading, others may read it too; for writing, nobody else may
    /// use it.
    pub fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let (file, identity, size) = look(path, access, Kind::Disk)?;
        let lock = take_lock(&file, path, access)?;
        let has_lost_writes = AtomicBool::new(false);
        Ok(Self { file, lock, identity, size, access, has_lost_writes, overlay: None })
    }

    /// Opens the file at `path` for reading, to be written at `place`.
    pub fn open_over(path: &Path, place: &Place, keeping: Keeping) -> Result<Self, DiskError> {
        let access = Access::Read;
        let (file, identity, size) = look(path, access, Kind::Regular)?;
        let lock = take_lock(&file, path, access)?;
        let overlay = Overlay::open(file.clone(), size, place, keeping)?;
        let (overlay, has_lost_writes) = (Some(Mutex::new(overlay)), AtomicBool::new(false));
        Ok(Self { file, lock, identity, size, access, has_lost_writes, overlay })
    }

    /// Opens `path` in place of this disk, which has no overlay. It may be the same file, with another size by now.
    pub fn reopen(&self, path: &Path) -> Result<Self, DiskError> {
        let (file, identity, size) = look(path, self.access, Kind::Disk)?;
        let lock = if identity == self.identity {
            self.lock.clone()
        } else {
            take_lock(&file, path, self.access)?
        };
        let has_lost_writes = AtomicBool::new(false);
        let access = self.access;
        Ok(Self { file, lock, identity, size, access, has_lost_writes, overlay: None })
    }

    /// Whether [`Self::open`] would succeed now. Leaves no trace.
    pub fn check(path: &Path, access: Access) -> Result<(), DiskError> {
        let (file, ..) = look(path, access, Kind::Disk)?;
        check_lock(&file, path, access)
    }

    /// The same of [`Self::open_over`].
    pub fn check_over(path: &Path, place: &Place) -> Result<(), DiskError> {
        let (file, _, size) = look(path, Access::Read, Kind::Regular)?;
        check_lock(&file, path, Access::Read)?;
        Ok(Overlay::check(&file, size, place)?)
    }

    /// Size in bytes when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it may be written.
    pub fn is_writable(&self) -> bool {
        self.access == Access::ReadWrite || self.overlay.is_some()
    }

    /// What is written, if it does not go to the file.
    pub fn overlay(&self) -> Option<MutexGuard<'_, Overlay>> {
        self.overlay.as_ref().map(lock)
    }

    /// Fills `slices` from `offset`. The end of the file is an error.
    pub fn read(&self, slices: &mut IoSlices<'_>, offset: u64) -> std::io::Result<()> {
        match &self.overlay {
            Some(overlay) => lock(overlay).read(slices, offset),
            None => slices.read_exact_at(&self.file, offset),
        }
    }

    /// Writes `slices` to `offset`.
    pub fn write(&self, slices: &mut IoSlices<'_>, offset: u64) -> std::io::Result<()> {
        match &self.overlay {
            Some(overlay) => lock(overlay).write(slices, offset),
            None => slices.write_all_at(&self.file, offset),
        }
    }

    /// The file for whoever does `what` to a range without us, if it is one file: otherwise it is to be
    /// done here.
    pub fn file_for(&self, what: Direction, offset: u64, len: u64) -> Option<Arc<File>> {
        let Some(overlay) = &self.overlay else { return Some(self.file.clone()) };
        let overlay = lock(overlay);
        match what {
            Direction::Read => overlay.file_to_read(offset, len).cloned(),
            Direction::Write => overlay.file_to_write(offset, len).cloned(),
        }
    }

    /// The file for whoever flushes it as [`Self::flush`] does: not if it [`Self::has_lost_writes`], and
    /// saying so if it does ([`Self::note_flush`]). A layer is to be flushed here.
    pub fn file_to_flush(&self) -> Option<&Arc<File>> {
        (self.overlay.is_none() && !self.has_lost_writes()).then_some(&self.file)
    }

    /// Whether a flush has failed.
    pub fn has_lost_writes(&self) -> bool {
        self.has_lost_writes.load(Ordering::Relaxed)
    }

    /// Makes everything written so far survive a loss of power. Once this fails it always fails.
    pub fn flush(&self) -> std::io::Result<()> {
        if self.has_lost_writes() {
            return Err(std::io::Error::other("an earlier flush failed"));
        }
        self.note_flush(match &self.overlay {
            Some(overlay) => lock(overlay).flush(),
            None => self.file.sync_data(),
        })
    }

    /// Remembers a flush that failed.
    pub fn note_flush(&self, flushed: std::io::Result<()>) -> std::io::Result<()> {
        if flushed.is_err() {
            self.has_lost_writes.store(true, Ordering::Relaxed);
        }
        flushed
    }

    /// Gives the space of a range back to the host, if the host can take it.
    pub fn discard(&self, offset: u64, len: u64) -> std::io::Result<()> {
        match &self.overlay {
            // What is not there any more must not be the base's again.
            Some(overlay) => lock(overlay).write_zeroes(offset, len, Unmap::Allowed),
            None => allocate(&self.file, FallocateFlags::PUNCH_HOLE, offset, len).map(|_| ()),
        }
    }

    /// Makes a range read as zeroes, and gives its space back if `unmap` says so.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: Unmap) -> std::io::Result<()> {
        match &self.overlay {
            Some(overlay) => lock(overlay).write_zeroes(offset, len, unmap),
            None => write_zeroes(&self.file, offset, len, unmap),
        }
    }
}

/// Makes a range of a file read as zeroes, and gives its space back if `unmap` says so.
pub(super) fn write_zeroes(
    file: &File,
    offset: u64,
    len: u64,
    unmap: Unmap,
) -> std::io::Result<()> {
    let ways: &[_] = match unmap {
        Unmap::Allowed => &[FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE],
        Unmap::Forbidden => &[FallocateFlags::ZERO_RANGE],
    };
    for &way in ways {
        if allocate(file, way, offset, len)? {
            return Ok(());
        }
    }
    let end = offset.saturating_add(len);
    let mut at = offset;
    while at < end {
        let count = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
        let zeroes = ZEROES.get(..count.min(ZEROES.len())).unwrap_or(&ZEROES);
        file.write_all_at(zeroes, at)?;
        at = at.saturating_add(zeroes.len() as u64);
    }
    Ok(())
}

/// False if the file system or device does not know the operation. Block devices know both.
fn allocate(file: &File, mode: FallocateFlags, offset: u64, len: u64) -> std::io::Result<bool> {
    loop {
        let mode = mode | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file, mode, offset, len) {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
}

fn lock(overlay: &Mutex<Overlay>) -> MutexGuard<'_, Overlay> {
    overlay.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether zeroes may be had by giving up the space behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmap {
    /// A hole will do.
    Allowed,
    /// The space stays allocated.
    Forbidden,
}

/// What tells a file from others: device and inode.
pub(crate) type Identity = (u64, u64);

/// Of a file.
pub(crate) fn identity(metadata: &std::fs::Metadata) -> Identity {
    (metadata.dev(), metadata.ino())
}

/// Opens `path` and finds out what it is: the file, its identity and its size.
fn look(path: &Path, access: Access, kind: Kind) -> Result<(Arc<File>, Identity, u64), DiskError> {
    let failed = |what, source| DiskError::Host { what, path: path.into(), source };
    let file = file::open(path, access, kind)?;
    let metadata = file.metadata().map_err(|e| failed("look at", e))?;
    // Unlike the length in the metadata, this serves block devices as well.
    let size = rustix::fs::seek(&file, SeekFrom::End(0))
        .map_err(|e| failed("find the size of", e.into()))?;
    if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
        return Err(DiskError::Size { path: path.into(), size });
    }
    Ok((Arc::new(file), identity(&metadata), size))
}

/// Locks `file` for `access`; the lock lasts as long as what this gives.
pub(crate) fn take_lock(file: &File, path: &Path, access: Access) -> Result<Arc<File>, DiskError> {
    let failed = |source| DiskError::Host { what: "lock", path: path.into(), source };
    let is_free = is_free_for_all(file, path, access).map_err(failed)?;
    if !is_free || !rw::try_lock(file, lock_for(access)).map_err(failed)? {
        return Err(DiskError::InUse(path.into()));
    }
    Ok(Arc::new(file.try_clone().map_err(failed)?))
}

pub(crate) fn check_lock(file: &File, path: &Path, access: Access) -> Result<(), DiskError> {
    let is_free = is_free_for_all(file, path, access)
        .and_then(|is_free| Ok(is_free && rw::can_lock(file, lock_for(access))?));
    match is_free {
        Ok(true) => Ok(()),
        Ok(false) => Err(DiskError::InUse(path.into())),
        Err(source) => Err(DiskError::Host { what: "lock", path: path.into(), source }),
    }
}

/// Whether nobody has a lock in the way, not even through the same open file: one that was passed may have been passed
/// to another as well, and a lock excludes nobody who has it by that.
fn is_free_for_all(file: &File, path: &Path, access: Access) -> std::io::Result<bool> {
    Ok(!passed::is_descriptor(path) || rw::is_unlocked(file, lock_for(access))?)
}

fn lock_for(access: Access) -> Lock {
    match access {
        Access::Read => Lock::Shared,
        Access::ReadWrite => Lock::Exclusive,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd};

    use super::*;

    /// A file in memory, of a kind that can be punched but not zeroed, and a path to it.
    fn file(len: usize) -> (OwnedFd, PathBuf) {
        let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        std::fs::write(&path, vec![7; len]).unwrap();
        (fd, path)
    }

    #[test]
    fn zeroes_are_written_where_the_host_cannot_make_them() {
        let (_fd, path) = file(200 << 10);
        let disk = Disk::open(&path, Access::ReadWrite).unwrap();
        assert!(!allocate(&disk.file, FallocateFlags::ZERO_RANGE, 0, 512).unwrap());
        disk.write_zeroes(512, 150 << 10, Unmap::Forbidden).unwrap();
        disk.write_zeroes(199 << 10, 1 << 10, Unmap::Allowed).unwrap();
        let mut expected = vec![7; 200 << 10];
        expected[512..512 + (150 << 10)].fill(0);
        expected[199 << 10..].fill(0);
        assert!(std::fs::read(&path).unwrap() == expected);
    }

    #[test]
    fn a_failed_flush_stays_failed_until_the_file_is_opened_anew() {
        let (_fd, path) = file(512);
        let disk = Disk::open(&path, Access::ReadWrite).unwrap();
        disk.flush().unwrap();
        disk.has_lost_writes.store(true, Ordering::Relaxed);
        assert!(disk.flush().is_err() && disk.flush().is_err());
        disk.reopen(&path).unwrap().flush().unwrap();
    }

    #[test]
    fn a_file_opened_anew_keeps_its_lock() {
        let (_fd, path) = file(512);
        let first = Disk::open(&path, Access::ReadWrite).unwrap();
        let second = first.reopen(&path).unwrap();
        drop(first);
        assert!(matches!(Disk::check(&path, Access::Read), Err(DiskError::InUse(_))));
        drop(second);
        Disk::check(&path, Access::ReadWrite).unwrap();
    }
}
