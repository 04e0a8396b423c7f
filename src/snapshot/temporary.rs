//! A file that has no name yet, or not its own: whatever ends this process, it is gone, or known by its name to
//! be nobody's.
//!
//! Where the file system can, it has no name at all (O_TMPFILE). It is locked while it is being made, which is how
//! [`super::files`] tells what is left over of a process that died from what another one is writing.
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use devices::backend::file::parent;
use devices::sys::again::again;
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, flock, linkat};
use rustix::io::{Errno, retry_on_intr};

use super::SnapshotError;

/// A file in the making. Dropped before it is [kept](Self::keep), it is gone.
#[derive(Debug)]
pub(super) struct Temporary {
    file: File,
    /// The name that it has, until it is kept.
    path: Option<PathBuf>,
}

impl Temporary {
    /// Makes a file that is to be called `target`; until then it may have to be called `name`.
    pub(super) fn create(target: &Path, name: &Path) -> Result<Self, SnapshotError> {
        let failed = SnapshotError::file("cannot make", target);
        let made = match nameless(name) {
            // Kernels and file systems say it in all these ways.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => named(name),
            made => made.map(|file| Self { file, path: None }).map_err(io::Error::from),
        };
        let made = made.map_err(failed)?;
        // Where there are no locks, nobody takes anything for left over.
        if let Err(e) = flock(&made.file, FlockOperation::NonBlockingLockExclusive) {
            log::debug!("cannot lock {}: {e}", target.display());
        }
        Ok(made)
    }

    /// The file, to be written.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Makes it last, whatever becomes of the host.
    pub(super) fn sync(&self, target: &Path) -> Result<(), SnapshotError> {
        self.file.sync_all().map_err(SnapshotError::file("cannot write", target))
    }

    /// Gives it a name that is free, which it loses again when it is dropped.
    pub(super) fn name(&mut self, name: &Path) -> Result<(), SnapshotError> {
        let named = match &self.path {
            Some(path) if path == name => Ok(()),
            Some(path) => again(|| std::fs::rename(path, name)),
            None => link(&self.file, name),
        };
        named.map_err(SnapshotError::file("cannot name", name))?;
        self.path = Some(name.into());
        Ok(())
    }

    /// Puts it in the place of `target`, for good. `name` is what it is called for a moment.
    pub(super) fn replace(mut self, target: &Path, name: &Path) -> Result<(), SnapshotError> {
        self.name(name)?;
        again(|| std::fs::rename(name, target))
            .map_err(SnapshotError::file("cannot rename to", target))?;
        self.path = None;
        Ok(())
    }

    /// Keeps the name that it has.
    pub(super) fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(e) = std::fs::remove_file(path)
        {
            log::warn!("cannot remove {}: {e}", path.display());
        }
    }
}

/// A file without a name, in the directory that `name` is in.
fn nameless(name: &Path) -> Result<File, Errno> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = retry_on_intr(|| rustix::fs::open(parent(name), flags, Mode::RUSR | Mode::WUSR))?;
    // It gets its name by this.
    rustix::fs::access(own_link(&file), rustix::fs::Access::EXISTS)?;
    Ok(file.into())
}

fn named(name: &Path) -> io::Result<Temporary> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(name)?;
    Ok(Temporary { file, path: Some(name.into()) })
}

fn link(file: &File, name: &Path) -> io::Result<()> {
    Ok(retry_on_intr(|| linkat(CWD, own_link(file), CWD, name, AtFlags::SYMLINK_FOLLOW))?)
}

fn own_link(file: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// The directory that a file is in.
#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    /// A directory that is empty.
    pub(in super::super) fn scratch() -> PathBuf {
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("husk-temporary-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// What is in a directory.
    pub(in super::super) fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// With a name from the start, as where there is no O_TMPFILE, and without.
    fn both(directory: &Path) -> [Temporary; 2] {
        let (target, name) = (directory.join("target"), directory.join("target.tmp"));
        [Temporary::create(&target, &name).unwrap(), named(&name).unwrap()]
    }

    #[test]
    fn what_is_dropped_is_gone() {
        let directory = scratch();
        let [nameless, named] = both(&directory);
        assert!(nameless.path.is_none(), "the directory for temporary files has no O_TMPFILE");
        assert_eq!(names(&directory), ["target.tmp"]);
        drop((nameless, named));
        assert!(names(&directory).is_empty());
        for mut temporary in both(&directory) {
            temporary.name(&directory.join("side")).unwrap();
            drop(temporary);
            assert!(!names(&directory).contains(&"side".into()));
        }
        assert!(names(&directory).is_empty());
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn what_is_kept_has_its_name() {
        let directory = scratch();
        let target = directory.join("target");
        for (n, temporary) in both(&directory).into_iter().enumerate() {
            write!(temporary.file(), "{n}").unwrap();
            temporary.replace(&target, &directory.join("moment")).unwrap();
            assert_eq!(std::fs::read_to_string(&target).unwrap(), n.to_string());
        }
        assert_eq!(names(&directory), ["target"]);
        let [mut one, other] = both(&directory);
        one.name(&directory.join("side")).unwrap();
        one.keep();
        drop(other);
        assert_eq!(names(&directory), ["side", "target"]);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
