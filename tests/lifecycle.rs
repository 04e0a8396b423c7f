//! How a VM ends: each cause has its exit code and its line on standard error, the same every time; nothing is left.
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use crate::devices::with_all_devices;
use crate::util::*;

#[test]
fn every_ending_has_its_exit_code() {
    for (how, code, line) in [
        ("poweroff", 0, ""),
        ("triple", 5, "the guest crashed: triple fault on vCPU 0 at rip 0x10"),
        ("ud-no-idt", 5, "the guest crashed: triple fault on vCPU 0 at rip 0x10"),
        ("no-cr3", 5, "the guest crashed: triple fault on vCPU 0 at rip 0x10"),
        ("internal-error", 6, "KVM cannot run the guest on: vCPU 0 at rip 0x10"),
        ("wild-jump", 6, "KVM cannot run the guest on: vCPU 0 at rip 0xd0000000"),
    ] {
        let end = Husk::guest("hello", &format!("how={how}")).wait().code(code);
        // All that the guest said is there, however it ended.
        assert!(end.output.contains(&format!("how={how}\r\n")), "{end}");
        match code {
            0 => assert_eq!(end.errors, ""),
            _ => {
                let error = end.refused(code);
                assert!(error.starts_with(&format!("husk: {line}")), "{error}");
            }
        }
    }
}

#[test]
fn kvm_error_says_what_kvm_said() {
    let error = Husk::guest("hello", "how=internal-error").wait().refused(6);
    assert!(error.contains("suberror 1"), "{error}");
}

#[test]
fn triple_fault_ends_the_same_every_time() {
    let end = || Husk::guest("hello", "how=triple").cpus(2).wait().refused(5);
    let first = end();
    for _ in 1..20 {
        assert_eq!(end(), first);
    }
}

#[test]
fn reset_ends_the_vm_if_asked_to() {
    for how in ["reboot-acpi", "reboot-i8042"] {
        let end = Husk::guest("hello", &format!("how={how}")).exit_on_reboot().wait().code(0);
        assert_eq!(end.values("hello"), ["world"]);
        assert_eq!(end.errors, "");
    }
}

#[test]
fn reset_boots_again_in_place() {
    for how in ["reboot-acpi", "reboot-i8042"] {
        let vm = Husk::guest("hello", &format!("how={how}")).cpus(2).listening().start();
        let mut events = vm.api().follow("/events");
        for _ in 0..3 {
            vm.expect("hello=world");
            vm.expect("RESULT ok");
        }
        assert!(events.any(|e| e["event"] == "rebooted"));
        vm.api().act("Kill").done();
        vm.wait().code(0);
    }
}

/// Disks and network come back after a reset with what they held.
#[test]
fn devices_survive_a_reset() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let disk = scratch.sparse("disk.img", 16 << 20);
    let husk = Husk::guest("hello", "how=reboot-acpi").disk(&disk).arg("--rng");
    let vm = husk.network(&network, "").listening().start();
    for _ in 0..5 {
        vm.expect("hello=world");
    }
    vm.api().act("Kill").done();
    vm.wait().code(0);
    // The lock is gone, too.
    Husk::guest("block", "").disk(&disk).wait().ok();
}

#[test]
fn reboots_leave_no_descriptors_and_threads_behind() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let husk = with_all_devices(&scratch, &network, "hello", "how=reboot-i8042");
    let vm = husk.cpus(2).listening().start();
    let counts = || {
        // A reset just before the pause may be on its way, but is over before the next request is answered.
        vm.api().patch("/vm", json!({"state": "Paused"})).done();
        assert_eq!(vm.api().state(), "Paused");
        let counts = (files_in(&format!("/proc/{}/fd", vm.pid())), threads(&vm).len());
        vm.api().patch("/vm", json!({"state": "Resumed"})).done();
        counts
    };
    vm.expect("hello=world");
    let before = counts();
    for _ in 0..20 {
        vm.expect("hello=world");
    }
    let after = counts();
    // A connection that was closed here may still be open there; what 20 reboots leave is more.
    assert!(after.0 < before.0 + 5 && after.1 == before.1, "{before:?} became {after:?}");
    vm.api().act("Kill").done();
    vm.wait().code(0);
}

#[test]
fn sigterm_gives_the_guest_a_moment() {
    for how in ["hang", "hlt"] {
        let vm = Husk::guest("hello", &format!("how={how}")).start();
        vm.expect(&format!("how={how}"));
        let ended = Stopwatch::start();
        vm.signal(Signal::TERM);
        let end = vm.wait().code(143);
        // 2 s are promised; the machine may be busy.
        ended.within(Duration::from_millis(900), Duration::from_secs(4));
        let lines = ["husk: warn: the guest did not power off in time", "husk: stopped by SIGTERM"];
        assert_eq!(end.errors.lines().collect::<Vec<_>>(), lines);
    }
}

#[test]
fn second_signal_does_not_wait() {
    let vm = Husk::guest("hello", "how=hang").option("--log-level", "info").start();
    vm.expect("how=hang");
    let ended = Stopwatch::start();
    vm.signal(Signal::TERM);
    vm.expect_error("ShutdownRequested");
    vm.signal(Signal::TERM);
    vm.wait().code(143);
    ended.within(Duration::ZERO, Duration::from_millis(1400));
}

#[test]
fn each_signal_has_its_exit_code() {
    for (signal, code, line) in [
        (Signal::INT, 130, "husk: stopped by SIGINT"),
        (Signal::TERM, 143, "husk: stopped by SIGTERM"),
        (Signal::HUP, 143, "husk: stopped by SIGHUP"),
    ] {
        let vm = Husk::guest("hello", "how=hlt").start();
        vm.expect("how=hlt");
        vm.signal(signal);
        assert_eq!(vm.wait().code(code).errors.lines().last(), Some(line));
    }
}

#[test]
fn other_signals_change_nothing() {
    let vm = Husk::guest("hello", "how=hang").listening().start();
    vm.expect("how=hang");
    for signal in [Signal::USR1, Signal::USR2, Signal::PIPE, Signal::CHILD, Signal::WINCH] {
        vm.signal(signal);
    }
    vm.signal(Signal::STOP);
    vm.signal(Signal::CONT);
    assert_eq!(vm.api().state(), "Running");
    vm.api().act("Kill").done();
    vm.wait().code(0);
}

#[test]
fn signal_ends_a_paused_or_unstarted_vm_at_once() {
    let paused = Husk::guest("hello", "how=hang").listening().start();
    paused.expect("how=hang");
    paused.api().patch("/vm", json!({"state": "Paused"})).done();
    let unstarted = Husk::api().start();
    for vm in [paused, unstarted] {
        let ended = Stopwatch::start();
        vm.signal(Signal::TERM);
        vm.wait().code(143);
        ended.within(Duration::ZERO, Duration::from_millis(1400));
    }
}

#[test]
fn kill_ends_a_guest_that_hangs() {
    for (how, cpus) in [("hang", 1), ("hlt", 1), ("hang", 32)] {
        let vm = Husk::guest("hello", &format!("how={how}")).cpus(cpus).listening().start();
        vm.expect(&format!("how={how}"));
        let ended = Stopwatch::start();
        vm.api().act("Kill").done();
        let end = vm.wait().code(0);
        ended.within(Duration::ZERO, Duration::from_secs(3));
        assert!(!end.errors.contains("husk: killed"), "{end}");
    }
}

#[test]
fn socket_is_removed_at_every_end() {
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    for (how, code) in [("poweroff", 0), ("triple", 5), ("internal-error", 6), ("reboot-acpi", 0)] {
        let husk = Husk::guest("hello", &format!("how={how}")).exit_on_reboot();
        husk.option("--api-sock", &socket).wait().code(code);
        assert!(!socket.exists(), "{how}");
    }
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 143)] {
        let vm = Husk::guest("hello", "how=hlt").listening_at(&socket).start();
        vm.expect("how=hlt");
        assert!(socket.exists());
        vm.signal(signal);
        vm.wait().code(code);
        assert!(!socket.exists(), "{signal:?}");
    }
    Husk::run(scratch.path("none")).option("--api-sock", &socket).wait().code(3);
    assert!(!socket.exists());
}

#[test]
fn killed_husk_is_followed_without_cleaning_up() {
    let scratch = Scratch::new();
    let (socket, disk) = (scratch.path("api.sock"), scratch.sparse("disk.img", 1 << 20));
    let husk = || Husk::guest("hello", "how=hang").disk(&disk).listening_at(&socket);
    for _ in 0..2 {
        let vm = husk().start();
        vm.expect("how=hang");
        vm.signal(Signal::KILL);
        assert_eq!(vm.wait().signal(), Some(9));
        assert!(socket.exists());
    }
    let vm = husk().start();
    vm.api().act("Kill").done();
    vm.wait().code(0);
}

#[test]
fn vm_has_the_threads_it_should_have() {
    let vm = Husk::guest("hello", "how=hang").cpus(2).start();
    vm.expect("how=hang");
    // The second vCPU waits for the first to start it, perhaps without a name as yet.
    assert_eq!(threads(&vm).len(), 4);
    let vm = Husk::guest("hello", "how=hang").listening().start();
    vm.expect("how=hang");
    assert_eq!(threads(&vm), ["husk", "husk_api", "husk_files", "husk_io", "husk_vcpu 0"]);
}

/// The names of its threads, those that KVM has in it left out.
fn threads(vm: &TestVm) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", vm.pid())).unwrap();
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap();
    let mut names: Vec<_> = tasks.map(|t| name(t.unwrap()).trim().to_owned()).collect();
    names.retain(|name| !name.starts_with("kvm-"));
    names.sort();
    names
}

#[test]
fn descriptors_are_close_on_exec() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let disk = scratch.sparse("disk.img", 1 << 20);
    let husk = Husk::guest("hello", "how=hang").network(&network, "").disk(&disk).arg("--rng");
    let vm = husk.listening().start();
    vm.expect("how=hang");
    let process = PathBuf::from(format!("/proc/{}", vm.pid()));
    for entry in fs::read_dir(process.join("fdinfo")).unwrap() {
        let entry = entry.unwrap();
        let path = fs::read_link(process.join("fd").join(entry.file_name())).unwrap();
        let info = fs::read_to_string(entry.path()).unwrap();
        let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap().trim();
        let is_close_on_exec = u32::from_str_radix(flags, 8).unwrap() & 0o2_000_000 != 0;
        // The test's own process may have been started with descriptors that it hands down.
        let is_inherited = fs::read_link(Path::new("/proc/self/fd").join(entry.file_name()))
            .is_ok_and(|ours| ours == path);
        let number = entry.file_name();
        let is_stream = ["0", "1", "2"].iter().any(|n| number == *n);
        // The event loop's library has one that is not.
        let is_eventfd = path == Path::new("anon_inode:[eventfd]");
        let is_fine = is_close_on_exec || is_inherited || is_stream || is_eventfd;
        assert!(is_fine, "{number:?} {path:?}: {info}");
    }
}

#[test]
fn pause_holds_a_guest_that_resets_itself() {
    let vm = Husk::guest("hello", "how=reboot-acpi").listening().start();
    for _ in 0..50 {
        vm.expect("hello=world");
        vm.api().patch("/vm", json!({"state": "Paused"})).done();
        // A reset that came just before has been dealt with when the next request is answered.
        assert_eq!(vm.api().state(), "Paused");
        vm.api().patch("/vm", json!({"state": "Resumed"})).done();
    }
    vm.api().act("Kill").done();
    vm.wait().code(0);
}

/// A file system of its own, on which writes can be made to hang. Thawed and unmounted when dropped.
struct Freezer {
    scratch: Scratch,
}

impl Freezer {
    fn new() -> Self {
        let scratch = Scratch::new();
        let (image, root) = (scratch.sparse("fs.img", 64 << 20), scratch.path("empty"));
        fs::create_dir(&root).unwrap();
        ext4(&image, &root);
        fs::create_dir(scratch.path("mnt")).unwrap();
        let freezer = Self { scratch };
        freezer.run("mount", &["-o", "loop,noatime"], &[&image, &freezer.mount()]);
        freezer
    }

    fn mount(&self) -> PathBuf {
        self.scratch.path("mnt")
    }

    fn freeze(&self) -> Frozen<'_> {
        self.run("fsfreeze", &["-f"], &[&self.mount()]);
        Frozen(self)
    }

    fn run(&self, program: &str, words: &[&str], paths: &[&Path]) {
        let status = std::process::Command::new(program).args(words).args(paths).status();
        let status = status.unwrap_or_else(|e| panic!("{program}, of util-linux: {e}"));
        assert!(status.success(), "{program} {words:?} {paths:?}: {status}");
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let mount = self.mount();
        // Not mounted, if the test failed early.
        let _ = std::process::Command::new("umount").arg("-l").arg(&mount).output();
    }
}

/// Writes hang until this is dropped. To be dropped before the process that writes is waited for: the
/// kernel keeps it for as long as it keeps the write.
struct Frozen<'a>(&'a Freezer);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.run("fsfreeze", &["-u"], &[&self.0.mount()]);
    }
}

#[test]
fn disk_that_hangs_does_not_take_the_vm_with_it() {
    let freezer = Freezer::new();
    let disk = freezer.mount().join("disk.img");
    fs::File::create(&disk).unwrap().set_len(32 << 20).unwrap();
    let vm = Husk::guest("bench_block", "write").disk(&disk).listening().start();
    vm.expect("name=");
    let frozen = freezer.freeze();
    // The guest reads until it writes; from then on the disk does not answer.
    let fault = loop {
        let paused = vm.api().patch("/vm", json!({ "state": "Paused" }));
        match paused.status {
            204 => vm.api().patch("/vm", json!({ "state": "Resumed" })).done(),
            _ => break paused.fault(),
        }
    };
    assert!(fault.contains("disk0") && fault.contains("has not answered"), "{fault}");
    assert_eq!(vm.api().state(), "Running");
    vm.signal(Signal::TERM);
    vm.expect_error("stopped by SIGTERM");
    drop(frozen);
    vm.wait().code(143);
}

#[test]
fn signals_blocked_by_the_parent_change_nothing() {
    let vm = Husk::guest("hello", "how=hang").with_signals_blocked().listening().start();
    vm.expect("how=hang");
    vm.api().patch("/vm", json!({ "state": "Paused" })).done();
    vm.signal(Signal::TERM);
    vm.wait().code(143);
}
