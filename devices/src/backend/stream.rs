//! One end of a host file, terminal, pipe or socket that never makes us wait: for the serial console
//! and for husk's own words.
//!
//! A descriptor we were given (stdin, stdout) is shared with whoever gave it: to set `O_NONBLOCK`
//! on it would set it in the user's shell too. So it is opened a second time where that works, and
//! asked before each read or write where it does not.
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

/// How not to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Means {
    /// The open file description is ours and non-blocking, or of a kind that does not wait.
    Plain,
    /// A socket: ask for it with each call.
    Socket,
    /// Ask first; when it is ready, it takes this many bytes without waiting.
    Poll(usize),
}

/// Which way a descriptor is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Read from.
    Input,
    /// Written to.
    Output,
}

/// A descriptor to read from or to write to without waiting.
#[derive(Debug)]
pub struct Stream {
    fd: OwnedFd,
    means: Means,
    is_terminal: bool,
}

impl Stream {
    /// Ready for writing means at least this much room in a pipe (POSIX: a write of `PIPE_BUF`
    /// bytes is atomic).
    const PIPE_BUF: usize = 4096;

    /// A descriptor that is ours alone and already non-blocking.
    pub fn owned(fd: OwnedFd) -> Self {
        Self { fd, means: Means::Plain, is_terminal: false }
    }

    /// A connected socket.
    pub fn socket(fd: OwnedFd) -> Self {
        Self { fd, means: Means::Socket, is_terminal: false }
    }

    /// A descriptor shared with others, such as stdin.
    pub fn shared(fd: BorrowedFd<'_>, direction: Direction) -> std::io::Result<Self> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
        let is_terminal = rustix::termios::isatty(fd);
        let (reopens, otherwise) = match kind {
            FileType::Socket => (false, Means::Socket),
            FileType::Fifo => (true, Means::Poll(Self::PIPE_BUF)),
            // To open the master of a pseudo-terminal again would make another one.
            FileType::CharacterDevice if is_terminal => {
                (rustix::pty::ptsname(fd, Vec::new()).is_err(), Means::Poll(1))
            }
            FileType::CharacterDevice => (false, Means::Poll(Self::PIPE_BUF)),
            _ => (false, Means::Plain),
        };
        if reopens && let Ok(fd) = reopen(fd, direction) {
            return Ok(Self { fd, means: Means::Plain, is_terminal });
        }
        let fd = rustix::io::fcntl_dupfd_cloexec(fd, 3)?;
        Ok(Self { fd, means: otherwise, is_terminal })
    }

    /// Whether this is a terminal.
    pub fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// Reads what is there: 0 at the end, `Errno::AGAIN` when there is nothing yet.
    pub fn read(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        again(|| match self.means {
            Means::Plain => rustix::io::read(&self.fd, &mut *buf),
            Means::Socket => {
                rustix::net::recv(&self.fd, &mut *buf, RecvFlags::DONTWAIT).map(|(_, n)| n)
            }
            Means::Poll(_) => {
                self.poll(PollFlags::IN)?;
                rustix::io::read(&self.fd, &mut *buf)
            }
        })
    }

    /// Writes what there is room for; `Errno::AGAIN` when there is none.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        again(|| match self.means {
            Means::Plain => rustix::io::write(&self.fd, bytes),
            Means::Socket => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                rustix::net::send(&self.fd, bytes, flags)
            }
            Means::Poll(at_once) => {
                self.poll(PollFlags::OUT)?;
                rustix::io::write(&self.fd, bytes.get(..at_once).unwrap_or(bytes))
            }
        })
    }

    /// Whether the other side is gone for good.
    pub fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::empty())];
        again(|| rustix::event::poll(&mut fds, Some(&rustix::time::Timespec::default()))).is_ok()
            && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// `Errno::AGAIN` unless ready; an error or hang-up is ready, as the call will tell.
    fn poll(&self, events: PollFlags) -> Result<(), Errno> {
        let mut fds = [PollFd::new(&self.fd, events)];
        match rustix::event::poll(&mut fds, Some(&rustix::time::Timespec::default()))? {
            0 => Err(Errno::AGAIN),
            _ => Ok(()),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Opens the file behind `fd` again, as an open file description of our own.
fn reopen(fd: BorrowedFd<'_>, direction: Direction) -> rustix::io::Result<OwnedFd> {
    let access = match direction {
        Direction::Input => OFlags::RDONLY,
        Direction::Output => OFlags::WRONLY,
    };
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    again(|| rustix::fs::open(&path, flags, Mode::empty()))
}

/// Repeats a call that a signal interrupted.
fn again<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    rustix::io::retry_on_intr(&mut call)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes until there is no more room: returns at all only if nothing waits.
    fn fill(stream: &Stream) -> usize {
        let mut total = 0;
        loop {
            match stream.write(&[b'x'; 1000]) {
                Ok(written) => total += written,
                Err(e) => {
                    assert_eq!(e, Errno::AGAIN);
                    return total;
                }
            }
        }
    }

    #[test]
    fn asking_first_never_waits_on_a_pipe() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let input = Stream { fd: reader, means: Means::Poll(4096), is_terminal: false };
        let output = Stream { fd: writer, means: Means::Poll(4096), is_terminal: false };
        let mut buf = [0; 100];
        assert_eq!(input.read(&mut buf), Err(Errno::AGAIN));
        assert!(fill(&output) >= 60_000);
        assert_eq!(input.read(&mut buf), Ok(100));
        drop(output);
        assert!(input.is_hung_up());
        while input.read(&mut [0; 4096]).unwrap() != 0 {}
    }

    #[test]
    fn asking_first_never_waits_on_a_terminal() {
        let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
        let stream = Stream { fd: slave, means: Means::Poll(1), is_terminal: true };
        assert_eq!(stream.read(&mut [0]), Err(Errno::AGAIN));
        assert!(fill(&stream) > 1000);
    }

    #[test]
    fn opens_again_what_it_shares() {
        let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
        for direction in [Direction::Input, Direction::Output] {
            let stream = Stream::shared(slave.as_fd(), direction).unwrap();
            assert_eq!((stream.means, stream.is_terminal), (Means::Plain, true));
            let master = Stream::shared(master.as_fd(), direction).unwrap();
            assert_eq!(master.means, Means::Poll(1), "to open it again makes another one");
        }
        let shared = rustix::fs::fcntl_getfl(&slave).unwrap();
        assert!(!shared.contains(OFlags::NONBLOCK));
    }
}
