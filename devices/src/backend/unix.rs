//! A listening Unix socket at a path: made with mode 0600, takes the place of a dead one, never of
//! anything else, and goes when it is dropped.
//!
//! A socket that nobody listens on is left over from a husk that was killed, or belongs to one that
//! has bound it and not yet come to listen. So bind and listen happen under a lock (`flock` on the
//! directory, which leaves nothing behind), and only who has the lock may take a socket for left
//! over.
//!
//! Does not know what is said on the socket. Errors leave its path to the caller, who knows what
//! the socket is for.
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, Stat, flock};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use super::file;

/// What to do with a socket that nobody listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StalePolicy {
    /// Take its place, if it belongs to our user.
    Replace,
    /// Refuse whatever is there.
    Fail,
}

/// Why nobody can listen at a path.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// `sun_path` has no room for it.
    #[error("the path is {len} bytes long; the limit is {PATH_LEN_MAX}")]
    TooLong {
        /// Bytes in the path.
        len: usize,
    },
    /// Somebody answers there.
    #[error("another process is listening on it")]
    InUse,
    /// There is something that is not ours to remove.
    #[error("there is {found} in its place; remove it or choose another path")]
    Foreign {
        /// What is there, with its article.
        found: &'static str,
    },
    /// There is something, and the policy is [`StalePolicy::Fail`].
    #[error("there is something in its place already")]
    Taken,
    /// A left-over socket has to stay, as the lock on its directory cannot be had.
    #[error("cannot lock its directory to replace a left-over socket")]
    Lock,
    /// The host refused.
    #[error("cannot {doing}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

impl ListenError {
    fn host(doing: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::Host { doing, source: errno.into() }
    }
}

/// Bytes in `sun_path` less the final NUL (unix(7)): one more would bind, and be out of reach for
/// many a client.
const PATH_LEN_MAX: usize = 107;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// The lock is held for microseconds; who waits longer is being kept out.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_micros(500);

/// A listening socket and its name, which goes when this does.
#[derive(Debug)]
pub struct Listener {
    // Dropped in this order: while the socket listens, nobody else takes the name for left over,
    // so what is removed is certainly ours.
    name: SocketName,
    fd: OwnedFd,
}

impl Listener {
    /// Listens at `path`, a stream socket of mode 0600, non-blocking.
    ///
    /// `stale` says what becomes of a socket nobody listens on any more. A live one, another
    /// user's, or a file of another kind is an error and stays. Takes a second at most, when
    /// somebody keeps the directory locked.
    pub fn bind(path: &Path, stale: StalePolicy) -> Result<Self, ListenError> {
        let address = address(path)?;
        let host = ListenError::host;
        let fd = socket(SocketType::STREAM).map_err(host("make a socket"))?;
        // Before bind, so that there is no moment when others may connect: Linux gives the name
        // the mode of the socket's inode, less the umask (unix(7), NOTES).
        rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(host("set the mode"))?;

        let lock = lock_directory(path);
        match retry_on_intr(|| rustix::net::bind(&fd, &address)) {
            Err(Errno::ADDRINUSE) if stale == StalePolicy::Fail => return Err(ListenError::Taken),
            Err(Errno::ADDRINUSE) => {
                check_left_over(path, &address)?;
                if lock.is_none() {
                    return Err(ListenError::Lock);
                }
                rustix::fs::unlink(path).map_err(host("remove the left-over socket"))?;
                retry_on_intr(|| rustix::net::bind(&fd, &address)).map_err(host("bind"))?;
            }
            bound => bound.map_err(host("bind"))?,
        }
        // At once: there are clients that connect as soon as they see the file, and only once.
        let listening = retry_on_intr(|| rustix::net::listen(&fd, BACKLOG));
        let name = SocketFile::of(path).map(SocketName).map_err(host("look at the new socket"))?;
        let listener = Self { name, fd };
        listening.map_err(host("listen"))?;
        drop(lock);
        Ok(listener)
    }

    /// Whether [`Self::bind`] would succeed now, and replace a dead socket. Leaves no trace.
    pub fn check(path: &Path) -> Result<(), ListenError> {
        let address = address(path)?;
        match check_left_over(path, &address) {
            Err(ListenError::Host { source, .. })
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            checked => checked?,
        }
        file::check_parent(path).map_err(|source| ListenError::Host { doing: "bind", source })
    }

    /// Where it listens; absolute.
    pub fn path(&self) -> &Path {
        &self.name.0.path
    }

    /// Its name.
    pub fn name(&self) -> &SocketName {
        &self.name
    }

    /// Takes one waiting connection, non-blocking; `Errno::AGAIN` when there is none.
    pub fn accept(&self) -> Result<OwnedFd, Errno> {
        accept(&self.fd)
    }

    /// For who accepts by other means. Drop the name before the descriptor is closed.
    pub fn into_parts(self) -> (SocketName, OwnedFd) {
        (self.name, self.fd)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The file of a socket, whoever listens on it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SocketFile {
    path: PathBuf,
    device_and_inode: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> rustix::io::Result<Self> {
        // The directory may mean another one by the time of removal, if the path is relative.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
        let stat = rustix::fs::lstat(&path)?;
        Ok(Self { path, device_and_inode: (stat.st_dev, stat.st_ino) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it, unless it has become somebody else's.
    pub fn remove(&self) {
        let is_ours = |stat: Stat| (stat.st_dev, stat.st_ino) == self.device_and_inode;
        if rustix::fs::lstat(&self.path).is_ok_and(is_ours)
            && let Err(errno) = rustix::fs::unlink(&self.path)
        {
            log::warn!("cannot remove the socket {}: {errno}", self.path.display());
        }
    }
}

/// The name of a socket; dropping it removes the file, unless it has become somebody else's.
#[derive(Debug)]
pub struct SocketName(SocketFile);

impl SocketName {
    /// What it is the name of.
    pub fn file(&self) -> &SocketFile {
        &self.0
    }
}

impl Drop for SocketName {
    fn drop(&mut self) {
        self.0.remove();
    }
}

/// What [`Listener::accept`] does, of a socket that was taken out of one.
pub fn accept(listener: &OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
}

fn address(path: &Path) -> Result<SocketAddrUnix, ListenError> {
    let unusable = ListenError::host("use this path");
    match path.as_os_str().as_bytes().len() {
        // It would be an abstract socket.
        0 => Err(unusable(Errno::NOENT)),
        len if len > PATH_LEN_MAX => Err(ListenError::TooLong { len }),
        _ => SocketAddrUnix::new(path).map_err(unusable),
    }
}

fn socket(kind: SocketType) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    retry_on_intr(|| rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None))
}

/// Two of us that find the same dead socket must not both replace it.
///
/// `None` where there is no directory, it cannot be read, its filesystem has no locks or somebody
/// will not let go: enough to bind, not to replace.
fn lock_directory(path: &Path) -> Option<OwnedFd> {
    // A FIFO in its place would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let directory =
        retry_on_intr(|| rustix::fs::open(file::parent(path), flags, Mode::empty())).ok()?;
    let start = Instant::now();
    loop {
        match retry_on_intr(|| flock(&directory, FlockOperation::NonBlockingLockExclusive)) {
            Ok(()) => return Some(directory),
            Err(Errno::AGAIN) if start.elapsed() < LOCK_PATIENCE => std::thread::sleep(LOCK_RETRY),
            Err(_) => return None,
        }
    }
}

/// Refuses anything at `path` that is not our user's stream socket without a listener.
fn check_left_over(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let host = ListenError::host;
    let found = rustix::fs::lstat(path).map_err(host("look at what is there"))?;
    let kind = FileType::from_raw_mode(found.st_mode);
    if kind != FileType::Socket {
        return Err(ListenError::Foreign { found: file::name_of(kind) });
    }
    // A socket of another type cannot connect, but is told whether anybody is there; so the owner
    // of a live socket does not see a client that is none.
    let probe = socket(SocketType::DGRAM).map_err(host("make a socket"))?;
    match retry_on_intr(|| rustix::net::connect(&probe, address)) {
        Err(Errno::PROTOTYPE) => Err(ListenError::InUse),
        // It connects, or has another peer.
        Ok(()) | Err(Errno::PERM) => Err(ListenError::Foreign { found: "a datagram socket" }),
        _ if found.st_uid != rustix::process::geteuid().as_raw() => {
            Err(ListenError::Foreign { found: "another user's socket" })
        }
        Err(Errno::CONNREFUSED) => Ok(()),
        Err(errno) => Err(host("find out whether it is in use")(errno)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    /// A directory that goes at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("husk-unix-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }

        /// A socket that nobody listens on.
        fn dead(&self, name: &str) -> PathBuf {
            let path = self.path(name);
            drop(UnixListener::bind(&path).unwrap());
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn bind(path: &Path) -> Result<Listener, ListenError> {
        Listener::bind(path, StalePolicy::Replace)
    }

    #[test]
    fn is_private_from_the_start_and_gone_at_the_end() {
        let dir = Scratch::new("private");
        let path = dir.path("s");
        let listener = bind(&path).unwrap();
        assert_eq!(std::fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn replaces_the_dead_and_refuses_the_living() {
        let dir = Scratch::new("stale");
        let path = dir.dead("s");
        let listener = bind(&path).unwrap();

        let e = bind(&path).unwrap_err();

        assert!(matches!(e, ListenError::InUse), "{e}");
        assert!(path.exists());
        assert_eq!(listener.accept().unwrap_err(), Errno::AGAIN, "the probe is not a client");
    }

    #[test]
    fn leaves_the_dead_too_if_told_to_fail() {
        let dir = Scratch::new("fail");
        let path = dir.dead("s");
        let inode = std::fs::metadata(&path).unwrap().ino();

        let e = Listener::bind(&path, StalePolicy::Fail).unwrap_err();

        assert!(matches!(e, ListenError::Taken), "{e}");
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode);
        Listener::bind(&dir.path("free"), StalePolicy::Fail).unwrap();
    }

    #[test]
    fn leaves_what_is_not_a_dead_socket_of_ours() {
        let dir = Scratch::new("foreign");
        let (file, link) = (dir.path("file"), dir.path("link"));
        std::fs::write(&file, b"precious").unwrap();
        symlink("/nonexistent", &link).unwrap();
        let datagram = dir.path("datagram");
        let live = UnixDatagram::bind(&datagram).unwrap();
        let mut all = vec![
            (file.clone(), "a regular file"),
            (link, "a symbolic link"),
            (dir.0.clone(), "a directory"),
            (datagram.clone(), "a datagram socket"),
        ];
        // Only root can make one.
        let others = dir.dead("others");
        if std::os::unix::fs::lchown(&others, Some(65534), None).is_ok() {
            all.push((others, "another user's socket"));
        }
        for (path, what) in all {
            let e = bind(&path).unwrap_err();
            assert!(matches!(e, ListenError::Foreign { found } if found == what), "{what}: {e:?}");
            assert!(path.symlink_metadata().is_ok());
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        // Nor is one that talks to somebody else taken for dead.
        let peer = UnixDatagram::bind(dir.path("peer")).unwrap();
        live.connect(dir.path("peer")).unwrap();
        assert!(matches!(bind(&datagram), Err(ListenError::Foreign { .. })));
        drop(peer);
    }

    #[test]
    fn leaves_a_successor_at_its_path() {
        let dir = Scratch::new("successor");
        let path = dir.path("s");
        let first = bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }

    #[test]
    fn names_a_path_too_long() {
        for len in [108, 109, 5000] {
            let path = PathBuf::from("/".repeat(len));
            let e = bind(&path).unwrap_err();
            assert!(matches!(e, ListenError::TooLong { len: l } if l == len), "{len}: {e}");
        }
        let dir = Scratch::new("long");
        let room = 106 - dir.0.as_os_str().len();
        bind(&dir.path(&"x".repeat(room))).unwrap();
    }

    #[test]
    fn refuses_a_path_that_leads_nowhere() {
        let dir = Scratch::new("nowhere");
        let fifo = dir.path("fifo");
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, mode, 0).unwrap();
        for path in [PathBuf::new(), dir.path("none/s"), fifo.join("s"), dir.path("a\0b")] {
            let e = bind(&path).unwrap_err();
            assert!(matches!(e, ListenError::Host { .. }), "{path:?}: {e}");
        }
    }

    #[test]
    fn is_checked_without_a_trace() {
        let dir = Scratch::new("check");
        let (dead, new, file) = (dir.dead("dead"), dir.path("new"), dir.path("file"));
        std::fs::write(&file, "").unwrap();
        Listener::check(&dead).unwrap();
        Listener::check(&new).unwrap();
        assert!(dead.exists() && !new.exists());
        let _live = bind(&new).unwrap();
        for path in [&new, &file, &file.join("s"), &dir.path("none/s")] {
            let (checked, bound) = (Listener::check(path).unwrap_err(), bind(path).unwrap_err());
            assert_eq!(checked.to_string(), bound.to_string());
        }
    }

    #[test]
    fn a_lock_that_nobody_lets_go_keeps_only_left_over_sockets() {
        let dir = Scratch::new("lock");
        let dead = dir.dead("dead");
        let directory = std::fs::File::open(&dir.0).unwrap();
        flock(&directory, FlockOperation::LockExclusive).unwrap();
        let start = Instant::now();
        assert!(matches!(bind(&dead), Err(ListenError::Lock)));
        bind(&dir.path("new")).unwrap();
        assert!(start.elapsed() < LOCK_PATIENCE * 10);
        drop(directory);
        bind(&dead).unwrap();
    }

    #[test]
    fn one_of_many_at_once_wins() {
        let dir = Scratch::new("race");
        for _ in 0..20 {
            let path = dir.dead("s");
            let racers: Vec<_> = (0..8)
                .map(|_| {
                    let path = path.clone();
                    std::thread::spawn(move || bind(&path))
                })
                .collect();
            let results: Vec<_> = racers.into_iter().map(|r| r.join().unwrap()).collect();
            assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1);
            for e in results.iter().filter_map(|r| r.as_ref().err()) {
                assert!(matches!(e, ListenError::InUse), "{e}");
            }
            UnixStream::connect(&path).unwrap();
        }
    }
}
