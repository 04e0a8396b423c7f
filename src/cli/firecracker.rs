//! husk under the name `firecracker`: its flags, its log lines, its manners.
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, CommandFactory, FromArgMatches, Parser};

use super::flags::{number, path};
use super::launch::{self, Launch, Sandbox, Style};
use super::run::{MetricsArgs, MmdsArgs};
use super::{fail, refuse_arguments};
use crate::config::{LogLevel, LoggerConfig, OnReboot, VmConfig};
use crate::error::Refusal;
use crate::exit::ExitCode;
use crate::instance::FIRECRACKER_VERSION;
use crate::logger::{self, Stream};
use crate::request::Request;
use crate::sandbox::{Seccomp, Wanted};
use crate::snapshot;

/// Where Firecracker listens unless told otherwise.
const DEFAULT_SOCKET: &str = "/run/firecracker.socket";

/// husk, called by this name, takes Firecracker's arguments.
#[derive(Debug, Parser)]
#[command(name = "firecracker", disable_version_flag = true)]
struct FirecrackerArgs {
    /// The Unix socket to listen on
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, value_parser = path())]
    api_sock: PathBuf,
    /// MicroVM unique identifier
    #[arg(long, default_value = "anonymous-instance", value_parser = launch::id)]
    id: String,
    /// A configuration file; the guest starts at once
    #[arg(long, value_name = "FILE", value_parser = path())]
    config_file: Option<PathBuf>,
    /// Do not listen; needs --config-file
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// Where the log goes; standard output by default
    #[arg(long, value_name = "FILE", value_parser = path())]
    log_path: Option<PathBuf>,
    /// How much is logged
    #[arg(long, default_value = "Info")]
    level: LogLevel,
    /// Only log lines of this module
    #[arg(long)]
    module: Option<String>,
    /// Lines show their level
    #[arg(long)]
    show_level: bool,
    /// Lines show the place in the source
    #[arg(long)]
    show_log_origin: bool,
    /// Largest body of a request, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = launch::BODY_LIMIT,
          allow_negative_numbers = true, value_parser = number::<usize>)]
    http_api_max_payload_size: usize,
    #[command(flatten)]
    timing: launch::Timing,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    mmds: MmdsArgs,
    #[command(flatten)]
    unsupported: Unsupported,
    /// A page at 0xc0000000 whose first byte the guest sets to 123 when it has booted; the log says when
    #[arg(long)]
    boot_timer: bool,
    /// Install no seccomp filters; the rest of the sandbox stays
    #[arg(long)]
    no_seccomp: bool,
    /// Print the version of snapshots that are made
    #[arg(long)]
    snapshot_version: bool,
    /// Print the version of a snapshot's state file
    #[arg(long, value_name = "FILE", value_parser = path())]
    describe_snapshot: Option<PathBuf>,
    /// Print the version
    #[arg(long)]
    version: bool,
}

/// Refused when given: to ignore them would be to lie.
#[derive(Args, Debug)]
struct Unsupported {
    /// Not supported: husk has lists of its own
    #[arg(long, value_name = "FILE", value_parser = path())]
    seccomp_filter: Option<PathBuf>,
    /// Not supported: there is no PCI bus
    #[arg(long)]
    enable_pci: bool,
}

impl Unsupported {
    /// Why the first of them is refused.
    fn first(&self) -> Option<String> {
        [
            (
                "--seccomp-filter",
                self.seccomp_filter.is_some(),
                ": husk has lists of its own, for its own threads (docs/sandbox.md)",
            ),
            ("--enable-pci", self.enable_pci, ": there is no PCI bus, all devices are virtio-mmio"),
        ]
        .into_iter()
        .find(|(_, is_given, _)| *is_given)
        .map(|(flag, _, why)| format!("{flag} is not supported{why}"))
    }
}

pub(super) fn command() -> clap::Command {
    FirecrackerArgs::command()
}

pub(super) fn main(args: Vec<OsString>, started: Instant) -> ExitCode {
    let args = command()
        .try_get_matches_from(args)
        .and_then(|matches| FirecrackerArgs::from_arg_matches(&matches));
    match args {
        Ok(args) if args.version => {
            super::print(format!("Firecracker v{FIRECRACKER_VERSION}\n").as_bytes())
        }
        Ok(args) if args.snapshot_version => print_format(snapshot::VERSION),
        Ok(FirecrackerArgs { describe_snapshot: Some(path), .. }) => {
            let format = snapshot::format_of(&path);
            format.map_or_else(|e| fail(e.exit_code(), &e), print_format)
        }
        Ok(args) => match args.unsupported.first() {
            Some(why) => {
                logger::complain(&why);
                ExitCode::Usage
            }
            None => args.carry_out(started),
        },
        Err(e) => refuse_arguments(&e),
    }
}

/// Prints the version of a format as Firecracker does: with three parts.
fn print_format(version: u32) -> ExitCode {
    super::print(format!("v{version}.0.0\n").as_bytes())
}

impl FirecrackerArgs {
    fn carry_out(self, started: Instant) -> ExitCode {
        logger::init(self.level, Stream::Output, Some(self.id.clone()));
        let launched = self.launch(started);
        let code = launched.unwrap_or_else(|e| {
            log::error!("{e}");
            fail(e.exit_code(), &e)
        });
        match code {
            ExitCode::Clean => log::info!("Firecracker exiting successfully. exit_code=0"),
            other => log::error!("Firecracker exiting with error. exit_code={}", other as u8),
        }
        code
    }

    fn launch(self, started: Instant) -> Result<ExitCode, Refusal> {
        logger::configure(&LoggerConfig {
            level: None,
            log_path: self.log_path,
            show_level: Some(self.show_level),
            show_log_origin: Some(self.show_log_origin),
            module: self.module,
        })?;
        log::info!("Running Firecracker v{FIRECRACKER_VERSION}");
        let first = self.config_file.is_some().then_some(Request::Start);
        let config = self.config_file.as_deref().map(VmConfig::from_file).transpose();
        let mut config = config
            .inspect_err(|e| {
                log::error!("Configuration for VMM from one single json failed: {e}");
            })?
            .unwrap_or_default();
        config.defaults.on_reboot = OnReboot::Exit;
        config.defaults.has_boot_timer = self.boot_timer;
        self.metrics.apply(&mut config)?;
        let metadata = self.mmds.apply(&mut config, self.http_api_max_payload_size);
        let api = (!self.no_api).then_some(launch::Api {
            path: self.api_sock,
            body_limit: self.http_api_max_payload_size,
        });
        let timing = self.timing;
        let seccomp = if self.no_seccomp { Seccomp::Off } else { Seccomp::Kill };
        let launch = Launch {
            config,
            first,
            api,
            id: self.id,
            style: Style::Firecracker,
            timing,
            metadata,
            sandbox: Sandbox::Wanted(Wanted { seccomp, ..Wanted::default() }),
        };
        let code = launch.carry_out(started)?;
        log::info!("Vmm is stopping.");
        Ok(code)
    }
}
