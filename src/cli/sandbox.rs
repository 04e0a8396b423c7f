//! What the command line says of the sandbox, and `husk sandbox`.
use std::path::{Path, PathBuf};

use clap::Args;

use super::flags::path;
use crate::exit::ExitCode;
use crate::sandbox::{self, Allowed, Seccomp, Wanted};

/// How husk confines itself.
#[derive(Args, Debug, Default)]
pub(super) struct SandboxArgs {
    /// What becomes of a system call that no list allows: kill, errno, log or off (docs/sandbox.md)
    #[arg(long, value_name = "ACTION", value_enum, default_value_t)]
    seccomp: Seccomp,
    /// Once the guest runs, use files at or below this path only, besides those that are open by then; may be given more
    /// than once. 'none': open nothing by path, but take what API clients have opened. Without it, and with an API
    /// socket, files may be used anywhere
    #[arg(long, value_name = "PATH", value_parser = path())]
    allow: Vec<PathBuf>,
    /// Do not start with less than the whole sandbox; files that are not open by then only with --allow
    #[arg(long)]
    require_sandbox: bool,
    /// Do without a sandbox
    #[arg(long, conflicts_with_all = ["seccomp", "allow", "require_sandbox"])]
    no_sandbox: bool,
}

impl SandboxArgs {
    pub(super) fn wanted(self) -> Wanted {
        Wanted {
            seccomp: self.seccomp,
            is_required: self.require_sandbox,
            is_off: self.no_sandbox,
            allowed: match &self.allow[..] {
                [] => Allowed::Unsaid,
                [none] if none == Path::new(NONE) => Allowed::Nothing,
                _ => Allowed::Below(self.allow),
            },
        }
    }
}

/// In place of a path: none is allowed.
const NONE: &str = "none";

/// What confines husk.
#[derive(Args, Debug)]
pub(super) struct ProbeArgs {
    /// Print what this host has of each layer
    #[arg(long, required = true)]
    probe: bool,
}

impl ProbeArgs {
    pub(super) fn carry_out(self) -> ExitCode {
        debug_assert!(self.probe, "it is required");
        super::print(sandbox::probe().as_bytes())
    }
}
