//! Snapshots in files, with sums that are right: what they say is the fuzzer's.
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;

use crate::bytes::Bytes;
use crate::json::spoil;

/// Bytes of an extent in a state file.
const EXTENT: usize = 40;
const PAGE: u64 = 4096;
/// Memory files are not larger, whatever the state says.
const FILE_MAX: u64 = 1 << 30;

const SMALL: &[u8] = include_bytes!("../../golden/1/state");
const LZ4: &[u8] = include_bytes!("../../golden/1/lz4/state");
const DEVICES: &[u8] = include_bytes!("../../golden/1/devices/state");
const OVERLAY: &[u8] =
    include_bytes!("../../golden/1/devices/overlay-disk0-140bad87445c78e1a439ade5dc362e88");

/// A state file, taken apart.
#[derive(Clone, Debug)]
struct State {
    document: Value,
    extents: Vec<[u8; EXTENT]>,
}

/// CRC-64/XZ.
fn sum(bytes: &[u8]) -> u64 {
    let mut digest = crc64fast::Digest::new();
    digest.write(bytes);
    digest.sum64()
}

impl State {
    fn read(bytes: &[u8]) -> Self {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let end = 64 + usize::try_from(word(16)).expect("it is small");
        let document = serde_json::from_slice(&bytes[64..end]).expect("it is a document");
        Self { document, extents: bytes[end..].as_chunks().0.to_vec() }
    }

    fn bytes(&self) -> Vec<u8> {
        let document = self.document.to_string();
        let extents = self.extents.concat();
        let mut bytes = b"husk-vm\0\x01\0\0\0\0\0\0\0".to_vec();
        bytes.extend((document.len() as u64).to_le_bytes());
        bytes.extend((self.extents.len() as u64).to_le_bytes());
        bytes.extend(sum(document.as_bytes()).to_le_bytes());
        bytes.extend(sum(&extents).to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(sum(&bytes).to_le_bytes());
        [&bytes, document.as_bytes(), &extents].concat()
    }

    fn memory(&mut self) -> &mut Value {
        &mut self.document["memory"]
    }
}

/// The extent of `len` bytes at `start` of the image, kept in one of the ways.
#[derive(Clone, Copy, Debug)]
struct Extent {
    start: u64,
    len: u32,
    kind: u32,
    at: u64,
    stored: u32,
    sum: u64,
}

impl Extent {
    fn bytes(self) -> [u8; EXTENT] {
        let mut bytes = [0; EXTENT];
        bytes[..8].copy_from_slice(&self.start.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.kind.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.at.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.stored.to_le_bytes());
        bytes[32..].copy_from_slice(&self.sum.to_le_bytes());
        bytes
    }
}

/// A directory for snapshots, the same for all inputs.
fn directory() -> &'static PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let shared = Path::new("/dev/shm");
        let base = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
        let path = base.join(format!("husk-fuzz-snapshots-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("files can be made there");
        path
    })
}

/// Restores what the input makes of a chain of snapshots.
pub fn restore(input: &[u8]) {
    let mut input = Bytes::new(input);
    let base = directory();
    let how = input.u8();
    let depth = 1 + how % 3;
    let mut parent: Option<String> = None;
    for n in 0..depth {
        let place = base.join(n.to_string());
        let id = format!("{n:032x}");
        let _ = std::fs::remove_dir_all(&place);
        std::fs::create_dir(&place).expect("files can be made there");
        write(&place, &id, parent.as_deref(), &mut input);
        parent = Some(id);
    }
    let _ = husk::fuzzing::restore(base.join((depth - 1).to_string()), how & 0x30 == 0x30);
}

fn write(place: &Path, id: &str, parent: Option<&str>, input: &mut Bytes<'_>) {
    let how = input.u8();
    static GOLDEN: OnceLock<[State; 3]> = OnceLock::new();
    let golden = GOLDEN.get_or_init(|| [SMALL, LZ4, DEVICES].map(State::read));
    let which = usize::from(how & 3) % 3;
    let mut state = golden[if parent.is_some() { 0 } else { which }].clone();
    state.document["id"] = id.into();
    state.memory()["file"] = format!("memory-{id}").into();
    let mut file = vec![];
    extents(&mut state, &mut file, id, which, input);
    if let Some(parent) = parent {
        let n = u64::from_str_radix(parent, 16).unwrap_or(0);
        let witness = [input.u64(), input.u64()];
        state.memory()["parent"] = serde_json::json!({
            "id": parent, "state": format!("../{n}/state"), "is_partial": how & 4 == 0,
            "witnesses": if how & 8 == 0 { vec![] } else { vec![witness] },
        });
    }
    if how & 0x10 != 0 {
        spoil(&mut state.document, input);
    }
    if how & 0xe0 == 0x20 {
        let shorter = &mut state.extents;
        shorter.truncate(input.below(8).into());
        for _ in 0..input.below(4) {
            let mut bytes = [0; EXTENT];
            let given = input.take(EXTENT);
            bytes[..given.len()].copy_from_slice(given);
            shorter.push(bytes);
        }
    }
    let mut bytes = state.bytes();
    if how & 0xe0 == 0x40 {
        // What no sum vouches for.
        let at = usize::from(input.u16()) % bytes.len();
        bytes[at] ^= 1 << input.below(8);
        bytes.truncate(bytes.len() - usize::from(input.u8()).min(bytes.len()));
    }
    put(&place.join("state"), &bytes);
    let memory = place.join(format!("memory-{id}"));
    put(&memory, &file);
    // Spoilt, it may be anything: what is read here adds nothing to it.
    let saved = &state.document["memory"];
    let len = saved["len"].as_u64().unwrap_or(0);
    if saved["compression"].is_null() && len <= FILE_MAX {
        let file = std::fs::File::options().write(true).open(&memory).expect("it is there");
        file.set_len(len).expect("it is a hole");
    }
    if which == 2 {
        put(&place.join("overlay-disk0-140bad87445c78e1a439ade5dc362e88"), OVERLAY);
    }
    if how & 0x80 != 0 {
        put(&place.join("working-set"), &working_set(id, input));
    }
}

fn put(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("files can be made there");
}

/// Extents of the input's choice, and the memory file that holds them.
fn extents(state: &mut State, file: &mut Vec<u8>, id: &str, which: usize, input: &mut Bytes<'_>) {
    let is_packed = which != 0 && state.memory()["compression"].is_string();
    let id: Vec<u8> =
        (0..32).step_by(2).map(|at| u8::from_str_radix(&id[at..at + 2], 16).unwrap_or(0)).collect();
    let id_at = state.memory()["id_at"].as_u64().unwrap_or(0) as usize;
    if is_packed {
        file.extend(&id);
        if input.flip() {
            state.memory()["compression"] = if input.flip() { "zstd" } else { "lz4" }.into();
        }
    } else {
        file.resize(id_at + 16, 0);
        file[id_at..].copy_from_slice(&id);
    }
    let is_over = state.document["memory"]["parent"].is_object();
    let kind = match state.memory()["compression"].as_str() {
        Some("lz4") => 2,
        Some("zstd") => 3,
        _ => 0,
    };
    let mut list = Vec::new();
    let mut start = 0;
    for _ in 0..input.below(8) {
        start += u64::from(input.below(16)) * PAGE;
        let pages = if input.flip() { 64 } else { 2 };
        let len = PAGE as u32 * (1 + u32::from(input.below(pages)));
        let how = input.u8();
        let extent = match (is_packed, how & 3) {
            (true, 0..3) => {
                let stored = input.piece();
                let content = husk::fuzzing::decompress(kind, stored, len as usize);
                let sum = content.map_or(0, |content| sum(&[&content, stored].concat()));
                let at = file.len() as u64;
                file.extend(stored);
                Extent { start, len, kind, at, stored: stored.len() as u32, sum }
            }
            (true, _) => {
                let content = vec![how; len as usize];
                let at = file.len() as u64;
                file.extend(&content);
                Extent { start, len, kind: 0, at, stored: len, sum: sum(&content) }
            }
            (false, 1) if is_over => Extent { start, len, kind: 1, at: 0, stored: 0, sum: 0 },
            (false, _) => {
                let (from, to) = (start as usize, start as usize + len as usize);
                let filled = file.len();
                file.resize(filled.max(to), 0);
                // Not over the id.
                file[from.max(id_at + 16).min(to)..to].fill(how);
                Extent { start, len, kind: 0, at: start, stored: len, sum: sum(&file[from..to]) }
            }
        };
        list.push(extent.bytes());
        start += u64::from(len);
    }
    state.extents = list;
}

/// A working set of the snapshot `id`, with a sum that is right.
fn working_set(id: &str, input: &mut Bytes<'_>) -> Vec<u8> {
    let mut bytes = b"husk-ws\0\x01\0\0\0\0\0\0\0".to_vec();
    bytes.extend(id.as_bytes());
    for _ in 0..input.below(8) {
        let is_odd = input.below(8) == 7;
        let (start, len) = (input.u16(), input.below(16));
        let numbers = match is_odd {
            true => [input.u64(), input.u64()],
            false => [u64::from(start) * PAGE + u64::from(len & 1), u64::from(len) * PAGE],
        };
        numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    }
    let is_odd = input.u8() == 0xff;
    bytes.extend(input.take(is_odd.into()));
    bytes.extend(sum(&bytes).to_le_bytes());
    bytes
}
