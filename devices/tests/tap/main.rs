//! virtio-net over real taps, in a network namespace of the test's own. Where one cannot be had the
//! tests fail, rather than let it be believed that they ran.
//!
//! A binary of its own, one test at a time: to run `ip` is to fork, and until the child is replaced
//! it has a copy of every descriptor, so that a tap or a locked file is in use a little longer.
#[path = "../virtio/driver.rs"]
#[expect(dead_code, reason = "the other test binary uses all of it")]
mod driver;

use std::net::UdpSocket;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::virtio::model::{Env, Model};
use devices::virtio::net::Net;
use devices::virtio::{model, net};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use driver::{F_EVENT_IDX, HIGH, Machine, Ring};

const RX: u64 = HIGH.0;
const TX: u64 = HIGH.0 + 0x8_0000;
const F_CSUM: u64 = 1 << 0;
const F_MRG_RXBUF: u64 = 1 << 15;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Moves this thread, and those it starts, to an empty network.
fn enter_empty_network() -> MutexGuard<'static, ()> {
    let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    #[expect(unsafe_code, reason = "unshare")]
    // SAFETY: the network namespace of a thread is nothing that its memory safety depends on.
    let result = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
    let can_make_taps = || std::path::Path::new("/dev/net/tun").exists() && ip("link set lo up");
    assert!(result.is_ok() && can_make_taps(), "needs root, /dev/net/tun and iproute2");
    // The host must say nothing that it is not asked to say.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    turn
}

fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).status().is_ok_and(|s| s.success())
}

fn config() -> serde_json::Value {
    json!({"iface_id": "eth0", "host_dev_name": "tap0"})
}

fn check() -> Result<(), String> {
    let recipe = (model("network-interfaces").unwrap().parse)(config().to_string().as_bytes());
    recipe.unwrap().check().map_err(|e| e.to_string())
}

struct Guest {
    machine: Machine,
    rx: Ring,
    tx: Ring,
}

/// A guest on tap0, whose host has 10.0.0.1 and believes that the guest has 10.0.0.2.
fn guest(features: u64) -> Guest {
    let config = serde_json::from_value(config()).unwrap();
    let device = Net::open(&config, &Env::default()).unwrap();
    wait_for_link();
    let machine = Machine::new(Box::new(device));
    let mut rings = machine.start(machine.features() & !F_EVENT_IDX & features);
    let (tx, rx) = (rings.pop().unwrap(), rings.pop().unwrap());
    Guest { machine, rx, tx }
}

/// Waits until the host has noticed that the tap has a carrier. It does so on its own time, and drops
/// what is sent before. `ip` asks under the lock that is held meanwhile.
fn wait_for_link() {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let shown = Command::new("ip").args(["-oneline", "link", "show", "tap0"]).output();
        if String::from_utf8_lossy(&shown.unwrap().stdout).contains("state UP") {
            return;
        }
        assert!(Instant::now() < deadline, "the tap has no carrier");
    }
}

fn make_tap() {
    assert!(ip("tuntap add tap0 mode tap"));
    assert!(ip("addr add 10.0.0.1/24 dev tap0"));
    assert!(ip("link set tap0 up"));
    assert!(ip("neigh replace 10.0.0.2 lladdr 06:00:00:00:00:02 dev tap0"));
}

impl Guest {
    /// The guest sends `len` bytes after the header given.
    fn transmit(&mut self, header: [u8; 12], len: usize) {
        // To everybody, of a type that nobody knows.
        let frame = [vec![0xff; 6], vec![6, 0, 0, 0, 0, 2, 0x88, 0xb5], vec![0; len - 14]].concat();
        self.machine.mem.write_slice(&header, GuestAddress(TX)).unwrap();
        self.machine.mem.write_slice(&frame, GuestAddress(TX + 12)).unwrap();
        self.tx.add(&[(TX, u32::try_from(12 + len).unwrap(), false)]);
        self.machine.finish(&self.tx, self.tx.used_idx() + 1);
    }

    fn counter(&self, name: &str) -> u64 {
        self.machine.counter(name)
    }
}

#[test]
fn moves_frames_both_ways() {
    let _turn = enter_empty_network();
    make_tap();
    for features in [0, F_MRG_RXBUF, u64::MAX] {
        let mut guest = guest(features);
        assert_ne!(guest.machine.features() & F_CSUM, 0);
        let host = UdpSocket::bind("10.0.0.1:0").unwrap();
        guest.rx.add(&[(RX, 64, true)]);
        guest.rx.add(&[(RX + 64, 2000, true)]);
        guest.rx.add(&[(RX + 4096, 2000, true)]);
        guest.machine.kick(&guest.rx);
        // What does not fit one buffer is spread over several, or dropped where it may not be.
        host.send_to(&[0xab; 1000], "10.0.0.2:9").unwrap();
        let len = 12 + 14 + 20 + 8 + 1000;
        if features & F_MRG_RXBUF != 0 {
            guest.machine.irq.wait("a frame", || guest.rx.used_idx() == 2);
            assert_eq!((guest.rx.used_entry(0).1, guest.rx.used_entry(1).1), (64, len - 64));
            let start: [u8; 32] = guest.machine.mem.read_obj(GuestAddress(RX)).unwrap();
            assert_eq!(start[10..12], [2, 0]);
            assert_eq!(start[12..18], [6, 0, 0, 0, 0, 2]);
            let end: u8 =
                guest.machine.mem.read_obj(GuestAddress(RX + u64::from(len) - 1)).unwrap();
            assert_eq!(end, 0xab);
        } else {
            host.send_to(&[0xcd; 10], "10.0.0.2:9").unwrap();
            guest.machine.irq.wait("a frame", || guest.rx.used_idx() == 1);
            assert_eq!(guest.rx.used_entry(0).1, 12 + 14 + 20 + 8 + 10);
            assert_eq!(guest.counter("rx_fails"), 1);
        }
        guest.transmit([0; 12], 60);
        assert_eq!((guest.counter("tx_packets_count"), guest.counter("tap_write_fails")), (1, 0));
    }
}

#[test]
fn refuses_bad_headers_and_taps_that_are_down() {
    let _turn = enter_empty_network();
    make_tap();
    let mut guest = guest(u64::MAX);
    let bad: [[u8; 12]; 4] = [
        // A checksum past the end.
        [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
        // An unknown kind of segmentation.
        [1, 0x7f, 0, 0, 100, 0, 14, 0, 6, 0, 0, 0],
        // Segments without a size.
        [1, 1, 54, 0, 0, 0, 14, 0, 6, 0, 0, 0],
        [0xff; 12],
    ];
    for header in bad {
        guest.transmit(header, 60);
    }
    assert_eq!((guest.counter("tap_write_fails"), guest.counter("tx_packets_count")), (4, 0));
    assert!(ip("link set tap0 down"));
    guest.transmit([0; 12], 60);
    assert_eq!((guest.counter("tap_write_fails"), guest.counter("tap_gone")), (5, 0));
    assert!(ip("link set tap0 up"));
    guest.transmit([0; 12], 60);
    assert_eq!(guest.counter("tx_packets_count"), 1);
}

#[test]
fn says_what_is_wrong_with_a_tap() {
    let _turn = enter_empty_network();
    assert!(check().unwrap_err().contains("tap 'tap0' does not exist"));
    make_tap();
    check().unwrap();
    check().unwrap();
    let guest = guest(0);
    let e = check().unwrap_err();
    assert!(e.contains("tap 'tap0' is in use"), "{e}");
    drop(guest);
    check().unwrap();
    for kind in ["tuntap add tap0 mode tun", "tuntap add tap0 mode tap multi_queue"] {
        assert!(ip("link del tap0") && ip(kind), "{kind}");
        let e = check().unwrap_err();
        assert!(e.contains("'tap0' is not a tap"), "{kind}: {e}");
    }
}

#[test]
fn a_tap_that_is_deleted_leaves_the_guest_alone() {
    let _turn = enter_empty_network();
    make_tap();
    let mut guest = guest(u64::MAX);
    guest.rx.add(&[(RX, 2000, true)]);
    guest.machine.kick(&guest.rx);
    assert!(ip("link del tap0"));
    guest.transmit([0; 12], 60);
    guest.transmit([0; 12], 60);
    assert_eq!(guest.counter("tap_write_fails"), 2);
    assert_eq!((guest.counter("tap_gone"), guest.machine.status()), (1, 15));
    guest.machine.transport.lock().unwrap().pause().unwrap();
    guest.machine.transport.lock().unwrap().resume().unwrap();
    guest.machine.set(0x70, 0);
    guest.machine.start(0);
    // A new one of the same name is another tap.
    make_tap();
    check().unwrap();
}

#[test]
fn refuses_a_descriptor_that_is_attached_to_nothing() {
    let _turn = enter_empty_network();
    let fd = std::fs::File::open("/dev/net/tun").unwrap();
    let config = net::Config::new("eth0", "tap0");
    assert!(Net::from_fd(&config, &Env::default(), fd.into()).is_err());
}
