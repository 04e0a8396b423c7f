//! What fuzzing needs of this crate besides its interface: entries into what is not public, and an I/O thread that
//! is no thread. Only there with `--cfg fuzzing`: tests/fuzz.
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use crate::GuestRam;
use crate::io::{IoError, Ticket, Watch, Worker};
use crate::memory::Leases;
use crate::mmds::{HEAD_BYTES, Service, Stack};
use crate::virtio::notifier::Notifier;
use crate::virtio::queue::{QueueConfig, QueueError, RingFeatures, VirtQueue};

/// A live queue: `VirtQueue::new`.
pub fn queue(
    max_size: u16,
    config: &QueueConfig,
    (is_indirect, is_event_idx): (bool, bool),
    kick: Arc<EventFd>,
    mem: GuestRam,
    notifier: Arc<Notifier>,
) -> Result<VirtQueue, QueueError> {
    let features = RingFeatures { is_indirect, is_event_idx };
    VirtQueue::new(0, max_size, config, features, kick, mem, notifier)
}

/// Workers that work when they are told to, on the thread of whoever tells them: in the place of an I/O thread's
/// event loop, and by the same rules.
#[derive(Default)]
pub(crate) struct ByHand(Mutex<Vec<Out>>);

/// A worker that is out.
struct Out {
    ticket: Ticket,
    worker: Box<dyn Worker>,
    leases: Option<Arc<Leases>>,
    epoll: Epoll,
}

impl ByHand {
    /// Ready events that one turn handles of one worker.
    const BATCH: usize = 32;

    pub(crate) fn add(
        &self,
        ticket: Ticket,
        worker: Box<dyn Worker>,
        leases: Option<Arc<Leases>>,
    ) -> Result<(), IoError> {
        let epoll = Epoll::new().map_err(IoError::Spawn)?;
        for (source, (fd, events)) in (0..).zip(worker.sources()) {
            // As the event loop: a regular file cannot be waited for.
            let event = EpollEvent::new(events, source);
            let _ = epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event);
        }
        self.workers().push(Out { ticket, worker, leases, epoll });
        Ok(())
    }

    pub(crate) fn take(
        &self,
        ticket: Ticket,
        deadline: Instant,
    ) -> Result<Box<dyn Worker>, IoError> {
        let mut workers = self.workers();
        let at = workers.iter().position(|out| out.ticket == ticket);
        let at = at.ok_or(IoError::Events(event_manager::Error::InvalidId))?;
        let mut out = workers.swap_remove(at);
        let is_finished = {
            let _lease = out.leases.as_deref().map(Leases::take);
            out.worker.finish(deadline)
        };
        if is_finished {
            return Ok(out.worker);
        }
        workers.push(out);
        Err(IoError::Busy)
    }

    /// Handles what is ready now; how much that was.
    pub(crate) fn turn(&self) -> usize {
        let mut handled = 0_usize;
        for out in self.workers().iter_mut() {
            let mut ready = [EpollEvent::default(); Self::BATCH];
            let count = out.epoll.wait(0, &mut ready).unwrap_or(0);
            for event in ready.iter().take(count) {
                handled = handled.saturating_add(1);
                let source = usize::try_from(event.data()).unwrap_or(usize::MAX);
                let _lease = out.leases.as_deref().map(Leases::take);
                if out.worker.ready(source) == Watch::Drop
                    && let Some((fd, _)) = out.worker.sources().get(source)
                {
                    let event = EpollEvent::default();
                    let _ = out.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), event);
                }
            }
        }
        handled
    }

    fn workers(&self) -> MutexGuard<'_, Vec<Out>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The metadata service on one interface, as virtio-net uses it.
#[derive(Debug)]
pub struct Mmds(Stack);

impl Mmds {
    /// The service, with an interface of MTU `mtu` if it is known.
    pub fn new(service: Arc<Service>, mtu: Option<u16>, now: Instant) -> Self {
        Self(Stack::new(service, mtu, now))
    }

    /// Gives it a frame of the guest, if it is for it.
    pub fn receive(&mut self, frame: &[u8], now: Instant) -> bool {
        let is_for = self.0.is_for(frame.get(..HEAD_BYTES).unwrap_or(frame));
        if is_for {
            self.0.receive(frame, now);
        }
        is_for
    }

    /// The next frame for the guest.
    pub fn next_frame(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.0.next_frame(now)
    }

    /// Lets what is due happen; whether something will be due.
    pub fn tick(&mut self, now: Instant) -> bool {
        self.0.tick(now);
        self.0.deadline(now).is_some()
    }

    /// Refuses, by a panic, more than a guest may make the host keep.
    pub fn assert_bounds(&self) {
        self.0.assert_bounds();
    }
}
