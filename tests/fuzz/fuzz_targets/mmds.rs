#![no_main]
//! The metadata service behind its TCP/IP: frames of a guest that knows sequence numbers, and of one that does not
//! care.

use std::time::{Duration, Instant};

use devices::fuzzing::Mmds;
use fuzz::bytes::Bytes;
use fuzz::devices::service;
use libfuzzer_sys::fuzz_target;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpAddress, Ipv4Address, Ipv4Packet, TcpPacket,
};

const STEPS_MAX: usize = 128;
const MAC: [u8; 6] = [6, 1, 0x23, 0x45, 0x67, 1];
const SERVICE: [u8; 4] = [169, 254, 169, 254];
const FIN: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// More than one call gives: replies are taken as there is room.
const FRAMES_MAX: usize = 4096;

const REQUESTS: [&[u8]; 6] = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /c/d HTTP/1.1\r\nAccept: application/json\r\n\r\n",
    b"GET /large HTTP/1.0\r\n\r\n",
    b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n",
    b"GET /c HTTP/1.1\r\nConnection: close\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
];

/// One connection, as the guest sees it.
#[derive(Clone, Copy, Default)]
struct Connection {
    next: u32,
    heard: u32,
}

struct Guest {
    connections: [Connection; 4],
    token: Vec<u8>,
}

fuzz_target!(init: fuzz::begin(), |input: &[u8]| {
    let mut input = Bytes::new(input);
    let mut now = Instant::now();
    let how = input.u8();
    let mtu = (how & 1 != 0).then(|| 68 + u16::from(input.u8()) * 8);
    let mut service = Mmds::new(service(), mtu, now);
    let mut guest = Guest { connections: [Connection::default(); 4], token: Vec::new() };
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        let how = input.u8();
        match how & 7 {
            0 => drop(service.receive(input.piece(), now)),
            1 => {
                now += Duration::from_millis(u64::from(input.u8()) * 100);
                service.tick(now);
            }
            2 => guest.hear(&mut service, now),
            3 => {
                let mut arp =
                    [&[0xff; 6][..], &[2, 0, 0, 0, 0, 7, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
                arp.extend([2, 0, 0, 0, 0, 7, 172, 16, 0, 2, 0, 0, 0, 0, 0, 0]);
                arp.extend(SERVICE);
                if how & 0x80 != 0 {
                    let at = usize::from(input.u8()) % arp.len();
                    arp[at] = input.u8();
                }
                service.receive(&arp, now);
            }
            _ => {
                let frame = guest.segment(&mut input, how);
                service.receive(&frame, now);
                if how & 0x80 == 0 {
                    guest.hear(&mut service, now);
                }
            }
        }
        service.assert_bounds();
    }
    guest.hear(&mut service, now);
    // Whoever is silent from now on is forgotten, and nothing is due any more.
    for _ in 0..600 {
        now += Duration::from_secs(1);
        if !service.tick(now) {
            return;
        }
        while service.next_frame(now).is_some() {}
    }
    panic!("something is due for ever");
});

impl Guest {
    /// A segment that fits, in all but what the input says.
    fn segment(&mut self, input: &mut Bytes<'_>, how: u8) -> Vec<u8> {
        let which = how >> 4 & 3;
        let connection = self.connections[usize::from(which)];
        let flags = match input.below(8) {
            0 => SYN,
            1 => ACK | FIN,
            2 => input.u8(),
            _ => ACK,
        };
        let payload = match input.below(10) {
            n @ 0..6 => REQUESTS[usize::from(n)].to_vec(),
            6 => {
                let get = b"GET /a HTTP/1.1\r\nX-metadata-token: ";
                [get, &self.token[..], b"\r\n\r\n"].concat()
            }
            7 => input.piece().to_vec(),
            _ => Vec::new(),
        };
        let payload = if flags & SYN != 0 { Vec::new() } else { payload };
        let off = if how & 8 == 0 { 0 } else { i32::from(input.u16().cast_signed()) };
        let seq = connection.next.wrapping_add_signed(off);
        let window = if input.below(8) == 7 { input.u16() } else { 0x4000 };
        if off == 0 {
            let extra = u32::from(flags & (SYN | FIN) != 0);
            let next = seq.wrapping_add(payload.len() as u32 + extra);
            self.connections[usize::from(which)].next = next;
        }
        let mut tcp = Vec::new();
        tcp.extend((1000 + u16::from(which)).to_be_bytes());
        tcp.extend(if input.below(16) == 15 { input.u16() } else { 80 }.to_be_bytes());
        tcp.extend(seq.to_be_bytes());
        tcp.extend(
            connection
                .heard
                .wrapping_add_signed(if input.below(8) == 7 { off } else { 0 })
                .to_be_bytes(),
        );
        let options = match input.below(8) {
            0 => input.take(12),
            1 => &[2, 4, 0, 64][..],
            _ => &[],
        };
        let words = 5 + options.len() / 4;
        tcp.extend([(words as u8) << 4, flags]);
        tcp.extend(window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(&options[..options.len() / 4 * 4]);
        tcp.extend(payload);
        let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 7, 8, 0, 0x45, 0]].concat();
        frame.extend(((20 + tcp.len()) as u16).to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 172, 16, 0, 2]);
        frame.extend(SERVICE);
        frame.extend(tcp);
        frame
    }

    /// Takes what the service has sent, of which every bit is right.
    fn hear(&mut self, service: &mut Mmds, now: Instant) {
        for n in 0.. {
            assert!(n < FRAMES_MAX, "frames without end");
            let Some(bytes) = service.next_frame(now) else { return };
            assert!(bytes.len() <= 1514, "a frame of {} bytes", bytes.len());
            let frame = EthernetFrame::new_checked(&bytes[..]).expect("it is a frame");
            assert_eq!(frame.src_addr().0, MAC);
            if frame.ethertype() != EthernetProtocol::Ipv4 {
                continue;
            }
            let ip = Ipv4Packet::new_checked(frame.payload()).expect("it is IPv4");
            assert!(ip.verify_checksum());
            let Ok(tcp) = TcpPacket::new_checked(ip.payload()) else { continue };
            let (from, to): (Ipv4Address, Ipv4Address) = (ip.src_addr(), ip.dst_addr());
            assert_eq!(from.octets(), SERVICE);
            assert!(tcp.verify_checksum(&IpAddress::Ipv4(from), &IpAddress::Ipv4(to)));
            let Some(at) = tcp.dst_port().checked_sub(1000).map(usize::from) else { continue };
            let Some(connection) = self.connections.get_mut(at) else { continue };
            let extra = u32::from(tcp.syn()) + u32::from(tcp.fin());
            let seq = tcp.seq_number().0.cast_unsigned();
            connection.heard = seq.wrapping_add(tcp.payload().len() as u32 + extra);
            let body = tcp.payload().windows(4).position(|four| four == b"\r\n\r\n");
            if let Some(at) = body {
                self.token = tcp.payload()[at + 4..].iter().copied().take(200).collect();
            }
        }
    }
}
