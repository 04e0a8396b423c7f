//! A snapshot in the making: begun while the guest stands still, finished while it goes on.
use serde_json::Value;

use super::SnapshotError;
use super::files::Files;
use super::format::StateFile;
use super::image::{Document, MachineState, MemoryDocument, hex};
use super::params::SnapshotParams;
use crate::memory::{Dump, Patch, Ram};

/// A snapshot whose state has been read, and whose memory is being copied.
#[derive(Debug)]
pub(crate) struct Saving {
    id: String,
    files: Files,
    dump: Dump,
    document: Document,
}

/// A snapshot that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) id: String,
    /// Bytes of state and memory.
    pub(crate) bytes: u64,
}

impl Saving {
    /// Begins with the memory of a VM that stands still; it may go on when this returns.
    pub(crate) fn begin(
        params: &SnapshotParams,
        config: Value,
        machine: MachineState,
        ram: &Ram,
    ) -> Result<Self, SnapshotError> {
        let place = params.place()?;
        let mut bytes = [0; 16];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| SnapshotError::Copy(e.into()))?;
        let id = hex(&bytes);
        let files = Files::create(&place, &id, ram.len())?;
        let id_at = ram.offset_of(arch::layout::GENERATION_ID);
        let patch = Patch { at: id_at, bytes };
        let dump = ram.dump(patch, files.memory()).map_err(SnapshotError::Copy)?;
        let memory = MemoryDocument {
            file: files.memory_name.clone(),
            len: ram.len(),
            id_at,
            plugged: ram.plugged(),
        };
        let document = Document {
            husk: env!("CARGO_PKG_VERSION").into(),
            arch: std::env::consts::ARCH.into(),
            id: id.clone(),
            memory,
            config,
            machine,
        };
        Ok(Self { id, files, dump, document })
    }

    /// Waits for the memory, then describes and names the files.
    pub(crate) fn finish(self) -> Result<Written, SnapshotError> {
        let Self { id, files, dump, document } = self;
        let extents = dump.finish().map_err(SnapshotError::Copy)?;
        let json = serde_json::to_vec(&document).map_err(SnapshotError::Document)?;
        let state = StateFile::encode(&json, &extents);
        let of_memory: u64 = extents.iter().map(|extent| u64::from(extent.stored)).sum();
        files.commit(&id, &state)?;
        Ok(Written { id, bytes: of_memory + state.len() as u64 })
    }
}
