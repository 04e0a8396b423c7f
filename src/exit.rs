//! How a VM ends, and the exit code of the process: one meaning each, the same every time.
//!
//! docs/exit-codes.md shows this list to people.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::todo)]
use serde::Serialize;

/// Exit codes of the `husk` binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest powered off, or was stopped on request.
    Clean = 0,
    /// The command line is wrong.
    Usage = 2,
    /// The configuration, kernel, initrd or a disk is wrong, or a socket path is taken.
    Config = 3,
    /// The host lacks something: KVM, memory, a tap, descriptors.
    Host = 4,
    /// The guest crashed: a triple fault.
    GuestCrash = 5,
    /// KVM could not go on: internal error, failed entry.
    Kvm = 6,
    /// A snapshot is damaged, or is not one for this host.
    Snapshot = 7,
    /// I/O on the control side failed while the VM ran.
    Runtime = 8,
    /// A bug in husk.
    Internal = 70,
    /// Stopped by SIGINT.
    Interrupted = 130,
    /// Stopped by SIGTERM, SIGHUP, SIGQUIT or SIGXCPU.
    Terminated = 143,
}

/// Why a VM ended. Decided once, by the first cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Ending {
    /// The guest powered off.
    PoweredOff,
    /// The guest reset itself, and a reset was to end the VM.
    Reset,
    /// The guest crashed the machine: a triple fault.
    TripleFault {
        /// The vCPU that did.
        vcpu: u8,
        /// Its instruction pointer.
        rip: u64,
    },
    /// KVM gave up.
    KvmError {
        /// The vCPU that was running.
        vcpu: u8,
        /// Its instruction pointer.
        rip: u64,
        /// What KVM said.
        detail: String,
    },
    /// Killed through the API, the library or the console's escape key.
    Killed,
    /// A signal asked husk to stop.
    Signalled {
        /// The signal's number.
        signal: i32,
    },
    /// The host failed the VM while it ran, or when it rebooted.
    HostError {
        /// What failed.
        detail: String,
    },
}

impl Ending {
    /// The exit code of a process whose VM ended so.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::PoweredOff | Self::Reset | Self::Killed => ExitCode::Clean,
            Self::TripleFault { .. } => ExitCode::GuestCrash,
            Self::KvmError { .. } => ExitCode::Kvm,
            Self::Signalled { signal: 2 } => ExitCode::Interrupted,
            Self::Signalled { .. } => ExitCode::Terminated,
            Self::HostError { .. } => ExitCode::Runtime,
        }
    }
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PoweredOff => write!(f, "the guest powered off"),
            Self::Reset => write!(f, "the guest reset itself"),
            Self::TripleFault { vcpu, rip } => {
                write!(f, "the guest crashed: triple fault on vCPU {vcpu} at rip {rip:#x}")
            }
            Self::KvmError { vcpu, rip, detail } => {
                write!(f, "KVM cannot run the guest on: vCPU {vcpu} at rip {rip:#x}: {detail}")
            }
            Self::Killed => write!(f, "killed on request"),
            Self::Signalled { signal: 1 } => write!(f, "stopped by SIGHUP"),
            Self::Signalled { signal: 2 } => write!(f, "stopped by SIGINT"),
            Self::Signalled { signal: 3 } => write!(f, "stopped by SIGQUIT"),
            Self::Signalled { signal: 24 } => write!(f, "stopped by SIGXCPU"),
            Self::Signalled { signal: 15 } => write!(f, "stopped by SIGTERM"),
            Self::Signalled { signal } => write!(f, "stopped by signal {signal}"),
            Self::HostError { detail } => write!(f, "the host failed the VM: {detail}"),
        }
    }
}

impl std::process::Termination for ExitCode {
    fn report(self) -> std::process::ExitCode {
        std::process::ExitCode::from(self as u8)
    }
}
