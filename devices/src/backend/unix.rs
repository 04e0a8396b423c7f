//! A listening Unix socket at a path: takes the place of a dead one, never of anything else, and
//! goes when it is dropped.
use std::fs::Metadata;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Why nobody can listen at a path.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path does not fit a socket address, which holds 107 bytes.
    #[error("socket path {path} is too long: the limit is 107 bytes")]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// Another process listens there.
    #[error("socket {path} is in use by another process")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// There is something that is not ours to remove.
    #[error("{path} is {found}; remove it or choose another path")]
    Foreign {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// The host refused.
    #[error("cannot listen at {path}")]
    Host {
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
}

/// The socket; removed from its path when dropped.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    device_and_inode: (u64, u64),
}

impl Listener {
    /// Connections that may wait to be accepted.
    const BACKLOG: i32 = 16;
    /// How long to wait for another process that is looking at the same directory: it takes
    /// microseconds.
    const LOCK_TRIES: u32 = 100;
    const LOCK_PAUSE: Duration = Duration::from_millis(10);

    /// Listens at `path`, a stream socket of mode 0600, non-blocking.
    ///
    /// A socket nobody listens on any more is replaced, if it belongs to our user. A live one, or
    /// a file of another kind, is an error and stays.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let host = |source: Errno| ListenError::Host { path: path.into(), source: source.into() };
        let address = address(path)?;
        let fd = socket(SocketType::STREAM).map_err(host)?;
        // Before bind, so that there is no moment when others may connect (unix(7), NOTES).
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(host)?;
        let _lock = lock_directory(path).map_err(host)?;
        if is_stale(path, &address)? {
            std::fs::remove_file(path)
                .map_err(|source| ListenError::Host { path: path.into(), source })?;
        }
        rustix::net::bind(&fd, &address).map_err(host)?;
        let found = std::fs::symlink_metadata(path)
            .map_err(|source| ListenError::Host { path: path.into(), source })?;
        let listener = Self { fd, path: path.into(), device_and_inode: (found.dev(), found.ino()) };
        rustix::net::listen(&listener.fd, Self::BACKLOG).map_err(host)?;
        Ok(listener)
    }

    /// Whether [`Self::bind`] would succeed now. Leaves no trace.
    pub fn check(path: &Path) -> Result<(), ListenError> {
        is_stale(path, &address(path)?)?;
        super::file::check_parent(path)
            .map_err(|source| ListenError::Host { path: path.into(), source })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes one waiting connection, non-blocking; `Errno::AGAIN` when there is none.
    pub fn accept(&self) -> Result<OwnedFd, Errno> {
        rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let is_ours = |found: Metadata| (found.dev(), found.ino()) == self.device_and_inode;
        if std::fs::symlink_metadata(&self.path).is_ok_and(is_ours)
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            log::warn!("cannot remove socket {}: {e}", self.path.display());
        }
    }
}

fn socket(kind: SocketType) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)
}

/// Two of us that find the same dead socket must not both replace it.
fn lock_directory(path: &Path) -> Result<OwnedFd, Errno> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(parent, flags, Mode::empty())?;
    for _ in 0..Listener::LOCK_TRIES {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN) => std::thread::sleep(Listener::LOCK_PAUSE),
            Err(e) => return Err(e),
            Ok(()) => return Ok(directory),
        }
    }
    Err(Errno::AGAIN)
}

fn address(path: &Path) -> Result<SocketAddrUnix, ListenError> {
    let too_long = || ListenError::TooLong { path: path.into() };
    // 107 bytes and a NUL: one more would bind, and be out of reach for many a client.
    if path.as_os_str().len() > 107 {
        return Err(too_long());
    }
    SocketAddrUnix::new(path).map_err(|e| match e {
        Errno::NAMETOOLONG => too_long(),
        e => ListenError::Host { path: path.into(), source: e.into() },
    })
}

/// Whether there is a socket to make way for a new one. What must stay is an error.
fn is_stale(path: &Path, address: &SocketAddrUnix) -> Result<bool, ListenError> {
    let host = |source| ListenError::Host { path: path.into(), source };
    let found = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        found => found.map_err(host)?,
    };
    let kind = found.file_type();
    let foreign = if kind.is_socket() {
        (found.uid() != rustix::process::geteuid().as_raw()).then_some("another user's socket")
    } else if kind.is_symlink() {
        Some("a symbolic link")
    } else if kind.is_dir() {
        Some("a directory")
    } else if kind.is_file() {
        Some("a regular file")
    } else {
        Some("a FIFO or a device")
    };
    if let Some(found) = foreign {
        return Err(ListenError::Foreign { path: path.into(), found });
    }
    // A socket of another type cannot connect, but is told whether anybody is there; so the owner
    // of a live socket does not see a client that is none.
    let probe = socket(SocketType::DGRAM).map_err(|e| host(e.into()))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => Ok(true),
        Err(Errno::PROTOTYPE | Errno::AGAIN) | Ok(()) => {
            Err(ListenError::InUse { path: path.into() })
        }
        Err(e) => Err(host(e.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("husk-unix-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn is_private_from_the_start_and_gone_at_the_end() {
        let dir = scratch("private");
        let path = dir.join("s");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(std::fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn replaces_the_dead_and_refuses_the_living() {
        let dir = scratch("stale");
        let path = dir.join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = Listener::bind(&path).unwrap();

        let e = Listener::bind(&path).unwrap_err();

        assert!(matches!(e, ListenError::InUse { .. }), "{e}");
        assert!(path.exists());
        assert_eq!(listener.accept().unwrap_err(), Errno::AGAIN, "the probe is not a client");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn leaves_what_is_not_a_socket() {
        let dir = scratch("foreign");
        let (file, link) = (dir.join("file"), dir.join("link"));
        std::fs::write(&file, b"precious").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for (path, what) in [(&file, "a regular file"), (&link, "a symbolic link"), (&dir, "a dir")]
        {
            let e = Listener::bind(path).unwrap_err().to_string();
            assert!(e.contains(what) && e.contains(path.to_str().unwrap()), "{e}");
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn leaves_a_successor_at_its_path() {
        let dir = scratch("successor");
        let path = dir.join("s");
        let first = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = Listener::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn names_a_path_too_long() {
        for len in [108, 109, 5000] {
            let path = PathBuf::from("/".repeat(len));
            let e = Listener::bind(&path).unwrap_err();
            assert!(matches!(e, ListenError::TooLong { .. }), "{len}: {e}");
        }
    }

    #[test]
    fn one_of_many_at_once_wins() {
        let dir = scratch("race");
        let path = dir.join("s");
        for _ in 0..20 {
            drop(UnixListener::bind(&path).unwrap());
            let racers: Vec<_> = (0..8)
                .map(|_| {
                    let path = path.clone();
                    std::thread::spawn(move || Listener::bind(&path))
                })
                .collect();
            let results: Vec<_> = racers.into_iter().map(|r| r.join().unwrap()).collect();
            assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1);
            for e in results.iter().filter_map(|r| r.as_ref().err()) {
                assert!(matches!(e, ListenError::InUse { .. }), "{e}");
            }
        }
        std::fs::remove_dir_all(dir).unwrap();
    }
}
