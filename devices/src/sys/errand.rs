//! A thread that does what others may not: whoever asks waits until it is done.
//!
//! Where threads are forbidden most system calls, one that is not can still be asked, by name of what is to be
//! done and not by system call.
#![expect(unsafe_code, reason = "what is to be done borrows from whoever waits for it")]
use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use super::again::spawn;

type Job<'a> = Box<dyn FnOnce() + Send + 'a>;

/// The thread. Dropping it ends it.
#[derive(Debug)]
pub struct Errands {
    jobs: Option<Sender<(Job<'static>, SyncSender<()>)>>,
    thread: Option<JoinHandle<()>>,
}

impl Errands {
    /// Starts the thread called `name`, which calls `begin` first.
    pub fn spawn(name: &str, begin: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (jobs, to_do) = channel::<(Job<'static>, SyncSender<()>)>();
        let work = move || {
            begin();
            for (job, done) in to_do {
                job();
                // Whoever asked waits for it.
                let _ = done.send(());
            }
        };
        let thread = spawn(|work| thread::Builder::new().name(name.into()).spawn(work), work)?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Runs `work` on the thread, waits, and gives what it gave. A panic of it is one here.
    #[expect(
        clippy::unreachable,
        reason = "nothing the guest does ends the thread before its handle"
    )]
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        let mut outcome: Option<Result<R, Box<dyn Any + Send>>> = None;
        let place = &mut outcome;
        let job: Job<'_> = Box::new(move || *place = Some(catch_unwind(AssertUnwindSafe(work))));
        // SAFETY: only the lifetime changes. The job is called or dropped before `done` is used or dropped, and until
        // then this function does not return: what the job borrows outlives it.
        let job = unsafe { std::mem::transmute::<Job<'_>, Job<'static>>(job) };
        let (done, is_done) = sync_channel(1);
        // If the thread is gone, the job comes back with the error, and goes with it.
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send((job, done)).is_ok());
        let _ = sent.then(|| is_done.recv());
        match outcome {
            Some(Ok(given)) => given,
            Some(Err(panic)) => resume_unwind(panic),
            None => unreachable!("the thread lives as long as its handle"),
        }
    }
}

impl Drop for Errands {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a thread that runs errands has panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_done_elsewhere_and_waited_for() {
        let errands = Errands::spawn("errands", || ()).unwrap();
        let mut text = String::from("a");
        let name = errands.run(|| {
            text.push('b');
            thread::current().name().map(str::to_owned)
        });
        assert_eq!((text.as_str(), name.as_deref()), ("ab", Some("errands")));
    }

    #[test]
    fn a_panic_is_the_askers_and_the_thread_goes_on() {
        let errands = Errands::spawn("errands", || ()).unwrap();
        let panicked =
            catch_unwind(AssertUnwindSafe(|| errands.run(|| "no".parse::<u32>().unwrap())));
        assert!(panicked.is_err());
        assert_eq!(errands.run(|| 7), 7);
    }
}
