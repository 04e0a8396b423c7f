//! P1, P3, P4: sockets that are contended, signals, SIGKILL.
use std::os::unix::net::UnixListener;
use std::process::Command;

use serde_json::json;

use super::subject::{Subject, differs, is_husks_alone};
use crate::util::*;

/// Signals that stop husk, with the exit code: SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXCPU.
const STOP: [(i32, i32); 5] = [(1, 143), (2, 130), (3, 143), (15, 143), (24, 143)];
/// Those that mean that it has crashed: SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGSYS.
const CRASH: [i32; 7] = [4, 5, 6, 7, 8, 11, 31];
/// SIGKILL, SIGSTOP, SIGTTIN, which stops as that one does, and those that the C library keeps for itself.
const NOT_ITS: [i32; 5] = [9, 19, 21, 32, 33];
const LAST: i32 = 64;

/// Sends any signal, by its number.
fn send(vm: &TestVm, signal: i32) {
    let words = [format!("-{signal}"), vm.pid().to_string()];
    let sent =
        Command::new("/bin/kill").args(words).status().expect("kill, of util-linux or procps");
    assert!(sent.success(), "{signal}");
}

fn others() -> impl Iterator<Item = i32> {
    (1..=LAST).filter(|signal| {
        !STOP.iter().any(|(stop, _)| stop == signal)
            && !CRASH.contains(signal)
            && !NOT_ITS.contains(signal)
    })
}

/// Before a guest runs and while it does.
#[test]
fn p03_signals_that_mean_nothing_change_nothing() {
    // It serves, and so has taken its signals.
    let start = || {
        let subject = Subject::start("P3");
        subject.ask("GET", "/", "");
        subject
    };
    let mut subject = start();
    let mut deadly = Vec::new();
    for is_started in [false, true] {
        for signal in others() {
            if is_started && subject.ask("GET", "/", "").1.contains("Not started") {
                let boot = json!({"kernel_image_path": guest("hello"), "boot_args": "how=hang"});
                let refusal = subject.refusal(&json!({ "boot-source": boot }));
                assert!(refusal.is_none() || differs("P3"), "{refusal:?}");
            }
            send(subject.vm(), signal);
            // It has come when the next request is answered, for it goes to a thread before that.
            let is_alive = subject.api().try_request(("GET", "/", ""), PATIENCE).is_ok();
            if !is_alive {
                deadly.push((is_started, signal));
                subject = start();
            }
        }
    }
    println!("P3: {} signals, of which these end it: {deadly:?}", 2 * others().count());
    assert!(deadly.is_empty() || differs("P3"), "{deadly:?}");
    for stop in [19, 21] {
        send(subject.vm(), stop);
        send(subject.vm(), 18);
    }
    assert_eq!(subject.ask("GET", "/", "").0, 200);
}

#[test]
fn p03_signals_that_stop_it_remove_the_socket() {
    if is_husks_alone("P3") {
        return;
    }
    let with_guest = Husk::guest("hello", "how=hlt").listening().start();
    with_guest.expect("how=hlt");
    // The guest's own end is waited for, of which tests/lifecycle.rs has more.
    let unstarted = STOP.map(|(signal, code)| (Husk::api().start(), signal, code));
    for (vm, signal, code) in unstarted.into_iter().chain([(with_guest, 24, 143)]) {
        let socket = vm.socket().to_owned();
        send(&vm, signal);
        let end = vm.wait().code(code);
        let line = end.errors.lines().last().unwrap_or_default();
        assert!(line.starts_with("husk: stopped by SIG"), "{signal}: {end}");
        assert!(!socket.exists(), "{signal}");
    }
}

#[test]
fn p03_signals_that_mean_a_crash_are_named() {
    if is_husks_alone("P3") {
        return;
    }
    for signal in CRASH {
        let vm = Husk::guest("hello", "how=hlt").after("ulimit -c 0").start();
        vm.expect("how=hlt");
        send(&vm, signal);
        let end = vm.wait();
        assert_eq!(end.signal(), Some(signal));
        assert!(end.errors.starts_with("husk: crashed: SIG"), "{signal}: {end}");
        assert_eq!(end.errors.lines().count(), 1, "{signal}: {end}");
    }
}

/// The path is locked while who was there before is looked for.
#[test]
fn p01_of_several_on_a_stale_socket_one_serves() {
    if is_husks_alone("P1") {
        return;
    }
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    for _ in 0..5 {
        drop(UnixListener::bind(&socket).unwrap());
        let all: Vec<_> =
            (0..6).map(|_| Husk::new(["api", "--api-sock"]).arg(&socket).start_unheard()).collect();
        // All but one end.
        let (mut serving, mut refused) = (Vec::new(), 0);
        for vm in all {
            serving.push(vm);
            while serving.len() > 1 {
                let at = serving.iter().position(|vm| !vm.is_running());
                let Some(at) = at else {
                    std::thread::yield_now();
                    continue;
                };
                let line = serving.remove(at).wait().refused(3);
                assert!(line.contains(socket.to_str().unwrap()), "{line}");
                assert!(line.contains("another process is listening"), "{line}");
                refused += 1;
            }
        }
        assert_eq!(refused, 5);
        let winner = serving.pop().expect("one that serves");
        crate::fork::wait_until(|| std::os::unix::net::UnixStream::connect(&socket).is_ok());
        assert_eq!(Api::new(&socket).state(), "Not started");
        winner.signal(Signal::TERM);
        winner.wait().code(143);
        assert!(!socket.exists());
    }
}

/// What the guest was told is on the disk is there, and the next one starts without anybody's help.
#[test]
fn p04_killed_it_has_kept_what_was_flushed() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 1 << 20);
    for engine in ["Sync", "Async"] {
        for _ in 0..3 {
            let subject = Subject::start_with("P4", Husk::typing);
            let drive = json!({"drive_id": "a", "path_on_host": disk, "is_root_device": false,
                               "io_engine": engine, "cache_type": "Writeback"});
            let config = json!({"boot-source": {"kernel_image_path": guest("sectors")},
                                "drives": [drive]});
            let refusal = subject.refusal(&config);
            if refusal.is_some() {
                assert!(differs("P4"), "{refusal:?}");
                continue;
            }
            let vm = subject.vm();
            if !subject.is_ready("ready=1") {
                continue;
            }
            vm.type_in("wwWW");
            (1..=4).for_each(|n| assert_eq!(vm.expect("write=").trim(), format!("write=0 {n}")));
            vm.type_in("f");
            vm.expect("flush=0");
            vm.signal(Signal::KILL);
            assert!(vm.ends_within(PATIENCE));
            let bytes = std::fs::read(&disk).unwrap();
            assert!(bytes[..512].iter().all(|byte| *byte == 2), "{engine}");
            assert!(bytes[bytes.len() - 512..].iter().all(|byte| *byte == 4), "{engine}");
            std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
        }
    }
}
