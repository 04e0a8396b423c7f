//! Snapshots whose memory is compressed: whatever can be done with others can be done with them, or is refused by name.
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::util::*;

const BOTH: [&str; 2] = ["lz4", "zstd"];

/// The guest `pages` after its first round.
fn pages() -> TestVm {
    let vm = Husk::guest("pages", "count=1000").memory(32).listening().typing().start();
    vm.expect("ready=1");
    tell(&vm, "w");
    vm
}

fn create(vm: &TestVm, directory: &Path, more: Value) {
    let mut body = more;
    body["directory"] = json!(directory);
    vm.api().put("/snapshot/create", body).done();
}

fn load(place: Value) -> TestVm {
    let vm = Husk::api().typing().start();
    let mut body = place;
    body["resume_vm"] = true.into();
    vm.api().put("/snapshot/load", body).done();
    vm
}

fn refusal(place: Value) -> String {
    Husk::api().start().api().put("/snapshot/load", place).fault()
}

fn memory_of(directory: &Path) -> PathBuf {
    let mut names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let is_memory = |path: &PathBuf| path.to_str().unwrap().contains("/memory-");
    names.find(is_memory).expect("a memory file")
}

fn inspected(directory: &Path) -> Value {
    let end = Husk::new(["snapshot", "inspect", "--json"]).arg(directory).wait().code(0);
    serde_json::from_str(&end.output).unwrap()
}

fn is_sound(directory: &Path) {
    Husk::new(["snapshot", "verify"]).arg(directory).wait().code(0);
}

#[test]
fn a_guest_goes_on_from_compressed_memory() {
    for compression in BOTH {
        let scratch = Scratch::new();
        let [plain, small] = ["plain", "small"].map(|name| scratch.path(name));
        let vm = pages();
        let sum = tell(&vm, "h");
        vm.api().patch("/vm", json!({"state": "Paused"})).done();
        create(&vm, &plain, json!({}));
        create(&vm, &small, json!({ "compression": compression }));
        drop(vm);
        let [before, after] = [&plain, &small].map(|directory| memory_of(directory).metadata());
        let (before, after) = (before.unwrap().blocks() * 512, after.unwrap().len());
        assert!(after < before / 4, "{before} bytes, then {after}");
        let found = inspected(&small);
        assert_eq!(found["memory"]["compression"], compression);
        assert_eq!(found["memory"]["stored_bytes"], after - 16);
        assert_eq!(found["memory"]["kept_bytes"], inspected(&plain)["memory"]["kept_bytes"]);
        is_sound(&small);

        let vm = load(json!({"directory": small, "verify": true}));
        assert_eq!(tell(&vm, "h"), sum);
        // Back, by what it was restored from and by its name: another file in memory each time.
        for body in [json!({}), json!({"directory": small}), json!({})] {
            assert_eq!(tell(&vm, "w"), "round=2");
            vm.api().put("/snapshot/rewind", body).done();
            assert_eq!(tell(&vm, "h"), sum);
        }
        // What it touches first is noted, and there the next time.
        tell(&vm, "w");
        vm.api().put("/snapshot/working-set", json!({})).done();
        drop(vm);
        let vm = Husk::new(["restore"]).arg(&small).listening().typing().start();
        vm.expect_error("husk: took ");
        assert_eq!(tell(&vm, "h"), sum);
        // Children of it, which it has memory in common with.
        let overrides: Vec<_> =
            ["one", "two"].map(|name| json!({"api_sock": scratch.path(name)})).into();
        let body = json!({ "overrides": overrides }).to_string();
        let forked = vm.api().request("POST", "/fork", &body).json();
        let children = forked["children"].as_array().unwrap_or_else(|| panic!("{forked}"));
        assert_eq!(children.len(), 2);
        children.iter().for_each(|child| {
            Api::new(child["api_sock"].as_str().unwrap().as_ref()).act("Kill").done()
        });
        vm.api().act("Kill").done();
    }
}

/// Links of a chain are compressed or not as they come.
#[test]
fn chains_of_both_kinds_are_loaded_and_merged() {
    let scratch = Scratch::new();
    let vm = pages();
    let mut moments = Vec::new();
    for (n, compression) in ["zstd", "none", "lz4", "zstd", "none"].into_iter().enumerate() {
        tell(&vm, if n % 2 == 0 { "w" } else { "z" });
        let sum = tell(&vm, "h");
        let directory = scratch.path(&format!("moment{n}"));
        create(&vm, &directory, json!({"snapshot_type": "Diff", "compression": compression}));
        moments.push((directory, sum));
    }
    drop(vm);
    for (directory, sum) in &moments {
        is_sound(directory);
        assert_eq!(tell(&load(json!({ "directory": directory })), "h"), *sum);
    }
    for compression in ["none", "lz4", "zstd"] {
        let (last, sum) = moments.last().unwrap();
        let merged = scratch.path(compression);
        let merge = Husk::new(["snapshot", "merge"]).arg(last).option("-o", &merged);
        merge.option("--compression", compression).wait().code(0);
        assert_eq!(inspected(&merged)["memory"]["compression"], compression);
        is_sound(&merged);
        // It needs no other.
        let alone = scratch.path("alone");
        fs::create_dir(&alone).unwrap();
        let to = alone.join("snapshot");
        fs::rename(&merged, &to).unwrap();
        let vm = load(json!({ "directory": to }));
        assert_eq!(tell(&vm, "h"), *sum);
        // And what goes over it may be compressed.
        tell(&vm, "w");
        let (sum, next) = (tell(&vm, "h"), alone.join("next"));
        create(&vm, &next, json!({"snapshot_type": "Diff", "compression": "lz4"}));
        drop(vm);
        assert_eq!(tell(&load(json!({ "directory": next })), "h"), sum);
        fs::remove_dir_all(&alone).unwrap();
    }
}

#[test]
fn what_does_not_go_with_compression_is_refused() {
    let scratch = Scratch::new();
    let vm = pages();
    let sum = tell(&vm, "h");
    let (state, memory) = (scratch.path("vm.state"), scratch.path("vm.mem"));
    let files = |more: Value| {
        let mut body = more;
        (body["snapshot_path"], body["mem_file_path"]) = (json!(state), json!(memory));
        body
    };
    let create = |body: Value| vm.api().put("/snapshot/create", body);
    let fault = create(files(json!({"compression": "lz4", "snapshot_type": "Diff"}))).fault();
    assert!(fault.contains("compression: a Diff in two files"), "{fault}");
    let fault = create(files(json!({"compression": "gzip"}))).fault();
    assert!(fault.contains("unknown variant `gzip`"), "{fault}");
    // All of it in two files is just another file.
    create(files(json!({"compression": "lz4"}))).done();
    let place = json!({"snapshot_path": state, "mem_file_path": memory});
    assert_eq!(tell(&load(place.clone()), "h"), sum);
    let backend = json!({"backend_type": "Uffd", "backend_path": scratch.path("nobody")});
    let fault = refusal(json!({"snapshot_path": state, "mem_backend": backend}));
    assert!(fault.contains("mem_backend: ") && fault.contains("compressed (lz4)"), "{fault}");
    // A snapshot that is not compressed may take its place, and the other way round.
    create(files(json!({}))).done();
    create(files(json!({"compression": "zstd"}))).done();
    drop(vm);
    assert_eq!(tell(&load(place.clone()), "h"), sum);

    // Damage is found by any load, without reading it twice.
    let file = fs::File::options().read(true).write(true).open(&memory).unwrap();
    let len = file.metadata().unwrap().len();
    for at in (0..len).step_by(len as usize / 40) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
        let params = serde_json::from_value(place.clone()).unwrap();
        let found = husk::Image::load(&params).expect_err("a flipped bit").to_string();
        assert!(found.contains(if at < 16 { "id: " } else { "checksum: " }), "{at}: {found}");
        file.write_all_at(&byte, at).unwrap();
    }
    file.set_len(len - 1).unwrap();
    assert!(refusal(place.clone()).contains("length: "));
    file.set_len(len + 1).unwrap();
    assert!(refusal(place).contains("length: "));
}
