//! A stream of the host: a Unix socket that never makes us wait, and what it has not yet taken.
use std::collections::VecDeque;
use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::sys::rw::IoSlices;

/// Longest line that asks for a port, and what ends it.
const LINE_MAX: usize = 32;

/// One end of a connection between us and a process of the host. Its descriptor is watched
/// edge-triggered: the flags say what it was last known to be ready for.
#[derive(Debug)]
pub(super) struct HostSocket {
    fd: OwnedFd,
    /// From the guest, to be sent when there is room. Bounded by the credit the guest is given.
    backlog: VecDeque<u8>,
    is_readable: bool,
    is_writable: bool,
    /// Nothing follows the backlog.
    is_ending: bool,
}

/// What came of an attempt to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    Bytes(u32),
    Nothing,
    End,
}

impl HostSocket {
    /// A connected, non-blocking socket. Whether it is ready is yet to be found out.
    pub(super) fn new(fd: OwnedFd) -> Self {
        let backlog = VecDeque::new();
        Self { fd, backlog, is_readable: true, is_writable: true, is_ending: false }
    }

    /// Connects to who listens at `path`. [`Errno::AGAIN`] if too many wait there already.
    pub(super) fn connect(path: &Path) -> Result<Self, Errno> {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&fd, &address)?;
        Ok(Self::new(fd))
    }

    /// The kernel says that it is ready.
    pub(super) fn note_ready(&mut self, is_readable: bool, is_writable: bool) {
        self.is_readable |= is_readable;
        self.is_writable |= is_writable;
    }

    /// Whether there may be something to receive.
    pub(super) fn is_readable(&self) -> bool {
        self.is_readable
    }

    /// Whether everything was sent.
    pub(super) fn is_flushed(&self) -> bool {
        self.backlog.is_empty()
    }

    /// Reads the line that asks for a port, and not a byte more: `None` if it is not all there.
    pub(super) fn read_line(&mut self) -> Result<Option<Vec<u8>>, Errno> {
        let mut line = [0; LINE_MAX];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let peeked = match rustix::net::recv(&self.fd, &mut line, flags) {
            Ok((_, 0)) => return Err(Errno::PIPE),
            Ok((_, peeked)) => line.get(..peeked).unwrap_or_default(),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(e) => return Err(e),
        };
        let Some(end) = peeked.iter().position(|byte| *byte == b'\n') else {
            return if peeked.len() < LINE_MAX { Ok(None) } else { Err(Errno::MSGSIZE) };
        };
        let mut line = vec![0; end.saturating_add(1)];
        rustix::net::recv(&self.fd, &mut line[..], RecvFlags::DONTWAIT)?;
        Ok(Some(line))
    }

    /// Says a few bytes to somebody who has heard nothing yet, so there is room.
    pub(super) fn say(&self, bytes: &[u8]) -> Result<(), Errno> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match rustix::net::send(&self.fd, bytes, flags)? {
            sent if sent == bytes.len() => Ok(()),
            _ => Err(Errno::NOBUFS),
        }
    }

    /// Fills `slices` once.
    pub(super) fn receive(&mut self, slices: &mut IoSlices<'_>) -> std::io::Result<Received> {
        match slices.read(&self.fd) {
            Ok(0) => Ok(Received::End),
            Ok(bytes) => Ok(Received::Bytes(u32::try_from(bytes).unwrap_or(u32::MAX))),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.is_readable = false;
                Ok(Received::Nothing)
            }
            Err(e) => Err(e),
        }
    }

    /// Sends `payload`, straight from where it lies as far as there is room; the rest waits. Gives
    /// the bytes that have gone.
    pub(super) fn send(&mut self, mut payload: IoSlices<'_>) -> std::io::Result<u32> {
        let mut sent: u32 = 0;
        while self.backlog.is_empty() && self.is_writable && payload.bytes() > 0 {
            match payload.send(&self.fd) {
                Ok(bytes) => sent = sent.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.is_writable = false,
                Err(e) => return Err(e),
            }
        }
        payload.append_to(&mut self.backlog);
        Ok(sent)
    }

    /// Sends what waits, as far as there is room; gives the bytes that have gone.
    pub(super) fn flush(&mut self) -> std::io::Result<u32> {
        let mut sent: u32 = 0;
        while self.is_writable && !self.backlog.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(&self.fd, self.backlog.as_slices().0, flags) {
                Ok(bytes) => {
                    self.backlog.drain(..bytes);
                    sent = sent.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.is_writable = false,
                Err(e) => return Err(e.into()),
            }
        }
        if self.backlog.is_empty() {
            // Most connections never need it again.
            self.backlog = VecDeque::new();
            if self.is_ending {
                self.shut(Shutdown::Write);
            }
        }
        Ok(sent)
    }

    /// Tells the peer that nothing follows, as soon as it has what waits.
    pub(super) fn end(&mut self) {
        self.is_ending = true;
        if self.backlog.is_empty() {
            self.shut(Shutdown::Write);
        }
    }

    /// Tells the peer that nobody reads what it sends.
    pub(super) fn stop_reading(&mut self) {
        self.is_readable = false;
        self.shut(Shutdown::Read);
    }

    /// The peer takes no more: gives the bytes that waited for it.
    pub(super) fn discard(&mut self) -> u32 {
        let waited = std::mem::take(&mut self.backlog).len();
        u32::try_from(waited).unwrap_or(u32::MAX)
    }

    fn shut(&self, direction: Shutdown) {
        // Not connected any more: then there is nobody to tell.
        if let Err(e) = rustix::net::shutdown(&self.fd, direction) {
            log::debug!("vsock: cannot shut a host stream down: {}", Error::from(e));
        }
    }
}

impl AsFd for HostSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The port in `CONNECT PORT\n`, in capitals or not.
pub(super) fn parse_connect(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let is_connect = words.next()?.eq_ignore_ascii_case("connect");
    let port = words.next()?.parse().ok()?;
    (is_connect && words.next().is_none()).then_some(port)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use vm_memory::VolatileSlice;

    use super::*;

    fn pair() -> (HostSocket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (HostSocket::new(ours.into()), theirs)
    }

    #[test]
    fn understands_who_wants_a_port() {
        for (line, port) in [
            ("CONNECT 0\n", Some(0)),
            ("connect 52\n", Some(52)),
            ("Connect  4294967295\r\n", Some(u32::MAX)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT -1\n", None),
            ("CONNECT\n", None),
            ("CONNECT 5 6\n", None),
            ("GET / HTTP/1.1\n", None),
            ("\n", None),
        ] {
            assert_eq!(parse_connect(line.as_bytes()), port, "{line:?}");
        }
        assert_eq!(parse_connect(b"CONNECT \xff\n"), None);
    }

    #[test]
    fn reads_a_line_in_pieces_and_leaves_what_follows() {
        let (mut ours, mut theirs) = pair();
        assert_eq!(ours.read_line(), Ok(None));
        theirs.write_all(b"CONN").unwrap();
        assert_eq!(ours.read_line(), Ok(None));
        theirs.write_all(b"ECT 1\nabc").unwrap();
        assert_eq!(ours.read_line(), Ok(Some(b"CONNECT 1\n".to_vec())));
        let mut rest = [0; 8];
        let mut slices = IoSlices::default();
        slices.push_writable(&VolatileSlice::from(&mut rest[..])).unwrap();
        assert_eq!(ours.receive(&mut slices).unwrap(), Received::Bytes(3));
        assert_eq!(&rest[..3], b"abc");
        drop(theirs);
        assert_eq!(ours.read_line(), Err(Errno::PIPE));
    }

    #[test]
    fn refuses_a_line_without_end() {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(&[b'1'; 31]).unwrap();
        assert_eq!(ours.read_line(), Ok(None));
        theirs.write_all(b"1").unwrap();
        assert_eq!(ours.read_line(), Err(Errno::MSGSIZE));
    }

    #[test]
    fn keeps_what_the_peer_does_not_take_and_ends_behind_it() {
        let (mut ours, mut theirs) = pair();
        let mut all = Vec::new();
        let (mut sent, mut byte) = (0, 0);
        while ours.is_flushed() {
            let mut piece = [byte; 10_000];
            all.extend(piece);
            let mut slices = IoSlices::default();
            slices.push(&VolatileSlice::from(&mut piece[..])).unwrap();
            sent += ours.send(slices).unwrap();
            byte = byte.wrapping_add(1);
        }
        ours.end();
        assert_eq!(ours.flush().unwrap(), 0);
        let mut got = vec![0; all.len()];
        let (first, rest) = got.split_at_mut(sent as usize);
        theirs.read_exact(first).unwrap();
        ours.note_ready(false, true);
        assert_eq!(ours.flush().unwrap() as usize, rest.len());
        theirs.read_exact(rest).unwrap();
        assert!(got == all && ours.is_flushed());
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }
}
