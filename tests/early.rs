//! SIGTERM while husk starts: it ends husk before that has made anything, or husk ends itself, with its own code. Either
//! way nothing is left behind, least of all the API's socket.
//!
//! `HUSK_STARTS` says how many starts each test makes, for long runs: docs/evidence.md.
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::exit_truth::{PROMISED, count};
use crate::util::*;

/// What strace says of signals that are blocked: they are twice, while the socket is made, and for good when there is
/// another thread to hear them.
const BLOCKED: &str = "SIG_BLOCK, [HUP INT QUIT TERM";

/// How an end came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Came {
    /// The signal ended the process, which had no handler yet.
    BySignal,
    /// husk heeded it.
    ByHusk,
}

/// Judges the end of a husk that was to listen at `socket`.
fn judge(what: &str, end: &End, socket: &Path) -> Came {
    let names: Vec<_> = fs::read_dir(socket.parent().unwrap()).unwrap().flatten().collect();
    let left = names.iter().map(|entry| entry.file_name()).find(|name| name != "log");
    assert_eq!(left, None, "{what}: it is left behind: {end}");
    match (end.status.code(), end.signal()) {
        (Some(143), None) => {
            assert_eq!(end.errors.lines().last(), Some("husk: stopped by SIGTERM"), "{what}");
            Came::ByHusk
        }
        (None, Some(15)) => {
            assert_eq!(end.errors, "", "{what}");
            Came::BySignal
        }
        _ => panic!("{what}: {end}"),
    }
}

/// A directory for a socket and a log, and nothing else.
fn place(scratch: &Scratch) -> (std::path::PathBuf, std::path::PathBuf) {
    let directory = scratch.path("place");
    fs::create_dir(&directory).unwrap();
    (directory.join("s"), directory.join("log"))
}

fn husk(program: Option<&[&str]>, socket: &Path) -> Husk {
    let husk = match program {
        None => Husk::new(["api"]),
        Some(strace) => Husk::of("strace", strace).arg(env!("CARGO_BIN_EXE_husk")).arg("api"),
    };
    husk.option("--api-sock", socket)
}

/// The calls of a start, each with which of its kind it is: from the first of the program to the one after which signals
/// are left to other threads.
fn calls(log: &str) -> Vec<(String, usize)> {
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let (mut calls, mut blocked) = (Vec::new(), Vec::new());
    for line in log.lines() {
        let Some((name, _)) = line.split_once('(') else { continue };
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        {
            continue;
        }
        let nth = seen.entry(name).or_default();
        *nth += 1;
        calls.push((name.to_owned(), *nth));
        if line.contains(BLOCKED) {
            blocked.push(calls.len());
        }
    }
    let [_held, last] = blocked[..] else { panic!("signals are blocked {} times", blocked.len()) };
    calls.truncate(last - 1);
    // strace makes the first for it.
    calls.retain(|(name, _)| name != "execve");
    calls
}

/// In the middle of each system call, above all of the one that makes the socket.
#[test]
fn sigterm_at_any_call_of_the_start_leaves_nothing() {
    let scratch = Scratch::new();
    let (socket, log) = place(&scratch);
    // Not its children.
    let trace = ["-D", "-o", log.to_str().unwrap(), "-e", "trace=all"];
    let vm = husk(Some(&trace), &socket).start_unheard();
    let deadline = Instant::now() + PATIENCE;
    let all = loop {
        let said = fs::read_to_string(&log).unwrap_or_default();
        if said.matches(BLOCKED).count() == 2 {
            break said;
        }
        assert!(vm.is_running() && Instant::now() < deadline, "{said}");
        std::thread::yield_now();
    };
    vm.signal(Signal::TERM);
    assert_eq!(judge("at the end", &vm.wait(), &socket), Came::ByHusk);
    let calls = calls(&all);
    let times = usize::try_from(count("HUSK_STARTS", 60)).unwrap().min(calls.len());
    let mut chosen: Vec<_> = (0..times).map(|i| &calls[i * calls.len() / times]).collect();
    let bind = calls.iter().position(|(name, _)| name == "bind").expect("it makes a socket");
    chosen.extend(&calls[bind - 1..bind + 12]);
    let mut by_husk = 0;
    for (name, nth) in &chosen {
        let scratch = Scratch::new();
        let (socket, log) = place(&scratch);
        let inject = format!("inject={name}:signal=TERM:when={nth}");
        let log = log.to_str().unwrap();
        let strace = ["-D", "-o", log, "-e", &format!("trace={name}"), "-e", &inject];
        let what = format!("{name} {nth}");
        let end = husk(Some(&strace), &socket).start_unheard().wait();
        by_husk += usize::from(judge(&what, &end, &socket) == Came::ByHusk);
    }
    println!(
        "{} of {} calls: {by_husk} ends by husk, the rest by the signal",
        chosen.len(),
        calls.len()
    );
    assert!(by_husk >= 13 && by_husk < chosen.len(), "{by_husk} of {}", chosen.len());
}

/// By the clock: from the first instant to twice the time in which the socket comes to be.
#[test]
fn sigterm_after_any_delay_from_the_start_leaves_nothing() {
    let times = u32::try_from(count("HUSK_STARTS", 250)).unwrap();
    let until_listening = || {
        let scratch = Scratch::new();
        let (socket, _) = place(&scratch);
        let begin = Instant::now();
        let vm = husk(None, &socket).start_unheard();
        while !socket.exists() {
            assert!(vm.is_running() && begin.elapsed() < PATIENCE, "{}", vm.errors.so_far());
            std::hint::spin_loop();
        }
        begin.elapsed()
    };
    let mut spans: Vec<_> = (0..5).map(|_| until_listening()).collect();
    spans.sort_unstable();
    // At least the first 5 ms, in steps of 20 us.
    let span = (spans[2] * 2).max(Duration::from_millis(5));
    let (mut by_signal, mut longest) = (0, Duration::ZERO);
    for i in 0..times {
        let scratch = Scratch::new();
        let (socket, _) = place(&scratch);
        let vm = husk(None, &socket).start_unheard();
        let delay = span * i / times;
        // The moment is what is tried here: there is no event to wait for.
        std::thread::sleep(delay);
        vm.signal(Signal::TERM);
        let since = Instant::now();
        let end = vm.wait();
        longest = longest.max(since.elapsed());
        by_signal += u32::from(judge(&format!("{delay:?}"), &end, &socket) == Came::BySignal);
    }
    println!(
        "{times} signals within {span:?}: {by_signal} before husk took them; the longest end {longest:?}"
    );
    assert!(longest < PROMISED, "{longest:?}");
    assert!(by_signal > 0 && by_signal < times, "{by_signal} of {times}");
}
