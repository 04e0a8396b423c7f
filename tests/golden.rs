//! Snapshots that were made when their format was new: every husk reads those of its own format and of the one before.
//!
//! `tests/golden/N` has one of format N: compressed, and the state file of the same without compression, whose memory
//! file, mostly a hole, the test makes of the other. When the format is raised, `HUSK_WRITE_GOLDEN=1 cargo test golden`
//! makes that of the new one; that of the one before stays as it is, older ones go.
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::util::*;

/// Waits for a byte on the first serial port, then prints `+` and powers off.
fn kernel() -> Elf {
    let wait = [
        0x66, 0xba, 0xfd, 0x03, // mov dx, 0x3fd
        0xec, // in al, dx
        0xa8, 0x01, // test al, 1
        0x74, 0xfb, // jz to in
    ];
    let code = [&wait[..], PLUS_AND_POWEROFF].concat();
    Elf::new(0x10_0000, &[Segment::new(0x10_0000, &code)])
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn inspected(directory: &Path) -> Value {
    let end = Husk::new(["snapshot", "inspect", "--json"]).arg(directory).wait().code(0);
    serde_json::from_str(&end.output).unwrap()
}

/// What the first processor of this host says of itself, but for what changes by itself.
fn processor() -> String {
    let all = fs::read_to_string("/proc/cpuinfo").unwrap();
    let first = all.split("\n\n").next().unwrap();
    let names = ["vendor_id", "cpu family", "model", "stepping", "flags", "bugs"];
    let is_kept = |line: &&str| names.iter().any(|name| line.split('\t').next() == Some(*name));
    first.lines().filter(is_kept).flat_map(|line| [line, "\n"]).collect()
}

fn write(directory: &Path) {
    let scratch = Scratch::new();
    let vm = Husk::run(scratch.file("vmlinux", kernel().bytes)).memory(2).listening().typing();
    let vm = vm.start();
    let (packed, plain) = (directory.join("lz4"), scratch.path("plain"));
    fs::create_dir_all(directory).unwrap();
    let body = json!({"directory": packed, "compression": "lz4"});
    vm.api().put("/snapshot/create", body).done();
    Husk::new(["snapshot", "merge"]).arg(&packed).option("-o", &plain).wait().code(0);
    fs::copy(plain.join("state"), directory.join("state")).unwrap();
    fs::write(directory.join("processor"), processor()).unwrap();
}

/// The format that this husk writes.
fn newest(scratch: &Scratch) -> u64 {
    let vm = Husk::run(scratch.file("vmlinux", kernel().bytes)).memory(2).listening().start();
    let directory = scratch.path("new");
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
    inspected(&directory)["format"].as_u64().unwrap()
}

/// Restores it: it runs, or the processor is not what the guest was given. On the one that it was made on it runs.
fn restore(snapshot: &Path, must_run: bool) {
    let vm = Husk::new(["restore"]).arg(snapshot).typing().start_unheard();
    vm.type_in("x");
    let end = vm.wait();
    if end.status.code() == Some(7) {
        let said = end.refused(7);
        let named = [
            "the guest was given a processor by ",
            "the guest was given the CPU feature ",
            "the TSC ran at ",
            " for MSR ",
        ];
        let is_of_processor = named.iter().any(|name| said.contains(name));
        assert!(is_of_processor && !must_run, "{said}");
        println!("{}: refused: {said}", snapshot.display());
    } else {
        assert_eq!(end.code(0).output, "+");
        println!("{}: ran", snapshot.display());
    }
}

#[test]
fn snapshots_of_this_format_and_the_one_before_are_loaded() {
    let scratch = Scratch::new();
    let newest = newest(&scratch);
    let current = golden().join(newest.to_string());
    if std::env::var_os("HUSK_WRITE_GOLDEN").is_some() {
        write(&current);
    }
    let why = "HUSK_WRITE_GOLDEN=1 cargo test golden, and keep that of the format before";
    assert!(current.is_dir(), "there is no golden snapshot of format {newest}: {why}");
    for format in [newest - 1, newest].into_iter().filter(|format| *format > 0) {
        let directory = golden().join(format.to_string());
        // A load notes things beside a snapshot, and these are not to change.
        let (packed, plain) = (scratch.path("packed"), scratch.path(&format!("plain{format}")));
        let _ = fs::remove_dir_all(&packed);
        fs::create_dir(&packed).unwrap();
        for entry in fs::read_dir(directory.join("lz4")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), packed.join(entry.file_name())).unwrap();
        }
        Husk::new(["snapshot", "merge"]).arg(&packed).option("-o", &plain).wait().code(0);
        fs::copy(directory.join("state"), plain.join("state")).unwrap();
        let must_run = fs::read_to_string(directory.join("processor")).unwrap() == processor();
        for (snapshot, compression) in [(&packed, "lz4"), (&plain, "none")] {
            let found = inspected(snapshot);
            assert_eq!(found["format"], format);
            assert_eq!(found["memory"]["compression"], compression);
            assert_eq!(found["memory"]["bytes"], 2 << 20);
            Husk::new(["snapshot", "verify"]).arg(snapshot).wait().code(0);
            restore(snapshot, must_run);
        }
    }
    let is_known = |name: &String| [newest - 1, newest].iter().any(|n| n.to_string() == **name);
    let found = fs::read_dir(golden()).unwrap();
    let found = found.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let others: Vec<_> = found.filter(|name| !is_known(name)).collect();
    assert!(others.is_empty(), "no husk reads format {others:?} any more: remove them");
}
