//! Streams between host and guest: by a bare-metal guest for what is much, by husk's own words for what is wrong.
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use crate::util::*;

const MUCH: usize = 100 << 20;

/// The socket of the host's port `port`.
fn port_of(socket: &Path, port: u32) -> PathBuf {
    PathBuf::from(format!("{}_{port}", socket.display()))
}

fn accept(listener: &UnixListener) -> UnixStream {
    patient(listener.accept().unwrap().0)
}

fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Connects to a port of the guest; the port of the host that the connection has.
fn connect(socket: &Path, port: u32) -> (UnixStream, u32) {
    let mut stream = patient(UnixStream::connect(socket).unwrap());
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut line = String::new();
    while !line.ends_with('\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0].into());
    }
    let host = line.strip_prefix("OK ").and_then(|port| port.trim_end().parse().ok());
    (stream, host.unwrap_or_else(|| panic!("{line:?}")))
}

/// The checksum of the guest `vsock`.
fn sum(bytes: &[u8]) -> String {
    let word = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    };
    let add = |sum: u64, word: u64| (sum.rotate_left(5) ^ word).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", bytes.chunks(8).map(word).fold(0, add))
}

#[test]
fn vsock_carries_much_from_the_guest() {
    let scratch = Scratch::new();
    let socket = scratch.path("v.sock");
    let listener = UnixListener::bind(port_of(&socket, 5000)).unwrap();
    let vm = Husk::guest("vsock", &format!("mode=up bytes={MUCH}")).vsock(77, &socket).start();
    let mut bytes = Vec::with_capacity(MUCH);
    accept(&listener).read_to_end(&mut bytes).unwrap();
    let end = vm.wait().ok();
    assert_eq!(end.value("cid"), "77");
    assert_eq!((end.value("bytes"), bytes.len()), (MUCH.to_string().as_str(), MUCH));
    assert_eq!(end.value("sum"), sum(&bytes));
    // It says where in the stream it is.
    let at = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    assert!(bytes.chunks(8).zip(0..).all(|(word, i)| word == at(i)));
    println!("from the guest: {} us, {}", end.value("us"), MUCH);
}

#[test]
fn vsock_carries_much_to_the_guest() {
    let scratch = Scratch::new();
    let socket = scratch.path("v.sock");
    let listener = UnixListener::bind(port_of(&socket, 6000)).unwrap();
    // A length that is no multiple of anything.
    let len = MUCH + 4321;
    let bytes: Vec<u8> =
        (0u32..).flat_map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()).take(len).collect();
    let vm = Husk::guest("vsock", "mode=down port=6000").vsock(3, &socket).start();
    let mut stream = accept(&listener);
    stream.write_all(&bytes).unwrap();
    drop(stream);
    let end = vm.wait().ok();
    assert_eq!(
        (end.value("bytes"), end.value("sum")),
        (len.to_string().as_str(), sum(&bytes).as_str())
    );
    println!("to the guest: {} us, {len}", end.value("us"));
}

#[test]
fn vsock_has_a_thousand_streams_each_way_at_once() {
    const STREAMS: u32 = 1000;
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let scratch = Scratch::new();
    let socket = scratch.path("v.sock");
    let listener = UnixListener::bind(port_of(&socket, 5000)).unwrap();
    let vm =
        Husk::guest("vsock", &format!("mode=many streams={STREAMS}")).vsock(3, &socket).start();
    let mut streams: Vec<_> = (0..STREAMS).map(|_| accept(&listener)).collect();
    vm.expect("ready");
    let asked: Vec<_> = (0..STREAMS).map(|_| connect(&socket, 1000)).collect();
    vm.expect("open=2000");
    let mut names: Vec<u32> = Vec::new();
    let mut echo = |stream: &mut UnixStream| {
        let mut name = [0; 4];
        stream.read_exact(&mut name).unwrap();
        stream.write_all(&name).unwrap();
        names.push(u32::from_le_bytes(name));
    };
    streams.iter_mut().for_each(&mut echo);
    for (mut stream, port) in asked {
        echo(&mut stream);
        streams.push(stream);
        assert!(((1 << 30)..(1 << 31)).contains(&port), "{port}");
    }
    for mut stream in streams {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 2000);
    assert_eq!(vm.wait().ok().value("gone"), "2000");
}

#[test]
fn vsock_socket_is_private_survives_a_reboot_and_goes_at_the_end() {
    let scratch = Scratch::new();
    let socket = scratch.path("v.sock");
    // Left over by one that was killed.
    drop(UnixListener::bind(&socket).unwrap());
    let listener = UnixListener::bind(port_of(&socket, 5000)).unwrap();
    let vm = Husk::guest("vsock", "mode=down reboot").vsock(3, &socket).listening().start();
    let mut first = accept(&listener);
    let found = std::fs::metadata(&socket).unwrap();
    assert!(found.file_type().is_socket() && found.mode() & 0o777 == 0o600);
    // The guest is in the middle of receiving: it reboots when it hears this.
    first.write_all(b"reboot!!").unwrap();
    assert_eq!(first.read(&mut [0]).unwrap(), 0, "its streams end with it");
    let mut second = accept(&listener);
    assert_eq!(std::fs::metadata(&socket).unwrap().ino(), found.ino());
    second.write_all(b"go on").unwrap();
    vm.api().patch("/vm", json!({"state": "Paused"})).done();
    second.set_nonblocking(true).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    vm.api().patch("/vm", json!({"state": "Resumed"})).done();
    second.write_all(b"!").unwrap();
    drop(second);
    let end = vm.wait().ok();
    assert_eq!((end.value("bytes"), end.value("sum")), ("6", sum(b"go on!").as_str()));
    assert!(!socket.exists());
}

#[test]
fn vsock_without_descriptors_lets_people_in_when_there_are_some() {
    let scratch = Scratch::new();
    let socket = scratch.path("v.sock");
    let listener = UnixListener::bind(port_of(&socket, 5000)).unwrap();
    let husk = Husk::guest("vsock", "mode=many streams=1").vsock(3, &socket);
    let vm = husk.after("ulimit -n 64").start();
    let mut first = accept(&listener);
    vm.expect("ready");
    let crowd: Vec<_> = (0..100).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    vm.expect_error("vsock: cannot accept a connection: Too many open files");
    drop(crowd);
    let (mut second, _) = connect(&socket, 1000);
    for stream in [&mut first, &mut second] {
        let mut name = [0; 4];
        stream.read_exact(&mut name).unwrap();
        stream.write_all(&name).unwrap();
    }
    let end = vm.wait().ok();
    assert!(end.errors.lines().count() < 20, "{end}");
}

#[test]
fn vsock_that_cannot_be_is_refused() {
    let scratch = Scratch::new();
    let (socket, file) = (scratch.path("v.sock"), scratch.file("file", "precious"));
    let refused = |vsock: String, code| {
        Husk::guest("hello", "").option("--vsock", vsock).wait().quickly().code(code).errors
    };
    for (cid, code) in [("2", 3), ("4294967295", 3), ("4294967296", 2), ("x", 2)] {
        let words = refused(format!("cid={cid},uds={}", socket.display()), code);
        assert!(words.contains("cid") && words.contains(cid), "{words}");
    }
    for words in ["cid=3", "uds=x", "cid=3,uds=", "cid=3,uds=x,id=y"] {
        refused(words.into(), 2);
    }
    let words = refused(format!("cid=3,uds={}", file.display()), 4);
    assert!(
        words.contains("vsock") && words.contains("uds_path") && words.contains("regular file"),
        "{words}"
    );
    let live = UnixListener::bind(&socket).unwrap();
    let words = refused(format!("cid=3,uds={}", socket.display()), 4);
    assert!(words.contains("another process is listening"), "{words}");
    drop(live);
    // Nothing is left of a check.
    Husk::check(guest("hello")).vsock(3, &socket).wait().code(0);
    assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket());
    assert_eq!(std::fs::read(file).unwrap(), b"precious");
}
