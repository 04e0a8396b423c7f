//! What is in a snapshot, for people to read: without restoring it, and whether or not this host could.
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::document::{Document, MemoryDocument};
use super::layers::LayerDocument;
use super::opening::read_state_file;
use super::params::Place;
use super::{Compression, DeviceState, Extent, Image, SnapshotError};
use devices::backend::file::parent;

/// A snapshot that is named on a command line: by its directory, or its state file.
#[derive(Debug)]
pub(crate) struct Named {
    /// If it was named by that.
    directory: Option<PathBuf>,
    state: PathBuf,
    memory: Option<PathBuf>,
}

/// What a state file says.
#[derive(Debug, Serialize)]
pub(crate) struct Inspection {
    /// The state file's format.
    pub(crate) format: u32,
    /// The version of husk that wrote it.
    pub(crate) husk: String,
    pub(crate) arch: String,
    pub(crate) id: String,
    /// What it goes over, if it is of what has changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<Over>,
    pub(crate) vcpus: usize,
    pub(crate) state_bytes: u64,
    pub(crate) memory: Memory,
    pub(crate) devices: Vec<Device>,
    pub(crate) config: Value,
}

/// What it says of the memory file.
#[derive(Debug, Serialize)]
pub(crate) struct Memory {
    /// Where it should be, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<PathBuf>,
    pub(crate) bytes: u64,
    /// Bytes of it that are not zero.
    pub(crate) kept_bytes: u64,
    /// Bytes that these take in the file.
    pub(crate) stored_bytes: u64,
    pub(crate) extents: usize,
    /// How it is compressed.
    pub(crate) compression: Compression,
}

/// The snapshot that another goes over.
#[derive(Debug, Serialize)]
pub(crate) struct Over {
    pub(crate) id: String,
    /// Its state file.
    pub(crate) state: PathBuf,
}

/// A device.
#[derive(Debug, Serialize)]
pub(crate) struct Device {
    pub(crate) model: String,
    pub(crate) id: String,
    pub(crate) place: usize,
    /// What it has written over a file that others share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) overlay: Option<Overlay>,
}

/// A file with what a drive has written.
#[derive(Debug, Serialize)]
pub(crate) struct Overlay {
    pub(crate) file: PathBuf,
    /// Bytes of the disk.
    pub(crate) disk_bytes: u64,
    /// Bytes that the file takes; none if it is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stored_bytes: Option<u64>,
}

impl Named {
    /// `path` is a directory or a state file; `memory` the memory file, where the state file does not say.
    pub(crate) fn new(path: PathBuf, memory: Option<PathBuf>) -> Self {
        match path.is_dir() {
            true => Self { state: path.join(super::files::STATE), directory: Some(path), memory },
            false => Self { state: path, directory: None, memory },
        }
    }

    /// Opens it, as a load would.
    pub(crate) fn open(&self) -> Result<Image, SnapshotError> {
        let place = match (&self.directory, &self.memory) {
            (Some(directory), None) => Place::Directory(directory.clone()),
            (_, Some(memory)) => self.files(memory.clone()),
            (None, None) => {
                let (_, document) = read_state_file(&self.state)?;
                let why = "the state file does not say where it is: name it too".to_owned();
                let missing = SnapshotError::Field { field: "memory file", why };
                self.files(self.memory_of(&document).ok_or(missing)?)
            }
        };
        Image::at(&place)
    }

    fn files(&self, memory: PathBuf) -> Place {
        Place::Files { state: self.state.clone(), memory }
    }

    /// Reads what the state file says.
    pub(crate) fn inspect(&self) -> Result<Inspection, SnapshotError> {
        let (file, document) = read_state_file(&self.state)?;
        let sum =
            |bytes: fn(&Extent) -> u32| file.extents.iter().map(|e| u64::from(bytes(e))).sum();
        let memory = Memory {
            file: self.memory.clone().or_else(|| self.memory_of(&document)),
            bytes: document.memory.len,
            kept_bytes: sum(|extent| extent.len),
            stored_bytes: sum(|extent| extent.stored),
            extents: file.extents.len(),
            compression: document.memory.compression,
        };
        let over = document
            .memory
            .parent
            .as_ref()
            .map(|parent| Over { id: parent.id.clone(), state: parent.place(&self.state).state() });
        let Document { husk, arch, id, config, machine, .. } = document;
        let device = |DeviceState { model, id, place, layer, .. }| {
            let overlay = layer.map(|layer| self.overlay(layer));
            Device { model, id, place, overlay }
        };
        Ok(Inspection {
            format: file.version,
            husk,
            arch,
            id,
            parent: over,
            vcpus: machine.vcpus.len(),
            state_bytes: file.len(),
            memory,
            devices: machine.devices.into_iter().map(device).collect(),
            config,
        })
    }

    fn overlay(&self, LayerDocument { file, layer }: LayerDocument) -> Overlay {
        let file = parent(&self.state).join(file.file_name().unwrap_or_default());
        let stored_bytes = file.metadata().ok().map(|found| found.blocks() * 512);
        Overlay { file, disk_bytes: layer.size, stored_bytes }
    }

    /// Where the memory file is that the state file names.
    fn memory_of(
        &self,
        Document { memory: MemoryDocument { file, .. }, .. }: &Document,
    ) -> Option<PathBuf> {
        let name = file.as_deref()?.file_name()?;
        Some(self.state.parent().unwrap_or(Path::new("")).join(name))
    }
}

/// The format of a state file, as Firecracker shows its own.
pub(crate) fn format_of(state: &Path) -> Result<u32, SnapshotError> {
    Ok(read_state_file(state)?.0.version)
}
