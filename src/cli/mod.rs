//! The command line. Parsing does no I/O; what was parsed is then carried out.
//!
//! The name decides the language: called `firecracker`, husk takes that program's flags and speaks
//! as it does.
mod child;
mod ctl;
mod device_args;
mod firecracker;
mod launch;
mod limits;
mod restore;
mod run;
mod snapshot;

use std::ffi::OsString;
use std::path::Path;
use std::time::Instant;

use clap::{CommandFactory, Parser, Subcommand};

use crate::exit::ExitCode;

/// husk runs a guest in a micro-VM: a KVM virtual machine that starts in milliseconds.
#[derive(Debug, Parser)]
#[command(name = "husk", version, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  husk run                                    boot the guest that is built in
  husk run --kernel vmlinux --disk root.ext4  boot Linux from a disk, on this terminal
  husk api --api-sock husk.sock               start empty, be told over a socket
  husk ctl --api-sock husk.sock status        ask over that socket
  husk restore snapshots/warm                 go on from a snapshot

Exit codes: 0 the guest powered off, 2 wrong arguments, 3 wrong configuration, 4 the host lacks
something, 5 the guest crashed, 6 KVM failed, 7 a snapshot is damaged or not for this host, 130 and
143 stopped by a signal.";

#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Command {
    /// Boot a guest and stay until it ends.
    Run(run::RunArgs),
    /// Start empty and wait to be configured over a socket.
    Api(run::ApiArgs),
    /// Restore a guest from a snapshot and stay until it ends.
    Restore(restore::RestoreArgs),
    /// Ask a husk that listens on a socket.
    Ctl(ctl::CtlArgs),
    /// Judge a configuration, touch nothing.
    Check(run::CheckArgs),
    /// Look into a snapshot: what is in it, whether it is sound.
    Snapshot(snapshot::SnapshotArgs),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory.
    Man {
        /// Where to; made if missing.
        #[arg(value_name = "DIR")]
        directory: std::path::PathBuf,
    },
}

/// Runs the binary: parses `args`, carries them out, says on standard error what went wrong.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let started = Instant::now();
    devices::sys::heap::share();
    restore_terminal_on_panic();
    let args: Vec<OsString> = args.into_iter().collect();
    let name = args.first().map(|arg0| Path::new(arg0).file_name().unwrap_or(arg0).to_owned());
    let is_firecracker = name.is_some_and(|name| name == "firecracker");
    crate::logger::start_as(if is_firecracker { "firecracker" } else { "husk" });
    if is_firecracker {
        return firecracker::main(args, started);
    }
    if args.get(1).is_some_and(|word| word == crate::fork::SUBCOMMAND) {
        return child::serve();
    }
    match Cli::try_parse_from(args) {
        Ok(cli) => cli.command.carry_out(started),
        Err(e) => refuse_arguments(&e),
    }
}

impl Command {
    fn carry_out(self, started: Instant) -> ExitCode {
        match self {
            Self::Run(args) => args.carry_out(started),
            Self::Api(args) => args.carry_out(started),
            Self::Restore(args) => args.carry_out(started),
            Self::Ctl(args) => args.carry_out(),
            Self::Check(args) => args.carry_out(),
            Self::Snapshot(args) => args.carry_out(),
            Self::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "husk", &mut script);
                print(&script)
            }
            Self::Man { directory } => write_manual(&directory),
        }
    }
}

/// Help and version go to standard output and are no error; the rest is.
fn refuse_arguments(e: &clap::Error) -> ExitCode {
    if e.use_stderr() {
        crate::logger::say(e.render().to_string().trim_end());
        return ExitCode::Usage;
    }
    print(e.render().to_string().as_bytes())
}

/// Writes to standard output; a reader that has gone is no reason to panic.
fn print(bytes: &[u8]) -> ExitCode {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::Clean,
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::Clean,
        Err(e) => fail(ExitCode::Host, &e),
    }
}

/// One line on standard error: the error and what caused it.
fn fail(code: ExitCode, error: &dyn std::error::Error) -> ExitCode {
    crate::logger::complain(&crate::error::chain(error));
    code
}

fn write_manual(directory: &Path) -> ExitCode {
    let written = std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), directory));
    match written {
        Ok(()) => ExitCode::Clean,
        Err(e) => fail(
            ExitCode::Host,
            &std::io::Error::other(format!("cannot write to {}: {e}", directory.display())),
        ),
    }
}

fn restore_terminal_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        devices::backend::console::restore_terminal();
        report(info);
        // One meaning each: a bug in husk is not "killed by SIGABRT".
        std::process::exit(ExitCode::Internal as i32);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        firecracker::command().debug_assert();
    }
}
