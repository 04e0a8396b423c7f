//! Answers ARP requests and pings for `ip=` (default 172.16.0.2) until `echoes=` of them (default 1) have been answered,
//! or `timeout_ms=` (60000) is over, which is a failure. `announce=N` sends N gratuitous ARPs first. `nth=0` device.
#![no_std]
#![no_main]

use rt::virtio::{self, Buffer, Device, Queue};
use rt::{BootInfo, Failure, Outcome, clock, ensure, fail, memory, options, println};

rt::entry!(run);

const F_MAC: u64 = 1 << 5;
const F_MRG_RXBUF: u64 = 1 << 15;

/// `struct virtio_net_hdr_v1`; its last field counts the buffers of a merged frame.
const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;
const RX: u16 = 0;
const TX: u16 = 1;
const RX_BUFFER: usize = 2048;
const RX_BUFFERS: u16 = 64;
const MAX_FRAME: usize = 16384;

const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_IP: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
/// ARP for Ethernet and IPv4, up to the operation.
const ARP_PREFIX: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_REQUEST: [u8; 2] = [0, 1];
const ARP_REPLY: [u8; 2] = [0, 2];
const PROTOCOL_ICMP: u8 = 1;
const ICMP_ECHO_REQUEST: u8 = 8;

struct Nic {
    mac: [u8; 6],
    ip: [u8; 4],
    merges: bool,
    rx: Queue,
    tx: Queue,
    pool: &'static mut [u8],
    out: &'static mut [u8],
}

/// What a frame was answered with.
enum Answer {
    None,
    Arp(usize),
    Echo(usize),
}

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let number = |key, default| options::number(boot.cmdline, key, default);
    let device = virtio::find(boot.cmdline, virtio::ID_NET, number("nth", 0) as usize)?;
    let ip = options::value(boot.cmdline, "ip").unwrap_or("172.16.0.2");
    let mut nic = Nic::open(device, parse_ip(ip)?)?;
    for _ in 0..number("announce", 0) {
        nic.announce()?;
    }
    println!("ready={ip}");

    let echoes_wanted = number("echoes", 1);
    let end = clock::now_us() + number("timeout_ms", 60_000) * 1000;
    let frame = memory::allocate(MAX_FRAME);
    let (mut frames, mut arps, mut echoes, mut bytes) = (0_u64, 0_u64, 0_u64, 0_u64);
    while echoes < echoes_wanted && clock::now_us() < end {
        let Some(len) = nic.receive(frame)? else {
            core::hint::spin_loop();
            continue;
        };
        frames += 1;
        bytes += len as u64;
        match nic.answer(&frame[..len]) {
            Answer::None => {}
            Answer::Arp(len) => {
                arps += 1;
                nic.send(len)?;
            }
            Answer::Echo(len) => {
                echoes += 1;
                nic.send(len)?;
            }
        }
    }
    println!("frames={frames}");
    println!("bytes={bytes}");
    println!("arps={arps}");
    println!("echoes={echoes}");
    ensure!(echoes >= echoes_wanted, "{echoes} echoes of {echoes_wanted}");
    Ok(())
}

impl Nic {
    fn open(device: Device, ip: [u8; 4]) -> Result<Self, Failure> {
        let features = device.negotiate(F_MAC | F_MRG_RXBUF)?;
        println!("features={features:#x}");
        let mac = match features & F_MAC {
            0 => [0x02, 0, 0, 0, 0, 1],
            _ => core::array::from_fn(|i| device.config8(i)),
        };
        let [a, b, c, d, e, f] = mac;
        println!("mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        let mut rx = device.queue(RX, RX_BUFFERS)?;
        let tx = device.queue(TX, 16)?;
        let pool = memory::allocate(RX_BUFFER * usize::from(rx.size));
        for (i, buffer) in (0..).zip(pool.chunks_mut(RX_BUFFER)) {
            rx.chain(i, &[Buffer::writable(buffer)]);
            rx.offer(i);
        }
        device.start()?;
        rx.kick();
        let merges = features & F_MRG_RXBUF != 0;
        let out = memory::allocate(HEADER + MAX_FRAME);
        Ok(Self { mac, ip, merges, rx, tx, pool, out })
    }

    /// Copies the next frame, without its header, and gives its buffers back.
    fn receive(&mut self, frame: &mut [u8]) -> Result<Option<usize>, Failure> {
        let Some((head, len)) = self.rx.poll() else { return Ok(None) };
        let first = self.buffer(head, len)?;
        ensure!(first.len() >= HEADER, "a frame of {len} bytes, header included");
        let merged = u16::from_le_bytes([first[NUM_BUFFERS], first[NUM_BUFFERS + 1]]);
        let buffers = if self.merges { merged } else { 1 };
        ensure!((1..=self.rx.size).contains(&buffers), "a frame in {buffers} buffers");
        let mut end = first.len() - HEADER;
        frame[..end].copy_from_slice(&first[HEADER..]);
        self.rx.offer(head);
        for _ in 1..buffers {
            // The device fills all buffers of a frame before it shows the first.
            let (head, len) = self.rx.wait(1000)?;
            let part = self.buffer(head, len)?;
            ensure!(end + part.len() <= frame.len(), "a frame beyond {MAX_FRAME} bytes");
            frame[end..end + part.len()].copy_from_slice(part);
            end += part.len();
            self.rx.offer(head);
        }
        self.rx.kick();
        Ok(Some(end))
    }

    fn buffer(&self, head: u16, len: u32) -> Result<&[u8], Failure> {
        ensure!(head < self.rx.size && len as usize <= RX_BUFFER, "used {head}, {len} bytes");
        Ok(&self.pool[usize::from(head) * RX_BUFFER..][..len as usize])
    }

    /// Sends the first `len` bytes of the frame in `out`, behind an empty header, and waits until it is gone.
    fn send(&mut self, len: usize) -> Outcome {
        self.out[..HEADER].fill(0);
        let written =
            self.tx.round_trip(&[Buffer::readable(&self.out[..HEADER + len])], 5_000_000)?;
        ensure!(written == 0, "{written} bytes written to a sent frame");
        Ok(())
    }

    fn announce(&mut self) -> Outcome {
        let (mac, ip) = (self.mac, self.ip);
        let parts: [&[u8]; 9] = [
            &BROADCAST,
            &mac,
            &ETHERTYPE_ARP,
            &ARP_PREFIX,
            &ARP_REQUEST,
            &mac,
            &ip,
            &BROADCAST,
            &ip,
        ];
        let len = self.compose(&parts);
        self.send(len)
    }

    /// Puts the answer to a frame, if it wants one, into `out`.
    fn answer(&mut self, frame: &[u8]) -> Answer {
        let (Some(&sender), Some(&ethertype)) = (
            frame.get(6..).and_then(|f| f.first_chunk()),
            frame.get(12..).and_then(|f| f.first_chunk()),
        ) else {
            return Answer::None;
        };
        match (ethertype, &frame[14..]) {
            (ETHERTYPE_ARP, arp) => self.answer_arp(sender, arp),
            (ETHERTYPE_IP, packet) => self.answer_ip(sender, packet),
            _ => Answer::None,
        }
    }

    fn answer_arp(&mut self, sender: [u8; 6], arp: &[u8]) -> Answer {
        let is_for_us = arp.len() >= 28
            && arp[..6] == ARP_PREFIX
            && arp[6..8] == ARP_REQUEST
            && arp[24..28] == self.ip;
        if !is_for_us {
            return Answer::None;
        }
        let (mac, ip) = (self.mac, self.ip);
        let parts: [&[u8]; 8] =
            [&sender, &mac, &ETHERTYPE_ARP, &ARP_PREFIX, &ARP_REPLY, &mac, &ip, &arp[8..18]];
        Answer::Arp(self.compose(&parts))
    }

    fn answer_ip(&mut self, sender: [u8; 6], packet: &[u8]) -> Answer {
        let header = usize::from(packet.first().copied().unwrap_or(0) & 15) * 4;
        let total = match packet.get(2..4) {
            Some(&[high, low]) => usize::from(high) << 8 | usize::from(low),
            _ => 0,
        };
        let is_ping = header >= 20
            && total >= header + 8
            && packet.len() >= total
            && packet[9] == PROTOCOL_ICMP
            && packet[16..20] == self.ip
            && packet[header] == ICMP_ECHO_REQUEST;
        if !is_ping {
            return Answer::None;
        }
        let mac = self.mac;
        let len = self.compose(&[&sender, &mac, &ETHERTYPE_IP, &packet[..total]]);
        let reply = &mut self.out[HEADER + 14..][..total];
        // Swapping the addresses leaves the IP checksum as it was.
        reply.copy_within(12..16, 16);
        reply[12..16].copy_from_slice(&self.ip);
        let icmp = &mut reply[header..];
        icmp[0] = 0;
        icmp[2..4].fill(0);
        let checksum = internet_checksum(icmp).to_be_bytes();
        icmp[2..4].copy_from_slice(&checksum);
        Answer::Echo(len)
    }

    /// Writes the parts into `out`, behind the header; returns the frame's length.
    fn compose(&mut self, parts: &[&[u8]]) -> usize {
        let mut len = 0;
        for part in parts {
            self.out[HEADER + len..][..part.len()].copy_from_slice(part);
            len += part.len();
        }
        len
    }
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn parse_ip(text: &str) -> Result<[u8; 4], Failure> {
    let mut ip = [0; 4];
    let mut parts = text.split('.');
    for byte in &mut ip {
        match parts.next().map(str::parse) {
            Some(Ok(part)) => *byte = part,
            _ => fail!("{text} is no IPv4 address"),
        }
    }
    Ok(ip)
}
