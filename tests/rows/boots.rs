//! I, C, R: initrds, command lines, vCPUs and memory that cannot be had.
use serde_json::{Value, json};

use super::subject::{Bad, Subject, differs, hello, is_husks_alone, no_files, not_ours};
use crate::util::*;

const MIB: u64 = 1 << 20;

/// The guest `hello` with an initrd.
fn with_initrd(path: &str) -> Value {
    json!({"boot-source": {"kernel_image_path": guest("hello"), "initrd_path": path}})
}

/// The guest `hello` with a command line.
fn with_cmdline(text: &str) -> Value {
    json!({"boot-source": {"kernel_image_path": guest("hello"), "boot_args": text}})
}

#[test]
fn i01_initrds_that_are_no_files() {
    let (scratch, mut subject) = (Scratch::new(), Subject::start("I1"));
    let mut files = no_files(&scratch);
    files.push((scratch.file("empty", ""), "the file is empty"));
    for (path, word) in files {
        let name = path.to_str().unwrap();
        subject.refuses(Bad {
            name,
            config: with_initrd(name),
            husk: Some(Husk::guest("hello", "").initrd(&path)),
            code: 3,
            words: &[name, word],
        });
    }
    subject.serves_as_before();
}

#[test]
fn i01_initrd_that_may_not_be_read() {
    if is_husks_alone("I1") {
        return;
    }
    let scratch = Scratch::new();
    let initrd = not_ours(scratch.file("initrd", "initrd"));
    let line = Husk::guest("hello", "").initrd(&initrd).heeding_modes().wait().quickly();
    let line = line.refused(3);
    assert!(line.contains("initrd") && line.contains("Permission denied"), "{line}");
}

/// Larger than RAM, as large, and as large as what is left of it.
#[test]
fn i02_i03_initrds_that_do_not_fit() {
    let (scratch, mut subject) = (Scratch::new(), Subject::start("I2-I3"));
    for len in [127 * MIB + 1, 128 * MIB, 1 << 40] {
        let initrd = scratch.sparse("initrd", len);
        let name = initrd.to_str().unwrap();
        subject.refuses(Bad {
            name: &format!("{len} bytes"),
            config: with_initrd(name),
            husk: Some(Husk::guest("hello", "").initrd(&initrd)),
            code: 3,
            words: &[name, &format!("{len} bytes do not fit")],
        });
    }
    subject.serves_as_before();
}

/// Where the kernel is, in memory that the file does not show, and above what the kernel says it can reach.
#[test]
fn i04_initrds_where_the_kernel_is_or_cannot_reach() {
    let (scratch, mut subject) = (Scratch::new(), Subject::start("I4"));
    let code = Segment { addr: MIB, bytes: PLUS_AND_POWEROFF.to_vec(), mem_len: 126 * MIB };
    let large = scratch.file("large", Elf::new(MIB, &[code]).bytes);
    // initrd_addr_max, the last address: 8 MiB of RAM are below it, the kernel needs the first of them.
    let mut image = bz_image(PLUS_AND_POWEROFF);
    image[0x22c..0x230].copy_from_slice(&0x7f_ffff_u32.to_le_bytes());
    let low = scratch.file("low", image);
    for (name, kernel, len) in [("kernel", large, 2 * MIB), ("initrd_addr_max", low, 8 * MIB)] {
        let initrd = scratch.sparse("initrd", len);
        let path = initrd.to_str().unwrap();
        subject.refuses(Bad {
            name,
            config: json!({"boot-source": {"kernel_image_path": kernel, "initrd_path": path}}),
            husk: Some(Husk::run(&kernel).initrd(&initrd)),
            code: 3,
            words: &[path, "do not fit"],
        });
    }
    subject.serves_as_before();
}

#[test]
fn c01_c02_command_lines_that_are_too_long() {
    let mut subject = Subject::start("C1-C2");
    // The last one is as long as a request may be.
    for len in [2048, 2049, 32 << 10, 45_000] {
        let text = "x".repeat(len);
        subject.refuses(Bad {
            name: &format!("{len} bytes"),
            config: with_cmdline(&text),
            husk: Some(Husk::guest("hello", &text)),
            code: 3,
            words: &["command line", &len.to_string(), "2047"],
        });
    }
    subject.serves_as_before();
    if is_husks_alone("C2") {
        return;
    }
    let line = Husk::guest("hello", &"x".repeat(64 << 10)).wait().quickly().refused(3);
    assert!(line.contains("65536") && line.contains("2047"), "{line}");
    // What fits is not cut either.
    let text = format!("how=poweroff {}", "x".repeat(2047 - 13));
    Husk::guest("hello", &text).wait().ok();
}

#[test]
fn c03_command_lines_with_bytes_that_cannot_be() {
    let mut subject = Subject::start("C3");
    for (text, byte) in [
        ("a\nb", "0x0a"),
        ("a\rb", "0x0d"),
        ("caf\u{e9}", "0xc3"),
        ("\x7f", "0x7f"),
        ("\u{1b}[2J", "0x1b"),
        // A NUL gets no further than a program's arguments, but JSON has it.
        ("a\0b", "0x00"),
    ] {
        subject.refuses(Bad {
            name: byte,
            config: with_cmdline(text),
            husk: (!text.contains('\0')).then(|| Husk::guest("hello", text)),
            code: 3,
            words: &["command line", byte],
        });
    }
    subject.serves_as_before();
}

/// What the monitor appends counts, and is never cut off.
#[test]
fn c04_command_lines_with_no_room_for_what_is_appended() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", MIB);
    let mut subject = Subject::start("C4");
    let text = "x".repeat(2020);
    let mut config = with_cmdline(&text);
    config["drives"] = json!([{"drive_id": "a", "path_on_host": disk, "is_root_device": false}]);
    subject.refuses(Bad {
        name: "a device more",
        config,
        husk: Some(Husk::guest("hello", &text).disk(&disk)),
        code: 3,
        words: &["command line", "2047"],
    });
    subject.serves_as_before();
}

/// The guest `hello` on such a machine.
fn on(machine: Value) -> Value {
    hello(json!({ "machine-config": machine }))
}

#[test]
fn r01_memory_that_cannot_be() {
    let mut subject = Subject::start("R1");
    for mib in [0, 1 << 43, 1 << 44, 1 << 60, u64::MAX] {
        subject.refuses(Bad {
            name: &format!("{mib} MiB"),
            config: on(json!({"vcpu_count": 1, "mem_size_mib": mib})),
            husk: Some(Husk::guest("hello", "").memory(mib)),
            code: 3,
            words: &["mem_size_mib", &mib.to_string()],
        });
    }
    subject.serves_as_before();
}

#[test]
fn r02_memory_too_small_for_the_kernel() {
    let mut subject = Subject::start("R2");
    subject.refuses(Bad {
        name: "1 MiB",
        config: json!({
            "boot-source": {"kernel_image_path": guest("info")},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 1},
        }),
        husk: Some(Husk::guest("info", "").memory(1)),
        code: 3,
        words: &["is not in RAM (RAM is 0..0x100000)"],
    });
    subject.serves_as_before();
}

#[test]
fn r03_more_memory_than_the_host_has() {
    let mut subject = Subject::start("R3");
    let total = rustix::system::sysinfo().totalram / MIB + 1024;
    subject.refuses(Bad {
        name: "the host's and 1 GiB",
        config: on(json!({"vcpu_count": 1, "mem_size_mib": total})),
        husk: Some(Husk::guest("hello", "").memory(total)),
        code: 4,
        words: &[&format!("{total} MiB"), "ENOMEM"],
    });
    subject.serves_as_before();
}

#[test]
fn r04_vcpus_that_cannot_be() {
    let mut subject = Subject::start("R4");
    for count in [0, 33, 255] {
        subject.refuses(Bad {
            name: &format!("{count} vCPUs"),
            config: on(json!({"vcpu_count": count, "mem_size_mib": 128})),
            // The command line's own words for it.
            husk: None,
            code: 2,
            words: &["vcpu_count", &count.to_string()],
        });
    }
    for count in [json!(256), json!(-1), json!(1.5), json!("1"), json!(null), json!([1])] {
        let machine = json!({"vcpu_count": count, "mem_size_mib": 128});
        let (status, said) = subject.ask("PUT", "/machine-config", &machine.to_string());
        println!("R4 {count} vCPUs: {status} {}", said.trim_end());
        assert!(status == 400 || differs("R4"), "{count}: {status} {said}");
    }
    subject.serves_as_before();
    if is_husks_alone("R4") {
        return;
    }
    for count in ["0", "33", "255", "256", "-1", "1.5", "many"] {
        let end = Husk::guest("hello", "").arg(format!("--cpus={count}")).wait().quickly().code(2);
        assert!(end.errors.contains(count) && end.errors.contains("--cpus"), "{end}");
    }
    for mib in ["-1", "1.5", "lots", "18446744073709551616"] {
        let end = Husk::guest("hello", "").arg(format!("--memory={mib}")).wait().quickly().code(2);
        assert!(end.errors.contains(mib) && end.errors.contains("--memory"), "{end}");
    }
    let line = Husk::guest("hello", "").cpus(3).arg("--smt").wait().quickly().refused(3);
    assert!(line.contains("vcpu_count") && line.contains('3'), "{line}");
}
