//! Frames of one interface to TCP connections and back. TCP is smoltcp's, without Ethernet: what is
//! for the service is told by its address alone, and goes back to where the last frame came from,
//! as in Firecracker, so that there is no neighbour to be looked for.
//!
//! ```text
//!  receive(frame) ──► ARP: a reply
//!                 └─► TCP ──smoltcp──► Connection: request ──http──► reply ──┐
//!  next_frame() ◄── at most OUTGOING_MAX frames ◄───────────────smoltcp──────┘
//! ```
//!
//! The guest is hostile. There are CONNECTIONS_MAX connections at most, each with buffers of a fixed
//! size and one reply; there is no listening socket between connections. A guest that does not take
//! frames gets no more of them, and its own are dropped.
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{self, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, HardwareAddress, IpCidr, IpEndpoint, IpProtocol, Ipv4Packet, TcpPacket,
};

use super::{Service, http};

/// Bytes of a frame that tell whether it is for the service: up to the end of an ARP packet.
pub(crate) const HEAD_BYTES: usize = 42;

/// The service's hardware address: Firecracker's.
const MAC: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);
const PORT: u16 = 80;
/// Firecracker's limit on connections.
const CONNECTIONS_MAX: usize = 30;
/// Firecracker's limit on a request, and with it the receive window.
const REQUEST_MAX: usize = 2500;
/// The send buffer: some segments, so that a reply does not wait for each to be acknowledged.
const SEND_BUFFER_BYTES: usize = 8 << 10;
/// Frames made and not yet taken by the guest.
const OUTGOING_MAX: usize = 16;
/// How long a peer may leave segments unacknowledged, and how long a connection without a segment is
/// left alone when there is no room for another.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest IP packet made.
const MTU: usize = 1500;
const ETHERNET_BYTES: usize = 14;

/// The service on one interface.
#[derive(Debug)]
pub(crate) struct Stack {
    service: Arc<Service>,
    sockets: SocketSet<'static>,
    interface: Opaque<Interface>,
    connections: Vec<Connection>,
    wire: Wire,
    /// Where frames go: where the last one came from.
    guest: EthernetAddress,
    arp_reply: Option<ArpRepr>,
    epoch: Instant,
}

/// smoltcp's interface has nothing to show.
struct Opaque<T>(T);

impl<T> std::fmt::Debug for Opaque<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("..")
    }
}

impl Stack {
    /// No connections yet. `mtu` is that of the interface, if it is known.
    pub(crate) fn new(service: Arc<Service>, mtu: Option<u16>, now: Instant) -> Self {
        let mut seed = [0; 8];
        // Sequence numbers are guessed by the guest only, which sees them anyway. What a fuzzer finds must happen again.
        if !cfg!(fuzzing) {
            let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::NONBLOCK);
        }
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_ne_bytes(seed);
        let mtu = mtu.map_or(MTU, |mtu| MTU.min(mtu.into()));
        let mut wire = Wire { mtu, incoming: None, outgoing: VecDeque::new() };
        let mut interface = Interface::new(config, &mut wire, StackInstant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // Everybody is a neighbour; there is room for two addresses.
            let _ = addresses.push(IpCidr::new(service.config.address().into(), 0));
        });
        Self {
            service,
            sockets: SocketSet::new(Vec::new()),
            interface: Opaque(interface),
            connections: Vec::new(),
            wire,
            guest: MAC,
            arp_reply: None,
            epoch: now,
        }
    }

    /// Whether a frame that begins with `head` is for the service: ARP or IPv4 for its address,
    /// whatever the hardware address. [`HEAD_BYTES`] of it are enough.
    pub(crate) fn is_for(&self, head: &[u8]) -> bool {
        let address = self.service.config.address().octets();
        let Ok(frame) = EthernetFrame::new_checked(head) else { return false };
        match frame.ethertype() {
            EthernetProtocol::Arp => ArpPacket::new_checked(frame.payload())
                .is_ok_and(|arp| arp.target_protocol_addr() == address),
            EthernetProtocol::Ipv4 => frame.payload().get(16..20) == Some(&address),
            _ => false,
        }
    }

    /// Takes a frame that [`Self::is_for`] the service from the guest. It may be larger than any
    /// network takes, and without checksums: nothing lies between the guest and here.
    pub(crate) fn receive(&mut self, frame: &[u8], now: Instant) {
        let service = self.service.clone();
        let counters = service.counters();
        counters.rx_accepted().inc();
        let frame = EthernetFrame::new_checked(frame);
        let Some(frame) = frame.ok().filter(|frame| frame.src_addr().is_unicast()) else {
            return counters.rx_bad_eth().inc();
        };
        match frame.ethertype() {
            EthernetProtocol::Arp => self.receive_arp(&frame),
            _ => self.receive_ip(&frame, now),
        }
    }

    fn receive_arp(&mut self, frame: &EthernetFrame<&[u8]>) {
        let arp = ArpPacket::new_checked(frame.payload()).and_then(|arp| ArpRepr::parse(&arp));
        let Ok(ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            ..
        }) = arp
        else {
            return self.service.counters().rx_accepted_unusual().inc();
        };
        self.guest = frame.src_addr();
        self.arp_reply = Some(ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: MAC,
            source_protocol_addr: self.service.config.address(),
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        });
    }

    fn receive_ip(&mut self, frame: &EthernetFrame<&[u8]>, now: Instant) {
        let service = self.service.clone();
        let counters = service.counters();
        let Ok(ip) = Ipv4Packet::new_checked(frame.payload()) else {
            return counters.rx_accepted_err().inc();
        };
        // Of a fragment smoltcp, built without reassembly, would take the payload for a segment.
        let is_fragment = ip.more_frags() || ip.frag_offset() != 0;
        if is_fragment || ip.next_header() != IpProtocol::Tcp {
            return counters.rx_accepted_unusual().inc();
        }
        let Ok(segment) = TcpPacket::new_checked(ip.payload()) else {
            return counters.rx_accepted_err().inc();
        };
        if self.wire.is_full() {
            return counters.rx_accepted_err().inc();
        }
        self.guest = frame.src_addr();
        let remote = IpEndpoint::new(ip.src_addr().into(), segment.src_port());
        let known = match segment.dst_port() == PORT {
            true if segment.syn() && !segment.ack() => self.listen_for(remote, now),
            true => self.find(remote),
            false => {
                // Refused by smoltcp.
                counters.rx_accepted_err().inc();
                None
            }
        };
        counters.rx_count().inc();
        self.wire.incoming = Some(frame.payload().to_vec());
        let at = self.at(now);
        let Opaque(interface) = &mut self.interface;
        interface.poll_ingress_single(at, &mut self.wire, &mut self.sockets);
        self.wire.incoming = None;
        if let Some(handle) = known {
            self.hear(handle, now);
        }
        self.go_on(now);
    }

    /// Makes room for a connection from `remote` and waits for its first segment, unless it is there
    /// already or there is no room: then smoltcp answers as it does to a stranger.
    fn listen_for(&mut self, remote: IpEndpoint, now: Instant) -> Option<SocketHandle> {
        if let Some(handle) = self.find(remote) {
            if self.sockets.get::<tcp::Socket<'_>>(handle).state() != State::TimeWait {
                return Some(handle);
            }
            self.remove(handle);
        }
        if self.connections.len() >= CONNECTIONS_MAX {
            let victim = self.victim(now)?;
            self.remove(victim);
        }
        let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
        let mut socket = tcp::Socket::new(buffer(REQUEST_MAX), buffer(SEND_BUFFER_BYTES));
        socket.set_nagle_enabled(false);
        socket.listen(PORT).ok()?;
        let handle = self.sockets.add(socket);
        self.connections.push(Connection::new(handle, now));
        Some(handle)
    }

    fn find(&self, remote: IpEndpoint) -> Option<SocketHandle> {
        let is_it = |handle: &SocketHandle| {
            self.sockets.get::<tcp::Socket<'_>>(*handle).remote_endpoint() == Some(remote)
        };
        self.connections.iter().map(|connection| connection.handle).find(is_it)
    }

    /// The connection that is worth least, if one may go: one that is over, one that was never
    /// established, one that has been silent; of several the one that has been so for longest.
    fn victim(&self, now: Instant) -> Option<SocketHandle> {
        let worth = |connection: &Connection| {
            let state = self.sockets.get::<tcp::Socket<'_>>(connection.handle).state();
            let is_idle = now.saturating_duration_since(connection.heard) >= PATIENCE;
            match state {
                State::Closed | State::TimeWait | State::FinWait2 => Some(0),
                State::Listen | State::SynReceived => Some(1),
                _ if is_idle => Some(2),
                _ => None,
            }
        };
        let candidates = self.connections.iter().filter_map(|c| Some((worth(c)?, c.heard, c)));
        candidates.min_by_key(|(worth, heard, _)| (*worth, *heard)).map(|(.., c)| c.handle)
    }

    fn hear(&mut self, handle: SocketHandle, now: Instant) {
        let state = self.sockets.get::<tcp::Socket<'_>>(handle).state();
        let Some(connection) = self.connections.iter_mut().find(|c| c.handle == handle) else {
            return;
        };
        connection.heard = now;
        match state {
            // Its first segment was none that begins a connection.
            State::Listen => self.remove(handle),
            _ if !connection.is_created => {
                connection.is_created = true;
                self.service.counters().connections_created().inc();
            }
            _ => {}
        }
    }

    fn remove(&mut self, handle: SocketHandle) {
        let Some(at) = self.connections.iter().position(|c| c.handle == handle) else { return };
        self.sockets.remove(handle);
        if self.connections.swap_remove(at).is_created {
            self.service.counters().connections_destroyed().inc();
        }
    }

    /// Lets connections go on, makes frames while there is room for them, and forgets what is over.
    fn go_on(&mut self, now: Instant) {
        for connection in &mut self.connections {
            let socket = self.sockets.get_mut(connection.handle);
            connection.converse(socket, &self.service, now);
        }
        let at = self.at(now);
        let Opaque(interface) = &mut self.interface;
        // As long as it changes something: what is acknowledged makes room for more.
        while interface.poll_egress(at, &mut self.wire, &mut self.sockets)
            == smoltcp::iface::PollResult::SocketStateChanged
        {
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut(connection.handle);
                connection.converse(socket, &self.service, now);
            }
        }
        for connection in &self.connections {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(connection.handle);
            // smoltcp's is for silence, of whatever kind.
            let is_at_rest = socket.state() == State::Established && socket.send_queue() == 0;
            socket.set_timeout((!is_at_rest).then(|| PATIENCE.into()));
        }
        let is_over = |c: &&Connection| {
            self.sockets.get::<tcp::Socket<'_>>(c.handle).state() == State::Closed
        };
        let over: Vec<_> = self.connections.iter().filter(is_over).map(|c| c.handle).collect();
        over.into_iter().for_each(|handle| self.remove(handle));
    }

    /// The next frame for the guest, without a virtio-net header.
    pub(crate) fn next_frame(&mut self, now: Instant) -> Option<Vec<u8>> {
        let frame = match self.arp_reply.take() {
            Some(arp) => self.frame(EthernetProtocol::Arp, arp.buffer_len(), |payload| {
                arp.emit(&mut ArpPacket::new_unchecked(payload));
            }),
            None => {
                let packet = match self.wire.outgoing.pop_front() {
                    // Somebody may have waited for room.
                    Some(packet) if self.wire.outgoing.len() >= OUTGOING_MAX.saturating_sub(1) => {
                        self.go_on(now);
                        packet
                    }
                    Some(packet) => packet,
                    None => return None,
                };
                self.frame(EthernetProtocol::Ipv4, packet.len(), |payload| {
                    payload.iter_mut().zip(&packet).for_each(|(to, from)| *to = *from);
                })
            }
        };
        self.service.counters().tx_count().inc();
        Some(frame)
    }

    /// Whether [`Self::next_frame`] has one.
    pub(crate) fn has_frame(&self) -> bool {
        self.arp_reply.is_some() || !self.wire.outgoing.is_empty()
    }

    /// Counts a frame that the driver got, or that did not fit its buffers.
    pub(crate) fn note_sent(&self, bytes: usize, is_delivered: bool) {
        let counters = self.service.counters();
        if is_delivered {
            counters.tx_frames().inc();
            counters.tx_bytes().add(bytes as u64);
        } else {
            counters.tx_errors().inc();
        }
    }

    /// When [`Self::tick`] is due, if nothing comes before. Nothing is while the guest has frames to
    /// take: taking them lets things go on.
    pub(crate) fn deadline(&mut self, now: Instant) -> Option<Duration> {
        if self.wire.is_full() || self.connections.is_empty() {
            return None;
        }
        let at = self.at(now);
        let delay = self.interface.0.poll_delay(at, &self.sockets)?;
        Some(Duration::from_micros(delay.total_micros()))
    }

    /// Does what is due: sends again what was not acknowledged, gives up on peers.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.go_on(now);
    }

    fn frame(
        &self,
        ethertype: EthernetProtocol,
        len: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Vec<u8> {
        let mut bytes = vec![0; ETHERNET_BYTES.saturating_add(len)];
        let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
        EthernetRepr { src_addr: MAC, dst_addr: self.guest, ethertype }.emit(&mut frame);
        fill(frame.payload_mut());
        bytes
    }

    /// What the guest may make the host keep.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn assert_bounds(&self) {
        assert!(self.connections.len() <= CONNECTIONS_MAX);
        assert!(self.wire.outgoing.len() <= OUTGOING_MAX.saturating_add(1));
        assert!(self.connections.iter().all(|c| c.request.len() <= REQUEST_MAX));
    }

    fn at(&self, now: Instant) -> StackInstant {
        let since = now.saturating_duration_since(self.epoch);
        StackInstant::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }
}

/// What is said over one connection.
#[derive(Debug)]
struct Connection {
    handle: SocketHandle,
    /// What came of a request.
    request: Vec<u8>,
    /// What is left to send of a reply.
    reply: VecDeque<u8>,
    /// Whether the connection ends with the reply.
    is_last: bool,
    /// Whether it was counted.
    is_created: bool,
    /// When the last segment came.
    heard: Instant,
}

impl Connection {
    fn new(handle: SocketHandle, now: Instant) -> Self {
        Self {
            handle,
            request: Vec::new(),
            reply: VecDeque::new(),
            is_last: false,
            is_created: false,
            heard: now,
        }
    }

    /// Sends what is left of a reply, then answers the next request: one at a time, so that a
    /// client that sends many has to take the replies.
    fn converse(&mut self, socket: &mut tcp::Socket<'_>, service: &Service, now: Instant) {
        loop {
            if !self.send(socket) || self.is_last {
                return;
            }
            let room = REQUEST_MAX.saturating_sub(self.request.len());
            let _ = socket.recv(|bytes| {
                let taken = bytes.get(..room.min(bytes.len())).unwrap_or_default();
                self.request.extend_from_slice(taken);
                (taken.len(), ())
            });
            if self.request.is_empty() {
                break;
            }
            let Some(answered) = http::answer(service, &self.request, now) else {
                if self.request.len() >= REQUEST_MAX {
                    // As Firecracker: a hard bound.
                    socket.abort();
                    return;
                }
                if socket.can_recv() {
                    continue;
                }
                break;
            };
            self.request.drain(..answered.used.min(self.request.len()));
            self.reply = answered.reply.into();
            self.is_last = answered.is_last;
        }
        if socket.state() == State::CloseWait {
            socket.close();
        }
    }

    /// Whether the reply is out, as far as this side is concerned.
    fn send(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        while !self.reply.is_empty() {
            let (next, _) = self.reply.as_slices();
            match socket.send_slice(next) {
                Ok(0) => return false,
                Ok(sent) => drop(self.reply.drain(..sent)),
                // The peer has gone.
                Err(_) => self.reply.clear(),
            }
        }
        if self.is_last {
            socket.close();
        }
        true
    }
}

/// The wire as smoltcp sees it: IP packets.
#[derive(Debug)]
struct Wire {
    mtu: usize,
    incoming: Option<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
}

impl Wire {
    fn is_full(&self) -> bool {
        self.outgoing.len() >= OUTGOING_MAX
    }
}

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Incoming, Outgoing<'_>)> {
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Outgoing<'_>> {
        (!self.is_full()).then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut checksum = ChecksumCapabilities::default();
        // A guest may leave checksums to its device; nothing gets lost on the way from there.
        checksum.ipv4 = Checksum::Tx;
        checksum.tcp = Checksum::Tx;
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.checksum = checksum;
        capabilities
    }
}

#[derive(Debug)]
struct Incoming(Vec<u8>);

impl phy::RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

#[derive(Debug)]
struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}

#[cfg(test)]
mod tests;
