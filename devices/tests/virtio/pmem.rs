//! virtio-pmem: where it is, flushes, and what they may look like.
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Buf, HIGH, Machine, OWN, Ring, Shown, ram};
use crate::samples::{TempFile, open, refusal};

const REQUEST: u64 = HIGH.0;
const RESULT: u64 = HIGH.0 + 0x800;
const UNTOUCHED: u32 = 0xeeee_eeee;
const MIB_2: u64 = 2 << 20;

/// A device over a file of 5000 bytes, and its driver.
struct Device {
    machine: Machine,
    ring: Ring,
    shown: Arc<Shown>,
    file: TempFile,
    count: u16,
}

impl Device {
    fn new(is_read_only: bool) -> Self {
        let file = TempFile::new(&[7; 5000]);
        let config = json!({"id": "p", "path_on_host": file.path, "read_only": is_read_only});
        let shown = Arc::<Shown>::default();
        let device = open("pmem", &config);
        let machine = Machine::placed(device, ram(), None, shown.clone()).unwrap();
        let ring = machine.start(0).remove(0);
        Self { machine, ring, shown, file, count: 0 }
    }

    /// Sends a request of this type in these buffers; the result and the used length.
    fn send(&mut self, request: u32, buffers: &[Buf]) -> (u32, u32) {
        self.machine.mem.write_obj(request, GuestAddress(REQUEST)).unwrap();
        self.machine.mem.write_obj(UNTOUCHED, GuestAddress(RESULT)).unwrap();
        self.ring.add(buffers);
        self.count += 1;
        self.machine.finish(&self.ring, self.count);
        let (_, used) = self.ring.used_entry(self.count - 1);
        (self.machine.mem.read_obj(GuestAddress(RESULT)).unwrap(), used)
    }
}

#[test]
fn is_where_it_says_it_is() {
    for is_read_only in [false, true] {
        let device = Device::new(is_read_only);
        let config = device.machine.config(0, 16);
        assert_eq!(config[..8], OWN.0.to_le_bytes());
        assert_eq!(config[8..], MIB_2.to_le_bytes());
        let [piece] = device.shown.pieces().try_into().unwrap();
        assert_eq!((piece.addr, piece.len), (OWN, MIB_2));
        assert_eq!(piece.is_read_only, is_read_only);
        assert!(piece.host.is_multiple_of(MIB_2));
    }
}

#[test]
fn flushes() {
    let mut device = Device::new(false);
    let honest = [(REQUEST, 4, false), (RESULT, 4, true)];
    assert_eq!(device.send(0, &honest), (0, 4));
    assert_eq!(device.machine.counter("flush_count"), 1);
    // In pieces, as a driver may.
    let pieces = [(REQUEST, 1, false), (REQUEST + 1, 3, false), (RESULT, 2, true)];
    let rest = (RESULT + 2, 2, true);
    assert_eq!(device.send(0, &[&pieces[..], &[rest]].concat()), (0, 4));
    assert_eq!(device.machine.counter("execute_fails"), 0);
}

#[test]
fn a_turn_ends_with_a_flush() {
    let mut device = Device::new(false);
    device.machine.mem.write_obj(0u32, GuestAddress(REQUEST)).unwrap();
    for _ in 0..6 {
        device.ring.add(&[(REQUEST, 4, false), (RESULT, 4, true)]);
    }
    device.machine.finish(&device.ring, 6);
    // Each but the first is a turn that nobody kicked for: in between, others get the worker.
    let turns = device.machine.counter("queue_event_count");
    assert!(turns >= 6, "{turns} turns");
    assert_eq!(device.machine.counter("flush_count"), 6);
}

#[test]
fn flushes_wait_for_a_rate_limit() {
    let file = TempFile::new(&[7; 5000]);
    let limits = json!({"ops": {"size": 1, "refill_time": 20}});
    let config = json!({"id": "p", "path_on_host": file.path, "rate_limiter": limits});
    let machine = Machine::placed(open("pmem", &config), ram(), None, Arc::default()).unwrap();
    let ring = &mut machine.start(0)[0];
    machine.mem.write_obj(0u32, GuestAddress(REQUEST)).unwrap();
    for _ in 0..4 {
        ring.add(&[(REQUEST, 4, false), (RESULT, 4, true)]);
    }
    machine.finish(ring, 4);
    assert!(machine.counter("rate_limiter_throttled_events") > 0);
    assert!(machine.counter("rate_limiter_event_count") > 0);
    assert_eq!(machine.counter("flush_count"), 4);
}

#[test]
fn requests_that_break_the_rules_come_back_empty() {
    let mut device = Device::new(false);
    let (request, result) = ((REQUEST, 4, false), (RESULT, 4, true));
    let own = OWN.0;
    let cases: [&[Buf]; 10] = [
        &[request],
        &[result],
        &[result, request],
        &[(REQUEST, 3, false), result],
        &[(REQUEST, 8, false), result],
        &[request, (RESULT, 3, true)],
        &[request, (RESULT, 8, true)],
        &[request, (HIGH.0 + HIGH.1, 4, true)],
        // The file may be cut short at any time: no device reads or writes it but by system calls.
        &[(own, 4, false), result],
        &[request, (own, 4, true)],
    ];
    for (count, buffers) in (1..).zip(cases) {
        assert_eq!(device.send(0, buffers), (UNTOUCHED, 0), "{buffers:?}");
        assert_eq!(device.machine.counter("invalid_reqs_count"), count);
    }
    for kind in [1, 2, u32::MAX] {
        assert_eq!(device.send(kind, &[request, result]), (UNTOUCHED, 0));
    }
    assert_eq!(device.send(0, &[request, result]), (0, 4));
}

#[test]
fn the_place_of_a_device_that_is_removed_is_empty() {
    let device = Device::new(false);
    let buffer = GuestAddress(OWN.0 + 4096);
    let reachable = || device.machine.mem.for_syscalls(buffer, 64, drop).is_some();
    assert!(reachable());
    drop(device.machine.transport.lock().unwrap().remove().unwrap());
    assert!(!reachable());
    assert_eq!(device.shown.pieces(), []);
    // Its file can be had by others.
    open("pmem", &json!({"id": "other", "path_on_host": device.file.path}));
}

#[test]
fn a_host_that_shows_nothing_more_is_an_error() {
    let file = TempFile::new(&[7; 5000]);
    let shown = Arc::<Shown>::default();
    shown.is_full.store(true, Ordering::Relaxed);
    let device = open("pmem", &json!({"id": "p", "path_on_host": file.path}));
    let e = Machine::placed(device, ram(), None, shown).err().unwrap();
    assert!(e.to_string().contains("cannot show it to the guest"), "{e}");
}

#[test]
fn refuses_configurations_that_cannot_work() {
    let file = TempFile::new(&[7; 5000]);
    let empty = TempFile::new(&[]);
    for (change, words) in [
        (json!({"id": "a/b"}), "id: \"a/b\" is not"),
        (json!({"path_on_host": "/nonexistent"}), "cannot open /nonexistent"),
        (json!({"path_on_host": "/"}), "is a directory, want a regular file"),
        (json!({"path_on_host": "/dev/zero"}), "is a character device"),
        (json!({"path_on_host": empty.path}), "has 0 bytes, which cannot be mapped"),
    ] {
        let mut config = json!({"id": "p", "path_on_host": file.path});
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let said = refusal("pmem", &config);
        assert!(said.contains(words), "{change}: {said}");
    }
}

#[test]
fn a_file_that_is_written_is_nobody_elses() {
    let file = TempFile::new(&[7; 5000]);
    let config = |ro| json!({"id": "p", "path_on_host": file.path, "read_only": ro});
    let reader = open("pmem", &config(true));
    open("pmem", &config(true));
    assert!(refusal("pmem", &config(false)).contains("in use"));
    drop(reader);
    let _writer = open("pmem", &config(false));
    assert!(refusal("pmem", &config(true)).contains("in use"));
    let drive = json!({"drive_id": "d", "is_root_device": false, "path_on_host": file.path});
    std::fs::write(&file.path, [0; 512]).unwrap();
    assert!(refusal("drives", &drive).contains("in use"));
}
