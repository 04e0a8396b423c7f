//! The thread that runs active devices.
//!
//! A worker is owned by exactly one thread at a time. Handing it over is `add`; getting it back is
//! `take`. Pausing a device, resetting it, changing it and snapshotting it are all "take it back".
//!
//! Whoever calls `add` or `take` waits for the I/O thread, so nobody may call them while holding
//! anything a worker wants.
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
    SubscriberOps,
};

use crate::virtio::queue::VirtQueue;

/// What a worker wants of a source it was called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Call again when it is ready again.
    Keep,
    /// Never call again for this source: it is at its end or broken.
    Drop,
}

/// Something that runs on an I/O thread: the data half of a device.
pub trait Worker: Send {
    /// File descriptors to wait on; the position in the list is the `source` given to `ready`.
    /// Sets that change (sockets that come and go) hide behind one nested epoll descriptor.
    fn sources(&self) -> Vec<(&dyn AsRawFd, EventSet)>;
    /// Handles one ready source. Must not block.
    fn ready(&mut self, source: usize) -> Watch;
    /// Ends the worker: what it was lent, and what it must remember to go on later.
    fn retire(self: Box<Self>) -> Retired {
        Retired::default()
    }
}

/// What is left of a worker: enough to activate its device again, here or in another process.
#[derive(Debug, Default)]
pub struct Retired {
    /// The queues, in virtio order.
    pub queues: Vec<VirtQueue>,
    /// Backend state worth keeping; `Null` for most devices. Queue state is the transport's.
    pub state: serde_json::Value,
}

/// Adapts every `Worker` to the event manager, once, so that no device repeats it.
struct Slot(Box<dyn Worker>);

impl MutEventSubscriber for Slot {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (data, (fd, events)) in (0..).zip(self.0.sources()) {
            // A regular file cannot be polled and need not be: it is always ready.
            if let Err(e) = ops.add(Events::with_data(&fd.as_raw_fd(), data, events)) {
                log::debug!("source {data} is not watched: {e:?}");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let source = usize::try_from(events.data()).unwrap_or(usize::MAX);
        if self.0.ready(source) == Watch::Drop
            && let Err(e) = ops.remove(Events::empty_raw(events.fd()))
        {
            log::warn!("cannot stop watching source {source}: {e:?}");
        }
    }
}

/// Ticket for a worker that is out on the I/O thread.
#[derive(Clone, Copy, Debug)]
pub struct Ticket(SubscriberId);

/// Why the I/O thread could not be started or asked.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// The event loop refused.
    #[error("I/O event loop: {0:?}")]
    Events(event_manager::Error),
    /// No thread.
    #[error("cannot start the I/O thread")]
    Spawn(#[source] std::io::Error),
}

impl From<event_manager::Error> for IoError {
    fn from(e: event_manager::Error) -> Self {
        Self::Events(e)
    }
}

/// Handle to an I/O thread; dropping it stops the thread.
pub struct IoThread {
    endpoint: RemoteEndpoint<Slot>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for IoThread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoThread").finish_non_exhaustive()
    }
}

impl IoThread {
    /// Ready events taken from the kernel per wake-up; more only wait for the next one.
    const BATCH: usize = 32;

    /// Starts a thread called `name` (at most 15 bytes, the kernel's limit).
    pub fn spawn(name: &str) -> Result<Self, IoError> {
        Self::spawn_with(name, Vec::new())
    }

    /// The same, with `workers` for it from the start: for these nobody waits, and nobody can take
    /// them back.
    pub fn spawn_with(name: &str, workers: Vec<Box<dyn Worker>>) -> Result<Self, IoError> {
        let mut manager = EventManager::<Slot>::new_with_capacity(Self::BATCH)?;
        for worker in workers {
            manager.add_subscriber(Slot(worker));
        }
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                while !stopped.load(Ordering::Acquire) {
                    if let Err(e) = manager.run() {
                        log::error!("I/O loop: {e:?}");
                    }
                }
            })
            .map_err(IoError::Spawn)?;
        Ok(Self { endpoint, stop, thread: Some(thread) })
    }

    /// Puts `worker` to work.
    pub fn add(&self, worker: Box<dyn Worker>) -> Result<Ticket, IoError> {
        Ok(self.endpoint.call_blocking::<_, _, event_manager::Error>(move |ops| {
            Ok(Ticket(ops.add_subscriber(Slot(worker))))
        })?)
    }

    /// Waits for the event in progress to finish, then takes the worker back.
    pub fn take(&self, ticket: Ticket) -> Result<Box<dyn Worker>, IoError> {
        Ok(self
            .endpoint
            .call_blocking(move |ops| ops.remove_subscriber(ticket.0).map(|slot| slot.0))?)
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Err(e) = self.endpoint.kick() {
            log::error!("cannot stop the I/O thread: {e:?}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the I/O thread panicked");
        }
    }
}
