//! Restore: what goes on, with what outside, from the shell, over the API and in a program; what is refused, and how.
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use serde_json::{Value, json};

use crate::util::*;

/// 16 MiB for the guest `steps`, which does what it is told.
fn steps() -> Husk {
    Husk::guest("steps", "").memory(16).listening().typing()
}

/// `husk restore` of a snapshot.
fn restore(snapshot: &Path) -> Husk {
    Husk::new(["restore"]).arg(snapshot)
}

/// Tells the guest `what`; the line it says with `key`.
#[track_caller]
fn tell(vm: &TestVm, what: &str, key: &str) -> String {
    vm.type_in(what);
    let line = vm.expect(&format!("{key}="));
    line.trim_end().split_once('=').unwrap().1.to_owned()
}

#[track_caller]
fn snapshot(vm: &TestVm, directory: &Path) {
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
}

/// A snapshot of `husk`'s guest after it has counted to 2.
fn made(scratch: &Scratch, husk: Husk) -> PathBuf {
    let vm = husk.start();
    vm.expect("ready=1");
    assert_eq!(tell(&vm, "cc", "count"), "1");
    vm.expect("count=2");
    let directory = scratch.path("snapshot");
    snapshot(&vm, &directory);
    // It goes on as if nothing had been.
    assert_eq!(tell(&vm, "c", "count"), "3");
    vm.type_in("q");
    vm.wait().ok();
    directory
}

/// Sums of the files in a directory, by name.
fn sums(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
        })
        .collect();
    all.sort();
    all
}

/// The one memory file in a directory.
pub(crate) fn memory_file(directory: &Path) -> PathBuf {
    let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut found =
        names.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("memory-"));
    let path = found.next().expect("a memory file");
    assert_eq!(found.next(), None);
    path
}

#[test]
fn a_guest_goes_on_in_another_process() {
    let scratch = Scratch::new();
    let directory = made(&scratch, steps().arg("--rng"));
    let before = sums(&directory);
    // Two at once, each with what it was left with, neither with what the other does.
    let clones = [(); 2].map(|()| restore(&directory).listening().typing().start());
    let mut random = Vec::new();
    for vm in &clones {
        assert_eq!(tell(vm, "c", "count"), "3");
        assert_eq!(tell(vm, "c", "count"), "4");
        random.push(tell(vm, "r", "random"));
    }
    assert_ne!(random[0], random[1]);
    // Like any VM: described, paused, resumed, saved again.
    let [one, other] = clones;
    let config = one.api().get("/vm/config").json();
    assert_eq!(config["machine-config"]["mem_size_mib"], 16);
    assert!(config["entropy"].is_object(), "{config}");
    one.api().patch("/vm", json!({ "state": "Paused" })).done();
    assert_eq!(one.api().state(), "Paused");
    let again = scratch.path("again");
    snapshot(&one, &again);
    one.api().patch("/vm", json!({ "state": "Resumed" })).done();
    assert_eq!(tell(&one, "c", "count"), "5");
    for vm in [one, other] {
        vm.type_in("q");
        vm.wait().ok();
    }
    let third = restore(&again).typing().start();
    assert_eq!(tell(&third, "c", "count"), "5");
    third.type_in("q");
    third.wait().ok();
    assert!(sums(&directory) == before, "a restored VM has changed its snapshot");
}

/// KVM lists most MSRs, but not these.
#[test]
fn memory_types_are_as_they_were() {
    let scratch = Scratch::new();
    let vm = steps().start();
    vm.expect("ready=1");
    let first = tell(&vm, "m", "mtrrs");
    let directory = scratch.path("snapshot");
    snapshot(&vm, &directory);
    let changed = tell(&vm, "m", "mtrrs");
    assert_ne!(changed, first);
    let restored = restore(&directory).typing().start();
    assert_eq!(tell(&restored, "m", "mtrrs"), changed);
    for vm in [vm, restored] {
        vm.type_in("q");
        vm.wait().ok();
    }
}

/// How far the guest's clocks may be from what a test can know of them.
const CLOCK_SLACK: Duration = Duration::from_millis(100);

/// The guest's kvm-clock and its TSC, but for a TSC that is the host's: where KVM has no hardware to offset it.
fn clocks(vm: &TestVm) -> Vec<Duration> {
    let count = if Path::new("/sys/module/kvm_pvm").exists() { 1 } else { 2 };
    let line = tell(vm, "t", "time");
    let words = line.split_whitespace().take(count);
    words.map(|us| Duration::from_micros(us.parse().unwrap())).collect()
}

#[test]
fn clocks_stand_still_or_catch_up() {
    let scratch = Scratch::new();
    let directory = scratch.path("snapshot");
    let vm = steps().start();
    vm.expect("ready=1");
    let start = Instant::now();
    let first = clocks(&vm);
    let first_by = start.elapsed();
    snapshot(&vm, &directory);
    drop(vm);
    let until = start.elapsed();
    let stand_still = |vm: &TestVm, since: Instant| {
        for (now, first) in clocks(vm).iter().zip(&first) {
            let (passed, most) = (*now - *first, until + since.elapsed() + CLOCK_SLACK);
            assert!(passed <= most, "{passed:?} have passed, want {most:?} at most");
        }
    };
    let catch_up = |vm: &TestVm| {
        let least = start.elapsed() - first_by - CLOCK_SLACK;
        for (now, first) in clocks(vm).iter().zip(&first) {
            let (passed, most) = (*now - *first, start.elapsed() + CLOCK_SLACK);
            assert!((least..=most).contains(&passed), "{passed:?}, want {least:?} to {most:?}");
        }
    };
    let pass = || std::thread::sleep(Duration::from_millis(500));
    pass();
    let mut since = Instant::now();
    let vm = restore(&directory).listening().typing().start();
    stand_still(&vm, since);
    // Soon enough for KVM to think that TSCs are to be synchronized, and more than once.
    for _ in 0..2 {
        pass();
        since = Instant::now();
        vm.api().put("/snapshot/rewind", json!({})).done();
        stand_still(&vm, since);
    }
    vm.api().put("/snapshot/rewind", json!({ "clock_realtime": true })).done();
    catch_up(&vm);
    drop(vm);
    let vm = restore(&directory).arg("--clock-realtime").typing().start();
    catch_up(&vm);
}

/// One that was on its way when the VM was saved is in no interrupt controller's state.
#[test]
fn interrupts_that_are_not_acknowledged_come_again() {
    let scratch = Scratch::new();
    let directory = scratch.path("snapshot");
    let disk = scratch.file("disk", [b'd'; 4096]);
    // Lost only if they were raised before the guest would take them: a host that is busy may do that later.
    let vm = (0..20).find_map(|_| {
        let vm = steps().disk(&disk).start();
        vm.expect("ready=1");
        // The byte after the command stays in the port.
        (tell(&vm, "lq", "lost") == "true").then_some(vm)
    });
    let vm = vm.expect("interrupts that are lost");
    snapshot(&vm, &directory);
    drop(vm);
    let vm = restore(&directory).start();
    assert_eq!(vm.expect("told=").trim_end(), "told=true,true");
    vm.wait().ok();
}

#[test]
fn what_names_the_outside_can_be_another() {
    let scratch = Scratch::new();
    let file = |name: &str, text: &str, len: usize| {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(len, 0);
        scratch.file(name, bytes)
    };
    let (disk, pmem) = (file("disk", "disk-one", 4096), file("pmem", "pmem-one", 2 << 20));
    let network = Network::with_tap();
    network.ip("tuntap add tap7 mode tap vnet_hdr");
    let husk = steps()
        .disk(&disk)
        .option("--pmem", &pmem)
        .network(&network, ",mac=06:00:00:00:00:01")
        .vsock(3, &scratch.path("v1"));
    let directory = made(&scratch, husk);
    let clone_disk = file("disk2", "disk-two", 8192);
    let clone_pmem = file("pmem2", "pmem-two", 2 << 20);
    let vm = restore(&directory)
        .within(&network)
        .option("--disk", format!("disk0={}", clone_disk.display()))
        .option("--pmem", format!("pmem0={}", clone_pmem.display()))
        .option("--net", "eth0=tap=tap7,mac=06:00:00:00:00:02")
        .option("--vsock", format!("uds={},cid=9", scratch.path("v2").display()))
        .option("--id", "clone")
        .listening()
        .typing()
        .start();
    assert_eq!(tell(&vm, "b", "disk"), "disk-two");
    assert_eq!(tell(&vm, "p", "pmem"), "pmem-two");
    assert_eq!(tell(&vm, "n", "mac"), "06:00:00:00:00:02");
    assert_eq!(tell(&vm, "v", "cid"), "9");
    assert_eq!(tell(&vm, "w", "wrote"), "2");
    assert!(scratch.path("v2").exists());
    assert_eq!(vm.api().get("/").json()["id"], "clone");
    let config = vm.api().get("/vm/config").json();
    assert_eq!(config["drives"][0]["path_on_host"], json!(clone_disk));
    assert_eq!(config["network-interfaces"][0]["host_dev_name"], "tap7");
    assert_eq!(config["vsock"]["guest_cid"], 9);
    vm.type_in("q");
    vm.wait().ok();
    assert_eq!(fs::read(&clone_disk).unwrap()[512], 2);
    assert_eq!(fs::read(&disk).unwrap()[512], 0);
}

#[test]
fn persistent_memory_is_as_large_as_it_was() {
    let scratch = Scratch::new();
    let pmem = scratch.file("pmem", vec![0; 4 << 20]);
    let directory = made(&scratch, steps().option("--pmem", &pmem));
    let other = scratch.file("other", "");
    for len in [2 << 20, (4 << 20) - 1, 64 << 20] {
        fs::OpenOptions::new().write(true).open(&other).unwrap().set_len(len).unwrap();
        let husk = restore(&directory).option("--pmem", format!("pmem0={}", other.display()));
        let e = husk.wait().quickly().refused(3);
        let why =
            format!("has {len} bytes, and had 4194304 when it was saved: give a file of that");
        assert!(e.contains("pmem pmem0: path_on_host: ") && e.contains(&why), "{e}");
    }
}

#[test]
fn firecrackers_words_restore_too() {
    let scratch = Scratch::new();
    let network = Network::with_tap();
    network.ip("tuntap add tap7 mode tap vnet_hdr");
    let vm = steps().network(&network, "").vsock(3, &scratch.path("v1")).start();
    vm.expect("ready=1");
    let api = vm.api();
    let (state, memory) = (scratch.path("vm.state"), scratch.path("vm.mem"));
    api.patch("/vm", json!({ "state": "Paused" })).done();
    api.put(
        "/snapshot/create",
        json!({ "snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory }),
    )
    .done();
    drop(vm);
    let log = scratch.file("log", "");
    for (how, is_deprecated) in [
        (json!({ "mem_file_path": memory }), true),
        (json!({ "mem_backend": { "backend_type": "File", "backend_path": memory } }), false),
        (json!({ "mem_file_path": memory, "enable_diff_snapshots": true }), true),
    ] {
        let vm = Husk::firecracker(["--api-sock"])
            .arg(scratch.path("fc.sock"))
            .within(&network)
            .start_unheard();
        vm.expect("Listening on API socket");
        let api = Api::new(&scratch.path("fc.sock"));
        // These may come first, as to Firecracker.
        api.put("/logger", json!({ "log_path": log })).done();
        let mut body = json!({
            "snapshot_path": state, "resume_vm": false, "track_dirty_pages": false,
            "clock_realtime": true, "huge_pages": "Snapshot",
            "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap7" }],
            "vsock_override": { "uds_path": scratch.path("v2") },
        });
        body.as_object_mut().unwrap().extend(how.as_object().unwrap().clone());
        let reply = api.put("/snapshot/load", &body);
        reply.done();
        assert_eq!(reply.head.contains("Deprecation: true"), is_deprecated, "{}", reply.head);
        assert_eq!(api.state(), "Paused");
        let tracks = how.get("enable_diff_snapshots").is_some();
        assert_eq!(api.get("/machine-config").json()["track_dirty_pages"], tracks);
        let config = api.get("/vm/config").json();
        assert_eq!(config["network-interfaces"][0]["host_dev_name"], "tap7");
        assert_eq!(config["vsock"]["uds_path"], json!(scratch.path("v2")));
        api.patch("/vm", json!({ "state": "Resumed" })).done();
        assert_eq!(api.state(), "Running");
        drop(vm);
        let _ = fs::remove_file(scratch.path("fc.sock"));
        let _ = fs::remove_file(scratch.path("v2"));
    }
}

#[test]
fn what_is_refused_says_what_to_do() {
    let scratch = Scratch::new();
    let disk = scratch.file("disk", [b'd'; 4096]);
    let directory = made(&scratch, steps().disk(&disk));
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    let state = text(directory.join("state"));
    let memory = text(memory_file(&directory));
    let short = text(scratch.file("short", [0; 4096]));
    let other = {
        let scratch = Scratch::new();
        let other = made(&scratch, steps());
        let kept = memory_file(&other);
        fs::rename(kept, directory.with_file_name("other")).unwrap();
        text(directory.with_file_name("other"))
    };
    let mut bytes = fs::read(directory.join("state")).unwrap();
    bytes[200] ^= 4;
    let flipped = text(scratch.file("flipped", &bytes));
    let directory_name = text(directory.clone());
    let refused = |args: &[&str], code, words: &str| {
        let line = Husk::new(["restore"].iter().chain(args)).wait().quickly().refused(code);
        assert!(line.contains(words), "{args:?}: {line}");
    };
    let snapshot = directory_name.as_str();
    refused(&["/nonexistent"], 3, "state file: cannot open /nonexistent/state");
    refused(&[&state], 3, "--memory: ");
    refused(&[&state], 3, "is a file: if it is a state file, say where its memory is");
    refused(&[snapshot, "--memory", &memory], 3, "is a directory, and has the memory in it");
    refused(&[&state, "--memory", "/nonexistent"], 3, "memory file: cannot open /nonexistent");
    refused(&[&state, "--memory", &short], 7, "length: it has 4096 bytes, the state file wants");
    refused(&[&state, "--memory", &other], 7, "id: it belongs to snapshot");
    refused(&[&flipped, "--memory", &memory], 7, "the state file is damaged: state checksum");
    refused(&[&short, "--memory", &memory], 7, "the state file is damaged: magic");
    let fault = "overrides: drives: the snapshot has none with id 'root': disk0";
    refused(&[snapshot, "--disk", &format!("root={}", disk.display())], 3, fault);
    refused(&[snapshot, "--disk", "disk0=/nonexistent"], 3, "drives disk0: ");
    refused(&[snapshot, "--net", "eth0=tap=tap0"], 3, "network-interfaces: the snapshot has none");
    refused(&[snapshot, "--vsock", "cid=9"], 3, "overrides: vsock: the snapshot has none");
    refused(&[snapshot, "--huge-pages", "none", "--serial", "file=/nonexistent/x"], 3, "serial: ");
    for words in [
        &["--paused"][..],
        &["--disk", "x"],
        &["--disk", "disk0=x,ro"],
        &["--net", "eth0=mtu=9"],
        &["--vsock", "9"],
        &["--pmem", "p"],
        &["--id", "a b"],
    ] {
        Husk::new(["restore", snapshot].iter().chain(words)).wait().quickly().code(2);
    }
    // The process that was asked in vain can be asked again.
    let vm = Husk::api().option("--mmds-size-limit", "100").typing().start();
    let api = vm.api();
    let load = |body: Value| api.put("/snapshot/load", body);
    let body = "An error occurred when deserializing the json body of a request: ";
    for (wrong, words) in [
        (
            json!({ "snapshot_path": state }),
            format!("{body}missing field: either `mem_backend` or `mem_file_path` is required."),
        ),
        (
            json!({ "snapshot_path": state, "mem_file_path": memory,
                    "mem_backend": { "backend_type": "File", "backend_path": memory } }),
            format!(
                "{body}too many fields: either `mem_backend` or `mem_file_path` exclusively is required."
            ),
        ),
        (json!({ "mem_file_path": memory }), format!("{body}missing field `snapshot_path`.")),
        (
            json!({ "snapshot_path": flipped, "mem_file_path": memory }),
            "the state file is damaged: state checksum".into(),
        ),
        (
            json!({ "directory": directory, "overrides": { "disks": [] } }),
            "overrides: unknown field 'disks'".into(),
        ),
        (
            json!({ "directory": directory,
                    "overrides": { "drives": [{ "drive_id": "disk0", "is_read_only": true }] } }),
            "overrides: drives disk0: is_read_only: the guest knows it".into(),
        ),
        (
            json!({ "directory": directory,
                    "network_overrides": [{ "iface_id": "e", "host_dev_name": "t" }] }),
            "overrides: network-interfaces: the snapshot has none".into(),
        ),
    ] {
        let fault = load(wrong.clone()).fault();
        assert!(fault.starts_with(&words), "{wrong}: {fault}");
        assert_eq!(api.state(), "Not started");
    }
    let much = json!({ "directory": directory, "overrides": { "mmds": "x".repeat(200) } });
    assert_eq!(load(much).status, 413);
    assert_eq!(api.get("/mmds").json(), json!({}));
    load(json!({ "directory": directory, "resume_vm": true, "overrides": { "mmds": { "a": 1 }, "id": "b" } }))
        .done();
    assert_eq!(tell(&vm, "c", "count"), "3");
    assert_eq!(api.get("/mmds").json(), json!({ "a": 1 }));
    assert_eq!(api.get("/").json()["id"], "b");
    vm.type_in("q");
    vm.wait().ok();
}

#[test]
fn a_reset_boots_again_if_the_kernel_is_there() {
    let scratch = Scratch::new();
    let kernel = scratch.path("kernel");
    fs::copy(guest("steps"), &kernel).unwrap();
    let husk = Husk::run(&kernel).cmdline("").memory(16).listening().typing();
    let directory = made(&scratch, husk);
    let vm = restore(&directory).typing().start();
    assert_eq!(tell(&vm, "c", "count"), "3");
    vm.type_in("x");
    vm.expect("ready=1");
    assert_eq!(tell(&vm, "c", "count"), "1");
    vm.type_in("q");
    vm.wait().ok();
    let moved = scratch.path("moved");
    fs::rename(&kernel, &moved).unwrap();
    let vm = restore(&directory).typing().start();
    assert_eq!(tell(&vm, "c", "count"), "3");
    vm.type_in("x");
    vm.wait().code(0);
    let vm = restore(&directory).option("--kernel", &moved).typing().start();
    assert_eq!(tell(&vm, "c", "count"), "3");
    vm.type_in("x");
    vm.expect("ready=1");
    vm.type_in("q");
    vm.wait().ok();
    let named = restore(&directory).option("--kernel", &moved);
    let line = named.option("--initrd", "/nonexistent").wait().refused(3);
    assert!(line.contains("/nonexistent"), "{line}");
    let line = restore(&directory).option("--kernel", &directory).wait().refused(3);
    assert!(line.contains("is a directory"), "{line}");
}

#[test]
fn a_program_restores_an_image_as_often_as_it_likes() {
    let scratch = Scratch::new();
    let directory = made(&scratch, steps());
    let image = husk::Image::open(&directory).unwrap();
    let before = sums(&directory);
    // The image is what it was when it was opened, whatever becomes of the names.
    let moved = directory.with_file_name("moved");
    fs::rename(&directory, &moved).unwrap();
    let vms: Vec<_> = (0..4)
        .map(|i| {
            let socket = scratch.path(&format!("serial{i}"));
            let mut overrides = husk::Overrides::default();
            let to = husk::SerialTo::Socket(socket.clone());
            overrides.serial =
                Some(husk::SerialConfig { to: Some(to), ..husk::SerialConfig::default() });
            let vm = husk::Vm::restore(&image, overrides).unwrap();
            (vm, BufReader::new(UnixStream::connect(socket).unwrap()))
        })
        .collect();
    for (vm, mut serial) in vms {
        serial.get_mut().write_all(b"c").unwrap();
        assert_eq!(line(&mut serial), "count=3");
        let again = scratch.path("again");
        vm.snapshot(husk::SnapshotParams::to_directory(&again)).unwrap();
        assert!(again.join("state").exists());
        serial.get_mut().write_all(b"q").unwrap();
        assert_eq!(vm.wait().unwrap(), husk::Ending::PoweredOff);
    }
    assert!(sums(&moved) == before, "a restored VM has changed its snapshot");
    let refusal = husk::Image::open(&directory).unwrap_err();
    assert!(refusal.to_string().starts_with("state file: cannot open"), "{refusal}");
}

fn line(reader: &mut impl BufRead) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

/// The outside of a VM that only one VM at a time can have.
fn with_outside(scratch: &Scratch, husk: Husk, network: &Network) -> Husk {
    husk.disk(scratch.path("disk"))
        .network(network, ",mac=06:00:00:00:00:01")
        .vsock(3, &scratch.path("vsock"))
        .arg("--rng")
}

#[test]
fn another_vm_takes_the_place_of_one_that_lives() {
    let scratch = Scratch::new();
    let network = Network::with_tap();
    let mut disk = b"disk-one".to_vec();
    disk.resize(4096, 0);
    scratch.file("disk", &disk);
    let metrics = scratch.file("metrics", "");
    let vm = with_outside(&scratch, steps(), &network).option("--metrics-path", &metrics).start();
    vm.expect("ready=1");
    let (api, warm) = (vm.api(), scratch.path("warm"));
    tell(&vm, "c", "count");
    snapshot(&vm, &warm);
    let mut events = api.follow("/events");
    let go_on = json!({ "directory": warm, "resume_vm": true });
    let (threads, descriptors) = (
        files_in(&format!("/proc/{}/task", vm.pid())),
        files_in(&format!("/proc/{}/fd", vm.pid())),
    );
    // Running or paused: the tap, the locked disk, the socket and the terminal are taken over each time.
    for round in 0..4 {
        assert_eq!(tell(&vm, "c", "count"), "2");
        assert_eq!(tell(&vm, "c", "count"), "3");
        assert_eq!(tell(&vm, "w", "wrote"), "3");
        if round % 2 == 1 {
            api.patch("/vm", json!({ "state": "Paused" })).done();
        }
        api.put("/snapshot/load", &go_on).done();
        assert_eq!(api.state(), "Running");
        assert_eq!(tell(&vm, "b", "disk"), "disk-one");
        assert_eq!(tell(&vm, "n", "mac"), "06:00:00:00:00:01");
        tell(&vm, "r", "random");
    }
    assert_eq!(files_in(&format!("/proc/{}/task", vm.pid())), threads);
    let now = files_in(&format!("/proc/{}/fd", vm.pid()));
    assert!(now <= descriptors + 1, "{descriptors} descriptors became {now}");
    let restored = std::iter::from_fn(|| events.next()).filter(|e| e["event"] == "restored");
    assert_eq!(restored.take(4).count(), 4);
    // What cannot be leaves the VM that is there as it was, running or paused.
    let state = warm.join("state");
    let whole = fs::read(&state).unwrap();
    let mut damaged = whole.clone();
    damaged[100] ^= 1;
    fs::write(&state, damaged).unwrap();
    for is_paused in [false, true] {
        if is_paused {
            api.patch("/vm", json!({ "state": "Paused" })).done();
        }
        let before = api.state();
        let fault = api.put("/snapshot/load", &go_on).fault();
        assert!(fault.contains("the state file is damaged"), "{fault}");
        assert_eq!(api.state(), before);
    }
    fs::write(&state, whole).unwrap();
    let mut elsewhere = go_on.clone();
    elsewhere["overrides"] =
        json!({ "drives": [{ "drive_id": "disk0", "path_on_host": "/nonexistent" }] });
    let fault = api.put("/snapshot/load", &elsewhere).fault();
    assert!(fault.contains("drives disk0") && fault.contains("/nonexistent"), "{fault}");
    elsewhere["overrides"] =
        json!({ "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": "tap9" }] });
    let fault = api.put("/snapshot/load", &elsewhere).fault();
    assert!(fault.contains("tap 'tap9' does not exist"), "{fault}");
    assert_eq!(api.state(), "Paused");
    api.patch("/vm", json!({ "state": "Resumed" })).done();
    assert_eq!(tell(&vm, "c", "count"), "2");
    assert_eq!(tell(&vm, "b", "disk"), "disk-one");
    // Another outside, part of it taken over.
    let mut other = b"disk-two".to_vec();
    other.resize(4096, 0);
    let other = scratch.file("other", other);
    elsewhere["overrides"] =
        json!({ "drives": [{ "drive_id": "disk0", "path_on_host": other }], "id": "other" });
    api.put("/snapshot/load", &elsewhere).done();
    assert_eq!(tell(&vm, "b", "disk"), "disk-two");
    assert_eq!(tell(&vm, "c", "count"), "2");
    assert_eq!(api.get("/").json()["id"], "other");
    api.act("FlushMetrics").done();
    vm.type_in("q");
    vm.wait().ok();
}

#[test]
fn a_tap_that_is_taken_over_carries_frames_on() {
    let scratch = Scratch::new();
    let network = Network::with_tap();
    let vm = Husk::guest("net", "echoes=100")
        .memory(16)
        .network(&network, ",mac=06:00:00:00:00:01")
        .listening()
        .start();
    vm.expect("ready=");
    let ping = || network.run("ping", "-c 1 -W 10 172.16.0.2");
    ping();
    let warm = scratch.path("warm");
    snapshot(&vm, &warm);
    for _ in 0..3 {
        ping();
        vm.api().put("/snapshot/load", json!({ "directory": warm, "resume_vm": true })).done();
        ping();
    }
    drop(vm);
    let vm = restore(&warm).within(&network).listening().start();
    // It is there when it answers: before that there is nobody at the tap.
    assert_eq!(vm.api().state(), "Running");
    ping();
}

#[test]
fn a_vm_that_boots_leaves_room_for_one_that_is_restored() {
    let scratch = Scratch::new();
    let directory = made(&scratch, steps());
    // Configured otherwise and not started, configured and running: the snapshot's VM takes its place.
    let vm = Husk::api().typing().start();
    let api = vm.api();
    api.put("/machine-config", json!({ "vcpu_count": 2, "mem_size_mib": 32 })).done();
    api.put("/entropy", json!({})).done();
    let load = json!({ "directory": directory, "resume_vm": true });
    api.put("/snapshot/load", &load).done();
    assert_eq!(tell(&vm, "c", "count"), "3");
    assert_eq!(api.get("/machine-config").json()["vcpu_count"], 1);
    assert!(api.get("/vm/config").json()["entropy"].is_null());
    vm.type_in("q");
    vm.wait().ok();
    let vm = Husk::guest("steps", "").cpus(2).memory(32).arg("--rng").listening().typing().start();
    vm.expect("ready=1");
    vm.api().put("/snapshot/load", &load).done();
    assert_eq!(tell(&vm, "r", "missing"), "rng");
    assert_eq!(tell(&vm, "c", "count"), "3");
    vm.type_in("q");
    vm.wait().ok();
}

/// A process that serves memory.
pub(crate) struct Handler {
    child: Child,
    said: BufReader<ChildStdout>,
    pub(crate) socket: PathBuf,
}

impl Handler {
    pub(crate) fn start(scratch: &Scratch, name: &str, memory: &Path) -> Self {
        let socket = scratch.path(name);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/handlers/uffd.py");
        let mut command = Command::new("python3");
        let command = command.arg(script).arg(&socket).arg(memory).stdout(Stdio::piped());
        let mut child = command.spawn().expect("python3");
        let mut said = BufReader::new(child.stdout.take().unwrap());
        assert_eq!(line(&mut said), "ready");
        Self { child, said, socket }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn another_process_serves_the_memory() {
    let scratch = Scratch::new();
    let disk = scratch.file("disk", [b'd'; 4096]);
    let directory = made(&scratch, steps().disk(&disk).arg("--rng").option("--balloon", "0"));
    let (state, memory) = (directory.join("state"), memory_file(&directory));
    let mut handler = Handler::start(&scratch, "pages", &memory);
    let vm = Husk::api().typing().start();
    let api = vm.api();
    let backend = json!({ "backend_type": "Uffd", "backend_path": handler.socket });
    let body = json!({ "snapshot_path": state, "mem_backend": backend, "resume_vm": true });
    api.put("/snapshot/load", body).done();
    assert_eq!(line(&mut handler.said), "mapped 1");
    // The first that touches a page is husk here, on behalf of a device.
    assert_eq!(tell(&vm, "b", "disk"), "dddddddd");
    tell(&vm, "r", "random");
    assert_eq!(tell(&vm, "c", "count"), "3");
    let fault = api.put("/snapshot/rewind", json!({})).fault();
    assert!(fault.contains("snapshot"), "{fault}");
    // All of it is saved, the pages as well that nobody has asked for.
    let again = scratch.path("again");
    snapshot(&vm, &again);
    assert_eq!(tell(&vm, "c", "count"), "4");
    vm.type_in("q");
    vm.wait().ok();
    let served = line(&mut handler.said);
    let served: u32 = served.strip_prefix("served ").unwrap().parse().unwrap();
    assert!(served > 1000, "{served}");
    let vm = restore(&again).typing().start();
    assert_eq!(tell(&vm, "c", "count"), "4");
    vm.type_in("q");
    vm.wait().ok();
    // From the shell.
    let handler = Handler::start(&scratch, "pages2", &memory);
    let vm = restore(&directory).option("--uffd", &handler.socket).typing().start();
    assert_eq!(tell(&vm, "c", "count"), "3");
    vm.type_in("q");
    vm.wait().ok();
}

#[test]
fn who_serves_the_memory_may_fail() {
    let scratch = Scratch::new();
    let directory = made(&scratch, steps());
    let memory = memory_file(&directory);
    let nobody = scratch.path("nobody");
    let line = restore(&directory).option("--uffd", &nobody).wait().quickly().refused(4);
    assert!(line.contains("mem_backend: ") && line.contains("nobody: cannot connect"), "{line}");
    let api = Husk::api().start();
    let backend = json!({ "backend_type": "Uffd", "backend_path": nobody });
    let body = json!({ "directory": directory, "mem_backend": backend });
    let fault = api.api().put("/snapshot/load", &body).fault();
    assert!(
        fault.ends_with("nobody: cannot connect: No such file or directory (os error 2)"),
        "{fault}"
    );
    drop(api);
    // Gone: the VM ends, and says why.
    let handler = Handler::start(&scratch, "gone", &memory);
    let vm = restore(&directory).option("--uffd", &handler.socket).listening().typing().start();
    assert_eq!(vm.api().state(), "Running");
    handler.signal(Signal::KILL);
    let end = vm.wait().code(8);
    assert!(end.errors.contains("the process that serves its memory has ended"), "{end}");
    // Silent: the guest waits, husk does not.
    let handler = Handler::start(&scratch, "silent", &memory);
    let vm = restore(&directory).option("--uffd", &handler.socket).listening().typing().start();
    assert_eq!(vm.api().state(), "Running");
    handler.signal(Signal::STOP);
    vm.type_in("c");
    // Where the guest waits decides whether it can be stopped; the answer comes.
    let reply = vm.api().patch("/vm", json!({ "state": "Paused" }));
    if reply.status != 204 {
        let fault = reply.fault();
        assert!(fault.contains("a vCPU waits for memory that another process serves"), "{fault}");
        assert_eq!(vm.api().state(), "Running");
    }
    vm.api().act("Kill").done();
    vm.wait().code(0);
    handler.signal(Signal::CONT);
}
