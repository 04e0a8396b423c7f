//! The processes of a jail: the one that makes it, waits and forwards signals, and the one inside, which is the first of
//! its process namespace.
//!
//! ```text
//!   outer (root, waits) ──fork──► inner: pid 1 ──► husk, in the same memory
//!     │ SIGTERM, SIGINT, SIGHUP, SIGQUIT ──kill──► its handlers
//!     └ exit code, or 128 + signal ◄──wait──┘     SIGKILL if the outer one dies
//! ```
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, Signal, WaitOptions};

use super::path::Owner;
use super::{JailError, sys};

/// What is passed on to the process inside.
const FORWARDED: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Closes what was inherited but `kept`, and forgets the environment: nothing of whoever started husk gets into a jail
/// that was not named.
pub(crate) fn forget_inheritance(kept: &[RawFd]) -> Result<(), JailError> {
    if let Some(fd) = kept.iter().find(|fd| !sys::is_open(**fd)) {
        return Err(JailError::Refused(format!(
            "no descriptor {fd} is open; whoever starts husk has to open it and leave it open"
        )));
    }
    let kept: Vec<RawFd> = kept.iter().copied().chain(crate::logger::descriptor()).collect();
    sys::close_all_but(&kept)
        .map_err(JailError::host("close descriptors, which needs Linux 5.9 or later"))?;
    sys::clear_environment();
    // What is made on the host is as it is said where it is made.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    Ok(())
}

/// The two ends of what ties the processes together.
pub(super) fn link() -> Result<(OwnedFd, OwnedFd), JailError> {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(JailError::host("make a socket"))
}

/// Signals as both processes want them, from before there are two: none is lost meanwhile.
pub(super) fn hold_signals() -> Result<sys::Signals, JailError> {
    sys::keep_children();
    let awaited: Vec<i32> = FORWARDED.into_iter().chain([libc::SIGCHLD]).collect();
    sys::Signals::block(&awaited).map_err(JailError::host("block signals"))
}

/// In the process inside: those that are forwarded stay blocked until husk has handlers, as the kernel drops what the
/// first process of a namespace does not handle.
pub(super) fn take_signals() -> Result<(), JailError> {
    sys::Signals::unblock(&[libc::SIGCHLD]).map_err(JailError::host("unblock signals"))
}

/// Has the process inside end when the outer one does.
pub(super) fn tie(link: &OwnedFd) -> Result<(), JailError> {
    // Lost when the user changes; so it is done afterwards, and asked whether it was too late.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(JailError::host("be told of the parent's end"))?;
    let mut fds = [PollFd::new(link, PollFlags::empty())];
    let now = rustix::time::Timespec::default();
    match rustix::event::poll(&mut fds, Some(&now)) {
        Ok(0) => Ok(()),
        Ok(_) => Err(JailError::Refused("husk jail was killed".into())),
        Err(e) => Err(JailError::host("look for the parent")(e)),
    }
}

/// In the process inside, without a user namespace yet: gets one, in which the jail's user is itself.
pub(super) fn enter_user_namespace(link: &OwnedFd) -> Result<(), JailError> {
    let failed = JailError::host("make a user namespace");
    let entered = sys::unshare(rustix::thread::UnshareFlags::NEWUSER).and_then(|()| {
        rustix::io::write(link, &[0])?;
        match rustix::io::read(link, &mut [0])? {
            1 => Ok(()),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    });
    entered.map_err(failed)
}

/// In the outer process: waits until the one inside has a user namespace, and says who is in it.
pub(super) fn map_user(link: &OwnedFd, child: Pid, owner: Owner) -> Result<(), JailError> {
    // It has ended: why, it has said itself.
    if rustix::io::read(link, &mut [0]).unwrap_or(0) == 0 {
        return Ok(());
    }
    let process = format!("/proc/{}", child.as_raw_nonzero());
    let (uid, gid) = (owner.uid.as_raw(), owner.gid.as_raw());
    fs::write(format!("{process}/gid_map"), format!("{gid} {gid} 1\n"))
        .and_then(|()| fs::write(format!("{process}/uid_map"), format!("{uid} {uid} 1\n")))
        .and_then(|()| Ok(rustix::io::write(link, &[0])?))
        .map(drop)
        .map_err(JailError::host("map the user namespace"))
}

/// What is said of a jail that could say nothing itself.
const KILLED: &str = "the jail was killed (SIGKILL): by somebody, or by the host for want of memory; if so, its cgroup's \
                      memory.events or the kernel's log say it, and --memory-max has to be more";

/// In the outer process: passes signals on until `child` has ended; its exit code, or 128 and its signal.
pub(super) fn wait(child: Pid, signals: &sys::Signals) -> Result<i32, JailError> {
    loop {
        let signal = signals.wait().map_err(JailError::host("wait for signals"))?;
        match signal {
            libc::SIGCHLD => {
                let ended = rustix::process::waitpid(Some(child), WaitOptions::NOHANG)
                    .map_err(JailError::host("wait for the jail"))?;
                let Some((_, status)) = ended else { continue };
                match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => return Ok(code),
                    (None, Some(signal)) => {
                        if signal == libc::SIGKILL {
                            crate::logger::complain(KILLED);
                        }
                        return Ok(128 + signal);
                    }
                    (None, None) => {}
                }
            }
            signal => {
                // It has ended if this fails, and SIGCHLD says so.
                if let Some(signal) = Signal::from_named_raw(signal) {
                    let _ = rustix::process::kill_process(child, signal);
                }
            }
        }
    }
}

/// In the outer process: ends the jail.
pub(super) fn kill(child: Pid) {
    // It may have ended.
    let _ = rustix::process::kill_process(child, Signal::KILL);
    let _ = rustix::process::waitpid(Some(child), WaitOptions::empty());
}

/// Becomes a process that nobody waits for, in a session of its own that no terminal controls, without a word.
pub(super) fn daemonize(null: &OwnedFd) -> Result<(), JailError> {
    let failed = || JailError::host("become a daemon");
    // A leader of a group cannot make a session, and one of a session could get a terminal: so there are two forks.
    if sys::fork().map_err(failed())?.is_some() {
        sys::exit(0);
    }
    rustix::process::setsid().map_err(JailError::host("make a session"))?;
    if sys::fork().map_err(failed())?.is_some() {
        sys::exit(0);
    }
    let streams = [(0, false), (1, false), (2, false)].into_iter();
    let all = streams.chain(crate::logger::descriptor().map(|fd| (fd, true)));
    for (number, is_private) in all {
        sys::duplicate_to(null.as_fd(), number, is_private).map_err(failed())?;
    }
    Ok(())
}
