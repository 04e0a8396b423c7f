//! Reading the files of a snapshot: the state file, and which memory file is its own.
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use devices::backend::file::{self, Access, FromStart, OpenError};
use serde::Deserialize;

use super::document::{Document, MemoryDocument, hex};
use super::extent::Extent;
use super::format::StateFile;
use super::params::Place;
use super::{Compression, SnapshotError, packed};

/// Reads and checks a state file.
pub(super) fn read_state_file(path: &Path) -> Result<(StateFile, Document), SnapshotError> {
    let file = read_state(path)?;
    let document = Document::read(&file)?;
    Ok((file, document))
}

/// What a state file says of its files.
#[derive(Debug, Deserialize)]
pub(super) struct Summary {
    pub(super) id: String,
    pub(super) memory: MemoryDocument,
}

impl Summary {
    /// Reads and checks a state file.
    pub(super) fn read(state: &Path) -> Result<Self, SnapshotError> {
        let file = read_state(state)?;
        serde_json::from_slice(&file.json).map_err(SnapshotError::Document)
    }

    /// The same of all but the table of its memory, which can be long and is not looked at.
    pub(super) fn glance(state: &Path) -> Result<Self, SnapshotError> {
        let json = read_by(state, |file, len, failed| StateFile::read_json(file, len, failed))?;
        serde_json::from_slice(&json).map_err(SnapshotError::Document)
    }

    /// Whether the file of this name is needed to load it.
    pub(super) fn needs(&self, name: &str) -> bool {
        name.ends_with(&self.id)
    }
}

/// Whether a file is the memory that belongs to a state.
pub(super) fn has_id(path: &Path, summary: &Summary) -> bool {
    let file = file::open(path, Access::Read, file::Kind::Regular);
    file.is_ok_and(|file| read_id(&file, &summary.memory).is_ok_and(|id| id == summary.id))
}

fn read_id(file: &File, memory: &MemoryDocument) -> std::io::Result<String> {
    let mut id = [0; 16];
    file.read_exact_at(&mut id, memory.id_at)?;
    Ok(hex(&id))
}

fn read_state(path: &Path) -> Result<StateFile, SnapshotError> {
    read_by(path, |file, len, failed| StateFile::read(file, len, failed))
}

/// Reads a state file by `read`, which is given its length and what to say if that fails.
fn read_by<T>(
    path: &Path,
    read: impl FnOnce(
        &mut FromStart<'_>,
        u64,
        &dyn Fn(std::io::Error) -> SnapshotError,
    ) -> Result<T, SnapshotError>,
) -> Result<T, SnapshotError> {
    let file = file::open(path, Access::Read, file::Kind::Regular)
        .map_err(|source| SnapshotError::Open { what: "state file", source })?;
    let failed = |e| SnapshotError::file("cannot read the state file", path)(e);
    let len = file.metadata().map_err(failed)?.len();
    read(&mut FromStart::of(&file), len, &failed)
}

/// Opens the memory file, under the name that it had when it was written if it did not get to the one that it was
/// to have.
pub(super) fn open_memory(
    place: &Place,
    document: &Document,
    extents: &[Extent],
) -> Result<(File, PathBuf), SnapshotError> {
    let len = match document.memory.compression {
        Compression::None => document.memory.len,
        Compression::Lz4 | Compression::Zstd => packed::len(extents),
    };
    let check = |path: PathBuf| Ok((check_memory(&path, document, len)?, path));
    match place {
        Place::Directory(directory) => {
            let path = directory.join(document.memory_name()?);
            check(path).map_err(|e| match e {
                SnapshotError::Open { source: OpenError::Open { path, source, .. }, .. }
                    if source.kind() == ErrorKind::NotFound =>
                {
                    let why = "it is not there: the snapshot is incomplete".into();
                    SnapshotError::Memory { path, why }
                }
                e => e,
            })
        }
        Place::Files { memory, .. } if !place.has_neighbours() => check(memory.clone()),
        Place::Files { memory, .. } => check(memory.clone()).or_else(|e| {
            let side = super::files::side(memory, &document.id);
            if side.exists() { check(side) } else { Err(e) }
        }),
    }
}

fn check_memory(path: &Path, document: &Document, want: u64) -> Result<File, SnapshotError> {
    let wrong = |why| Err(SnapshotError::Memory { path: path.into(), why });
    let failed = |source| SnapshotError::File { what: "cannot read", path: path.into(), source };
    let file = file::open(path, Access::Read, file::Kind::Regular)
        .map_err(|source| SnapshotError::Open { what: "memory file", source })?;
    let is = file.metadata().map_err(failed)?.len();
    if is != want {
        return wrong(format!("length: it has {is} bytes, the state file wants {want}"));
    }
    let id = match read_id(&file, &document.memory) {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
            return wrong(format!("id: it ends before {:#x}", document.memory.id_at));
        }
        id => id.map_err(failed)?,
    };
    if id != document.id {
        return wrong(format!(
            "id: it belongs to snapshot {id}, the state file to {}",
            document.id
        ));
    }
    Ok(file)
}
