//! The way off the wire to the metadata service: frames that the guest sends to it do not reach the
//! tap, and its frames come from here. Only on interfaces that lead to it.
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use event_manager::EventSet;

use crate::backend::tap::HEADER_BYTES;
use crate::io::Source;
use crate::mmds::{HEAD_BYTES, Service, Stack};
use crate::timer::{Timer, now_ns};
use crate::virtio::chain::Chain;

/// The least time until what is due is done.
const SHORTEST: Duration = Duration::from_millis(1);

/// Where an interface leads to the service; outlives the worker.
#[derive(Debug)]
pub(super) struct Junction {
    service: Arc<Service>,
    mtu: Option<u16>,
    /// Connections of a worker that was paused. Taken and put back on the way from one worker to the
    /// next, never waited for.
    kept: Arc<Mutex<Option<Box<Stack>>>>,
}

impl Junction {
    pub(super) fn new(service: Arc<Service>, mtu: Option<u16>) -> Self {
        Self { service, mtu, kept: Arc::default() }
    }

    /// A detour with the connections of the last one, unless the driver has begun anew.
    pub(super) fn open(&self, is_resumed: bool) -> std::io::Result<Detour> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        let stack = kept.filter(|_| is_resumed).unwrap_or_else(|| {
            Box::new(Stack::new(self.service.clone(), self.mtu, Instant::now()))
        });
        Ok(Detour { stack, timer: Timer::new()?, waiting: None, kept: self.kept.clone() })
    }
}

/// The service as a second wire.
#[derive(Debug)]
pub(super) struct Detour {
    stack: Box<Stack>,
    timer: Timer,
    /// A packet for which the driver has too few buffers.
    waiting: Option<Vec<u8>>,
    kept: Arc<Mutex<Option<Box<Stack>>>>,
}

impl Detour {
    /// Takes the frame that `chain` holds if it is for the service. `chain` is a whole frame with
    /// its header, as long as frames may be.
    pub(super) fn takes(&mut self, chain: &Chain<'_>) -> bool {
        let mut frame = chain.readable();
        if frame.take(HEADER_BYTES.into()).is_err() {
            return false;
        }
        let mut head = [0; HEAD_BYTES];
        let len = usize::try_from(frame.len()).unwrap_or(usize::MAX);
        let Some(head) = head.get_mut(..len.min(HEAD_BYTES)) else { return false };
        if frame.clone().read(head).is_err() || !self.stack.is_for(head) {
            return false;
        }
        // Read again as a whole: what counts is what the service finds in its copy.
        let mut copy = vec![0; len];
        if frame.read(&mut copy).is_err() {
            return false;
        }
        self.stack.receive(&copy, Instant::now());
        true
    }

    /// Whether there is a frame for the guest.
    pub(super) fn has_packet(&self) -> bool {
        self.waiting.is_some() || self.stack.has_frame()
    }

    /// The next frame for the guest, with a header that asks nothing of it: checksums are made,
    /// segments are small.
    pub(super) fn next_packet(&mut self) -> Option<Vec<u8>> {
        if let Some(packet) = self.waiting.take() {
            return Some(packet);
        }
        let frame = self.stack.next_frame(Instant::now())?;
        let mut packet = vec![0; HEADER_BYTES as usize];
        packet.extend_from_slice(&frame);
        Some(packet)
    }

    /// Keeps a packet for later, the last one that was taken.
    pub(super) fn put_back(&mut self, packet: Vec<u8>) {
        self.waiting = Some(packet);
    }

    /// What became of a packet.
    pub(super) fn note_sent(&self, packet: &[u8], is_delivered: bool) {
        self.stack.note_sent(packet.len().saturating_sub(HEADER_BYTES as usize), is_delivered);
    }

    /// Does what is due if the source was ready; whether it was.
    pub(super) fn tick(&mut self) -> bool {
        let has_fired = self.timer.has_fired();
        if has_fired {
            self.stack.tick(Instant::now());
        }
        has_fired
    }

    /// Sets the timer to when something is due, or off. Never at once, however late it is: others
    /// have their turn first.
    pub(super) fn set_timer(&mut self) {
        match self.stack.deadline(Instant::now()) {
            Some(delay) => {
                let delay = u64::try_from(delay.max(SHORTEST).as_nanos()).unwrap_or(u64::MAX);
                self.timer.set(now_ns().saturating_add(delay));
            }
            None => self.timer.disarm(),
        }
    }

    /// What becomes ready when something is due: one of the worker's sources.
    pub(super) fn source(&self) -> Source<'_> {
        (&self.timer as &dyn AsRawFd, EventSet::IN)
    }

    /// Keeps the connections for the next worker.
    pub(super) fn close(self) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.stack);
    }
}
