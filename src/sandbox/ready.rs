//! Landlock's rules for threads that may use no path, made once and enforced by each of them. Rules are a descriptor until
//! they are in force: a husk that has used up its own would end where it starts a thread, because one that is less
//! confined than the log says must not run.
#![expect(unsafe_code, reason = "our library's rules can be enforced only once")]
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// None where the kernel has no Landlock, and in processes that were forked off.
static READY: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// Keeps rules.
pub(super) fn keep(rules: Option<OwnedFd>) {
    *lock() = rules;
}

/// Enforces them on the calling thread; `None` if there are none.
pub(super) fn enforce() -> Option<io::Result<()>> {
    let ready = lock();
    let rules = ready.as_ref()?.as_raw_fd();
    // SAFETY: takes a descriptor that is open, for `ready` is held, and no flags.
    let failed = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, rules, 0) };
    Some(match failed {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    })
}

/// Says that this process, which was forked off, has closed them, and may have given their number to another.
pub(super) fn forget() {
    std::mem::forget(lock().take());
}

fn lock() -> MutexGuard<'static, Option<OwnedFd>> {
    READY.lock().unwrap_or_else(PoisonError::into_inner)
}
