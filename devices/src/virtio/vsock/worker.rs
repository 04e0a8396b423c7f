//! Moves packets between the rings of a driver and the host's streams; data goes straight from and to
//! guest memory.
//!
//! When the guest gives no receive buffers, nothing is read from the host; when it takes no answers,
//! it is not listened to. A stream that the host does not read holds up no other.
use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::{Arc, PoisonError};

use event_manager::EventSet;

use super::{Home, saved};
use crate::backend::vsock::packet::{HEADER_BYTES, Header};
use crate::backend::vsock::{Counters, Muxer, Outgoing, Stream};
use crate::io::{Retired, Watch, Worker};
use crate::sys::rw::IoSlices;
use crate::virtio::chain::{Buffers, Chain};
use crate::virtio::queue::{Served, VirtQueue};

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, the one event there is (virtio 1.2, 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;
const EVENT_BYTES: u32 = 4;
/// Room for events that is held: more than there ever are.
const EVENT_BYTES_HELD: u64 = 4096;
/// Data received from the host at once, over as many buffers as that takes.
const RECEIVE_BYTES: u64 = 64 << 10;
/// Packets given to the guest before other devices get their turn.
const PACKETS_PER_TURN: u32 = 256;

const RX_KICK: usize = 0;
const TX_KICK: usize = 1;
const EVENT_KICK: usize = 2;

#[derive(Debug)]
pub(super) struct VsockWorker {
    rx: Receiver,
    tx: VirtQueue,
    events: Held,
    muxer: Muxer,
    home: Home,
    /// The driver has yet to hear that its connections are gone.
    has_moved: bool,
    /// The driver's packets wait until it takes answers.
    is_tx_stalled: bool,
    counters: Arc<Counters>,
}

impl VsockWorker {
    pub(super) fn new(
        [rx, tx, events]: [VirtQueue; 3],
        muxer: Muxer,
        home: Home,
        has_moved: bool,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            rx: Receiver { ring: Held::new(rx), counters: counters.clone() },
            tx,
            events: Held::new(events),
            muxer,
            home,
            has_moved,
            is_tx_stalled: false,
            counters,
        }
    }

    fn transmit(&mut self) {
        let Self { tx, muxer, is_tx_stalled, counters, .. } = self;
        tx.serve(|chain| {
            *is_tx_stalled = !muxer.has_room();
            if *is_tx_stalled {
                return Served::Later;
            }
            take_packet(&chain, muxer, counters);
            Served::Used(0)
        });
    }

    fn take_event_buffers(&mut self) {
        let Self { events, has_moved, counters, .. } = self;
        events.queue.consume_kick();
        while events.bytes < EVENT_BYTES_HELD {
            match events.take_one(EVENT_BYTES) {
                Taken::Good => {}
                Taken::Bad => counters.rx_bad_buffers().inc(),
                Taken::None if events.queue.enable_kicks() => {}
                Taken::None => break,
            }
        }
        events.return_bad();
        if *has_moved && events.write_first(&TRANSPORT_RESET.to_le_bytes()) {
            *has_moved = false;
        }
        events.return_bad();
        events.queue.notify();
    }
}

impl Worker for VsockWorker {
    fn sources(&self) -> Vec<(&dyn AsRawFd, EventSet)> {
        vec![
            (self.rx.ring.queue.kick_fd(), EventSet::IN),
            (self.tx.kick_fd(), EventSet::IN),
            (self.events.queue.kick_fd(), EventSet::IN),
            (&self.muxer, EventSet::IN),
        ]
    }

    fn ready(&mut self, source: usize) -> Watch {
        match source {
            RX_KICK => {
                self.counters.rx_queue_event_count().inc();
                self.rx.ring.queue.consume_kick();
                self.rx.take_chains();
            }
            TX_KICK => {
                self.counters.tx_queue_event_count().inc();
                self.transmit();
            }
            EVENT_KICK => self.take_event_buffers(),
            _ => self.muxer.serve(),
        }
        self.rx.deliver(&mut self.muxer);
        if self.is_tx_stalled && self.muxer.has_room() {
            self.is_tx_stalled = false;
            self.tx.kick_again();
        }
        Watch::Keep
    }

    fn retire(self: Box<Self>) -> Retired {
        let Self { rx, tx, events, muxer, home, has_moved, .. } = *self;
        let state = saved(&muxer, has_moved);
        *home.lock().unwrap_or_else(PoisonError::into_inner) = Some(muxer);
        Retired { queues: vec![rx.ring.put_back(), tx, events.put_back()], state }
    }
}

/// Takes one packet of the driver.
fn take_packet(chain: &Chain<'_>, muxer: &mut Muxer, counters: &Counters) {
    let mut rest = chain.readable();
    let mut bytes = [0; HEADER_BYTES as usize];
    if rest.read(&mut bytes).is_err() {
        // Whose it is cannot be told, so nobody is.
        counters.tx_malformed_packets().inc();
        return;
    }
    let header = Header::from_bytes(&bytes);
    let mut payload = IoSlices::default();
    let mut is_whole = true;
    let walked = rest.take(header.len.into()).and_then(|data| {
        data.for_each(|slice| is_whole = is_whole && payload.push(&slice).is_ok())
    });
    if walked.is_err() || !is_whole {
        return muxer.refuse_malformed(&header);
    }
    muxer.transmit(&header, payload);
}

/// The receive queue.
#[derive(Debug)]
struct Receiver {
    ring: Held,
    counters: Arc<Counters>,
}

impl Receiver {
    /// Gives the driver what there is for it, until there is no more, or no buffer.
    fn deliver(&mut self, muxer: &mut Muxer) {
        let mut budget = PACKETS_PER_TURN;
        self.ring.queue.disable_kicks();
        while muxer.has_outgoing() {
            if budget == 0 {
                self.ring.queue.kick_again();
                break;
            }
            budget = budget.saturating_sub(1);
            self.take_chains();
            if self.ring.chains.is_empty() {
                if self.ring.queue.enable_kicks() {
                    continue;
                }
                self.counters.no_rx_avail_buffer().inc();
                break;
            }
            match muxer.next_outgoing() {
                Some(Outgoing::Packet(header)) => {
                    self.ring.write_first(&header.to_bytes());
                }
                Some(Outgoing::Data { stream, limit }) => self.receive(muxer, stream, limit),
                None => break,
            }
        }
        self.ring.return_bad();
        self.ring.queue.notify();
    }

    /// Takes buffers until there are enough for one call to the host.
    fn take_chains(&mut self) {
        // A buffer with room for a header alone is of no use for data.
        let least = HEADER_BYTES.saturating_add(1);
        while self.ring.bytes < RECEIVE_BYTES {
            match self.ring.take_one(least) {
                Taken::Good => {}
                Taken::Bad => self.counters.rx_bad_buffers().inc(),
                Taken::None => break,
            }
        }
        self.ring.return_bad();
    }

    /// Receives from the host into as many buffers as it fills, each with a header of its own.
    fn receive(&mut self, muxer: &mut Muxer, stream: Stream, limit: u32) {
        let limit = u64::from(limit).min(RECEIVE_BYTES);
        let mut room = IoSlices::default();
        self.ring.gather(HEADER_BYTES, limit, &mut room);
        let Some(whole) = muxer.receive(stream, &mut room) else { return };
        self.counters.rx_bytes_count().add(whole.len.into());
        let mut left = whole.len;
        while left > 0 {
            let room = self.ring.first_room().saturating_sub(HEADER_BYTES);
            let len = left.min(room);
            if !self.ring.write_header(&Header { len, ..whole }.to_bytes(), len) {
                break;
            }
            self.counters.rx_packets_count().inc();
            left = left.saturating_sub(len);
        }
        self.ring.queue.publish();
    }
}

/// A queue of which buffers are held until there is something to put into them.
#[derive(Debug)]
struct Held {
    queue: VirtQueue,
    chains: VecDeque<HeldChain>,
    /// What those held have room for.
    bytes: u64,
    /// Storage of chains that were used, for the next ones.
    spare: Vec<Buffers>,
}

/// A chain taken from the driver.
#[derive(Debug)]
struct HeldChain {
    head: u16,
    /// All of it is guest memory. 0 of a bad one, which is not to be used.
    room: u32,
    buffers: Buffers,
}

/// What came of an attempt to take a chain.
enum Taken {
    Good,
    Bad,
    None,
}

impl Held {
    fn new(queue: VirtQueue) -> Self {
        Self { queue, chains: VecDeque::new(), bytes: 0, spare: Vec::new() }
    }

    /// Takes the next chain. One that has less room than `least`, or is not RAM, is bad.
    fn take_one(&mut self, least: u32) -> Taken {
        let mut buffers = self.spare.pop().unwrap_or_default();
        buffers.clear();
        let Some(head) = self.queue.pop(&mut buffers) else {
            self.spare.push(buffers);
            return Taken::None;
        };
        let writable = buffers.writable(self.queue.mem());
        let is_ram = writable.for_each(|_| {}).is_ok();
        let room = u32::try_from(writable.len()).unwrap_or(u32::MAX);
        let is_good = is_ram && room >= least;
        let room = if is_good { room } else { 0 };
        self.bytes = self.bytes.saturating_add(room.into());
        self.chains.push_back(HeldChain { head, room, buffers });
        if is_good { Taken::Good } else { Taken::Bad }
    }

    /// Gives those bad chains back that no good one precedes: to put chains back into the queue, as
    /// if they had not been taken, they must be the last that were.
    fn return_bad(&mut self) {
        while self.chains.front().is_some_and(|chain| chain.room == 0) {
            if let Some(mut chain) = self.chains.pop_front() {
                self.queue.complete(chain.head, 0);
                chain.buffers.clear();
                self.spare.push(chain.buffers);
            }
        }
    }

    fn first_room(&self) -> u32 {
        self.chains.front().map_or(0, |chain| chain.room)
    }

    /// Appends up to `limit` bytes of the chains held, each less its first `skip` bytes.
    fn gather<'a>(&'a self, skip: u32, limit: u64, slices: &mut IoSlices<'a>) {
        let mut left = limit;
        for chain in &self.chains {
            let mut room = chain.buffers.writable(self.queue.mem());
            let wanted = left.min(u64::from(chain.room).saturating_sub(skip.into()));
            // Behind a bad one nothing is used before it has gone back.
            let mut is_full = wanted == 0;
            if let Ok(room) = room.take(skip.into()).and_then(|_| room.take(wanted)) {
                let walked = room.for_each(|slice| {
                    is_full = is_full || slices.push_writable(&slice).is_err();
                });
                is_full |= walked.is_err();
            }
            left = left.saturating_sub(wanted);
            if is_full || left == 0 {
                return;
            }
        }
    }

    /// Completes the first chain with `bytes` alone; false if there is none.
    fn write_first(&mut self, bytes: &[u8]) -> bool {
        let is_written = self.write_header(bytes, 0);
        self.queue.publish();
        is_written
    }

    /// Completes the first chain, in which `len` bytes lie behind the place of `header`. The driver
    /// does not see it before [`VirtQueue::publish`].
    fn write_header(&mut self, header: &[u8], len: u32) -> bool {
        let Some(mut chain) = self.chains.pop_front() else { return false };
        self.bytes = self.bytes.saturating_sub(chain.room.into());
        let written = chain.buffers.writable(self.queue.mem()).write(header);
        let used = u32::try_from(header.len()).unwrap_or(0).saturating_add(len);
        self.queue.stage(chain.head, if written.is_ok() { used } else { 0 });
        chain.buffers.clear();
        self.spare.push(chain.buffers);
        true
    }

    /// The queue, with the chains held in it as if they had never been taken.
    fn put_back(mut self) -> VirtQueue {
        while let Some(chain) = self.chains.pop_back() {
            self.queue.undo_pop(chain.head);
        }
        self.queue
    }
}
