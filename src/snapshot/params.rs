//! What is asked of snapshots: the bodies of `PUT /snapshot/create` and `PUT /snapshot/load`.
use std::path::{Path, PathBuf};

use devices::backend::passed::{Name, is_descriptor};
use devices::virtio::model::Model;
use devices::virtio::{net, vsock};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Compression, Overrides, SnapshotError};
use crate::config::HugePages;
use crate::error::Refusal;

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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
    /// How the memory is compressed. husk only.
    #[serde(default)]
    pub compression: Compression,
    /// Whether it is to be on the disk before the answer comes, so that it outlives a crash of the host.
    #[serde(default = "yes", alias = "sync_snapshot_files")]
    pub sync: bool,
}

fn yes() -> bool {
    true
}

impl Default for SnapshotParams {
    fn default() -> Self {
        let (snapshot_path, mem_file_path, directory) = (None, None, None);
        let snapshot_type = SnapshotType::default();
        let compression = Compression::default();
        Self { snapshot_path, mem_file_path, directory, snapshot_type, compression, sync: true }
    }
}

impl SnapshotParams {
    /// All of the VM, in a directory.
    pub fn to_directory(directory: impl Into<PathBuf>) -> Self {
        Self { directory: Some(directory.into()), ..Self::default() }
    }

    /// Refuses a body that does not say where the files are, in Firecracker's words.
    pub(crate) fn check_form(&self) -> Result<(), Refusal> {
        let missing = match (&self.directory, &self.snapshot_path, &self.mem_file_path) {
            (None, None, _) => "snapshot_path",
            (None, Some(_), None) => "mem_file_path",
            _ => return Ok(()),
        };
        let why = format!(
            "missing field `{missing}`: give snapshot_path and mem_file_path, or directory"
        );
        Err(Refusal::Body(serde::de::Error::custom(why)))
    }

    fn is_compressed_diff(&self) -> bool {
        self.snapshot_type == SnapshotType::Diff && !self.compression.is_none()
    }

    /// The form that was chosen.
    pub(super) fn place(&self) -> Result<Place, SnapshotError> {
        let wrong = |field, why: &str| Err(SnapshotError::Field { field, why: why.into() });
        match (&self.directory, &self.snapshot_path, &self.mem_file_path) {
            (Some(directory), None, None) => Ok(Place::Directory(directory.clone())),
            (None, Some(state), Some(memory)) if state == memory => {
                wrong("mem_file_path", "it is snapshot_path: they must be two files")
            }
            (None, Some(_), Some(_)) if self.is_compressed_diff() => wrong(
                "compression",
                "a Diff in two files is for others to merge, who cannot read what is compressed: \
                 name a directory",
            ),
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

impl Place {
    /// Whether it is a place in which other files could be found: not one of descriptors that were passed.
    pub(super) fn has_neighbours(&self) -> bool {
        match self {
            Self::Directory(_) => true,
            Self::Files { state, memory } => !is_descriptor(state) && !is_descriptor(memory),
        }
    }
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
    /// The file, or the socket; `passed:N` is a file's descriptor that came with the request.
    pub backend_path: Name,
}

/// Which snapshot to restore, and how: `PUT /snapshot/load`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "SnapshotLoadParams")]
pub struct LoadParams {
    /// The state file; `passed:N` is a descriptor that came with the request. Firecracker's form.
    #[serde(default)]
    pub snapshot_path: Option<Name>,
    /// The memory file. Deprecated: `mem_backend` is its successor.
    #[serde(default)]
    pub mem_file_path: Option<Name>,
    /// Where the memory comes from.
    #[serde(default)]
    pub mem_backend: Option<MemoryBackend>,
    /// The directory with both. husk only.
    #[serde(default)]
    pub directory: Option<PathBuf>,
    /// Whether the guest goes on at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Whether all of the memory is read first, and compared with the sums in the state file. husk only.
    #[serde(default)]
    pub verify: bool,
    /// Whether KVM remembers the pages that the guest writes.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Deprecated: `track_dirty_pages` is its successor.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Whether the guest's clock shows the time that has passed since the snapshot; else it goes on
    /// where it was.
    #[serde(default)]
    pub clock_realtime: bool,
    /// After how many milliseconds the pages that the guest has touched are noted beside the snapshot: later
    /// restores have them there before the guest asks. husk only.
    #[serde(default)]
    pub record_ms: Option<u64>,
    /// Whether the guest takes every page itself, though it was noted which it needs first. husk only.
    #[serde(default)]
    pub ignore_working_set: bool,
    /// Which pages back guest RAM.
    #[serde(default)]
    pub huge_pages: LoadPages,
    /// What is to be different. husk only.
    #[serde(default)]
    pub overrides: Overrides,
    /// Taps for interfaces: Firecracker's form of what `overrides` say.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// The socket of the vsock device: Firecracker's form of what `overrides` say.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
}

/// Which pages back the RAM of a VM that is restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LoadPages {
    /// Those that the snapshot says.
    #[default]
    Snapshot,
    /// As the host is set up.
    None,
    /// Transparent huge pages are asked for.
    Transparent,
    /// Pages of 2 MiB from the host's pool (hugetlbfs).
    #[serde(rename = "2M")]
    Hugetlb2M,
}

impl From<HugePages> for LoadPages {
    fn from(pages: HugePages) -> Self {
        match pages {
            HugePages::None => Self::None,
            HugePages::Transparent => Self::Transparent,
            HugePages::Hugetlb2M => Self::Hugetlb2M,
        }
    }
}

impl From<LoadPages> for Option<HugePages> {
    fn from(pages: LoadPages) -> Self {
        match pages {
            LoadPages::Snapshot => None,
            LoadPages::None => Some(HugePages::None),
            LoadPages::Transparent => Some(HugePages::Transparent),
            LoadPages::Hugetlb2M => Some(HugePages::Hugetlb2M),
        }
    }
}

/// Another tap for an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: String,
    /// The tap on the host.
    pub host_dev_name: String,
}

/// Another socket for the vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The Unix socket by which the host reaches the guest.
    pub uds_path: PathBuf,
}

impl LoadParams {
    /// Fields for which a descriptor that was passed will do.
    pub(crate) const OPENABLE: &[&str] = &["snapshot_path", "mem_file_path", "backend_path"];

    /// The snapshot in a directory; its guest goes on at once.
    pub fn from_directory(directory: impl Into<PathBuf>) -> Self {
        Self { directory: Some(directory.into()), resume_vm: true, ..Self::default() }
    }

    /// Refuses a body that does not say where the memory is, or says it twice, in Firecracker's words.
    pub(crate) fn check_form(&self) -> Result<(), Refusal> {
        let refused = match (&self.directory, &self.mem_file_path, &self.mem_backend) {
            (_, Some(_), Some(_)) => {
                "too many fields: either `mem_backend` or `mem_file_path` exclusively is required"
            }
            (None, None, None) => {
                "missing field: either `mem_backend` or `mem_file_path` is required"
            }
            _ if self.directory.is_none() && self.snapshot_path.is_none() => {
                "missing field `snapshot_path`"
            }
            _ => return Ok(()),
        };
        Err(Refusal::Body(serde::de::Error::custom(refused)))
    }

    /// The socket of the process that serves the memory, if one does.
    pub(crate) fn handler(&self) -> Option<&Path> {
        let backend = self.mem_backend.as_ref();
        let backend = backend.filter(|b| b.backend_type == MemoryBackendType::Uffd);
        backend.map(|backend| backend.backend_path.as_path())
    }

    /// The state file of a snapshot whose memory another process serves.
    pub(super) fn state_alone(&self) -> Result<PathBuf, SnapshotError> {
        let wrong = |field, why: &str| Err(SnapshotError::Field { field, why: why.into() });
        match (&self.directory, &self.snapshot_path) {
            _ if self.handler().is_some_and(is_descriptor) => {
                wrong("backend_path", "Uffd serves memory by a socket that is named by its path")
            }
            _ if self.verify => wrong("verify", "Uffd serves memory that husk does not see"),
            (Some(directory), None) => Ok(Place::Directory(directory.clone()).state()),
            (None, Some(state)) => Ok(state.to_path_buf()),
            (Some(_), Some(_)) => wrong("directory", "give it or snapshot_path, not both"),
            (None, None) => wrong("snapshot_path", "give it, or directory"),
        }
    }

    /// All that is to be different, in one form.
    pub(crate) fn overrides(&self) -> Overrides {
        let mut all = self.overrides.clone();
        for tap in &self.network_overrides {
            all.add(net::Net::NAME, json!(tap));
        }
        if let Some(vsock) = &self.vsock_override {
            // Over what is said of the same device in the other form.
            let device = all.devices.entry(vsock::Vsock::NAME).or_insert_with(|| json!({}));
            if let Some(fields) = device.as_object_mut() {
                fields.insert("uds_path".into(), json!(vsock.uds_path));
            }
        }
        all
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
                MemoryBackendType::Uffd => None,
            },
            (None, None) => None,
        };
        match (&self.directory, &self.snapshot_path, memory) {
            (Some(directory), None, None) => Ok(Place::Directory(directory.clone())),
            (None, Some(state), Some(memory)) => {
                Ok(Place::Files { state: state.to_path_buf(), memory: memory.to_path_buf() })
            }
            (Some(_), _, _) => wrong("directory", "give it, or snapshot_path and mem_backend"),
            (None, None, _) => wrong("snapshot_path", "give it and mem_backend, or directory"),
            (None, Some(_), None) => wrong("mem_backend", "it is missing"),
        }
    }
}
