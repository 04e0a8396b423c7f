//! A regular file in memory: opened, locked against others as a disk is, mapped and shared.
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::disk::{DiskError, check_lock, take_lock};
use super::file::{self, Access, Kind};
use crate::memory::FileMemory;
use crate::sys::map::{self, ALIGNMENT, Mapping};

/// An open, locked, mapped file.
#[derive(Debug)]
pub struct MappedFile {
    /// Carries the lock.
    file: Arc<File>,
    memory: Arc<FileMemory>,
    size: u64,
    /// A flush failed: what was written before may be lost, so no later flush may claim success.
    has_lost_writes: AtomicBool,
}

impl MappedFile {
    /// Opens, locks and maps `path`: for reading, others may read it too; for writing, nobody else
    /// may use it. What is missing to a multiple of [`ALIGNMENT`] is memory of no file.
    pub fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let (file, size, len) = look(path, access)?;
        let file = take_lock(&file, path, access)?;
        let failed = |source| DiskError::Host { what: "map", path: path.into(), source };
        let allowed = match access {
            Access::Read => map::Access::Read,
            Access::ReadWrite => map::Access::ReadWrite,
        };
        let mapping = Mapping::file(&file, size, len, allowed).map_err(failed)?;
        let memory = Arc::new(FileMemory::new(mapping));
        Ok(Self { file, memory, size, has_lost_writes: AtomicBool::new(false) })
    }

    /// Whether [`Self::open`] would succeed now, address space aside. Leaves no trace.
    pub fn check(path: &Path, access: Access) -> Result<(), DiskError> {
        let (file, ..) = look(path, access)?;
        check_lock(&file, path, access)
    }

    /// The mapping.
    pub fn memory(&self) -> &Arc<FileMemory> {
        &self.memory
    }

    /// Size of the file in bytes when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Makes everything written so far survive a loss of power. Once this fails it always fails.
    pub fn flush(&self) -> std::io::Result<()> {
        if self.has_lost_writes.load(Ordering::Relaxed) {
            return Err(std::io::Error::other("an earlier flush failed"));
        }
        let flushed = self.file.sync_data();
        if flushed.is_err() {
            self.has_lost_writes.store(true, Ordering::Relaxed);
        }
        flushed
    }
}

/// Opens `path`: the file, its size and the length of its mapping.
fn look(path: &Path, access: Access) -> Result<(File, u64, u64), DiskError> {
    let failed = |source| DiskError::Host { what: "look at", path: path.into(), source };
    let file = file::open(path, access, Kind::Regular)?;
    let size = file.metadata().map_err(failed)?.len();
    match size.checked_next_multiple_of(ALIGNMENT) {
        Some(len) if size > 0 => Ok((file, size, len)),
        _ => Err(DiskError::NotMappable { path: path.into(), size }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_flush_stays_failed() {
        let fd = rustix::fs::memfd_create("mapped", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        std::fs::write(&path, b"x").unwrap();
        let file = MappedFile::open(Path::new(&path), Access::ReadWrite).unwrap();
        assert_eq!((file.size(), file.memory().mapping().len()), (1, ALIGNMENT));
        file.flush().unwrap();
        file.has_lost_writes.store(true, Ordering::Relaxed);
        assert!(file.flush().is_err() && file.flush().is_err());
    }
}
