//! Programs written for Firecracker, taken from registries as they are, drive husk under that name.
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::util::*;

/// husk by the name of `firecracker`.
fn firecracker(scratch: &Scratch) -> PathBuf {
    let path = scratch.path("firecracker");
    symlink(env!("CARGO_BIN_EXE_husk"), &path).unwrap();
    path
}

/// A command in a network, and in a PID namespace with which all dies that it starts.
fn contained(network: &Network, program: &PathBuf) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).arg(program);
    network.enter(command.stdin(Stdio::null()));
    command
}

/// Runs it to its end, which is to be a success; what it printed.
fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{said}\n{errors}", output.status);
    said
}

#[test]
fn firecracker_python_makes_uses_and_deletes_a_microvm() {
    let (scratch, network) = (Scratch::new(), Network::new());
    // It makes rules for what leaves by the default route.
    network.ip("tuntap add uplink mode tap");
    network.ip("link set uplink up");
    network.ip("route add default dev uplink");
    let disk = scratch.sparse("disk.img", 1 << 20);
    let data = scratch.path("data");
    fs::create_dir(&data).unwrap();
    let mut command = contained(&network, &python("python"));
    command.arg(clients().join("python/microvm.py")).arg(firecracker(&scratch)).arg(&data);
    let said = output(command.arg(guest("net")).arg(disk).env("PYTHONUNBUFFERED", "1"));
    expect_steps(
        &said,
        &["configured", "paused and resumed", "changed", "saved and restored", "deleted"],
    );
}

#[test]
fn firecracker_rs_sdk_makes_uses_and_ends_a_microvm() {
    let said = run_rust("firecracker_rs_sdk");
    expect_steps(
        &said,
        &["configured", "paused and resumed", "changed", "saved and ended", "restored"],
    );
}

#[test]
fn firepilot_makes_uses_and_ends_a_microvm() {
    expect_steps(&run_rust("firepilot"), &["configured", "paused and resumed", "ended"]);
}

#[track_caller]
fn expect_steps(said: &str, steps: &[&str]) {
    for step in steps {
        assert!(said.lines().any(|line| line == *step), "no {step:?}\n{said}");
    }
}

/// Runs a program of `tests/clients/rust` in a network with a tap.
fn run_rust(name: &str) -> String {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let disk = scratch.sparse("disk.img", 1 << 20);
    let data = scratch.path("data");
    fs::create_dir(&data).unwrap();
    let mut command = contained(&network, &rust(name));
    command.arg(firecracker(&scratch)).arg(&data).arg(guest("net")).arg(disk);
    output(&mut command)
}

/// A program of `tests/clients/rust`, built.
pub(crate) fn rust(name: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--locked", "--target-dir"]).arg(&directory);
    output(cargo.arg("--manifest-path").arg(clients().join("rust/Cargo.toml")));
    directory.join("debug").join(name)
}
