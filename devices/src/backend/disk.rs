//! A disk image or block device: opened, locked against others, read and written at byte offsets.
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::file::{self, Access, Kind, OpenError};
use crate::sys::rw::{self, IoSlices, Lock};

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
}

impl Disk {
    /// Opens and locks `path`: for reading, others may read it too; for writing, nobody else may
    /// use it.
    pub fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let (file, identity, size) = look(path, access)?;
        let lock = take_lock(&file, path, access)?;
        Ok(Self { file, lock, identity, size, access, has_lost_writes: AtomicBool::new(false) })
    }

    /// Opens `path` in place of this disk. It may be the same file, with another size by now.
    pub fn reopen(&self, path: &Path) -> Result<Self, DiskError> {
        let (file, identity, size) = look(path, self.access)?;
        let lock = if identity == self.identity {
            self.lock.clone()
        } else {
            take_lock(&file, path, self.access)?
        };
        let has_lost_writes = AtomicBool::new(false);
        Ok(Self { file, lock, identity, size, access: self.access, has_lost_writes })
    }

    /// Whether [`Self::open`] would succeed now. Leaves no trace.
    pub fn check(path: &Path, access: Access) -> Result<(), DiskError> {
        let (file, ..) = look(path, access)?;
        match rw::can_lock(&file, lock_for(access)) {
            Ok(true) => Ok(()),
            Ok(false) => Err(DiskError::InUse(path.into())),
            Err(source) => Err(DiskError::Host { what: "lock", path: path.into(), source }),
        }
    }

    /// Size in bytes when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it may be written.
    pub fn is_writable(&self) -> bool {
        self.access == Access::ReadWrite
    }

    /// Fills `slices` from `offset`. The end of the file is an error.
    pub fn read(&self, slices: &mut IoSlices<'_>, offset: u64) -> std::io::Result<()> {
        slices.read_exact_at(&self.file, offset)
    }

    /// Writes `slices` to `offset`.
    pub fn write(&self, slices: &mut IoSlices<'_>, offset: u64) -> std::io::Result<()> {
        slices.write_all_at(&self.file, offset)
    }

    /// The file, for whoever reads and writes it otherwise, and flushes it as [`Self::flush`] does:
    /// not if it [`Self::has_lost_writes`], and saying so if it does ([`Self::note_flush`]).
    pub fn file(&self) -> &Arc<File> {
        &self.file
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
        self.note_flush(self.file.sync_data())
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
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, len).map(|_is_supported| ())
    }

    /// Makes a range read as zeroes, and gives its space back if `unmap` says so.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: Unmap) -> std::io::Result<()> {
        let ways: &[_] = match unmap {
            Unmap::Allowed => &[FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE],
            Unmap::Forbidden => &[FallocateFlags::ZERO_RANGE],
        };
        for &way in ways {
            if self.allocate(way, offset, len)? {
                return Ok(());
            }
        }
        let end = offset.saturating_add(len);
        let mut at = offset;
        while at < end {
            let count = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
            let zeroes = ZEROES.get(..count.min(ZEROES.len())).unwrap_or(&ZEROES);
            self.file.write_all_at(zeroes, at)?;
            at = at.saturating_add(zeroes.len() as u64);
        }
        Ok(())
    }

    /// False if the file system or device does not know the operation. Block devices know both.
    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> std::io::Result<bool> {
        loop {
            let mode = mode | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&*self.file, mode, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
    }
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
fn look(path: &Path, access: Access) -> Result<(Arc<File>, Identity, u64), DiskError> {
    let failed = |what, source| DiskError::Host { what, path: path.into(), source };
    let file = file::open(path, access, Kind::Disk)?;
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
    if !rw::try_lock(file, lock_for(access)).map_err(failed)? {
        return Err(DiskError::InUse(path.into()));
    }
    Ok(Arc::new(file.try_clone().map_err(failed)?))
}

pub(crate) fn lock_for(access: Access) -> Lock {
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
        assert!(!disk.allocate(FallocateFlags::ZERO_RANGE, 0, 512).unwrap());
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
