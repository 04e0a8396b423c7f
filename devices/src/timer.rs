//! A timerfd on the monotonic clock, and that clock.
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

const NS_PER_S: u64 = 1_000_000_000;

/// Becomes readable at a time.
#[derive(Debug)]
pub(crate) struct Timer(OwnedFd);

impl Timer {
    pub(crate) fn new() -> std::io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Will be readable at `at_ns` of the monotonic clock, and no earlier.
    pub(crate) fn set(&self, at_ns: u64) {
        // 0 would disarm it.
        self.settime(at_ns.max(1));
    }

    /// Will not be readable.
    pub(crate) fn disarm(&self) {
        self.settime(0);
    }

    fn settime(&self, at_ns: u64) {
        let zero = Timespec::default();
        let part = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let it_value = Timespec { tv_sec: part(at_ns / NS_PER_S), tv_nsec: part(at_ns % NS_PER_S) };
        let time = Itimerspec { it_interval: zero, it_value };
        if let Err(e) = timerfd_settime(&self.0, TimerfdTimerFlags::ABSTIME, &time) {
            log::error!("cannot set a timer: {e}");
        }
    }

    /// Will be readable at once.
    pub(crate) fn fire(&self) {
        self.set(1);
    }

    /// Makes it quiet; whether it was readable.
    pub(crate) fn has_fired(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The monotonic clock.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    part(now.tv_sec).saturating_mul(NS_PER_S).saturating_add(part(now.tv_nsec))
}
