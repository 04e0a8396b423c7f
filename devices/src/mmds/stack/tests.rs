//! The service over a perfect wire, a bad one, and one with a hostile guest at its end. Time is made
//! here.
use std::net::Ipv4Addr;

use serde_json::{Value, json};
use smoltcp::wire::{ArpOperation, IpRepr, Ipv4Repr, TcpControl, TcpRepr, TcpSeqNumber, UdpPacket};

use self::guest_tcp::{GUEST_IP, GUEST_MAC, Guest};
use super::super::{DEFAULT_ADDRESS, Mmds};
use super::*;

#[path = "../../../tests/virtio/guest_tcp.rs"]
mod guest_tcp;

struct World {
    stack: Stack,
    guest: Guest,
    start: Instant,
    ms: u64,
    /// Each frame of which this is a divisor of the number is lost.
    lost: Option<u64>,
    frames: u64,
}

impl World {
    fn new(data: Value) -> Self {
        let mmds = Mmds::new(1 << 20);
        mmds.put(data).unwrap();
        let config = serde_json::from_value(json!({"network_interfaces": ["eth0"]})).unwrap();
        let service = Arc::new(Service::new(Arc::new(mmds), config).unwrap());
        let start = Instant::now();
        let stack = Stack::new(service, None, start);
        Self { stack, guest: Guest::new(), start, ms: 0, lost: None, frames: 0 }
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.ms)
    }

    fn is_lost(&mut self) -> bool {
        self.frames += 1;
        self.lost.is_some_and(|each| self.frames.is_multiple_of(each))
    }

    /// Moves frames until there are none.
    fn settle(&mut self) {
        let now = self.now();
        loop {
            self.guest.poll(self.ms.cast_signed());
            let mut is_quiet = true;
            while let Some(frame) = self.guest.wire.outbox.pop_front() {
                is_quiet = false;
                assert!(self.stack.is_for(&frame[..HEAD_BYTES.min(frame.len())]));
                if !self.is_lost() {
                    self.stack.receive(&frame, now);
                }
            }
            while let Some(frame) = self.stack.next_frame(now) {
                is_quiet = false;
                assert!(frame.len() <= 1514);
                if !self.is_lost() {
                    self.guest.wire.inbox.push_back(frame);
                }
            }
            if is_quiet {
                return;
            }
        }
    }

    /// Lets time go by, and what is due happen.
    fn pass(&mut self, ms: u64) {
        let end = self.ms + ms;
        while self.ms < end {
            let due = self.stack.deadline(self.now());
            let due = due.map_or(100, |due| u64::try_from(due.as_millis()).unwrap());
            self.ms = end.min(self.ms + due.clamp(1, 100));
            self.stack.tick(self.now());
            self.settle();
        }
    }

    fn connect(&mut self) -> SocketHandle {
        let handle = self.guest.connect(DEFAULT_ADDRESS);
        self.settle();
        handle
    }

    fn send(&mut self, connection: SocketHandle, bytes: &[u8]) {
        assert_eq!(self.guest.socket(connection).send_slice(bytes), Ok(bytes.len()));
        self.settle();
    }

    /// What one request brings: the reply's body.
    fn get(&mut self, connection: SocketHandle, path: &str) -> String {
        self.send(connection, format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes());
        body(&self.guest.read(connection))
    }

    fn counters(&self) -> &super::super::Counters {
        self.stack.service.counters()
    }

    fn assert_bounds(&self) {
        self.stack.assert_bounds();
    }
}

fn body(reply: &[u8]) -> String {
    let text = std::str::from_utf8(reply).unwrap();
    let (_, body) = text.split_once("\r\n\r\n").ok_or(text).unwrap();
    body.to_owned()
}

/// A frame of the guest with a packet of `protocol` to `address`.
fn ip_frame(address: Ipv4Addr, next_header: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let ip = Ipv4Repr {
        src_addr: GUEST_IP,
        dst_addr: address,
        next_header,
        payload_len: payload.len(),
        hop_limit: 64,
    };
    let mut bytes = vec![0; ETHERNET_BYTES + ip.buffer_len()];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
    let (src_addr, dst_addr) = (EthernetAddress(GUEST_MAC), MAC);
    EthernetRepr { src_addr, dst_addr, ethertype: EthernetProtocol::Ipv4 }.emit(&mut frame);
    let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
    ip.emit(&mut packet, &ChecksumCapabilities::ignored());
    bytes.extend_from_slice(payload);
    bytes
}

/// A frame with a TCP segment, without a checksum, of any size.
fn tcp_frame(
    ports: (u16, u16),
    seq: i32,
    ack: Option<i32>,
    control: TcpControl,
    payload: &[u8],
) -> Vec<u8> {
    let tcp = TcpRepr {
        src_port: ports.0,
        dst_port: ports.1,
        control,
        seq_number: TcpSeqNumber(seq),
        ack_number: ack.map(TcpSeqNumber),
        window_len: 60000,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let mut bytes = vec![0; tcp.buffer_len()];
    let (from, to) = (GUEST_IP.into(), DEFAULT_ADDRESS.into());
    let mut packet = TcpPacket::new_unchecked(&mut bytes[..]);
    tcp.emit(&mut packet, &from, &to, &ChecksumCapabilities::ignored());
    ip_frame(DEFAULT_ADDRESS, IpProtocol::Tcp, &bytes)
}

/// The segment in a frame of the service, and its payload.
fn segment(frame: &[u8]) -> (TcpControl, i32, Option<i32>, Vec<u8>) {
    let frame = EthernetFrame::new_checked(frame).unwrap();
    let (src, dst, ethertype) = (frame.src_addr(), frame.dst_addr(), frame.ethertype());
    assert_eq!((src, dst, ethertype), (MAC, EthernetAddress(GUEST_MAC), EthernetProtocol::Ipv4));
    let verified = ChecksumCapabilities::default();
    let ip = Ipv4Packet::new_checked(frame.payload()).unwrap();
    let repr = IpRepr::Ipv4(Ipv4Repr::parse(&ip, &verified).unwrap());
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    let tcp = TcpRepr::parse(&tcp, &repr.src_addr(), &repr.dst_addr(), &verified).unwrap();
    (tcp.control, tcp.seq_number.0, tcp.ack_number.map(|n| n.0), tcp.payload.to_vec())
}

#[test]
fn answers_who_has_its_address() {
    let mut world = World::new(json!({}));
    let ask = |target: Ipv4Addr, operation| {
        let arp = ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr: EthernetAddress(GUEST_MAC),
            source_protocol_addr: GUEST_IP,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target,
        };
        let mut bytes = vec![0; HEAD_BYTES];
        let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
        let (src_addr, dst_addr) = (EthernetAddress(GUEST_MAC), EthernetAddress::BROADCAST);
        EthernetRepr { src_addr, dst_addr, ethertype: EthernetProtocol::Arp }.emit(&mut frame);
        arp.emit(&mut ArpPacket::new_unchecked(frame.payload_mut()));
        bytes
    };
    let now = world.now();
    assert!(!world.stack.is_for(&ask(GUEST_IP, ArpOperation::Request)));
    let request = ask(DEFAULT_ADDRESS, ArpOperation::Request);
    assert!(world.stack.is_for(&request));
    // However often it is asked, one answer waits.
    world.stack.receive(&request, now);
    world.stack.receive(&request, now);
    let reply = world.stack.next_frame(now).unwrap();
    assert!(world.stack.next_frame(now).is_none());
    let frame = EthernetFrame::new_checked(&reply[..]).unwrap();
    assert_eq!((frame.src_addr().0, frame.dst_addr().0), ([6, 1, 0x23, 0x45, 0x67, 1], GUEST_MAC));
    let arp = ArpRepr::parse(&ArpPacket::new_checked(frame.payload()).unwrap()).unwrap();
    let expected = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress([6, 1, 0x23, 0x45, 0x67, 1]),
        source_protocol_addr: DEFAULT_ADDRESS,
        target_hardware_addr: EthernetAddress(GUEST_MAC),
        target_protocol_addr: GUEST_IP,
    };
    assert_eq!(arp, expected);
    // Replies of others are taken and not answered.
    world.stack.receive(&ask(DEFAULT_ADDRESS, ArpOperation::Reply), now);
    assert!(!world.stack.has_frame());
    assert_eq!(world.counters().rx_accepted_unusual().get(), 1);
}

#[test]
fn knows_its_frames_by_their_heads() {
    let world = World::new(json!({}));
    let ours = tcp_frame((1, 80), 0, None, TcpControl::Syn, b"");
    assert!(world.stack.is_for(&ours[..HEAD_BYTES]));
    assert!(!world.stack.is_for(&ours[..33]));
    assert!(!world.stack.is_for(&[]));
    let other = ip_frame(Ipv4Addr::new(169, 254, 169, 253), IpProtocol::Tcp, &[0; 20]);
    assert!(!world.stack.is_for(&other));
    let mut ipv6 = ours;
    ipv6[12..14].copy_from_slice(&[0x86, 0xdd]);
    assert!(!world.stack.is_for(&ipv6));
}

#[test]
fn one_connection_serves_many_requests() {
    let mut world = World::new(json!({"name": {"first": "John", "last": "Doe"}}));
    let connection = world.connect();
    assert_eq!(world.get(connection, "/name"), "first\nlast");
    assert_eq!(world.get(connection, "/name/first"), "John");
    // Two and a half at once.
    let get = "GET /name/last HTTP/1.1\r\n\r\n";
    world.send(connection, format!("{get}{get}GET /na").as_bytes());
    let replies = String::from_utf8(world.guest.read(connection)).unwrap();
    assert_eq!(replies.matches("\r\n\r\nDoe").count(), 2, "{replies}");
    world.send(connection, b"me HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert_eq!(body(&world.guest.read(connection)), "first\nlast");
    assert_eq!(world.guest.socket(connection).state(), State::CloseWait);
    world.guest.socket(connection).close();
    world.pass(11_000);
    assert!(world.stack.connections.is_empty());
    assert_eq!(world.stack.deadline(world.now()), None);
    let counters = world.counters();
    let (made, gone) = (counters.connections_created(), counters.connections_destroyed());
    assert_eq!((made.get(), gone.get()), (1, 1));
}

#[test]
fn closes_when_the_guest_does() {
    let mut world = World::new(json!({"a": "b"}));
    let connection = world.connect();
    // With the request, before the reply.
    let get = b"GET /a HTTP/1.1\r\n\r\n";
    world.guest.socket(connection).send_slice(get).unwrap();
    world.guest.socket(connection).close();
    world.settle();
    assert_eq!(body(&world.guest.read(connection)), "b");
    // The last segment is acknowledged when nothing else is to be said.
    world.pass(100);
    assert!(world.stack.connections.is_empty());
}

#[test]
fn large_values_come_whole_over_a_wire_that_loses_frames() {
    let text: String = (0..200_000u32)
        .map(|i| char::from(b'a' + u8::try_from(i % 1999 * (i % 2003) % 26).unwrap()))
        .collect();
    for lost in [None, Some(13), Some(7)] {
        let mut world = World::new(json!({"large": text}));
        let connection = world.connect();
        world.lost = lost;
        world.send(connection, b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n");
        let mut reply = Vec::new();
        for _ in 0..20_000 {
            reply.extend(world.guest.read(connection));
            if world.guest.socket(connection).state() == State::CloseWait {
                break;
            }
            world.pass(50);
            world.assert_bounds();
        }
        assert!(body(&reply) == text, "{lost:?} {}", reply.len());
    }
}

#[test]
fn takes_segments_larger_than_any_packet() {
    let mut world = World::new(json!({"a": "b"}));
    let now = world.now();
    world.stack.receive(&tcp_frame((1000, 80), 100, None, TcpControl::Syn, b""), now);
    let (control, seq, ack, _) = segment(&world.stack.next_frame(now).unwrap());
    assert_eq!((control, ack), (TcpControl::Syn, Some(101)));
    let request = format!("GET /a HTTP/1.1\r\nX-Long: {}\r\n\r\n", "x".repeat(2200));
    let seq = seq.wrapping_add(1);
    let frame = tcp_frame((1000, 80), 101, Some(seq), TcpControl::Psh, request.as_bytes());
    assert!(frame.len() > 2200);
    world.stack.receive(&frame, now);
    let (_, _, _, payload) = segment(&world.stack.next_frame(now).unwrap());
    assert_eq!(body(&payload), "b");
    // Longer than the window: its beginning is taken, and the rest is for later.
    let frame = tcp_frame((1000, 80), 101, Some(seq), TcpControl::Psh, &[b'x'; 60_000]);
    world.stack.receive(&frame, now);
    world.assert_bounds();
}

#[test]
fn a_request_without_end_ends_its_connection() {
    let mut world = World::new(json!({"a": "b"}));
    let connection = world.connect();
    world.send(connection, &[b'G'; 3000]);
    assert_eq!(world.guest.socket(connection).state(), State::Closed);
    assert!(world.stack.connections.is_empty());
    let connection = world.connect();
    assert_eq!(world.get(connection, "/a"), "b");
}

#[test]
fn there_is_room_for_thirty_and_for_who_comes_when_others_are_silent() {
    let mut world = World::new(json!({"a": "b"}));
    let first: Vec<_> = (0..CONNECTIONS_MAX).map(|_| world.connect()).collect();
    for &connection in &first {
        assert_eq!(world.get(connection, "/a"), "b");
    }
    let late = world.connect();
    assert_eq!(world.guest.socket(late).state(), State::Closed);
    world.pass(9_000);
    for &connection in &first[1..] {
        assert_eq!(world.get(connection, "/a"), "b");
    }
    world.pass(2_000);
    let late = world.connect();
    assert_eq!(world.get(late, "/a"), "b");
    // The silent one went.
    world.send(first[0], b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(world.guest.socket(first[0]).state(), State::Closed);
    assert_eq!(world.get(first[1], "/a"), "b");
    assert_eq!(world.counters().connections_destroyed().get(), 1);
}

#[test]
fn half_open_connections_give_way_and_are_given_up() {
    let mut world = World::new(json!({"a": "b"}));
    let honest = world.connect();
    let now = world.now();
    for n in 0..50_000u32 {
        let port = 1 + u16::try_from(n % 40_000).unwrap();
        world.stack.receive(&tcp_frame((port, 80), 0, None, TcpControl::Syn, b""), now);
        world.assert_bounds();
    }
    // Frames that nobody takes: there are no more of them, and no connections either.
    assert!(world.counters().rx_accepted_err().get() > 49_000);
    while world.stack.next_frame(now).is_some() {}
    for port in 1..40_000 {
        world.stack.receive(&tcp_frame((port, 80), 0, None, TcpControl::Syn, b""), now);
        while world.stack.next_frame(now).is_some() {}
        world.assert_bounds();
    }
    // Those that were established are as they were, and new ones find room.
    assert_eq!(world.get(honest, "/a"), "b");
    let late = world.connect();
    assert_eq!(world.get(late, "/a"), "b");
    assert_eq!(world.stack.connections.len(), CONNECTIONS_MAX);
    world.pass(30_000);
    assert_eq!(world.stack.connections.len(), 2);
    assert_eq!(world.get(honest, "/a"), "b");
}

#[test]
fn a_guest_that_takes_no_frames_gets_no_more_of_them() {
    let mut world = World::new(json!({"large": "x".repeat(500_000)}));
    let connections: Vec<_> = (0..CONNECTIONS_MAX).map(|_| world.connect()).collect();
    let now = world.now();
    for &connection in &connections {
        let get = b"GET /large HTTP/1.1\r\n\r\n";
        world.guest.socket(connection).send_slice(get).unwrap();
        world.guest.poll(0);
        while let Some(frame) = world.guest.wire.outbox.pop_front() {
            world.stack.receive(&frame, now);
        }
        world.assert_bounds();
    }
    // Nor does the service wake up for what it cannot send.
    assert_eq!(world.stack.deadline(now), None);
    world.settle();
    assert!(world.stack.deadline(now).is_none_or(|due| !due.is_zero()));
}

#[test]
fn what_is_not_for_port_80_is_refused_and_what_is_no_tcp_is_dropped() {
    let mut world = World::new(json!({}));
    let now = world.now();
    world.stack.receive(&tcp_frame((1000, 81), 100, None, TcpControl::Syn, b""), now);
    let (control, _, ack, _) = segment(&world.stack.next_frame(now).unwrap());
    assert_eq!((control, ack), (TcpControl::Rst, Some(101)));
    // Of no connection.
    world.stack.receive(&tcp_frame((1000, 80), 100, Some(7), TcpControl::None, b"x"), now);
    let (control, seq, ..) = segment(&world.stack.next_frame(now).unwrap());
    assert_eq!((control, seq), (TcpControl::Rst, 7));
    let mut fragment = tcp_frame((1000, 80), 0, None, TcpControl::Syn, b"");
    fragment[20] = 0x20;
    let mut multicast = tcp_frame((1000, 80), 0, None, TcpControl::Syn, b"");
    multicast[6] |= 1;
    let mut udp = [0; 16];
    UdpPacket::new_unchecked(&mut udp[..]).set_len(16);
    let frames = [
        fragment,
        ip_frame(DEFAULT_ADDRESS, IpProtocol::Udp, &udp),
        ip_frame(DEFAULT_ADDRESS, IpProtocol::Icmp, &[8, 0, 0, 0, 0, 0, 0, 0]),
        multicast,
        ip_frame(DEFAULT_ADDRESS, IpProtocol::Tcp, &[0; 19]),
    ];
    for frame in frames {
        assert!(world.stack.is_for(&frame));
        world.stack.receive(&frame, now);
        assert!(!world.stack.has_frame());
    }
    let counters = world.counters();
    assert_eq!(counters.rx_accepted_unusual().get(), 3);
    assert_eq!(counters.rx_bad_eth().get(), 1);
    assert_eq!(counters.rx_accepted_err().get(), 2);
    assert_eq!((counters.rx_accepted().get(), counters.rx_count().get()), (7, 2));
    assert!(world.stack.connections.is_empty());
}

/// A generator with a seed (SplitMix64), so that what fails once fails again.
struct Dice(u64);

impl Dice {
    fn pick<T: TryFrom<usize, Error: std::fmt::Debug>>(&mut self, sides: usize) -> T {
        self.roll(sides).try_into().unwrap()
    }

    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) >> 1).unwrap() % sides
    }
}

#[test]
fn survives_whatever_a_guest_sends() {
    let mut world = World::new(json!({"a": "b"}));
    let mut dice = Dice(1);
    let controls =
        [TcpControl::None, TcpControl::Psh, TcpControl::Syn, TcpControl::Fin, TcpControl::Rst];
    // Where the service's segments were last, so that some of the guest's are in place.
    let mut at = (0, 0);
    for n in 0..60_000 {
        let ports = (1 + dice.pick::<u16>(40), if dice.roll(20) == 0 { 81 } else { 80 });
        let payload = vec![b"GET / HTTP/1.1\r\n\n"[dice.roll(17)]; dice.roll(4) * dice.roll(900)];
        let ack = (dice.roll(3) != 0).then(|| at.0 + dice.pick::<i32>(3));
        let seq = at.1 + dice.pick::<i32>(3);
        let mut frame = tcp_frame(ports, seq, ack, controls[dice.roll(5)], &payload);
        for _ in 0..dice.roll(4) {
            let place = dice.roll(frame.len().min(80));
            frame[place] = dice.pick(256);
        }
        if dice.roll(10) == 0 {
            frame.truncate(14 + dice.roll(frame.len() - 13));
        }
        world.stack.receive(&frame, world.now());
        while dice.roll(3) != 0
            && let Some(frame) = world.stack.next_frame(world.now())
        {
            let ip = Ipv4Packet::new_checked(&frame[14..]);
            let tcp = ip.as_ref().ok().and_then(|ip| TcpPacket::new_checked(ip.payload()).ok());
            at = tcp.map_or(at, |tcp| {
                (tcp.seq_number().0.wrapping_add(1) & 0xfff_ffff, tcp.ack_number().0 & 0xfff_ffff)
            });
        }
        if n % 100 == 0 {
            world.ms += dice.pick::<u64>(500);
            world.stack.tick(world.now());
        }
        world.assert_bounds();
    }
    while world.stack.next_frame(world.now()).is_some() {}
    world.pass(60_000);
    let connection = world.connect();
    assert_eq!(world.get(connection, "/a"), "b");
}
