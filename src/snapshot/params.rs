//! What is asked of snapshots: the bodies of `PUT /snapshot/create` and `PUT /snapshot/load`.
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::SnapshotError;

/// How much of the memory a snapshot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What has changed since the snapshot before.
    Diff,
}

/// Where a snapshot goes, and how: `PUT /snapshot/create`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "SnapshotCreateParams")]
pub struct SnapshotParams {
    /// The file for the state. Firecracker's form, with `mem_file_path`.
    #[serde(default)]
    pub snapshot_path: Option<PathBuf>,
    /// The file for the memory.
    #[serde(default)]
    pub mem_file_path: Option<PathBuf>,
    /// The directory for both, made if it is missing. husk only.
    #[serde(default)]
    pub directory: Option<PathBuf>,
    /// How much of the memory it holds.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
}

impl SnapshotParams {
    /// All of the VM, in a directory.
    pub fn to_directory(directory: impl Into<PathBuf>) -> Self {
        Self { directory: Some(directory.into()), ..Self::default() }
    }

    /// The form that was chosen.
    pub(super) fn place(&self) -> Result<Place, SnapshotError> {
        let wrong = |field, why: &str| Err(SnapshotError::Field { field, why: why.into() });
        match (&self.directory, &self.snapshot_path, &self.mem_file_path) {
            (Some(directory), None, None) => Ok(Place::Directory(directory.clone())),
            (None, Some(state), Some(memory)) if state == memory => {
                wrong("mem_file_path", "it is snapshot_path: they must be two files")
            }
            (None, Some(state), Some(memory)) => {
                Ok(Place::Files { state: state.clone(), memory: memory.clone() })
            }
            (Some(_), _, _) => wrong("directory", "give it, or snapshot_path and mem_file_path"),
            (None, None, _) => wrong("snapshot_path", "give it and mem_file_path, or directory"),
            (None, Some(_), None) => wrong("mem_file_path", "it is missing"),
        }
    }
}

/// Where the files of a snapshot are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Directory(PathBuf),
    Files { state: PathBuf, memory: PathBuf },
}

/// What serves the memory of a VM that is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MemoryBackendType {
    /// The memory file.
    File,
    /// A process behind a Unix socket, by userfaultfd(2).
    Uffd,
}

/// Where the memory of a VM that is restored comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// What serves it.
    pub backend_type: MemoryBackendType,
    /// The file, or the socket.
    pub backend_path: PathBuf,
}

/// Which snapshot to restore, and how: `PUT /snapshot/load`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "SnapshotLoadParams")]
pub struct LoadParams {
    /// The state file. Firecracker's form.
    #[serde(default)]
    pub snapshot_path: Option<PathBuf>,
    /// The memory file. Deprecated: `mem_backend` is its successor.
    #[serde(default)]
    pub mem_file_path: Option<PathBuf>,
    /// Where the memory comes from.
    #[serde(default)]
    pub mem_backend: Option<MemoryBackend>,
    /// The directory with both. husk only.
    #[serde(default)]
    pub directory: Option<PathBuf>,
    /// Whether the guest goes on at once.
    #[serde(default)]
    pub resume_vm: bool,
}

impl LoadParams {
    /// The snapshot in a directory; its guest goes on at once.
    pub fn from_directory(directory: impl Into<PathBuf>) -> Self {
        Self { directory: Some(directory.into()), resume_vm: true, ..Self::default() }
    }

    /// The form that was chosen.
    pub(super) fn place(&self) -> Result<Place, SnapshotError> {
        let wrong = |field, why: &str| Err(SnapshotError::Field { field, why: why.into() });
        let memory = match (&self.mem_file_path, &self.mem_backend) {
            (Some(_), Some(_)) => {
                return wrong("mem_backend", "give it or mem_file_path, not both");
            }
            (Some(path), None) => Some(path),
            (None, Some(backend)) => match backend.backend_type {
                MemoryBackendType::File => Some(&backend.backend_path),
                MemoryBackendType::Uffd => return wrong("mem_backend", "Uffd cannot be had yet"),
            },
            (None, None) => None,
        };
        match (&self.directory, &self.snapshot_path, memory) {
            (Some(directory), None, None) => Ok(Place::Directory(directory.clone())),
            (None, Some(state), Some(memory)) => {
                Ok(Place::Files { state: state.clone(), memory: memory.clone() })
            }
            (Some(_), _, _) => wrong("directory", "give it, or snapshot_path and mem_backend"),
            (None, None, _) => wrong("snapshot_path", "give it and mem_backend, or directory"),
            (None, Some(_), None) => wrong("mem_backend", "it is missing"),
        }
    }
}
