//! Rate limits: what waits, what lets it go on, and what does not.
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::limiter::{Pool, RateLimiter, TokenBucket};
use devices::virtio::model::{Env, VirtioDevice};
use devices::virtio::{model, net};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{HIGH, Machine, Ring};
use crate::samples::{TempFile, packet_pair};

const BUFFER: u64 = HIGH.0 + 0x1_0000;
const HEADER: usize = 12;
/// So long that no token comes while a test runs.
const NEVER_MS: u64 = 1 << 40;
const DRIVE_WAITS: &str = "rate_limiter_throttled_events";
const ENTROPY_WAITS: &str = "entropy_rate_limiter_throttled";

fn device(model_name: &str, env: &Env, json: &Value) -> Box<dyn VirtioDevice> {
    let recipe = (model(model_name).unwrap().parse)(json.to_string().as_bytes()).unwrap();
    recipe.check().unwrap();
    recipe.open(env).unwrap()
}

fn entropy(limits: &Value) -> Machine {
    Machine::new(device("entropy", &Env::default(), limits))
}

fn bucket(size: u64, refill_time: u64) -> TokenBucket {
    TokenBucket { size, one_time_burst: None, refill_time }
}

fn group(ops: TokenBucket) -> (Env, Arc<Pool>) {
    let limits = RateLimiter { bandwidth: None, ops: Some(ops) };
    let pool = Arc::new(Pool::new(Some(&limits)));
    let mut env = Env::default();
    env.rate_limit_groups.insert("g".into(), pool.clone());
    (env, pool)
}

/// Offers `count` buffers of `len` bytes and kicks.
fn offer(machine: &Machine, ring: &mut Ring, count: u32, len: u32) {
    for _ in 0..count {
        ring.add(&[(BUFFER, len, true)]);
    }
    machine.kick(ring);
}

/// Waits until the device has looked at its queue again, and refused what is there.
fn refused(machine: &Machine, counter: &str) {
    let before = machine.counter(counter);
    for _ in 0..100_000 {
        if machine.counter(counter) > before {
            return;
        }
        machine.transport.lock().unwrap().pause().unwrap();
        machine.transport.lock().unwrap().resume().unwrap();
    }
    panic!("{counter} stays {before}");
}

fn wait(machine: &Machine, ring: &Ring, count: u16) {
    machine.irq.wait("used buffers", || ring.used_idx() == count);
}

#[test]
fn what_is_too_much_waits_and_the_timer_lets_it_go_on() {
    let m = entropy(&json!({"rate_limiter": {"ops": {"size": 4, "refill_time": 80}}}));
    let ring = &mut m.start(0)[0];
    let start = Instant::now();
    offer(&m, ring, 12, 16);
    wait(&m, ring, 12);
    // Four at once, one each 20 ms; a second kick is not needed.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(160), "{took:?}");
    let waits = m.counter(ENTROPY_WAITS);
    let wakes = m.counter("rate_limiter_event_count");
    assert!((1..=8).contains(&wakes), "nothing polls: {wakes}");
    // The driver's kick, and that of the activation, which may find what is offered already: then the other finds it
    // waiting.
    assert!(m.counter("entropy_event_count") <= 2);
    assert!((wakes..=wakes + 1).contains(&waits), "{waits} and {wakes}");
}

#[test]
fn bytes_are_limited_however_large_a_request() {
    let limit = json!({"bandwidth": {"size": 1000, "refill_time": 10, "one_time_burst": 3000}});
    let m = entropy(&json!({"rate_limiter": limit}));
    let ring = &mut m.start(0)[0];
    let start = Instant::now();
    // 4000 are there; the second leaves a debt of 4000, after which a third waits for 1000.
    offer(&m, ring, 3, 4000);
    wait(&m, ring, 3);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(50), "{took:?}");
    assert_eq!(m.counter("entropy_bytes"), 12_000);
}

#[test]
fn nothing_fills_a_bucket_but_time() {
    let limit = json!({"ops": {"size": 3, "refill_time": NEVER_MS}});
    let m = entropy(&json!({"rate_limiter": limit}));
    let ring = &mut m.start(0)[0];
    offer(&m, ring, 5, 16);
    wait(&m, ring, 3);
    // A pause.
    refused(&m, ENTROPY_WAITS);
    assert_eq!(ring.used_idx(), 3);
    // A reset by the guest.
    let ring = &mut m.start(0)[0];
    offer(&m, ring, 1, 16);
    refused(&m, ENTROPY_WAITS);
    assert_eq!(ring.used_idx(), 0);
}

/// A drive of 1 MiB.
struct Drive {
    machine: Machine,
    ring: Ring,
    _file: TempFile,
}

impl Drive {
    fn new(env: &Env, limits: &Value) -> Self {
        let file = TempFile::new(&[7; 1 << 20]);
        let mut json =
            json!({"drive_id": "disk", "is_root_device": false, "path_on_host": file.path});
        json.as_object_mut().unwrap().extend(limits.as_object().unwrap().clone());
        let machine = Machine::new(device("drives", env, &json));
        let ring = machine.start(machine.features() & !(1 << 29)).remove(0);
        Self { machine, ring, _file: file }
    }

    /// Offers `count` reads of `len` bytes and kicks.
    fn read(&mut self, count: u32, len: u32) {
        self.machine.mem.write_slice(&[0; 16], GuestAddress(HIGH.0)).unwrap();
        for _ in 0..count {
            let status = (HIGH.0 + 0x800, 1, true);
            self.ring.add(&[(HIGH.0, 16, false), (BUFFER, len, true), status]);
        }
        self.machine.kick(&self.ring);
    }

    /// Offers a request that zeroes sectors, and kicks.
    fn zero(&mut self, sectors: u32) {
        let mem = &self.machine.mem;
        mem.write_slice(&[0; 32], GuestAddress(HIGH.0 + 0x100)).unwrap();
        mem.write_obj(13u32, GuestAddress(HIGH.0 + 0x100)).unwrap();
        mem.write_obj(sectors, GuestAddress(HIGH.0 + 0x118)).unwrap();
        self.ring.add(&[(HIGH.0 + 0x100, 32, false), (HIGH.0 + 0x801, 1, true)]);
        self.machine.kick(&self.ring);
    }

    fn update(&self, limiter: &Value) {
        let patch = json!({"drive_id": "disk", "rate_limiter": limiter});
        let row = model("drives").unwrap();
        let patch = (row.patch.unwrap().parse)(patch.to_string().as_bytes()).unwrap();
        self.machine.transport.lock().unwrap().update(None, &patch).unwrap();
    }

    fn wait(&self, count: u16) {
        wait(&self.machine, &self.ring, count);
    }
}

#[test]
fn a_change_lets_a_drive_that_waits_go_on() {
    for engine in ["Sync", "Async"] {
        change_a_drive_that_waits(engine);
    }
}

fn change_a_drive_that_waits(engine: &str) {
    let limits = json!({"io_engine": engine, "rate_limiter": {
        "ops": {"size": 1, "refill_time": NEVER_MS},
        "bandwidth": {"size": 4096, "refill_time": NEVER_MS},
    }});
    let mut drive = Drive::new(&Env::default(), &limits);
    drive.read(3, 4096);
    drive.wait(1);
    // One of the two stays, and holds.
    drive.update(&json!({"ops": {"size": 0, "refill_time": 0}}));
    refused(&drive.machine, DRIVE_WAITS);
    assert_eq!(drive.ring.used_idx(), 1);
    // A new bucket is full.
    drive.update(&json!({"bandwidth": {"size": 4096, "refill_time": NEVER_MS}}));
    drive.wait(2);
    refused(&drive.machine, DRIVE_WAITS);
    assert_eq!(drive.ring.used_idx(), 2);
    drive.update(&json!({}));
    refused(&drive.machine, DRIVE_WAITS);
    assert_eq!(drive.ring.used_idx(), 2);
    drive.update(&json!({"bandwidth": {"size": 5, "refill_time": 0}}));
    drive.wait(3);
    assert!(drive.machine.counter("rate_limiter_throttled_events") >= 3);
    // And back again.
    drive.update(&json!({"ops": {"size": 1, "refill_time": NEVER_MS}}));
    drive.read(2, 512);
    drive.wait(4);
    refused(&drive.machine, DRIVE_WAITS);
    assert_eq!(drive.ring.used_idx(), 4);
    assert_eq!(drive.machine.counter("read_count"), 4);
}

#[test]
fn zeroes_cost_what_is_zeroed_and_bad_requests_nothing() {
    let limits = json!({"rate_limiter": {"bandwidth": {"size": 8192, "refill_time": NEVER_MS}}});
    let mut drive = Drive::new(&Env::default(), &limits);
    drive.zero(1 << 20);
    drive.wait(1);
    assert_eq!(drive.machine.counter("invalid_reqs_count"), 1);
    drive.zero(16);
    drive.wait(2);
    assert_eq!(drive.machine.counter("write_zeroes_count"), 1);
    drive.read(1, 512);
    refused(&drive.machine, DRIVE_WAITS);
    assert_eq!(drive.ring.used_idx(), 2);
}

#[test]
fn a_group_is_shared_across_threads() {
    let (env, pool) = group(bucket(10, NEVER_MS));
    let in_group = json!({"rate_limit_group": "g"});
    let mut drive = Drive::new(&env, &in_group);
    let rng = Machine::new(device("entropy", &env, &in_group));
    let ring = &mut rng.start(0)[0];
    drive.read(4, 512);
    drive.wait(4);
    offer(&rng, ring, 8, 16);
    wait(&rng, ring, 6);
    drive.read(1, 512);
    refused(&drive.machine, DRIVE_WAITS);
    refused(&rng, ENTROPY_WAITS);
    assert_eq!((drive.ring.used_idx(), ring.used_idx()), (4, 6));
    // Live, and on whichever thread one waits: three more, of the three that are wanted.
    pool.update(&RateLimiter { bandwidth: None, ops: Some(bucket(3, NEVER_MS)) });
    drive.wait(5);
    wait(&rng, ring, 8);
    offer(&rng, ring, 1, 16);
    refused(&rng, ENTROPY_WAITS);
    assert_eq!(ring.used_idx(), 8);
    // Who goes holds nobody up.
    drive.read(1, 512);
    refused(&drive.machine, DRIVE_WAITS);
    drop(rng);
    pool.update(&RateLimiter { bandwidth: None, ops: Some(bucket(0, 0)) });
    drive.wait(6);
}

#[test]
fn a_group_and_limits_of_its_own_both_hold() {
    let (env, _pool) = group(bucket(2, NEVER_MS));
    let limits = json!({
        "rate_limit_group": "g",
        "rate_limiter": {"bandwidth": {"size": 1000, "refill_time": NEVER_MS}},
    });
    let one = Machine::new(device("entropy", &env, &limits));
    let ring = &mut one.start(0)[0];
    offer(&one, ring, 3, 400);
    wait(&one, ring, 2);
    refused(&one, ENTROPY_WAITS);
    assert_eq!(ring.used_idx(), 2);
    let other = Machine::new(device("entropy", &env, &json!({"rate_limit_group": "g"})));
    let ring = &mut other.start(0)[0];
    offer(&other, ring, 1, 16);
    refused(&other, ENTROPY_WAITS);
    assert_eq!(ring.used_idx(), 0, "the group's operations are used up");
}

#[test]
fn a_group_that_is_not_there_is_refused() {
    for (name, field, json) in [
        ("entropy", "rate_limit_group", json!({"rate_limit_group": "x"})),
        (
            "drives",
            "rate_limit_group",
            json!({"drive_id": "a", "is_root_device": false, "path_on_host": "/dev/null",
                   "rate_limit_group": "x"}),
        ),
    ] {
        let recipe = (model(name).unwrap().parse)(json.to_string().as_bytes()).unwrap();
        assert_eq!(recipe.rate_limit_groups(), [(field, "x")]);
        let e = recipe.open(&Env::default()).unwrap_err().to_string();
        let want = "rate_limit_group: there is no rate limit group \"x\": \
                    PUT /rate-limit-groups/x first, or give --rate-limit-group";
        assert_eq!(e, want);
        assert_eq!(recipe.to_json()["rate_limit_group"], "x");
    }
    let (ours, _peer) = packet_pair();
    let config =
        net::Config { tx_rate_limit_group: Some("x".into()), ..net::Config::new("eth0", "unused") };
    let e = net::Net::from_fd(&config, &Env::default(), ours).unwrap_err().to_string();
    assert!(e.starts_with("tx_rate_limit_group: "), "{e}");
}

/// An interface with limits, and the other end of its wire.
struct Wire {
    machine: Machine,
    rx: Ring,
    tx: Ring,
    peer: OwnedFd,
}

impl Wire {
    fn new(rx: Option<RateLimiter>, tx: Option<RateLimiter>) -> Self {
        let (ours, peer) = packet_pair();
        let config = net::Config {
            rx_rate_limiter: rx,
            tx_rate_limiter: tx,
            ..net::Config::new("eth0", "unused")
        };
        let device = net::Net::from_fd(&config, &Env::default(), ours).unwrap();
        let machine = Machine::new(Box::new(device));
        let mut rings = machine.start(0);
        let (tx, rx) = (rings.pop().unwrap(), rings.pop().unwrap());
        Self { machine, rx, tx, peer }
    }

    fn send_to_guest(&self, len: usize) {
        let packet = vec![0; HEADER + len];
        assert_eq!(send(&self.peer, &packet, SendFlags::empty()).unwrap(), packet.len());
    }

    fn transmit(&mut self, count: u32, len: u32) {
        for _ in 0..count {
            self.tx.add(&[(BUFFER, 12 + len, false)]);
        }
        self.machine.kick(&self.tx);
    }

    fn update(&self, patch: Value) {
        let row = model("network-interfaces").unwrap();
        let patch = (row.patch.unwrap().parse)(patch.to_string().as_bytes()).unwrap();
        self.machine.transport.lock().unwrap().update(None, &patch).unwrap();
    }
}

fn limit(bandwidth: Option<TokenBucket>, ops: Option<TokenBucket>) -> Option<RateLimiter> {
    Some(RateLimiter { bandwidth, ops })
}

#[test]
fn frames_of_the_guest_wait_and_none_is_lost() {
    let mut wire = Wire::new(None, limit(Some(bucket(2000, 20)), None));
    let start = Instant::now();
    wire.transmit(8, 1000);
    wait(&wire.machine, &wire.tx, 8);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(60), "{took:?}");
    let waits = wire.machine.counter("tx_rate_limiter_throttled");
    assert!((1..=6).contains(&waits), "{waits}");
    assert_eq!(wire.machine.counter("tx_rate_limiter_event_count"), waits, "nothing polls");
    let mut packet = [0; 2000];
    for _ in 0..8 {
        let (_, len) = recv(&wire.peer, &mut packet, RecvFlags::DONTWAIT).unwrap();
        assert_eq!(len, HEADER + 1000);
    }
    assert_eq!(wire.machine.counter("tx_packets_count"), 8);
}

#[test]
fn frames_to_the_guest_are_paid_for_when_their_length_is_known() {
    let mut wire = Wire::new(limit(Some(bucket(100, 10)), None), None);
    for _ in 0..4 {
        wire.rx.add(&[(BUFFER, 2048, true)]);
    }
    wire.machine.kick(&wire.rx);
    let start = Instant::now();
    for _ in 0..4 {
        wire.send_to_guest(400);
    }
    wait(&wire.machine, &wire.rx, 4);
    // 100 of the first are there; the rest of three, and a token for the fourth, come at 10 a ms.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(110), "{took:?}");
    // After the fourth it may look once more.
    let events = wire.machine.counter("rx_event_rate_limiter_count");
    assert!((3..=4).contains(&events), "{events}");
    assert!(wire.machine.counter("rx_rate_limiter_throttled") >= 3);
    assert_eq!(wire.machine.counter("rx_bytes_count"), 1600);
}

#[test]
fn both_directions_change_by_themselves() {
    let never = || limit(None, Some(bucket(1, NEVER_MS)));
    let mut wire = Wire::new(never(), never());
    for _ in 0..3 {
        wire.rx.add(&[(BUFFER, 2048, true)]);
        wire.send_to_guest(60);
    }
    wire.machine.kick(&wire.rx);
    wait(&wire.machine, &wire.rx, 1);
    wire.transmit(3, 60);
    wait(&wire.machine, &wire.tx, 1);
    wire.update(json!({"iface_id": "eth0",
                       "rx_rate_limiter": {"ops": {"size": 0, "refill_time": 1}}}));
    wait(&wire.machine, &wire.rx, 3);
    refused(&wire.machine, "tx_rate_limiter_throttled");
    assert_eq!(wire.tx.used_idx(), 1);
    wire.update(json!({"iface_id": "eth0",
                       "tx_rate_limiter": {"ops": {"size": 1, "refill_time": 1}}}));
    wait(&wire.machine, &wire.tx, 3);
}
