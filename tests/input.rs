//! Bad input: refused at once, with one line that names what is wrong and its value, on the command line and over the API.
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::util::*;

const MIB: u64 = 1 << 20;

/// Refuses a configuration on both ways in: `husk` must end with `code`, an API must go on. Returns what they say.
#[track_caller]
fn refused(husk: Husk, api: &Api, config: Value, code: i32, words: &[&str]) {
    let line = husk.wait().quickly().refused(code);
    let fault = api.put("/vm", config).fault();
    for text in [&line, &fault] {
        for word in words {
            assert!(text.contains(word), "want {word:?} in: {text}");
        }
    }
    assert!(line.starts_with("husk: "), "{line}");
    assert_eq!(api.state(), "Not started");
}

/// Refuses a kernel.
#[track_caller]
fn bad_kernel(api: &Api, kernel: &Path, word: &str) {
    let path = kernel.to_str().unwrap();
    let config = json!({"boot-source": {"kernel_image_path": path}});
    refused(Husk::run(kernel), api, config.clone(), 3, &["kernel", path, word]);
}

/// What is wrong with a file by its kind, whatever it is to serve as.
fn bad_files(scratch: &Scratch) -> Vec<(PathBuf, &'static str)> {
    let socket = scratch.path("socket");
    UnixListener::bind(&socket).unwrap();
    let lap = scratch.path("loop");
    symlink(&lap, &lap).unwrap();
    vec![
        (scratch.path("missing"), "No such file"),
        (scratch.path("missing/too"), "No such file"),
        (scratch.as_ref().to_owned(), "directory"),
        (scratch.fifo("fifo"), "FIFO"),
        (socket, "socket"),
        (lap, "symbolic links"),
        ("/dev/zero".into(), "device"),
        ("/dev/null".into(), "device"),
        ("/dev/tty".into(), ""),
    ]
}

#[test]
fn kernels_that_are_no_files() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    for (path, word) in bad_files(&scratch) {
        bad_kernel(&vm.api(), &path, word);
    }
}

#[test]
fn kernels_of_no_known_format() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let good = Elf::good().bytes;
    for (name, bytes, word) in [
        ("empty", &b""[..], "the file is empty"),
        ("byte", b"\x7f", "truncated"),
        ("bytes", b"\x7fEL", "truncated"),
        ("magic", &good[..4], "truncated: the ELF header"),
        ("half", &good[..63], "truncated: the ELF header"),
        ("headless", &good[..100], "truncated: the program headers"),
        ("truncated", &good[..good.len() - 1], "truncated: a segment"),
        ("script", b"#!/bin/sh\necho hello\n", "neither an ELF file nor a bzImage"),
        ("gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\0", "[1f, 8b, 08, 00]"),
        ("zeroes", &[0; 5000], "neither an ELF file nor a bzImage"),
    ] {
        bad_kernel(&vm.api(), &scratch.file(name, bytes), word);
    }
}

#[test]
fn kernels_with_bad_headers() {
    use field::*;
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let good = Elf::good;
    let u64s = |value: u64| value.to_le_bytes();
    for (name, elf, word) in [
        ("32-bit", good().with(CLASS, [1]), "EI_CLASS is 0x1"),
        ("big-endian", good().with(DATA, [2]), "EI_DATA is 0x2"),
        ("arm", good().with(MACHINE, [183, 0]), "e_machine is 0xb7"),
        ("object", good().with(TYPE, [1, 0]), "e_type is 0x1"),
        ("core", good().with(TYPE, [4, 0]), "e_type is 0x4"),
        ("entry-size", good().with(PHENTSIZE, [57, 0]), "e_phentsize is 0x39"),
        ("no-headers", good().with(PHNUM, [0, 0]), "no segment to load"),
        ("many-headers", good().with(PHNUM, [0xff, 0xff]), "e_phnum is 0xffff"),
        ("more-headers", good().with(PHNUM, [0xfe, 0xff]), "truncated: the program headers"),
        ("headers-beyond", good().with(PHOFF, u64s(1 << 40)), "truncated: the program headers"),
        ("headers-wrap", good().with(PHOFF, u64s(u64::MAX)), "truncated: the program headers"),
        ("headers-in-header", good().with(PHOFF, u64s(8)), "e_phoff is 0x8"),
        ("nothing-to-load", good().with(P_TYPE, [6, 0, 0, 0]), "no segment to load"),
        ("segment-beyond", good().with(P_OFFSET, u64s(1 << 40)), "truncated: a segment"),
        ("segment-wraps", good().with(P_OFFSET, u64s(u64::MAX)), "truncated: a segment"),
        ("more-in-file", good().with(P_MEMSZ, u64s(1)), "p_filesz is 0xf"),
        ("file-size", good().with(P_FILESZ, u64s(u64::MAX)), "p_filesz is 0xffffffffffffffff"),
        ("memory-wraps", good().with(P_MEMSZ, u64s(u64::MAX)), "p_paddr is 0x100000"),
        ("entry-zero", good().with(ENTRY, u64s(0)), "entry point 0x0"),
        ("entry-behind", good().with(ENTRY, u64s(0x10_000f)), "entry point 0x10000f"),
        ("entry-far", good().with(ENTRY, u64s(u64::MAX)), "entry point 0xffffffffffffffff"),
    ] {
        bad_kernel(&vm.api(), &scratch.file(name, elf.bytes), word);
    }
}

#[test]
fn kernels_that_do_not_fit() {
    use field::*;
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let at = |addr: u64, mem_len: u64| {
        let code = Segment { addr, bytes: PLUS_AND_POWEROFF.to_vec(), mem_len };
        Elf::new(addr, &[code])
    };
    let two = |addr| {
        let segments = [0x10_0000, addr].map(|addr| Segment::new(addr, PLUS_AND_POWEROFF));
        Elf::new(0x10_0000, &segments)
    };
    let mut cases = vec![
        ("at-0", at(0, 64), "overlaps the boot structures".to_owned()),
        ("zero-page", at(0x7000, 64), "overlaps the boot structures".into()),
        ("command-line", at(0x2_0000, 64), "overlaps the boot structures".into()),
        ("low-edge", at(0x2_ffff, 64), "overlaps the boot structures".into()),
        ("mp-table", at(0x9_fc00, 64), "overlaps the MP and ACPI tables".into()),
        ("acpi", at(0xe_0000, 64), "overlaps the MP and ACPI tables".into()),
        ("high-edge", at(0xf_ffff, 64), "overlaps the MP and ACPI tables".into()),
        ("across", at(0x5_0000, 0x6_0000), "overlaps the MP and ACPI tables".into()),
        ("end-of-ram", at(0x7ff_fff1, 16), "0x7fffff1..0x8000001 is not in RAM".into()),
        ("beyond-ram", at(0x800_0000, 16), "is not in RAM (RAM is 0..0x8000000)".into()),
        ("hole", at(0xd000_0000, 16), "0xd0000000..0xd0000010 is not in RAM".into()),
        ("above-4-gib", at(0x1_0000_0000, 16), "is not in RAM".into()),
        ("top", at(u64::MAX - 15, 15), "is not in RAM".into()),
        ("twice", two(0x10_0000), "overlaps another segment".into()),
        ("by-a-byte", two(0x10_000e), "overlaps another segment".into()),
    ];
    for shift in 30..63 {
        let elf = Elf::good().with(P_MEMSZ, (1_u64 << shift).to_le_bytes());
        cases.push(("huge", elf, format!("0x100000..{:#x} is not in RAM", (1_u64 << shift) + MIB)));
    }
    for (name, elf, word) in cases {
        bad_kernel(&vm.api(), &scratch.file(name, elf.bytes), &word);
    }
}

#[test]
fn kernel_in_the_hole_does_not_fit_into_5_gib_either() {
    let scratch = Scratch::new();
    for addr in [0xc000_0000, 0xfee0_0000, 0x1_0000_0000] {
        let elf = Elf::new(addr, &[Segment::new(addr, PLUS_AND_POWEROFF)]);
        let kernel = scratch.file("hole", elf.bytes);
        let line = Husk::run(kernel).memory(5000).wait().quickly().refused(3);
        assert!(line.contains("is not in RAM"), "{line}");
    }
}

#[test]
fn bzimages_with_bad_headers() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let spoilt = |at: usize, bytes: &[u8]| {
        let mut image = bz_image(PLUS_AND_POWEROFF);
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    for (name, image, word) in [
        ("sectors", spoilt(0x1f1, &[255]), ""),
        ("beyond", spoilt(0x1f1, &[100]), "truncated"),
        ("flag", spoilt(0x1fe, &[0, 0]), "boot_flag is 0x0"),
        ("signature", spoilt(0x202, b"HdrX"), "neither an ELF file nor a bzImage"),
        ("version", spoilt(0x206, &[5, 2]), "version is 0x205"),
        ("low", spoilt(0x211, &[0]), "loadflags is 0x0"),
        ("32-bit", spoilt(0x236, &[0, 0]), "xloadflags is 0x0"),
        ("size", spoilt(0x1f4, &[0xff; 4]), "syssize"),
        ("nothing", spoilt(0x1f4, &[0; 4]), "syssize"),
        ("needs-more", spoilt(0x260, &[0xff; 4]), "is not in RAM"),
        ("preference", spoilt(0x258, &[0xff; 8]), "pref_address"),
        ("far", spoilt(0x258, &(1_u64 << 40).to_le_bytes()), "is not in RAM"),
        ("short", bz_image(PLUS_AND_POWEROFF)[..0x500].to_vec(), "truncated"),
    ] {
        bad_kernel(&vm.api(), &scratch.file(name, image), word);
    }
}

#[test]
fn initrds_that_are_no_files() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let mut files = bad_files(&scratch);
    files.push((scratch.file("empty", ""), "the file is empty"));
    for (path, word) in files {
        let name = path.to_str().unwrap();
        let source = json!({"kernel_image_path": guest("hello"), "initrd_path": name});
        let husk = Husk::guest("hello", "").initrd(&path);
        refused(husk, &vm.api(), json!({"boot-source": source}), 3, &["initrd", name, word]);
    }
}

#[test]
fn initrds_that_do_not_fit() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    for len in [127 * MIB + 1, 128 * MIB, 1 << 40] {
        let initrd = scratch.sparse("initrd", len);
        let name = initrd.to_str().unwrap();
        let source = json!({"kernel_image_path": guest("hello"), "initrd_path": name});
        let words = ["initrd", name, &format!("{len} bytes do not fit")];
        let husk = Husk::guest("hello", "").initrd(&initrd);
        refused(husk, &vm.api(), json!({"boot-source": source}), 3, &words);
    }
}

#[test]
fn command_lines_that_are_too_long() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let kernel = guest("hello");
    for len in [2048, 2049, 32 << 10] {
        let text = "x".repeat(len);
        let config = json!({"boot-source": {"kernel_image_path": kernel, "boot_args": text}});
        let words = ["command line", &len.to_string(), "2047"];
        refused(Husk::guest("hello", &text), &vm.api(), config, 3, &words);
    }
    let line = Husk::guest("hello", &"x".repeat(64 << 10)).wait().quickly().refused(3);
    assert!(line.contains("65536") && line.contains("2047"), "{line}");
    // What husk appends counts, and is never cut off.
    let (text, disk) = ("x".repeat(2020), scratch.sparse("disk.img", MIB));
    let line = Husk::guest("hello", &text).disk(&disk).wait().quickly().refused(3);
    assert!(line.contains("command line") && line.contains("2047"), "{line}");
}

#[test]
fn command_lines_with_bytes_that_cannot_be() {
    let vm = Husk::api().start();
    for (text, byte) in [("a\nb", "0x0a"), ("caf\u{e9}", "0xc3"), ("\x7f", "0x7f")] {
        let config =
            json!({"boot-source": {"kernel_image_path": guest("hello"), "boot_args": text}});
        let words = ["command line", byte];
        refused(Husk::guest("hello", text), &vm.api(), config, 3, &words);
    }
    // A NUL gets no further than a program's arguments, but JSON has it.
    let nul = json!({"boot-source": {"kernel_image_path": guest("hello"), "boot_args": "a\0b"}});
    let fault = vm.api().put("/vm", nul).fault();
    assert!(fault.contains("0x00"), "{fault}");
}

/// Refuses a disk. The API names its id.
#[track_caller]
fn bad_disk(api: &Api, path: &Path, is_read_only: bool, word: &str) {
    let name = path.to_str().unwrap();
    let husk = Husk::guest("hello", "");
    let husk = if is_read_only { husk.read_only_disk(path) } else { husk.disk(path) };
    let config = json!({
        "boot-source": {"kernel_image_path": guest("hello")},
        "drives": [{"drive_id": "disk0", "path_on_host": name, "is_root_device": false,
                    "is_read_only": is_read_only}],
    });
    refused(husk, api, config, 3, &["drives", "disk0", "path_on_host", name, word]);
}

#[test]
fn disks_that_are_no_disks() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let mut files = bad_files(&scratch);
    files.push(("/proc/self/mem".into(), ""));
    files.push((scratch.file("empty", ""), "0 bytes"));
    files.push((scratch.sparse("odd", 1000), "1000 bytes"));
    files.push((scratch.sparse("one-off", MIB + 1), "1048577 bytes"));
    for (path, word) in files {
        bad_disk(&vm.api(), &path, false, word);
        bad_disk(&vm.api(), &path, true, word);
    }
}

#[test]
fn read_only_file_as_a_writable_disk() {
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

#[test]
fn disk_that_another_husk_uses() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", MIB);
    let vm = Husk::api().start();
    let writer = Husk::guest("hello", "how=hang").disk(&disk).start();
    writer.expect("how=hang");
    bad_disk(&vm.api(), &disk, false, "in use");
    bad_disk(&vm.api(), &disk, true, "in use");
    drop(writer);
    let reader = Husk::guest("hello", "how=hang").read_only_disk(&disk).start();
    reader.expect("how=hang");
    bad_disk(&vm.api(), &disk, false, "in use");
    // Readers do not disturb each other.
    Husk::guest("block", "tests=read").read_only_disk(&disk).wait().ok();
    drop(reader);
    Husk::guest("block", "tests=write").disk(&disk).wait().ok();
}

#[test]
fn disk_that_is_given_twice() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let disk = scratch.sparse("disk.img", MIB);
    let name = disk.to_str().unwrap();
    let drive = |id: &str| json!({"drive_id": id, "path_on_host": name, "is_root_device": false});
    let config = json!({
        "boot-source": {"kernel_image_path": guest("hello")},
        "drives": [drive("disk0"), drive("disk1")],
    });
    let husk = Husk::guest("hello", "").disk(&disk).disk(&disk);
    refused(husk, &vm.api(), config, 3, &["drives", "disk1", name, "in use"]);
    // The refused start has let go of it.
    Husk::guest("block", "tests=write").disk(&disk).wait().ok();
}

#[test]
fn two_root_disks() {
    let scratch = Scratch::new();
    let [a, b] = ["a.img", "b.img"].map(|name| scratch.sparse(name, MIB));
    let root = |path: &Path| format!("{},root", path.display());
    let husk = Husk::guest("hello", "").option("--disk", root(&a)).option("--disk", root(&b));
    assert_eq!(husk.wait().refused(3), "husk: A root block device already exists!");
}

#[test]
fn more_devices_than_interrupts() {
    let scratch = Scratch::new();
    let mut husk = Husk::guest("hello", "");
    for i in 0..18 {
        husk = husk.disk(scratch.sparse(&format!("{i}.img"), MIB));
    }
    let line = husk.wait().refused(3);
    assert!(line.contains("17 virtio devices"), "{line}");
}

/// Refuses an interface for what the host lacks.
#[track_caller]
fn bad_net(network: &Network, tap: &str, code: i32, word: &str) {
    let vm = Husk::api().within(network).start();
    let config = json!({
        "boot-source": {"kernel_image_path": guest("hello")},
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": tap}],
    });
    let husk = Husk::guest("hello", "").within(network).option("--net", format!("tap={tap}"));
    let words = ["network-interfaces", "eth0", "host_dev_name", tap, word];
    refused(husk, &vm.api(), config, code, &words);
}

#[test]
fn taps_that_cannot_be_had() {
    let network = Network::with_tap();
    bad_net(&network, "none0", 4, "does not exist");
    bad_net(&network, "lo", 3, "is not a tap");
    let user = Husk::guest("hello", "how=hang").network(&network, "").start();
    user.expect("how=hang");
    bad_net(&network, "tap0", 4, "is in use");
    bad_net(&network, "a-name-that-is-too-long", 3, "is no interface name");
    bad_net(&network, "tap%d", 3, "is no interface name");
}

#[test]
fn bad_addresses_and_mtus() {
    let network = Network::with_tap();
    for (more, field, value) in [
        (",mac=02:00:00:00:00", "guest_mac", "02:00:00:00:00"),
        (",mac=02:00:00:00:00:0g", "guest_mac", "02:00:00:00:00:0g"),
        (",mac=02:00:00:00:00:01:02", "guest_mac", "02:00:00:00:00:01:02"),
        (",mac=01:00:00:00:00:01", "guest_mac", "multicast"),
        (",mac=00:00:00:00:00:00", "guest_mac", "zero"),
        (",mtu=67", "mtu", "67"),
    ] {
        let line = Husk::guest("hello", "").network(&network, more).wait().quickly().refused(3);
        assert!(line.contains(field) && line.contains(value), "{line}");
    }
    for more in [",mtu=65536", ",mtu=many", ",mac", ",speed=9", ""] {
        let net = if more.is_empty() {
            "mac=02:00:00:00:00:01".into()
        } else {
            format!("tap=tap0{more}")
        };
        Husk::guest("hello", "").within(&network).option("--net", net).wait().quickly().code(2);
    }
}

#[test]
fn vcpus_and_memory_out_of_range() {
    let vm = Husk::api().start();
    let config = |machine: Value| json!({"boot-source": {"kernel_image_path": guest("hello")}, "machine-config": machine});
    for count in [0, 33, 255] {
        let machine = json!({"vcpu_count": count, "mem_size_mib": 128});
        let fault = vm.api().put("/vm", config(machine)).fault();
        for word in ["machine-config", "vcpu_count", &count.to_string()] {
            assert!(fault.contains(word), "{fault}");
        }
        Husk::guest("hello", "").cpus(count).wait().quickly().code(2);
    }
    for mib in [0, 1 << 60, u64::MAX] {
        let machine = json!({"vcpu_count": 1, "mem_size_mib": mib});
        let words = ["machine-config", "mem_size_mib", &mib.to_string()];
        refused(Husk::guest("hello", "").memory(mib), &vm.api(), config(machine), 3, &words);
    }
    let total = rustix::system::sysinfo().totalram / MIB + 1024;
    let machine = json!({"vcpu_count": 1, "mem_size_mib": total});
    let wanted = format!("{total} MiB");
    let words = &[wanted.as_str(), "ENOMEM"];
    refused(Husk::guest("hello", "").memory(total), &vm.api(), config(machine), 4, words);
    Husk::guest("hello", "").cpus(256).wait().quickly().code(2);
    Husk::guest("hello", "").option("--cpus", "-1").wait().quickly().code(2);
    Husk::guest("hello", "").option("--memory", "lots").wait().quickly().code(2);
    let line = Husk::guest("hello", "").cpus(3).arg("--smt").wait().quickly().refused(3);
    assert!(line.contains("vcpu_count") && line.contains('3'), "{line}");
}

#[test]
fn huge_pages_that_the_host_does_not_have() {
    // None are reserved on a machine that was not told to.
    let line =
        Husk::guest("hello", "").memory(1 << 14).option("--huge-pages", "2M").wait().refused(4);
    assert!(line.contains("16384 MiB"), "{line}");
    let line = Husk::guest("hello", "").memory(3).option("--huge-pages", "2M").wait().refused(3);
    assert!(line.contains("mem_size_mib"), "{line}");
}

#[test]
fn kernel_too_large_for_1_mib() {
    let line = Husk::guest("info", "").memory(1).wait().quickly().refused(3);
    assert!(line.contains("is not in RAM (RAM is 0..0x100000)"), "{line}");
}

#[test]
fn config_files_that_are_no_files() {
    let scratch = Scratch::new();
    let mut files = bad_files(&scratch);
    files.push((scratch.file("empty", ""), "EOF"));
    files.push((scratch.sparse("huge", 1 << 40), "larger than 1048576 bytes"));
    for (path, word) in files {
        let line = Husk::new(["run", "--config-file"]).arg(&path).wait().quickly().refused(3);
        assert!(line.contains(path.to_str().unwrap()) && line.contains(word), "{line}");
    }
}

#[test]
fn config_files_that_are_no_configurations() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let kernel = guest("hello");
    let kernel = kernel.to_str().unwrap();
    let boot = format!(r#""boot-source": {{"kernel_image_path": "{kernel}"}}"#);
    let deep = format!(r#"{{"drives": {}"#, "[".repeat(40_000));
    for (text, word) in [
        ("", "EOF while parsing"),
        ("{", "EOF while parsing"),
        ("[]", "invalid type: sequence"),
        ("null", "invalid type: null"),
        ("hello", "expected value at line 1 column 1"),
        ("\u{feff}{}", "expected value at line 1 column 1"),
        ("{} {}", "trailing characters at line 1 column 4"),
        (r#"{"boot-source": {}}"#, "missing field `kernel_image_path`"),
        (r#"{"boot-source": {"kernel_image_path": 5}}"#, "invalid type: integer `5`"),
        (r#"{"boot-source": {"kernel_image_path": "k", "x": 1}}"#, "unknown field `x`"),
        (
            r#"{"boot-source": {"kernel_image_path": "a", "kernel_image_path": "b"}}"#,
            "duplicate field",
        ),
        (r#"{"boot-sauce": {}}"#, "unknown field `boot-sauce`"),
        (&format!("{{{boot}, {boot}}}"), "duplicate field `boot-source`"),
        (&format!(r#"{{{boot}, "drives": {{}}}}"#), "drives: "),
        (
            &format!(r#"{{{boot}, "drives": [{{"drive_id": "a"}}]}}"#),
            "missing field `is_root_device`",
        ),
        (
            &format!(r#"{{{boot}, "machine-config": {{"vcpu_count": 1}}}}"#),
            "missing field `mem_size_mib`",
        ),
        (
            &format!(r#"{{{boot}, "machine-config": {{"vcpu_count": "1", "mem_size_mib": 1}}}}"#),
            "invalid type: string",
        ),
        (
            &format!(r#"{{{boot}, "machine-config": {{"vcpu_count": -1, "mem_size_mib": 1}}}}"#),
            "invalid value: integer `-1`",
        ),
        (
            &format!(r#"{{{boot}, "machine-config": {{"vcpu_count": 1e99, "mem_size_mib": 1}}}}"#),
            "invalid type: floating point",
        ),
        (&format!(r#"{{{boot}, "machine-config": {{"vcpu_count": NaN}}}}"#), "expected value"),
        (&format!(r#"{{{boot}, "balloon": {{}}}}"#), "balloon: missing field `amount_mib`"),
        (&deep, "at line 1 column"),
    ] {
        let file = scratch.file("vm.json", text);
        let line = Husk::new(["run", "--config-file"]).arg(&file).wait().quickly().refused(3);
        assert!(line.contains(file.to_str().unwrap()) && line.contains(word), "{text}: {line}");
        if !text.is_empty() {
            let fault = vm.api().put("/vm", text).fault();
            assert!(fault.contains(word), "{text}: {fault}");
            assert_eq!(vm.api().state(), "Not started");
        }
    }
    let latin = scratch.file("latin.json", b"{\"boot-source\": \"caf\xe9\"}");
    let line = Husk::new(["run", "--config-file"]).arg(&latin).wait().refused(3);
    assert!(line.contains("invalid unicode") || line.contains("UTF-8"), "{line}");
}

#[test]
fn config_files_say_where_they_are_wrong() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", MIB);
    let drive = json!({"drive_id": "a", "path_on_host": disk, "is_root_device": false});
    let text = format!(
        "{{\n  \"boot-source\": {{\"kernel_image_path\": \"builtin:demo\"}},\n  \"drives\": [\n    \
         {drive},\n    {{\n      \"drive_id\": \"b\",\n      \"x\": 1\n    }}\n  ]\n}}\n"
    );
    let file = scratch.file("vm.json", &text);
    let line = Husk::new(["run", "--config-file"]).arg(&file).wait().quickly().refused(3);
    let start = format!("husk: {}: drives[1]: unknown field `x`, expected ", file.display());
    assert!(line.starts_with(&start), "{line}");
    assert!(line.ends_with(" at line 7 column 9"), "{line}");
    // What the host lacks is no fault of the file's.
    let config = json!({
        "boot-source": {"kernel_image_path": "builtin:demo"},
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "none0"}],
    });
    let file = scratch.file("vm.json", config.to_string());
    let line = Husk::new(["run", "--config-file"]).arg(&file).wait().quickly().refused(4);
    assert!(line.contains("eth0") && line.contains("does not exist"), "{line}");
}

#[test]
fn one_call_replaces_what_was_configured() {
    let vm = Husk::api().start();
    let api = vm.api();
    api.put("/entropy", json!({})).done();
    api.put("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 64})).done();
    let source = json!({"kernel_image_path": guest("hello"), "boot_args": "how=hang"});
    api.put("/vm", json!({"boot-source": source})).done();
    let config = api.get("/vm/config").json();
    assert_eq!(
        (&config["entropy"], &config["machine-config"]["vcpu_count"]),
        (&Value::Null, &json!(1))
    );
    api.act("Kill").done();
    vm.wait().code(0);
}

#[test]
fn refused_configuration_leaves_no_log() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let log = scratch.path("husk.log");
    let config = json!({
        "logger": {"log_path": log},
        "boot-source": {"kernel_image_path": guest("hello")},
        "serial": {"to": {"File": scratch.path("missing/file")}},
    });
    vm.api().put("/vm", &config).fault();
    let file = scratch.file("vm.json", config.to_string());
    Husk::new(["run", "--config-file"]).arg(&file).wait().refused(3);
    let good = json!({
        "logger": {"log_path": log},
        "boot-source": {"kernel_image_path": guest("hello")},
    });
    let file = scratch.file("vm.json", good.to_string());
    Husk::new(["check", "--config-file"]).arg(&file).wait().code(0);
    assert!(!log.exists());
    Husk::new(["run", "--config-file"]).arg(&file).wait().ok();
    assert!(log.exists());
}

#[test]
fn settings_are_judged_where_they_are_made() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let vm = Husk::api().within(&network).start();
    let api = vm.api();
    assert_eq!(api.patch("/machine-config", json!({})).fault(), "Empty PATCH request.");
    for (text, word) in
        [("x".repeat(3000), "3000"), ("a\0b".into(), "0x00"), ("a\nb".into(), "0x0a")]
    {
        let source = json!({"kernel_image_path": guest("hello"), "boot_args": text});
        let fault = api.put("/boot-source", source).fault();
        assert!(fault.contains("command line") && fault.contains(word), "{fault}");
    }
    let fault = api.put("/serial", json!({"serial_out_path": scratch.path("no/file")})).fault();
    assert!(fault.contains("No such file"), "{fault}");
    let fault = api.put("/logger", json!({"log_path": scratch.path("no/file")})).fault();
    assert!(fault.contains("No such file"), "{fault}");
    // Firecracker's own clients say null and mean the default, and send limiters without limits.
    let disk = scratch.sparse("disk.img", MIB);
    let drive = json!({
        "drive_id": "a", "path_on_host": disk, "is_root_device": false, "is_read_only": null,
        "cache_type": null, "io_engine": null, "rate_limiter": {"bandwidth": null, "ops": null},
    });
    api.put("/drives/a", drive).done();
    let limit = json!({"rate_limiter": {"ops": {"size": -1, "refill_time": 1}}});
    let fault = api.put("/entropy", limit).fault();
    assert!(fault.contains("invalid value: integer `-1`, expected u64"), "{fault}");
    let interface = |id: &str, tap: &str, mac: &str| {
        let path = format!("/network-interfaces/{id}");
        api.put(&path, json!({"iface_id": id, "host_dev_name": tap, "guest_mac": mac}))
    };
    network.run("ip", "tuntap add tap1 mode tap");
    interface("eth0", "tap0", "06:00:AC:10:00:02").done();
    let fault = interface("eth1", "tap1", "06:00:ac:10:00:02").fault();
    assert!(
        fault.contains("The guest MAC address 06:00:ac:10:00:02 is already in use."),
        "{fault}"
    );
    let fault = interface("eth1", "tap0", "06:00:ac:10:00:03").fault();
    assert!(fault.contains("is in use"), "{fault}");
    interface("eth0", "tap0", "06:00:AC:10:00:02").done();
    api.put("/drives/a", json!({"drive_id": "a", "path_on_host": disk, "is_root_device": false}))
        .done();
    let fault = api
        .put("/drives/b", json!({"drive_id": "b", "path_on_host": disk, "is_root_device": false}));
    assert!(fault.fault().contains("in use"), "the same disk");
    for i in 2..17 {
        let disk = scratch.sparse(&format!("{i}.img"), MIB);
        let id = format!("d{i}");
        let drive = json!({"drive_id": id, "path_on_host": disk, "is_root_device": false});
        api.put(&format!("/drives/{id}"), drive).done();
    }
    let fault = api.put("/entropy", json!({})).fault();
    assert!(fault.contains("17 virtio devices"), "{fault}");
}

#[test]
fn refused_configuration_changes_nothing() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let disk = scratch.sparse("disk.img", MIB);
    let api = vm.api();
    let drive = json!({"drive_id": "a", "path_on_host": disk, "is_root_device": false});
    api.put("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 64})).done();
    api.put("/drives/a", &drive).done();
    let before = api.get("/vm/config").json();
    api.put("/machine-config", json!({"vcpu_count": 99, "mem_size_mib": 64})).fault();
    api.put("/drives/a", json!({"drive_id": "a", "path_on_host": "/", "is_root_device": false}))
        .fault();
    api.put("/drives/b", json!({"drive_id": "b", "path_on_host": "/", "is_root_device": false}))
        .fault();
    api.put("/boot-source", json!({"kernel_image_path": "/"})).fault();
    api.act("InstanceStart").fault();
    let config = json!({"boot-source": {"kernel_image_path": guest("hello")},
                        "machine-config": {"vcpu_count": 1, "mem_size_mib": 1_u64 << 60}});
    api.put("/vm", config).fault();
    assert_eq!(api.get("/vm/config").json(), before);
    // And it is still of use.
    api.put("/boot-source", json!({"kernel_image_path": guest("hello")})).done();
    api.act("InstanceStart").done();
    vm.wait().ok();
}

#[test]
fn serial_ports_that_lead_to_no_place() {
    let scratch = Scratch::new();
    let directory = scratch.as_ref().display();
    let long = "x".repeat(200);
    for to in [
        format!("file={directory}"),
        format!("file={directory}/none/file"),
        format!("socket={directory}"),
        format!("socket={directory}/{long}"),
        format!("socket={}", scratch.file("file", "precious").display()),
    ] {
        let line = Husk::guest("hello", "").serial(&to).wait().quickly().refused(3);
        assert!(line.contains("serial") && line.contains(&*directory.to_string()), "{line}");
        let checked = Husk::check(guest("hello")).serial(&to).wait().quickly().refused(3);
        assert_eq!(checked, line);
    }
    let taken = scratch.path("taken");
    let _listener = UnixListener::bind(&taken).unwrap();
    let to = format!("socket={}", taken.display());
    let line = Husk::guest("hello", "").serial(&to).wait().quickly().refused(3);
    assert!(line.ends_with("another process is listening on it"), "{line}");
    assert_eq!(fs::read_to_string(scratch.path("file")).unwrap(), "precious");
    for to in ["", "file", "file=", "socket=", "telephone"] {
        Husk::guest("hello", "").serial(to).wait().quickly().code(2);
    }
}

#[test]
fn arguments_that_make_no_sense() {
    for args in [
        &[][..],
        &["fly"],
        &["run", "--kernal", "vmlinux"],
        &["run", "vmlinux"],
        &["run", "--kernel"],
        &["run", "--on-reboot", "party"],
        &["run", "--disk", ""],
        &["run", "--disk", ",ro"],
        &["run", "--disk", "disk.img,rw,fast"],
        &["run", "--config-file", "vm.json", "--kernel", "vmlinux"],
        &["run", "--id", "a/b"],
        &["run", "--log-level", "loud"],
        &["api"],
        &["ctl", "status"],
        &["completions", "csh"],
    ] {
        let end = Husk::new(args).wait().quickly().code(2);
        assert_eq!(end.output, "", "{end}");
        assert!(!end.errors.is_empty(), "{end}");
    }
}

#[test]
fn host_without_kvm() {
    for (prepare, word) in [
        ("mount -t tmpfs none /dev", "cannot open /dev/kvm: load the kvm_intel or kvm_amd module"),
        ("mount --bind /dev/null /dev/kvm", "/dev/kvm"),
    ] {
        let line = Husk::guest("hello", "").after(prepare).wait().quickly().refused(4);
        assert!(line.contains(word), "{line}");
    }
}

#[test]
fn host_without_descriptors() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", MIB);
    let mut started = 0;
    for limit in 4..64 {
        let husk = Husk::guest("hello", "").cpus(2).disk(&disk).arg("--rng").listening();
        let vm = husk.after(&format!("ulimit -n {limit}")).start_unheard();
        let end = vm.wait();
        match end.status.code() {
            Some(0) => started += 1,
            // The dynamic loader was already at its wits' end.
            Some(127) => assert!(limit < 10, "{limit} {end}"),
            Some(4) => {
                let says_so = ["Too many open files", "Error(24)"].map(|s| end.errors.contains(s));
                assert!(says_so.contains(&true), "{limit} {end}");
            }
            _ => panic!("{limit} {end}"),
        }
    }
    assert!((1..50).contains(&started), "{started}");
}

#[test]
fn host_without_memory() {
    // Not even husk's own needs are met, or those of the guest are not: never a crash.
    let loader = "error while loading shared libraries: ";
    for kib in [20_000, 40_000, 60_000, 100_000, 140_000] {
        let end = Husk::guest("hello", "").after(&format!("ulimit -v {kib}")).wait();
        match end.status.code() {
            Some(0 | 4) => assert!(!end.errors.contains("panicked"), "{kib} {end}"),
            // There is no husk yet that could say anything.
            Some(127) if kib == 20_000 => assert!(end.errors.contains(loader), "{kib} {end}"),
            _ => panic!("{kib} {end}"),
        }
    }
}
