//! All connections of one device: who is there, who is ready, who has waited too long.
//!
//! One epoll descriptor stands for the listener, every stream and the clock. Streams are watched
//! edge-triggered; a connection with something for the guest stands in a queue, once, and has one
//! packet sent each time it is at the front.
//!
//! What a guest or the host can make us hold is bounded: streams by [`STREAMS_MAX`], what waits in
//! them by the credit given, answers by [`REPLIES_MAX`], beyond which the guest is not listened to
//! until it takes some.
mod opening;

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::time::Timespec;

use self::opening::Greeted;
use super::Counters;
use super::clock::Clock;
use super::connection::{Basis, Connection, Due, Ports, Verdict};
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};
use super::socket::HostSocket;
use crate::backend::unix::{ListenError, Listener, SocketName, StalePolicy};
use crate::sys::errand::Errands;
use crate::sys::rw::IoSlices;

/// Streams that may exist at once, in both directions together.
pub const STREAMS_MAX: usize = 2048;
/// Answers without a connection that may wait for the guest to take them.
const REPLIES_MAX: usize = 256;
/// Entries of a list of streams, those no longer true included: [`shorten`].
const LIST_MAX: usize = 2 * STREAMS_MAX;
/// How long the host may take to say which port it wants, the guest to answer, and the guest to end
/// a connection that the host has left. Firecracker's.
const PATIENCE: Duration = Duration::from_secs(2);
/// How soon to try again what the host could not do: connect, accept.
const RETRY: Duration = Duration::from_millis(10);
/// Buffer for what one stream of the host does not read, as long as there are few...
const WINDOW_LARGE: u32 = 256 << 10;
/// ... and when there are many.
const WINDOW_SMALL: u32 = 16 << 10;
/// How much large buffers may come to.
const WINDOWS_BUDGET: u64 = 32 << 20;
/// Host ports of connections that the host asks for. Firecracker's.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;
/// Ready streams looked at in one turn.
const EVENTS_PER_TURN: usize = 64;

const LISTENER: u64 = 0;
const CLOCK: u64 = 1;
const FIRST_TOKEN: u64 = 2;

/// Why there is no host side.
#[derive(Debug, thiserror::Error)]
pub enum MuxerError {
    /// Nobody can listen at the path.
    #[error("{0}")]
    Listen(#[from] ListenError),
    /// The host gives no event descriptor.
    #[error("cannot watch streams")]
    Host(#[source] std::io::Error),
}

impl From<Errno> for MuxerError {
    fn from(errno: Errno) -> Self {
        Self::Host(errno.into())
    }
}

/// What is to be sent to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// A packet without data.
    Packet(Header),
    /// Up to `limit` bytes of `stream`: [`Muxer::receive`].
    Data {
        /// Which stream.
        stream: Stream,
        /// How much the guest has room for.
        limit: u32,
    },
}

/// Names a stream as long as it exists, and nothing afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream(u64);

/// One end of a stream, at its stage.
#[derive(Debug)]
enum Entry {
    /// A process of the host has yet to say which port it wants.
    Greeting(HostSocket),
    /// The guest wants a port of the host where too many are waiting.
    Waiting(Header),
    Connected(Box<Connection>),
    /// The guest is done; the host has not read everything.
    Lingering(HostSocket),
}

#[derive(Debug)]
struct Slot {
    entry: Entry,
    /// The part of the budget it has.
    window: u32,
    /// When it has taken too long.
    deadline: Option<Instant>,
    /// Whether it stands in the queue of those that have something for the guest.
    is_queued: bool,
}

/// The host's side of a vsock device.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    path: PathBuf,
    // Dropped before the listener: who has a stream sees it end before the socket goes.
    slots: HashMap<Stream, Slot>,
    by_ports: HashMap<Ports, Stream>,
    /// Those with something for the guest.
    queued: VecDeque<Stream>,
    /// Answers that belong to no connection.
    replies: VecDeque<Header>,
    /// In the order of their time, as all have the same patience. Those no longer true are skipped.
    deadlines: VecDeque<(Instant, Stream)>,
    /// Entries that are [`Entry::Waiting`].
    waiting: VecDeque<Stream>,
    windows: u64,
    next_token: u64,
    next_port: u32,
    /// The host has no descriptors left, so nobody is let in.
    is_deaf: bool,
    counters: Arc<Counters>,
    /// The thread that connects, if this one may not.
    connector: Option<Errands>,
    listener: OwnedFd,
    epoll: OwnedFd,
    clock: Clock,
}

impl Muxer {
    /// Listens at `path` for processes that want a port of the guest, whose address is `guest_cid`; the name of the
    /// socket, which is to be dropped where files may be removed.
    /// `connector` connects to those that the guest wants, if whoever serves the muxer may not.
    pub fn bind(
        guest_cid: u32,
        path: &Path,
        connector: Option<Errands>,
        counters: Arc<Counters>,
    ) -> Result<(Self, SocketName), MuxerError> {
        let listener = Listener::bind(path, StalePolicy::Replace)?;
        let epoll = retry_on_intr(|| epoll::create(epoll::CreateFlags::CLOEXEC))?;
        let clock = Clock::new()?;
        let watch = |fd: BorrowedFd<'_>, data| {
            retry_on_intr(|| epoll::add(&epoll, fd, EventData::new_u64(data), EventFlags::IN))
        };
        watch(listener.as_fd(), LISTENER)?;
        watch(clock.as_fd(), CLOCK)?;
        let path = listener.path().to_owned();
        let (name, listener) = listener.into_parts();
        let muxer = Self {
            guest_cid: guest_cid.into(),
            path,
            slots: HashMap::new(),
            by_ports: HashMap::new(),
            queued: VecDeque::new(),
            replies: VecDeque::new(),
            deadlines: VecDeque::new(),
            waiting: VecDeque::new(),
            windows: 0,
            next_token: FIRST_TOKEN,
            next_port: FIRST_PORT,
            is_deaf: false,
            counters,
            connector,
            listener,
            epoll,
            clock,
        };
        Ok((muxer, name))
    }

    /// Ends all connections; who listens and who wants in stays.
    pub fn reset(&mut self) {
        let connections = self.slots.values().filter(|slot| slot.window != 0).count();
        self.counters.conns_removed().add(connections as u64);
        // Room that a driver has made them take is given back with them.
        self.slots = HashMap::new();
        self.by_ports = HashMap::new();
        self.queued = VecDeque::new();
        self.replies = VecDeque::new();
        self.deadlines = VecDeque::new();
        self.waiting = VecDeque::new();
        self.windows = 0;
    }

    /// The port that the host's next connection has.
    pub fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Goes on from the port where another left off, so that the guest is not confused.
    pub fn seek_port(&mut self, port: u32) {
        if (FIRST_PORT..=LAST_PORT).contains(&port) {
            self.next_port = port;
        }
    }

    /// Looks at what has become ready, as far as one turn goes.
    pub fn serve(&mut self) {
        let none = epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) };
        let mut events = [none; EVENTS_PER_TURN];
        let count = match epoll::wait(&self.epoll, &mut events[..], Some(&Timespec::default())) {
            Ok(count) => count,
            Err(Errno::INTR) => return,
            Err(e) => {
                self.counters.muxer_event_fails().inc();
                log::warn!("vsock: cannot wait for streams: {e}");
                return;
            }
        };
        for event in events.iter().take(count) {
            let flags = event.flags;
            match event.data.u64() {
                LISTENER => self.accept(),
                CLOCK => self.tick(),
                token => self.stream_ready(Stream(token), flags),
            }
        }
        self.set_clock();
    }

    /// Whether the guest may be listened to: there is room for an answer.
    pub fn has_room(&self) -> bool {
        self.replies.len() < REPLIES_MAX
    }

    /// Takes a packet of the guest, and its data: `header.len` bytes.
    pub fn transmit(&mut self, header: &Header, payload: IoSlices<'_>) {
        let is_for_us = header.src_cid == self.guest_cid && header.dst_cid == HOST_CID;
        let has_payload = header.op == op::RW;
        if !is_for_us || header.kind != TYPE_STREAM || (header.len != 0 && !has_payload) {
            return self.refuse_malformed(header);
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let Some(&stream) = self.by_ports.get(&ports) else {
            match header.op {
                op::REQUEST => self.connect(header, ports),
                _ => self.reply(header),
            }
            self.set_clock();
            return;
        };
        let Some(slot) = self.slots.get_mut(&stream) else { return };
        let verdict = match &mut slot.entry {
            Entry::Connected(connection) => {
                let was_requested = connection.is_requested();
                let verdict = connection.take(header, payload);
                if was_requested && !connection.is_requested() {
                    slot.deadline = None;
                }
                verdict
            }
            _ if header.op == op::RST => Verdict::Forget,
            _ => Verdict::Abort,
        };
        if header.op == op::RW && verdict == Verdict::Keep {
            self.counters.tx_packets_count().inc();
            self.counters.tx_bytes_count().add(header.len.into());
        }
        self.carry_out(stream, verdict);
        self.set_clock();
    }

    /// Takes a packet that cannot be understood: its connection, if it names one, is over.
    pub fn refuse_malformed(&mut self, header: &Header) {
        self.counters.tx_malformed_packets().inc();
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let is_for_us = header.src_cid == self.guest_cid && header.dst_cid == HOST_CID;
        match self.by_ports.get(&ports) {
            Some(&stream) if is_for_us => self.carry_out(stream, Verdict::Abort),
            _ => self.reply(header),
        }
    }

    /// Whether something may be to be sent to the guest.
    pub fn has_outgoing(&self) -> bool {
        !self.replies.is_empty() || !self.queued.is_empty()
    }

    /// What is to be sent to the guest next. It must be sent.
    pub fn next_outgoing(&mut self) -> Option<Outgoing> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(Outgoing::Packet(reply));
        }
        while let Some(stream) = self.queued.pop_front() {
            let Some(slot) = self.slots.get_mut(&stream) else { continue };
            slot.is_queued = false;
            let Entry::Connected(connection) = &mut slot.entry else { continue };
            let Some(due) = connection.next() else { continue };
            // What it says now may end its patience, or begin it.
            let has_to_end = connection.is_waiting_for_the_end() && slot.deadline.is_none();
            slot.is_queued = true;
            self.queued.push_back(stream);
            if has_to_end {
                self.be_patient(stream);
                self.set_clock();
            }
            return Some(match due {
                Due::Packet(header) => Outgoing::Packet(header),
                Due::Data(limit) => Outgoing::Data { stream, limit },
            });
        }
        None
    }

    /// Receives from `stream` into `room`. Gives the header of what came; `None` if nothing did.
    pub fn receive(&mut self, stream: Stream, room: &mut IoSlices<'_>) -> Option<Header> {
        match &mut self.slots.get_mut(&stream)?.entry {
            Entry::Connected(connection) => connection.receive(room),
            _ => None,
        }
    }

    /// A stream of the host is ready for something, or is over.
    fn stream_ready(&mut self, stream: Stream, flags: EventFlags) {
        let is_gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        let is_readable = is_gone || flags.intersects(EventFlags::IN | EventFlags::RDHUP);
        let is_writable = is_gone || flags.contains(EventFlags::OUT);
        // Out of the table meanwhile, so that nothing is lost that is not put back.
        let Some(mut slot) = self.slots.remove(&stream) else { return };
        match &mut slot.entry {
            Entry::Greeting(socket) if is_readable => match self.greet(stream, socket) {
                // Whoever has left already is not announced.
                _ if is_gone => return,
                Greeted::NotYet => {}
                Greeted::Badly => return,
                Greeted::Wants(ports) => {
                    let Entry::Greeting(socket) = slot.entry else { return };
                    let basis = self.basis(ports, socket);
                    self.put(stream, Connection::request(basis));
                    return self.be_patient(stream);
                }
            },
            Entry::Greeting(_) | Entry::Waiting(_) => {}
            Entry::Lingering(socket) => {
                socket.note_ready(false, is_writable);
                if socket.flush().is_err() || socket.is_flushed() {
                    return self.note_removed(slot.window);
                }
            }
            Entry::Connected(connection) => {
                connection.host_ready(is_readable, is_writable, is_gone);
                // Whoever asked has left before the answer.
                let verdict = match is_gone && connection.is_requested() {
                    true => Verdict::Abort,
                    false => Verdict::Keep,
                };
                self.slots.insert(stream, slot);
                return self.carry_out(stream, verdict);
            }
        }
        self.slots.insert(stream, slot);
    }

    /// Does with a connection what is to become of it.
    fn carry_out(&mut self, stream: Stream, verdict: Verdict) {
        if verdict == Verdict::Keep {
            return self.enqueue(stream);
        }
        let Some(slot) = self.slots.remove(&stream) else { return };
        let (ports, is_known, lingering) = match slot.entry {
            Entry::Connected(connection) => {
                let (ports, is_known) = (connection.ports(), connection.is_known_to_guest());
                let may_linger = verdict != Verdict::Abort;
                (ports, is_known, connection.into_lingering().filter(|_| may_linger))
            }
            Entry::Waiting(request) => {
                (Ports { host: request.dst_port, guest: request.src_port }, true, None)
            }
            // Not a connection yet, or no more.
            Entry::Greeting(_) | Entry::Lingering(_) => return,
        };
        self.by_ports.remove(&ports);
        if verdict == Verdict::Abort {
            self.counters.conns_killed().inc();
        }
        if verdict != Verdict::Forget && is_known {
            self.push_reply(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: ports.host,
                dst_port: ports.guest,
                kind: TYPE_STREAM,
                op: op::RST,
                ..Header::default()
            });
        }
        match lingering {
            Some(socket) => {
                let entry = Entry::Lingering(socket);
                self.slots.insert(stream, Slot { window: slot.window, ..Slot::of(entry) });
            }
            None => self.note_removed(slot.window),
        }
    }

    /// Puts a connection into the table, whatever the stream was before.
    fn put(&mut self, stream: Stream, connection: Connection) {
        self.counters.conns_added().inc();
        let window = connection.window_size();
        self.windows = self.windows.saturating_add(window.into());
        self.by_ports.insert(connection.ports(), stream);
        let entry = Entry::Connected(Box::new(connection));
        self.slots.insert(stream, Slot { window, ..Slot::of(entry) });
        self.enqueue(stream);
    }

    /// A stream that had a connection is gone.
    fn note_removed(&mut self, window: u32) {
        self.windows = self.windows.saturating_sub(window.into());
        // Those that waited for the host's listener never were one.
        self.counters.conns_removed().add(u64::from(window != 0));
    }

    /// Notes that a stream may have something for the guest.
    fn enqueue(&mut self, stream: Stream) {
        if let Some(slot) = self.slots.get_mut(&stream)
            && !std::mem::replace(&mut slot.is_queued, true)
        {
            self.queued.push_back(stream);
            let slots = &self.slots;
            shorten(&mut self.queued, |stream| slots.contains_key(stream));
        }
    }

    /// Refuses a packet, unless it is a refusal itself.
    fn reply(&mut self, to: &Header) {
        if to.op != op::RST {
            self.push_reply(Header { dst_cid: self.guest_cid, ..to.refusal() });
        }
    }

    fn push_reply(&mut self, reply: Header) {
        // `has_room` bounds the answers to packets. The others are for connections that the guest was
        // told of, so it has taken packets for them, and replies go first: there are never so many.
        if self.replies.len() < REPLIES_MAX.saturating_add(STREAMS_MAX) {
            self.replies.push_back(reply);
        }
    }

    fn new_stream(&mut self) -> Stream {
        let token = self.next_token;
        self.next_token = token.wrapping_add(1);
        Stream(token)
    }

    /// Watches the descriptor of a stream from here on; false if the host cannot.
    fn watch(&self, stream: Stream, fd: impl AsFd) -> bool {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        let data = EventData::new_u64(stream.0);
        let watched = retry_on_intr(|| epoll::add(&self.epoll, &fd, data, flags));
        watched.inspect_err(|e| self.note_shortage("watch a stream", *e)).is_ok()
    }

    /// The host has no more of something. Said now and then, as it happens again at each attempt.
    fn note_shortage(&self, what: &str, e: Errno) {
        self.counters.conns_refused().inc();
        if self.counters.conns_refused().get().is_power_of_two() {
            log::warn!("vsock: cannot {what}: {e}");
        }
    }

    /// What a new connection needs.
    fn basis(&self, ports: Ports, socket: HostSocket) -> Basis {
        let is_large = self.windows.saturating_add(WINDOW_LARGE.into()) <= WINDOWS_BUDGET;
        let window = if is_large { WINDOW_LARGE } else { WINDOW_SMALL };
        Basis { guest_cid: self.guest_cid, ports, socket, window, counters: self.counters.clone() }
    }

    /// A port of the host for a connection to `guest` that no other connection has.
    fn free_port(&mut self, guest: u32) -> Option<u32> {
        (0..=STREAMS_MAX).find_map(|_| {
            let host = self.next_port;
            let next = host.wrapping_add(1);
            self.next_port = if next <= LAST_PORT { next } else { FIRST_PORT };
            (!self.by_ports.contains_key(&Ports { host, guest })).then_some(host)
        })
    }

    /// Gives a stream [`PATIENCE`] from now on.
    fn be_patient(&mut self, stream: Stream) {
        let Some(deadline) = Instant::now().checked_add(PATIENCE) else { return };
        if let Some(slot) = self.slots.get_mut(&stream) {
            slot.deadline = Some(deadline);
            self.deadlines.push_back((deadline, stream));
            let slots = &self.slots;
            shorten(&mut self.deadlines, |(at, stream)| {
                slots.get(stream).is_some_and(|slot| slot.deadline == Some(*at))
            });
        }
    }

    /// Time has passed.
    fn tick(&mut self) {
        self.clock.hush();
        let now = Instant::now();
        while let Some((deadline, stream)) = self.deadlines.pop_front_if(|(at, _)| *at <= now) {
            let slot = self.slots.get(&stream);
            if slot.is_some_and(|slot| slot.deadline == Some(deadline)) {
                self.carry_out(stream, Verdict::Abort);
            }
        }
        self.connect_waiting();
        if std::mem::take(&mut self.is_deaf) {
            let data = EventData::new_u64(LISTENER);
            let add = || epoll::add(&self.epoll, &self.listener, data, EventFlags::IN);
            let heard = retry_on_intr(add);
            self.is_deaf = heard.is_err();
        }
    }

    /// Sets the clock to the next time something is due. One that rings too early does no harm.
    fn set_clock(&mut self) {
        let is_retrying = self.is_deaf || !self.waiting.is_empty();
        let retry = is_retrying.then(|| Instant::now().checked_add(RETRY)).flatten();
        let first = self.deadlines.front().map(|(at, _)| *at);
        if let Some(next) = retry.or(first) {
            self.clock.set(next);
        }
    }
}

/// Takes what is no longer true out of a list that has become long. A stream has one true entry in each
/// at most, so this leaves half of it, and costs little over time. Without it a guest that asks for
/// connections and leaves before it is answered would make the list grow for ever.
fn shorten<T>(list: &mut VecDeque<T>, is_true: impl FnMut(&T) -> bool) {
    if list.len() > LIST_MAX {
        list.retain(is_true);
    }
}

impl Slot {
    fn of(entry: Entry) -> Self {
        Self { entry, window: 0, deadline: None, is_queued: false }
    }
}

impl AsRawFd for Muxer {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
