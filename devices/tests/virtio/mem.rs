//! virtio-mem: plugging, unplugging, and drivers that lie.
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::virtio::mmio::Saved;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::driver::{Buf, HIGH, Machine, OWN, Ring, Shown, pages_of, ram};
use crate::samples::{open, refusal};

const REQUEST: u64 = HIGH.0;
const ANSWER: u64 = HIGH.0 + 0x800;
const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const SLOT: u64 = 128 * MIB;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;
const UNTOUCHED: u16 = 0xeeee;

/// A device with room for 256 MiB, and its driver.
struct Device {
    machine: Machine,
    ring: Ring,
    shown: Arc<Shown>,
    count: u16,
}

impl Device {
    fn new(requested_mib: u64) -> Self {
        Self::restored(None).with_requested(requested_mib)
    }

    fn restored(saved: Option<&Saved>) -> Self {
        Self::of(&json!({"total_size_mib": 256}), saved)
    }

    /// One of which all that can be plugged is requested.
    fn full(config: &Value) -> Self {
        let mib = config["total_size_mib"].as_u64().unwrap();
        Self::of(config, None).with_requested(mib)
    }

    fn of(config: &Value, saved: Option<&Saved>) -> Self {
        let shown = Arc::<Shown>::default();
        let device = open("memory-hotplug", config);
        let machine = Machine::placed(device, ram(), saved, shown.clone()).unwrap();
        let ring = match saved {
            None => machine.start(0).remove(0),
            Some(_) => Ring::new(&machine.mem, 0, 16),
        };
        Self { machine, ring, shown, count: 0 }
    }

    fn with_requested(self, mib: u64) -> Self {
        self.request(mib).unwrap();
        self
    }

    /// What the user requests.
    fn request(&self, mib: u64) -> Result<(), devices::virtio::model::DeviceError> {
        let patch = json!({"requested_size_mib": mib});
        self.machine.transport.lock().unwrap().update(None, &patch)
    }

    fn send(&mut self, kind: u16, addr: u64, blocks: u16, buffers: &[Buf]) -> (u16, u16, u32) {
        let mem = &self.machine.mem;
        mem.write_slice(&[0xee; 24], GuestAddress(REQUEST)).unwrap();
        mem.write_obj(kind, GuestAddress(REQUEST)).unwrap();
        mem.write_obj(addr, GuestAddress(REQUEST + 8)).unwrap();
        mem.write_obj(blocks, GuestAddress(REQUEST + 16)).unwrap();
        mem.write_slice(&[0xee; 16], GuestAddress(ANSWER)).unwrap();
        self.ring.add(buffers);
        self.count += 1;
        self.machine.finish(&self.ring, self.count);
        let (_, used) = self.ring.used_entry(self.count - 1);
        let word = |at| self.machine.mem.read_obj::<u16>(GuestAddress(ANSWER + at)).unwrap();
        (word(0), word(8), used)
    }

    /// Asks about `blocks` from `offset` on.
    fn ask(&mut self, kind: u16, offset: u64, blocks: u16) -> u16 {
        let buffers = [(REQUEST, 24, false), (ANSWER, 10, true)];
        let (answer, _, used) = self.send(kind, OWN.0.wrapping_add(offset), blocks, &buffers);
        assert_eq!(used, 10);
        answer
    }

    fn state(&mut self, offset: u64, blocks: u16) -> u16 {
        assert_eq!(self.ask(STATE, offset, blocks), ACK);
        self.machine.mem.read_obj(GuestAddress(ANSWER + 8)).unwrap()
    }

    /// Asks for everything to be unplugged, and waits until the device has begun.
    fn begin_unplug_all(&mut self) {
        let before = self.machine.counter("unplug_all_count");
        self.machine.mem.write_obj(UNPLUG_ALL, GuestAddress(REQUEST)).unwrap();
        self.machine.mem.write_obj(UNTOUCHED, GuestAddress(ANSWER)).unwrap();
        self.ring.add(&[(REQUEST, 24, false), (ANSWER, 10, true)]);
        self.count += 1;
        self.machine.kick(&self.ring);
        while self.machine.counter("unplug_all_count") == before {
            std::thread::yield_now();
        }
    }

    /// Waits for the answer.
    fn answer(&mut self) -> u16 {
        self.machine.finish(&self.ring, self.count);
        self.machine.mem.read_obj(GuestAddress(ANSWER)).unwrap()
    }

    fn sizes(&self) -> (u64, u64, u64) {
        let field = |at| u64::from_le_bytes(self.machine.config(at, 8).try_into().unwrap());
        (field(32), field(40), field(48))
    }

    /// Whether devices reach the byte at `offset`.
    fn reach(&self, offset: u64) -> bool {
        let at = GuestAddress(OWN.0 + offset);
        let syscalls = self.machine.mem.for_syscalls(at, 1, drop).is_some();
        assert_eq!(self.machine.mem.check_range(at, 1), syscalls);
        syscalls
    }

    fn status(&self) -> Value {
        self.machine.transport.lock().unwrap().show(None).unwrap()
    }
}

#[test]
fn tells_the_driver_what_there_is() {
    let device = Device::new(0);
    let config = device.machine.config(0, 56);
    let fields: Vec<u64> =
        config.chunks(8).map(|field| u64::from_le_bytes(field.try_into().unwrap())).collect();
    assert_eq!(fields, [BLOCK, 0, OWN.0, 256 * MIB, 0, 0, 0]);
    assert_eq!(device.machine.features() & 3, 2);
    let before = device.machine.irq.counts().1;
    device.request(130).unwrap();
    assert_eq!(device.machine.irq.counts().1, before + 1);
    assert_eq!(device.sizes(), (256 * MIB, 0, 130 * MIB));
    device.request(2).unwrap();
    // What was usable once stays so.
    assert_eq!(device.sizes(), (256 * MIB, 0, 2 * MIB));
    let status = json!({
        "total_size_mib": 256, "block_size_mib": 2, "slot_size_mib": 128,
        "plugged_size_mib": 0, "requested_size_mib": 2,
    });
    assert_eq!(device.status(), status);
}

#[test]
fn plugs_and_unplugs() {
    let mut device = Device::new(256);
    assert!(!device.reach(0));
    assert_eq!(device.shown.pieces(), []);
    assert_eq!(device.ask(PLUG, BLOCK, 2), ACK);
    assert_eq!(device.sizes().1, 2 * BLOCK);
    let reached = [0, 1, 2, 3].map(|n| device.reach(n * BLOCK));
    assert_eq!(reached, [false, true, true, false]);
    let [piece] = device.shown.pieces().try_into().unwrap();
    assert_eq!((piece.slot, piece.addr, piece.len), (0, OWN, SLOT));
    assert_eq!(device.state(0, 1), 1);
    assert_eq!(device.state(BLOCK, 2), 0);
    assert_eq!(device.state(0, 4), 2);

    // Across two slots.
    assert_eq!(device.ask(PLUG, SLOT - BLOCK, 2), ACK);
    assert_eq!(device.shown.pieces().len(), 2);
    assert_eq!(device.shown.pieces()[1].addr.0, OWN.0 + SLOT);

    // It comes back empty.
    let at = GuestAddress(OWN.0 + BLOCK);
    device.machine.mem.write_obj(7u64, at).unwrap();
    assert_eq!(device.ask(UNPLUG, BLOCK, 1), ACK);
    assert!(device.machine.mem.read_obj::<u64>(at).is_err());
    assert_eq!(device.shown.pieces().len(), 2);
    assert_eq!(device.ask(PLUG, BLOCK, 1), ACK);
    assert_eq!(device.machine.mem.read_obj::<u64>(at).unwrap(), 0);

    // A slot goes with its last block.
    assert_eq!(device.ask(UNPLUG, SLOT, 1), ACK);
    assert_eq!(device.shown.pieces().len(), 1);
    assert_eq!(device.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(device.shown.pieces(), []);
    assert_eq!(device.sizes().1, 0);
    assert!((0..128).all(|n| !device.reach(n * BLOCK)));
    let counters = [
        ("plug_count", 3),
        ("plug_bytes", 5 * BLOCK),
        ("plug_fails", 0),
        ("unplug_count", 2),
        ("unplug_bytes", 5 * BLOCK),
        ("unplug_all_count", 1),
        ("state_count", 3),
        ("unplug_discard_fails", 0),
    ];
    for (name, count) in counters {
        assert_eq!(device.machine.counter(name), count, "{name}");
    }
}

#[test]
fn grants_no_more_than_is_requested() {
    let mut device = Device::new(4);
    assert_eq!(device.ask(PLUG, 0, 3), NACK);
    assert_eq!(device.ask(PLUG, 0, 1), ACK);
    assert_eq!(device.ask(PLUG, BLOCK, 2), NACK);
    assert_eq!(device.ask(PLUG, BLOCK, 1), ACK);
    assert_eq!(device.ask(PLUG, 2 * BLOCK, 1), NACK);
    // Less is requested than there is: the driver may give back, but plug nothing.
    device.request(0).unwrap();
    assert_eq!(device.ask(PLUG, 2 * BLOCK, 1), NACK);
    assert_eq!(device.ask(UNPLUG, BLOCK, 1), ACK);
    assert_eq!(device.sizes(), (SLOT, BLOCK, 0));
    // With all of it unplugged, nothing is usable any more.
    assert_eq!(device.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(device.sizes(), (0, 0, 0));
    assert_eq!(device.ask(PLUG, 0, 1), ERROR);
    assert_eq!(device.machine.counter("plug_fails"), 5);
}

#[test]
fn blocks_that_are_not_there_or_not_so_are_errors() {
    let mut device = Device::new(128);
    assert_eq!(device.ask(PLUG, BLOCK, 2), ACK);
    let below = 0u64.wrapping_sub(BLOCK);
    let cases = [
        (below, 1),
        (0u64.wrapping_sub(OWN.0), 1),
        (1, 1),
        (MIB, 1),
        (BLOCK + 1, 1),
        (4 * BLOCK, 0),
        (SLOT, 1),
        (SLOT - BLOCK, 2),
        (0, u16::MAX),
        (u64::MAX - OWN.0 + 1 - BLOCK, u16::MAX),
        (1 << 62, 1),
        (256 * MIB, 1),
    ];
    for (offset, blocks) in cases {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(device.ask(kind, offset, blocks), ERROR, "{kind}: {offset:#x} {blocks}");
        }
    }
    for (offset, blocks) in [(BLOCK, 1), (BLOCK, 2), (0, 2), (2 * BLOCK, 2), (0, 64)] {
        assert_eq!(device.ask(PLUG, offset, blocks), ERROR, "{offset:#x} {blocks}");
    }
    for (offset, blocks) in [(0, 1), (0, 2), (2 * BLOCK, 2), (3 * BLOCK, 1), (0, 64)] {
        assert_eq!(device.ask(UNPLUG, offset, blocks), ERROR, "{offset:#x} {blocks}");
    }
    for kind in [4, 100, u16::MAX] {
        assert_eq!(device.ask(kind, 0, 1), ERROR);
    }
    assert_eq!(device.sizes().1, 2 * BLOCK);
    assert_eq!(device.state(BLOCK, 2), 0);
}

#[test]
fn requests_without_room_for_an_answer_come_back_empty() {
    let mut device = Device::new(128);
    let (request, answer) = ((REQUEST, 24, false), (ANSWER, 10, true));
    let cases: [&[Buf]; 7] = [
        &[request],
        &[answer],
        &[answer, request],
        &[(REQUEST, 23, false), answer],
        &[request, (ANSWER, 9, true)],
        &[(HIGH.0 + HIGH.1, 24, false), answer],
        // Memory that is not plugged is none.
        &[(OWN.0, 24, false), answer],
    ];
    for (count, buffers) in (1..).zip(cases) {
        let (answer, _, used) = device.send(PLUG, OWN.0, 1, buffers);
        assert_eq!((answer, used), (UNTOUCHED, 0), "{buffers:?}");
        assert_eq!(device.machine.counter("queue_event_fails"), count);
    }
    assert_eq!(device.sizes().1, 0);
    // In plugged memory it is fine, until the driver unplugs the answer's own.
    assert_eq!(device.ask(PLUG, 0, 1), ACK);
    let answer = (OWN.0, 10, true);
    assert_eq!(device.send(STATE, OWN.0, 1, &[request, answer]).2, 10);
    assert_eq!(device.send(UNPLUG, OWN.0, 1, &[request, answer]).2, 0);
    assert_eq!(device.sizes().1, 0);
}

#[test]
fn a_host_that_has_no_more_is_busy() {
    let mut device = Device::new(256);
    device.shown.is_full.store(true, Ordering::Relaxed);
    assert_eq!(device.ask(PLUG, SLOT - BLOCK, 2), BUSY);
    assert_eq!(device.state(0, 128), 1);
    assert!(!device.reach(SLOT));
    device.shown.is_full.store(false, Ordering::Relaxed);
    assert_eq!(device.ask(PLUG, SLOT - BLOCK, 2), ACK);
}

#[test]
fn blocks_that_a_device_uses_are_not_unplugged() {
    let mut device = Device::new(256);
    assert_eq!(device.ask(PLUG, 0, 1), ACK);
    let mem = device.machine.mem.clone();
    let lease = mem.lease().unwrap();
    assert_eq!(device.ask(UNPLUG, 0, 1), BUSY);
    assert_eq!(device.ask(UNPLUG_ALL, 0, 0), BUSY);
    assert!(device.reach(0));
    drop(lease);
    assert_eq!(device.ask(UNPLUG, 0, 1), ACK);
}

/// Each of these waits for a device that does not give up what it uses. A pause waits for one.
#[test]
fn a_pause_does_not_wait_for_all_requests() {
    let mut device = Device::new(256);
    assert_eq!(device.ask(PLUG, 0, 1), ACK);
    let mem = device.machine.mem.clone();
    let lease = mem.lease().unwrap();
    mem.write_obj(UNPLUG, GuestAddress(REQUEST)).unwrap();
    for _ in 0..8 {
        device.ring.add(&[(REQUEST, 24, false), (ANSWER, 10, true)]);
    }
    device.machine.kick(&device.ring);
    while device.machine.counter("unplug_count") == 0 {
        std::thread::yield_now();
    }
    let transport = device.machine.transport.clone();
    transport.lock().unwrap().pause().unwrap();
    assert!(device.ring.used_idx() < 9, "all were served");
    drop(lease);
    transport.lock().unwrap().resume().unwrap();
    device.machine.finish(&device.ring, 9);
    assert!(!device.reach(0));
}

/// A slow host needs 1.2 s for this request. A pause waits for half a second.
#[test]
fn a_pause_does_not_wait_until_everything_is_unplugged() {
    let config = json!({"total_size_mib": 40 * 128});
    let mut device = Device::full(&config);
    // The first is a run of many slots: it is not unplugged at once either.
    assert_eq!(device.ask(PLUG, 0, 16 * 64), ACK);
    for slot in 16..40 {
        assert_eq!(device.ask(PLUG, slot * SLOT, 1), ACK);
    }
    device.shown.is_slow.store(true, Ordering::Relaxed);
    device.begin_unplug_all();
    let transport = device.machine.transport.clone();
    transport.lock().unwrap().pause().unwrap();
    device.shown.is_slow.store(false, Ordering::Relaxed);
    let left = device.sizes().1;
    assert!(left > 0, "it waited for all of it");
    assert_eq!(device.machine.mem.read_obj::<u16>(GuestAddress(ANSWER)).unwrap(), UNTOUCHED);
    // Whoever is restored goes on as well.
    let saved = transport.lock().unwrap().save();
    let other = Device::of(&config, Some(&saved));
    assert_eq!(other.sizes().1, left);
    for (addr, bytes) in pages_of(&device.machine.ram) {
        other.machine.ram.write_slice(&bytes, addr).unwrap();
    }
    other.machine.transport.lock().unwrap().resume().unwrap();
    transport.lock().unwrap().resume().unwrap();
    let count = device.count;
    let answers = [other, device].map(|mut device| {
        device.count = count;
        (device.answer(), device.sizes().1, device.shown.pieces().len())
    });
    assert_eq!(answers, [(ACK, 0, 0); 2]);
}

#[test]
fn a_request_that_is_served_in_turns_counts_once() {
    let mut device = Device::full(&json!({"total_size_mib": 8 * 128}));
    for slot in 0..8 {
        assert_eq!(device.ask(PLUG, slot * SLOT, 64), ACK);
    }
    device.shown.is_slow.store(true, Ordering::Relaxed);
    device.begin_unplug_all();
    device.machine.transport.lock().unwrap().pause().unwrap();
    device.machine.transport.lock().unwrap().resume().unwrap();
    assert_eq!(device.answer(), ACK);
    let counters = ["unplug_all_count", "unplug_all_agg", "unplug_all_fails", "unplug_count"];
    assert_eq!(counters.map(|name| device.machine.counter(name)), [1, 1, 0, 0]);
    assert_eq!(device.machine.counter("unplug_bytes"), 8 * SLOT);
}

#[test]
fn a_request_over_too_many_slots_is_busy() {
    let mut device = Device::full(&json!({"total_size_mib": 4096}));
    // 17 slots, of the last only a block.
    for (offset, blocks) in [(0, 16 * 64 + 1), (BLOCK, 16 * 64), (SLOT - BLOCK, 15 * 64 + 2)] {
        assert_eq!(device.ask(PLUG, offset, blocks), BUSY, "{offset:#x} {blocks}");
    }
    assert_eq!((device.sizes().1, device.shown.pieces().len()), (0, 0));
    assert_eq!(device.ask(PLUG, 0, 16 * 64), ACK);
    assert_eq!(device.ask(PLUG, 16 * SLOT, 64), ACK);
    assert_eq!(device.ask(UNPLUG, 0, 17 * 64), BUSY);
    assert_eq!((device.sizes().1, device.shown.pieces().len()), (17 * SLOT, 17));
    // To ask costs nothing.
    assert_eq!(device.state(0, 17 * 64), 0);
    assert_eq!(device.ask(UNPLUG, SLOT, 16 * 64), ACK);
    assert_eq!(device.ask(UNPLUG_ALL, 0, 0), ACK);
    // Slots that are large do not make more of it; a block can be had however large it is.
    let mut device = Device::full(&json!({"total_size_mib": 8192, "slot_size_mib": 8192}));
    assert_eq!(device.ask(PLUG, 0, 1025), BUSY);
    assert_eq!(device.ask(PLUG, 0, 1024), ACK);
    assert_eq!(device.ask(UNPLUG_ALL, 0, 0), ACK);
    let large = json!({"total_size_mib": 8192, "slot_size_mib": 4096, "block_size_mib": 4096});
    let mut device = Device::full(&large);
    assert_eq!(device.ask(PLUG, 0, 2), BUSY);
    assert_eq!(device.ask(PLUG, 0, 1), ACK);
    assert_eq!(device.ask(UNPLUG, 0, 1), ACK);
}

/// Tells the test that takes them all that nobody else is there.
const ALONE: &str = "HUSK_TEST_ALONE";

fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count()
}

/// A process has 65,530 mappings, also for the stacks of its threads.
#[test]
fn a_guest_cannot_use_up_the_mappings_of_the_process() {
    const RUNS: u64 = 16_384;
    // In a process of its own: others would go without.
    if std::env::var_os(ALONE).is_none() {
        let this = std::env::current_exe().unwrap();
        let test = "mem::a_guest_cannot_use_up_the_mappings_of_the_process";
        let run = Command::new(this).args(["--exact", test]).env(ALONE, "").output().unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
        return;
    }
    let mut device = Device::full(&json!({"total_size_mib": 6 * RUNS}));
    let before = mappings();
    // Each is written to while it is on its own: Linux does not join such when they meet.
    let plug = |device: &mut Device, block: u64| {
        let answer = device.ask(PLUG, block * BLOCK, 1);
        if answer == ACK {
            let at = GuestAddress(OWN.0 + block * BLOCK);
            device.machine.mem.write_obj(7u64, at).unwrap();
        }
        answer
    };
    let refused = (0..RUNS + 100).find(|n| plug(&mut device, 2 * n + 1) == BUSY).unwrap();
    assert_eq!(refused, RUNS);
    // Their neighbours cost nothing more, and give nothing back.
    for n in 1..1000 {
        assert_eq!(device.ask(PLUG, 2 * n * BLOCK, 1), ACK);
    }
    for n in 1..1000 {
        assert_eq!(plug(&mut device, 2 * (RUNS + n) + 1), BUSY);
    }
    let most = mappings() - before;
    assert!((30_000..34_000).contains(&most), "{most}");
    std::thread::Builder::new().spawn(|| ()).unwrap().join().unwrap();
    // What is there can go, piece by piece, and a pause may come in between.
    assert_eq!(device.ask(UNPLUG, BLOCK, 1), ACK);
    device.begin_unplug_all();
    device.machine.transport.lock().unwrap().pause().unwrap();
    device.machine.transport.lock().unwrap().resume().unwrap();
    assert_eq!(device.answer(), ACK);
    assert_eq!(device.machine.counter("unplug_discard_fails"), 0);
    assert!(mappings() < before + 100, "{}", mappings());
    // With what there was for them.
    assert_eq!(plug(&mut device, 2 * RUNS + 1), ACK);
    assert_eq!(device.machine.mem.read_obj::<u64>(GuestAddress(OWN.0 + BLOCK)).ok(), None);
    assert_eq!(device.ask(UNPLUG_ALL, 0, 0), ACK);
}

#[test]
fn a_drivers_reset_changes_nothing() {
    let mut device = Device::new(256);
    assert_eq!(device.ask(PLUG, BLOCK, 3), ACK);
    device.ring = device.machine.start(0).remove(0);
    device.count = 0;
    assert_eq!(device.sizes(), (256 * MIB, 3 * BLOCK, 256 * MIB));
    assert_eq!(device.state(BLOCK, 3), 0);
}

#[test]
fn a_machines_reset_unplugs_everything() {
    let mut device = Device::new(4);
    assert_eq!(device.ask(PLUG, 0, 2), ACK);
    let Device { machine, ring, .. } = device;
    drop(ring);
    let transport = Arc::clone(&machine.transport);
    drop(machine);
    let transport = Arc::into_inner(transport).unwrap().into_inner().unwrap();
    let shown = Arc::<Shown>::default();
    let machine =
        Machine::placed(transport.into_device().unwrap(), ram(), None, shown.clone()).unwrap();
    let ring = machine.start(0).remove(0);
    let mut device = Device { machine, ring, shown, count: 0 };
    // What was requested still is.
    assert_eq!(device.sizes(), (SLOT, 0, 4 * MIB));
    assert!(!device.reach(0));
    assert_eq!(device.ask(PLUG, 0, 2), ACK);
}

#[test]
fn what_was_plugged_is_saved() {
    let mut device = Device::new(200);
    assert_eq!(device.ask(PLUG, BLOCK, 1), ACK);
    assert_eq!(device.ask(PLUG, SLOT - BLOCK, 3), ACK);
    device.machine.transport.lock().unwrap().pause().unwrap();
    let saved = device.machine.transport.lock().unwrap().save();
    let other = Device::restored(Some(&saved));
    other.machine.transport.lock().unwrap().resume().unwrap();
    assert_eq!(other.sizes(), (256 * MIB, 4 * BLOCK, 200 * MIB));
    assert_eq!(other.shown.pieces().len(), 2);
    for n in 0..128 {
        assert_eq!(other.reach(n * BLOCK), device.reach(n * BLOCK), "block {n}");
    }
    let good = serde_json::to_value(&saved).unwrap();
    for plugged in [json!([[0, 129]]), json!([[u64::MAX, 2]]), json!([[1, 2], [2, 1]])] {
        let mut bad = good.clone();
        bad["memory"]["plugged"] = plugged;
        let bad: Saved = serde_json::from_value(bad).unwrap();
        let other = open("memory-hotplug", &json!({"total_size_mib": 256}));
        assert!(Machine::placed(other, ram(), Some(&bad), Arc::default()).is_err());
    }
}

/// A driver that has reset the device has not unplugged anything.
#[test]
fn what_is_plugged_is_saved_without_a_driver() {
    let mut device = Device::new(200);
    assert_eq!(device.ask(PLUG, BLOCK, 1), ACK);
    device.machine.set(0x70, 0);
    let saved = device.machine.transport.lock().unwrap().save();
    let other = Device::restored(Some(&saved));
    assert!(other.reach(BLOCK) && !other.reach(0));
}

#[test]
fn what_was_plugged_comes_back_when_the_machine_is_rewound() {
    let mut device = Device::new(200);
    assert_eq!(device.ask(PLUG, BLOCK, 1), ACK);
    assert_eq!(device.ask(PLUG, SLOT - BLOCK, 3), ACK);
    device.machine.transport.lock().unwrap().pause().unwrap();
    let saved = device.machine.transport.lock().unwrap().save();
    let ram = pages_of(&device.machine.ram);
    device.machine.transport.lock().unwrap().resume().unwrap();
    let (sizes, pieces) = (device.sizes(), device.shown.pieces().len());
    assert_eq!(device.ask(UNPLUG, BLOCK, 1), ACK);
    assert_eq!(device.ask(PLUG, 4 * BLOCK, 9), ACK);
    let mut transport = device.machine.transport.lock().unwrap();
    transport.pause().unwrap();
    transport.rewind(&saved).unwrap();
    // The rings go back with the device, or it would be asked the same again.
    for (addr, bytes) in ram {
        device.machine.ram.write_slice(&bytes, addr).unwrap();
    }
    transport.resume().unwrap();
    drop(transport);
    assert_eq!((device.sizes(), device.shown.pieces().len()), (sizes, pieces));
    let plugged = [1, 63, 64, 65];
    for n in 0..128 {
        assert_eq!(device.reach(n * BLOCK), plugged.contains(&n), "block {n}");
    }
}

#[test]
fn refuses_sizes_that_cannot_be() {
    let device = Device::new(0);
    for mib in [1, 3, 258, u64::MAX, 1 << 44] {
        let said = device.request(mib).unwrap_err().to_string();
        assert!(
            said.contains("must be a multiple of block size and less than the total"),
            "{said}"
        );
    }
    assert_eq!(device.sizes(), (0, 0, 0));
    for (config, words) in [
        (
            json!({"total_size_mib": 128, "block_size_mib": 1}),
            "Block size must not be lower than 2",
        ),
        (json!({"total_size_mib": 128, "block_size_mib": 6}), "Block size must be a power of 2"),
        (
            json!({"total_size_mib": 128, "slot_size_mib": 64}),
            "Slot size must not be lower than 128",
        ),
        (
            json!({"total_size_mib": 512, "slot_size_mib": 130, "block_size_mib": 4}),
            "Slot size must be a multiple of block size (4 MiB)",
        ),
        (json!({"total_size_mib": 64}), "Total size must not be lower than slot size (128 MiB)"),
        (json!({"total_size_mib": 129}), "Total size must be a multiple of slot size (128 MiB)"),
        (json!({"total_size_mib": 1u64 << 33}), "is more than"),
    ] {
        let said = refusal("memory-hotplug", &config);
        assert!(said.contains(words), "{config}: {said}");
    }
}
