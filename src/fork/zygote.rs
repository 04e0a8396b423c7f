//! The process that forks: it has one thread, waits, and is a child of the VMM's process from when the
//! first fork is asked for, or from before the VM starts if that is to be forkable.
//!
//! ```text
//!   VMM ──SOCK_SEQPACKET──► zygote: [batch, children, memory, reports, go] ──fork(2)──► children
//! ```
//!
//! Nothing is executed for a child: what the dynamic linker has relocated and what the batch has been
//! read into are shared by all. What each is to be is read by that child alone. The zygote ends when the VMM's process
//! does; children live on.
#![expect(unsafe_code, reason = "makes processes")]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use arch::layout;
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, Signal};

use super::batch::{Batch, Newborn, Report, Spec};
use crate::snapshot::MemoryImage;

/// The word by which husk starts itself as a zygote; not for people, and not in the help.
pub(crate) const SUBCOMMAND: &str = "forked";

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

/// The VMM's end.
#[derive(Debug)]
pub(crate) struct Zygote {
    socket: OwnedFd,
    process: Child,
}

impl Zygote {
    /// Starts the process.
    pub(crate) fn start() -> io::Result<Self> {
        let (socket, theirs) = pair()?;
        let process = Command::new("/proc/self/exe")
            .arg0("husk")
            .arg(SUBCOMMAND)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self { socket, process })
    }

    /// Asks for children. It fails if the process is not there any more.
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
        let word = [IoSlice::new(&[0])];
        rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.socket, &word, &mut ancillary, SendFlags::NOSIGNAL)
        })?;
        Ok(())
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        // It has nothing to finish, and may be stopped. A process that copies memory may have the socket too: closing
        // that would not do.
        if let Err(e) = self.process.kill() {
            return log::warn!("cannot end the process that makes children: {e}");
        }
        if let Err(e) = self.process.wait() {
            log::warn!("cannot wait for the process that makes children: {e}");
        }
    }
}

/// Two ends that keep messages apart.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    Ok(rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?)
}

/// Is the zygote: its socket is standard input. Returns when nobody can ask any more (`None`), and, in
/// each child, with what it is to be.
pub(crate) fn serve() -> io::Result<Option<Newborn>> {
    close_inherited();
    let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    drop(null);
    // What is typed on the parent's terminal is not for children.
    rustix::process::setsid()?;
    rustix::thread::set_name(c"husk_zygote")?;
    reap_children(true);
    let zygote = rustix::process::getpid();
    while let Some(Order { batch, children, memory, reports, go, layers }) = receive(&socket)? {
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
        for index in 0..batch.children.len() {
            // SAFETY: this process has one thread.
            match unsafe { libc::fork() } {
                0 => {
                    let spec = Spec::read(&children, &batch.children[index]);
                    // Its siblings' are in there, too.
                    drop(children);
                    let spec = spec?;
                    become_child(zygote, spec.ends_with_parent)?;
                    return Ok(Some(Newborn::new(batch, spec, memory, index, (reports, go))));
                }
                -1 => {
                    let why = format!("fork: {}", io::Error::last_os_error());
                    // Without a reader the request is gone.
                    let _ = Report { index, result: Err(why) }.send(&reports);
                }
                _ => {}
            }
        }
    }
    Ok(None)
}

/// Closes all but the standard streams: what the VMM was started with (`fd:N`) is the parent's alone.
fn close_inherited() {
    let after_standard = (libc::STDERR_FILENO + 1).cast_unsigned();
    // SAFETY: this process has just begun: nothing in it has opened a descriptor. Kernels before 5.9 do not know the
    // call, and leave them open.
    unsafe { libc::syscall(libc::SYS_close_range, after_standard, u32::MAX, 0) };
}

fn become_child(zygote: Pid, ends_with_parent: bool) -> io::Result<()> {
    reap_children(false);
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

/// Lets children that have ended go at once, or leaves them for whoever waits for them.
fn reap_children(at_once: bool) {
    let action = if at_once { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: neither action runs code of ours.
    unsafe { libc::signal(Signal::CHILD.as_raw(), action) };
}

/// The next message; `None` when nobody can send one any more.
fn receive(socket: &OwnedFd) -> io::Result<Option<Order>> {
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
    let mut fds = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let mut next = || fds.next().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData));
    let (batch, children, memory) = (next()?.into(), next()?.into(), Arc::new(next()?.into()));
    let (reports, go) = (next()?, next()?);
    Ok(Some(Order { batch, children, memory, reports, go, layers: fds.map(File::from).collect() }))
}
