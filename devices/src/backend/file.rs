//! Opening what the user named, without being blocked or fooled by it.
//!
//! A path may lead to a FIFO that nobody writes to, a device that answers forever or a directory.
//! So everything is opened non-blocking, looked at through the open descriptor, and refused by
//! type before it can block anybody.
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};

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
}

/// Whether `e` came about because the host ran out of something: descriptors or memory. Then it is
/// not the user's words that are at fault.
pub fn is_shortage(e: &(dyn std::error::Error + 'static)) -> bool {
    let causes = std::iter::successors(Some(e), |e| e.source());
    causes
        .filter_map(|e| e.downcast_ref::<std::io::Error>()?.raw_os_error())
        .any(|errno| matches!(errno, libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

/// Opens `path` for `access`, if it is of `kind`.
pub fn open(path: &Path, access: Access, kind: Kind) -> Result<File, OpenError> {
    let (flags, purpose) = match access {
        Access::Read => (OFlags::RDONLY, "reading"),
        Access::ReadWrite => (OFlags::RDWR, "reading and writing"),
    };
    let failed = |source| OpenError::Open { path: path.into(), purpose, source };
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    // What cannot be opened is best explained by what it is: a directory says EISDIR, a socket ENXIO.
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| {
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
    // What is left may wait: of a file that must not, io_uring before Linux 5.13 reads only what is in
    // memory already, and answers EAGAIN for the rest.
    let status = rustix::fs::fcntl_getfl(&file).map_err(|e| failed(e.into()))?;
    rustix::fs::fcntl_setfl(&file, status.difference(OFlags::NONBLOCK))
        .map_err(|e| failed(e.into()))?;
    Ok(file)
}

/// Refuses a path at which no file could be made, because of the directory that it is in.
pub fn check_parent(path: &Path) -> std::io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    match std::fs::metadata(parent)?.is_dir() {
        true => Ok(rustix::fs::access(parent, access)?),
        false => Err(std::io::ErrorKind::NotADirectory.into()),
    }
}

/// Refuses a path to which output could not be appended, without making a file there.
pub fn check_writable(path: &Path) -> std::io::Result<()> {
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
}
