//! Every device, driven by a bare-metal guest from one side and looked at from the other.
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::util::*;

const MIB: u64 = 1 << 20;

/// Byte `i` of what the guest `block` writes.
fn pattern(i: usize, seed: usize) -> u8 {
    (i * 7 + i / 512 + seed) as u8
}

#[test]
fn block_does_all_a_driver_can_ask() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 16 * MIB);
    let end = Husk::guest("block", "irq").disk(&disk).wait().ok();
    assert_eq!(end.value("sectors"), "32768");
    for done in ["read", "write", "verify", "flush", "discard", "zeroes"] {
        assert_eq!(end.value(done), "ok", "{done}\n{end}");
    }
    assert_eq!((end.value("range"), end.value("type")), ("refused", "unsupported"));
}

#[test]
fn block_does_the_same_with_io_uring() {
    let scratch = Scratch::new();
    let disk = format!("{},io=async", scratch.sparse("disk.img", 16 * MIB).display());
    let end = Husk::guest("block", "irq").option("--disk", &disk).wait().ok();
    for done in ["read", "write", "verify", "flush", "discard", "zeroes"] {
        assert_eq!(end.value(done), "ok", "{done}\n{end}");
    }
    assert_eq!((end.value("range"), end.value("type")), ("refused", "unsupported"));
    // Reads in flight, and a reset: none may touch memory after it.
    Husk::guest("reset", "rounds=5 resets=100").option("--disk", &disk).wait().ok();
}

#[test]
fn block_with_io_uring_is_paused_in_the_middle_of_requests() {
    let scratch = Scratch::new();
    let disk = format!("{},io=async", scratch.sparse("disk.img", 16 * MIB).display());
    let husk = Husk::guest("bench_block", "write scale=10").option("--disk", disk);
    let vm = husk.listening().start();
    vm.expect("name=rand4k-qd1");
    for _ in 0..20 {
        vm.api().patch("/vm", json!({"state": "Paused"})).done();
        vm.api().patch("/vm", json!({"state": "Resumed"})).done();
    }
    vm.wait().ok();
}

#[test]
fn block_writes_are_in_the_file() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 16 * MIB);
    let cmdline = "tests=write,flush at=1000 len=256K seed=3";
    Husk::guest("block", cmdline).disk(&disk).wait().ok();
    let bytes = fs::read(&disk).unwrap();
    let (start, len) = (1000 * 512, 256 << 10);
    assert!((0..len).all(|i| bytes[start + i] == pattern(i, 3)));
    assert!(bytes[..start].iter().chain(&bytes[start + len..]).all(|&b| b == 0));
}

#[test]
fn block_reads_what_is_in_the_file() {
    let scratch = Scratch::new();
    let mut bytes: Vec<u8> = (0..64 << 10).map(|i| pattern(i, 9)).collect();
    bytes.splice(0..0, *b"husktest");
    bytes.resize(MIB as usize, 0);
    bytes.rotate_left(8);
    // Sector 0 holds the start of the pattern, from sector 8 on it continues.
    let disk = scratch.file("disk.img", &bytes);
    let end = Husk::guest("block", "tests=read,verify at=0 len=64K seed=9").disk(&disk).wait().ok();
    assert_eq!(end.value("verify"), "ok");
    let first: String = bytes[..8].iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(end.value("sector0"), first);
}

#[test]
fn block_refuses_writes_to_a_read_only_drive() {
    let scratch = Scratch::new();
    let bytes: Vec<u8> = (0..MIB as usize).map(|i| pattern(i, 5)).collect();
    let disk = scratch.file("disk.img", &bytes);
    let end = Husk::guest("block", "").read_only_disk(&disk).wait().ok();
    assert_eq!(end.value("write"), "refused");
    assert_eq!(end.value("discard"), "not offered");
    assert!(fs::read(&disk).unwrap() == bytes, "the file has changed");
}

#[test]
fn block_reads_a_drive_whose_file_cannot_be_written() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", MIB);
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o400)).unwrap();
    Husk::guest("block", "tests=read").read_only_disk(&disk).wait().ok();
}

#[test]
fn block_discard_gives_space_back() {
    let scratch = Scratch::new();
    let disk = scratch.file("disk.img", vec![1; MIB as usize]);
    let before = fs::metadata(&disk).unwrap().blocks();
    Husk::guest("block", "tests=discard at=256 len=256K").disk(&disk).wait().ok();
    let after = fs::metadata(&disk).unwrap();
    assert_eq!(after.len(), MIB);
    assert_eq!(before - after.blocks(), (256 << 10) / 512);
}

#[test]
fn block_root_drive_comes_first() {
    let scratch = Scratch::new();
    let [a, b, c] = [1, 2, 3].map(|n| scratch.sparse(&format!("{n}.img"), n * MIB));
    for (nth, sectors) in [(0, "4096"), (1, "2048"), (2, "6144")] {
        let husk = Husk::guest("block", &format!("tests=id nth={nth}"));
        let husk = husk.disk(&a).option("--disk", format!("{},root", b.display()));
        let end = husk.disk(&c).wait().ok();
        assert_eq!(end.value("sectors"), sectors);
    }
}

#[test]
fn block_id_is_the_drives() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", MIB);
    let husk = Husk::guest("block", "tests=id");
    let end = husk.option("--disk", format!("{},id=scratch-1", disk.display())).wait().ok();
    assert_eq!(end.value("id"), "scratch-1 len=21");
}

#[test]
fn block_flush_is_offered_where_it_means_something() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", MIB);
    for (cache, flush) in [("writeback", "ok"), ("unsafe", "not offered")] {
        let husk = Husk::guest("block", "tests=flush");
        let husk = husk.option("--disk", format!("{},cache={cache}", disk.display()));
        assert_eq!(husk.wait().ok().value("flush"), flush);
    }
}

#[test]
fn block_device_of_the_host_serves_as_a_drive() {
    let scratch = Scratch::new();
    let device = LoopDevice::new(&scratch.sparse("disk.img", 4 * MIB));
    let end = Husk::guest("block", "seed=2").disk(&device.0).wait().ok();
    assert_eq!(end.value("sectors"), "8192");
    let written = "tests=verify seed=2";
    Husk::guest("block", "tests=write,flush seed=2").disk(&device.0).wait().ok();
    Husk::guest("block", written).read_only_disk(&device.0).wait().ok();
}

/// A loop device, detached when dropped.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn new(file: &Path) -> Self {
        let losetup = |args: &[&str], file: Option<&Path>| {
            let made = Command::new("losetup").args(args).args(file).output();
            let made = made.expect("losetup, of the package mount");
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            PathBuf::from(String::from_utf8(made.stdout).unwrap().trim())
        };
        // In a container, the kernel's next loop device may lack its file.
        let next = losetup(&["--find"], None);
        if let Some(number) = next.to_str().and_then(|path| path.strip_prefix("/dev/loop")) {
            // It is there, as a rule.
            let _ = Command::new("mknod").arg(&next).args(["b", "7", number]).output();
        }
        let path = losetup(&["--find", "--show"], Some(file));
        assert!(fs::metadata(&path).unwrap().file_type().is_block_device());
        Self(path)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // What is left then is a loop device that nobody uses.
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn block_reset_leaves_no_read_in_flight() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 16 * MIB);
    let end = Husk::guest("reset", "").disk(&disk).wait().ok();
    assert_eq!((end.value("rounds"), end.value("read")), ("20", "ok"));
}

#[test]
fn net_answers_pings() {
    let network = Network::with_tap();
    let husk = Husk::guest("net", "echoes=4").network(&network, ",mac=02:00:00:00:00:07");
    let vm = husk.start();
    vm.expect("ready=172.16.0.2");
    let pinged = network.run("ping", "-c 3 -i 0.2 -W 30 172.16.0.2");
    assert!(pinged.contains(" 3 received") || pinged.contains(" 3 packets received"), "{pinged}");
    let neighbours = network.ip("neigh");
    assert!(neighbours.contains("02:00:00:00:00:07"), "{neighbours}");
    network.run("ping", "-c 1 -W 30 172.16.0.2");
    let end = vm.wait().ok();
    assert_eq!(end.value("mac"), "02:00:00:00:00:07");
    assert_eq!(end.value("echoes"), "4");
}

#[test]
fn net_makes_up_no_address() {
    // Without the MAC feature the driver chooses: the guest takes its own.
    let network = Network::with_tap();
    let vm = Husk::guest("net", "").network(&network, "").start();
    assert_eq!(vm.expect("mac="), "mac=02:00:00:00:00:01");
    vm.expect("ready=");
    network.run("ping", "-c 1 -W 30 172.16.0.2");
    vm.wait().ok();
}

#[test]
fn net_merges_buffers_for_large_frames() {
    let network = Network::with_tap();
    network.ip("link set tap0 mtu 9000");
    let vm = Husk::guest("net", "echoes=2").network(&network, "").start();
    vm.expect("ready=");
    // Four of the guest's buffers.
    network.run("ping", "-c 2 -i 0.2 -s 8000 -M do -W 30 172.16.0.2");
    let end = vm.wait().ok();
    let bytes: u64 = end.value("bytes").parse().unwrap();
    assert!(bytes > 16000, "{end}");
}

#[test]
fn net_offers_the_mtu_that_was_given() {
    let network = Network::with_tap();
    for (more, is_offered) in [("", false), (",mtu=1400", true)] {
        let end = Husk::guest("regs", "light").network(&network, more).wait().ok();
        let features = u64::from_str_radix(&end.value("features")[2..], 16).unwrap();
        // VIRTIO_NET_F_MTU.
        assert_eq!(features >> 3 & 1 == 1, is_offered, "{end}");
    }
}

#[test]
fn net_interfaces_are_apart() {
    let network = Network::with_tap();
    network.ip("tuntap add tap1 mode tap");
    network.ip("addr add 172.16.1.1/24 dev tap1");
    network.ip("link set tap1 up");
    let husk = Husk::guest("net", "nth=1 ip=172.16.1.2").network(&network, "");
    let vm = husk.option("--net", "tap=tap1,mac=06:00:ac:10:01:02").start();
    vm.expect("ready=");
    network.run("ping", "-c 1 -W 30 172.16.1.2");
    assert_eq!(vm.wait().ok().value("mac"), "06:00:ac:10:01:02");
}

#[test]
fn net_survives_its_tap() {
    let network = Network::with_tap();
    let vm = Husk::guest("net", "timeout_ms=300000").network(&network, "").listening().start();
    vm.expect("ready=");
    network.ip("link del tap0");
    assert_eq!(vm.api().state(), "Running");
    // A thread that spins on the dead tap would use a tick a hundredth of a second.
    let before = cpu_ticks_of(&vm, "husk_io");
    vm.api().act("SendCtrlAltDel").done();
    for _ in 0..200 {
        assert_eq!(vm.api().state(), "Running");
    }
    assert!(cpu_ticks_of(&vm, "husk_io") - before <= 2);
    vm.api().act("Kill").done();
    vm.wait().code(0);
}

/// User and system time of a thread, by its name.
fn cpu_ticks_of(vm: &TestVm, name: &str) -> u64 {
    for task in fs::read_dir(format!("/proc/{}/task", vm.pid())).unwrap() {
        let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
        let (start, rest) = stat.rsplit_once(") ").unwrap();
        if start.ends_with(&format!("({name}")) {
            let fields: Vec<&str> = rest.split(' ').collect();
            return fields[11..13].iter().map(|f| f.parse::<u64>().unwrap()).sum();
        }
    }
    panic!("no thread {name}");
}

#[test]
fn net_flood_from_the_host_is_survived() {
    let network = Network::with_tap();
    let vm = Husk::guest("net", "echoes=1").network(&network, ",mac=02:00:00:00:00:07").start();
    vm.expect("ready=");
    network.ip("neigh add 172.16.0.2 lladdr 02:00:00:00:00:07 dev tap0");
    network.within(|| {
        let socket = UdpSocket::bind("172.16.0.1:0").unwrap();
        for _ in 0..5000 {
            // A full queue of the tap is an error here, and nothing to worry about.
            let _ = socket.send_to(&[7; 1000], "172.16.0.2:9");
        }
    });
    network.run("ping", "-c 5 -W 30 172.16.0.2");
    vm.wait().ok();
}

#[test]
fn rng_gives_entropy() {
    let end = Husk::guest("rng", "").arg("--rng").wait().ok();
    assert_eq!(end.value("bytes"), "70216");
}

#[test]
fn serial_is_a_16550() {
    let end = Husk::guest("serial", "").wait().ok();
    assert_eq!((end.value("registers"), end.value("loopback")), ("ok", "ok"));
}

#[test]
fn serial_output_of_a_flood_is_whole() {
    let end = Husk::guest("serial", "flood=2100").wait().ok();
    for (i, line) in end.output.lines().take(2100).enumerate() {
        assert_eq!(line, format!("{i:064}"));
    }
}

/// Types at a guest that echoes, by `connection`, and checks the echo.
fn converse(vm: &TestVm, connection: &mut (impl Read + Write)) {
    let mut output = String::new();
    let mut until = |connection: &mut dyn Read, text: &str| {
        let mut byte = [0];
        while !output.contains(text) {
            let read = connection.read(&mut byte).unwrap();
            assert_eq!(read, 1, "the end, after {output}\n{}", vm.errors.so_far());
            output.push(byte[0] as char);
        }
    };
    until(connection, "ready=1");
    connection.write_all(b"a").unwrap();
    until(connection, "input=61");
    // A terminal that were not raw would take these for itself.
    connection.write_all(b"\x03\x04\x1a").unwrap();
    until(connection, "1a\r\n");
    // What comes after this, the end of a terminal may cut off.
    connection.write_all(b"q").unwrap();
}

#[test]
fn serial_input_comes_from_standard_input() {
    for mode in ["polled", "irq"] {
        let vm = Husk::guest("serial", &format!("input={mode}")).typing().start();
        vm.expect("ready=1");
        vm.type_in("hello");
        vm.expect("input=");
        vm.type_in("q");
        let end = vm.wait().ok();
        assert_eq!(end.value("bytes"), "6");
        assert_eq!(end.values("input").concat(), "68656c6c6f71");
    }
}

#[test]
fn serial_input_of_any_length_is_whole() {
    let vm = Husk::guest("serial", "input=polled").typing().start();
    vm.expect("ready=1");
    // Much more than the port's FIFO holds.
    let typed: Vec<u8> = (0..4000).map(|i| b'a' + (i % 16) as u8).collect();
    vm.type_in(&typed);
    vm.type_in("q");
    let end = vm.wait().ok();
    let echoed = end.values("input").concat();
    let expected: String = typed.iter().chain(b"q").map(|b| format!("{b:02x}")).collect();
    assert!(echoed == expected, "{} bytes of {}", echoed.len() / 2, expected.len() / 2);
}

#[test]
fn serial_goes_on_when_input_ends() {
    let mut vm = Husk::guest("hello", "how=hang").typing().listening().start();
    vm.expect("how=hang");
    vm.end_input();
    assert_eq!(vm.api().state(), "Running");
    vm.api().act("Kill").done();
    vm.wait().code(0);
}

#[test]
fn serial_leads_to_a_file() {
    let scratch = Scratch::new();
    let file = scratch.path("serial.log");
    for boots in 1..=2 {
        let husk = Husk::guest("hello", "").serial(&format!("file={}", file.display()));
        let end = husk.wait().code(0);
        assert_eq!(end.output, "");
        // Appended to.
        let log = fs::read_to_string(&file).unwrap();
        assert_eq!(log.matches("RESULT ok").count(), boots, "{log}");
    }
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn serial_leads_to_a_fifo_without_a_reader() {
    let scratch = Scratch::new();
    let fifo = scratch.fifo("serial");
    Husk::guest("hello", "").serial(&format!("file={}", fifo.display())).wait().code(0);
}

#[test]
fn serial_leads_to_a_pty() {
    for mode in ["polled", "irq"] {
        let vm = Husk::guest("serial", &format!("input={mode}"))
            .serial("pty")
            .option("--log-level", "off")
            .start();
        let line = vm.expect_error("husk: serial console: /dev/pts/");
        let path = &line[line.find("/dev/pts/").unwrap()..];
        let mut pty = File::options().read(true).write(true).open(path).unwrap();
        converse(&vm, &mut pty);
        vm.wait().code(0);
    }
}

#[test]
fn serial_leads_to_a_socket() {
    let scratch = Scratch::new();
    let path = scratch.path("serial.sock");
    for mode in ["polled", "irq"] {
        let husk = Husk::guest("serial", &format!("input={mode}"));
        let vm = husk.serial(&format!("socket={}", path.display())).start();
        vm.expect_error(&format!("husk: serial console: {}", path.display()));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let mut socket = UnixStream::connect(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        converse(&vm, &mut socket);
        vm.wait().code(0);
        assert!(!path.exists());
    }
}

#[test]
fn serial_leads_nowhere() {
    let end = Husk::guest("hello", "").serial("none").wait().code(0);
    assert_eq!((end.output.as_str(), end.errors.as_str()), ("", ""));
}

#[test]
fn serial_reader_that_stops_or_leaves_costs_nothing() {
    // A pipe that nobody reads, a pipe whose reader is gone, a device that is always full.
    let (unread, full) = rustix::pipe::pipe().unwrap();
    let (gone, broken) = rustix::pipe::pipe().unwrap();
    drop(gone);
    let dev_full = File::options().write(true).open("/dev/full").unwrap();
    for output in [full.into(), broken.into(), dev_full] {
        let input = File::open("/dev/null").unwrap();
        Husk::guest("serial", "flood=2100").streams(input, output).wait().code(0);
    }
    drop(unread);
}

#[test]
fn unclaimed_ports_and_addresses_read_as_ones() {
    let end = Husk::guest("portscan", "step=97").wait().ok();
    assert_eq!((end.value("mismatches"), end.value("strings")), ("0", "ok"));
    assert_eq!(end.value("mmio"), "58");
    let end = Husk::guest("hello", "how=unclaimed").wait().ok();
    assert_eq!((end.value("mmio"), end.value("port")), ("0xffffffff", "0xff"));
}

#[test]
fn ports_of_devices_take_any_access() {
    // All there are, but for the serial port, by which the guest speaks, and what would end it.
    for range in ["from=0 to=0x60", "from=0x66 to=0x3f0", "from=0x400 to=0x1000"] {
        Husk::guest("portscan", &format!("{range} step=1 any")).wait().ok();
    }
}

#[test]
fn unclaimed_accesses_do_not_flood_the_log() {
    let husk = Husk::guest("portscan", "step=97").option("--log-level", "trace");
    let end = husk.wait().ok();
    assert!(end.errors.lines().count() < 100, "{end}");
}

/// A VM with every device there is.
pub(crate) fn with_all_devices(
    scratch: &Scratch,
    network: &Network,
    guest: &str,
    cmdline: &str,
) -> Husk {
    let disk = scratch.sparse("disk.img", 16 * MIB);
    let read_only = scratch.sparse("read-only.img", MIB);
    let ring = scratch.sparse("ring.img", MIB);
    let pmem = scratch.sparse("pmem.img", 2 * MIB);
    let husk = Husk::guest(guest, cmdline).disk(disk).read_only_disk(read_only).arg("--rng");
    let husk = husk.option("--rate-limit-group", "id=shared,ops=100000");
    let husk = husk.option("--disk", format!("{},io=async,group=shared", ring.display()));
    let husk = husk.option("--pmem", format!("{},group=shared", pmem.display()));
    let husk = husk.option("--hotplug-memory", "256").vsock(3, &scratch.path("all.sock"));
    let husk = husk.option("--balloon", "1,deflate-on-oom,stats=1,hinting,reporting");
    husk.network(network, ",mac=02:00:00:00:00:07,mtu=1500,mmds,tx-bw=100M,rx-group=shared")
}

#[test]
fn registers_follow_the_specification() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let end = with_all_devices(&scratch, &network, "regs", "").wait().ok();
    assert_eq!(end.value("devices"), "9");
    assert_eq!(end.values("features_ok_without_version_1"), ["false"; 9]);
}

#[test]
fn floods_are_survived() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    for mode in ["kick", "random seed=1", "random seed=2", "hole"] {
        with_all_devices(&scratch, &network, "hammer", &format!("mode={mode} ms=500")).wait().ok();
    }
}

#[test]
fn flooded_vm_still_answers() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let husk = with_all_devices(&scratch, &network, "hammer", "mode=random ms=3000000");
    let vm = husk.listening().start();
    for _ in 0..20 {
        vm.api().patch("/vm", r#"{"state": "Paused"}"#).done();
        assert_eq!(vm.api().state(), "Paused");
        vm.api().patch("/vm", r#"{"state": "Resumed"}"#).done();
    }
    vm.api().act("Kill").done();
    vm.wait().code(0);
}
