//! An image in memory of a VM that stands still.
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use serde_json::Value;

use crate::config::HugePages;
use crate::memory::{Dump, Plan, Ram};
use crate::snapshot::{
    Compression, Document, Image, MachineState, MemoryDocument, MemoryImage, SnapshotError, hex,
};

/// An image whose state has been read. The VM may go on.
#[derive(Debug)]
pub(crate) struct Freezing {
    document: Document,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    /// Frozen where it is.
    There(MemoryImage),
    /// Being copied.
    Copied(Dump, File),
}

impl Freezing {
    /// Begins with the memory of a VM that stands still; it may go on when this returns. Memory that
    /// is a file in memory is frozen, other memory is copied.
    pub(crate) fn begin(
        config: Value,
        machine: MachineState,
        ram: &mut Ram,
        pages: HugePages,
    ) -> Result<Self, SnapshotError> {
        ram.freeze(pages).map_err(SnapshotError::Copy)?;
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| SnapshotError::Copy(e.into()))?;
        let id_at = ram.offset_of(arch::layout::SNAPSHOT_ID);
        let document = Document {
            husk: env!("CARGO_PKG_VERSION").into(),
            arch: std::env::consts::ARCH.into(),
            id: hex(&id),
            memory: MemoryDocument {
                file: None,
                len: ram.len(),
                compression: Compression::None,
                id_at,
                plugged: ram.plugged(),
                parent: None,
            },
            config,
            machine,
        };
        let memory = match ram.frozen() {
            Some(image) => Memory::There(image),
            None => {
                let file = new_file(ram.len()).map_err(SnapshotError::Copy)?;
                let dump = ram
                    .dump(&Plan::Full, ram.patch(id), &file, Compression::None)
                    .map_err(SnapshotError::Copy)?;
                Memory::Copied(dump, file)
            }
        };
        Ok(Self { document, memory })
    }

    /// Waits for the memory.
    pub(crate) fn finish(self) -> Result<Image, SnapshotError> {
        let memory = match self.memory {
            Memory::There(image) => image,
            Memory::Copied(dump, file) => {
                let extents = dump.finish().map_err(SnapshotError::Copy)?.extents.into();
                seal(&file).map_err(SnapshotError::Copy)?;
                MemoryImage { file: Arc::new(file), extents, over: [].into() }
            }
        };
        Ok(Image::in_memory(self.document, memory))
    }
}

/// Takes an image, once. Runs on another thread.
pub struct ImageSink(Box<dyn FnOnce(Image) + Send>);

impl ImageSink {
    /// A sink that calls `f`.
    pub fn new(f: impl FnOnce(Image) + Send + 'static) -> Self {
        Self(Box::new(f))
    }

    /// Gives it the image.
    pub(crate) fn take(self, image: Image) {
        (self.0)(image);
    }
}

impl std::fmt::Debug for ImageSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageSink").finish_non_exhaustive()
    }
}

fn new_file(len: u64) -> io::Result<File> {
    let file = sealable_file(c"husk-image")?;
    file.set_len(len)?;
    Ok(file)
}

/// A file in memory that can be [sealed](seal).
pub(super) fn sealable_file(name: &CStr) -> io::Result<File> {
    Ok(rustix::io::retry_on_intr(|| {
        rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
    })?
    .into())
}

/// Sees to it that nobody who is given the file can change it: children of one parent are not to reach each other.
pub(super) fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    Ok(rustix::fs::fcntl_add_seals(file, seals)?)
}
