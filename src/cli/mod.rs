//! The command line. Parsing does no I/O; what was parsed is then carried out.
//!
//! The name decides the language: called `firecracker` or `jailer`, husk takes that program's flags and
//! speaks as it does.
mod child;
mod ctl;
mod device_args;
mod firecracker;
mod flags;
mod jail;
mod jailer;
mod launch;
mod limits;
mod restore;
mod run;
mod sandbox;
mod snapshot;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::Instant;

use clap::{CommandFactory, Parser, Subcommand};
use rustix::fs::Mode;

use self::flags::path;
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
    /// Start a husk in a jail: its own root, namespaces, user and limits. Needs root.
    Jail(jail::JailArgs),
    /// Ask a husk that listens on a socket.
    Ctl(ctl::CtlArgs),
    /// Judge a configuration, touch nothing.
    Check(run::CheckArgs),
    /// Look into a snapshot: what is in it, whether it is sound.
    Snapshot(snapshot::SnapshotArgs),
    /// Show what confines husk on this host.
    Sandbox(sandbox::ProbeArgs),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory.
    Man {
        /// Where to; made if missing.
        #[arg(value_name = "DIR", value_parser = path())]
        directory: std::path::PathBuf,
    },
}

/// Runs the binary: parses `args`, carries them out, says on standard error what went wrong.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let started = Instant::now();
    devices::sys::heap::share();
    crate::sandbox::note_inherited();
    spare_the_owner();
    restore_terminal_on_panic();
    let args: Vec<OsString> = args.into_iter().collect();
    let name = args.first().map(|arg0| Path::new(arg0).file_name().unwrap_or(arg0).to_owned());
    let name = name.as_deref().and_then(OsStr::to_str).unwrap_or_default();
    crate::logger::start_as(name);
    // As Firecracker's releases have them, the version and the architecture may follow.
    match name.split_once('-').map_or(name, |(program, _)| program) {
        "firecracker" => return firecracker::main(args, started),
        "jailer" => return jailer::main(args, started),
        _ => {}
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
            Self::Jail(args) => args.carry_out(started),
            Self::Ctl(args) => args.carry_out(),
            Self::Check(args) => args.carry_out(),
            Self::Snapshot(args) => args.carry_out(),
            Self::Sandbox(args) => args.carry_out(),
            Self::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "husk", &mut script);
                print(&script)
            }
            Self::Man { directory } => write_manual(&directory),
        }
    }
}

/// Whoever runs husk can use what it makes: a umask that takes that away would leave sockets that nobody can open.
fn spare_the_owner() {
    let mask = rustix::process::umask(Mode::RWXG | Mode::RWXO);
    rustix::process::umask(mask.difference(Mode::RWXU));
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
        if let Some(what) = lack_of_the_host(info) {
            crate::logger::complain(&format!("cannot start a thread: {what}"));
            std::process::exit(ExitCode::Host as i32);
        }
        // A backtrace reads husk's own file, which a thread that is closed may not: it would be killed at that, by
        // SIGSYS, and its last words would be of the sandbox.
        match crate::sandbox::has_begun() {
            true => crate::logger::complain(&info.to_string().replace('\n', " ")),
            false => report(info),
        }
        // One meaning each: a bug in husk is not "killed by SIGABRT".
        std::process::exit(ExitCode::Internal as i32);
    }));
}

/// What the host did not give, if that is what a panic is about and no bug: the one of a thread that begins and gets no
/// memory for its signal handlers, of which the standard library makes a panic.
fn lack_of_the_host<'a>(info: &'a std::panic::PanicHookInfo<'_>) -> Option<&'a str> {
    let is_of_stacks = |file: &str| file.ends_with("/sys/pal/unix/stack_overflow.rs");
    info.location().filter(|location| is_of_stacks(location.file()))?;
    info.payload_as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        firecracker::command().debug_assert();
        jailer::command().debug_assert();
    }
}
