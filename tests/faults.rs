//! Each system call of husk fails in its turn, while a guest boots, uses its disk, is saved: husk says so and ends, or
//! goes on and nothing is wrong. Never a hang, a crash, a panic, or wrong data that nobody was told of. What is only
//! interrupted is done again.
//!
//! There are four thousand faults in the three scenarios. The gate makes 60 of each, spread over all: `HUSK_FAULTS=N` makes N,
//! `HUSK_FAULTS=all` all, `HUSK_FAULTS_ERROR=EINTR` of that error alone. docs/evidence.md has the long runs.
mod inject;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use self::inject::{DEADLINE, Fault, Follower, Log};
use crate::exit_truth::PROMISED;
use crate::util::*;

/// The exit codes of docs/exit-codes.md that a fault of the host may have. Not 70: that is a bug, whatever the host does.
const CODES: [i32; 6] = [0, 3, 4, 6, 7, 8];
/// How many faults of each scenario are made unless there is a wish.
const FEW: usize = 60;
/// So many at once.
const WORKERS: usize = 2;

/// What came of a fault.
type Verdict = Result<String, String>;

/// Makes the faults of a scenario; `run` without one shows which there are. See [`Log::faults`].
fn scenario(name: &str, runs_max: usize, run: impl Fn(Option<&Fault>) -> (Verdict, Log) + Sync) {
    let (verdict, log) = run(None);
    verdict.unwrap_or_else(|why| panic!("{name} without a fault: {why}"));
    let mut all = log.faults(runs_max);
    if let Ok(error) = std::env::var("HUSK_FAULTS_ERROR") {
        all.retain(|fault| fault.error == error);
    }
    let wish = std::env::var("HUSK_FAULTS").ok();
    let count = match wish.as_deref() {
        None => FEW,
        Some("all") => all.len(),
        Some(number) => number.parse().expect("HUSK_FAULTS is a number, or \"all\""),
    };
    // A step that shares no factor with the number of errors, or only one error would be seen.
    let count = count.min(all.len());
    let chosen: Vec<_> = (0..count).map(|i| all[i * all.len() / count]).collect();
    let (next, seen) = (AtomicUsize::new(0), Mutex::new(Seen::default()));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(fault) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // What panics in here is a deadline that passed.
                    let came = catch_unwind(AssertUnwindSafe(|| run(Some(fault))));
                    seen.lock().unwrap().note(fault, came.ok());
                }
            });
        }
    });
    let seen = seen.into_inner().unwrap();
    let calls: BTreeSet<_> = all.iter().map(|fault| fault.call).collect();
    println!(
        "{name}: {} faults there are, {count} chosen, {} made, {} calls failed, {} not reached; of {} kinds of call: {calls:?}",
        all.len(),
        seen.made,
        seen.calls,
        seen.missed,
        calls.len()
    );
    for (verdict, count) in &seen.verdicts {
        println!("{name}: {count:5} {verdict}");
    }
    assert!(
        seen.wrong.is_empty(),
        "{name}: {} wrong:\n{}",
        seen.wrong.len(),
        seen.wrong.join("\n")
    );
    // How often a guest that runs leaves it is never twice the same.
    assert!(seen.made * 10 >= count * 9, "{name}: only {} of {count} were made", seen.made);
}

#[derive(Default)]
struct Seen {
    made: usize,
    calls: usize,
    /// A thread did not come to that call this time.
    missed: usize,
    verdicts: BTreeMap<String, usize>,
    wrong: Vec<String>,
}

impl Seen {
    fn note(&mut self, fault: &Fault, came: Option<(Verdict, Log)>) {
        let Some((verdict, log)) = came else {
            self.wrong.push(format!("{fault:?}: a deadline passed"));
            return;
        };
        let injected = log.injected();
        self.calls += injected.len();
        match injected.is_empty() {
            true => self.missed += 1,
            false => self.made += 1,
        }
        match verdict {
            Ok(what) => *self.verdicts.entry(what).or_default() += 1,
            Err(why) => self.wrong.push(format!("{fault:?}: {why}\n  {}", injected.join("\n  "))),
        }
    }
}

/// Whether `said` names what failed.
fn names(fault: &Fault, said: &str) -> bool {
    // The one call that cannot be made again, because it has been made: see `is_beyond_us`.
    let is_of_vcpu = fault.error == "EINTR" && said.contains("KVM_CREATE_VCPU: File exists");
    // Every failure to make a thread or its stack is EAGAIN to pthread_create.
    let is_of_thread = ["clone", "clone3", "mmap"].contains(&fault.call)
        && said.contains("thread")
        && said.contains("Resource temporarily unavailable");
    said.contains(fault.words) || is_of_thread || is_of_vcpu
}

/// What it would have said it could not.
fn is_mute(log: &Log) -> bool {
    log.injected().iter().any(|line| line.contains("write(") && line.contains(", \"husk: "))
}

/// What `code` and the last thing `said` come to, if a fault ended husk.
fn ended(fault: &Fault, log: &Log, code: i32, said: &str) -> Verdict {
    match CODES[1..].contains(&code) {
        false => Err(format!("exit code {code}: {said}")),
        true if fault.error == "EINTR" && !fault.is_beyond_us(log, said) => {
            Err(format!("interrupted, and husk gave up with {code}: {said}"))
        }
        true if said.starts_with("husk: ") && names(fault, said) => {
            Ok(format!("ended with {code}, and says why"))
        }
        true if is_mute(log) => Ok(format!("ended with {code}, and could not say why")),
        true => Err(format!("exit code {code} without a reason: {said}")),
    }
}

/// What an end says of a fault.
fn judge(fault: Option<&Fault>, log: &Log, end: &End, is_right: bool) -> Verdict {
    let Some(code) = end.status.code() else { return Err(format!("a signal: {end}")) };
    if !CODES.contains(&code) || end.errors.contains("panicked") {
        return Err(format!("exit code {code}: {end}"));
    }
    let is_ok = end.output.contains("RESULT ok");
    if is_ok && !is_right {
        return Err(format!("wrong data, and a guest that is content: {end}"));
    }
    let Some(fault) = fault else {
        return if code == 0 && is_ok { Ok("no fault".into()) } else { Err(end.to_string()) };
    };
    if code != 0 {
        let said = end.errors.lines().last().unwrap_or_default();
        return ended(fault, log, code, said).map_err(|why| format!("{why}\n{end}"));
    }
    if is_ok {
        return Ok("went on".into());
    }
    if fault.error == "EINTR" {
        return Err(format!("interrupted, and the guest was told: {end}"));
    }
    // Of output that cannot be written some is missing, and husk says so.
    let is_output = end.errors.contains("serial output is being lost");
    match end.output.contains("RESULT") {
        true if is_output => Ok("went on without some of its output".into()),
        true => Ok("the guest was told".into()),
        false if is_output => Ok("went on without some of its output".into()),
        false => Err(format!("neither content nor told: {end}")),
    }
}

/// The guest writes there what `block` writes.
fn holds_the_pattern(disk: &Path) -> bool {
    let bytes = fs::read(disk).unwrap();
    let pattern = |i: usize| (i * 7 + i / 512 + 3) as u8;
    (0..64 << 10).all(|i| bytes[8 * 512 + i] == pattern(i))
}

const DISK_TESTS: &str = "tests=id,zeroes,discard,write,flush,verify,read seed=3";

#[test]
fn from_boot_to_power_off() {
    scenario("boot", usize::MAX, |fault| {
        let scratch = Scratch::new();
        let (log, disk) = (scratch.path("log"), scratch.sparse("disk", 1 << 20));
        let husk = Fault::husk(fault, &log).arg("run").option("--kernel", guest("block"));
        let husk = husk.cmdline("tests=write,flush,verify seed=3").memory(32).disk(&disk);
        let husk = husk.option("--api-sock", scratch.path("s"));
        let end = husk.start_unheard().wait_within(DEADLINE);
        let log = Log::read(&log);
        (judge(fault, &log, &end, holds_the_pattern(&disk)), log)
    });
}

/// Asks; the status of the reply, if there is one.
fn ask(socket: &Path, what: &str, body: &serde_json::Value) -> Option<Reply> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).ok()?;
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let head = format!("{what} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}", body.len());
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).ok()?;
    let mut reader = BufReader::new(stream);
    catch_unwind(AssertUnwindSafe(|| Reply::read(&mut reader))).ok()
}

/// Whether it goes on, and has not been started.
fn is_waiting(socket: &Path) -> bool {
    let state = ask(socket, "GET /", &json!(null));
    state.is_some_and(|reply| reply.status == 200 && reply.json()["state"] == "Not started")
}

#[test]
fn at_the_disk_of_a_guest() {
    scenario("disk", usize::MAX, |fault| {
        let scratch = Scratch::new();
        let (log, disk) = (scratch.path("log"), scratch.sparse("disk", 1 << 20));
        let vm = Husk::api().start();
        let follower = Follower::attach(&vm, fault, &log);
        let kernel = json!({ "kernel_image_path": guest("block"), "boot_args": DISK_TESTS });
        let drive = json!({ "drive_id": "a", "path_on_host": disk, "is_root_device": false,
            "is_read_only": false });
        let mut refusal = None;
        for (what, body) in [
            ("PUT /machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 32 })),
            ("PUT /boot-source", &kernel),
            ("PUT /drives/a", &drive),
            ("PUT /actions", &json!({ "action_type": "InstanceStart" })),
        ] {
            // What has started may have ended before it answers.
            match ask(vm.socket(), what, body) {
                Some(reply) if (400..500).contains(&reply.status) => refusal = Some(Some(reply)),
                Some(reply) if reply.status < 300 => continue,
                Some(reply) => return (Err(format!("{what}: {reply:?}")), Log::read(&log)),
                None if what.contains("actions") && !is_waiting(vm.socket()) => {}
                None => refusal = Some(None),
            }
            break;
        }
        if let Some(reply) = refusal {
            follower.detach();
            let log = Log::read(&log);
            return (refused(vm, fault, &log, reply), log);
        }
        if !vm.ends_within(DEADLINE) {
            follower.detach();
            let why = format!("a hang: {}\n{}", vm.serial.so_far(), vm.errors.so_far());
            return (Err(why), Log::read(&log));
        }
        let end = vm.wait();
        follower.detach();
        let log = Log::read(&log);
        (judge(fault, &log, &end, holds_the_pattern(&disk)), log)
    });
}

/// A bug is a bug, and not the sandbox's: what husk says of one in a thread that is closed, and that it ends with 70. The one
/// that can be had is the async runtime's, which holds it for a bug if it cannot wait: no host refuses that.
#[test]
fn a_bug_in_a_closed_thread_ends_with_70() {
    let scratch = Scratch::new();
    let husk = Husk::guest("hello", "how=hlt").memory(16).after("export RUST_BACKTRACE=1");
    let vm = husk.listening().start();
    vm.expect("how=hlt");
    let follower =
        Follower::attach_to(&vm, "husk_api", "epoll_wait:error=EIO", &scratch.path("log"));
    // It waits already, until somebody asks.
    let _asked = UnixStream::connect(vm.socket()).unwrap();
    assert!(vm.ends_within(DEADLINE), "it cannot wait, and goes on");
    follower.detach();
    let end = vm.wait().code(70);
    assert!(end.errors.contains("husk: panicked at"), "{end}");
}

/// It said no, with this reply, or nothing; it answers as if nothing had been, or has ended with a reason.
fn refused(vm: TestVm, fault: Option<&Fault>, log: &Log, reply: Option<Reply>) -> Verdict {
    let Some(fault) = fault else { return Err(format!("refused without a fault: {reply:?}")) };
    if vm.ends_within(Duration::from_millis(200)) {
        let end = vm.wait();
        let Some(code) = end.status.code() else { return Err(format!("a signal: {end}")) };
        let said = end.errors.lines().last().unwrap_or_default();
        return ended(fault, log, code, said).map_err(|why| format!("{why}\n{end}"));
    }
    let said = reply.as_ref().map_or("", |reply| &reply.body);
    if fault.error == "EINTR" && !fault.is_beyond_us(log, said) {
        return Err(format!("interrupted, and refused: {reply:?}"));
    }
    let what = match reply {
        Some(reply) if names(fault, &reply.body) => "refused with the reason, and husk goes on",
        Some(reply) => return Err(format!("refused without the reason: {}", reply.body)),
        None => "the reply was lost, and husk goes on",
    };
    let state = ask(vm.socket(), "GET /", &json!(null)).filter(|reply| reply.status == 200);
    if state.is_none() {
        return Err(format!("it does not answer: {}", vm.errors.so_far()));
    }
    vm.signal(Signal::TERM);
    let end = vm.wait();
    match end.status.code() {
        Some(143) => Ok(what.into()),
        _ => Err(end.to_string()),
    }
}

#[test]
fn in_the_middle_of_a_snapshot() {
    scenario("snapshot", 25, |fault| {
        let scratch = Scratch::new();
        let (log, directory) = (scratch.path("log"), scratch.path("warm"));
        let vm = Husk::guest("warm", "pages=256 every=5").memory(8).listening().start();
        vm.expect("tick=");
        let follower = Follower::attach(&vm, fault, &log);
        let reply = ask(vm.socket(), "PUT /snapshot/create", &json!({ "directory": directory }));
        follower.detach();
        let log = Log::read(&log);
        (judge_snapshot(vm, fault, &log, reply, &directory), log)
    });
}

fn judge_snapshot(
    vm: TestVm,
    fault: Option<&Fault>,
    log: &Log,
    reply: Option<Reply>,
    directory: &Path,
) -> Verdict {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let files: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    let is_sound = || Husk::new(["snapshot", "verify"]).arg(directory).wait();
    // It must still tick: two, of which the second began later.
    let ticks = || vm.serial.line("tick=", Instant::now() + DEADLINE);
    // Lines from before are read first, of a husk that has ended too.
    if vm.ends_within(Duration::from_millis(100)) || ticks().and_then(|_| ticks()).is_err() {
        return ended_by_itself(vm, fault, log);
    }
    if vm.serial.so_far().contains("torn=") {
        return Err("the guest's memory is torn".into());
    }
    let what = match &reply {
        Some(reply) if reply.status == 204 => {
            let end = is_sound();
            match end.status.code() {
                Some(0) if files.len() == 2 => "the snapshot is there",
                _ => return Err(format!("204, and {files:?}: {end}")),
            }
        }
        Some(reply) if (400..500).contains(&reply.status) => {
            let is_told = fault.is_some_and(|fault| names(fault, &reply.body));
            let is_interrupted = fault.is_some_and(|fault| fault.error == "EINTR");
            match (files.is_empty(), is_told) {
                _ if is_interrupted => {
                    return Err(format!("interrupted, and refused: {}", reply.body));
                }
                (true, true) => "refused with the reason, and nothing left",
                (true, false) => return Err(format!("refused without the reason: {}", reply.body)),
                // It is in its place, but nobody knows whether that would survive the host.
                (false, true) if is_sound().status.code() == Some(0) => "refused, and sound",
                (false, _) => return Err(format!("{}, and {files:?}", reply.body)),
            }
        }
        Some(reply) => return Err(format!("{reply:?}")),
        None if files.is_empty() || is_sound().status.code() == Some(0) => "the reply was lost",
        None => return Err(format!("no reply, and {files:?}")),
    };
    let since = Instant::now();
    vm.signal(Signal::TERM);
    if vm.errors.line("asking the guest to power off", Instant::now() + DEADLINE).is_err() {
        // What fails in the guest's thread may come as late as this.
        return ended_by_itself(vm, fault, log);
    }
    // A second signal does not wait.
    vm.signal(Signal::TERM);
    let end = vm.wait();
    if end.status.code() != Some(143) || since.elapsed() > PROMISED {
        return Err(format!("{:?} to its end: {end}", since.elapsed()));
    }
    Ok(what.into())
}

/// It has not been told to end, and goes no further.
fn ended_by_itself(vm: TestVm, fault: Option<&Fault>, log: &Log) -> Verdict {
    if !vm.ends_within(Duration::from_secs(2)) {
        return Err(format!("the guest stands still: {}", vm.errors.so_far()));
    }
    let end = vm.wait();
    let said = end.errors.lines().last().unwrap_or_default();
    let (Some(code), Some(fault)) = (end.status.code(), fault) else {
        return Err(end.to_string());
    };
    ended(fault, log, code, said).map_err(|why| format!("{why}\n{end}"))
}
