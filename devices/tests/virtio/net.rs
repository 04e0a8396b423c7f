//! virtio-net over a packet socket that stands for the tap, and over real taps where there are any.
use std::os::fd::OwnedFd;

use devices::virtio::model::Env;
use devices::virtio::{model, net};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Buf, F_EVENT_IDX, HIGH, Machine, Ring};
use crate::samples::packet_pair;

const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_MRG_RXBUF: u64 = 1 << 15;

const HEADER: usize = 12;
const RX: u64 = HIGH.0;
const TX: u64 = HIGH.0 + 0x8_0000;

/// An interface, its driver, and the other end of its wire.
struct Wire {
    machine: Machine,
    rx: Ring,
    tx: Ring,
    peer: OwnedFd,
    used: u16,
}

impl Wire {
    fn new(features: u64) -> Self {
        let (ours, peer) = packet_pair();
        let config = net::Config::new("eth0", "unused");
        let machine =
            Machine::new(Box::new(net::Net::from_fd(&config, &Env::default(), ours).unwrap()));
        let mut rings = machine.start(features);
        let (tx, rx) = (rings.pop().unwrap(), rings.pop().unwrap());
        Self { machine, rx, tx, peer, used: 0 }
    }

    /// The host sends a frame of `len` bytes after its header.
    fn send_to_guest(&self, byte: u8, len: usize) {
        let packet = [vec![0xff; HEADER], vec![byte; len]].concat();
        assert_eq!(send(&self.peer, &packet, SendFlags::empty()).unwrap(), packet.len());
    }

    /// The frame that the host receives, or nothing.
    fn receive_from_guest(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 1 << 17];
        let (_, len) = recv(&self.peer, &mut packet, RecvFlags::DONTWAIT).ok()?;
        packet.truncate(len);
        Some(packet)
    }

    /// Offers receive buffers of these lengths, one chain each, at 4 KiB from each other.
    fn offer(&mut self, lens: &[u32]) {
        for (i, len) in (0..).zip(lens) {
            self.rx.add(&[(RX + i * 0x1000, *len, true)]);
        }
        self.machine.kick(&self.rx);
    }

    /// Waits for the device to use `count` more receive chains; gives their lengths.
    fn received(&mut self, count: u16) -> Vec<u32> {
        let until = self.used + count;
        self.machine.irq.wait("frames", || self.rx.used_idx() == until);
        let lens = (self.used..until).map(|slot| self.rx.used_entry(slot).1).collect();
        self.used = until;
        lens
    }

    fn memory(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.machine.mem.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    fn num_buffers(&self, at: u64) -> u16 {
        self.machine.mem.read_obj(GuestAddress(at + 10)).unwrap()
    }

    /// The guest sends these buffers as one frame.
    fn transmit(&mut self, buffers: &[Buf]) {
        // Looked at first: the device may serve the chain before it is kicked.
        let count = self.tx.used_idx() + 1;
        self.tx.add(buffers);
        self.machine.finish(&self.tx, count);
        assert_eq!(self.tx.used_entry(count - 1).1, 0);
    }

    fn counter(&self, name: &str) -> u64 {
        self.machine.counter(name)
    }

    /// Waits for a counter that moves without an interrupt: each pause waits for the event that the
    /// I/O thread is at.
    fn wait_for_counter(&self, name: &str, value: u64) {
        for _ in 0..100_000 {
            if self.counter(name) >= value {
                break;
            }
            self.machine.transport.lock().unwrap().pause().unwrap();
            self.machine.transport.lock().unwrap().resume().unwrap();
        }
        assert!(self.counter(name) >= value, "{name}");
    }
}

#[test]
fn receives_into_one_chain() {
    for features in [0, F_MRG_RXBUF] {
        let mut wire = Wire::new(features);
        wire.offer(&[2048, 2048]);
        wire.send_to_guest(0x11, 1500);
        assert_eq!(wire.received(1), [1512]);
        assert_eq!(wire.memory(RX + 12, 1500), [0x11; 1500]);
        assert_eq!(wire.num_buffers(RX), 1);
        wire.send_to_guest(0x22, 60);
        assert_eq!(wire.received(1), [72]);
        assert_eq!(wire.memory(RX + 0x1000 + 12, 60), [0x22; 60]);
        assert_eq!((wire.counter("rx_packets_count"), wire.counter("rx_bytes_count")), (2, 1560));
    }
}

#[test]
fn receives_into_a_chain_of_many_pieces() {
    let mut wire = Wire::new(0);
    let pieces = [(RX, 5, true), (RX + 5, 6, true), (RX + 11, 2, true), (RX + 13, 2000, true)];
    wire.rx.add(&pieces);
    wire.machine.kick(&wire.rx);
    wire.send_to_guest(0x33, 100);
    assert_eq!(wire.received(1), [112]);
    assert_eq!(
        (wire.num_buffers(RX), wire.memory(RX + 12, 101)),
        (1, [&[0x33; 100][..], &[0]].concat())
    );
}

#[test]
fn a_frame_may_fill_several_chains() {
    let mut wire = Wire::new(F_MRG_RXBUF);
    wire.offer(&[1024; 5]);
    wire.send_to_guest(0x44, 2500);
    assert_eq!(wire.received(3), [1024, 1024, 2512 - 2048]);
    assert_eq!(wire.num_buffers(RX), 3);
    assert_eq!(wire.memory(RX + 12, 1012), [0x44; 1012]);
    assert_eq!(wire.memory(RX + 0x2000, 465), [&[0x44; 464][..], &[0]].concat());
    // The rest was not lost: exactly full this time.
    wire.send_to_guest(0x55, 2048 - 12);
    assert_eq!(wire.received(2), [1024, 1024]);
    assert_eq!(wire.num_buffers(RX + 0x3000), 2);
}

#[test]
fn frames_that_do_not_fit_are_dropped_and_counted() {
    for (features, lens) in [(0, &[512u32, 2048][..]), (F_MRG_RXBUF, &[512, 512][..])] {
        let mut wire = Wire::new(features);
        wire.offer(lens);
        wire.send_to_guest(1, 1500);
        wire.send_to_guest(2, 100);
        assert_eq!(wire.received(1), [112]);
        assert_eq!(wire.memory(RX + 12, 100), [2; 100]);
        assert_eq!((wire.counter("rx_fails"), wire.counter("rx_packets_count")), (1, 1));
    }
    // To the byte: a chain of 512 takes a frame of 500, not of 501. Runts are none.
    let mut wire = Wire::new(0);
    wire.offer(&[512, 512]);
    for len in [501, 13, 0, 500, 14] {
        wire.send_to_guest(3, len);
    }
    assert_eq!(wire.received(2), [512, 26]);
    assert_eq!(wire.counter("rx_fails"), 3);
}

#[test]
fn buffers_that_will_not_do_come_back_empty() {
    for features in [0, F_MRG_RXBUF] {
        let mut wire = Wire::new(features);
        wire.offer(&[0, 1, 11]);
        assert_eq!(wire.received(3), [0, 0, 0]);
        wire.rx.add(&[(RX, 64, false)]);
        wire.rx.add(&[(HIGH.0 + HIGH.1 - 32, 64, true)]);
        wire.rx.add(&[(RX, 0x7fff_ffff, true)]);
        wire.machine.kick(&wire.rx);
        assert_eq!(wire.received(3), [0, 0, 0]);
        assert_eq!(wire.counter("rx_bad_buffers"), 6);
        // Good ones before and after bad ones are used.
        wire.offer(&[256, 1, 256]);
        wire.send_to_guest(1, 100);
        wire.send_to_guest(2, 100);
        assert_eq!(wire.received(3), [112, 0, 112]);
    }
}

#[test]
fn waits_for_buffers_and_goes_on_when_there_are_some() {
    for features in [F_MRG_RXBUF, F_MRG_RXBUF | F_EVENT_IDX] {
        let mut wire = Wire::new(features);
        for n in 0..20 {
            wire.send_to_guest(n, 100);
        }
        wire.wait_for_counter("no_rx_avail_buffer", 1);
        for n in 0..20u8 {
            wire.rx.set_used_event(n.into());
            wire.offer(&[1024]);
            assert_eq!(wire.received(1), [112]);
            assert_eq!(wire.memory(RX + 12, 100), [n; 100]);
        }
    }
}

#[test]
fn buffers_held_are_put_back_by_a_pause() {
    let mut wire = Wire::new(F_MRG_RXBUF);
    wire.offer(&[1024; 8]);
    wire.send_to_guest(1, 1500);
    assert_eq!(wire.received(2), [1024, 488]);
    for _ in 0..20 {
        wire.machine.transport.lock().unwrap().pause().unwrap();
        let saved = wire.machine.transport.lock().unwrap().save();
        let saved = serde_json::to_value(saved).unwrap();
        // Of eight chains two were used; no other is with the device.
        assert_eq!(saved["positions"][0], json!([2, 2]));
        wire.machine.transport.lock().unwrap().resume().unwrap();
    }
    wire.send_to_guest(2, 6 * 1024 - 12);
    assert_eq!(wire.received(6), [1024; 6]);
}

#[test]
fn sends_frames_of_any_shape() {
    let mut wire = Wire::new(0);
    let mem = wire.machine.mem.clone();
    mem.write_slice(&[0; HEADER], GuestAddress(TX)).unwrap();
    mem.write_slice(&vec![0x66; 65550], GuestAddress(TX + 12)).unwrap();
    let chains: [&[Buf]; 5] = [
        &[(TX, 26, false)],
        &[(TX, 12, false), (TX + 12, 1500, false)],
        &[(TX, 5, false), (TX + 5, 8, false), (TX + 13, 0, false), (TX + 13, 61, false)],
        &[(TX, 65562, false)],
        &[(TX, 100, false), (RX, 100, true)],
    ];
    for (chain, len) in chains.into_iter().zip([14, 1500, 62, 65550, 88]) {
        wire.transmit(chain);
        let packet = wire.receive_from_guest().unwrap();
        assert_eq!(packet[..HEADER], [0; HEADER]);
        assert!(packet[HEADER..] == vec![0x66; len]);
    }
    assert_eq!(wire.counter("tx_packets_count"), 5);
    assert_eq!(wire.counter("tx_bytes_count"), 14 + 1500 + 62 + 65550 + 88);
}

#[test]
fn frames_that_cannot_be_are_dropped_and_counted() {
    let mut wire = Wire::new(0);
    let bad: [&[Buf]; 8] = [
        &[(TX, 0, false)],
        &[(TX, 11, false)],
        &[(TX, 12, false)],
        &[(TX, 25, false)],
        &[(TX, 65563, false)],
        &[(TX, 0x7fff_ffff, false)],
        &[(TX, 100, true)],
        &[(TX, 12, false), (HIGH.0 + HIGH.1 - 50, 100, false)],
    ];
    for chain in bad {
        wire.transmit(chain);
    }
    assert_eq!(wire.counter("tx_malformed_frames"), 8);
    assert_eq!(wire.receive_from_guest(), None);
    wire.transmit(&[(TX, 26, false)]);
    assert!(wire.receive_from_guest().is_some());
}

#[test]
fn a_full_wire_loses_frames_and_nothing_else() {
    let mut wire = Wire::new(0);
    for _ in 0..2000 {
        wire.transmit(&[(TX, 1512, false)]);
    }
    let lost = wire.counter("tap_write_fails");
    assert!(lost > 0 && wire.counter("tx_packets_count") == 2000 - lost);
    while wire.receive_from_guest().is_some() {}
    wire.transmit(&[(TX, 1512, false)]);
    assert!(wire.receive_from_guest().is_some());
}

#[test]
fn a_wire_that_is_cut_leaves_the_guest_alone() {
    let mut wire = Wire::new(F_MRG_RXBUF);
    wire.offer(&[1024; 4]);
    wire.peer = packet_pair().0;
    wire.wait_for_counter("tap_gone", 1);
    let events = wire.counter("rx_queue_event_count");
    for _ in 0..10 {
        wire.transmit(&[(TX, 100, false)]);
    }
    assert_eq!(wire.counter("tap_write_fails"), 10);
    assert_eq!(wire.machine.status(), 15);
    // Nothing spins: at most the kick of the last resume came in between.
    assert!(wire.counter("rx_queue_event_count") <= events + 1);
    // And all can still be paused, saved and reset.
    wire.machine.transport.lock().unwrap().pause().unwrap();
    wire.machine.transport.lock().unwrap().resume().unwrap();
    wire.machine.start(0);
}

/// A peer that goes without having read what it was sent resets the wire.
#[test]
fn a_wire_that_is_reset_is_counted_and_gone() {
    let mut wire = Wire::new(F_MRG_RXBUF);
    wire.transmit(&[(TX, 100, false)]);
    wire.offer(&[1024; 4]);
    wire.peer = packet_pair().0;
    wire.wait_for_counter("tap_read_fails", 1);
    assert_eq!(wire.machine.status(), 15);
}

#[test]
fn a_flood_from_the_host_does_not_starve_the_guest() {
    let mut wire = Wire::new(F_MRG_RXBUF);
    for round in 0..100 {
        wire.offer(&[256; 16]);
        for n in 0..16 {
            wire.send_to_guest(n, 64);
        }
        assert_eq!(wire.received(16), [76; 16], "{round}");
    }
    assert_eq!(wire.counter("rx_packets_count"), 1600);
}

#[test]
fn offers_address_and_mtu_if_they_are_given() {
    let (ours, _peer) = packet_pair();
    let mut config = net::Config::new("eth0", "unused");
    config.guest_mac = Some("06:00:AC:10:00:02".into());
    config.mtu = Some(9000);
    let machine =
        Machine::new(Box::new(net::Net::from_fd(&config, &Env::default(), ours).unwrap()));
    assert_eq!(machine.features() & (F_MAC | F_MTU), F_MAC | F_MTU);
    assert_eq!(machine.config(0, 6), [6, 0, 0xac, 0x10, 0, 2]);
    assert_eq!(machine.config(10, 2), 9000u16.to_le_bytes());
    assert_eq!(Wire::new(0).machine.features() & (F_MAC | F_MTU), 0);
}

#[test]
fn refuses_configurations_that_cannot_work() {
    let check = |change: Value| {
        let mut config = json!({"iface_id": "eth0", "host_dev_name": "husk-none"});
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let json = config.to_string();
        let recipe = (model("network-interfaces").unwrap().parse)(json.as_bytes()).unwrap();
        assert!(recipe.open(&Env::default()).is_err());
        recipe.check().unwrap_err().to_string()
    };
    for (change, expected) in [
        (json!({}), "host_dev_name: tap 'husk-none' does not exist; create it with: ip tuntap"),
        (json!({"host_dev_name": "a name that is too long"}), "host_dev_name: "),
        (json!({"host_dev_name": "tap%d"}), "host_dev_name: "),
        (json!({"host_dev_name": ""}), "host_dev_name: "),
        (json!({"host_dev_name": "lo"}), "host_dev_name: 'lo' is not a tap"),
        (json!({"iface_id": "a/b"}), "iface_id: "),
        (json!({"mtu": 67}), "mtu: 67 "),
        (json!({"guest_mac": "06:00"}), "guest_mac: "),
    ] {
        let e = check(change);
        assert!(e.starts_with(expected), "{e}");
    }
    let row = model("network-interfaces").unwrap();
    for bad in [r#"{"iface_id":"a"}"#, r#"{"iface_id":"a","host_dev_name":"b","mtu":65536}"#] {
        assert!((row.parse)(bad.as_bytes()).is_err(), "{bad}");
    }
    let shown = (row.parse)(br#"{"iface_id":"a","host_dev_name":"b"}"#).unwrap().to_json();
    assert_eq!(
        shown,
        json!({
            "iface_id": "a", "host_dev_name": "b", "guest_mac": null, "mtu": null,
            "rx_rate_limiter": null, "tx_rate_limiter": null,
        })
    );
}

#[test]
fn a_patch_without_limits_is_silent() {
    let wire = Wire::new(0);
    let update = |patch: Value| {
        let row = model("network-interfaces").unwrap();
        let patch = (row.patch.unwrap().parse)(patch.to_string().as_bytes()).unwrap();
        let result = wire.machine.transport.lock().unwrap().update(None, &patch);
        result.map_err(|e| e.to_string())
    };
    update(json!({"iface_id": "eth0", "rx_rate_limiter": null})).unwrap();
    assert_eq!((wire.machine.status(), wire.machine.irq.counts().1), (15, 0));
}
