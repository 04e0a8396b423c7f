//! K: kernel images that are none, lie about themselves, do not fit, or change while they are read.
use std::path::Path;

use serde_json::json;

use super::subject::{Bad, Subject, differs, is_husks_alone, no_files, not_ours};
use crate::util::*;

const MIB: u64 = 1 << 20;

/// Refuses a kernel.
#[track_caller]
fn bad_kernel(subject: &mut Subject, name: &str, kernel: &Path, word: &str) {
    let path = kernel.to_str().unwrap();
    subject.refuses(Bad {
        name,
        config: json!({"boot-source": {"kernel_image_path": path}}),
        husk: Some(Husk::run(kernel)),
        code: 3,
        words: &[path, word],
    });
}

/// Refuses images by what is wrong with them.
#[track_caller]
fn bad_images<'a>(
    row: &'static str,
    images: impl IntoIterator<Item = (&'a str, Vec<u8>, impl AsRef<str>)>,
) {
    let (scratch, mut subject) = (Scratch::new(), Subject::start(row));
    for (name, bytes, word) in images {
        bad_kernel(&mut subject, name, &scratch.file(name, bytes), word.as_ref());
    }
    subject.serves_as_before();
}

#[test]
fn k01_k06_kernels_that_are_no_files() {
    let (scratch, mut subject) = (Scratch::new(), Subject::start("K1-K6"));
    for (path, word) in no_files(&scratch) {
        bad_kernel(&mut subject, path.to_str().unwrap(), &path, word);
    }
    subject.serves_as_before();
}

#[test]
fn k05_kernel_that_may_not_be_read() {
    if is_husks_alone("K5") {
        return;
    }
    let scratch = Scratch::new();
    let kernel = not_ours(scratch.file("kernel", Elf::good().bytes));
    let line = Husk::run(&kernel).heeding_modes().wait().quickly().refused(3);
    let text = kernel.to_str().unwrap();
    assert!(line.contains(text) && line.contains("Permission denied"), "{line}");
}

/// Every length that is too short for a header.
#[test]
fn k06_kernels_of_0_to_63_bytes() {
    let good = Elf::good().bytes;
    let bz_image = bz_image(PLUS_AND_POWEROFF);
    let elf = (0..64).map(|len| {
        let word = match len {
            0 => "the file is empty",
            _ => "truncated",
        };
        ("elf", good[..len].to_vec(), word)
    });
    let bz =
        (4..64).map(|len| ("bz", bz_image[..len].to_vec(), "neither an ELF file nor a bzImage"));
    bad_images("K6", elf.chain(bz));
}

#[test]
fn k07_kernels_of_no_known_format() {
    let good = Elf::good().bytes;
    bad_images(
        "K7",
        [
            ("script", &b"#!/bin/sh\necho hello\n"[..], "neither an ELF file nor a bzImage"),
            ("gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\0", "[1f, 8b, 08, 00]"),
            ("zeroes", &[0; 5000], "neither an ELF file nor a bzImage"),
            ("headless", &good[..100], "truncated: the program headers"),
            ("truncated", &good[..good.len() - 1], "truncated: a segment"),
        ]
        .map(|(name, bytes, word)| (name, bytes.to_vec(), word)),
    );
}

fn u64s(value: u64) -> [u8; 8] {
    value.to_le_bytes()
}

#[test]
fn k07_kernels_for_other_machines() {
    use field::*;
    let good = Elf::good;
    bad_images(
        "K7",
        [
            ("32-bit", good().with(CLASS, [1]), "EI_CLASS is 0x1"),
            ("big-endian", good().with(DATA, [2]), "EI_DATA is 0x2"),
            ("arm", good().with(MACHINE, [183, 0]), "e_machine is 0xb7"),
            ("object", good().with(TYPE, [1, 0]), "e_type is 0x1"),
            ("core", good().with(TYPE, [4, 0]), "e_type is 0x4"),
        ]
        .map(|(name, elf, word)| (name, elf.bytes, word)),
    );
}

#[test]
fn k08_program_headers_that_cannot_be() {
    use field::*;
    let good = Elf::good;
    bad_images(
        "K8",
        [
            ("entry-size", good().with(PHENTSIZE, [57, 0]), "e_phentsize is 0x39"),
            ("no-entry-size", good().with(PHENTSIZE, [0, 0]), "e_phentsize is 0x0"),
            ("no-headers", good().with(PHNUM, [0, 0]), "no segment to load"),
            ("many-headers", good().with(PHNUM, [0xff, 0xff]), "e_phnum is 0xffff"),
            ("more-headers", good().with(PHNUM, [0xfe, 0xff]), "truncated: the program headers"),
            ("beyond", good().with(PHOFF, u64s(1 << 40)), "truncated: the program headers"),
            ("wrap", good().with(PHOFF, u64s(u64::MAX)), "truncated: the program headers"),
            ("in-header", good().with(PHOFF, u64s(8)), "e_phoff is 0x8"),
            ("nothing-to-load", good().with(P_TYPE, [6, 0, 0, 0]), "no segment to load"),
        ]
        .map(|(name, elf, word)| (name, elf.bytes, word)),
    );
}

#[test]
fn k09_segments_that_are_not_in_the_file() {
    use field::*;
    let good = Elf::good;
    bad_images(
        "K9",
        [
            ("beyond", good().with(P_OFFSET, u64s(1 << 40)), "truncated: a segment"),
            ("wraps", good().with(P_OFFSET, u64s(u64::MAX)), "truncated: a segment"),
            ("more-in-file", good().with(P_MEMSZ, u64s(1)), "p_filesz is 0xf"),
            ("file-size", good().with(P_FILESZ, u64s(u64::MAX)), "p_filesz is 0xffffffffffffffff"),
        ]
        .map(|(name, elf, word)| (name, elf.bytes, word)),
    );
}

/// One segment of code.
fn at(addr: u64, mem_len: u64) -> Elf {
    Elf::new(addr, &[Segment { addr, bytes: PLUS_AND_POWEROFF.to_vec(), mem_len }])
}

#[test]
fn k10_segments_that_do_not_fit() {
    use field::*;
    let mut cases = vec![
        ("at-0", at(0, 64), "overlaps the boot structures".to_owned()),
        ("zero-page", at(0x7000, 64), "overlaps the boot structures".into()),
        ("page-tables", at(0x9000, 64), "overlaps the boot structures".into()),
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
        ("wraps", Elf::good().with(P_MEMSZ, u64s(u64::MAX)), "p_paddr is 0x100000".into()),
    ];
    for shift in 30..63 {
        let elf = Elf::good().with(P_MEMSZ, u64s(1 << shift));
        cases.push(("huge", elf, format!("0x100000..{:#x} is not in RAM", (1_u64 << shift) + MIB)));
    }
    bad_images("K10", cases.into_iter().map(|(name, elf, word)| (name, elf.bytes, word)));
}

/// With 5 GiB there is RAM above it.
#[test]
fn k10_segments_in_the_hole() {
    let (scratch, mut subject) = (Scratch::new(), Subject::start("K10"));
    for addr in [0xc000_0000, 0xfee0_0000, 0x1_0000_0000] {
        let kernel = scratch.file("hole", at(addr, 16).bytes);
        let path = kernel.to_str().unwrap();
        subject.refuses(Bad {
            name: "hole",
            config: json!({
                "boot-source": {"kernel_image_path": path},
                "machine-config": {"vcpu_count": 1, "mem_size_mib": 4000},
            }),
            husk: Some(Husk::run(&kernel).memory(4000)),
            code: 3,
            words: &[path, "is not in RAM"],
        });
    }
    subject.serves_as_before();
}

#[test]
fn k11_segments_that_overlap() {
    let two = |addr| {
        let segments = [0x10_0000, addr].map(|addr| Segment::new(addr, PLUS_AND_POWEROFF));
        Elf::new(0x10_0000, &segments)
    };
    // The second is as large as the file does not say.
    let mut inside = two(0x20_0000);
    inside.set(64 + 40, u64s(MIB + 1));
    bad_images(
        "K11",
        [
            ("twice", two(0x10_0000), "overlaps another segment"),
            ("by-a-byte", two(0x10_000e), "overlaps another segment"),
            ("from-below", two(0xf_fff2), "overlaps"),
            ("by-memory-alone", inside, "overlaps another segment"),
        ]
        .map(|(name, elf, word)| (name, elf.bytes, word)),
    );
}

#[test]
fn k12_entries_that_lead_to_no_code() {
    use field::*;
    let to = |addr: u64| Elf::good().with(ENTRY, u64s(addr)).bytes;
    bad_images(
        "K12",
        [
            ("zero", to(0), "entry point 0x0"),
            ("behind", to(0x10_000f), "entry point 0x10000f"),
            ("before", to(0xf_ffff), "entry point 0xfffff"),
            ("in-the-hole", to(0xd000_0000), "entry point 0xd0000000"),
            ("far", to(u64::MAX), "entry point 0xffffffffffffffff"),
        ],
    );
}

#[test]
fn k13_bzimages_with_bad_headers() {
    let spoilt = |at: usize, bytes: &[u8]| {
        let mut image = bz_image(PLUS_AND_POWEROFF);
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    bad_images(
        "K13",
        [
            // As many as 4, by the protocol: the header of one that has 1 is behind the end.
            ("no-sectors", spoilt(0x1f1, &[0]), "truncated"),
            ("sectors", spoilt(0x1f1, &[255]), "setup_sects is 0xff"),
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
        ],
    );
}

/// An ELF file with notes, which are at the end of it.
fn with_notes(notes: &[u8]) -> Vec<u8> {
    let code = Segment::new(0x10_0000, PLUS_AND_POWEROFF);
    let mut elf = Elf::new(0x10_0000, &[code.clone(), code]);
    // The second header becomes that of the notes.
    let (header, end) = (64 + 56, elf.bytes.len() as u64);
    elf.set(header, 4_u32.to_le_bytes());
    elf.set(header + 8, u64s(end));
    elf.set(header + 32, u64s(notes.len() as u64));
    elf.set(header + 40, u64s(notes.len() as u64));
    elf.bytes.extend(notes);
    elf.bytes
}

/// A note as it is, and what its header says of it.
fn note(name_len: u32, desc_len: u32, kind: u32, rest: &[u8]) -> Vec<u8> {
    let mut note: Vec<u8> =
        [name_len, desc_len, kind].iter().flat_map(|w| w.to_le_bytes()).collect();
    note.extend(rest);
    note
}

/// What cannot be understood is no PVH note, and the kernel is entered as one that has none.
#[test]
fn k14_notes_that_cannot_be_understood_are_ignored() {
    let scratch = Scratch::new();
    let entry = b"Xen\0\0\0\x10\0";
    let good = note(4, 4, 18, entry);
    for (name, notes) in [
        ("none", vec![]),
        ("a byte", vec![0xff]),
        ("half a header", good[..8].to_vec()),
        ("no name", good[..12].to_vec()),
        ("no description", good[..16].to_vec()),
        ("half a description", good[..18].to_vec()),
        ("huge name", note(u32::MAX, 4, 18, entry)),
        ("huge name, by a word", note(u32::MAX - 3, 4, 18, entry)),
        ("huge description", note(4, u32::MAX, 18, entry)),
        ("both huge", note(u32::MAX, u32::MAX, 18, entry)),
        ("zeroes", vec![0; 4096]),
        ("another kind", note(4, 4, 17, entry)),
        ("another name", note(4, 4, 18, b"Xem\0\0\0\x10\0")),
        ("an unaligned name", note(3, 4, 18, b"Xen\0\0\0\x10\0")),
        ("longer than any", [vec![0xff; 12], vec![0; 1 << 20]].concat()),
    ] {
        // Entered in 64-bit mode, it prints and powers off; in the 32-bit one of PVH, it would do other things.
        boots(&scratch, name, &with_notes(&notes));
    }
}

/// It is started by every way there is, prints its sign, and ends.
#[track_caller]
fn boots(scratch: &Scratch, name: &str, bytes: &[u8]) {
    let kernel = scratch.file("kernel", bytes);
    if crate::hostile::other().is_none() {
        let end = Husk::run(&kernel).wait().code(0);
        assert_eq!((&*end.output, &*end.errors), ("+", ""), "{name}: {end}");
    }
    let subject = Subject::start("K14");
    let config = json!({"boot-source": {"kernel_image_path": kernel}});
    let refusal = subject.refusal(&config);
    println!("K14 {name}: {refusal:?}");
    assert!(refusal.is_none() || differs("K14"), "{name}: {refusal:?}");
    if refusal.is_none() {
        subject.ends(0);
    }
}

#[test]
fn k14_pvh_notes_that_lead_astray() {
    let with_entry =
        |entry: u32| with_notes(&note(4, 4, 18, &[b"Xen\0", &entry.to_le_bytes()[..]].concat()));
    let first = note(4, 4, 18, b"Xen\0\0\0\0\0");
    let second = note(4, 4, 18, b"Xen\0\0\0\x10\0");
    bad_images(
        "K14",
        [
            ("zero", with_entry(0), "entry point 0x0"),
            ("behind", with_entry(0x10_000f), "entry point 0x10000f"),
            ("far", with_entry(u32::MAX), "entry point 0xffffffff"),
            // The first one counts.
            ("two", with_notes(&[first, second].concat()), "entry point 0x0"),
            ("short", with_notes(&note(4, 2, 18, b"Xen\0\0\0\0\0")), "n_descsz of the PVH note"),
            ("long", with_notes(&note(4, 64, 18, &[b"Xen\0", &[0; 64][..]].concat())), "n_descsz"),
            ("empty", with_notes(&note(4, 0, 18, b"Xen\0")), "n_descsz of the PVH note"),
        ],
    );
}

/// Each of its reads finds the end of the file, as if somebody had made it shorter just before.
#[test]
fn k15_kernels_that_shrink_while_they_are_read() {
    if is_husks_alone("K15") {
        return;
    }
    let scratch = Scratch::new();
    let mut long = at(0x10_0000, 4 * MIB);
    let len = 2 * MIB as usize;
    long.set(field::P_FILESZ, u64s(len as u64));
    long.bytes.resize(120 + len, 0);
    for (name, bytes) in [("elf", long.bytes), ("bz", bz_image(PLUS_AND_POWEROFF))] {
        let kernel = scratch.file(name, bytes);
        let refused = (1..)
            .map_while(|when| shrinks(&scratch, &kernel, when))
            .filter(|is_refused| *is_refused)
            .count();
        assert!(refused > 1, "{name}: refused {refused} times");
        println!("K15 {name}: {refused} reads");
    }
}

/// Whether it is refused for its `when`-th read; `None` if it was not read so often.
fn shrinks(scratch: &Scratch, kernel: &Path, when: u32) -> Option<bool> {
    let log = scratch.path("strace");
    let calls = "read,pread64,preadv,preadv2,readv";
    let husk = Husk::run(kernel).by([
        "strace",
        "-f",
        "--seccomp-bpf",
        "-o",
        log.to_str().unwrap(),
        "-P",
        kernel.to_str().unwrap(),
    ]
    .into_iter()
    .chain(["-e", &format!("trace={calls}")])
    .chain(["-e", &format!("inject={calls}:retval=0:when={when}")]));
    let end = husk.wait();
    let was_injected = std::fs::read_to_string(log).unwrap().contains("INJECTED");
    if !was_injected {
        end.code(0);
        return None;
    }
    let line = end.refused(3);
    let is_named = line.contains(kernel.to_str().unwrap()) && line.contains("became shorter");
    assert!(is_named, "read {when}: {line}");
    Some(true)
}

/// The same for real: somebody else makes it shorter and longer all the time.
#[test]
fn k15_kernel_that_somebody_truncates_meanwhile() {
    if is_husks_alone("K15") {
        return;
    }
    let scratch = Scratch::new();
    let mut elf = at(0x10_0000, 64 * MIB);
    let len = 32 * MIB as usize;
    elf.set(field::P_FILESZ, u64s(len as u64));
    elf.bytes.resize(120 + len, 0);
    let kernel = scratch.file("kernel", &elf.bytes);
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let ends = std::thread::scope(|scope| {
        scope.spawn(|| {
            let file = std::fs::File::options().write(true).open(&kernel).unwrap();
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                file.set_len(200).unwrap();
                file.set_len(120 + len as u64).unwrap();
            }
        });
        let ends: Vec<_> = (0..20).map(|_| Husk::run(&kernel).memory(128).wait()).collect();
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        ends
    });
    let mut refused = 0;
    for end in ends {
        match end.status.code() {
            // Its code is at the front, and was not touched.
            Some(0) => assert_eq!(end.output, "+"),
            _ => {
                let line = end.refused(3);
                assert!(line.contains(kernel.to_str().unwrap()), "{line}");
                refused += 1;
            }
        }
    }
    println!("K15: {refused} of 20 are refused");
}
