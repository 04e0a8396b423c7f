//! What is asked of a VM that knows a snapshot of it: to go back, or to tell what it has touched since. The bodies of
//! `PUT /snapshot/rewind` and `PUT /snapshot/working-set`.
use std::path::PathBuf;

use devices::backend::passed::Name;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{LoadParams, SnapshotParams};

/// Which snapshot a VM goes back to, and how: `PUT /snapshot/rewind`. Without a name it is the one
/// that it was restored from, or saved to later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "SnapshotRewindParams")]
pub struct RewindParams {
    /// The directory with both files.
    #[serde(default)]
    pub directory: Option<PathBuf>,
    /// The state file, with `mem_file_path`.
    #[serde(default)]
    pub snapshot_path: Option<PathBuf>,
    /// The memory file.
    #[serde(default)]
    pub mem_file_path: Option<PathBuf>,
    /// Whether the guest runs afterwards, if not as before.
    #[serde(default)]
    pub resume_vm: Option<bool>,
    /// Whether the guest's clock shows the time that has passed since the snapshot; else it goes on
    /// where it was.
    #[serde(default)]
    pub clock_realtime: bool,
}

/// That the pages which a restored VM has touched are to be noted: `PUT /snapshot/working-set`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "SnapshotWorkingSetParams")]
pub struct RecordParams {}

impl RewindParams {
    /// What is to be opened, if it is named.
    pub(crate) fn load_params(&self) -> Option<LoadParams> {
        let Self { directory, snapshot_path, mem_file_path, .. } = self.clone();
        let is_named = directory.is_some() || snapshot_path.is_some() || mem_file_path.is_some();
        is_named.then(|| LoadParams {
            directory,
            snapshot_path: snapshot_path.map(Name::from),
            mem_file_path: mem_file_path.map(Name::from),
            ..LoadParams::default()
        })
    }
}

impl SnapshotParams {
    /// What is to be opened to go back to it.
    pub(crate) fn load_params(&self) -> LoadParams {
        LoadParams {
            directory: self.directory.clone(),
            snapshot_path: self.snapshot_path.clone().map(Name::from),
            mem_file_path: self.mem_file_path.clone().map(Name::from),
            ..LoadParams::default()
        }
    }
}
