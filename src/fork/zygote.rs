//! The process that forks: a child of the VMM's process that it had before its VM, its threads and its sandbox.
//!
//! ```text
//!   VMM ──fork(2)──► zygote, which waits ──fork(2)──► children, each a VMM with a zygote of its own
//!    └──SOCK_SEQPACKET──► order: [batch, children, memory, reports, go]
//! ```
//!
//! Nothing is ever executed: what the dynamic linker has relocated and what the batch has been read into are shared by
//! all. What each child is to be is read by that child alone. Before its first order the zygote confines itself as the
//! thread of its parent that uses paths does. It ends when the VMM's process does, however that ends; children live on.
//! A VMM that has to end without being able to remove the API's socket says so, and the zygote does it then.
#![expect(unsafe_code, reason = "makes processes")]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use arch::layout;
use devices::backend::file;
use devices::backend::unix::SocketFile;
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_send_signal, waitpid};

use super::batch::{Absence, Batch, Newborn, Report, Spec};
use crate::exit::ExitCode;
use crate::sandbox;
use crate::signals::Held;
use crate::snapshot::MemoryImage;

/// The end of [`Zygote`]'s socket, for [`remove_socket_later`].
static LAST_WORDS: AtomicI32 = AtomicI32::new(-1);

/// What asks for children, and what for the removal of the API's socket once the VMM is gone.
const FORK: u8 = 0;
const REMOVE: u8 = 1;

/// Has the API's socket removed when this process has ended. Async-signal-safe: one system call.
pub(crate) fn remove_socket_later() {
    let (socket, word) = (LAST_WORDS.load(Ordering::Acquire), [REMOVE]);
    if socket >= 0 {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: a byte to write to a descriptor; if it is no more, or another's, this process is about to end.
        unsafe { libc::send(socket, word.as_ptr().cast(), word.len(), flags) };
    }
}

/// Most descriptors of one message: those that are always there, and a layer for each device.
const FDS: usize = 5 + layout::VIRTIO_IRQS.len();

/// What a message holds.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) batch: File,
    /// What each child is to be.
    pub(super) children: File,
    pub(super) memory: Arc<File>,
    /// Where children tell.
    pub(super) reports: OwnedFd,
    /// Where children hear whether they live.
    pub(super) go: OwnedFd,
    /// What devices had written.
    pub(super) layers: Vec<File>,
}

/// What the VMM says.
enum Message {
    Fork(Order),
    Remove,
}

/// What a newborn does with its life; the exit code of its process.
pub(crate) type Live = fn(Newborn) -> ExitCode;

/// The VMM's end.
#[derive(Debug)]
pub(crate) struct Zygote {
    socket: OwnedFd,
    pid: Pid,
    /// None where the kernel has no descriptors of processes.
    process: Option<OwnedFd>,
}

impl Zygote {
    /// Makes the process, before this one has other threads. `api` is the file of the API's socket; signals that are
    /// `held` back here are not in there.
    pub(crate) fn begin(api: &SocketFile, held: &Held, live: Live) -> io::Result<Self> {
        let (socket, theirs) = pair()?;
        // SAFETY: this process has one thread, so that the other finds nothing locked or half done.
        match unsafe { fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(socket);
                let code = match held.let_go().and_then(|()| serve(theirs, api)) {
                    Ok(Some(newborn)) => live(newborn),
                    Ok(None) => ExitCode::Clean,
                    Err(e) => {
                        crate::logger::complain(&format!("cannot wait to be forked: {e}"));
                        ExitCode::Host
                    }
                };
                std::process::exit(code as i32)
            }
            pid => {
                let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
                let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok();
                LAST_WORDS.store(socket.as_raw_fd(), Ordering::Release);
                Ok(Self { socket, pid, process })
            }
        }
    }

    /// Asks for children, by one message: of those who ask at a time none mixes with another. It fails if the process is
    /// not there any more.
    pub(super) fn ask(&self, order: &Order) -> io::Result<()> {
        let Order { batch, children, memory, reports, go, layers } = order;
        let mut fds = vec![batch.as_fd(), children.as_fd(), memory.as_fd()];
        fds.extend([reports.as_fd(), go.as_fd()]);
        fds.extend(layers.iter().map(AsFd::as_fd));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let word = [IoSlice::new(&[FORK])];
        rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.socket, &word, &mut ancillary, SendFlags::NOSIGNAL)
        })?;
        Ok(())
    }

    /// Ends the process, unless it has ended.
    pub(super) fn end(&self) {
        // It has nothing to finish, and may be stopped. A process that copies memory may have the socket too: closing
        // that would not do.
        let killed = self.process.as_ref().map(|process| pidfd_send_signal(process, Signal::KILL));
        if let Some(Err(e)) = killed {
            log::debug!("the process that makes children has ended: {e}");
        }
        let Some(Ok(())) = killed else { return };
        let waited = rustix::io::retry_on_intr(|| waitpid(Some(self.pid), WaitOptions::empty()));
        if let Err(e) = waited {
            log::warn!("cannot wait for the process that makes children: {e}");
        }
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        self.end();
    }
}

/// Children that somebody waits for, and who that is. Kept until nobody does any more, or all have ended: until then
/// what children end with is not what their reports end with.
#[derive(Debug)]
struct Awaited {
    reports: OwnedFd,
    /// Their processes, and which they are.
    children: Vec<(Pid, usize)>,
}

/// What the zygote does about the ends of children. SIGCHLD comes only while it waits for something to do, so that
/// nothing else is ever interrupted, and no end comes between the look for one and the wait.
struct Reaper {
    /// The signals that were held back without it.
    before: libc::sigset_t,
    awaited: Vec<Awaited>,
}

impl Reaper {
    fn begin() -> io::Result<Self> {
        extern "C" fn awake(_: libc::c_int) {}
        // SAFETY: `sigset_t` is plain data, which the calls fill in; the handler does nothing.
        unsafe {
            let mut children: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut children);
            libc::sigaddset(&raw mut children, libc::SIGCHLD);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const children, &raw mut before);
            // A signal without a handler does not interrupt anything.
            libc::signal(libc::SIGCHLD, awake as extern "C" fn(libc::c_int) as libc::sighandler_t);
            // Whoever started husk may have held it back.
            libc::sigdelset(&raw mut before, libc::SIGCHLD);
            Ok(Self { before, awaited: Vec::new() })
        }
    }

    /// Waits until there is a message, and meanwhile tells of children that end.
    fn wait(&mut self, socket: &OwnedFd) -> io::Result<()> {
        loop {
            self.reap();
            let of = |fd: &OwnedFd, events| libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
            let mut fds = vec![of(socket, libc::POLLIN)];
            fds.extend(self.awaited.iter().map(|awaited| of(&awaited.reports, 0)));
            // SAFETY: the descriptors are open, and as many as there are; the mask is whole.
            let ready = unsafe {
                let count = fds.len() as libc::nfds_t;
                libc::ppoll(fds.as_mut_ptr(), count, std::ptr::null(), &raw const self.before)
            };
            if ready < 0 {
                match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => continue,
                    e => return Err(e),
                }
            }
            // Whoever waited has heard enough.
            let mut is_over = fds.iter().skip(1).map(|fd| fd.revents != 0);
            self.awaited.retain(|_| !is_over.next().unwrap_or(false));
            if fds.first().is_some_and(|fd| fd.revents != 0) {
                return Ok(());
            }
        }
    }

    /// Takes leave of children that have ended.
    fn reap(&mut self) {
        while let Ok(Some((pid, _))) = rustix::process::wait(WaitOptions::NOHANG) {
            for awaited in &mut self.awaited {
                let Some(at) = awaited.children.iter().position(|(child, _)| *child == pid) else {
                    continue;
                };
                let (_, index) = awaited.children.swap_remove(at);
                // Without a reader the request is gone.
                let _ = Report { index, result: Err(Absence::Ended) }.send(&awaited.reports);
            }
            self.awaited.retain(|awaited| !awaited.children.is_empty());
        }
    }

    /// In a child: forgets all of it, which is the zygote's alone.
    fn leave(self) {
        // SAFETY: the action runs no code of ours; the mask is the one that was.
        unsafe {
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut());
        }
    }
}

/// Leaves behind the parent's terminal and all descriptors but standard error, and confines itself. Gives the socket
/// back, under another number.
fn settle_in(socket: OwnedFd, api: &SocketFile) -> io::Result<OwnedFd> {
    rustix::stdio::dup2_stdin(&socket)?;
    // Closed with the rest; it must not be closed again.
    std::mem::forget(socket);
    close_inherited();
    sandbox::forget_inherited();
    crate::logger::open_again();
    let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let null = rustix::io::retry_on_intr(|| rustix::fs::open("/dev/null", flags, Mode::empty()))?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    drop(null);
    // What is typed on the parent's terminal is not for children.
    rustix::process::setsid()?;
    rustix::thread::set_name(c"husk_zygote")?;
    let directory = file::parent(api.path()).to_owned();
    sandbox::enter_zygote(&[directory]);
    Ok(socket)
}

/// fork(2), again if a signal interrupts it.
///
/// # Safety
/// As of `fork`: what the new process does must be safe whatever other threads of this one were doing.
pub(crate) unsafe fn fork() -> libc::pid_t {
    loop {
        // SAFETY: the caller's to see to.
        let pid = unsafe { libc::fork() };
        if pid != -1 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return pid;
        }
    }
}

/// Two ends that keep messages apart.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    Ok(rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?)
}

/// Is the zygote. Returns when nobody can ask any more (`None`), and, in each child, with what it is to be.
fn serve(socket: OwnedFd, api: &SocketFile) -> io::Result<Option<Newborn>> {
    let socket = settle_in(socket, api)?;
    let mut reaper = Reaper::begin()?;
    let zygote = rustix::process::getpid();
    let mut removes = false;
    loop {
        reaper.wait(&socket)?;
        let Some(message) = receive(&socket)? else { break };
        let Message::Fork(Order { batch, children, memory, reports, go, layers }) = message else {
            removes = true;
            continue;
        };
        let read = Batch::from_file(&batch).and_then(|(mut batch, extents)| {
            batch.adopt_layers(&layers)?;
            Ok((batch, extents))
        });
        let (batch, extents) = match read {
            Ok(read) => read,
            Err(e) => {
                // Whoever waits for reports sees their end.
                crate::logger::complain(&format!("cannot read what is to be forked: {e}"));
                continue;
            }
        };
        let memory = MemoryImage { file: memory, extents: extents.into(), over: [].into() };
        let mut made = Vec::new();
        for index in 0..batch.children.len() {
            // SAFETY: this process has one thread.
            match unsafe { fork() } {
                0 => {
                    let spec = Spec::read(&children, &batch.children[index]);
                    // Its siblings' are in there, too.
                    drop(children);
                    let spec = spec?;
                    reaper.leave();
                    become_child(zygote, spec.ends_with_parent)?;
                    return Ok(Some(Newborn::new(batch, spec, memory, index, (reports, go))));
                }
                -1 => {
                    let why = format!("fork: {}", io::Error::last_os_error());
                    let result = Err(Absence::Refused(why));
                    // Without a reader the request is gone.
                    let _ = Report { index, result }.send(&reports);
                }
                pid => made.extend(Pid::from_raw(pid).map(|pid| (pid, index))),
            }
        }
        if !made.is_empty() {
            reaper.awaited.push(Awaited { reports, children: made });
        }
    }
    if removes {
        api.remove();
    }
    Ok(None)
}

/// Closes all but the standard streams: what the VMM has open, or was started with (`fd:N`), is the parent's alone.
fn close_inherited() {
    let after_standard = (libc::STDERR_FILENO + 1).cast_unsigned();
    // SAFETY: whatever of this process has a descriptor is never used again, nor dropped: it never returns to where it
    // came from. Kernels before 5.9 do not know the call, and leave them open.
    unsafe { libc::syscall(libc::SYS_close_range, after_standard, u32::MAX, 0) };
}

fn become_child(zygote: Pid, ends_with_parent: bool) -> io::Result<()> {
    if ends_with_parent {
        // The zygote ends when the VMM does.
        rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
        // It has ended before it could be heard of.
        if rustix::process::getppid() != Some(zygote) {
            return Err(io::ErrorKind::NotFound.into());
        }
    }
    rustix::process::setsid()?;
    rustix::thread::set_name(c"husk")?;
    Ok(())
}

/// The next message; `None` when nobody can send one any more.
fn receive(socket: &OwnedFd) -> io::Result<Option<Message>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut word = [0];
    let mut word = [IoSliceMut::new(&mut word)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut word, &mut ancillary, flags)
    })?;
    if received.bytes == 0 {
        return Ok(None);
    }
    if word[0][..] == [REMOVE] {
        return Ok(Some(Message::Remove));
    }
    let mut fds = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let mut next = || fds.next().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData));
    let (batch, children, memory) = (next()?.into(), next()?.into(), Arc::new(next()?.into()));
    let (reports, go) = (next()?, next()?);
    let layers = fds.map(File::from).collect();
    Ok(Some(Message::Fork(Order { batch, children, memory, reports, go, layers })))
}
