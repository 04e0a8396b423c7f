//! How other threads wake the tasks of the API's: by husk's own bell.
//!
//! tokio's way is an eventfd that it has for itself, and a panic of the thread that wakes, the VMM's at each reply, should
//! that not take a write. Here whoever is to be woken is noted and the bell rung; a task of the API's thread hears it
//! and wakes them, for which tokio needs no system call.
use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Wake, Waker};

use devices::sys::again::again;
use tokio::net::unix::pipe::Receiver;

use crate::bell::Bell;

/// The bell, and who is to be woken when it is heard.
#[derive(Debug)]
pub(super) struct Chime {
    bell: Bell,
    noted: Mutex<Vec<Waker>>,
}

impl Chime {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { bell: Bell::new()?, noted: Mutex::default() }))
    }

    /// What another thread will bring about, waited for.
    pub(super) async fn hear<F: Future>(self: &Arc<Self>, awaited: F) -> F::Output {
        let mut awaited = pin!(awaited);
        poll_fn(|cx| awaited.as_mut().poll(&mut Context::from_waker(&self.waker(cx)))).await
    }

    /// Wakes the task of `cx`, from whichever thread.
    pub(super) fn waker(self: &Arc<Self>, cx: &Context<'_>) -> Waker {
        Arc::new(Caller { chime: self.clone(), task: cx.waker().clone() }).into()
    }

    /// The end that hears. In the runtime, before its thread begins: without it nobody would be woken.
    pub(super) fn ear(self: &Arc<Self>) -> io::Result<Ear> {
        // To tokio it is a pipe: something to be read, without blocking.
        let end = || Receiver::from_file_unchecked(self.bell.as_fd().try_clone_to_owned()?.into());
        Ok(Ear { chime: self.clone(), bell: again(end)? })
    }

    fn note(&self, task: Waker) {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).push(task);
        self.bell.ring();
    }

    fn wake_all(&self) {
        let noted = std::mem::take(&mut *self.noted.lock().unwrap_or_else(PoisonError::into_inner));
        noted.into_iter().for_each(Waker::wake);
    }
}

/// Wakes a task by the bell.
struct Caller {
    chime: Arc<Chime>,
    task: Waker,
}

impl Wake for Caller {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.chime.note(self.task.clone());
    }
}

/// Where the bell is heard.
#[derive(Debug)]
pub(super) struct Ear {
    chime: Arc<Chime>,
    bell: Receiver,
}

impl Ear {
    /// Wakes whom other threads want woken, for ever.
    pub(super) async fn listen(self) {
        // It fails when the runtime ends, and this with it.
        while self.bell.readable().await.is_ok() {
            // Quiet before the look: who is noted after it rings again. Whether it was rung is all the same.
            let _ = self.bell.try_read(&mut [0; 8]);
            self.chime.wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::runtime::Builder;
    use tokio::sync::oneshot;
    use tokio::task::{LocalSet, spawn_local};

    use super::*;

    #[test]
    fn what_other_threads_bring_about_is_heard_each_time() {
        let runtime = Builder::new_current_thread().enable_io().build().unwrap();
        let chime = Chime::new().unwrap();
        LocalSet::new().block_on(&runtime, async {
            spawn_local(chime.ear().unwrap().listen());
            for round in 0..1000 {
                let (senders, receivers): (Vec<_>, Vec<_>) =
                    (0..3).map(|_| oneshot::channel()).unzip();
                let other = std::thread::spawn(move || {
                    for sender in senders {
                        sender.send(round).unwrap();
                    }
                });
                for receiver in receivers {
                    assert_eq!(chime.hear(receiver).await, Ok(round));
                }
                other.join().unwrap();
            }
        });
    }

    #[test]
    fn who_has_gone_is_heard_of_too() {
        let runtime = Builder::new_current_thread().enable_io().build().unwrap();
        let chime = Chime::new().unwrap();
        LocalSet::new().block_on(&runtime, async {
            spawn_local(chime.ear().unwrap().listen());
            let (sender, receiver) = oneshot::channel::<()>();
            let other = std::thread::spawn(move || drop(sender));
            assert!(chime.hear(receiver).await.is_err());
            other.join().unwrap();
        });
    }
}
