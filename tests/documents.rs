//! State files whose sums are right and whose document is not: each is refused by name, or is a VM that runs.
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use husk::Image;
use serde_json::{Map, Value, json};

use crate::util::*;

/// What is opened in this process.
const OPENED: u64 = 1500;
/// What is loaded by husk, into one process as long as that goes on.
const LOADED: u64 = 250;
/// Nothing is set aside by what a document says of itself.
const GROWTH_MAX_KIB: u64 = 64 << 10;
const PATIENCE_MAX: Duration = Duration::from_secs(10);

/// A small generator of numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }
}

/// A state file, taken apart.
struct State {
    document: Value,
    extents: Vec<u8>,
}

impl State {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let len = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) as usize;
        let document = serde_json::from_slice(&bytes[64..64 + len]).unwrap();
        Self { document, extents: bytes[64 + len..].to_vec() }
    }

    /// A file with another document, and sums that are right.
    fn with(&self, document: &[u8]) -> Vec<u8> {
        let mut bytes = b"husk-vm\0\x01\0\0\0\0\0\0\0".to_vec();
        bytes.extend((document.len() as u64).to_le_bytes());
        bytes.extend((self.extents.len() as u64 / 40).to_le_bytes());
        bytes.extend(sum(document).to_le_bytes());
        bytes.extend(sum(&self.extents).to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(sum(&bytes).to_le_bytes());
        [&bytes, document, &self.extents].concat()
    }
}

fn sum(bytes: &[u8]) -> u64 {
    let mut digest = crc64fast::Digest::new();
    digest.write(bytes);
    digest.sum64()
}

/// Where in a document something is.
fn paths(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.into());
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| paths(value, &format!("{at}/{name}"), all));
        }
        // Of many that are alike the first and the last.
        Value::Array(items) => {
            let ends = [0, items.len().saturating_sub(1)];
            let ends = if items.len() < 2 { &ends[..items.len()] } else { &ends };
            ends.iter().for_each(|n| paths(&items[*n], &format!("{at}/{n}"), all));
        }
        _ => {}
    }
}

/// What no husk has written.
fn absurd(random: &mut Random, was: &Value) -> Value {
    let numbers = [
        json!(0),
        json!(-1),
        json!(1),
        json!(u64::MAX),
        json!(1_u64 << 63),
        json!(i64::MIN),
        json!(u32::MAX),
        json!(1_u64 << 32),
        json!(1e308),
        json!(0.5),
        json!(4097),
        json!(65536),
    ];
    match (random.below(6), was) {
        (0, _) => Value::Null,
        (1, Value::String(text)) => json!(text.repeat(1000)),
        (1, Value::Array(items)) if !items.is_empty() => {
            json!(items.iter().cycle().take(items.len() * 300).collect::<Vec<_>>())
        }
        (2, Value::String(text)) if !text.is_empty() => {
            let end = random.below(text.len());
            json!(text.get(..end).unwrap_or("ff"))
        }
        (2, Value::Array(items)) if !items.is_empty() => json!(items[..items.len() - 1]),
        (3, Value::String(text)) => {
            let at = random.below(text.len().max(1));
            let swapped =
                |(n, c): (usize, char)| if n == at { random.of(&['0', 'f', 'z', '/']) } else { c };
            json!(text.chars().enumerate().map(swapped).collect::<String>())
        }
        (4, _) => random.of(&[
            json!(""),
            json!("x"),
            json!("../../etc/passwd"),
            json!("\u{0}"),
            json!({}),
            json!([]),
            json!([[]]),
            json!(true),
            json!({"": null}),
            json!("f".repeat(1 << 20)),
        ]),
        _ => random.of(&numbers),
    }
}

/// The document with one to three things wrong, as text: some cannot be said by a value.
fn spoilt(good: &Value, all: &[String], random: &mut Random) -> Vec<u8> {
    let mut document = good.clone();
    for _ in 0..1 + random.below(3) {
        let path = random.of(all);
        let (parent, name) = path.rsplit_once('/').unwrap_or_default();
        let how = random.below(8);
        if how == 7 && random.below(20) == 0 {
            let text = document.to_string();
            // Deeper than any stack, in the place of the whole or behind it.
            let deep = "[".repeat(random.of(&[127, 1000, 200_000]));
            return match random.below(2) {
                0 => deep.into_bytes(),
                _ => text.replacen(":{", &format!(":{deep}{{"), 1).into_bytes(),
            };
        }
        let Some(was) = document.pointer(&path).cloned() else { continue };
        match (how, document.pointer_mut(parent)) {
            (0, Some(Value::Object(fields))) => drop(fields.remove(name)),
            (1, Some(Value::Object(fields))) => {
                fields.remove(name);
                fields.insert(format!("{name}s"), was);
            }
            // Twice, by what is done to the text below.
            (2, Some(Value::Object(fields))) => {
                let other = absurd(random, &was);
                fields.insert(format!("{name}\u{1}"), random.of(&[was, other]));
            }
            (3, Some(Value::Array(items))) => items.insert(0, was),
            (4, _) => {
                // One thing in the place of another.
                let other = document.pointer(&random.of(all)).cloned();
                if let (Some(place), Some(other)) = (document.pointer_mut(&path), other) {
                    *place = other;
                }
            }
            _ => {
                let other = absurd(random, &was);
                document.pointer_mut(&path).into_iter().for_each(|place| *place = other.clone());
            }
        }
    }
    document.to_string().replace("\\u0001\":", "\":").into_bytes()
}

/// A snapshot of a VM with devices, and of it a copy whose state file may be spoilt.
fn made(scratch: &Scratch) -> (PathBuf, State) {
    let disk = scratch.file("disk", [b'd'; 4096]);
    let vm = Husk::guest("steps", "").memory(16).cpus(2).disk(&disk).arg("--rng");
    let vm = vm.option("--balloon", "0").vsock(7, &scratch.path("vsock")).listening().typing();
    let vm = vm.start();
    vm.expect("ready=1");
    let directory = scratch.path("snapshot");
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
    let state = State::read(&directory.join("state"));
    (directory, state)
}

#[test]
fn a_document_is_refused_by_name_or_opened() {
    let scratch = Scratch::new();
    let (directory, state) = made(&scratch);
    let file = directory.join("state");
    // What husk writes is what this test would write.
    let good = state.document.to_string();
    fs::write(&file, state.with(good.as_bytes())).unwrap();
    Image::open(&directory).unwrap().verify().unwrap();
    let mut all = Vec::new();
    paths(&state.document, "", &mut all);
    let (mut refused, before) = (0, resident_kib(std::process::id()).unwrap());
    for seed in 1..=OPENED {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let document = spoilt(&state.document, &all, &mut random);
        fs::write(&file, state.with(&document)).unwrap();
        let start = Instant::now();
        if let Err(e) = Image::open(&directory) {
            let said = e.to_string();
            let names =
                ["document: ", "does not fit together", "memory file", "on ", "directory: "];
            assert!(names.iter().any(|name| said.contains(name)), "seed {seed}: {said}");
            refused += 1;
        }
        let took = start.elapsed();
        assert!(took < PATIENCE_MAX, "seed {seed}: {took:?}");
    }
    let after = resident_kib(std::process::id()).unwrap();
    println!("{refused} of {OPENED} refused, {before} KiB, {after} KiB");
    assert!(refused > OPENED / 4 && refused < OPENED, "{refused} refused");
    assert!(after < before + GROWTH_MAX_KIB, "{before} KiB have become {after}");
}

#[test]
fn a_document_that_is_loaded_is_a_vm_or_leaves_none() {
    let scratch = Scratch::new();
    let (directory, state) = made(&scratch);
    let file = directory.join("state");
    let mut all = Vec::new();
    paths(&state.document, "", &mut all);
    let start_one = || Husk::api().serial("none").start();
    let (mut refused, mut ran, mut ended) = (0, 0, 0);
    let mut vm = start_one();
    let before = resident_kib(vm.pid()).unwrap();
    for seed in 1..=LOADED {
        let mut random = Random(seed.wrapping_mul(0xd1b5_4a32_d192_ed03));
        let document = spoilt(&state.document, &all, &mut random);
        fs::write(&file, state.with(&document)).unwrap();
        let mut body = Map::new();
        body.insert("directory".into(), json!(directory));
        body.insert("resume_vm".into(), true.into());
        let start = Instant::now();
        let reply = vm.api().put("/snapshot/load", Value::Object(body));
        let took = start.elapsed();
        assert!(took < PATIENCE_MAX, "seed {seed}: {took:?}");
        if reply.status != 204 {
            let said = reply.fault();
            assert!(!said.is_empty() && !said.contains("panic"), "seed {seed}: {said}");
            assert_eq!(vm.api().state(), "Not started", "seed {seed}: {said}");
            let after = resident_kib(vm.pid()).unwrap();
            assert!(after < before + GROWTH_MAX_KIB, "seed {seed}: {before} KiB, {after} KiB");
            refused += 1;
            continue;
        }
        // Its guest may do anything by now: it goes on, or has ended in a way that has a name.
        vm.ends_within(Duration::from_millis(20));
        vm.signal(Signal::KILL);
        let end = vm.wait();
        match (end.status.code(), end.signal()) {
            (None, Some(9)) => ran += 1,
            // Guest powered off or crashed, KVM or the host did not go on.
            (Some(0 | 4 | 5 | 6 | 8), None) => ended += 1,
            _ => panic!("seed {seed}: {end}"),
        }
        vm = start_one();
    }
    println!("{refused} refused, {ran} ran, {ended} ended");
    assert!(refused > LOADED / 4 && ran > 0, "{refused} refused, {ran} ran, {ended} ended");
}
