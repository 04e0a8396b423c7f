//! A snapshot is there or it is not: whatever ends the one who writes it, whatever the disk says, the one before it
//! can be loaded, or the new one, and the guest goes on.
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::util::*;

/// A guest that would notice a mixture, in as little RAM as there can be.
fn warm() -> Husk {
    Husk::guest("warm", "pages=256 every=5").memory(8)
}

/// The two forms of a place.
fn forms(scratch: &Scratch) -> [Value; 2] {
    let (state, memory) = (scratch.path("vm.state"), scratch.path("vm.mem"));
    [
        json!({"directory": scratch.path("warm")}),
        json!({"snapshot_path": state, "mem_file_path": memory}),
    ]
}

/// What `husk snapshot` takes for it.
fn verify(place: &Value) -> Husk {
    let husk = Husk::new(["snapshot", "verify"]);
    match place["directory"].as_str() {
        Some(directory) => husk.arg(directory),
        None => husk
            .arg(place["snapshot_path"].as_str().unwrap())
            .arg(place["mem_file_path"].as_str().unwrap()),
    }
}

/// Restores it in a process of its own, in which the guest goes on and finds all of its memory as it left it.
fn restore(place: &Value) {
    let vm = Husk::api().start();
    let mut body = place.clone();
    body["resume_vm"] = true.into();
    vm.api().put("/snapshot/load", body).done();
    assert_goes_on(&vm);
}

/// The guest wrote all of its memory, more than once, and found nothing in it that it had not written.
fn assert_goes_on(vm: &TestVm) {
    let tick = |line: String| line.trim().strip_prefix("tick=").and_then(|n| n.parse::<u64>().ok());
    let one = tick(vm.expect("tick=")).unwrap();
    while tick(vm.expect("=")).expect("no word of a mixture") < one + 2 {}
}

#[test]
fn only_a_snapshot_is_replaced() {
    let scratch = Scratch::new();
    let vm = warm().listening().start();
    vm.expect("tick=");
    let disk = scratch.file("disk", "a disk");
    let good = forms(&scratch)[1].clone();
    vm.api().put("/snapshot/create", &good).done();
    let path = |name: &str| scratch.path(name);
    std::os::unix::fs::symlink(&disk, path("link")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    fs::create_dir(path("directory")).unwrap();
    scratch.fifo("fifo");
    let two =
        |state: PathBuf, memory: PathBuf| json!({"snapshot_path": state, "mem_file_path": memory});
    let is = |name: &str, what: &str| format!("{} is {what}", path(name).display());
    for (body, fault) in [
        (
            two(disk.clone(), path("m")),
            "snapshot_path: ".to_owned() + &is("disk", "there, and is not a snapshot's state file"),
        ),
        (
            two(path("s"), disk.clone()),
            "mem_file_path: ".to_owned() + &is("disk", "there, and is not the memory"),
        ),
        (
            two(path("s"), path("vm.mem")),
            "mem_file_path: ".to_owned() + &is("vm.mem", "there, and is not the memory"),
        ),
        (two(path("vm.state"), disk.clone()), "mem_file_path: ".to_owned() + &is("disk", "there")),
        (two(path("link"), path("m")), is("link", "a symbolic link")),
        (two(path("fifo"), path("m")), is("fifo", "a FIFO")),
        (two(path("s"), path("socket")), is("socket", "a socket")),
        (two(path("s"), path("directory")), is("directory", "a directory")),
        (two("/dev/zero".into(), path("m")), "/dev/zero is a character device".into()),
        (
            two(path("s"), path("directory/../s")),
            "mem_file_path: it is the file of snapshot_path".into(),
        ),
        (two(path("s"), path("s")), "mem_file_path: it is snapshot_path".into()),
        (two(path("none/s"), path("m")), "none/s: No such file or directory".into()),
        (two(path("disk/s"), path("m")), "disk/s: Not a directory".into()),
        (two("/proc/s".into(), path("m")), "cannot make /proc/s: ".into()),
        (
            json!({"directory": disk}),
            "directory: ".to_owned() + &is("disk", "a regular file, want a directory"),
        ),
        (json!({"directory": path("none/warm")}), "none/warm: No such file".into()),
        (json!({"directory": "/proc/self"}), "cannot make /proc/self/state: ".into()),
        (json!({"directory": path("s"), "mem_file_path": path("m")}), "directory: ".into()),
    ] {
        for is_paused in [false, true] {
            let state = if is_paused { "Paused" } else { "Resumed" };
            vm.api().patch("/vm", json!({ "state": state })).done();
            let said = vm.api().put("/snapshot/create", &body).fault();
            assert!(said.contains(&fault), "{body}: {said}, want {fault}");
            assert_eq!(vm.api().state(), if is_paused { "Paused" } else { "Running" }, "{body}");
        }
    }
    vm.api().patch("/vm", json!({"state": "Resumed"})).done();
    assert_goes_on(&vm);
    assert_eq!(fs::read_to_string(&disk).unwrap(), "a disk");
    let left = names(scratch.as_ref());
    assert_eq!(left, ["directory", "disk", "fifo", "link", "socket", "vm.mem", "vm.state"]);
    restore(&good);
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_snapshot_replaces_the_one_before() {
    let scratch = Scratch::new();
    let vm = warm().listening().start();
    vm.expect("tick=");
    for place in forms(&scratch) {
        if let Some(state) = place["snapshot_path"].as_str() {
            // Some make the files first.
            fs::write(state, "").unwrap();
        }
        let mut ids = Vec::new();
        for sync in [true, false, true] {
            let mut body = place.clone();
            body["sync"] = sync.into();
            vm.api().put("/snapshot/create", body).done();
            verify(&place).wait().code(0);
            ids.push(id_of(&place));
        }
        ids.dedup();
        assert_eq!(ids.len(), 3);
        restore(&place);
        let directory = place["directory"].as_str().map(Path::new);
        match directory {
            Some(directory) => {
                assert_eq!(names(directory), [format!("memory-{}", ids[2]), "state".into()])
            }
            None => assert_eq!(names(scratch.as_ref()), ["vm.mem", "vm.state", "warm"]),
        }
    }
    assert_goes_on(&vm);
}

fn id_of(place: &Value) -> String {
    let path = place["directory"].as_str().or(place["snapshot_path"].as_str()).unwrap();
    let end = Husk::new(["snapshot", "inspect", "--json", path]).wait().code(0);
    let found: Value = serde_json::from_str(&end.output).unwrap();
    found["id"].as_str().unwrap().to_owned()
}
