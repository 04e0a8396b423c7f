//! husk in a Rust program: several VMs in one process, followed, waited for, killed and dropped.
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use husk::{Ending, Event, ExitCode, OnReboot, Refusal, Request, SerialTo, Vm, VmConfig, What};

use crate::util::*;

/// A VM with the test guest `hello`, whose console leads to the file `NAME.log`.
fn config(scratch: &Scratch, name: &str, cmdline: &str) -> VmConfig {
    require_host();
    let mut config = VmConfig::new(guest("hello"));
    config.machine.mem_size_mib = 16;
    config.serial.to = Some(SerialTo::File(scratch.path(&format!("{name}.log"))));
    if let Some(source) = &mut config.boot_source {
        source.boot_args = Some(cmdline.into());
    }
    config
}

fn log(scratch: &Scratch, name: &str) -> String {
    fs::read_to_string(scratch.path(&format!("{name}.log"))).unwrap()
}

/// Starts a VM whose events are all heard.
fn start(config: VmConfig) -> (Vm, Receiver<Event>) {
    let vm = Vm::prepare(config).unwrap();
    let events = vm.events().unwrap();
    vm.handle().call(Request::Start).unwrap();
    (vm, events)
}

/// Waits for the next event that `is_meant`.
fn until(events: &Receiver<Event>, is_meant: impl Fn(&What) -> bool) -> Event {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let event = events.recv_timeout(left).expect("an event");
        if is_meant(&event.what) {
            return event;
        }
    }
}

#[test]
fn vm_runs_to_its_end() {
    let scratch = Scratch::new();
    let vm = Vm::start(config(&scratch, "vm", "")).unwrap();
    assert_eq!(vm.wait().unwrap(), Ending::PoweredOff);
    assert!(log(&scratch, "vm").contains("RESULT ok"));
}

#[test]
fn several_vms_live_side_by_side() {
    let scratch = Scratch::new();
    let names: Vec<String> = (0..8).map(|i| format!("vm{i}")).collect();
    let vms: Vec<Vm> = names
        .iter()
        .map(|name| {
            let how = if name == "vm3" { "triple" } else { "poweroff" };
            Vm::start(config(&scratch, name, &format!("how={how} I-am-{name}"))).unwrap()
        })
        .collect();
    for (name, vm) in names.iter().zip(vms) {
        match (name.as_str(), vm.wait().unwrap()) {
            ("vm3", ending) => assert!(matches!(ending, Ending::TripleFault { vcpu: 0, .. })),
            (_, ending) => assert_eq!(ending, Ending::PoweredOff),
        }
        assert!(log(&scratch, name).contains("hello=world"));
    }
}

#[test]
fn events_tell_what_happens() {
    let scratch = Scratch::new();
    let (vm, events) = start(config(&scratch, "vm", "how=hang"));
    vm.pause().unwrap();
    assert_eq!(vm.describe().unwrap()["state"], "Paused");
    vm.resume().unwrap();
    vm.shutdown().unwrap();
    vm.kill().unwrap();
    assert_eq!(vm.wait().unwrap(), Ending::Killed);
    let events: Vec<What> = events.iter().map(|event| event.what).collect();
    let expected = [
        What::Started,
        What::Paused,
        What::Resumed,
        What::ShutdownRequested,
        What::Ended(Ending::Killed),
    ];
    assert_eq!(events, expected);
}

#[test]
fn reset_boots_again_or_ends() {
    let scratch = Scratch::new();
    let (vm, events) = start(config(&scratch, "again", "how=reboot-acpi"));
    for _ in 0..3 {
        until(&events, |what| *what == What::Rebooted);
    }
    vm.kill().unwrap();
    assert_eq!(vm.wait().unwrap(), Ending::Killed);
    assert!(log(&scratch, "again").matches("hello=world").count() >= 3);

    let mut once = config(&scratch, "once", "how=reboot-acpi");
    once.machine.on_reboot = Some(OnReboot::Exit);
    assert_eq!(Vm::start(once).unwrap().wait().unwrap(), Ending::Reset);
}

#[test]
fn dropped_vm_lets_go_of_everything() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 1 << 20);
    let with_disk = || {
        let mut config = config(&scratch, "vm", "how=hang");
        config.add::<husk::block::Block>(husk::block::Config::new("a", &disk)).map(|()| config)
    };
    // A process that another test starts holds copies of all descriptors, and with them the lock, until it executes its
    // program.
    let start = || {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match with_disk().and_then(Vm::start) {
                Err(Refusal::Device { .. }) if Instant::now() < deadline => {
                    std::thread::yield_now()
                }
                started => break started.unwrap(),
            }
        }
    };
    for _ in 0..3 {
        let vm = start();
        assert!(matches!(with_disk(), Err(Refusal::Device { .. })));
        let dropped = Stopwatch::start();
        drop(vm);
        dropped.within(Duration::ZERO, Duration::from_secs(3));
        start().kill().unwrap();
    }
}

#[test]
fn vm_that_was_never_started_is_dropped() {
    let scratch = Scratch::new();
    let vm = Vm::prepare(config(&scratch, "vm", "")).unwrap();
    let events = vm.events().unwrap();
    drop(vm);
    assert!(matches!(until(&events, |_| true).what, What::Ended(_)));
}

#[test]
fn refusals_are_typed_and_leave_nothing() {
    let scratch = Scratch::new();
    let refused = Vm::start(VmConfig::new(scratch.path("none"))).unwrap_err();
    assert!(matches!(refused, Refusal::Open { .. }));
    assert_eq!(refused.exit_code(), ExitCode::Config);
    let mut large = config(&scratch, "vm", "");
    large.machine.mem_size_mib = 1 << 20;
    assert_eq!(Vm::start(large).unwrap_err().exit_code(), ExitCode::Host);
    let (vm, _) = start(config(&scratch, "vm", "how=hang"));
    assert!(matches!(vm.handle().call(Request::Start), Err(Refusal::AlreadyStarted)));
}

#[test]
fn handle_outlives_its_vm() {
    let scratch = Scratch::new();
    let vm = Vm::start(config(&scratch, "vm", "how=hang")).unwrap();
    let handle = vm.handle().clone();
    let waiting = std::thread::spawn({
        let handle = handle.clone();
        move || handle.call(Request::Wait)
    });
    handle.call(Request::Describe).unwrap();
    handle.call(Request::Kill).unwrap();
    assert_eq!(vm.wait().unwrap(), Ending::Killed);
    // It asked before the end or after.
    let answer = waiting.join().unwrap();
    assert!(
        answer.is_ok_and(|ending| ending["reason"] == "killed")
            || handle.call(Request::Pause).is_err()
    );
    assert!(matches!(handle.call(Request::Describe), Err(Refusal::Gone)));
}

#[test]
fn example_program_runs() {
    require_host();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(env!("CARGO"));
    command.args(["run", "--quiet", "--example", "run_guest"]).current_dir(directory);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for line in ["first: the guest powered off", "second: the guest powered off", "Started"] {
        assert!(text.contains(line), "{text}");
    }
}
