//! Compiles the demo guest, so that husk can run something without a download, and the seccomp lists, so that husk
//! needs no compiler for them.
use std::path::{Path, PathBuf};

#[path = "resources/guest/compile.rs"]
mod compile;
#[path = "resources/seccomp/compile.rs"]
mod seccomp;

/// Where the demo guest is loaded: low enough for a guest with 1 MiB of RAM.
const LOAD_ADDR: u64 = 0x4_0000;

fn main() {
    println!("cargo:rerun-if-changed=resources/guest");
    println!("cargo:rerun-if-changed=resources/seccomp");
    println!("cargo:rerun-if-changed=build.rs");
    let rustc = std::env::var_os("RUSTC").map_or_else(|| PathBuf::from("rustc"), PathBuf::from);
    let out = std::env::var_os("OUT_DIR").map(PathBuf::from).expect("cargo sets OUT_DIR");
    let resources = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources");
    let source = resources.join("guest/demo.rs");
    if let Err(e) = compile::compile(&rustc, &source, &out.join("demo.elf"), LOAD_ADDR) {
        println!("cargo::error=cannot compile the demo guest: {e}");
    }
    let lists = resources.join("seccomp/x86_64.json");
    if let Err(e) = seccomp::compile(&lists, &out.join("seccomp")) {
        println!("cargo::error=cannot compile {}: {e}", lists.display());
    }
}
