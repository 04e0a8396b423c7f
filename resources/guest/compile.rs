//! Compiles a bare-metal guest with nothing but rustc and the system's linker driver.
//!
//! `build.rs`, the tests and `make.rs` have it as a module, by `#[path]`; so it is written against std alone.

use std::collections::hash_map::DefaultHasher;
use std::ffi::OsStr;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs};

/// Compiles the guest `source` on the runtime beside this file into the ELF image `out`, to be loaded at `load_addr`.
///
/// Does nothing if `out` was made from the same sources by the same compiler. The image appears by a rename, so that
/// several processes may ask for one at a time.
pub(crate) fn compile(
    rustc: &Path,
    source: &Path,
    out: &Path,
    load_addr: u64,
) -> Result<(), String> {
    let runtime = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/guest");
    let stamp = out.with_extension("stamp");
    let fingerprint = format!("{:016x}", fingerprint(rustc, &runtime, source, load_addr)?);
    if out.exists() && fs::read_to_string(&stamp).is_ok_and(|was| was == fingerprint) {
        return Ok(());
    }

    static NEXT: AtomicU32 = AtomicU32::new(0);
    let scratch = format!("tmp-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let scratch = out.with_extension(scratch);
    fs::create_dir_all(&scratch).map_err(|e| format!("{}: {e}", scratch.display()))?;
    let done = build(rustc, &runtime, source, &scratch, load_addr).and_then(|image| {
        let stamped = fs::rename(&image, out).and_then(|()| fs::write(&stamp, fingerprint));
        stamped.map_err(|e| format!("{}: {e}", out.display()))
    });
    // Left-overs harm nobody, so a failure to remove them is no failure to build.
    let _ = fs::remove_dir_all(&scratch);
    done
}

/// Compiles the runtime, then the guest, into `scratch`; returns the image.
fn build(
    rustc: &Path,
    runtime: &Path,
    source: &Path,
    scratch: &Path,
    load_addr: u64,
) -> Result<PathBuf, String> {
    let library = scratch.join("librt.rlib");
    let image = scratch.join("guest.elf");

    let mut command = base(rustc);
    command.args(["--crate-type=rlib", "--crate-name=rt", "-o"]).arg(&library);
    run(command.arg(runtime.join("rt.rs")))?;

    // The linker script decides the layout; the linker must add nothing of its own.
    let script = format!("-Wl,-T,{}", runtime.join("guest.ld").display());
    let load = format!("-Wl,--defsym=LOAD_ADDR={load_addr:#x}");
    let link = ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none"];
    let pages = ["-Wl,-z,max-page-size=4096", "-Wl,-z,norelro", "-Wl,-z,noexecstack"];
    let mut command = base(rustc);
    command.args(["--crate-type=bin", "--crate-name=guest", "-Clto=fat", "-Cstrip=symbols"]);
    for argument in link.into_iter().chain(pages).chain([script.as_str(), load.as_str()]) {
        command.arg(format!("-Clink-arg={argument}"));
    }
    command.arg(format!("--extern=rt={}", library.display())).arg("-o").arg(&image);
    run(command.arg(source))?;
    Ok(image)
}

/// What both compilations need: code for fixed low addresses, and `core` without unwinding.
fn base(rustc: &Path) -> Command {
    let mut command = Command::new(rustc);
    command.args(["--edition=2024", "--target=x86_64-unknown-linux-gnu", "-Copt-level=2"]);
    command.args(["-Cpanic=abort", "-Crelocation-model=static", "-Ccodegen-units=1"]);
    command
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

/// A number that changes with the compiler, the guest's source, any file of the runtime or the load address.
fn fingerprint(rustc: &Path, runtime: &Path, source: &Path, load_addr: u64) -> Result<u64, String> {
    let version = Command::new(rustc).arg("-vV").output();
    let version = version.map_err(|e| format!("{}: {e}", rustc.display()))?;
    let entries = fs::read_dir(runtime).map_err(|e| format!("{}: {e}", runtime.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    // A guest in several files has the others in a directory of its name.
    let modules = fs::read_dir(source.with_extension("")).into_iter().flatten().flatten();
    files.extend(modules.map(|entry| entry.path()));
    let is_source = |path: &PathBuf| {
        path.extension().is_some_and(|e| ["rs", "s", "ld"].map(OsStr::new).contains(&e))
    };
    files.retain(is_source);
    files.push(source.to_path_buf());
    files.sort();

    let mut hasher = DefaultHasher::new();
    (version.stdout, load_addr).hash(&mut hasher);
    for file in files {
        let text = fs::read(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        (file, text).hash(&mut hasher);
    }
    Ok(hasher.finish())
}
