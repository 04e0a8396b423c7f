//! The socket file: made with mode 0600, taken over when its owner is dead, removed when it is ours.
//!
//! A file that nobody listens on is left over from a husk that was killed, or belongs to one that has
//! bound it and not yet come to listen. So bind and listen happen under a lock (`flock` on the
//! directory, which leaves nothing behind), and only who has the lock may take a file for left over.
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, FlockOperation, Mode, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// What to do with a socket file that nobody listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StalePolicy {
    /// Take its place.
    Replace,
    /// Refuse to start, as Firecracker does.
    Fail,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    /// `sun_path` has no room for it.
    #[error("API socket {path}: the path is {len} bytes long; the limit is {PATH_LEN_MAX}")]
    TooLong { path: PathBuf, len: usize },
    /// Somebody answers there.
    #[error("API socket {path}: another process is listening on it")]
    Live { path: PathBuf },
    /// There is something else.
    #[error("API socket {path}: there is a {what} in its place; remove it or choose another path")]
    Foreign { path: PathBuf, what: &'static str },
    /// As Firecracker says it.
    #[error("Failed to open the API socket at: {path}. Check that it is not already used.")]
    Taken { path: PathBuf },
    /// The directory's lock cannot be had.
    #[error("API socket {path}: cannot lock its directory to replace a left-over socket")]
    Lock { path: PathBuf },
    /// The host refused.
    #[error("API socket {path}: cannot {what}: {source}")]
    Host { path: PathBuf, what: &'static str, source: io::Error },
}

/// Bytes in `sun_path` less the final NUL (unix(7)).
const PATH_LEN_MAX: usize = 107;
/// The lock is held for microseconds; who waits longer is being kept out.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_micros(500);
const BACKLOG: i32 = 128;

/// A listening socket and its file, which goes when this does.
#[derive(Debug)]
pub(crate) struct Listener {
    // Dropped in this order: while the socket listens, no other husk takes the file for left over,
    // so what is removed is certainly ours.
    pub(super) file: SocketFile,
    pub(super) socket: UnixListener,
}

/// Makes the socket file at `path` and listens on it. Only the user may connect: the mode is set
/// before the file has a name.
pub(crate) fn bind(path: &Path, stale: StalePolicy) -> Result<Listener, BindError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > PATH_LEN_MAX {
        return Err(BindError::TooLong { path: path.to_owned(), len: bytes.len() });
    }
    let host = |what| {
        move |errno: Errno| BindError::Host { path: path.to_owned(), what, source: errno.into() }
    };
    let address = SocketAddrUnix::new(path).map_err(host("use this path"))?;
    let socket = new_socket().map_err(host("make a socket"))?;
    // Linux gives the file the mode of the socket's inode, less the umask.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(host("set the mode"))?;

    let lock = DirectoryLock::take(path);
    match rustix::net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) if stale == StalePolicy::Fail => {
            return Err(BindError::Taken { path: path.to_owned() });
        }
        Err(Errno::ADDRINUSE) => {
            check_left_over(path, &address)?;
            if lock.is_none() {
                return Err(BindError::Lock { path: path.to_owned() });
            }
            rustix::fs::unlink(path).map_err(host("remove the left-over socket"))?;
            rustix::net::bind(&socket, &address).map_err(host("bind"))?;
        }
        bound => bound.map_err(host("bind"))?,
    }
    let file = SocketFile::of(path).map_err(host("look at the new socket"))?;
    rustix::net::listen(&socket, BACKLOG).map_err(host("listen"))?;
    drop(lock);
    Ok(Listener { file, socket: UnixListener::from(socket) })
}

fn new_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Refuses anything at `path` that is not a socket without a listener.
fn check_left_over(path: &Path, address: &SocketAddrUnix) -> Result<(), BindError> {
    let host = |what| {
        move |errno: Errno| BindError::Host { path: path.to_owned(), what, source: errno.into() }
    };
    let stat = rustix::fs::lstat(path).map_err(host("look at what is there"))?;
    if let Some(what) = kind_if_foreign(&stat) {
        return Err(BindError::Foreign { path: path.to_owned(), what });
    }
    let probe = new_socket().map_err(host("make a socket"))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => Ok(()),
        // The listener's queue is full: it is alive, if not well.
        Ok(()) | Err(Errno::AGAIN) => Err(BindError::Live { path: path.to_owned() }),
        Err(Errno::PROTOTYPE) => {
            Err(BindError::Foreign { path: path.to_owned(), what: "socket of another type" })
        }
        Err(errno) => Err(host("find out whether it is in use")(errno)),
    }
}

fn kind_if_foreign(stat: &Stat) -> Option<&'static str> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Socket => None,
        FileType::RegularFile => Some("file"),
        FileType::Directory => Some("directory"),
        FileType::Symlink => Some("symbolic link"),
        FileType::Fifo => Some("FIFO"),
        _ => Some("device"),
    }
}

/// Held while this lives.
struct DirectoryLock {
    _directory: File,
}

impl DirectoryLock {
    /// `None` where the directory cannot be opened, its filesystem has no locks or somebody will
    /// not let go: enough to bind, not to replace.
    fn take(path: &Path) -> Option<Self> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let directory = File::open(directory).ok()?;
        let give_up = Instant::now() + LOCK_PATIENCE;
        loop {
            match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Some(Self { _directory: directory }),
                Err(Errno::AGAIN) if Instant::now() < give_up => std::thread::sleep(LOCK_RETRY),
                Err(_) => return None,
            }
        }
    }
}

/// The name of a socket; dropping it removes the file, unless it has become somebody else's.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> rustix::io::Result<Self> {
        // The directory may mean another one by the time of removal, if the path is relative.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let stat = rustix::fs::lstat(&path)?;
        Ok(Self { path, identity: (stat.st_dev, stat.st_ino) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = rustix::fs::lstat(&self.path)
            .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.identity);
        if is_ours && let Err(errno) = rustix::fs::unlink(&self.path) {
            log::warn!("cannot remove the API socket {}: {errno}", self.path.display());
        }
    }
}

/// Connects to the socket at `path`, waiting until `deadline` for room in the listener's queue.
pub(super) fn connect(path: &Path, deadline: Instant) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = new_socket()?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(LOCK_RETRY),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(errno) => return Err(errno.into()),
        }
    }
    rustix::io::ioctl_fionbio(socket.as_fd(), false)?;
    Ok(socket)
}
