//! Snapshots: a VM in files, and in the memory of whoever restores it.
//!
//! ```text
//!   Machine ──save──► MachineState ─┐                      ┌─► configuration, state ─┐
//!                                   ├─► state file ──open──┤                         ├─► assemble
//!   RAM ──────dump──► memory file ──┘                      └─► RAM, mapped privately ┘
//! ```
//!
//! docs/snapshot.md says what is promised; [`format`] is the state file, byte by byte.
mod chain;
mod compression;
mod document;
mod extent;
mod files;
mod format;
mod image;
mod inspect;
mod layers;
mod merge;
mod opening;
mod overrides;
mod packed;
mod params;
mod restore;
mod rewind;
mod save;
mod temporary;
mod verify;
mod working_set;

use std::env::consts::ARCH;
use std::path::PathBuf;

use devices::backend::file::is_shortage;
use devices::backend::overlay::LayerError;

pub(crate) use self::chain::Parent;
pub use self::compression::Compression;
#[cfg(fuzzing)]
pub(crate) use self::compression::Decompressor;
pub(crate) use self::document::{
    DeviceState, Document, LegacyState, MachineState, MemoryDocument, hex,
};
pub(crate) use self::extent::{EXTENT_LEN, Extent, Kind};
pub(crate) use self::format::VERSION;
pub use self::image::Image;
pub(crate) use self::image::{MemoryImage, Segment};
pub(crate) use self::inspect::{Inspection, Named, Over, Overlay, format_of};
pub use self::overrides::Overrides;
pub(crate) use self::overrides::forget_passed;
pub(crate) use self::packed::Packer;
pub use self::params::{
    LoadPages, LoadParams, MemoryBackend, MemoryBackendType, NetworkOverride, SnapshotParams,
    SnapshotType, VsockOverride,
};
pub use self::restore::Restore;
pub use self::rewind::{RecordParams, RewindParams};
pub(crate) use self::save::{Draft, Saving, Writer, Writing, Written};
pub(crate) use self::working_set::{Noted, TouchedRun, WorkingSet};

use crate::exit::ExitCode;

/// Why a snapshot could not be made, or is not restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// What the request says cannot be.
    #[error("{field}: {why}")]
    Field {
        /// The field, as in the API.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A file of a snapshot cannot be opened, or is not a file.
    #[error("{what}: {source}")]
    Open {
        /// "state file" or "memory file".
        what: &'static str,
        /// Which, and why.
        source: devices::backend::file::OpenError,
    },
    /// Something could not be done with a file.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// "cannot write the memory file".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// It is no state file at all.
    #[error("the state file is damaged: magic: it does not begin like a state file")]
    Foreign,
    /// A check of the state file has failed.
    #[error("the state file is damaged: {0}")]
    Damaged(&'static str),
    /// The document in the state file is not one.
    #[error("the state file is damaged: document: {0}")]
    Document(serde_json::Error),
    /// It is of a version that this husk does not read.
    #[error("the state file has format {is}, this husk reads {oldest} to {newest}")]
    Version {
        /// The file's.
        is: u32,
        /// The newest that can be read.
        newest: u32,
        /// The oldest that can be read.
        oldest: u32,
    },
    /// It is Firecracker's.
    #[error("the state file is a snapshot of Firecracker's, which only Firecracker can load")]
    Firecracker,
    /// It is of another kind of processor.
    #[error("the snapshot is of a VM on {0}, this is {ARCH}")]
    Arch(String),
    /// The memory file does not belong to the state file.
    #[error("memory file {}: {why}", path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// The check that failed.
        why: String,
    },
    /// What it goes over is not there.
    #[error("it is of what has changed since snapshot {id}, which is not to be had at {}: {why}", path.display())]
    Parent {
        /// The parent's id.
        id: String,
        /// Where its state file should be.
        path: PathBuf,
        /// What is wrong there.
        why: Box<SnapshotError>,
    },
    /// A device whose state nobody here has.
    #[error("{model} {id}: it is served by another process, whose state cannot be saved")]
    Elsewhere {
        /// The device's model.
        model: &'static str,
        /// The device.
        id: String,
    },
    /// What a drive has written is not there, or damaged, or of another disk.
    #[error("what a drive had written: {0}")]
    Layer(#[from] LayerError),
    /// The state does not fit the machine it describes.
    #[error("the snapshot does not fit together: {0}")]
    Inconsistent(String),
    /// Nobody serves the memory of a VM that is restored.
    #[error("mem_backend: {0}")]
    Served(#[source] crate::memory::ServeError),
    /// KVM did not give or take the state.
    #[error(transparent)]
    State(#[from] arch::StateError),
    /// Memory could not be copied.
    #[error("cannot copy guest memory: {0}")]
    Copy(std::io::Error),
    /// It is of another VM, or of this one as it is no more.
    #[error("the snapshot is not of this microVM as it is now: {0}")]
    NotOfThisVm(String),
    /// There is none to go back to.
    #[error("the microVM was neither restored nor saved: name the snapshot to go back to")]
    NoOrigin,
    /// It has no memory of which could be told what was touched, or no file beside which it could be noted.
    #[error(
        "the microVM was not restored from a memory file that it maps: there is nothing that its pages could be noted \
         beside"
    )]
    NoWorkingSet,
    /// One is being written.
    #[error("a snapshot is being written: wait until it is there")]
    Busy,
    /// The VM ended before the snapshot was there.
    #[error("the microVM ended before the snapshot was written")]
    Ended,
    /// The VM ended while the files of the snapshot were being put in their places.
    #[error(
        "the microVM ended before the disk had taken the snapshot: `husk snapshot verify` tells whether it is there"
    )]
    Unsettled,
}

impl SnapshotError {
    /// The exit code of a process that was to restore a VM.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Field { .. } | Self::Busy | Self::Ended | Self::NoOrigin | Self::NoWorkingSet => {
                ExitCode::Config
            }
            Self::Open { source, .. } if is_shortage(source) => ExitCode::Host,
            Self::Open { .. } => ExitCode::Config,
            Self::File { .. } | Self::Copy(_) | Self::Served(_) | Self::Unsettled => ExitCode::Host,
            _ => ExitCode::Snapshot,
        }
    }

    /// Whether it is about a file that is a state file, if not one that can be loaded.
    fn is_of_state_file(&self) -> bool {
        matches!(self, Self::Damaged(_) | Self::Document(_) | Self::Version { .. } | Self::Arch(_))
    }

    /// A [`SnapshotError::File`].
    pub(crate) fn file(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { what, path, source }
    }
}
