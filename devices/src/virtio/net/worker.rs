//! Moves frames between the queues of a driver and a tap, straight from and to guest memory.
//!
//! Receive buffers are taken from the driver before there is a frame for them: reading is what
//! tells us how long the frame is. Those not used are kept for the next one and put back when the
//! worker retires. The tap is watched edge-triggered: when the driver has no buffers, nobody reads
//! until it kicks, and a tap that is deleted does not spin.
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::Arc;

use event_manager::EventSet;
use serde_json::Value;
use vm_memory::{Le16, VolatileSlice};

use super::Counters;
use super::detour::Detour;
use crate::backend::tap::{self, HEADER_BYTES, Tap};
use crate::io::{Retired, Source, Watch, Worker};
use crate::limiter::Limiter;
use crate::sys::rw::{IoSlices, MAX_SLICES};
use crate::virtio::chain::{Buffers, Chain};
use crate::virtio::queue::{Served, VirtQueue};

/// The largest frame with offloads, and its header (virtio 1.2, 5.1.6.3.1).
const MAX_FRAME_BYTES: u64 = 65550 + HEADER_BYTES as u64;
/// The smallest: two addresses and a type.
const MIN_FRAME_BYTES: u64 = 14 + HEADER_BYTES as u64;
/// Where `num_buffers` is in the header.
const NUM_BUFFERS_AT: u64 = 10;
/// Frames received before other devices get their turn.
const FRAMES_PER_TURN: usize = 256;

const RX_KICK: usize = 0;
const TX_KICK: usize = 1;
const TAP: usize = 2;

/// The rate limits of both directions.
#[derive(Debug)]
pub(super) struct Limiters {
    pub(super) rx: Limiter,
    pub(super) tx: Limiter,
}

#[derive(Debug)]
pub(super) struct NetWorker {
    receiver: Receiver,
    tx: VirtQueue,
    tx_limiter: Limiter,
    tap: Arc<Tap>,
    counters: Arc<Counters>,
    /// To the metadata service, if the interface leads there.
    detour: Option<Detour>,
    /// The tap was deleted, or the peer of the socket is gone.
    is_gone: bool,
}

impl NetWorker {
    pub(super) fn new(
        rx: VirtQueue,
        tx: VirtQueue,
        tap: Arc<Tap>,
        is_mergeable: bool,
        limiters: Limiters,
        counters: Arc<Counters>,
        detour: Option<Detour>,
    ) -> Self {
        let receiver = Receiver {
            queue: rx,
            is_mergeable,
            held: VecDeque::new(),
            held_bytes: 0,
            spare: Vec::new(),
            limiter: limiters.rx,
            counters: counters.clone(),
        };
        Self { receiver, tx, tx_limiter: limiters.tx, tap, counters, detour, is_gone: false }
    }

    fn transmit(&mut self) {
        let Self { tx, tx_limiter, tap, counters, detour, is_gone, .. } = self;
        let mut was_detoured = false;
        tx.serve(|chain| {
            let is_frame = is_frame(&chain);
            // Costs nothing, as in Firecracker; what comes back does.
            if detour.as_mut().is_some_and(|detour| is_frame && detour.takes(&chain)) {
                was_detoured = true;
                return Served::Used(0);
            }
            if !tx_limiter.take(chain.readable().len().saturating_sub(HEADER_BYTES.into())) {
                counters.tx_rate_limiter_throttled().inc();
                return Served::Later;
            }
            *is_gone |= send(&chain, tap, counters, *is_gone);
            Served::Used(0)
        });
        tx_limiter.settle();
        if was_detoured {
            self.receive();
            self.set_timer();
        }
    }

    /// Receives from the service, and from the tap while it is there.
    fn receive(&mut self) {
        let had_packet = self.detour.as_ref().is_some_and(Detour::has_packet);
        let tap = (!self.is_gone).then_some(&*self.tap);
        self.is_gone |= self.receiver.receive(tap, self.detour.as_mut());
        if had_packet {
            self.set_timer();
        }
    }

    /// After everything by which something of the service may have come due.
    fn set_timer(&mut self) {
        if let Some(detour) = &mut self.detour {
            detour.set_timer();
        }
    }

    /// Goes on after a rate limit, or with what is due of the service: one of the timers has fired.
    fn go_on(&mut self) {
        if self.receiver.limiter.has_fired() {
            self.counters.rx_event_rate_limiter_count().inc();
            self.receive();
        }
        if self.tx_limiter.has_fired() {
            self.counters.tx_rate_limiter_event_count().inc();
            self.transmit();
        }
        if self.detour.as_mut().is_some_and(Detour::tick) {
            self.receive();
            self.set_timer();
        }
    }

    fn note_gone(&mut self) {
        self.is_gone = true;
        self.counters.tap_gone().inc();
        self.tx.host_gone();
        log::warn!("network interface: the tap is gone; the guest's link is dead");
    }
}

impl Worker for NetWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        let rx: Source<'_> = (self.receiver.queue.kick_fd(), EventSet::IN);
        let tx: Source<'_> = (self.tx.kick_fd(), EventSet::IN);
        let tap: Source<'_> = (&*self.tap, EventSet::IN | EventSet::EDGE_TRIGGERED);
        let detour = self.detour.as_ref().map(Detour::source);
        let timers = [self.receiver.limiter.source(), self.tx_limiter.source(), detour];
        [rx, tx, tap].into_iter().chain(timers.into_iter().flatten()).collect()
    }

    fn ready(&mut self, source: usize) -> Watch {
        let was_gone = self.is_gone;
        match source {
            TX_KICK => {
                self.counters.tx_queue_event_count().inc();
                self.transmit();
            }
            RX_KICK => {
                self.receiver.queue.consume_kick();
                self.counters.rx_queue_event_count().inc();
                self.receive();
            }
            TAP => {
                self.counters.rx_tap_event_count().inc();
                self.receive();
            }
            _ => self.go_on(),
        }
        if self.is_gone && !was_gone {
            self.note_gone();
        }
        if source == TAP && self.is_gone { Watch::Drop } else { Watch::Keep }
    }

    fn retire(mut self: Box<Self>) -> Retired {
        self.receiver.put_back();
        if let Some(detour) = self.detour {
            detour.close();
        }
        Retired { queues: vec![self.receiver.queue, self.tx], state: Value::Null }
    }
}

/// Whether a chain is as long as frames are.
fn is_frame(chain: &Chain<'_>) -> bool {
    (MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&chain.readable().len())
}

/// Sends one frame, or drops and counts it; true if the tap turns out to be gone.
fn send(chain: &Chain<'_>, to: &Tap, counters: &Counters, is_gone: bool) -> bool {
    let frame = chain.readable();
    let mut slices = IoSlices::default();
    let mut is_valid = is_frame(chain);
    let walked = frame.for_syscalls(|slice| is_valid = is_valid && slices.push(&slice).is_ok());
    if !is_valid || walked.is_err() {
        counters.tx_malformed_frames().inc();
        counters.tx_fails().inc();
        return false;
    }
    if is_gone {
        counters.tap_write_fails().inc();
        counters.tx_fails().inc();
        return false;
    }
    match counters.tap_write_agg().time(|| to.write(&mut slices)) {
        Ok(_) => {
            counters.tx_count().inc();
            counters.tx_packets_count().inc();
            counters.tx_bytes_count().add(frame.len().saturating_sub(HEADER_BYTES.into()));
            false
        }
        // A header with impossible offsets is EINVAL, a full queue EAGAIN, an interface that is
        // down EIO. A network may lose frames, and a device must not wait.
        Err(e) => {
            counters.tap_write_fails().inc();
            counters.tx_fails().inc();
            tap::is_gone(&e)
        }
    }
}

/// The receive queue and the buffers taken from it.
#[derive(Debug)]
struct Receiver {
    queue: VirtQueue,
    is_mergeable: bool,
    held: VecDeque<Held>,
    held_bytes: u64,
    /// Storage of chains that were used, for the next ones.
    spare: Vec<Buffers>,
    limiter: Limiter,
    counters: Arc<Counters>,
}

/// A chain taken from the driver before there is a frame for it.
#[derive(Debug)]
struct Held {
    head: u16,
    bytes: u64,
    buffers: Buffers,
}

/// What became of one attempt to receive.
enum Received {
    /// A frame was delivered or dropped, or a bad buffer returned.
    Progress,
    /// No frame waits.
    Empty,
    /// No buffer waits.
    Starved,
    /// A rate limit does not let it read yet.
    Throttled,
    /// The tap is gone.
    Gone,
}

impl Receiver {
    /// Receives until there is no frame or no buffer left; true if the tap turns out to be gone.
    fn receive(&mut self, tap: Option<&Tap>, mut detour: Option<&mut Detour>) -> bool {
        let mut is_gone = false;
        let mut turns = FRAMES_PER_TURN;
        self.queue.disable_kicks();
        while turns > 0 {
            turns = turns.saturating_sub(1);
            match self.receive_one(tap, detour.as_deref_mut()) {
                Received::Progress => {}
                Received::Starved => {
                    if !self.queue.enable_kicks() {
                        self.counters.no_rx_avail_buffer().inc();
                        break;
                    }
                }
                Received::Throttled => {
                    self.counters.rx_rate_limiter_throttled().inc();
                    break;
                }
                Received::Empty => break,
                Received::Gone => {
                    is_gone = true;
                    break;
                }
            }
        }
        if turns == 0 {
            self.queue.kick_again();
        }
        self.limiter.settle();
        self.queue.notify();
        is_gone
    }

    fn receive_one(&mut self, tap: Option<&Tap>, detour: Option<&mut Detour>) -> Received {
        let detour = detour.filter(|detour| detour.has_packet());
        if tap.is_none() && detour.is_none() {
            return Received::Empty;
        }
        self.take_chains();
        if self.held.is_empty() || self.queue.is_latched() {
            return Received::Starved;
        }
        // How long the frame is, only reading it tells: it is paid for afterwards.
        if !self.limiter.is_open() {
            return Received::Throttled;
        }
        // One byte more than there is room for tells a frame that does not fit.
        let mut beyond = [0];
        let mut slices = IoSlices::default();
        let room = self.gather(&mut slices);
        if room == 0 || slices.push(&VolatileSlice::from(&mut beyond[..])).is_err() {
            return self.return_bad_chain();
        }
        if let Some(detour) = detour {
            return self.receive_detoured(detour, room);
        }
        let Some(tap) = tap else { return Received::Empty };
        match tap.read(&mut slices) {
            Ok(0) => Received::Gone,
            Ok(read) => {
                self.counters.rx_count().inc();
                self.limiter.charge((read as u64).saturating_sub(HEADER_BYTES.into()));
                self.deliver(read as u64, room);
                Received::Progress
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => Received::Empty,
            Err(e) => {
                self.counters.tap_read_fails().inc();
                if tap::is_gone(&e) { Received::Gone } else { Received::Empty }
            }
        }
    }

    /// Gives the driver a packet of the service. One that does not fit waits if more buffers may
    /// make room for it: unlike a network, the service is in no hurry.
    fn receive_detoured(&mut self, detour: &mut Detour, room: u64) -> Received {
        let Some(packet) = detour.next_packet() else { return Received::Empty };
        let len = packet.len() as u64;
        let has_all = self.held.len() >= usize::from(self.queue.state().size);
        if len > room && self.is_mergeable && room == self.held_bytes && !has_all {
            detour.put_back(packet);
            return Received::Starved;
        }
        self.limiter.charge(len.saturating_sub(HEADER_BYTES.into()));
        let is_delivered = self.write(&packet, room) && self.deliver(len, room);
        detour.note_sent(&packet, is_delivered);
        Received::Progress
    }

    /// Writes a packet into the chains held, as far as there is room; false if that is not far enough.
    fn write(&self, packet: &[u8], room: u64) -> bool {
        if packet.len() as u64 > room {
            self.counters.rx_fails().inc();
            return false;
        }
        let mut rest = packet;
        for held in &self.held {
            if rest.is_empty() {
                break;
            }
            let here = usize::try_from(held.bytes).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at(here);
            if held.buffers.writable(self.queue.mem()).write(now).is_err() {
                break;
            }
            rest = later;
        }
        rest.is_empty()
    }

    /// Takes chains from the driver until the largest frame fits, or there are no more.
    fn take_chains(&mut self) {
        let is_enough = |receiver: &Self| match receiver.is_mergeable {
            true => receiver.held_bytes >= MAX_FRAME_BYTES,
            false => !receiver.held.is_empty(),
        };
        while !is_enough(self) {
            let mut buffers = self.spare.pop().unwrap_or_default();
            buffers.clear();
            let Some(head) = self.queue.pop(&mut buffers) else {
                self.spare.push(buffers);
                return;
            };
            let bytes = buffers.writable(self.queue.mem()).len();
            self.held_bytes = self.held_bytes.saturating_add(bytes);
            self.held.push_back(Held { head, bytes, buffers });
        }
    }

    /// Appends the memory of the chains held, as far as they are good; gives its length. One slot
    /// is left free.
    fn gather<'a>(&'a self, slices: &mut IoSlices<'a>) -> u64 {
        let mut room: u64 = 0;
        for held in &self.held {
            let before = slices.count();
            let mut is_good = held.bytes >= HEADER_BYTES.into();
            let walked = held.buffers.writable(self.queue.mem()).for_syscalls(|slice| {
                is_good &= slices.count().saturating_add(1) < MAX_SLICES;
                is_good = is_good && slices.push_writable(&slice).is_ok();
            });
            if walked.is_err() || !is_good {
                slices.truncate(before);
                break;
            }
            room = room.saturating_add(held.bytes);
        }
        room
    }

    /// Gives the first chain back unused: it is not RAM, too short for a header or too fragmented.
    fn return_bad_chain(&mut self) -> Received {
        self.counters.rx_bad_buffers().inc();
        self.use_first_chain(0);
        self.queue.publish();
        Received::Progress
    }

    /// Gives the driver a frame of `read` bytes, header included, that lies in the chains held; false
    /// if it does not fit.
    fn deliver(&mut self, read: u64, room: u64) -> bool {
        if read > room || read < MIN_FRAME_BYTES || !self.write_num_buffers(read) {
            self.counters.rx_fails().inc();
            return false;
        }
        let mut left = read;
        while left > 0 {
            left = left.saturating_sub(self.use_first_chain(left));
        }
        self.queue.publish();
        self.counters.rx_packets_count().inc();
        self.counters.rx_bytes_count().add(read.saturating_sub(HEADER_BYTES.into()));
        true
    }

    /// Says in the header how many chains the frame fills (virtio 1.2, 5.1.6.4).
    fn write_num_buffers(&self, read: u64) -> bool {
        let mut count: u16 = 0;
        let mut left = read;
        for held in &self.held {
            if left == 0 {
                break;
            }
            count = count.saturating_add(1);
            left = left.saturating_sub(held.bytes);
        }
        let Some(first) = self.held.front() else { return false };
        let mut header = first.buffers.writable(self.queue.mem());
        header.take(NUM_BUFFERS_AT).is_ok() && header.write_obj(Le16::from(count)).is_ok()
    }

    /// Completes the first chain with as much of `left` bytes as it holds; says how much.
    fn use_first_chain(&mut self, left: u64) -> u64 {
        let Some(mut held) = self.held.pop_front() else { return left };
        let used = left.min(held.bytes);
        self.held_bytes = self.held_bytes.saturating_sub(held.bytes);
        self.queue.stage(held.head, u32::try_from(used).unwrap_or(0));
        held.buffers.clear();
        self.spare.push(held.buffers);
        used
    }

    /// Gives all chains held back to the queue, as if they had never been taken.
    fn put_back(&mut self) {
        while let Some(held) = self.held.pop_back() {
            self.queue.undo_pop(held.head);
        }
        self.held_bytes = 0;
    }
}
