//! Python programs from a registry, in an environment of their own.
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A program of the environment that `tests/clients/python/requirements.txt` describes: `python`, or
/// what a package has installed.
pub(crate) fn python(program: &str) -> PathBuf {
    static ENVIRONMENT: OnceLock<PathBuf> = OnceLock::new();
    ENVIRONMENT.get_or_init(install).join("bin").join(program)
}

fn install() -> PathBuf {
    let script = clients().join("python/install");
    let output = Command::new(&script).arg(env!("CARGO_TARGET_TMPDIR")).output();
    let output = output.unwrap_or_else(|e| panic!("{}: {e}", script.display()));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", script.display());
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end())
}

/// Where the clients are that are not husk's own.
pub(crate) fn clients() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}
