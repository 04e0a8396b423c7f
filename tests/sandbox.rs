//! The sandbox of the real binary: every thread of every kind of husk is closed, it says so, and what a user does with a
//! VM works in it.
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use crate::util::*;

/// A guest that does what it is told.
fn steps() -> Husk {
    Husk::guest("steps", "").memory(16).listening().typing()
}

/// A process has these threads, and all of them are closed: one that has just been started names and closes itself
/// before it does anything else.
#[track_caller]
fn assert_closed(pid: u32, expected: &[&str]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = threads(pid);
        if found.as_ref().is_ok_and(|names| names == expected) {
            return;
        }
        assert!(Instant::now() < deadline, "{found:?}, want {expected:?}");
        std::thread::yield_now();
    }
}

/// The names, or what is open about one of them.
fn threads(pid: u32) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let Ok(status) = fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).unwrap().1.trim().to_owned()
        };
        let name = field("Name:");
        // KVM's own, and one that only finishes a snapshot.
        if name.starts_with("kvm-") || name == "husk_snapshot" {
            continue;
        }
        let (seccomp, privileges) = (field("Seccomp:"), field("NoNewPrivs:"));
        let sets = ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"].map(field);
        let has_none = sets.iter().all(|set| set.trim_matches('0').is_empty());
        if (seccomp.as_str(), privileges.as_str(), has_none) != ("2", "1", true) {
            return Err(format!("{name}: seccomp {seccomp}, no_new_privs {privileges}, {sets:?}"));
        }
        names.push(name);
    }
    names.sort();
    Ok(names)
}

/// The process that makes children.
fn zygote(pid: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.trim().parse().unwrap()
}

#[test]
fn every_thread_is_closed() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let disk = scratch.sparse("disk.img", 1 << 20);
    let husk = Husk::guest("hello", "how=hang").disk(&disk).network(&network, "").arg("--rng");
    let vm = husk.vsock(3, &scratch.path("vsock")).cpus(2).listening().start();
    vm.expect("how=hang");
    let expected = [
        "husk",
        "husk_api",
        "husk_connect",
        "husk_files",
        "husk_io",
        "husk_io0",
        "husk_vcpu 0",
        "husk_vcpu 1",
    ];
    assert_closed(vm.pid(), &expected);
    assert_closed(zygote(vm.pid()), &["husk_zygote"]);
    // Without a socket nothing needs paths, and no thread may use them.
    let vm = Husk::guest("hello", "how=hang").arg("--require-sandbox").start();
    vm.expect("how=hang");
    assert_closed(vm.pid(), &["husk", "husk_io", "husk_vcpu 0"]);
}

#[test]
fn restored_and_forked_vms_are_closed() {
    let (scratch, vm) = (Scratch::new(), steps().start());
    vm.expect("ready=1");
    let warm = scratch.path("warm");
    vm.api().put("/snapshot/create", json!({ "directory": warm })).done();
    let socket = scratch.path("child");
    let body = json!({ "overrides": [{ "api_sock": socket }], "end_with_parent": true });
    let forked = vm.api().request("POST", "/fork", &body.to_string()).json();
    let child = u32::try_from(forked["children"][0]["pid"].as_u64().unwrap()).unwrap();
    let threads = ["husk", "husk_api", "husk_files", "husk_io", "husk_vcpu 0"];
    assert_closed(child, &threads);
    assert_closed(zygote(child), &["husk_zygote"]);
    // In place of the one that is there: from within the sandbox.
    vm.api().put("/snapshot/load", json!({ "directory": warm, "resume_vm": true })).done();
    assert_closed(vm.pid(), &threads);
    let vm = Husk::new(["restore"]).arg(&warm).listening().start();
    assert_eq!(vm.api().state(), "Running");
    assert_closed(vm.pid(), &threads);
}

#[test]
fn files_are_used_where_they_are_allowed_to_be() {
    let scratch = Scratch::new();
    let (here, there) = (scratch.path("here"), scratch.path("there"));
    for directory in [&here, &there] {
        fs::create_dir(directory).unwrap();
        fs::write(directory.join("other.img"), [0; 4096]).unwrap();
    }
    let disk = scratch.sparse("disk.img", 1 << 20);
    let husk = steps().disk(&disk).option("--allow", &here).arg("--require-sandbox");
    let vm = husk.start();
    vm.expect("ready=1");
    let api = vm.api();
    let drive = |path: PathBuf| json!({ "drive_id": "disk0", "path_on_host": path });
    let outside = "once the guest runs, husk uses files by path only where --allow says";
    let refused = api.patch("/drives/disk0", drive(there.join("other.img"))).fault();
    assert!(refused.contains("Permission denied") && refused.contains(outside), "{refused}");
    let snapshot = |place: PathBuf| json!({ "directory": place, "snapshot_type": "Full" });
    let refused = api.put("/snapshot/create", snapshot(there.join("warm"))).fault();
    assert!(refused.contains(outside), "{refused}");
    let refused = api.put("/snapshot/load", json!({ "directory": there.join("warm") })).fault();
    assert!(!refused.is_empty());
    assert_eq!(fs::read_dir(&there).unwrap().count(), 1, "something was made outside");
    // What cannot be leaves the VM as it was, and what is allowed works.
    api.patch("/drives/disk0", drive(here.join("other.img"))).done();
    api.put("/snapshot/create", snapshot(here.join("warm"))).done();
    api.put("/snapshot/rewind", json!({})).done();
    let forks = json!({ "overrides": [{ "id": "x", "api_sock": here.join("x") }] }).to_string();
    // The parent's drive is written to, so the child is refused for that, not for where it is.
    let refused = api.request("POST", "/fork", &forks).fault();
    assert!(refused.contains("disk0"), "{refused}");
    // Both open KVM anew, and a child what it has in place of a console.
    let warm = json!({ "directory": here.join("warm"), "resume_vm": true });
    api.put("/snapshot/load", warm).done();
    assert_eq!(api.state(), "Running");
    fs::write(here.join("third.img"), [0; 4096]).unwrap();
    let drives = [drive(here.join("third.img"))];
    let forks =
        json!({ "overrides": [{ "id": "x", "api_sock": here.join("x"), "drives": drives }] });
    api.request("POST", "/fork", &forks.to_string()).json();
    let child = Api::new(&here.join("x"));
    assert_eq!(child.state(), "Running");
    let grandchild = json!({ "overrides": [{ "api_sock": here.join("y"), "drives": [drive(here.join("other.img"))] }] });
    let refused = child.request("POST", "/fork", &grandchild.to_string()).fault();
    assert!(refused.contains("disk0"), "{refused}");
    child.act("Kill").done();
    api.act("Kill").done();
    let end = vm.wait().code(0);
    assert!(!end.errors.contains("cannot wait to be forked"), "{}", end.errors);
}

/// Without paths: what a client wants of files it opens itself, and passes.
#[test]
fn nothing_is_opened_by_path_where_nothing_may_be() {
    let scratch = Scratch::new();
    let image = |name: &str| {
        let mut bytes = format!("disk-{name}-").into_bytes();
        bytes.resize(4096, 0);
        scratch.file(name, bytes)
    };
    let (one, two, three) = (image("one"), image("two"), image("three"));
    let husk = steps().disk(&one).vsock(3, &scratch.path("vsock"));
    let husk = husk.option("--allow", "none").arg("--require-sandbox");
    let vm = husk.start();
    vm.expect("ready=1");
    let api = vm.api();
    let expected =
        ["husk", "husk_api", "husk_connect", "husk_files", "husk_io", "husk_io0", "husk_vcpu 0"];
    assert_closed(vm.pid(), &expected);
    // There is no process that could open for it, either.
    let pid = vm.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    assert_eq!(children, "");
    let drive = |place: &str| json!({ "drive_id": "disk0", "path_on_host": place });
    let refused = api.patch("/drives/disk0", drive(two.to_str().unwrap())).fault();
    let words = "drives: path_on_host: once the guest runs, nothing is opened by path (--allow none): pass a descriptor";
    assert!(refused.contains(words), "{refused}");
    let place = json!({ "directory": scratch.path("warm") });
    let load = json!({ "snapshot_path": "passed:0", "mem_file_path": "passed:1" });
    let files = [&one, &two].map(|path| fs::File::open(path).unwrap());
    for (reply, words) in [
        (api.put("/snapshot/create", &place), "a snapshot is written to files, and once"),
        (api.put("/snapshot/load", &place), "a VM that takes another's place is opened anew"),
        (api.pass(("PUT", "/snapshot/load"), &load, &files), "a VM that takes another's place"),
        (api.put("/snapshot/rewind", "{}"), "which pages the guest has written is read in /proc"),
        (api.put("/snapshot/working-set", "{}"), "which pages the guest has touched is read in"),
        (api.request("POST", "/fork", "{}"), "children open what they are made of"),
    ] {
        let refused = reply.fault();
        assert!(refused.contains(words) && refused.contains("(--allow none)"), "{refused}");
    }
    assert!(tell(&vm, "b").contains("disk=disk-one"));
    let opened = fs::File::options().read(true).write(true).open(&two).unwrap();
    api.pass(("PATCH", "/drives/disk0"), drive("passed:0"), &[opened]).done();
    assert!(tell(&vm, "b").contains("disk=disk-two"));
    // From a shell.
    let ctl = Husk::new(["ctl", "--api-sock"]).arg(vm.socket()).arg("--pass").arg(&three);
    let words = ["drive", "update", "disk0", "path_on_host=passed:0"];
    words.iter().fold(ctl, |ctl, word| ctl.arg(word)).wait().code(0);
    vm.type_in("b");
    vm.expect("disk=disk-thr");
    // A reset opens nothing.
    vm.type_in("x");
    vm.expect("ready=1");
    api.delete("/drives/disk0").done();
    api.act("Kill").done();
    let socket = vm.socket().to_owned();
    let said = vm.wait().code(0).errors;
    assert!(said.contains("files only if they are open: no thread opens by path"), "{said}");
    assert!(
        !socket.exists() && !scratch.path("vsock").exists(),
        "sockets of husk's own are removed"
    );
}

/// What is named before the guest runs is opened by then.
#[test]
fn paths_will_do_until_the_guest_runs() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 4096);
    let vm = Husk::api().option("--allow", "none").typing().start();
    let drive = json!({ "drive_id": "a", "path_on_host": disk, "is_root_device": false });
    vm.api().put("/drives/a", drive).done();
    vm.api().put("/boot-source", json!({ "kernel_image_path": guest("steps") })).done();
    vm.api().act("InstanceStart").done();
    vm.expect("ready=1");
    vm.api().put("/snapshot/create", json!({ "directory": scratch.path("warm") })).fault();
    let why = Husk::new(["run", "--allow", "none", "--allow", "/tmp"]).wait().refused(3);
    assert!(why.contains("--allow: cannot find none"), "{why}");
    // A snapshot may be restored, but nothing can be noted beside it.
    let warm = scratch.path("warm");
    let other = steps().start();
    other.expect("ready=1");
    other.api().put("/snapshot/create", json!({ "directory": warm })).done();
    let restore = || Husk::new(["restore"]).arg(&warm).option("--allow", "none");
    let why = restore().option("--record", "1").wait().refused(3);
    assert!(why.contains("noted in a file, and once the guest runs, nothing is opened"), "{why}");
    let vm = restore().typing().start();
    assert!(tell(&vm, "c").contains("count=1"));
    vm.type_in("q");
    vm.wait().ok();
}

#[test]
fn what_the_sandbox_comes_to_is_said_and_asked_for() {
    let said = Husk::new(["sandbox", "--probe"]).wait().code(0).output;
    for layer in ["no_new_privs", "capabilities", "seccomp", "Landlock", "--require-sandbox"] {
        assert!(said.contains(layer), "{said}");
    }
    let hello = || Husk::guest("hello", "how=poweroff").option("--log-level", "info");
    let said = |husk: Husk| {
        let said = husk.wait().code(0).errors;
        said.lines().find(|line| line.contains("sandbox")).unwrap_or_default().to_owned()
    };
    let whole = said(hello().arg("--require-sandbox"));
    assert!(whole.contains("seccomp kill") && whole.contains("only if they are open"), "{whole}");
    for action in ["errno", "log", "off"] {
        let line = said(hello().option("--seccomp", action));
        assert!(line.contains(&format!("seccomp {action}")), "{line}");
        let husk = hello().option("--seccomp", action).arg("--require-sandbox");
        let why = husk.wait().refused(4);
        assert!(why.contains("--require-sandbox: --seccomp is not kill"), "{why}");
    }
    let nowhere = hello().option("--allow", "/nowhere").wait().refused(3);
    assert_eq!(
        nowhere,
        "husk: --allow: cannot find /nowhere: No such file or directory (os error 2)"
    );
    assert!(said(hello().arg("--no-sandbox")).contains("the sandbox is off"));
    let vm = Husk::guest("hello", "how=hang").arg("--no-sandbox").start();
    vm.expect("how=hang");
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    assert!(status.contains("Seccomp:\t0") && status.contains("NoNewPrivs:\t0"), "{status}");
}

#[test]
fn descriptors_left_open_by_mistake_are_closed() {
    let scratch = Scratch::new();
    let secret = scratch.file("secret", "secret");
    let leak = format!("exec 8<{0} 9<>{0}", secret.display());
    let vm = Husk::guest("hello", "how=hang").after(&leak).start();
    vm.expect("how=hang");
    let open: Vec<_> = fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().flatten().collect();
    assert!(open.len() > 5);
    for entry in open {
        assert_ne!(fs::read_link(entry.path()).unwrap(), secret, "{}", entry.path().display());
    }
}
