//! Opening what the user named, without being blocked or fooled by it.
//!
//! A path may lead to a FIFO that nobody writes to, a device that answers forever or a directory.
//! So everything is opened non-blocking, looked at through the open descriptor, and refused by
//! type before it can block anybody.
use std::fs::{File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, open as open_at};
use rustix::io::retry_on_intr;

use super::passed::{self, Held};

/// What the file is to be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    ReadWrite,
}

/// Which kinds of file will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    Regular,
    /// A regular file or a block device.
    Disk,
}

/// Why a file was refused. Says which path and what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host refused.
    #[error("cannot open {path} for {purpose}: {source}")]
    Open {
        /// The path.
        path: PathBuf,
        /// "reading" or "reading and writing".
        purpose: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// It is not the kind of file wanted.
    #[error("{path} is {found}, want {wanted}")]
    Kind {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What was wanted.
        wanted: &'static str,
    },
    /// There is no path.
    #[error("the path is empty")]
    Empty,
    /// It names a descriptor that is not here.
    #[error("{}", passed::missing(.0))]
    NotHeld(PathBuf),
    /// It names a descriptor that cannot be used so.
    #[error("{path} {why}")]
    Unfit {
        /// The name.
        path: PathBuf,
        /// What it is, and what was wanted.
        why: &'static str,
    },
}

/// Whether `e` came about because the host ran out of something: descriptors or memory. Then it is
/// not the user's words that are at fault.
pub fn is_shortage(e: &(dyn std::error::Error + 'static)) -> bool {
    let causes = std::iter::successors(Some(e), |e| e.source());
    causes
        .filter_map(|e| e.downcast_ref::<std::io::Error>()?.raw_os_error())
        .any(|errno| matches!(errno, libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

/// Opens `path` for `access`, if it is of `kind`. What names a descriptor that was passed is copied: its offset and its
/// lock are those of whoever else has it.
pub fn open(path: &Path, access: Access, kind: Kind) -> Result<File, OpenError> {
    if passed::is_descriptor(path) {
        let held = passed::held(path).ok_or_else(|| OpenError::NotHeld(path.into()))?;
        return open_held(&held, path, access, kind);
    }
    if path.as_os_str().is_empty() {
        return Err(OpenError::Empty);
    }
    let (flags, purpose) = match access {
        Access::Read => (OFlags::RDONLY, "reading"),
        Access::ReadWrite => (OFlags::RDWR, "reading and writing"),
    };
    let failed = |source| OpenError::Open { path: path.into(), purpose, source };
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    // What cannot be opened is best explained by what it is: a directory says EISDIR, a socket ENXIO.
    let file = retry_on_intr(|| open_at(path, flags, Mode::empty())).map_err(|e| {
        let found = std::fs::metadata(path).ok().map(|m| FileType::from_raw_mode(m.mode()));
        match found.and_then(|found| refuse(found, kind)) {
            Some((found, wanted)) => OpenError::Kind { path: path.into(), found, wanted },
            None => failed(e.into()),
        }
    })?;
    let file = File::from(file);
    let found = FileType::from_raw_mode(file.metadata().map_err(failed)?.mode());
    if let Some((found, wanted)) = refuse(found, kind) {
        return Err(OpenError::Kind { path: path.into(), found, wanted });
    }
    let status = rustix::fs::fcntl_getfl(&file).map_err(|e| failed(e.into()))?;
    let_wait(&file, status).map_err(failed)?;
    Ok(file)
}

/// What is left may wait: of a file that must not, io_uring before Linux 5.13 reads only what is in
/// memory already, and answers EAGAIN for the rest.
fn let_wait(file: &File, status: OFlags) -> std::io::Result<()> {
    Ok(rustix::fs::fcntl_setfl(file, status.difference(OFlags::NONBLOCK))?)
}

/// Copies a descriptor that was passed, if it could have been opened so.
fn open_held(held: &Held, path: &Path, access: Access, kind: Kind) -> Result<File, OpenError> {
    let failed = |source| OpenError::Open { path: path.into(), purpose: "use", source };
    let file = File::from(held.as_fd().try_clone_to_owned().map_err(failed)?);
    let found = FileType::from_raw_mode(file.metadata().map_err(failed)?.mode());
    if let Some((found, wanted)) = refuse(found, kind) {
        return Err(OpenError::Kind { path: path.into(), found, wanted });
    }
    let status = rustix::fs::fcntl_getfl(&file).map_err(|e| failed(e.into()))?;
    match misfit(status, access) {
        Some(why) => Err(OpenError::Unfit { path: path.into(), why }),
        None => let_wait(&file, status).map(|()| file).map_err(failed),
    }
}

/// What keeps a descriptor with these flags from being used for `access`, if anything does.
fn misfit(status: OFlags, access: Access) -> Option<&'static str> {
    let mode = status & OFlags::RWMODE;
    if status.contains(OFlags::PATH) {
        return Some("names a file and does not open it (O_PATH): open it for reading");
    }
    // Each write would go to the end; and the guest's buffers are not aligned as the host wants them.
    if status.contains(OFlags::APPEND) && access == Access::ReadWrite {
        return Some("is open for appending: open it without O_APPEND");
    }
    if status.contains(OFlags::DIRECT) {
        return Some("is open past the page cache: open it without O_DIRECT");
    }
    match access {
        Access::Read if mode == OFlags::WRONLY => Some("is open for writing only, want reading"),
        Access::ReadWrite if mode == OFlags::WRONLY => {
            Some("is open for writing only, want reading and writing")
        }
        Access::ReadWrite if mode == OFlags::RDONLY => {
            Some("is open for reading only, want reading and writing")
        }
        Access::Read | Access::ReadWrite => None,
    }
}

/// A file from its beginning, whatever its offset is: that may be somebody else's.
#[derive(Debug)]
pub struct FromStart<'a> {
    file: &'a File,
    offset: u64,
}

impl<'a> FromStart<'a> {
    /// All of `file`.
    pub fn of(file: &'a File) -> Self {
        Self { file, offset: 0 }
    }
}

impl std::io::Read for FromStart<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read_at(bytes, self.offset)?;
        self.offset = self.offset.saturating_add(count as u64);
        Ok(count)
    }
}

/// What is known of the file that `path` names, by path or as a descriptor that was passed.
pub fn metadata(path: &Path) -> std::io::Result<Metadata> {
    if !passed::is_descriptor(path) {
        return std::fs::metadata(path);
    }
    let held = passed::held(path).ok_or(std::io::ErrorKind::NotFound)?;
    File::from(held.as_fd().try_clone_to_owned()?).metadata()
}

/// The directory that `path` is in.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Refuses a path at which no file could be made, because of the directory that it is in.
pub fn check_parent(path: &Path) -> std::io::Result<()> {
    let parent = parent(path);
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    match std::fs::metadata(parent)?.is_dir() {
        true => Ok(rustix::fs::access(parent, access)?),
        false => Err(std::io::ErrorKind::NotADirectory.into()),
    }
}

/// Refuses a path to which output could not be appended, without making a file there.
pub fn check_writable(path: &Path) -> std::io::Result<()> {
    if path.as_os_str().is_empty() {
        return Err(std::io::Error::new(std::io::ErrorKind::NotFound, "the path is empty"));
    }
    match rustix::fs::access(path, rustix::fs::Access::WRITE_OK) {
        Err(rustix::io::Errno::NOENT) => check_parent(path),
        writable => Ok(writable?),
    }
}

/// What a file of this type is called, with its article.
pub fn name_of(found: FileType) -> &'static str {
    match found {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::BlockDevice => "a block device",
        FileType::CharacterDevice => "a character device",
        _ => "something unknown",
    }
}

fn refuse(found: FileType, kind: Kind) -> Option<(&'static str, &'static str)> {
    match (found, kind) {
        (FileType::RegularFile, _) | (FileType::BlockDevice, Kind::Disk) => None,
        (_, Kind::Regular) => Some((name_of(found), "a regular file")),
        (_, Kind::Disk) => Some((name_of(found), "a regular file or a block device")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_by_type_without_blocking() {
        let dir = std::env::temp_dir().join(format!("husk-open-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let fifo = dir.join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        let socket = dir.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let file = dir.join("file");
        std::fs::write(&file, b"x").unwrap();

        for kind in [Kind::Regular, Kind::Disk] {
            let opened = open(&file, Access::ReadWrite, kind).unwrap();
            let status = rustix::fs::fcntl_getfl(&opened).unwrap();
            assert!(!status.contains(OFlags::NONBLOCK), "io_uring of old would not wait for it");
            for (path, what) in [
                (fifo.as_path(), "a FIFO"),
                (dir.as_path(), "a directory"),
                (socket.as_path(), "a socket"),
                (Path::new("/dev/zero"), "a character device"),
            ] {
                for access in [Access::Read, Access::ReadWrite] {
                    let e = open(path, access, kind).unwrap_err().to_string();
                    assert!(e.contains(what), "{e}");
                }
            }
            let e = open(&dir.join("none"), Access::Read, kind).unwrap_err().to_string();
            assert!(e.contains("none") && e.contains("No such file"), "{e}");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }

    /// A name for a descriptor as if it had been passed.
    fn passed(fd: impl Into<std::os::fd::OwnedFd>) -> passed::Name {
        let arrived = [Held::new(fd.into())].into();
        passed::with(&arrived, || serde_json::from_str(r#""passed:0""#)).unwrap()
    }

    #[test]
    fn a_descriptor_that_was_passed_has_to_fit() {
        let path = std::env::temp_dir().join(format!("husk-passed-{}", std::process::id()));
        std::fs::write(&path, b"x").unwrap();
        let opened = |flags| passed(rustix::fs::open(&path, flags, Mode::empty()).unwrap());
        let direct = OFlags::RDWR | OFlags::DIRECT;
        let both = [Access::Read, Access::ReadWrite];
        for (flags, accesses, words) in [
            (OFlags::WRONLY, &both[..], "is open for writing only, want reading"),
            (OFlags::RDONLY, &both[1..], "is open for reading only, want reading and writing"),
            (OFlags::RDWR | OFlags::APPEND, &both[1..], "O_APPEND"),
            (direct, &both[..], "O_DIRECT"),
            (OFlags::PATH, &both[..], "O_PATH"),
        ] {
            for access in accesses {
                let name = opened(flags);
                let e = open(&name, *access, Kind::Regular).unwrap_err().to_string();
                assert!(e.starts_with(name.to_str().unwrap()) && e.contains(words), "{e}");
            }
        }
        for (flags, access) in [
            (OFlags::RDONLY, Access::Read),
            (OFlags::RDWR, Access::Read),
            (OFlags::RDWR | OFlags::NONBLOCK, Access::ReadWrite),
            (OFlags::APPEND, Access::Read),
        ] {
            let name = opened(flags);
            let file = open(&name, access, Kind::Disk).unwrap();
            assert!(!rustix::fs::fcntl_getfl(&file).unwrap().contains(OFlags::NONBLOCK));
            assert_eq!(metadata(&name).unwrap().ino(), std::fs::metadata(&path).unwrap().ino());
        }
        std::fs::remove_file(&path).unwrap();
        let (reader, _writer) = std::io::pipe().unwrap();
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let directory = File::open(std::env::temp_dir()).unwrap();
        let null = File::open("/dev/null").unwrap();
        for (name, what) in [
            (passed(reader), "a FIFO"),
            (passed(socket), "a socket"),
            (passed(directory), "a directory"),
            (passed(null), "a character device"),
        ] {
            let e = open(&name, Access::Read, Kind::Disk).unwrap_err().to_string();
            assert!(e.contains(&format!("is {what}, want a regular file or")), "{e}");
        }
        for name in ["passed:", "passed:0", "held:0", "held:x"] {
            let e = open(Path::new(name), Access::Read, Kind::Disk).unwrap_err();
            assert!(matches!(e, OpenError::NotHeld(_)), "{e}");
            assert!(metadata(Path::new(name)).is_err());
        }
    }
}
