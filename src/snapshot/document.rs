//! The document in a state file: what is said of a VM besides its memory.
use std::path::{Path, PathBuf};

use arch::{VcpuState, VmState};
use devices::legacy::acpi::AcpiState;
use devices::legacy::i8042::I8042State;
use devices::legacy::rtc::RtcState;
use devices::legacy::serial::SerialState;
use devices::virtio::mmio::Saved;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::chain::ParentDocument;
use super::extent::{Extent, Kind};
use super::format::StateFile;
use super::layers::LayerDocument;
use super::overrides::forget_descriptors;
use super::{Compression, SnapshotError, packed};
use crate::identity::IdentityState;

/// Memory is kept in pages of this size.
const PAGE: u64 = 4096;

/// The state of a machine, without its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MachineState {
    pub(crate) vm: VmState,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) legacy: LegacyState,
    #[serde(default)]
    pub(crate) identity: IdentityState,
    pub(crate) devices: Vec<DeviceState>,
}

/// The state of the devices of a PC.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LegacyState {
    pub(crate) serial: SerialState,
    pub(crate) i8042: I8042State,
    pub(crate) rtc: RtcState,
    pub(crate) acpi: AcpiState,
}

/// The state of a virtio device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DeviceState {
    pub(crate) model: String,
    pub(crate) id: String,
    /// Which place it has, from 0.
    pub(crate) place: usize,
    /// Where the guest sees the memory that it brings along.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory_at: Option<u64>,
    pub(crate) state: Saved,
    /// The file with what it has written on the host, if that is part of the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) layer: Option<LayerDocument>,
}

/// The document in a state file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Document {
    /// The version of husk that wrote it.
    pub(crate) husk: String,
    pub(crate) arch: String,
    /// 16 random bytes in hexadecimal.
    pub(crate) id: String,
    pub(crate) memory: MemoryDocument,
    /// As in `GET /vm/config`.
    pub(crate) config: Value,
    pub(crate) machine: MachineState,
}

/// What a state file says of the memory file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MemoryDocument {
    /// Its name, if it is in the same directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<PathBuf>,
    /// Bytes of memory, and of the file unless it is compressed.
    pub(crate) len: u64,
    /// How it is compressed.
    #[serde(default, skip_serializing_if = "Compression::is_none")]
    pub(crate) compression: Compression,
    /// Where in it the snapshot's id is, 16 bytes.
    pub(crate) id_at: u64,
    /// What follows RAM: address and bytes of each region of memory that is plugged while the guest runs.
    #[serde(default)]
    pub(crate) plugged: Vec<(u64, u64)>,
    /// The snapshot that it goes over, if it is of what has changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<ParentDocument>,
}

impl Document {
    pub(super) fn read(file: &StateFile) -> Result<Self, SnapshotError> {
        let mut document: Self =
            serde_json::from_slice(&file.json).map_err(SnapshotError::Document)?;
        forget_descriptors(&mut document.config);
        match document.arch == std::env::consts::ARCH {
            true => Ok(document),
            false => Err(SnapshotError::Arch(document.arch)),
        }
    }

    /// Refuses numbers that could lead out of the memory file, or one device into the place of another.
    pub(super) fn check(&self, extents: &[Extent]) -> Result<(), SnapshotError> {
        let wrong = |why: String| Err(SnapshotError::Inconsistent(why));
        let MemoryDocument { len, compression, id_at, .. } = self.memory;
        if len % PAGE != 0 || id_at.checked_add(16).is_none_or(|end| end > len) {
            return wrong(format!("its id is at {id_at:#x} of {len:#x} bytes of memory"));
        }
        let is_packed = !compression.is_none();
        if is_packed && (id_at != 0 || !packed::are_close(extents, compression)) {
            let why = "what its compressed memory consists of does not follow each other";
            return wrong(why.into());
        }
        let is_wrong = |extent: &&Extent| {
            let Extent { start, len: size, kind, at, stored, .. } = **extent;
            let is_kept = match kind {
                // That of others has been looked at above.
                Kind::Plain | Kind::Lz4 | Kind::Zstd if is_packed => true,
                Kind::Plain => stored == size && at == start,
                Kind::Lz4 | Kind::Zstd => false,
                // There is nothing to be over.
                Kind::Zero => stored == 0 && self.memory.parent.is_some(),
            };
            start % PAGE != 0 || u64::from(size) % PAGE != 0 || extent.end() > len || !is_kept
        };
        if let Some(Extent { start, len: size, .. }) = extents.iter().find(is_wrong) {
            return wrong(format!("it has {size:#x} bytes of memory at {start:#x}, of {len:#x}"));
        }
        let devices = &self.machine.devices;
        for (n, device) in devices.iter().enumerate() {
            let DeviceState { model, id, place, .. } = device;
            let before = devices.iter().take(n);
            if before.clone().any(|other| other.place == *place) {
                return wrong(format!("{model} {id} is in a place that is taken: {place}"));
            }
            if before.clone().any(|other| (&other.model, &other.id) == (model, id)) {
                return wrong(format!("it has two states of {model} {id}"));
            }
        }
        Ok(())
    }

    /// The name of the memory file in a directory, which must not lead out of it.
    pub(super) fn memory_name(&self) -> Result<&Path, SnapshotError> {
        let name = self.memory.file.as_deref();
        let name =
            name.filter(|name| name.file_name().is_some_and(|file| file == name.as_os_str()));
        let why = "its memory file is elsewhere: name both files";
        name.ok_or_else(|| SnapshotError::Field { field: "directory", why: why.into() })
    }
}

/// An id as it is shown.
pub(crate) fn hex(id: &[u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(*id))
}
