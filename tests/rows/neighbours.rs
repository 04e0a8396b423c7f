//! P10-P12: taps that change, peers of a vsock that come in crowds or find no socket, a process that does not get to run.
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use serde_json::json;

use super::subject::{Subject, differs, is_husks_alone};
use crate::util::*;

/// Down and up again, and of another MTU: the guest is reached afterwards, and the API answers all along.
#[test]
fn p10_tap_that_goes_down_and_changes() {
    let network = Network::with_tap();
    let subject = Subject::start_with("P10", |husk| husk.within(&network));
    let boot =
        json!({"kernel_image_path": guest("net"), "boot_args": "echoes=1 timeout_ms=300000"});
    let interface = json!({"iface_id": "eth0", "host_dev_name": "tap0"});
    let config = json!({"boot-source": boot, "network-interfaces": [interface]});
    let refusal = subject.refusal(&config);
    if refusal.is_some() {
        assert!(differs("P10"), "{refusal:?}");
        return;
    }
    if !subject.is_ready("ready=") {
        return;
    }
    for words in [
        "link set tap0 down",
        "link set tap0 up mtu 68",
        "link set tap0 mtu 65521",
        "link set tap0 down mtu 1500",
        "link set tap0 address 02:00:00:00:00:99",
        "link set tap0 up",
    ] {
        network.ip(words);
        assert_eq!(subject.ask("GET", "/", "").0, 200, "{words}");
    }
    // IPv6 goes with an MTU that is too small for it, the address stays or not.
    let shown = network.ip("addr show dev tap0");
    if !shown.contains("172.16.0.1") {
        network.ip("addr add 172.16.0.1/24 dev tap0");
    }
    network.run("ping", "-c 1 -W 30 172.16.0.2");
    subject.ends(0);
}

/// Many who say nothing, or nonsense, or more than there is to say, and leave or stay.
#[test]
fn p11_crowd_at_the_vsock() {
    const CROWD: usize = 10_000;
    if is_husks_alone("P11") {
        return;
    }
    let scratch = Scratch::new();
    let socket = scratch.path("v.sock");
    let listener = UnixListener::bind(format!("{}_5000", socket.display())).unwrap();
    let vm = Husk::guest("vsock", "mode=many streams=1").vsock(3, &socket).listening().start();
    let mut first = listener.accept().unwrap().0;
    vm.expect("ready");
    let files = || files_in(&format!("/proc/{}/fd", vm.pid()));
    let (before, before_kib) = (files(), resident_kib(vm.pid()).unwrap());
    let long = vec![b'C'; 8192];
    let words: [&[u8]; 8] = [
        b"",
        b"CONNECT",
        b"CONNECT\n",
        b"CONNECT x\n",
        b"CONNECT 99999999999\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xfe\n",
        &long,
    ];
    let mut staying = std::collections::VecDeque::new();
    for n in 0..CROWD {
        // Refused is as good as taken.
        let Ok(mut stream) = UnixStream::connect(&socket) else { continue };
        stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
        let _ = stream.write_all(words[n % words.len()]);
        staying.push_back(stream);
        if staying.len() > 200 {
            staying.pop_front();
        }
    }
    assert_eq!(vm.api().state(), "Running");
    drop(staying);
    crate::fork::wait_until(|| files() <= before);
    let kib = resident_kib(vm.pid()).unwrap();
    assert!(kib <= before_kib + (4 << 10), "{before_kib} KiB have become {kib}");
    // Who behaves is let in.
    let mut second = UnixStream::connect(&socket).unwrap();
    second.set_read_timeout(Some(PATIENCE)).unwrap();
    second.write_all(b"CONNECT 1000\n").unwrap();
    let mut answer = [0; 14];
    second.read_exact(&mut answer).unwrap();
    assert!(answer.starts_with(b"OK 1") && answer.ends_with(b"\n"), "{answer:?}");
    for stream in [&mut first, &mut second] {
        let mut name = [0; 4];
        stream.read_exact(&mut name).unwrap();
        stream.write_all(&name).unwrap();
    }
    vm.wait().ok();
}

/// Without its name the socket takes nobody any more; what is connected goes on, and nobody else's file is removed at
/// the end.
#[test]
fn p11_vsock_whose_socket_is_removed() {
    if is_husks_alone("P11") {
        return;
    }
    let scratch = Scratch::new();
    let socket = scratch.path("v.sock");
    let listener = UnixListener::bind(format!("{}_5000", socket.display())).unwrap();
    let vm = Husk::guest("vsock", "mode=down").vsock(3, &socket).listening().start();
    let mut stream = listener.accept().unwrap().0;
    std::fs::remove_file(&socket).unwrap();
    assert!(UnixStream::connect(&socket).is_err());
    std::fs::write(&socket, "precious").unwrap();
    stream.write_all(b"go on").unwrap();
    assert_eq!(vm.api().state(), "Running");
    drop(stream);
    let end = vm.wait().ok();
    assert_eq!(end.value("bytes"), "5");
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "precious");
}

/// It stands still for longer than any of its buckets takes to fill, and nothing is owed or given away for it.
#[test]
fn p12_stopped_for_a_while_it_goes_on() {
    if is_husks_alone("P12") {
        return;
    }
    let scratch = Scratch::new();
    let disk = format!("{},ops=200", scratch.sparse("disk.img", 1 << 20).display());
    let husk = Husk::guest("bench_limits", "warm_ms=1 ms=1 least=300").option("--disk", disk);
    let vm = husk.listening().start();
    vm.expect("begin");
    for _ in 0..3 {
        vm.signal(Signal::STOP);
        // What is tested is that time passes.
        std::thread::sleep(Duration::from_millis(400));
        vm.signal(Signal::CONT);
        assert_eq!(vm.api().state(), "Running");
    }
    let end = vm.wait().ok();
    let line = end.value("name");
    let value = |key: &str| -> f64 {
        let word = line.split(' ').find_map(|word| word.strip_prefix(key)).expect(key);
        word.parse().unwrap()
    };
    // 200 a second and the 20 of a full bucket at once; nothing for the time in which it stood still beyond that.
    let seconds = value("ns=") / 1e9;
    assert!(value("ops=") <= 200.0 * seconds + 4.0 * 20.0, "{line}");
}

/// Others want the processor a hundred times as much: it is late, and that is all.
#[test]
fn p12_starved_of_the_processor_it_goes_on() {
    if is_husks_alone("P12") {
        return;
    }
    let vm = Husk::guest("hello", "how=hang").by(["taskset", "-c", "0", "nice", "-n", "10"]);
    let vm = vm.listening().start();
    vm.expect("how=hang");
    let busy: Vec<_> = (0..10)
        .map(|_| {
            Busy(
                std::process::Command::new("taskset")
                    .args(["-c", "0", "yes"])
                    .stdout(std::process::Stdio::null())
                    .spawn()
                    .unwrap(),
            )
        })
        .collect();
    for state in ["Paused", "Resumed", "Paused", "Resumed"] {
        vm.api().patch("/vm", json!({ "state": state })).done();
    }
    assert_eq!(vm.api().state(), "Running");
    vm.api().act("Kill").done();
    drop(busy);
    vm.wait().code(0);
}

/// A process that is ended with it.
struct Busy(std::process::Child);

impl Drop for Busy {
    fn drop(&mut self) {
        // It has not ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
