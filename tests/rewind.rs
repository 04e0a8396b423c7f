//! Going back to a snapshot in place.
use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

use crate::util::*;

/// The guest `pages`, which does what is typed.
fn pages(cmdline: &str) -> Husk {
    Husk::guest("pages", cmdline).listening().typing()
}

fn snapshot(vm: &TestVm, directory: &Path) {
    vm.api().put("/snapshot/create", json!({"directory": directory})).done();
}

fn rewind(vm: &TestVm, params: Value) {
    vm.api().put("/snapshot/rewind", params).done();
}

/// Types a command, and waits for what the guest says.
#[track_caller]
fn tell(vm: &TestVm, command: &str, answer: &str) {
    vm.type_in(command);
    let line = vm.expect("=");
    assert_eq!(line, answer, "{command}");
}

#[test]
fn memory_and_registers_go_back_again_and_again() {
    let scratch = Scratch::new();
    let directory = scratch.path("snapshot");
    let vm = pages("count=1000").start();
    vm.expect("ready=1");
    let refused = vm.api().put("/snapshot/rewind", json!({})).fault();
    assert!(refused.contains("neither restored nor saved"), "{refused}");
    tell(&vm, "w", "round=1");
    snapshot(&vm, &directory);
    for round in 0..20 {
        // The first time memory is mapped anew, later only what was written goes.
        tell(&vm, "w", "round=2");
        tell(&vm, "w", "round=3");
        tell(&vm, "c", "pages=1..3");
        tell(&vm, "s", "window=B");
        rewind(&vm, json!({}));
        tell(&vm, "v", "window=A");
        tell(&vm, "c", "pages=1..1");
        if round % 5 == 4 {
            // A later moment takes the place of the one before.
            snapshot(&vm, &directory);
        }
    }
    vm.type_in("q");
    vm.wait().ok();
}

#[test]
fn a_restored_vm_goes_back_to_what_it_was_restored_from() {
    let scratch = Scratch::new();
    let directory = scratch.path("snapshot");
    let first = pages("count=1000").start();
    first.expect("ready=1");
    tell(&first, "w", "round=1");
    snapshot(&first, &directory);
    first.api().act("Kill").done();

    let vm = Husk::api().typing().start();
    vm.api().put("/snapshot/load", json!({"directory": directory, "resume_vm": true})).done();
    for _ in 0..5 {
        tell(&vm, "w", "round=2");
        tell(&vm, "s", "window=B");
        assert_eq!(vm.api().state(), "Running");
        rewind(&vm, json!({"resume_vm": false}));
        assert_eq!(vm.api().state(), "Paused");
        rewind(&vm, json!({"directory": directory, "resume_vm": true}));
        tell(&vm, "v", "window=A");
        tell(&vm, "c", "pages=1..1");
    }
    vm.type_in("q");
    vm.wait().ok();
}

/// A snapshot of the guest `pages` after its first round, in a directory of its own.
fn saved(scratch: &Scratch) -> PathBuf {
    let directory = scratch.path("snapshot");
    let vm = pages("count=300").start();
    vm.expect("ready=1");
    tell(&vm, "w", "round=1");
    let refused = vm.api().put("/snapshot/working-set", json!({})).fault();
    assert!(refused.contains("was not restored"), "{refused}");
    snapshot(&vm, &directory);
    vm.api().act("Kill").done();
    directory
}

#[test]
fn what_a_restored_guest_touches_first_is_there_the_next_time() {
    let scratch = Scratch::new();
    let directory = saved(&scratch);
    let set = directory.join("working-set");
    let restore = |more: &[&str]| {
        let mut husk = Husk::new(["restore"]).arg(&directory).listening().typing();
        for word in more {
            husk = husk.arg(word);
        }
        husk.start()
    };
    // At a request.
    let vm = restore(&[]);
    tell(&vm, "w", "round=2");
    vm.api().put("/snapshot/working-set", json!({})).done();
    let noted = fs::read(&set).unwrap();
    vm.api().act("Kill").done();

    // 150 pages at least were written, which are taken before the guest does; it sees no difference.
    let vm = restore(&[]);
    let line = vm.expect_error("husk: took ");
    let kib: u64 = line.split_whitespace().filter_map(|word| word.parse().ok()).next().unwrap();
    assert!(kib >= 600, "{line}");
    tell(&vm, "c", "pages=1..1");
    tell(&vm, "w", "round=2");
    vm.api().act("Kill").done();

    // One that is damaged, or cut off, is not used.
    for bad in [&noted[..noted.len() / 2], &[&noted[..20], &[0xff], &noted[21..]].concat()] {
        fs::write(&set, bad).unwrap();
        let vm = restore(&[]);
        vm.expect_error("the working set is not used: it is damaged");
        tell(&vm, "c", "pages=1..1");
        vm.api().act("Kill").done();
    }

    // Nobody waits for what is no file.
    fs::remove_file(&set).unwrap();
    let (own, mode) = (rustix::fs::Mode::RUSR, rustix::fs::FileType::Fifo);
    rustix::fs::mknodat(rustix::fs::CWD, &set, mode, own, 0).unwrap();
    let vm = restore(&[]);
    vm.expect_error("working-set is a FIFO");
    tell(&vm, "c", "pages=1..1");
    vm.api().act("Kill").done();
    vm.wait();

    // After a time.
    fs::remove_file(&set).unwrap();
    let vm = restore(&["--record", "1"]);
    vm.expect_error("husk: noted ");
    assert!(fs::read(&set).unwrap().starts_with(b"husk-ws\0"));
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 3, "state, memory, working set");
    vm.api().act("Kill").done();
    let vm = restore(&["--no-prefault"]);
    tell(&vm, "c", "pages=1..1");
    // It goes with the snapshot that it is of.
    snapshot(&vm, &directory);
    assert!(!set.exists(), "the working set of another snapshot is there");
    vm.type_in("q");
    let end = vm.wait().ok();
    assert!(!end.errors.contains("touches first"), "{}", end.errors);
}

#[test]
fn a_snapshot_is_restored_into_huge_pages() {
    let scratch = Scratch::new();
    let directory = saved(&scratch);
    let husk = Husk::new(["restore"]).arg(&directory).option("--huge-pages", "transparent");
    let vm = husk.listening().typing().start();
    tell(&vm, "c", "pages=1..1");
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).unwrap();
    let huge = smaps.lines().filter_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib: u64 = huge.filter_map(|kib| kib.trim().strip_suffix(" kB")?.parse::<u64>().ok()).sum();
    assert!(kib >= 2048, "{kib} KiB of huge pages");
    tell(&vm, "w", "round=2");
    // And back, which is by the file again.
    rewind(&vm, json!({}));
    tell(&vm, "c", "pages=1..1");
    snapshot(&vm, &directory);
    vm.type_in("q");
    vm.wait().ok();
}

#[test]
fn without_descriptors_a_rewind_is_refused_and_the_guest_goes_on() {
    let scratch = Scratch::new();
    let directory = scratch.path("snapshot");
    let vm = pages("count=1000").start();
    vm.expect("ready=1");
    tell(&vm, "w", "round=1");
    snapshot(&vm, &directory);
    tell(&vm, "w", "round=2");
    let pid = Pid::from_raw(vm.pid().cast_signed());
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // One is of the connection.
    let open = fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().count() as u64 + 1;
    let mut refused = 0;
    loop {
        let current = Some(open + refused);
        let before = prlimit(pid, Resource::Nofile, Rlimit { current, maximum }).unwrap();
        let reply = vm.api().put("/snapshot/rewind", json!({"directory": directory}));
        prlimit(pid, Resource::Nofile, before).unwrap();
        if reply.status == 204 {
            break;
        }
        let why = reply.fault();
        assert!(why.contains("Too many open files"), "{why}");
        tell(&vm, "c", "pages=1..2");
        refused += 1;
    }
    assert!(refused > 0);
    tell(&vm, "c", "pages=1..1");
    vm.type_in("q");
    vm.wait().ok();
}
