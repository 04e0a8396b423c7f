//! Why a request was refused or a VM could not be made.
use std::error::Error;
use std::path::PathBuf;

use devices::backend::file::is_shortage;
use devices::virtio::model::DeviceError;

use crate::exit::ExitCode;
use crate::fork::ForkError;
use crate::snapshot::SnapshotError;

/// The API answers each with status 400 and its text; the command line prints its chain.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// No such section, or one that does not know the method.
    #[error("Invalid request method and/or path: {method} {path}.")]
    Route {
        /// "PUT" and so on.
        method: &'static str,
        /// The path without its leading slash.
        path: String,
    },
    /// The body is not the JSON that the section wants.
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Body(serde_json::Error),
    /// The id in the path is not the one in the body.
    #[error("The id from the path does not match the id from the body!")]
    IdMismatch,
    /// A field has a value that cannot be.
    #[error("{section}: {field}: {why}")]
    Field {
        /// The section of the configuration.
        section: &'static str,
        /// The field, as in the API.
        field: &'static str,
        /// What is wrong with its value, value included.
        why: String,
    },
    /// A device refused its configuration or could not be made.
    #[error("{}: {source}", device(section, id))]
    Device {
        /// The device's model.
        section: &'static str,
        /// Its id; the model's name where there can be only one.
        id: String,
        /// What it said.
        source: DeviceError,
    },
    /// A device cannot be had as the snapshot has it.
    #[error("{}; this is what the snapshot says: name another in an override of it", chain(.0))]
    AsSaved(Box<Refusal>),
    /// Two disks want to be the root disk.
    #[error("A root block device already exists!")]
    SecondRoot,
    /// Two of one list have the same id, so that one would be lost.
    #[error("{section}: two have the id '{id}'")]
    SameId {
        /// The section of the configuration.
        section: &'static str,
        /// Their id.
        id: String,
    },
    /// No such device.
    #[error("{}", absence(section, id))]
    NoSuchDevice {
        /// The device's model.
        section: &'static str,
        /// The id asked for; the model's name where there can be only one.
        id: String,
    },
    /// The kernel or the initrd is no good.
    #[error("{0}")]
    Boot(#[from] arch::BootError),
    /// A kernel or initrd cannot be opened, or is not a file.
    #[error("{what}: {source}")]
    Open {
        /// "kernel" or "initrd".
        what: &'static str,
        /// Which, and why.
        source: devices::backend::file::OpenError,
    },
    /// The serial port cannot lead where it should.
    #[error("serial: {}", chain(.0))]
    Console(devices::backend::console::ConsoleError),
    /// The API's socket cannot be had.
    #[error("{0}")]
    Socket(String),
    /// A configuration file is no good.
    #[error("{}: {}", path.display(), in_file(why))]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the place.
        why: Box<Refusal>,
    },
    /// The metrics cannot be written where they should.
    #[error("Cannot initialize the metrics system due to bad user input: {0}")]
    Metrics(String),
    /// The metrics are written to a file already.
    #[error(
        "Cannot initialize the metrics system due to bad user input: Reinitialization of metrics \
         not allowed."
    )]
    MetricsAgain,
    /// Nobody took the metrics that were asked for.
    #[error("Failed to write metrics: {0}")]
    MetricsLost(String),
    /// A request to change something that names nothing.
    #[error("Empty PATCH request.")]
    EmptyPatch,
    /// Asked before start of what makes sense only after it.
    #[error("The requested operation is not supported before starting the microVM.")]
    NotStarted,
    /// Asked after start of what makes sense only before it.
    #[error("The requested operation is not supported after starting the microVM.")]
    AlreadyStarted,
    /// The VM has ended.
    #[error("The microVM has ended: {0}.")]
    Ended(crate::exit::Ending),
    /// The metadata service cannot be as it is configured.
    #[error(transparent)]
    MetadataService(#[from] devices::mmds::ConfigError),
    /// The guest's metadata cannot be that.
    #[error(transparent)]
    Metadata(#[from] devices::mmds::StoreError),
    /// The host does not give what the VM needs.
    #[error("{what}: {source}")]
    Host {
        /// The resource.
        what: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// KVM refused a call.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// The call.
        what: &'static str,
        /// What it said.
        source: std::io::Error,
    },
    /// More devices than interrupt lines.
    #[error("a microVM has room for {0} virtio devices")]
    TooManyDevices(usize),
    /// The guest reset itself, and what it was booted from is not here.
    #[error("the VM was restored, and what it was booted from is not here")]
    NoKernel,
    /// A snapshot cannot be made, or is not restored.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The VM is not forked.
    #[error("fork: {0}")]
    Fork(#[from] ForkError),
    /// The sandbox keeps husk from it.
    #[error(
        "{}; once the guest runs, husk uses files by path only where --allow says, besides those it has open",
        chain(.0)
    )]
    OutOfReach(Box<Refusal>),
    /// Nothing is opened by path any more.
    #[error(
        "{section}: {field}: once the guest runs, nothing is opened by path (--allow none): pass a descriptor with the \
         request, by SCM_RIGHTS over the API's socket, and name it passed:0"
    )]
    ByPath {
        /// The section of the configuration.
        section: &'static str,
        /// The field, as in the API.
        field: &'static str,
    },
    /// The same, of what cannot come open.
    #[error("{0}, and once the guest runs, nothing is opened by path (--allow none)")]
    NeedsPaths(&'static str),
    /// The sandbox that was asked for cannot be had.
    #[error("--require-sandbox: {0}")]
    Sandbox(String),
    /// A place where files are to be used is not there.
    #[error("--allow: cannot find {path}")]
    Allow {
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The VMM is gone: the process is on its way out.
    #[error("the microVM is being torn down")]
    Gone,
}

impl Refusal {
    /// Makes a [`Refusal::Host`] of an I/O error.
    pub(crate) fn host<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |e| Self::Host { what, source: e.into() }
    }

    /// Makes a [`Refusal::Kvm`] of an ioctl's error.
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |e| Self::Kvm { what, source: e.into() }
    }

    /// The exit code of a process that could not start its VM for this reason.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Host { .. } | Self::Kvm { .. } | Self::Sandbox(_) => ExitCode::Host,
            Self::Device { source: DeviceError::Host { .. } | DeviceError::Io(_), .. } => {
                ExitCode::Host
            }
            Self::Device { source: DeviceError::Saved(_), .. } => ExitCode::Snapshot,
            Self::Boot(e) if !e.is_config() => ExitCode::Host,
            Self::Open { source, .. } if is_shortage(source) => ExitCode::Host,
            Self::Console(e) if is_shortage(e) => ExitCode::Host,
            Self::ConfigFile { why, .. } | Self::AsSaved(why) | Self::OutOfReach(why) => {
                why.exit_code()
            }
            Self::Snapshot(e) => e.exit_code(),
            Self::Fork(e) => e.exit_code(),
            Self::Gone => ExitCode::Internal,
            _ => ExitCode::Config,
        }
    }
}

/// How to call a device.
fn device(section: &str, id: &str) -> String {
    if section == id { section.to_owned() } else { format!("{section} {id}") }
}

/// What is not there.
fn absence(section: &str, id: &str) -> String {
    // A drive may be called "drives".
    match devices::virtio::model(section).is_some_and(|row| !row.is_many) {
        true => format!("{section}: this microVM has none; it is configured before the start"),
        false => format!("{section}: there is none with id '{id}'"),
    }
}

/// There is no request whose body could be wrong.
fn in_file(why: &Refusal) -> String {
    match why {
        Refusal::Body(e) => e.to_string(),
        why => why.to_string(),
    }
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let text = inner.to_string();
        // Some errors quote their cause.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = inner.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_called_as_the_user_does() {
        let absence =
            |section, id: &str| Refusal::NoSuchDevice { section, id: id.into() }.to_string();
        assert_eq!(absence("drives", "drives"), "drives: there is none with id 'drives'");
        assert!(absence("balloon", "balloon").starts_with("balloon: this microVM has none;"));
        let group = absence(crate::config::RATE_LIMIT_GROUPS, "slow");
        assert_eq!(group, "rate-limit-groups: there is none with id 'slow'");
    }
}
