//! The ACPI tables, as another reads them: ACPICA's compiler takes them apart and puts them together again.
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::util::*;

/// Where the tables are, with all that is small: below 1 MiB.
const LOW: usize = 1 << 20;
const HEADER_LEN: usize = 36;

/// The tables with this signature in a guest's memory: their sum is 0.
fn tables<'a>(memory: &'a [u8], signature: &[u8; 4]) -> Vec<&'a [u8]> {
    let at = |i: usize| {
        let table = &memory[i..];
        let len = u32::from_le_bytes(table.get(4..8)?.try_into().unwrap()) as usize;
        let table = table.get(..len).filter(|_| len >= HEADER_LEN)?;
        let sum = table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        (table.starts_with(signature) && sum == 0).then_some(table)
    };
    (0..LOW).step_by(4).filter_map(at).collect()
}

/// Runs `iasl`; what it said, which is no complaint.
fn iasl(directory: &Path, words: &[&str]) -> String {
    let output = Command::new("iasl").args(words).current_dir(directory).output();
    let output = output.expect("iasl, of the package acpica-tools");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "iasl {words:?}: {text}{errors}");
    text
}

#[test]
fn the_compiler_has_nothing_to_say_about_the_tables() {
    let scratch = Scratch::new();
    let vm = Husk::guest("steps", "")
        .cpus(3)
        .memory(16)
        .disk(scratch.sparse("disk.img", 1 << 20))
        .arg("--rng")
        .listening()
        .start();
    vm.expect("ready=1");
    let directory = scratch.path("snapshot");
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
    drop(vm);
    let mut files = std::fs::read_dir(&directory).unwrap().map(|file| file.unwrap().path());
    let memory = std::fs::read(files.find(|path| !path.ends_with("state")).unwrap()).unwrap();

    for signature in [b"DSDT", b"FACP", b"APIC"] {
        let name = str::from_utf8(signature).unwrap();
        let found = tables(&memory, signature);
        assert_eq!(found.len(), 1, "{name}");
        let path = scratch.file(&format!("{name}.dat"), found[0]);
        iasl(&scratch.path(""), &["-d", path.to_str().unwrap()]);
        let said = iasl(&scratch.path(""), &["-oa", "-p", "again", &format!("{name}.dsl")]);
        assert!(said.contains("0 Errors, 0 Warnings, 0 Remarks"), "{name}: {said}");
        // Headers name their compiler.
        let again = std::fs::read(scratch.path("again.aml")).unwrap();
        assert!(again[HEADER_LEN..] == found[0][HEADER_LEN..], "{name} is another");
    }
    // What it reads is what is meant: the devices that tell a guest that it is another.
    let text = std::fs::read_to_string(scratch.path("DSDT.dsl")).unwrap();
    for line in [
        r#"Name (_CID, "VM_Gen_Counter")"#,
        r#"Name (_HID, "AMZNC10C")"#,
        r#"Name (_HID, "HUSK0001")"#,
        "Notify (VGEN, 0x80)",
        "Notify (VCLK, 0x80)",
        "Notify (PYLD, 0x80)",
        "Notify (PWRB, 0x80)",
    ] {
        assert!(text.contains(line), "no {line} in\n{text}");
    }
}
