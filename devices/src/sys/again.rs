//! What a signal has interrupted is made again. None of these calls is interrupted by the kernels that we know once it
//! has begun to do something; but EINTR is never a reason to give up.
use std::io::{ErrorKind, Result};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Makes a call until no signal interrupts it.
pub fn again<T>(mut call: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// An eventfd that nobody waits for, and that no other program inherits.
pub fn eventfd() -> Result<EventFd> {
    again(|| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
}

/// What a thread is there for.
pub type Work = Box<dyn FnOnce() + Send>;

/// Starts a thread for `work`, by `start`, which is how.
pub fn spawn<T>(
    start: impl Fn(Work) -> Result<T>,
    work: impl FnOnce() + Send + 'static,
) -> Result<T> {
    // A thread that does not start takes what it was to do with it.
    let work = Arc::new(Mutex::new(Some(work)));
    again(|| {
        let work = work.clone();
        start(Box::new(move || {
            let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(work) = work {
                work();
            }
        }))
    })
}

#[cfg(test)]
mod tests {
    use std::io::Error;
    use std::thread::Builder;

    use super::*;

    #[test]
    fn what_is_interrupted_is_done_again_and_nothing_else() {
        let mut calls = 0;
        let done = again(|| {
            calls += 1;
            if calls < 3 { Err(ErrorKind::Interrupted.into()) } else { Ok(calls) }
        });
        assert_eq!(done.unwrap(), 3);
        let mut calls = 0;
        let failed = again(|| -> Result<()> {
            calls += 1;
            Err(Error::from_raw_os_error(libc::ENOMEM))
        });
        assert_eq!((failed.unwrap_err().raw_os_error(), calls), (Some(libc::ENOMEM), 1));
    }

    #[test]
    fn a_thread_does_what_it_is_for_under_its_name() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let work = move || sender.send(std::thread::current().name().map(str::to_owned)).unwrap();
        let named = |work| Builder::new().name("again".into()).spawn(work);
        spawn(named, work).unwrap().join().unwrap();
        assert_eq!(receiver.recv().unwrap().as_deref(), Some("again"));
    }
}
