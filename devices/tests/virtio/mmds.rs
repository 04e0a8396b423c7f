//! The metadata service behind virtio-net: a guest's TCP/IP drives the rings, a packet socket stands
//! for the tap.
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use devices::mmds::{DEFAULT_ADDRESS, Mmds, Service};
use devices::virtio::model::Env;
use devices::virtio::net;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::{Value, json};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Buf, HIGH, Machine, Ring};
use crate::guest_tcp::Guest;
use crate::samples::packet_pair;

const F_MRG_RXBUF: u64 = 1 << 15;
const HEADER: usize = 12;
const RX: u64 = HIGH.0;
const TX: u64 = HIGH.0 + 0x8_0000;
/// Receive buffers that the driver offers at a time, at 4 KiB from each other.
const BUFFERS: u64 = 8;

/// An interface that leads to the service, and a guest with TCP/IP at its other end.
struct World {
    machine: Machine,
    rx: Ring,
    tx: Ring,
    peer: OwnedFd,
    mmds: Arc<Mmds>,
    guest: Guest,
    start: Instant,
    buffer_len: u32,
    /// Frames are sent in pieces of this length.
    piece_len: usize,
    is_mergeable: bool,
    offered: u64,
    used: u16,
}

impl World {
    fn new(features: u64, buffer_len: u32) -> Self {
        Self::on("eth0", features, buffer_len)
    }

    fn on(interface: &str, features: u64, buffer_len: u32) -> Self {
        let (ours, peer) = packet_pair();
        let mmds = Arc::new(Mmds::new(1 << 20));
        mmds.put(json!({"a": "b", "large": "x".repeat(100_000)})).unwrap();
        let config = json!({"network_interfaces": [interface]});
        let config = serde_json::from_value(config).unwrap();
        let service = Arc::new(Service::new(mmds.clone(), config).unwrap());
        let mut env = Env::default();
        env.mmds = Some(service);
        let device = net::Net::from_fd(&net::Config::new("eth0", "unused"), &env, ours).unwrap();
        let machine = Machine::new(Box::new(device));
        let mut rings = machine.start(features);
        let (tx, rx) = (rings.pop().unwrap(), rings.pop().unwrap());
        Self {
            machine,
            rx,
            tx,
            peer,
            mmds,
            guest: Guest::new(),
            start: Instant::now(),
            buffer_len,
            piece_len: usize::MAX,
            is_mergeable: features & F_MRG_RXBUF != 0,
            offered: 0,
            used: 0,
        }
    }

    fn place(offered: u64) -> u64 {
        RX + offered % BUFFERS * 0x1000
    }

    /// Offers as many receive buffers as there are places for.
    fn offer(&mut self) {
        let (before, used) = (self.offered, u64::from(self.used));
        while self.offered < used + BUFFERS {
            self.rx.add(&[(Self::place(self.offered), self.buffer_len, true)]);
            self.offered += 1;
        }
        if self.offered > before {
            self.machine.kick(&self.rx);
        }
    }

    /// Sends what the guest has to send.
    fn transmit(&mut self) {
        while let Some(frame) = self.guest.wire.outbox.pop_front() {
            self.transmit_frame(&frame);
        }
    }

    fn transmit_frame(&mut self, frame: &[u8]) {
        let packet = [&[0; HEADER], frame].concat();
        self.machine.mem.write_slice(&packet, GuestAddress(TX)).unwrap();
        let mut at = TX;
        let buffers: Vec<Buf> = packet
            .chunks(self.piece_len.min(packet.len()))
            .map(|piece| {
                let here = at;
                at += piece.len() as u64;
                (here, u32::try_from(piece.len()).unwrap(), false)
            })
            .collect();
        // Looked at first: the device may serve the chain before it is kicked.
        let count = self.tx.used_idx().wrapping_add(1);
        self.tx.add(&buffers);
        self.machine.finish(&self.tx, count);
    }

    /// The next frame that the device gives, if there is one.
    fn next_frame(&mut self) -> Option<Vec<u8>> {
        if self.rx.used_idx() == self.used {
            return None;
        }
        let first = Self::place(self.used.into());
        let mut header = [0; HEADER];
        self.machine.mem.read_slice(&mut header, GuestAddress(first)).unwrap();
        let count = u16::from_le_bytes([header[10], header[11]]);
        assert_eq!(header[..10], [0; 10], "no offloads");
        assert!(count == 1 || self.is_mergeable && count > 1, "{count}");
        let mut packet = Vec::new();
        for _ in 0..count {
            let len = self.rx.used_entry(self.used).1;
            let mut piece = vec![0; usize::try_from(len).unwrap()];
            let from = GuestAddress(Self::place(self.used.into()));
            self.machine.mem.read_slice(&mut piece, from).unwrap();
            packet.extend(piece);
            self.used += 1;
        }
        Some(packet.split_off(HEADER))
    }

    /// Waits for a frame of the device.
    fn wait_for_frame(&mut self) -> Vec<u8> {
        let Self { machine, rx, used, .. } = self;
        machine.irq.wait("a frame", || rx.used_idx() != *used);
        self.next_frame().unwrap()
    }

    /// Lets guest and service talk until `is_done`.
    fn talk(&mut self, mut is_done: impl FnMut(&mut Guest) -> bool) {
        loop {
            self.offer();
            self.guest.poll(i64::try_from(self.start.elapsed().as_millis()).unwrap());
            self.transmit();
            if is_done(&mut self.guest) {
                return;
            }
            let frame = self.wait_for_frame();
            self.guest.wire.inbox.push_back(frame);
        }
    }

    fn connect(&mut self) -> SocketHandle {
        let handle = self.guest.connect(DEFAULT_ADDRESS);
        // Acknowledgements come at once, or the guest would have to be asked in time.
        self.guest.socket(handle).set_ack_delay(None);
        self.talk(|guest| guest.socket(handle).may_send());
        handle
    }

    fn ask(&mut self, handle: SocketHandle, path: &str) {
        let request = format!("GET {path} HTTP/1.1\r\n\r\n");
        self.guest.socket(handle).send_slice(request.as_bytes()).unwrap();
    }

    /// The body that a request brings.
    fn get(&mut self, handle: SocketHandle, path: &str) -> String {
        self.ask(handle, path);
        let mut reply = Vec::new();
        self.talk(|guest| {
            reply.extend(guest.read(handle));
            body(&reply).is_some()
        });
        body(&reply).unwrap()
    }

    fn counter(&self, name: &str) -> u64 {
        let set = self.mmds.counters();
        let at = set.group().declared.iter().position(|declared| declared.name == name);
        set.values()[at.unwrap()].amount()
    }

    /// Waits for a counter that moves without an interrupt: a pause waits for the event that the I/O
    /// thread is at.
    fn wait_for_counter(&self, name: &str, value: u64) {
        self.machine.transport.lock().unwrap().pause().unwrap();
        self.machine.transport.lock().unwrap().resume().unwrap();
        assert_eq!(self.counter(name), value, "{name}");
    }
}

/// The body of a reply that is whole.
fn body(reply: &[u8]) -> Option<String> {
    let (head, body) = std::str::from_utf8(reply).unwrap().split_once("\r\n\r\n")?;
    let length = head.split("Content-Length: ").nth(1).unwrap();
    (length.parse() == Ok(body.len())).then(|| body.to_owned())
}

#[test]
fn serves_the_guest_whatever_its_buffers_are() {
    for (features, buffer_len, piece_len) in
        [(0, 2048, usize::MAX), (F_MRG_RXBUF, 2048, 60), (F_MRG_RXBUF, 512, 5000)]
    {
        let mut world = World::new(features, buffer_len);
        world.piece_len = piece_len;
        let connection = world.connect();
        assert_eq!(world.get(connection, "/a"), "b");
        assert_eq!(world.get(connection, "/large"), "x".repeat(100_000));
        let (frames, bytes) = (world.counter("tx_frames"), world.counter("tx_bytes"));
        assert!(frames > 70 && bytes > 100_000, "{frames} {bytes}");
        assert_eq!(world.machine.counter("rx_packets_count"), frames);
        assert_eq!(world.machine.counter("rx_bytes_count"), bytes);
        assert_eq!(world.machine.counter("tx_packets_count"), 0, "nothing got to the tap");
        assert_eq!(world.counter("tx_errors"), 0);
    }
}

#[test]
fn other_frames_go_where_they_went() {
    let mut world = World::new(0, 2048);
    let connection = world.connect();
    world.ask(connection, "/large");
    let mut packet = [0; 2000];
    for n in 0..100u8 {
        let frame = [vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 7, 8, 0], vec![n; 100]].concat();
        world.transmit_frame(&frame);
        let (_, len) = recv(&world.peer, &mut packet, RecvFlags::DONTWAIT).unwrap();
        assert_eq!(packet[HEADER..len], frame);
    }
    let incoming = [vec![0; HEADER], vec![9; 60]].concat();
    send(&world.peer, &incoming, SendFlags::empty()).unwrap();
    world.offer();
    assert_eq!(world.wait_for_frame(), [9; 60]);
    let mut reply = Vec::new();
    world.talk(|guest| {
        reply.extend(guest.read(connection));
        body(&reply).is_some()
    });
    assert_eq!(world.machine.counter("tx_packets_count"), 100);
    // Frames too short to be anybody's go to the tap, and long ones nowhere.
    let accepted = world.counter("rx_accepted");
    for len in [14, 20, 33, 41] {
        world.transmit_frame(&[&[2; 12][..], &[8, 0], &vec![169; len - 14]].concat());
    }
    world.transmit_frame(&vec![8; 65551]);
    assert_eq!(world.machine.counter("tx_packets_count"), 104);
    assert_eq!(world.machine.counter("tx_malformed_frames"), 1);
    assert_eq!(world.counter("rx_accepted"), accepted);
}

#[test]
fn an_interface_that_is_not_on_the_list_leads_to_the_tap_alone() {
    let mut world = World::on("eth1", 0, 2048);
    world.guest.connect(DEFAULT_ADDRESS);
    world.guest.poll(0);
    world.transmit();
    assert_eq!((world.counter("rx_accepted"), world.machine.counter("tx_packets_count")), (0, 1));
}

#[test]
fn frames_wait_for_buffers_and_those_that_do_not_fit_are_counted() {
    let mut world = World::new(0, 2048);
    let connection = world.connect();
    // The driver takes its time: nothing is lost.
    world.ask(connection, "/a");
    world.guest.poll(1);
    while world.offered > u64::from(world.used) {
        send(&world.peer, &[0; HEADER + 60], SendFlags::empty()).unwrap();
        world.wait_for_frame();
    }
    world.transmit();
    assert!(world.next_frame().is_none());
    let mut reply = Vec::new();
    world.talk(|guest| {
        reply.extend(guest.read(connection));
        body(&reply).is_some()
    });
    assert_eq!(body(&reply).unwrap(), "b");

    let mut world = World::new(0, 60);
    world.guest.connect(DEFAULT_ADDRESS);
    world.offer();
    world.guest.poll(0);
    world.transmit();
    // The answer to "who has": 54 bytes with the header. The next is longer.
    let frame = world.wait_for_frame();
    world.guest.wire.inbox.push_back(frame);
    world.guest.poll(1);
    world.transmit();
    // After the chain is used, which is all that the driver hears of.
    world.wait_for_counter("tx_errors", 1);
    assert_eq!(world.counter("tx_frames"), 1);
}

#[test]
fn what_is_not_acknowledged_is_sent_again_without_a_kick() {
    let mut world = World::new(0, 2048);
    world.guest.connect(DEFAULT_ADDRESS);
    world.offer();
    world.guest.poll(0);
    world.transmit();
    let frame = world.wait_for_frame();
    world.guest.wire.inbox.push_back(frame);
    world.guest.poll(1);
    world.transmit();
    let first = world.wait_for_frame();
    let again = world.wait_for_frame();
    // The same but for what numbers packets.
    assert_eq!(first[34..], again[34..]);
}

#[test]
fn connections_outlive_a_pause_and_end_with_a_reset() {
    let mut world = World::new(0, 2048);
    let connection = world.connect();
    for _ in 0..3 {
        world.machine.transport.lock().unwrap().pause().unwrap();
        world.machine.transport.lock().unwrap().resume().unwrap();
        assert_eq!(world.get(connection, "/a"), "b");
    }
    let mut rings = world.machine.start(0);
    (world.tx, world.rx) = (rings.pop().unwrap(), rings.pop().unwrap());
    (world.offered, world.used) = (0, 0);
    world.ask(connection, "/a");
    world.talk(|guest| guest.socket(connection).state() == State::Closed);
    let connection = world.connect();
    assert_eq!(world.get(connection, "/a"), "b");
}

#[test]
fn the_service_does_without_a_tap() {
    let mut world = World::new(0, 2048);
    world.peer = packet_pair().0;
    let connection = world.connect();
    assert_eq!(world.get(connection, "/a"), "b");
}

#[test]
fn changes_of_the_data_are_seen_at_once() {
    let mut world = World::new(0, 2048);
    let connection = world.connect();
    world.mmds.patch(&json!({"a": "c", "large": null})).unwrap();
    assert_eq!(world.get(connection, "/a"), "c");
    assert_eq!(world.mmds.show(), json!({"a": "c"}));
    world.mmds.put(Value::Null).unwrap();
    assert_eq!(world.get(connection, "/a"), "Resource not found: /a.");
}
