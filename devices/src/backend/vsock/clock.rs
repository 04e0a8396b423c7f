//! An alarm clock among the descriptors that are waited on.
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Becomes readable at the earliest time it was set to.
#[derive(Debug)]
pub(super) struct Clock {
    fd: OwnedFd,
    alarm: Option<Instant>,
}

impl Clock {
    pub(super) fn new() -> Result<Self, Errno> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { fd: timerfd_create(TimerfdClockId::Monotonic, flags)?, alarm: None })
    }

    /// Wants it to ring at `time`. It may ring earlier, for what was wanted before.
    pub(super) fn set(&mut self, time: Instant) {
        if self.alarm.is_some_and(|alarm| alarm <= time) {
            return;
        }
        // All zeros would stop it.
        let wait = time.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let Ok(it_value) = Timespec::try_from(wait) else { return };
        let setting = Itimerspec { it_interval: Timespec::default(), it_value };
        match timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &setting) {
            Ok(_) => self.alarm = Some(time),
            Err(e) => log::warn!("vsock: cannot set the clock: {e}"),
        }
    }

    /// It has rung: it is quiet until it is set again.
    pub(super) fn hush(&mut self) {
        // EAGAIN if it was set anew meanwhile: then it is quiet.
        let _ = rustix::io::read(&self.fd, &mut [0; 8]);
        self.alarm = None;
    }
}

impl AsFd for Clock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
