//! Drives with a layer over a file that others share: what the guest writes is there, and the file is as it was.
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::util::*;

const MIB: usize = 1 << 20;

/// A disk of 2 MiB that begins with the number 77 twice, once for each sector that the guest `steps` reads.
fn base(scratch: &Scratch) -> (PathBuf, Vec<u8>) {
    let mut content: Vec<u8> = (0..2 * MIB).map(|i| (i / 512 + i) as u8).collect();
    content[..8].copy_from_slice(b"the base");
    content[512..520].copy_from_slice(&77_u64.to_le_bytes());
    (scratch.file("base.img", &content), content)
}

/// A guest that does what it is told, with the `disk`.
fn steps(disk: &str) -> Husk {
    Husk::guest("steps", "").memory(16).listening().typing().option("--disk", disk)
}

fn over(base: &Path, words: &str) -> String {
    format!("{},{words}", base.display())
}

/// Tells the guest `what`; the line it says with `key`.
#[track_caller]
fn tell(vm: &TestVm, what: &str, key: &str) -> String {
    vm.type_in(what);
    let line = vm.expect(&format!("{key}="));
    line.trim_end().split_once('=').unwrap().1.to_owned()
}

#[track_caller]
fn end(vm: TestVm) {
    vm.type_in("q");
    vm.wait().ok();
}

#[test]
fn all_that_a_driver_can_ask_leaves_the_base_alone() {
    let scratch = Scratch::new();
    let (base, content) = base(&scratch);
    let layer = scratch.path("layer");
    for words in ["overlay", "overlay=memory,io=async", &format!("overlay={}", layer.display())] {
        let guest = Husk::guest("block", "irq").option("--disk", over(&base, words)).wait().ok();
        for done in ["read", "write", "verify", "flush", "discard", "zeroes"] {
            assert_eq!(guest.value(done), "ok", "{words}: {done}\n{guest}");
        }
        assert!(fs::read(&base).unwrap() == content, "{words}: the base was written");
    }
}

#[test]
fn what_is_written_to_a_named_layer_is_there_the_next_time() {
    let scratch = Scratch::new();
    let (base, content) = base(&scratch);
    let disk = over(&base, &format!("overlay={}", scratch.path("layer").display()));
    for seed in [3, 4] {
        let words = |tests| format!("tests={tests} at=64 len=64K seed={seed}");
        Husk::guest("block", &words("write")).option("--disk", &disk).wait().ok();
        Husk::guest("block", &words("verify")).option("--disk", &disk).wait().ok();
    }
    assert!(fs::read(&base).unwrap() == content);
    // It is refused over another disk, before anything starts.
    let other = scratch.file("other.img", vec![1; 2 * MIB]);
    let disk = over(&other, &format!("overlay={}", scratch.path("layer").display()));
    for command in ["run", "check"] {
        let husk = Husk::new([command, "--kernel"]).arg(guest("block")).option("--disk", &disk);
        let line = husk.wait().quickly().refused(3);
        assert!(
            line.contains("overlay: ") && line.contains("is a layer of another disk"),
            "{line}"
        );
    }
}

#[test]
fn two_guests_on_one_base_do_not_see_each_other() {
    let scratch = Scratch::new();
    let (base, content) = base(&scratch);
    let guests =
        ["overlay", "overlay=memory,io=async"].map(|words| steps(&over(&base, words)).start());
    for (vm, counts) in guests.iter().zip(["c", "cc"]) {
        vm.expect("ready=1");
        assert_eq!(tell(vm, "s", "second"), "77");
        vm.type_in(counts);
        vm.expect(&format!("count={}", counts.len()));
        vm.type_in("w");
        vm.expect("wrote=");
    }
    for (vm, count) in guests.iter().zip(["1", "2"]) {
        assert_eq!(tell(vm, "s", "second"), count);
        assert_eq!(tell(vm, "b", "disk"), "the base");
    }
    let shown = guests[1].api().get("/vm/config").json();
    assert_eq!(shown["drives"][0]["overlay"], "Memory");
    // What is under an overlay stays, whatever is asked.
    let path = json!({"drive_id": "disk0", "path_on_host": base});
    let reply = guests[0].api().patch("/drives/disk0", path);
    assert!(reply.status == 400 && reply.body.contains("what is under an overlay"), "{reply:?}");
    let [one, two] = guests;
    end(one);
    end(two);
    assert!(fs::read(&base).unwrap() == content);
}

#[test]
fn a_layer_that_is_full_fails_writes_and_nothing_else() {
    let scratch = Scratch::new();
    let (base, content) = base(&scratch);
    let small = scratch.path("small");
    fs::create_dir(&small).unwrap();
    let small = small.display();
    let mount = format!("mount -t tmpfs -o size=256k none {small}; export TMPDIR={small}");
    for words in ["overlay", "overlay,io=async"] {
        let vm = steps(&over(&base, words)).after(&mount).start();
        vm.expect("ready=1");
        assert_eq!(tell(&vm, "cw", "wrote"), "1");
        // 64 pages, of which one has the guest's second sector.
        assert_eq!(tell(&vm, "f", "filled"), (63 * 4096).to_string());
        assert_eq!(tell(&vm, "b", "disk"), "the base");
        assert_eq!(tell(&vm, "cw", "wrote"), "2");
        assert_eq!(tell(&vm, "s", "second"), "2");
        let metrics = vm.api().get("/metrics").body;
        let failed =
            metrics.lines().find(|line| line.starts_with("husk_block_execute_fails_total{"));
        assert!(failed.is_some_and(|line| line.ends_with(" 1")), "{metrics}");
        end(vm);
    }
    assert!(fs::read(&base).unwrap() == content);
}

#[test]
fn a_reset_keeps_what_was_written() {
    let scratch = Scratch::new();
    let (base, content) = base(&scratch);
    let vm = steps(&over(&base, "overlay")).start();
    vm.expect("ready=1");
    assert_eq!(tell(&vm, "cw", "wrote"), "1");
    vm.type_in("x");
    vm.expect("ready=1");
    assert_eq!(tell(&vm, "s", "second"), "1");
    end(vm);
    assert!(fs::read(&base).unwrap() == content);
}

fn restore(snapshot: &Path) -> Husk {
    quiet(snapshot).listening().typing()
}

/// The same, of which only a refusal is to be heard.
fn quiet(snapshot: &Path) -> Husk {
    Husk::new(["restore"]).arg(snapshot)
}

/// The files in a directory, by name.
fn contents(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let paths = paths.filter(|path| path.is_file());
    let mut all: Vec<_> = paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    all.sort();
    all
}

/// The one file in a directory whose name begins with `start`.
fn only(directory: &Path, start: &str) -> PathBuf {
    let mut found = contents(directory).into_iter().map(|(path, _)| path).filter(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start))
    });
    let path = found.next().expect(start);
    assert_eq!(found.next(), None, "{start}");
    path
}

#[test]
fn a_snapshot_holds_what_was_written_and_clones_go_on_from_it() {
    let scratch = Scratch::new();
    let (base, content) = base(&scratch);
    let (first, second) = (scratch.path("first"), scratch.path("second"));
    let vm = steps(&over(&base, "overlay,io=async")).start();
    vm.expect("ready=1");
    assert_eq!(tell(&vm, "cw", "wrote"), "1");
    vm.api().put("/snapshot/create", json!({"directory": first})).done();
    assert_eq!(tell(&vm, "cw", "wrote"), "2");
    let before = contents(&first);
    let clones = [(); 2].map(|()| restore(&first).start());
    for (clone, (counts, count)) in clones.iter().zip([("ccw", "3"), ("cccw", "4")]) {
        assert_eq!(tell(clone, "s", "second"), "1");
        assert_eq!(tell(clone, counts, "wrote"), count);
    }
    assert_eq!(tell(&clones[0], "s", "second"), "3");
    assert_eq!(tell(&vm, "s", "second"), "2");
    // A clone's snapshot holds the first one's layer and its own, and replaces nothing but itself.
    for _ in 0..2 {
        clones[0].api().put("/snapshot/create", json!({"directory": second})).done();
    }
    let layer = only(&second, "overlay-disk0-");
    let inspect = || Husk::new(["snapshot", "inspect"]).arg(&second);
    let shown = inspect().wait().code(0).output;
    assert!(shown.contains(&format!("overlay  {}, ", layer.display())), "{shown}");
    let shown: serde_json::Value =
        serde_json::from_str(&inspect().arg("--json").wait().code(0).output).unwrap();
    let disk = shown["devices"].as_array().unwrap().iter().find(|d| d["id"] == "disk0").unwrap();
    assert_eq!(disk["overlay"]["file"], json!(layer));
    assert_eq!(disk["overlay"]["disk_bytes"], content.len());
    assert!(disk["overlay"]["stored_bytes"].as_u64().unwrap() > 0, "{disk}");
    assert_eq!(tell(&clones[0], "cw", "wrote"), "4");
    let third = restore(&second).start();
    assert_eq!(tell(&third, "s", "second"), "3");
    assert_eq!(tell(&third, "b", "disk"), "the base");
    // In a process that has the same disk already.
    vm.api().put("/snapshot/load", json!({"directory": second, "resume_vm": true})).done();
    assert_eq!(tell(&vm, "s", "second"), "3");
    assert_eq!(tell(&vm, "ccw", "wrote"), "5");
    let [one, two] = clones;
    [vm, one, two, third].into_iter().for_each(end);
    assert!(contents(&first) == before, "a clone has changed the snapshot");
    assert!(fs::read(&base).unwrap() == content);
}

#[test]
fn a_rewind_takes_back_what_was_written() {
    let scratch = Scratch::new();
    let (base, content) = base(&scratch);
    let directory = scratch.path("snapshot");
    let vm = steps(&over(&base, "overlay")).start();
    vm.expect("ready=1");
    assert_eq!(tell(&vm, "cw", "wrote"), "1");
    vm.api().put("/snapshot/create", json!({"directory": directory})).done();
    for counts in ["c", "cc", "c"] {
        vm.type_in(format!("{counts}w"));
        vm.expect(&format!("wrote={}", 1 + counts.len()));
        vm.api().put("/snapshot/rewind", json!({"resume_vm": true})).done();
        assert_eq!(tell(&vm, "s", "second"), "1");
    }
    end(vm);
    assert!(fs::read(&base).unwrap() == content);
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let scratch = Scratch::new();
    let (base, content) = base(&scratch);
    let directory = scratch.path("snapshot");
    let (state, memory) = (scratch.path("vm.state"), scratch.path("vm.memory"));
    let vm = steps(&over(&base, "overlay")).start();
    vm.expect("ready=1");
    assert_eq!(tell(&vm, "cw", "wrote"), "1");
    vm.api().put("/snapshot/create", json!({"directory": directory})).done();
    for _ in 0..2 {
        let files = json!({"snapshot_path": state, "mem_file_path": memory});
        vm.api().put("/snapshot/create", files).done();
    }
    end(vm);
    // Two files and a third, of which the old one is gone.
    only(state.parent().unwrap(), "vm.state.overlay-disk0-");
    let two_files = || Husk::new(["restore"]).arg(&state).option("--memory", &memory);
    let vm = two_files().listening().typing().start();
    assert_eq!(tell(&vm, "s", "second"), "1");
    end(vm);
    // A copy of the base will do, another disk will not.
    let copy = scratch.file("copy.img", &content);
    let disk = |path: &Path| format!("disk0={}", path.display());
    let vm = restore(&directory).option("--disk", disk(&copy)).start();
    assert_eq!(tell(&vm, "s", "second"), "1");
    end(vm);
    let mut other = content.clone();
    other[0] ^= 1;
    let other = scratch.file("other.img", &other);
    let smaller = scratch.file("smaller.img", &content[..MIB]);
    for (path, expected) in [
        (&other, "is a layer of another disk"),
        (&smaller, "is a layer of a disk of 2097152 bytes, this one has 1048576"),
    ] {
        let line = quiet(&directory).option("--disk", disk(path)).wait().quickly().refused(3);
        assert!(line.contains(expected), "{line}");
    }
    let layer = only(&directory, "overlay-disk0-");
    let good = fs::read(&layer).unwrap();
    for (what, bytes) in [
        ("is no layer", &good[..good.len() / 2]),
        ("is damaged: length", &good[..good.len() - 512]),
        ("is no layer", b"all about husk"),
    ] {
        fs::write(&layer, bytes).unwrap();
        let line = quiet(&directory).wait().quickly().refused(7);
        assert!(line.contains("what a drive had written: ") && line.contains(what), "{line}");
    }
    // Another one of the same disk.
    let vm = two_files().listening().typing().start();
    assert_eq!(tell(&vm, "ccw", "wrote"), "3");
    let third = scratch.path("third");
    vm.api().put("/snapshot/create", json!({"directory": third})).done();
    end(vm);
    fs::copy(only(&third, "overlay-disk0-"), &layer).unwrap();
    let line = quiet(&directory).wait().quickly().refused(7);
    assert!(line.contains("is not the layer that the snapshot was made with"), "{line}");
    let mut flipped = good.clone();
    flipped[520] ^= 1;
    fs::write(&layer, &flipped).unwrap();
    let line = Husk::new(["snapshot", "verify"]).arg(&directory).wait().refused(7);
    assert!(line.contains("overlay-disk0-") && line.contains("checksum"), "{line}");
    fs::write(&layer, &good).unwrap();
    Husk::new(["snapshot", "verify"]).arg(&directory).wait().code(0);
    fs::remove_file(&layer).unwrap();
    let line = quiet(&directory).wait().quickly().refused(7);
    assert!(line.contains("overlay-disk0-") && line.contains("No such file"), "{line}");
    assert!(fs::read(&base).unwrap() == content);
}
