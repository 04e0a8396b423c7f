//! The VMM thread's loop: requests, the guest's end, signals, in the order in which they come.
use std::os::fd::{AsFd, BorrowedFd};

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use crate::bell::Bell;
use crate::controller::Controller;
use crate::exit::Ending;
use crate::request::Requests;

/// How long a guest has to power off after a signal asked for it. What comes after it (stopping vCPUs, the last output,
/// the socket) stays within the 2 s that are promised, on a host with much to do too: it takes half a second there.
const GRACE: Duration = Duration::from_secs(1);

/// How long a snapshot has to be finished after the guest's end, if no signal presses.
const SETTLE: Duration = Duration::from_millis(1500);

/// Most requests answered before signals and the guest's end are looked at again: whoever asks and
/// asks must not keep them from being heard.
const TURN: usize = 64;

/// Signals that stop the VM, as they come.
pub(crate) trait Signals {
    /// Readable when there is one.
    fn fd(&self) -> BorrowedFd<'_>;
    /// The next, if there is one.
    fn next(&mut self) -> Option<i32>;
}

/// A VM in a library gets no signals: they are its host's.
#[derive(Debug)]
pub(crate) struct NoSignals<'a>(pub(crate) &'a Bell);

impl Signals for NoSignals<'_> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn next(&mut self) -> Option<i32> {
        None
    }
}

/// A signal that asked for the end, and when patience ends.
struct Stopping {
    signal: i32,
    deadline: Instant,
}

/// Serves `controller` until the VM has ended. `quit` is readable when the user leaves the console.
pub(crate) fn serve(
    controller: &mut Controller,
    requests: &Requests,
    quit: &Bell,
    signals: &mut dyn Signals,
) -> Ending {
    let mut stopping: Option<Stopping> = None;
    loop {
        let mut answered = 0;
        while answered < TURN
            && let Some(call) = requests.next()
        {
            controller.answer(call);
            answered += 1;
        }
        controller.heed_outcome();
        controller.tick();
        if quit.hush() && controller.ending().is_none() {
            controller.end(Ending::Killed);
        }
        while let Some(signal) = signals.next() {
            heed_signal(controller, &mut stopping, signal);
        }
        if let Some(Stopping { signal, deadline }) = stopping
            && Instant::now() >= deadline
            && controller.ending().is_none()
        {
            log::warn!("the guest did not power off in time");
            controller.end(Ending::Signalled { signal });
        }
        if let Some(ending) = controller.ending() {
            // A guest that powers off because a signal asked for it ends as the signal says, so
            // that the exit code does not depend on how quick it is.
            let ending = match stopping {
                Some(Stopping { signal, .. }) => Ending::Signalled { signal },
                None => ending.clone(),
            };
            let left = stopping.map(|s| s.deadline.saturating_duration_since(Instant::now()));
            controller.settle(left.unwrap_or(SETTLE));
            return ending;
        }
        // There may be more, and their bell may have been hushed.
        if answered == TURN {
            continue;
        }
        let next = stopping.as_ref().map(|s| s.deadline).into_iter().chain(controller.due()).min();
        let left = next.map(|next| next.saturating_duration_since(Instant::now()));
        wait(controller, requests, quit, signals, left);
    }
}

/// The first signal asks the guest, a second does not wait.
fn heed_signal(controller: &mut Controller, stopping: &mut Option<Stopping>, signal: i32) {
    let can_ask = stopping.is_none() && controller.is_running() && controller.shutdown().is_ok();
    if can_ask {
        log::info!("signal {signal}: asking the guest to power off");
        *stopping = Some(Stopping { signal, deadline: Instant::now() + GRACE });
    } else if controller.ending().is_none() {
        controller.end(Ending::Signalled { signal });
    }
}

fn wait(
    controller: &Controller,
    requests: &Requests,
    quit: &Bell,
    signals: &dyn Signals,
    left: Option<Duration>,
) {
    let mut fds = vec![
        PollFd::from_borrowed_fd(requests.bell().as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(quit.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(signals.fd(), PollFlags::IN),
    ];
    if let Some(bell) = controller.bell() {
        fds.push(PollFd::from_borrowed_fd(bell, PollFlags::IN));
    }
    if let Some(outcome) = controller.outcome() {
        fds.push(PollFd::from_borrowed_fd(outcome.bell().as_fd(), PollFlags::IN));
    }
    // Whoever slept in poll would stop all threads of a model.
    #[cfg(feature = "models")]
    devices::sync::models::wait_until(|| poll(&mut fds, Some(&Timespec::default())) != Ok(0));
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    // An interrupted wait only means that the loop looks again.
    if let Err(e) = poll(&mut fds, timeout.as_ref())
        && e != rustix::io::Errno::INTR
    {
        log::error!("waiting for events: {e}");
    }
}

#[cfg(all(test, feature = "models"))]
mod models;

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::config::VmConfig;
    use crate::controller::Instance;
    use crate::machine::ThreadNames;
    use crate::request::Request;

    /// One signal, which is there from the start.
    pub(super) struct One(pub(super) Bell, pub(super) Option<i32>);

    impl Signals for One {
        fn fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }

        fn next(&mut self) -> Option<i32> {
            self.1.take()
        }
    }

    pub(super) fn controller() -> Controller {
        let instance = Instance {
            id: "t".into(),
            names: ThreadNames { io: "io", vcpu: "vcpu ", api: "api", files: "files" },
            started: Instant::now(),
            counters: Arc::default(),
            tells_more: true,
            quit: Arc::new(|| ()),
            announce: |_| (),
        };
        Controller::new(instance, VmConfig::default())
    }

    /// Makes `count` requests; counts the replies.
    fn ask(handle: &crate::Handle, count: usize) -> Arc<AtomicUsize> {
        let answered = Arc::new(AtomicUsize::new(0));
        for _ in 0..count {
            let answered = answered.clone();
            handle.send(Request::Describe, move |_| {
                answered.fetch_add(1, Ordering::Relaxed);
            });
        }
        answered
    }

    #[test]
    fn signal_is_heard_between_requests() {
        let (handle, requests) = Requests::channel().unwrap();
        let answered = ask(&handle, 10 * TURN);
        let mut signals = One(Bell::new().unwrap(), Some(15));
        let ending = serve(&mut controller(), &requests, &Bell::new().unwrap(), &mut signals);
        assert_eq!(ending, Ending::Signalled { signal: 15 });
        assert_eq!(answered.load(Ordering::Relaxed), TURN);
    }

    #[test]
    fn requests_of_many_turns_are_answered_though_the_bell_is_quiet() {
        let (handle, requests) = Requests::channel().unwrap();
        let answered = ask(&handle, 3 * TURN);
        handle.send(Request::Quit, |_| ());
        requests.bell().hush();
        let mut signals = One(Bell::new().unwrap(), None);
        serve(&mut controller(), &requests, &Bell::new().unwrap(), &mut signals);
        assert_eq!(answered.load(Ordering::Relaxed), 3 * TURN);
    }
}
