//! Snapshots that were made when their format was new: every husk reads those of its own format and of the one before.
//!
//! `tests/golden/N` has those of format N. One is of the smallest VM: compressed in `lz4`, and `state`, that of the same
//! without compression, whose memory file, mostly a hole, the test makes of the other. The other, in `devices`, is of a VM
//! with two CPUs and a device of each kind. `processor` and `devices-processor` say where they were made: there they must
//! run. On another processor they are opened, read and judged as far as that goes: devices take their state before the
//! first vCPU is made, so a refusal by what differs in the processor means that they took it.
//!
//! When the format is raised, `HUSK_WRITE_GOLDEN=1 cargo test golden` makes those of the new one; those of the one before
//! stay as they are, older ones go.
use std::collections::BTreeSet;
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

/// Makes what is not there yet.
fn write(directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    if !directory.join("lz4").exists() {
        write_smallest(directory);
        fs::write(directory.join("processor"), processor()).unwrap();
    }
    if !directory.join("devices").exists() {
        write_devices(&directory.join("devices"));
        fs::write(directory.join("devices-processor"), processor()).unwrap();
    }
}

fn write_smallest(directory: &Path) {
    let scratch = Scratch::new();
    let vm = Husk::run(scratch.file("vmlinux", kernel().bytes)).memory(2).listening().typing();
    let vm = vm.start();
    let (packed, plain) = (directory.join("lz4"), scratch.path("plain"));
    let body = json!({"directory": packed, "compression": "lz4"});
    vm.api().put("/snapshot/create", body).done();
    Husk::new(["snapshot", "merge"]).arg(&packed).option("-o", &plain).wait().code(0);
    fs::copy(plain.join("state"), directory.join("state")).unwrap();
}

/// What a VM has outside, made anew for each.
struct Outside {
    scratch: Scratch,
    network: Network,
}

impl Outside {
    fn new() -> Self {
        let scratch = Scratch::new();
        scratch.sparse("disk", 64 << 10);
        scratch.sparse("pmem", 2 << 20);
        Self { scratch, network: Network::with_tap() }
    }

    fn path(&self, name: &str) -> String {
        self.scratch.path(name).to_str().unwrap().to_owned()
    }
}

fn write_devices(directory: &Path) {
    let outside = Outside::new();
    let vm = Husk::guest("busy", "")
        .cpus(2)
        .memory(4)
        .option("--disk", format!("{},overlay", outside.path("disk")))
        .option("--pmem", outside.path("pmem"))
        .network(&outside.network, "")
        .vsock(3, &outside.scratch.path("vsock"))
        .arg("--rng")
        .option("--balloon", "0,stats=60")
        .option("--hotplug-memory", "128")
        .listening()
        .typing()
        .start();
    vm.expect("ready=1");
    vm.api().patch("/hotplug/memory", json!({"requested_size_mib": 4})).done();
    vm.type_in("cd");
    vm.expect("devices=7");
    let body = json!({"directory": directory, "compression": "lz4"});
    vm.api().put("/snapshot/create", body).done();
}

/// The format that this husk writes.
fn newest(scratch: &Scratch) -> u64 {
    let vm = Husk::run(scratch.file("vmlinux", kernel().bytes)).memory(2).listening().start();
    let directory = scratch.path("new");
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
    inspected(&directory)["format"].as_u64().unwrap()
}

/// Ends as it should: the guest is content, or the processor is not what it was given. On the one that it was made on the
/// guest is content, unless the TSC ticks at another rate: that does not show in what is kept of a processor.
fn judge(end: End, must_run: bool, is_content: impl FnOnce(&End) -> bool) {
    if end.status.code() == Some(7) {
        let said = end.refused(7);
        let named = [
            "the guest was given a processor by ",
            "the guest was given the CPU feature ",
            "the TSC ran at ",
            " for MSR ",
        ];
        let is_of_processor = named.iter().any(|name| said.contains(name));
        assert!(is_of_processor, "{said}");
        assert!(!must_run || said.contains("the TSC ran at "), "{said}");
        println!("refused: {said}");
    } else {
        let end = end.code(0);
        assert!(is_content(&end), "{end}");
        println!("ran");
    }
}

fn restore(snapshot: &Path, must_run: bool) {
    let vm = Husk::new(["restore"]).arg(snapshot).typing().start_unheard();
    vm.type_in("x");
    judge(vm.wait(), must_run, |end| end.output == "+");
}

/// A copy: a load notes things beside a snapshot, and those of the repository are not to change.
fn copy(scratch: &Scratch, from: &Path, name: &str) -> PathBuf {
    let to = scratch.path(name);
    fs::create_dir(&to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    to
}

fn was_made_here(processor_file: PathBuf) -> bool {
    fs::read_to_string(processor_file).unwrap() == processor()
}

fn check_smallest(directory: &Path, format: u64) {
    let scratch = Scratch::new();
    let (packed, plain) = (copy(&scratch, &directory.join("lz4"), "packed"), scratch.path("plain"));
    Husk::new(["snapshot", "merge"]).arg(&packed).option("-o", &plain).wait().code(0);
    fs::copy(directory.join("state"), plain.join("state")).unwrap();
    let must_run = was_made_here(directory.join("processor"));
    for (snapshot, compression) in [(&packed, "lz4"), (&plain, "none")] {
        let found = inspected(snapshot);
        assert_eq!(found["format"], format);
        assert_eq!(found["memory"]["compression"], compression);
        assert_eq!(found["memory"]["bytes"], 2 << 20);
        husk::Image::open(snapshot).unwrap();
        Husk::new(["snapshot", "verify"]).arg(snapshot).wait().code(0);
        restore(snapshot, must_run);
    }
}

fn check_devices(directory: &Path, format: u64) {
    let scratch = Scratch::new();
    let (packed, plain) =
        (copy(&scratch, &directory.join("devices"), "packed"), scratch.path("plain"));
    Husk::new(["snapshot", "merge"]).arg(&packed).option("-o", &plain).wait().code(0);
    let must_run = was_made_here(directory.join("devices-processor"));
    for snapshot in [packed, plain] {
        let found = inspected(&snapshot);
        assert_eq!((&found["format"], &found["vcpus"]), (&json!(format), &json!(2)));
        assert_eq!(found["memory"]["bytes"], (4 + 128) << 20);
        let devices = found["devices"].as_array().unwrap();
        let models: BTreeSet<_> = devices.iter().map(|d| d["model"].as_str().unwrap()).collect();
        let all = [
            "balloon",
            "drives",
            "entropy",
            "memory-hotplug",
            "network-interfaces",
            "pmem",
            "vsock",
        ];
        assert!(models.iter().eq(&all), "{models:?}");
        let drive = devices.iter().find(|device| device["model"] == "drives").unwrap();
        assert_eq!(drive["overlay"]["disk_bytes"], 64 << 10);
        husk::Image::open(&snapshot).unwrap();
        Husk::new(["snapshot", "verify"]).arg(&snapshot).wait().code(0);

        let outside = Outside::new();
        let vm = Husk::new(["restore"])
            .arg(&snapshot)
            .within(&outside.network)
            .option("--disk", format!("disk0={}", outside.path("disk")))
            .option("--pmem", format!("pmem0={}", outside.path("pmem")))
            .option("--net", "eth0=tap=tap0")
            .option("--vsock", format!("uds={}", outside.path("vsock")))
            .typing()
            .start_unheard();
        vm.type_in("cddcq");
        judge(vm.wait(), must_run, |end| {
            end.values("devices") == ["7", "7"] && end.output.contains("RESULT ok")
        });
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
    let is_there = current.join("devices").is_dir();
    assert!(is_there, "there is no golden snapshot of format {newest}: {why}");
    for format in [newest - 1, newest].into_iter().filter(|format| *format > 0) {
        let directory = golden().join(format.to_string());
        check_smallest(&directory, format);
        check_devices(&directory, format);
    }
    let is_known = |name: &String| [newest - 1, newest].iter().any(|n| n.to_string() == **name);
    let found = fs::read_dir(golden()).unwrap();
    let found = found.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let others: Vec<_> = found.filter(|name| !is_known(name)).collect();
    assert!(others.is_empty(), "no husk reads format {others:?} any more: remove them");
}
