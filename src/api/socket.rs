//! The API's socket: the listening end in the API's words, and the connecting end.
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use devices::backend::unix::{ListenError, Listener, StalePolicy};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    /// As Firecracker says it.
    #[error("Failed to open the API socket at: {path}. Check that it is not already used.")]
    Taken { path: PathBuf },
    /// Anything else.
    #[error("API socket {path}")]
    Listen { path: PathBuf, source: ListenError },
}

const CONNECT_RETRY: Duration = Duration::from_micros(500);

/// Makes the socket at `path` and listens on it.
pub(crate) fn bind(path: &Path, stale: StalePolicy) -> Result<Listener, BindError> {
    Listener::bind(path, stale).map_err(|source| match source {
        ListenError::Taken => BindError::Taken { path: path.to_owned() },
        source => BindError::Listen { path: path.to_owned(), source },
    })
}

/// Connects to the socket at `path`, waiting until `deadline` for room in the listener's queue.
pub(super) fn connect(path: &Path, deadline: Instant) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let kind = SocketType::STREAM;
    let socket =
        retry_on_intr(|| rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None))?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(CONNECT_RETRY),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(errno) => return Err(errno.into()),
        }
    }
    rustix::io::ioctl_fionbio(socket.as_fd(), false)?;
    Ok(socket)
}
