//! husk in a Rust program: several VMs in one process, followed, waited for, killed and dropped.
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use husk::{
    Ending, Event, ExitCode, HugePages, Image, OnReboot, Refusal, Request, Restore, RewindParams,
    SerialConfig, SerialTo, SnapshotParams, Vm, VmConfig, What,
};

use crate::fork::wait_until;
use crate::restore::{Handler, memory_file};
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

/// The guest `steps`, which does what it is told at a socket.
struct Steps {
    vm: Vm,
    serial: BufReader<UnixStream>,
}

impl Steps {
    fn start(scratch: &Scratch) -> Self {
        require_host();
        let mut config = VmConfig::new(guest("steps"));
        config.machine.mem_size_mib = 16;
        let socket = scratch.path("booted");
        config.serial.to = Some(SerialTo::Socket(socket.clone()));
        let vm = Vm::start(config).unwrap();
        Self { vm, serial: connect(&socket) }
    }

    /// A VM that goes on as `restore` says.
    fn restore(scratch: &Scratch, name: &str, mut restore: Restore) -> Self {
        let socket = scratch.path(name);
        let to = Some(SerialTo::Socket(socket.clone()));
        restore.overrides.serial = Some(SerialConfig { to, ..SerialConfig::default() });
        let vm = Vm::prepare(VmConfig::default()).unwrap();
        vm.handle().call(Request::Restore(Box::new(restore))).unwrap();
        Self { vm, serial: connect(&socket) }
    }

    /// Tells the guest `what`; what it says of `key`.
    #[track_caller]
    fn tell(&mut self, what: &str, key: &str) -> String {
        self.serial.get_mut().write_all(what.as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            assert_ne!(self.serial.read_line(&mut line).unwrap(), 0, "the end rather than {key}=");
            if let Some((found, value)) = line.trim_end().split_once('=')
                && found == key
            {
                return value.to_owned();
            }
        }
    }

    fn time(&mut self) -> Duration {
        let us = self.tell("t", "time");
        Duration::from_micros(us.split(' ').next().unwrap().parse().unwrap())
    }
}

fn connect(socket: &Path) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    BufReader::new(stream)
}

#[test]
fn a_program_takes_a_vm_back() {
    let scratch = Scratch::new();
    let [first, second] = ["first", "second"].map(|name| scratch.path(name));
    let mut steps = Steps::start(&scratch);
    let refusal = steps.vm.rewind(RewindParams::default()).unwrap_err();
    assert!(refusal.to_string().contains("neither restored nor saved"), "{refusal}");
    let refusal = steps.vm.record_working_set().unwrap_err();
    assert!(refusal.to_string().contains("was not restored"), "{refusal}");
    let events = steps.vm.events().unwrap();
    assert_eq!(steps.tell("c", "count"), "1");
    steps.vm.snapshot(SnapshotParams::to_directory(&first)).unwrap();
    assert_eq!(steps.tell("c", "count"), "2");
    steps.vm.snapshot(SnapshotParams::to_directory(&second)).unwrap();
    for _ in 0..2 {
        assert_eq!(steps.tell("c", "count"), "3");
        steps.vm.rewind(RewindParams::default()).unwrap();
        let back = until(&events, |what| matches!(what, What::Rewound { .. }));
        assert!(matches!(back.what, What::Rewound { paused: false, .. }), "{back:?}");
    }
    let directory = Some(first);
    let resume_vm = Some(false);
    let params = RewindParams { directory, resume_vm, ..RewindParams::default() };
    steps.vm.rewind(params).unwrap();
    assert_eq!(steps.vm.describe().unwrap()["state"], "Paused");
    steps.vm.resume().unwrap();
    assert_eq!(steps.tell("c", "count"), "2");
    let missing = RewindParams { directory: Some(scratch.path("none")), ..RewindParams::default() };
    assert!(matches!(steps.vm.rewind(missing), Err(Refusal::Snapshot(_))));
    // A refusal leaves it as it was.
    assert_eq!(steps.tell("c", "count"), "3");
}

#[test]
fn a_program_chooses_how_a_vm_goes_on() {
    let scratch = Scratch::new();
    let directory = scratch.path("snapshot");
    let mut steps = Steps::start(&scratch);
    steps.tell("c", "count");
    let shown_at = Instant::now();
    let shown = steps.time();
    steps.vm.snapshot(SnapshotParams::to_directory(&directory)).unwrap();
    let alive = shown_at.elapsed();
    let saved_at = Instant::now();
    drop(steps);
    let image = Image::open(&directory).unwrap();
    let set = directory.join("working-set");

    let noted = Restore { record_ms: Some(1), ..Restore::new(&image) };
    let mut steps = Steps::restore(&scratch, "noted", noted);
    wait_until(|| set.exists());
    assert_eq!(steps.tell("c", "count"), "2");
    let before = fs::read(&set).unwrap();
    steps.vm.record_working_set().unwrap();
    assert_ne!(fs::read(&set).unwrap(), before, "more has been touched since");
    drop(steps);

    let pages = |vm: &Vm| vm.handle().call(Request::Config).unwrap()["machine-config"].clone();
    for huge_pages in [HugePages::Transparent, HugePages::None] {
        let huge_pages = Some(huge_pages);
        let restore = Restore { huge_pages, ignores_working_set: true, ..Restore::new(&image) };
        let mut steps = Steps::restore(&scratch, &format!("{huge_pages:?}"), restore);
        assert_eq!(steps.tell("c", "count"), "2");
        let is = pages(&steps.vm)["huge_pages"].clone();
        assert_eq!(is, serde_json::to_value(huge_pages).unwrap());
    }

    let handler = Handler::start(&scratch, "handler", &memory_file(&directory));
    let served = Restore { handler: Some(handler.socket.clone()), ..Restore::new(&image) };
    let mut steps = Steps::restore(&scratch, "served", served);
    assert_eq!(steps.tell("c", "count"), "2");
    let refusal = steps.vm.record_working_set().unwrap_err();
    assert!(refusal.to_string().contains("not restored from a memory file"), "{refusal}");
    drop(steps);
    let nobody = Some(scratch.path("nobody"));
    let vm = Vm::prepare(VmConfig::default()).unwrap();
    let restore = Restore { handler: nobody, ..Restore::new(&image) };
    let refusal = vm.handle().call(Request::Restore(Box::new(restore))).unwrap_err();
    assert_eq!(refusal.exit_code(), ExitCode::Host, "{refusal}");

    // By now some time has passed, which a guest is shown that asks for it.
    for clock_realtime in [false, true] {
        let begun = Instant::now();
        let dead = saved_at.elapsed();
        let restore = Restore { clock_realtime, ..Restore::new(&image) };
        let mut steps = Steps::restore(&scratch, &format!("clock-{clock_realtime}"), restore);
        let passed = steps.time() - shown;
        match clock_realtime {
            true => assert!(passed >= dead, "{passed:?}, and it was dead for {dead:?}"),
            false => assert!(passed <= alive + begun.elapsed(), "{passed:?}, alive for {alive:?}"),
        }
    }
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
