//! Whoever floods husk, its memory stays what it was: 5 MiB more are allowed, looked at every 10 ms.
//!
//! `HUSK_FLOOD_MS` says how long each lasts, for long runs: docs/evidence.md.
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::exit_truth::count;
use crate::util::*;

const GROWTH_MAX_KIB: u64 = 5 << 10;
const SAMPLE: Duration = Duration::from_millis(10);

fn length() -> Duration {
    Duration::from_millis(count("HUSK_FLOOD_MS", 3000))
}

/// Private memory of a process that is no file's, in KiB: its own, and what its guest has touched.
fn anonymous_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).expect("RssAnon")
}

/// Looks at its memory until the flood is over.
#[track_caller]
fn stays(what: &str, vm: &TestVm) {
    let (before, begin) = (anonymous_kib(vm.pid()), Instant::now());
    let (mut most, mut samples) = (before, 0);
    while begin.elapsed() < length() {
        assert!(vm.is_running(), "{what}: it has ended: {}", vm.errors.so_far());
        most = most.max(anonymous_kib(vm.pid()));
        samples += 1;
        std::thread::sleep(SAMPLE);
    }
    println!("{what}: {before} KiB, at most {most} KiB, {samples} samples in {:?}", length());
    assert!(most <= before + GROWTH_MAX_KIB, "{what}: {before} KiB have become {most}");
}

#[test]
fn serial_output_that_nobody_reads() {
    let scratch = Scratch::new();
    let fifo = scratch.fifo("stuck");
    // Kept open, so that there is a reader who does not read.
    let pipe = File::options().read(true).write(true).open(&fifo).unwrap();
    let husk = Husk::guest("hostile_cpu", "how=flood bytes=64G").memory(16);
    let husk = husk.streams(File::open("/dev/null").unwrap(), pipe.try_clone().unwrap());
    let vm = husk.listening().start();
    // The flood has begun when there is something of it.
    (&pipe).read_exact(&mut [0; 4096]).unwrap();
    stays("serial", &vm);
    assert_eq!(vm.api().state(), "Running");
}

#[test]
fn kicks_without_end() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk", 1 << 20);
    let vm = Husk::guest("hammer", "mode=kick ms=100000000").memory(16).disk(&disk);
    let vm = vm.listening().start();
    vm.expect_error("Activated");
    stays("kicks", &vm);
    assert_eq!(vm.api().state(), "Running");
}

/// Connects as often as it can, until told to stop; how often it did.
fn connects(socket: &Path, port: u32, stop: &AtomicBool) -> u64 {
    let (mut open, mut made) = (std::collections::VecDeque::new(), 0);
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut stream) = UnixStream::connect(socket) else {
            std::thread::yield_now();
            continue;
        };
        let _ = writeln!(stream, "CONNECT {port}");
        open.push_back(stream);
        made += 1;
        if open.len() > 500 {
            open.pop_front();
        }
    }
    made
}

/// To a guest that takes no connections: each is there until it is answered, given up, or has lasted too long.
#[test]
fn vsock_connects_without_end() {
    let scratch = Scratch::new();
    let socket = scratch.path("v.sock");
    let vm = Husk::guest("deaf", "").memory(16).vsock(77, &socket).listening().start();
    vm.expect("ready=1");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| connects(&socket, 1000, &stop));
        let over = Stop(&stop);
        stays("vsock", &vm);
        drop(over);
        let made = flood.join().unwrap();
        println!("vsock: {made} connections");
        assert!(made > 100, "only {made} connections");
    });
    assert_eq!(vm.api().state(), "Running");
}

/// A flood stops, whatever happens to who looks on.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn api_connections_without_end() {
    let vm = Husk::guest("hello", "how=hlt").memory(16).listening().start();
    vm.expect("how=hlt");
    for attack in ATTACKS.chunks(1).take(2) {
        under(vm.socket(), attack, || stays(attack[0].name, &vm));
    }
    let deadline = Instant::now() + PATIENCE;
    while ask(vm.socket(), 1).is_err() {
        assert!(Instant::now() < deadline, "it does not answer after the flood");
    }
}
