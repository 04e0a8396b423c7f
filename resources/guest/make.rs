//! Compiles a guest by hand: `make SOURCE OUT [LOAD_ADDR]`. See README.md for the one command.

use std::env;
use std::path::Path;

#[path = "compile.rs"]
mod compile;

fn main() {
    let arguments: Vec<String> = env::args().collect();
    let (source, out, load_addr) = match arguments.get(1..) {
        Some([source, out]) => (source, out, Some(0x10_0000)),
        Some([source, out, load]) => {
            (source, out, u64::from_str_radix(load.trim_start_matches("0x"), 16).ok())
        }
        _ => usage(),
    };
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let load_addr = load_addr.unwrap_or_else(|| usage());
    if let Err(why) =
        compile::compile(Path::new(&rustc), Path::new(source), Path::new(out), load_addr)
    {
        eprintln!("{why}");
        std::process::exit(1);
    }
}

fn usage() -> ! {
    eprintln!("usage: make SOURCE OUT [LOAD_ADDR in hexadecimal, default 0x100000]");
    std::process::exit(2);
}
