//! Signals that stop husk, as a descriptor to wait on; and the last words of a husk that crashes.
//!
//! SIGTERM, SIGINT, SIGHUP and SIGQUIT are blocked in every thread and read from a signalfd, so that
//! nothing happens in a handler; but one that whoever started us ignores (`nohup`, a script's
//! background job) stays ignored. SIGXFSZ is blocked for good: a disk image that hits a file size
//! limit gets EFBIG, and the guest an I/O error. SIGPIPE is ignored by Rust's runtime. What would end
//! or stop us with the terminal raw is ignored here, or, where it means a crash, handled: the terminal
//! is restored, the signal is named, and then it does what it always did.
#![expect(unsafe_code, reason = "signal masks and signalfd have no safe wrapper in our libraries")]

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::vmm::Signals;

const STOP: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];
/// SIGTSTP: whoever really wants us to stand still has SIGSTOP, and a guest can be paused.
const IGNORED: [libc::c_int; 6] =
    [libc::SIGUSR1, libc::SIGUSR2, libc::SIGTTOU, libc::SIGTSTP, libc::SIGALRM, libc::SIGVTALRM];
/// What a crash comes as, and what is said of it.
const CRASH: [(libc::c_int, &str); 6] = [
    (libc::SIGABRT, ": crashed: SIGABRT\n"),
    (libc::SIGSEGV, ": crashed: SIGSEGV\n"),
    (libc::SIGBUS, ": crashed: SIGBUS\n"),
    (libc::SIGILL, ": crashed: SIGILL\n"),
    (libc::SIGFPE, ": crashed: SIGFPE\n"),
    (libc::SIGSYS, ": crashed: SIGSYS\n"),
];

/// The process's stop signals. Made before any thread, so that all inherit the mask.
#[derive(Debug)]
pub(crate) struct ProcessSignals(std::fs::File);

impl ProcessSignals {
    /// Takes the signals over.
    pub(crate) fn take() -> std::io::Result<Self> {
        // SAFETY: `sigset_t` is plain data; `sigemptyset` gives it a value before it is used.
        let mut stop: libc::sigset_t = unsafe { std::mem::zeroed() };
        let mut blocked = stop;
        // SAFETY: both sets are valid for writing, and the signal numbers exist.
        unsafe {
            libc::sigemptyset(&raw mut stop);
            for signal in STOP.into_iter().filter(|signal| !is_ignored(*signal)) {
                libc::sigaddset(&raw mut stop, signal);
            }
            blocked.clone_from(&stop);
            libc::sigaddset(&raw mut blocked, libc::SIGXFSZ);
        }
        // SAFETY: the set has been filled in; the old mask is not asked for.
        let failed = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const blocked, std::ptr::null_mut())
        };
        if failed != 0 {
            return Err(std::io::Error::from_raw_os_error(failed));
        }
        for signal in IGNORED {
            // SAFETY: ignoring a signal runs no code of ours.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        handle_crashes()?;
        // SAFETY: a new descriptor for a set that has been filled in.
        let fd =
            unsafe { libc::signalfd(-1, &raw const stop, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }.into()))
    }
}

/// Whether whoever started us wants `signal` ignored.
fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: `sigaction` is plain data, which the call fills in; nothing is changed by it.
    let action = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        match libc::sigaction(signal, std::ptr::null(), &raw mut action) {
            0 => action,
            _ => return false,
        }
    };
    action.sa_sigaction == libc::SIG_IGN
}

/// Takes the place of Rust's own handler of SIGSEGV and SIGBUS, which tells a stack overflow from
/// other crashes: what it says is worth less than a terminal that works. Its alternate stack is used.
fn handle_crashes() -> std::io::Result<()> {
    for (signal, _) in CRASH {
        // SAFETY: `sigaction` is plain data. The handler is async-signal-safe, see there.
        let failed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_crash as extern "C" fn(libc::c_int) as libc::sighandler_t;
            // The default action is back once the handler runs: a crash in it is the end.
            action.sa_flags = libc::SA_ONSTACK | libc::SA_RESETHAND;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        if failed != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Async-signal-safe: system calls only, no allocation, no lock that is waited for.
extern "C" fn on_crash(signal: libc::c_int) {
    devices::backend::console::restore_terminal();
    let mut ready = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    let line = CRASH.iter().find(|(number, _)| *number == signal).map_or("", |(_, line)| line);
    // A byte at a time: all that a terminal that is ready has room for.
    for byte in crate::logger::program().bytes().chain(line.bytes()) {
        // SAFETY: one descriptor to poll, and one byte to write.
        unsafe {
            if libc::poll(&raw mut ready, 1, 0) <= 0 {
                break;
            }
            libc::write(libc::STDERR_FILENO, (&raw const byte).cast(), 1);
        }
    }
    // SAFETY: the default action, which SA_RESETHAND set, follows when the handler returns and the
    // signal is no longer blocked.
    unsafe { libc::raise(signal) };
}

impl Signals for ProcessSignals {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn next(&mut self) -> Option<i32> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match self.0.read(&mut info) {
            // The signal number is the first word.
            Ok(len) if len == info.len() => {
                Some(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
            }
            _ => None,
        }
    }
}
