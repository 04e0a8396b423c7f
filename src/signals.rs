//! Signals that stop husk, as a descriptor to wait on.
//!
//! SIGTERM, SIGINT and SIGHUP are blocked in every thread and read from a signalfd, so that nothing
//! happens in a handler. SIGXFSZ is blocked for good: a disk image that hits a file size limit gets
//! EFBIG, and the guest an I/O error. SIGPIPE is ignored by Rust's runtime; SIGUSR1 and SIGUSR2 are
//! ignored here.
#![expect(unsafe_code, reason = "signal masks and signalfd have no safe wrapper in our libraries")]

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::vmm::Signals;

const STOP: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
const IGNORED: [libc::c_int; 3] = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGTTOU];

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
            for signal in STOP {
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
