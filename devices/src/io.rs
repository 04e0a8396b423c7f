//! The thread that runs active devices.
//!
//! A worker is owned by exactly one thread at a time. Handing it over is `add`; getting it back is
//! `take`. Pausing a device, resetting it, changing it and snapshotting it are all "take it back".
//!
//! Whoever calls `take` waits for the I/O thread, so nobody may call it while holding anything a
//! worker wants. It waits for half a second at most: a worker that blocks (a disk on a file system
//! that hangs) must not take its VM with it, nor other devices, so it has a thread of its own.
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
    SubscriberOps,
};

use crate::memory::Leases;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Mutex, MutexGuard};
use crate::sys::again::spawn;
use crate::virtio::queue::VirtQueue;

/// What a worker wants of a source it was called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Call again when it is ready again.
    Keep,
    /// Never call again for this source: it is at its end or broken.
    Drop,
}

/// A descriptor to wait on, and what for.
pub type Source<'a> = (&'a dyn AsRawFd, EventSet);

/// Something that runs on an I/O thread: the data half of a device.
pub trait Worker: Send {
    /// File descriptors to wait on; the position in the list is the `source` given to `ready`.
    /// Sets that change (sockets that come and go) hide behind one nested epoll descriptor.
    fn sources(&self) -> Vec<Source<'_>>;
    /// Handles one ready source. Must not block.
    fn ready(&mut self, source: usize) -> Watch;
    /// Finishes what is in progress with the host, but not after `deadline`: false if it goes on.
    fn finish(&mut self, _deadline: Instant) -> bool {
        true
    }
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
struct Slot {
    worker: Box<dyn Worker>,
    /// For guest memory that can go away: taken while the worker works.
    leases: Option<Arc<Leases>>,
}

impl Slot {
    fn ready(&mut self, source: usize) -> Watch {
        let _lease = self.leases.as_deref().map(Leases::take);
        self.worker.ready(source)
    }

    fn finish(&mut self, deadline: Instant) -> bool {
        let _lease = self.leases.as_deref().map(Leases::take);
        self.worker.finish(deadline)
    }
}

impl MutEventSubscriber for Slot {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (data, (fd, events)) in (0..).zip(self.worker.sources()) {
            match uninterrupted(|| ops.add(Events::with_data(&fd.as_raw_fd(), data, events))) {
                Ok(()) => {}
                // A regular file cannot be polled and need not be: it is always ready.
                Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EPERM => {
                    log::debug!("source {data} is a file, and not watched");
                }
                Err(e) => log::error!("a device is dead: cannot watch its source {data}: {e}"),
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let source = usize::try_from(events.data()).unwrap_or(usize::MAX);
        if self.ready(source) == Watch::Drop
            && let Err(e) = uninterrupted(|| ops.remove(Events::empty_raw(events.fd())))
        {
            log::warn!("cannot stop watching source {source}: {e:?}");
        }
    }
}

/// Calls the event loop until no signal interrupts it.
fn uninterrupted<T>(
    mut call: impl FnMut() -> Result<T, event_manager::Error>,
) -> Result<T, event_manager::Error> {
    use event_manager::Error::{Epoll, EventFd};
    loop {
        match call() {
            Err(Epoll(e) | EventFd(e)) if e.errno() == libc::EINTR => {}
            done => return done,
        }
    }
}

/// Ticket for a worker that is out on the I/O thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// Which subscriber a ticket stands for. Touched by the I/O thread only, in the order of the calls.
type Tickets = Arc<Mutex<BTreeMap<Ticket, SubscriberId>>>;

/// Why the I/O thread could not be started or asked.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// The event loop refused.
    #[error("I/O event loop: {0}")]
    Events(event_manager::Error),
    /// No thread.
    #[error("cannot start the I/O thread: {0}")]
    Spawn(#[source] std::io::Error),
    /// The worker is in the middle of something that does not end: its host side does not answer.
    #[error("the host side has not answered for {PATIENCE:?}")]
    Busy,
}

impl From<event_manager::Error> for IoError {
    fn from(e: event_manager::Error) -> Self {
        Self::Events(e)
    }
}

/// How long a worker may take to finish what it is doing before it is given up on: a disk on a file
/// system that hangs must not hang whoever pauses, resets or ends the VM.
pub(crate) const PATIENCE: Duration = Duration::from_millis(500);

/// Handle to an I/O thread; dropping it stops the thread.
pub struct IoThread {
    endpoint: RemoteEndpoint<Slot>,
    tickets: Tickets,
    next_ticket: AtomicU64,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Disconnected when the thread has ended.
    ended: Mutex<Receiver<()>>,
    /// What stands for the thread, if there is none.
    #[cfg(fuzzing)]
    by_hand: Option<crate::fuzzing::ByHand>,
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
        Self::spawn_with(name, Vec::new(), || ())
    }

    /// The same, with `workers` for it from the start: for these nobody waits, and nobody can take
    /// them back. The thread calls `begin` first.
    pub fn spawn_with(
        name: &str,
        workers: Vec<Box<dyn Worker>>,
        begin: fn(),
    ) -> Result<Self, IoError> {
        let mut manager = uninterrupted(|| EventManager::<Slot>::new_with_capacity(Self::BATCH))?;
        for worker in workers {
            manager.add_subscriber(Slot { worker, leases: None });
        }
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let (running, ended) = sync_channel(0);
        let run = move || {
            // Dropped, and so disconnected, when the thread ends, however it ends.
            let _running: SyncSender<()> = running;
            begin();
            while !stopped.load(Ordering::Acquire) {
                if let Err(e) = turn(&mut manager) {
                    log::error!("I/O loop: {e:?}");
                }
            }
        };
        let thread = spawn(|work| thread::Builder::new().name(name.into()).spawn(work), run);
        let thread = thread.map_err(IoError::Spawn)?;
        Ok(Self {
            endpoint,
            tickets: Arc::default(),
            next_ticket: AtomicU64::new(0),
            stop,
            thread: Some(thread),
            ended: Mutex::new(ended),
            #[cfg(fuzzing)]
            by_hand: None,
        })
    }

    /// One without a thread: its workers work when [`Self::turn`] is called.
    #[cfg(fuzzing)]
    pub fn by_hand() -> Result<Self, IoError> {
        Ok(Self {
            endpoint: EventManager::<Slot>::new_with_capacity(1)?.remote_endpoint(),
            tickets: Arc::default(),
            next_ticket: AtomicU64::new(0),
            stop: Arc::default(),
            thread: None,
            ended: Mutex::new(sync_channel(0).1),
            by_hand: Some(crate::fuzzing::ByHand::default()),
        })
    }

    /// Has workers handle what is ready now; how much that was.
    #[cfg(fuzzing)]
    pub fn turn(&self) -> usize {
        self.by_hand.as_ref().map_or(0, crate::fuzzing::ByHand::turn)
    }

    /// Puts `worker` to work, as soon as the thread has time. Waits for nobody. `leases` are those of
    /// guest memory that can go away, if the worker works on such.
    pub fn add(
        &self,
        worker: Box<dyn Worker>,
        leases: Option<Arc<Leases>>,
    ) -> Result<Ticket, IoError> {
        let ticket = Ticket(self.next_ticket.fetch_add(1, Ordering::Relaxed));
        #[cfg(fuzzing)]
        if let Some(by_hand) = &self.by_hand {
            return by_hand.add(ticket, worker, leases).map(|()| ticket);
        }
        let tickets = self.tickets.clone();
        self.endpoint.fire(move |ops| {
            let id = ops.add_subscriber(Slot { worker, leases });
            lock(&tickets).insert(ticket, id);
        })?;
        Ok(ticket)
    }

    /// Waits for the event in progress to finish, then takes the worker back. One that does not
    /// finish stays where it is: [`IoError::Busy`].
    pub fn take(&self, ticket: Ticket) -> Result<Box<dyn Worker>, IoError> {
        self.take_within(ticket, PATIENCE)
    }

    /// The same, with another patience.
    pub fn take_within(
        &self,
        ticket: Ticket,
        patience: Duration,
    ) -> Result<Box<dyn Worker>, IoError> {
        let tickets = self.tickets.clone();
        let claim = Arc::new(AtomicBool::new(false));
        let now = Instant::now();
        let deadline = now.checked_add(patience).unwrap_or(now);
        #[cfg(fuzzing)]
        if let Some(by_hand) = &self.by_hand {
            return by_hand.take(ticket, deadline);
        }
        let claimed = claim.clone();
        let (sender, receiver) = sync_channel(1);
        self.endpoint.fire(move |ops| {
            // Whoever claims first decides: the thread, that the worker goes back, or the one who
            // waited too long, that it stays.
            if !claimed.swap(true, Ordering::AcqRel) {
                let id = lock(&tickets).remove(&ticket).ok_or(event_manager::Error::InvalidId);
                let taken = id.and_then(|id| ops.remove_subscriber(id)).map_err(IoError::Events);
                let taken = taken.and_then(|mut slot| {
                    if slot.finish(deadline) {
                        return Ok(slot.worker);
                    }
                    lock(&tickets).insert(ticket, ops.add_subscriber(slot));
                    Err(IoError::Busy)
                });
                // There is room for one, and the receiver is waiting for it.
                let _ = sender.send(taken);
            }
        })?;
        match receiver.recv_timeout(patience) {
            Ok(taken) => taken,
            Err(_) if claim.swap(true, Ordering::AcqRel) => {
                receiver.recv().map_err(|_| IoError::Busy)?
            }
            Err(_) => Err(IoError::Busy),
        }
    }
}

/// Waits for events and handles them.
fn turn(manager: &mut EventManager<Slot>) -> event_manager::Result<usize> {
    // Whoever slept here would stop all threads of a model.
    #[cfg(feature = "models")]
    crate::sync::models::step();
    if cfg!(feature = "models") { manager.run_with_timeout(0) } else { manager.run() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Err(e) = self.endpoint.kick() {
            log::error!("cannot stop the I/O thread: {e:?}");
            return;
        }
        if lock(&self.ended).recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            // It keeps what it uses alive, and ends when its host side answers, or with the process.
            log::error!("an I/O thread is left behind: its host side does not answer");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the I/O thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    /// Says that it is busy, and is so until told otherwise.
    struct Stuck {
        kick: EventFd,
        busy: SyncSender<()>,
        go_on: Receiver<()>,
    }

    impl Worker for Stuck {
        fn sources(&self) -> Vec<(&dyn AsRawFd, EventSet)> {
            vec![(&self.kick, EventSet::IN)]
        }
        fn ready(&mut self, _: usize) -> Watch {
            self.kick.read().unwrap();
            self.busy.send(()).unwrap();
            let _ = self.go_on.recv();
            Watch::Keep
        }
    }

    #[test]
    fn a_worker_that_hangs_is_given_up_on_and_stays() {
        let io = IoThread::spawn("io").unwrap();
        let (busy, is_busy) = sync_channel(1);
        let (go_on, waits) = sync_channel(1);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let remote = kick.try_clone().unwrap();
        let ticket = io.add(Box::new(Stuck { kick, busy, go_on: waits }), None).unwrap();
        remote.write(1).unwrap();
        is_busy.recv().unwrap();
        assert!(matches!(io.take(ticket), Err(IoError::Busy)));
        go_on.send(()).unwrap();
        io.take(ticket).unwrap();
        assert!(matches!(io.take(ticket), Err(IoError::Events(_))));
    }

    #[test]
    fn a_thread_that_hangs_is_left_behind() {
        let io = IoThread::spawn("io").unwrap();
        let (busy, is_busy) = sync_channel(1);
        let (go_on, waits) = sync_channel(1);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        kick.write(1).unwrap();
        io.add(Box::new(Stuck { kick, busy, go_on: waits }), None).unwrap();
        is_busy.recv().unwrap();
        let started = Instant::now();
        drop(io);
        assert!(started.elapsed() < 10 * PATIENCE);
        drop(go_on);
    }
}
