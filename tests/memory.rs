//! Memory that devices bring along: files, and what is plugged while the guest runs.
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::util::*;

const MIB: u64 = 1 << 20;
/// Where it begins, above RAM of less than 3 GiB.
const START: &str = "0x100000000";

/// Byte `i` of what the guest `pmem` writes.
fn pattern(i: usize, seed: usize) -> u8 {
    (i * 7 + i / 512 + seed) as u8
}

fn pmem(cmdline: &str, path: &Path, more: &str) -> Husk {
    Husk::guest("pmem", cmdline).option("--pmem", format!("{}{more}", path.display()))
}

#[test]
fn pmem_writes_are_in_the_file() {
    let scratch = Scratch::new();
    let file = scratch.file("pmem", vec![1; 3 * MIB as usize + 5]);
    let end = pmem("tests=read,write,verify,flush,bad at=1M len=100K seed=3", &file, "").wait();
    let end = end.ok();
    assert_eq!((end.value("start"), end.value("size")), (START, "4194304"));
    assert_eq!(end.value("first"), "01".repeat(8));
    assert_eq!((end.value("verify"), end.value("flush")), ("ok", "ok"));
    let bytes = fs::read(&file).unwrap();
    assert_eq!(bytes.len(), 3 * MIB as usize + 5);
    let (before, rest) = bytes.split_at(MIB as usize);
    let (written, after) = rest.split_at(100 << 10);
    assert!(written.iter().enumerate().all(|(i, &byte)| byte == pattern(i, 3)));
    assert!(before.iter().chain(after).all(|&byte| byte == 1));
}

#[test]
fn pmem_is_read_by_several_vms_at_once() {
    let scratch = Scratch::new();
    let content: Vec<u8> = (0..2 * MIB as usize).map(|i| pattern(i, 9)).collect();
    let file = scratch.file("pmem", &content);
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o400)).unwrap();
    let start = || pmem("tests=verify,watch at=0 len=64K seed=9", &file, ",ro").start();
    let vms = [start(), start()];
    vms.iter().for_each(|vm| drop(vm.expect("watching=1")));
    let line = pmem("tests=read", &file, "").wait().refused(3);
    assert!(line.contains("in use by another"), "{line}");
    let drive = pmem("tests=read", &scratch.sparse("other", MIB), "").disk(&file);
    let line = drive.wait().refused(3);
    assert!(line.contains("in use by another"), "{line}");
}

#[test]
fn pmem_that_is_read_only_ignores_writes() {
    let scratch = Scratch::new();
    let content = vec![5; 2 * MIB as usize];
    let file = scratch.file("pmem", &content);
    let end = pmem("tests=refused,flush,read", &file, ",ro").wait().ok();
    assert_eq!((end.value("write"), end.value("flush")), ("refused", "ok"));
    assert!(fs::read(&file).unwrap() == content, "the file has changed");
}

#[test]
fn drives_read_and_write_pmem_directly() {
    let scratch = Scratch::new();
    let file = scratch.sparse("pmem", 2 * MIB);
    let mut sectors = vec![7; 512];
    sectors.resize(4096, 0);
    let disk = scratch.file("disk", &sectors);
    let end = pmem("tests=dma at=8K", &file, "").disk(&disk).wait().ok();
    assert_eq!((end.value("dma_read"), end.value("dma_write")), ("0", "0"));
    assert_eq!(end.value("dma_first"), "07".repeat(8));
    assert_eq!(fs::read(&disk).unwrap()[512..1024], [7; 512]);
    assert_eq!(fs::read(&file).unwrap()[8192..8192 + 512], [7; 512]);

    // Into what may only be read nothing is written, and the drive says so.
    let before = fs::read(&file).unwrap();
    let end = pmem("tests=dma at=16K", &file, ",ro").disk(&disk).wait().ok();
    assert_eq!((end.value("dma_read"), end.value("dma_write")), ("1", "0"));
    assert!(fs::read(&file).unwrap() == before, "the file has changed");
}

#[test]
fn drives_fail_where_pmem_has_become_shorter() {
    let scratch = Scratch::new();
    let file = scratch.sparse("pmem", 2 * MIB);
    let disk = scratch.sparse("disk", 4096);
    let vm = pmem("tests=wait,dma,flush at=1M", &file, "").disk(&disk).start();
    vm.expect("waiting=1");
    let file = File::options().write(true).open(&file).unwrap();
    file.set_len(4096).unwrap();
    file.write_all_at(&[1], 0).unwrap();
    let end = vm.wait().ok();
    assert_eq!((end.value("dma_read"), end.value("dma_write")), ("1", "1"));
}

#[test]
fn a_guest_whose_pmem_becomes_shorter_ends_with_the_reason() {
    let scratch = Scratch::new();
    let file = scratch.sparse("pmem", 2 * MIB);
    let vm = pmem("tests=watch", &file, "").start();
    vm.expect("watching=1");
    File::options().write(true).open(&file).unwrap().set_len(4096).unwrap();
    let line = vm.wait().refused(6);
    assert!(line.contains("a file of a pmem device has become shorter"), "{line}");
}

/// A guest that follows what is requested of its memory.
fn mem(cmdline: &str) -> Husk {
    Husk::guest("mem", cmdline).option("--hotplug-memory", "512").listening()
}

fn request(vm: &TestVm, mib: u64) {
    vm.api().patch("/hotplug/memory", json!({ "requested_size_mib": mib })).done();
}

/// MiB of the host's memory that a VM has.
fn resident_mib(vm: &TestVm) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

/// Waits for the VM to have given memory back.
fn wait_for_resident(vm: &TestVm, mib: std::ops::Range<u64>) {
    let end = Instant::now() + PATIENCE;
    while !mib.contains(&resident_mib(vm)) {
        assert!(Instant::now() < end, "the VM has {} MiB, not {mib:?}", resident_mib(vm));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn memory_is_plugged_used_and_given_back() {
    let vm = mem("tests=steps,over,again,steps,unplugged,steps,steps steps=1").start();
    vm.expect("ready=1");
    let before = resident_mib(&vm);
    let status = |plugged, requested| {
        let expected = json!({
            "total_size_mib": 512, "slot_size_mib": 128, "block_size_mib": 2,
            "plugged_size_mib": plugged, "requested_size_mib": requested,
        });
        assert_eq!(vm.api().get("/hotplug/memory").json(), expected);
    };
    status(0, 0);
    request(&vm, 64);
    vm.expect("plugged=64");
    status(64, 64);
    let plugged = resident_mib(&vm);
    assert!((before + 62..before + 80).contains(&plugged), "from {before} to {plugged} MiB");
    // More than requested, then what it has.
    vm.expect("answer=1");
    vm.expect("answer=3");

    // What is left is as it was, and the host has the rest back.
    request(&vm, 20);
    vm.expect("plugged=20");
    wait_for_resident(&vm, before + 18..before + 36);
    // Reads zeroes where the guest sees something, nothing where it does not.
    vm.expect("unplugged=0x0");
    vm.expect("unplugged=0xffffffff");

    request(&vm, 140);
    vm.expect("plugged=140");
    request(&vm, 0);
    let end = vm.wait().ok();
    assert_eq!(end.values("plugged"), ["64", "20", "140", "0"]);
    assert_eq!((end.value("start"), end.value("size")), (START, "512"));
}

#[test]
fn unplugged_memory_cannot_be_had_by_writing_to_it() {
    // In a slot that the guest sees.
    let vm = mem("tests=steps,poke").start();
    vm.expect("ready=1");
    request(&vm, 2);
    vm.expect("poking=1");
    let end = vm.wait().code(6);
    let last = end.errors.lines().last().unwrap();
    assert!(last.contains("a block that is not plugged was written to"), "{end}");
    assert!(!end.output.contains("poked=1"), "{end}");
    // In one that it does not see: nobody is there.
    let end = mem("tests=poke").wait().ok();
    assert!(end.output.contains("poked=1"), "{end}");
}

#[test]
fn memory_goes_while_a_drive_uses_it() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk", MIB);
    let vm = mem("tests=flood rounds=50").disk(&disk).start();
    vm.expect("ready=1");
    request(&vm, 2);
    vm.wait().ok();
}

#[test]
fn a_reset_unplugs_everything() {
    let vm = Husk::api().start();
    let api = vm.api();
    let source = json!({
        "kernel_image_path": guest("mem"), "boot_args": "tests=steps,reset",
    });
    api.put("/boot-source", source).done();
    api.put("/hotplug/memory", json!({ "total_size_mib": 256, "block_size_mib": 4 })).done();
    let before = json!({ "total_size_mib": 256, "block_size_mib": 4, "slot_size_mib": 128 });
    assert_eq!(api.get("/hotplug/memory").json(), before);
    let early = api.patch("/hotplug/memory", json!({ "requested_size_mib": 8 })).fault();
    assert!(early.contains("not supported before starting"), "{early}");
    api.act("InstanceStart").done();
    vm.expect("ready=1");
    request(&vm, 8);
    vm.expect("plugged=8");
    // It boots again, finds nothing plugged and plugs what is requested.
    vm.expect("ready=1");
    vm.expect("plugged=8");
    let config = api.get("/vm/config").json();
    assert_eq!(config["memory-hotplug"], before);
    let late = api.put("/hotplug/memory", json!({ "total_size_mib": 256 })).fault();
    assert!(late.contains("not supported after starting"), "{late}");
    let odd = api.patch("/hotplug/memory", json!({ "requested_size_mib": 2 })).fault();
    assert!(odd.contains("must be a multiple of block size"), "{odd}");
}
