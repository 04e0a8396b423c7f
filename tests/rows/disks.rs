//! D1-D8, D14: drives that are no disks, are somebody else's, or are as large as can be.
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::subject::{Bad, Subject, differs, hello, is_husks_alone, no_files, not_ours};
use crate::util::*;

const MIB: u64 = 1 << 20;

fn drive(id: &str, path: &Path, is_read_only: bool) -> Value {
    json!({"drive_id": id, "path_on_host": path, "is_root_device": false,
           "is_read_only": is_read_only})
}

/// Refuses a disk. The API names its id.
#[track_caller]
fn bad_disk(subject: &mut Subject, path: &Path, is_read_only: bool, word: &str) {
    let name = path.to_str().unwrap();
    let husk = Husk::guest("hello", "");
    let husk = if is_read_only { husk.read_only_disk(path) } else { husk.disk(path) };
    subject.refuses(Bad {
        name: &format!("{name}{}", if is_read_only { " to be read" } else { "" }),
        config: hello(json!({ "drives": [drive("disk0", path, is_read_only)] })),
        husk: Some(husk),
        code: 3,
        words: &["drives", "disk0", "path_on_host", name, word],
    });
}

#[test]
fn d01_d05_disks_that_are_no_disks() {
    let (scratch, mut subject) = (Scratch::new(), Subject::start("D1-D5"));
    let mut files = no_files(&scratch);
    files.push(("/proc/self/mem".into(), "cannot find the size of"));
    files.push((scratch.file("empty", ""), "0 bytes"));
    for (path, word) in files {
        bad_disk(&mut subject, &path, false, word);
        bad_disk(&mut subject, &path, true, word);
    }
    subject.serves_as_before();
}

#[test]
fn d05_disk_that_may_not_be_used() {
    if is_husks_alone("D5") {
        return;
    }
    let scratch = Scratch::new();
    let disk = not_ours(scratch.sparse("disk.img", MIB));
    let husk = || Husk::guest("hello", "");
    for husk in [husk().disk(&disk), husk().read_only_disk(&disk)] {
        let line = husk.heeding_modes().wait().quickly().refused(3);
        let is_named = line.contains("disk0") && line.contains(disk.to_str().unwrap());
        assert!(is_named && line.contains("Permission denied"), "{line}");
    }
}

#[test]
fn d06_disks_of_no_whole_number_of_sectors() {
    let (scratch, mut subject) = (Scratch::new(), Subject::start("D6"));
    for len in [1, 511, 513, 1000, MIB - 1, MIB + 1] {
        let path = scratch.sparse("odd", len);
        bad_disk(&mut subject, &path, false, &format!("{len} bytes"));
        bad_disk(&mut subject, &path, true, &format!("{len} bytes"));
    }
    subject.serves_as_before();
}

#[test]
fn d07_disk_that_another_vm_uses() {
    if is_husks_alone("D7") {
        return;
    }
    let (scratch, mut subject) = (Scratch::new(), Subject::start("D7"));
    let disk = scratch.sparse("disk.img", MIB);
    let writer = Husk::guest("hello", "how=hang").disk(&disk).start();
    writer.expect("how=hang");
    bad_disk(&mut subject, &disk, false, "in use");
    bad_disk(&mut subject, &disk, true, "in use");
    // By another name it is the same.
    let link = scratch.path("link");
    fs::hard_link(&disk, &link).unwrap();
    bad_disk(&mut subject, &link, false, "in use");
    drop(writer);
    let reader = Husk::guest("hello", "how=hang").read_only_disk(&disk).start();
    reader.expect("how=hang");
    bad_disk(&mut subject, &disk, false, "in use");
    // Readers do not disturb each other.
    Husk::guest("block", "tests=read").read_only_disk(&disk).wait().ok();
    drop(reader);
    Husk::guest("block", "tests=write").disk(&disk).wait().ok();
    subject.serves_as_before();
}

#[test]
fn d07_disk_that_is_given_twice() {
    let (scratch, mut subject) = (Scratch::new(), Subject::start("D7"));
    let disk = scratch.sparse("disk.img", MIB);
    let name = disk.to_str().unwrap();
    subject.refuses(Bad {
        name: "twice",
        config: hello(json!({
            "drives": [drive("disk0", &disk, false), drive("disk1", &disk, false)],
        })),
        husk: Some(Husk::guest("hello", "").disk(&disk).disk(&disk)),
        code: 3,
        words: &["drives", "disk1", name, "in use"],
    });
    subject.serves_as_before();
    if !is_husks_alone("D7") {
        // The refused start has let go of it.
        Husk::guest("block", "tests=write").disk(&disk).wait().ok();
    }
}

#[test]
fn d08_read_only_file_as_a_writable_disk() {
    if is_husks_alone("D8") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", MIB);
    let mount = format!(
        "cd {0}; mount --bind . .; mount -o remount,bind,ro . ; cd /",
        scratch.as_ref().display()
    );
    let line = Husk::guest("hello", "").disk(&disk).after(&mount).wait().refused(3);
    assert!(line.contains(disk.to_str().unwrap()), "{line}");
    assert!(line.contains("Read-only file system"), "{line}");
    Husk::guest("block", "tests=read").read_only_disk(&disk).after(&mount).wait().ok();
}

/// A guest that writes to it all the same is refused, and the file is what it was.
#[test]
fn d08_read_only_disk_stays_as_it_is() {
    let scratch = Scratch::new();
    let bytes: Vec<u8> = (0..MIB).map(|i| (i / 512) as u8).collect();
    let disk = scratch.file("disk.img", &bytes);
    let subject = Subject::start("D8");
    let boot = json!({"kernel_image_path": guest("block"), "boot_args": "tests=write"});
    let config = json!({"drives": [drive("a", &disk, true)], "boot-source": boot});
    assert!(subject.refusal(&config).is_none() || differs("D8"));
    let output = subject.vm().serial.clone();
    subject.ends(0);
    println!("D8: {}", output.so_far());
    assert!(output.so_far().contains("write=refused") || differs("D8"));
    assert!(fs::read(&disk).unwrap() == bytes, "the file has changed");
}

/// The largest file that there can be: its last sector is there, and what is behind it is not.
#[test]
fn d14_disks_as_large_as_can_be() {
    if is_husks_alone("D14") {
        return;
    }
    let scratch = Scratch::new();
    let mount = |len: u64| {
        let here = scratch.as_ref().display();
        format!("mount -t tmpfs tmpfs {here}; truncate -s {len} {here}/disk.img")
    };
    for len in [1 << 40, 1 << 62, (1 << 63) - 512] {
        let husk = Husk::guest("block", "tests=read,range").disk(scratch.path("disk.img"));
        let end = husk.after(&mount(len)).wait().ok();
        assert_eq!(end.value("sectors"), (len / 512).to_string());
        assert_eq!(end.value("read"), "ok");
    }
}
