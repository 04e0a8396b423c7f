//! The files of a snapshot while they come to be: under a temporary name until they are complete.
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::SnapshotError;
use super::params::Place;

/// The state file's name in a directory.
pub(super) const STATE: &str = "state";

/// Where the files go, and the memory file that is being written.
#[derive(Debug)]
pub(super) struct Files {
    state: PathBuf,
    memory: Temporary,
    /// The memory file's name, if it goes where the state file goes.
    pub(super) memory_name: Option<PathBuf>,
}

impl Files {
    /// Makes the memory file, of `len` bytes, for the snapshot `id`.
    pub(super) fn create(place: &Place, id: &str, len: u64) -> Result<Self, SnapshotError> {
        let (state, memory, memory_name) = match place {
            Place::Directory(directory) => {
                make_directory(directory)?;
                let name = PathBuf::from(format!("memory-{id}"));
                (directory.join(STATE), directory.join(&name), Some(name))
            }
            Place::Files { state, memory } => (state.clone(), memory.clone(), None),
        };
        check_target("snapshot_path", &state)?;
        check_target("mem_file_path", &memory)?;
        let memory = Temporary::create(&memory, id)?;
        memory
            .file
            .set_len(len)
            .map_err(SnapshotError::file("cannot make the memory file", &memory.target))?;
        Ok(Self { state, memory, memory_name })
    }

    /// The memory file, to be written.
    pub(super) fn memory(&self) -> &File {
        &self.memory.file
    }

    /// Writes the state file, and gives both their names.
    pub(super) fn commit(self, id: &str, state: &[u8]) -> Result<(), SnapshotError> {
        let mut file = Temporary::create(&self.state, id)?;
        let wrote = file.file.write_all(state);
        wrote.map_err(SnapshotError::file("cannot write the state file", &self.state))?;
        for temporary in [&self.memory, &file] {
            let synced = temporary.file.sync_all();
            synced.map_err(SnapshotError::file("cannot write", &temporary.target))?;
        }
        self.memory.rename()?;
        file.rename()
    }
}

fn make_directory(path: &Path) -> Result<(), SnapshotError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(SnapshotError::file("cannot make the directory", path)(e))
        }
        _ => Ok(()),
    }
}

/// What is there already may only be a file.
fn check_target(field: &'static str, path: &Path) -> Result<(), SnapshotError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => {
            let why = format!("{} is there, and is not a file", path.display());
            Err(SnapshotError::Field { field, why })
        }
        _ => Ok(()),
    }
}

/// A file that is not there under its name yet. Dropped without a name, it is gone.
#[derive(Debug)]
struct Temporary {
    file: File,
    path: PathBuf,
    target: PathBuf,
    is_done: bool,
}

impl Temporary {
    fn create(target: &Path, id: &str) -> Result<Self, SnapshotError> {
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{id}.tmp"));
        let path = target.with_file_name(name);
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(SnapshotError::file("cannot make", target))?;
        Ok(Self { file, path, target: target.into(), is_done: false })
    }

    fn rename(mut self) -> Result<(), SnapshotError> {
        let renamed = std::fs::rename(&self.path, &self.target);
        renamed.map_err(SnapshotError::file("cannot rename to", &self.target))?;
        self.is_done = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.is_done
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            log::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}
