//! RAM that another process serves, page by page, when somebody first touches it (userfaultfd(2)), by
//! Firecracker's protocol: whoever listens on a Unix socket gets a list of mappings as JSON, and the
//! descriptor by which it learns of faults and answers them.
//!
//! A process that is gone leaves threads waiting in the kernel for pages that never come. Until the guest
//! runs they are let go, and the restore is refused; after that they must stay where they are, because
//! zeros in place of a page could reach a disk. So the VM ends, and does not wait for them.
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use arch::GuestRam;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::io::retry_on_intr;
use rustix::mm::{Advice, UserfaultfdFlags, madvise};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, sendmsg, socket_with,
};
use rustix::process::{PidfdFlags, pidfd_open};
use serde::Serialize;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::{ioctl_ior_nr, ioctl_iowr_nr};

use super::host_addr;
use crate::bell::Bell;
use crate::exit::Ending;
use crate::outcome::Outcome;

/// `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFD_FEATURE_EVENT_REMOVE`: the process is told of pages that the guest has given back.
const EVENT_REMOVE: u64 = 1 << 3;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MISSING: u64 = 1;
/// How much is asked for at once when all of it is wanted.
const CHUNK: u64 = 2 << 20;
/// How long that may take, and how long the other process to take what it is sent.
const PATIENCE: Duration = Duration::from_secs(5);
const NO_ANSWER: &str = "the process that serves memory does not answer";

/// `struct uffdio_api`.
#[repr(C)]
struct ApiCall {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, ApiCall);
ioctl_iowr_nr!(UFFDIO_REGISTER, 0xaa, 0x00, Register);
ioctl_ior_nr!(UFFDIO_UNREGISTER, 0xaa, 0x01, Range);

/// Why nobody serves memory.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}: {source}", path.display())]
pub struct ServeError {
    path: PathBuf,
    what: String,
    source: io::Error,
}

/// A mapping, as the other process is told of it. Sizes are in bytes, that of the older name too.
#[derive(Serialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    page_size_kib: u64,
}

/// Memory that is served.
#[derive(Debug)]
pub(crate) struct Served {
    shared: Arc<Shared>,
    /// Kept: its other end sees that this process is gone.
    _socket: UnixStream,
    peer: Option<OwnedFd>,
    watcher: Option<(JoinHandle<()>, Arc<Bell>)>,
}

#[derive(Debug)]
struct Shared {
    faults: OwnedFd,
    /// Address and bytes.
    ranges: Vec<(u64, u64)>,
    runs: AtomicBool,
    is_lost: AtomicBool,
}

impl Served {
    /// Has `ram`, which nobody has touched yet, served by whoever listens at `path`. It is told of pages
    /// that are given back, if there is a device that does.
    pub(super) fn begin(
        ram: &GuestRam,
        page_size: u64,
        path: &Path,
        gives_back: bool,
    ) -> Result<Self, ServeError> {
        let failed = |what: &str| {
            let (path, what) = (path.to_owned(), what.to_owned());
            move |source| ServeError { path, what, source }
        };
        let socket = connect(path, PATIENCE).map_err(failed("cannot connect"))?;
        let mut offset = 0;
        let mut mappings = Vec::new();
        for region in ram.iter() {
            let (start, size) = (host_addr(region).map_err(failed("memory"))?, region.len());
            mappings.push(Mapping {
                base_host_virt_addr: start,
                size,
                offset,
                page_size,
                page_size_kib: page_size,
            });
            offset += size;
        }
        let features = if gives_back { EVENT_REMOVE } else { 0 };
        let faults = open(features)
            .map_err(failed("userfaultfd, which needs root or vm.unprivileged_userfaultfd"))?;
        let ranges: Vec<_> = mappings.iter().map(|m| (m.base_host_virt_addr, m.size)).collect();
        for &(start, len) in &ranges {
            register(&faults, start, len).map_err(failed("cannot register memory"))?;
        }
        let text = serde_json::to_vec(&mappings).map_err(|e| failed("mappings")(e.into()))?;
        send(&socket, &text, faults.as_fd()).map_err(failed("cannot send"))?;
        let peer = peer(&socket);
        let shared = Shared {
            faults,
            ranges,
            runs: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared), _socket: socket, peer, watcher: None })
    }

    /// Ends the run if the process that serves memory is gone.
    pub(super) fn watch(&mut self, outcome: &Arc<Outcome>) -> io::Result<()> {
        let Some(peer) = &self.peer else {
            log::warn!("nobody can tell when the process that serves memory ends");
            return Ok(());
        };
        let (peer, stop) = (peer.try_clone()?, Arc::new(Bell::new()?));
        let (shared, outcome, bell) = (self.shared.clone(), outcome.clone(), stop.clone());
        let thread = thread::Builder::new().name("husk_memory".into()).spawn(move || {
            if ends_first(peer.as_fd(), bell.as_fd()) {
                shared.lose(&outcome);
            }
        })?;
        self.watcher = Some((thread, stop));
        Ok(())
    }

    /// From now on nobody may see zeros in place of a page. Whether the guest may run: not if there are
    /// such pages, because who serves memory has just gone.
    pub(super) fn run(&self) -> bool {
        // Each side says what it does before it looks at the other: one of them sees it.
        self.shared.runs.store(true, Ordering::SeqCst);
        !self.is_lost()
    }

    /// Whether the process that serves it is gone.
    pub(super) fn is_lost(&self) -> bool {
        self.shared.is_lost.load(Ordering::SeqCst)
    }

    /// Has all of it brought in, for whoever cannot wait for pages: a copy is made by another process.
    pub(super) fn bring_in(&self, ram: &GuestRam) -> io::Result<()> {
        // The mapping lives as long as the thread that may wait for its pages.
        let (ram, ranges) = (ram.clone(), self.shared.ranges.clone());
        let (sender, receiver) = channel();
        thread::Builder::new().name("husk_bring_in".into()).spawn(move || {
            let chunk = |start: u64, len: u64| {
                (0..len).step_by(CHUNK_STEP).map(move |at| (start + at, CHUNK.min(len - at)))
            };
            for (start, len) in ranges.iter().flat_map(|&(start, len)| chunk(start, len)) {
                let brought = populate(start, len);
                let is_done = brought.is_err();
                if sender.send(brought).is_err() || is_done {
                    break;
                }
            }
            drop(ram);
        })?;
        loop {
            match receiver.recv_timeout(PATIENCE) {
                Ok(brought) => brought?,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => return Err(no_answer()),
            }
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "2 MiB")]
const CHUNK_STEP: usize = CHUNK as usize;

impl Drop for Served {
    fn drop(&mut self) {
        if let Some((thread, stop)) = self.watcher.take() {
            stop.ring();
            if thread.join().is_err() {
                log::error!("the thread that watches over served memory panicked");
            }
        }
    }
}

impl Shared {
    fn lose(&self, outcome: &Outcome) {
        self.is_lost.store(true, Ordering::SeqCst);
        let detail = "the process that serves its memory has ended".to_owned();
        outcome.set(Ending::HostError { detail });
        if !self.runs.load(Ordering::SeqCst) {
            // Who waits for a page gets zeros, which nobody will use.
            for &(start, len) in &self.ranges {
                if let Err(e) = unregister(&self.faults, start, len) {
                    log::error!("cannot let go of memory: {e}");
                }
            }
        }
    }
}

/// Waits for the end of the peer; false if it is told to stop first.
fn ends_first(peer: BorrowedFd<'_>, stop: BorrowedFd<'_>) -> bool {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(peer, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) if !fds[0].revents().is_empty() => return false,
            Ok(_) if !fds[1].revents().is_empty() => return true,
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => {
                log::error!("cannot watch over served memory: {e}");
                return false;
            }
        }
    }
}

/// Connects to whoever listens at `path`. Neither this nor what is sent waits longer than `patience`: a listener may be
/// stopped, with as many waiting for it as may.
fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let (domain, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let socket = socket_with(domain, kind, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    let address = SocketAddrUnix::new(path)?;
    in_time(retry_on_intr(|| rustix::net::connect(&socket, &address)))?;
    Ok(socket.into())
}

/// When its time is up, a socket says that it would have to be waited for.
fn in_time<T>(result: rustix::io::Result<T>) -> io::Result<T> {
    result.map_err(|e| if e == Errno::AGAIN { no_answer() } else { e.into() })
}

fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, NO_ANSWER)
}

/// The process at the other end. `None` if it cannot be seen from here.
fn peer(socket: &UnixStream) -> Option<OwnedFd> {
    let peer = sockopt::socket_peercred(socket).ok()?;
    pidfd_open(peer.pid, PidfdFlags::empty()).ok()
}

fn send(socket: &UnixStream, text: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let sent = sendmsg(socket, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL);
    let sent = in_time(sent)?;
    match sent == text.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

fn open(features: u64) -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: a descriptor that nothing is registered with yet changes nobody's memory.
    let fd = unsafe { rustix::mm::userfaultfd(flags) }?;
    let mut call = ApiCall { api: API, features, ioctls: 0 };
    // SAFETY: the structure is what the call takes, and it writes to no other memory.
    let done = unsafe { ioctl_with_mut_ref(&fd.as_raw_fd(), UFFDIO_API(), &mut call) };
    checked(done).map(|()| fd)
}

fn register(fd: &OwnedFd, start: u64, len: u64) -> io::Result<()> {
    let mut call = Register { range: Range { start, len }, mode: MISSING, ioctls: 0 };
    // SAFETY: the structure is what the call takes; the range is a mapping of ours, whose pages are from
    // now on what the other process says, which is what the user has asked for.
    checked(unsafe { ioctl_with_mut_ref(&fd.as_raw_fd(), UFFDIO_REGISTER(), &mut call) })
}

fn unregister(fd: &OwnedFd, start: u64, len: u64) -> io::Result<()> {
    let mut call = Range { start, len };
    // SAFETY: the structure is what the call takes; pages that are missing become zeros, as in any
    // mapping of this kind.
    checked(unsafe { ioctl_with_mut_ref(&fd.as_raw_fd(), UFFDIO_UNREGISTER(), &mut call) })
}

fn populate(start: u64, len: u64) -> io::Result<()> {
    let (Ok(at), Ok(len)) = (usize::try_from(start), usize::try_from(len)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let at = std::ptr::with_exposed_provenance_mut(at);
    // SAFETY: the range is in a mapping that the caller keeps, and the advice changes no contents.
    Ok(unsafe { retry_on_intr(|| madvise(at, len, Advice::LinuxPopulateRead)) }?)
}

fn checked(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served() -> Served {
        let (socket, _) = UnixStream::pair().unwrap();
        let faults = Bell::new().unwrap().as_fd().try_clone_to_owned().unwrap();
        let shared = Shared {
            faults,
            ranges: Vec::new(),
            runs: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
        };
        Served { shared: Arc::new(shared), _socket: socket, peer: None, watcher: None }
    }

    #[test]
    fn nobody_runs_once_pages_may_be_zeros() {
        let outcome = Outcome::new().unwrap();
        let served = served();
        served.shared.lose(&outcome);
        assert!(!served.run());
        assert!(matches!(outcome.get(), Some(Ending::HostError { .. })));
    }

    #[test]
    fn a_listener_that_takes_nobody_is_not_waited_for() {
        let path = std::env::temp_dir().join(format!("husk-served-{}", std::process::id()));
        // One that another run has left behind.
        let _ = std::fs::remove_file(&path);
        let (domain, kind) = (AddressFamily::UNIX, SocketType::STREAM);
        let listener = socket_with(domain, kind, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let soon = Duration::from_millis(10);
        let mut waiting = Vec::new();
        let refusal = loop {
            match connect(&path, soon) {
                Ok(socket) => waiting.push(socket),
                Err(e) => break e,
            }
            assert!(waiting.len() < 100, "they are all taken");
        };
        assert_eq!(refusal.to_string(), NO_ANSWER);
        // Nor one that takes it, and reads nothing.
        let sent = loop {
            match send(&waiting[0], &[0; 4096], Bell::new().unwrap().as_fd()) {
                Ok(()) => {}
                Err(e) => break e,
            }
        };
        assert_eq!(sent.to_string(), NO_ANSWER);
        std::fs::remove_file(&path).unwrap();
    }
}
