//! Memory that devices bring along: files, and what is plugged while the guest runs.
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

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
