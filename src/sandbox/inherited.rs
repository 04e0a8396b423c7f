//! Descriptors that whoever started husk left open, most often by mistake: closed before the guest runs, unless the
//! configuration names them (`fd:N`).
#![expect(unsafe_code, reason = "closes descriptors that nobody in this process owns")]
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Empty once they are closed: the numbers may be others' then.
static INHERITED: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// Notes what is open, apart from standard streams. Before anything is opened.
pub(super) fn note() {
    // Where there is no /proc, nobody can tell: they stay open then.
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let numbers: Vec<RawFd> = numbers.filter(|number| *number > libc::STDERR_FILENO).collect();
    // The directory itself is among them, and closed by now.
    let is_open = |number: &RawFd| {
        // SAFETY: asks for flags; a number without a descriptor is an error.
        let flags = unsafe { libc::fcntl(*number, libc::F_GETFD) };
        flags >= 0
    };
    *list() = numbers.into_iter().filter(is_open).collect();
}

/// Closes them, but for `kept`. Nothing in this process uses them: what is named `fd:N` is copied.
pub(super) fn close_all_but(kept: &[RawFd]) {
    for number in forget().into_iter().filter(|number| !kept.contains(number)) {
        // SAFETY: it was open when the process began and is so now, so no object of this process has the number.
        unsafe { libc::close(number) };
    }
}

/// Forgets them: somebody else has closed them. What they were.
pub(super) fn forget() -> Vec<RawFd> {
    std::mem::take(&mut list())
}

fn list() -> MutexGuard<'static, Vec<RawFd>> {
    INHERITED.lock().unwrap_or_else(PoisonError::into_inner)
}
