//! Bare-metal guests, compiled from `tests/guests` on demand.
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

#[path = "../../resources/guest/compile.rs"]
mod compile;

/// Where guests are loaded: where kernels are.
const LOAD_ADDR: u64 = 0x10_0000;

/// The image of `tests/guests/NAME.rs`.
pub(crate) fn guest(name: &str) -> PathBuf {
    guest_at(name, LOAD_ADDR)
}

/// The same, linked to be loaded at `load_addr`.
pub(crate) fn guest_at(name: &str, load_addr: u64) -> PathBuf {
    static MADE: Mutex<Option<HashMap<(String, u64), PathBuf>>> = Mutex::new(None);
    // A guest that does not compile fails each test that wants it, in its own words.
    let mut made = MADE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let made = made.get_or_insert_default();
    made.entry((name.to_owned(), load_addr)).or_insert_with(|| make(name, load_addr)).clone()
}

/// The program of `tests/guests/linux/NAME.rs`, which needs nothing of the Linux it runs in.
pub(crate) fn linux_program(name: &str) -> Vec<u8> {
    let source =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/guests/linux/{name}.rs"));
    let scratch = super::Scratch::new();
    let program = scratch.path(name);
    let mut command = Command::new(rustc());
    command.args(["--edition", "2024", "-O", "--target", "x86_64-unknown-linux-gnu"]);
    command.args(["-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"]);
    let output = command.arg(&program).arg(&source).output().expect("rustc");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cannot compile {}: {errors}", source.display());
    std::fs::read(program).unwrap()
}

fn rustc() -> PathBuf {
    std::env::var_os("RUSTC").map_or_else(|| PathBuf::from("rustc"), PathBuf::from)
}

fn make(name: &str, load_addr: u64) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/guests/{name}.rs"));
    let image = directory.join(format!("{name}-{load_addr:x}.elf"));
    // One process compiles, the others wait and find it done.
    let lock = File::create(image.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if let Err(e) = compile::compile(&rustc(), &source, &image, load_addr) {
        panic!("cannot compile the guest {name}: {e}");
    }
    image
}
