//! What was done many times leaves nothing: descriptors, threads, memory, mappings, files and processes stay as they were.
//!
//! `HUSK_SOAK_CYCLES` says how many VMs are made, started and ended, `HUSK_SOAK_SECONDS` how long one VM is under
//! load: for long runs, which docs/evidence.md tells of.
use std::fmt::Debug;
use std::fs;
use std::io::{BufReader, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use husk::{Ending, Refusal, SerialTo, Vm, VmConfig};
use serde_json::json;

use crate::util::*;

/// Set in the process that has many VMs and does nothing else.
const ALONE: &str = "HUSK_SOAK_ALONE";
/// Cycles after which all has been allocated that stays.
const WARM: u64 = 20;
/// Pages that allocators may keep, in KiB.
const GROWTH_MAX_KIB: u64 = 1024;

fn number(name: &str, without: u64) -> u64 {
    std::env::var(name)
        .map_or(without, |text| text.parse().unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// What a process has.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    anonymous_kib: u64,
}

impl Holdings {
    fn of(pid: u32) -> Self {
        let proc = |name: &str| format!("/proc/{pid}/{name}");
        let read = |name| fs::read_to_string(proc(name)).unwrap();
        let status = read("status");
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
        Self {
            descriptors: files_in(&proc("fd")),
            threads: files_in(&proc("task")),
            mappings: read("maps").lines().count(),
            anonymous_kib: line.trim().trim_end_matches(" kB").parse().unwrap(),
        }
    }

    /// Whether there is no more than there was.
    #[track_caller]
    fn stayed(&self, now: &Self, done: impl Debug) {
        assert_eq!(self.descriptors, now.descriptors, "descriptors, after {done:?}");
        assert_eq!(self.threads, now.threads, "threads, after {done:?}");
        // One heap more or less.
        assert!(now.mappings <= self.mappings + 2, "after {done:?}: {self:?} became {now:?}");
        let most = self.anonymous_kib + GROWTH_MAX_KIB;
        assert!(now.anonymous_kib <= most, "after {done:?}: {self:?} became {now:?}");
    }
}

/// A VM of a program, with a disk and a vsock device, from its making to its end: by itself, killed, or dropped.
fn cycle(scratch: &Scratch, n: u64) -> Result<(), Refusal> {
    let mut config = VmConfig::new(guest("hello"));
    config.machine.mem_size_mib = 16;
    config.serial.to = Some(SerialTo::File(scratch.path("log")));
    if let Some(source) = &mut config.boot_source {
        source.boot_args =
            Some(if n.is_multiple_of(3) { "how=poweroff" } else { "how=hlt" }.into());
    }
    let disk =
        json!({"drive_id": "d", "path_on_host": scratch.path("disk"), "is_root_device": false});
    config.put("drives", Some("d"), disk.to_string().as_bytes())?;
    let vsock = json!({"guest_cid": 3, "uds_path": scratch.path("vsock")});
    config.put("vsock", None, vsock.to_string().as_bytes())?;
    let vm = Vm::start(config)?;
    match n % 3 {
        0 => assert_eq!(vm.wait()?, Ending::PoweredOff),
        1 => {
            vm.kill()?;
            assert_eq!(vm.wait()?, Ending::Killed);
        }
        _ => drop(vm),
    }
    Ok(())
}

/// In a process of its own, so that nobody else's threads and files are counted.
#[test]
fn a_program_that_had_many_vms_is_what_it_was() {
    require_host();
    if std::env::var_os(ALONE).is_none() {
        let me = std::env::current_exe().unwrap();
        let name = "soak::a_program_that_had_many_vms_is_what_it_was";
        let mut command = Command::new(me);
        command.args([name, "--exact", "--nocapture", "--test-threads=1"]).env(ALONE, "1");
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        print!("{said}");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}{errors}");
        assert!(said.contains("1 passed"), "it was not run: {said}");
        return;
    }
    let cycles = number("HUSK_SOAK_CYCLES", 150);
    let scratch = Scratch::new();
    scratch.sparse("disk", 1 << 20);
    let me = std::process::id();
    (0..WARM).for_each(|n| cycle(&scratch, n).unwrap());
    let (before, begin) = (Holdings::of(me), Instant::now());
    for n in 0..cycles {
        cycle(&scratch, n).unwrap_or_else(|e| panic!("cycle {n}: {e}"));
        if n % 50 == 49 {
            before.stayed(&Holdings::of(me), n + 1);
        }
    }
    let after = Holdings::of(me);
    println!("{cycles} VMs in {:.1?}: {before:?}, then {after:?}", begin.elapsed());
    before.stayed(&after, cycles);
    // A log and a disk.
    assert_eq!(files_in(scratch.path("").to_str().unwrap()), 2, "files are left");
}

/// Processes: nothing of them stays, sockets and copiers included.
#[test]
fn many_runs_leave_no_files_and_no_processes() {
    let cycles = number("HUSK_SOAK_CYCLES", 150) / 3;
    let scratch = Scratch::new();
    let (socket, vsock) = (scratch.path("api.sock"), scratch.path("v.sock"));
    for n in 0..cycles {
        // Few of them: a guest that does not power off is given its time.
        let is_told = n % 10 == 9;
        let how = if is_told { "how=hlt" } else { "" };
        let husk = Husk::guest("hello", how).memory(16).vsock(3, &vsock).arg("--forkable");
        let vm = husk.listening_at(&socket).start();
        let copier = vm.copier();
        if is_told {
            vm.expect("how=hlt");
            vm.signal(Signal::TERM);
            vm.wait().code(143);
        } else {
            vm.wait().ok();
        }
        let copier = copier.map_or(0, |pid| pid.as_raw_nonzero().get());
        assert!(!is_alive(copier), "cycle {n}: the copier {copier} goes on");
        assert_eq!(files_in(scratch.path("").to_str().unwrap()), 0, "cycle {n}: files are left");
    }
}

/// Whether there is such a process that is no zombie of somebody else.
fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().starts_with(" Z"))
}

/// Asks again while a host that is busy is too slow to hand a device over, which it says.
#[track_caller]
fn until_done(ask: impl Fn() -> Reply) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let reply = ask();
        if reply.status < 300 || Instant::now() > deadline {
            return reply.done();
        }
        let fault = reply.fault();
        assert!(fault.contains("has not answered"), "{fault}");
        println!("asked again: {fault}");
    }
}

/// Everything that a client may have done to a VM that goes on.
fn load(vm: &TestVm, directory: &Path, n: u64) {
    // Every CPU and every device works.
    assert!(tell(vm, "c").starts_with("going="));
    assert!(tell(vm, "d").starts_with("devices="));
    let api = vm.api();
    assert_eq!(api.state(), "Running");
    until_done(|| api.patch("/vm", json!({"state": "Paused"})));
    if n.is_multiple_of(4) {
        until_done(|| {
            let _ = fs::remove_dir_all(directory);
            api.put("/snapshot/create", json!({"directory": directory}))
        });
        until_done(|| api.put("/snapshot/rewind", json!({"directory": directory})));
    }
    until_done(|| api.patch("/vm", json!({"state": "Resumed"})));
    until_done(|| api.patch("/balloon", json!({"amount_mib": n % 3})));
    assert_eq!(api.get("/metrics").status, 200);
    // Those who go too early, and those who ask for nonsense.
    drop(api.connect());
    assert!(!api.put("/drives/none", "{").fault().is_empty());
}

#[test]
fn a_vm_under_load_is_what_it_was() {
    let time = Duration::from_secs(number("HUSK_SOAK_SECONDS", 5));
    let scratch = Scratch::new();
    let directory = scratch.path("snapshot");
    let network = Network::with_tap();
    let vm = Husk::guest("busy", "")
        .cpus(2)
        .memory(8)
        .disk(scratch.sparse("disk", 1 << 20))
        .network(&network, "")
        .vsock(3, &scratch.path("vsock"))
        .arg("--rng")
        .option("--balloon", "0,stats=1")
        .listening()
        .typing()
        .start();
    vm.expect("ready=1");
    (0..WARM).for_each(|n| load(&vm, &directory, n));
    let (before, begin) = (settled(&vm), Instant::now());
    let mut count = 0;
    while begin.elapsed() < time {
        load(&vm, &directory, count);
        count += 1;
        if count % 50 == 0 {
            before.stayed(&settled(&vm), count);
        }
    }
    let after = settled(&vm);
    println!("{count} rounds in {:.0?}: {before:?}, then {after:?}", begin.elapsed());
    before.stayed(&after, count);
    vm.type_in("q");
    vm.wait().ok();
}

/// When those who have hung up are gone: the server has heard of it when it answers somebody who asks later.
fn settled(vm: &TestVm) -> Holdings {
    let mut stream = vm.api().connect();
    let mut replies = BufReader::new(stream.try_clone().unwrap());
    for _ in 0..2 {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: husk\r\n\r\n").unwrap();
        assert_eq!(Reply::read(&mut replies).status, 200);
    }
    Holdings::of(vm.pid())
}
