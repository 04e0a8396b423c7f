//! Clients that hang up while they wait: for events, or for the VM's end.
//!
//! hyper looks for the end of a connection only while it has nothing of a next request, and whoever shut down the sending
//! half has shown that end already. Such a client would keep its place for as long as nothing happens to the VM; so
//! the kernel is asked.
#![expect(unsafe_code, reason = "tokio waits for a descriptor that is none of its kinds")]
use std::io;
use std::os::fd::OwnedFd;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::retry_on_intr;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// Told at a time; the rest comes next.
const BATCH: usize = 16;

/// Streams that are watched.
#[derive(Debug)]
pub(super) struct Hangups(AsyncFd<OwnedFd>);

impl Hangups {
    /// Watches none yet. In the runtime that is to tell of them.
    pub(super) fn new() -> io::Result<Self> {
        let epoll = retry_on_intr(|| epoll::create(CreateFlags::CLOEXEC))?;
        // SAFETY: it is open, and nobody closes or replaces it while `AsyncFd` owns it.
        Ok(Self(unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE) }?))
    }

    /// Watches `stream` under the name of `id`, until it is closed.
    pub(super) fn watch(&self, stream: &UnixStream, id: u64) -> io::Result<()> {
        // EPOLLHUP, that nobody is at the other end any more, is told unasked; each once.
        let add = || epoll::add(self.0.get_ref(), stream, EventData::new_u64(id), EventFlags::ET);
        Ok(retry_on_intr(add)?)
    }

    /// Waits until clients have hung up: the names of their streams.
    pub(super) async fn next(&self) -> io::Result<Vec<u64>> {
        loop {
            let mut guard = self.0.readable().await?;
            let mut events: Vec<Event> = Vec::with_capacity(BATCH);
            let at_once = Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 });
            retry_on_intr(|| {
                let to = rustix::buffer::spare_capacity(&mut events);
                epoll::wait(guard.get_inner(), to, at_once)
            })?;
            if events.is_empty() {
                guard.clear_ready();
                continue;
            }
            return Ok(events.iter().map(|event| event.data.u64()).collect());
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{Shutdown, shutdown};
    use tokio::runtime::Builder;

    use super::*;

    #[test]
    fn only_those_who_are_gone_are_told_of_and_once() {
        let runtime = Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            let hangups = Hangups::new().unwrap();
            let pairs = [(); 3].map(|()| UnixStream::pair().unwrap());
            for (id, (stream, _)) in (7..).zip(&pairs) {
                hangups.watch(stream, id).unwrap();
            }
            let [(_first, half), (_second, gone), (_third, busy)] = pairs;
            shutdown(&half, Shutdown::Write).unwrap();
            busy.try_write(b"more").unwrap();
            drop(gone);
            assert_eq!(hangups.next().await.unwrap(), [8]);
            drop(half);
            assert_eq!(hangups.next().await.unwrap(), [7]);
            drop(busy);
            assert_eq!(hangups.next().await.unwrap(), [9]);
        });
    }
}
