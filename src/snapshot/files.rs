//! Where the files of a snapshot go, and how they get there: whatever ends this process or the host, and whenever,
//! the old snapshot can be loaded, or the new one.
//!
//! ```text
//!              in a directory                  as two files
//!   written    without a name                  without a name
//!   named      DIR/memory-ID                   MEMORY.ID
//!              DIR/overlay-DRIVE-ID            STATE.overlay-DRIVE-ID
//!   committed  DIR/state replaces the old one  STATE replaces the old one
//!   after it   older memory is removed         MEMORY.ID replaces MEMORY
//! ```
//!
//! One rename commits both files, because a state is looked for a memory with its own id, under either name. Only
//! what is a snapshot of husk's is ever replaced, or removed.
use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use devices::backend::file::{name_of, parent};
use devices::sys::again::again;
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, flock};
use rustix::io::retry_on_intr;

use super::opening::{Summary, has_id};
use super::params::Place;
use super::temporary::Temporary;
use super::{SnapshotError, working_set};

/// The state file's name in a directory.
pub(super) const STATE: &str = "state";
/// What the names of memory files begin with in a directory.
const MEMORY: &str = "memory";
/// What the names of files end with that are being written.
const UNFINISHED: &str = ".tmp";

/// The files of a snapshot that is being written.
#[derive(Debug)]
pub(super) struct Files {
    place: Place,
    id: String,
    is_synced: bool,
    state: Temporary,
    memory: Temporary,
    /// Other files, and what they are to be called.
    others: Vec<(PathBuf, Temporary)>,
    /// Removed again, if nothing comes to be in it.
    _directory: Option<MadeDirectory>,
}

impl Files {
    /// Makes the files, the memory of `len` bytes at first, for the snapshot `id`. Refuses whatever must not be replaced.
    pub(super) fn create(
        place: Place,
        id: &str,
        len: u64,
        is_synced: bool,
    ) -> Result<Self, SnapshotError> {
        let made = match &place {
            Place::Directory(path) => MadeDirectory::make(path)?,
            Place::Files { .. } => None,
        };
        place.check()?;
        place.prune();
        let state = Temporary::create(&place.state(), &place.temporary_state(id))?;
        let memory = Temporary::create(&place.memory(id), &place.temporary_memory(id))?;
        let sized = memory.file().set_len(len);
        sized.map_err(SnapshotError::file("cannot make", place.memory(id)))?;
        let others = Vec::new();
        Ok(Self { place, id: id.into(), is_synced, state, memory, others, _directory: made })
    }

    /// Makes another file of the snapshot; its name in the directory of the state file, and the file.
    pub(super) fn add(&mut self, stem: &str) -> Result<(PathBuf, &File), SnapshotError> {
        let path = self.place.other(stem, &self.id);
        let name = PathBuf::from(path.file_name().unwrap_or_default());
        let file = Temporary::create(&path, &with_suffix(&path, UNFINISHED))?;
        self.others.push((path, file));
        let (_, file) = self.others.last().expect("one was added");
        Ok((name, file.file()))
    }

    /// The memory file, to be written.
    pub(super) fn memory(&self) -> &File {
        self.memory.file()
    }

    /// The memory file's name, if it goes where the state file goes.
    pub(super) fn memory_name(&self) -> Option<PathBuf> {
        match &self.place {
            Place::Directory(_) => Some(memory_name(&self.id).into()),
            Place::Files { .. } => None,
        }
    }

    /// Writes the state file, and puts both in their places.
    pub(super) fn commit(self, bytes: &[u8]) -> Result<(), SnapshotError> {
        // First, to be dropped last: until then the other files are in it.
        let Self { _directory: directory, place, id, is_synced, state, mut memory, mut others } =
            self;
        let state_path = place.state();
        let (memory_path, side) = (place.memory(&id), place.side(&id));
        let sync = |directory| if is_synced { sync_directory(directory) } else { Ok(()) };
        let wrote = state.file().write_all_at(bytes, 0);
        wrote.map_err(SnapshotError::file("cannot write", &state_path))?;
        if is_synced {
            memory.sync(&memory_path)?;
            state.sync(&state_path)?;
        }
        for (path, other) in &mut others {
            if is_synced {
                other.sync(path)?;
            }
            other.name(path)?;
        }
        memory.name(&side)?;
        sync(parent(&side))?;
        // What drives have written is beside the state file, which must not be there without it.
        if !others.is_empty() && parent(&state_path) != parent(&side) {
            sync(parent(&state_path))?;
        }
        state.replace(&state_path, &place.temporary_state(&id))?;
        // It is there. What fails from here on takes nothing away.
        memory.keep();
        others.into_iter().for_each(|(_, other)| other.keep());
        directory.into_iter().for_each(MadeDirectory::keep);
        sync(parent(&state_path))?;
        if side != memory_path {
            again(|| std::fs::rename(&side, &memory_path))
                .map_err(SnapshotError::file("cannot rename to", &memory_path))?;
            sync(parent(&memory_path))?;
        }
        place.prune();
        Ok(())
    }
}

/// A directory that was made for a snapshot. Dropped, it is gone unless it is to be kept or something is in it.
#[derive(Debug)]
struct MadeDirectory(Option<PathBuf>);

impl MadeDirectory {
    /// `None` if it is there.
    fn make(path: &Path) -> Result<Option<Self>, SnapshotError> {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {
                // First: it goes again if what follows fails.
                let made = Self(Some(path.into()));
                sync_directory(parent(path))?;
                Ok(Some(made))
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                let found = std::fs::metadata(path);
                let found = found.map_err(SnapshotError::file("cannot look at", path))?;
                if found.is_dir() {
                    return Ok(None);
                }
                let what = name_of(FileType::from_raw_mode(found.mode()));
                let why = format!("{} is {what}, want a directory", path.display());
                Err(SnapshotError::Field { field: "directory", why })
            }
            Err(e) => Err(SnapshotError::file("cannot make the directory", path)(e)),
        }
    }

    /// Keeps it.
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for MadeDirectory {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Something else is in it now, then it stays.
            let _ = std::fs::remove_dir(path);
        }
    }
}

fn sync_directory(path: &Path) -> Result<(), SnapshotError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty()));
    let synced = directory.and_then(|directory| retry_on_intr(|| rustix::fs::fsync(&directory)));
    synced.map_err(|e| SnapshotError::file("cannot sync the directory", path)(e.into()))
}

/// The name of a memory file in a directory.
fn memory_name(id: &str) -> String {
    format!("{MEMORY}-{id}")
}

impl Place {
    /// The state file.
    pub(super) fn state(&self) -> PathBuf {
        match self {
            Self::Directory(directory) => directory.join(STATE),
            Self::Files { state, .. } => state.clone(),
        }
    }

    /// The memory file of a snapshot.
    pub(super) fn memory(&self, id: &str) -> PathBuf {
        match self {
            Self::Directory(directory) => directory.join(memory_name(id)),
            Self::Files { memory, .. } => memory.clone(),
        }
    }

    /// What the memory file is called when its state file comes to be.
    fn side(&self, id: &str) -> PathBuf {
        match self {
            Self::Directory(directory) => directory.join(memory_name(id)),
            Self::Files { memory, .. } => side(memory, id),
        }
    }

    /// Another file, beside the state file.
    fn other(&self, stem: &str, id: &str) -> PathBuf {
        let name = format!("{stem}-{id}");
        match self {
            Self::Directory(directory) => directory.join(name),
            Self::Files { state, .. } => with_suffix(state, &format!(".{name}")),
        }
    }

    /// What is noted of the snapshot's memory.
    fn working_set(&self) -> PathBuf {
        match self {
            Self::Directory(directory) => directory.join(working_set::NAME),
            Self::Files { memory, .. } => with_suffix(memory, &format!(".{}", working_set::NAME)),
        }
    }

    fn temporary_state(&self, id: &str) -> PathBuf {
        with_suffix(&self.state(), &format!(".{id}{UNFINISHED}"))
    }

    fn temporary_memory(&self, id: &str) -> PathBuf {
        with_suffix(&self.side(id), UNFINISHED)
    }

    /// Refuses to replace anything but a snapshot of husk's. What is empty may be replaced too: some make the files
    /// before they ask for a snapshot.
    fn check(&self) -> Result<(), SnapshotError> {
        let state_field = match self {
            Self::Directory(_) => "directory",
            Self::Files { .. } => "snapshot_path",
        };
        let state = self.state();
        let mut id_of_old = None;
        if is_taken(state_field, &state)? {
            match Summary::read(&state) {
                Ok(summary) => id_of_old = Some(summary),
                Err(e) if e.is_of_state_file() => {}
                Err(_) => return Err(foreign(state_field, &state, "a snapshot's state file")),
            }
        }
        let Self::Files { memory, .. } = self else { return Ok(()) };
        let field = "mem_file_path";
        if are_same(&state, memory) {
            let why = "it is the file of snapshot_path: they must be two".into();
            return Err(SnapshotError::Field { field, why });
        }
        if is_taken(field, memory)? {
            // It was to be replaced by that one, which its state has found.
            let is_old = id_of_old.is_some_and(|summary| {
                has_id(memory, &summary) || has_id(&side(memory, &summary.id), &summary)
            });
            if !is_old {
                return Err(foreign(field, memory, "the memory of the snapshot in snapshot_path"));
            }
        }
        Ok(())
    }

    /// Removes what snapshots have left behind here that were not finished, or that have been replaced.
    fn prune(&self) {
        let state = self.state();
        let memory = match self {
            Self::Directory(directory) => directory.join(MEMORY),
            Self::Files { memory, .. } => memory.clone(),
        };
        let mut directories = vec![parent(&state)];
        if parent(&memory) != parent(&state) {
            directories.push(parent(&memory));
        }
        let working_set = self.working_set();
        // Of a directory's memory files and of two files' the names differ, so that neither takes the other's.
        let before_id = match self {
            Self::Directory(_) => '-',
            Self::Files { .. } => '.',
        };
        for directory in directories {
            let Ok(entries) = std::fs::read_dir(directory) else { continue };
            for entry in entries.flatten() {
                let (path, name) = (entry.path(), entry.file_name());
                let is_ours = |of: &Path, before_id| {
                    directory == parent(of) && is_of_snapshot(&name, of.file_name(), before_id)
                };
                let is_other = directory == parent(&state) && is_other_of_snapshot(&name, self);
                let is_ours = is_ours(&state, '.')
                    || is_ours(&memory, before_id)
                    || is_ours(&working_set, '.')
                    || is_other;
                if is_ours && !is_wanted(&path, &state) {
                    log::info!("removing {}, which no snapshot needs", path.display());
                    if let Err(e) = std::fs::remove_file(&path) {
                        log::warn!("cannot remove {}: {e}", path.display());
                    }
                }
            }
        }
        // Looked for first: it is seldom there, and a state file may be large.
        if working_set.exists()
            && Summary::read(&state).is_ok_and(|new| working_set::is_stale(&working_set, &new.id))
        {
            log::debug!("removing {}, which is of another snapshot", working_set.display());
            if let Err(e) = std::fs::remove_file(&working_set) {
                log::warn!("cannot remove {}: {e}", working_set.display());
            }
        }
    }
}

/// Whether `name` is that of a file with an id: BASE, a hyphen or a dot, ID, and perhaps ".tmp".
fn is_of_snapshot(name: &OsStr, base: Option<&OsStr>, before_id: char) -> bool {
    let (Some(name), Some(base)) = (name.to_str(), base.and_then(OsStr::to_str)) else {
        return false;
    };
    let rest = name.strip_prefix(base).and_then(|rest| rest.strip_prefix(before_id));
    let id = rest.map(|rest| rest.strip_suffix(UNFINISHED).unwrap_or(rest));
    id.is_some_and(|id| {
        id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// Whether `name` is that of a file of [`Files::add`]: overlay-DRIVE-ID, with the state file's name and a dot
/// before it if it is beside that.
fn is_other_of_snapshot(name: &OsStr, place: &Place) -> bool {
    let prefix = match place {
        Place::Directory(_) => String::new(),
        Place::Files { state, .. } => {
            format!("{}.", state.file_name().unwrap_or_default().to_string_lossy())
        }
    };
    let stem = name.to_str().and_then(|name| name.strip_prefix(&prefix)?.strip_prefix("overlay-"));
    let end = stem.and_then(|stem| stem.rfind('-').and_then(|at| stem.get(at..)));
    end.is_some_and(|end| is_of_snapshot(end.as_ref(), Some("".as_ref()), '-'))
}

/// Whether somebody is writing it, or the state file names it.
fn is_wanted(path: &Path, state: &Path) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty()));
    let Ok(file) = opened.map(File::from) else {
        return true;
    };
    let is_file = file.metadata().is_ok_and(|found| found.is_file());
    if !is_file || flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return true;
    }
    // Read when its writer, if there was one, is through with both.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match Summary::read(state) {
        Ok(summary) => summary.needs(&name),
        // Nobody can say which are: only what was never finished is nobody's.
        Err(_) => !name.ends_with(UNFINISHED),
    }
}

/// What the memory file of two is called before it has its place.
pub(super) fn side(memory: &Path, id: &str) -> PathBuf {
    with_suffix(memory, &format!(".{id}"))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// Whether there is something in a file; what is not a file is refused.
fn is_taken(field: &'static str, path: &Path) -> Result<bool, SnapshotError> {
    let wrong = |why| Err(SnapshotError::Field { field, why });
    if path.file_name().is_none() {
        return wrong(format!("'{}' is not the name of a file", path.display()));
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => Ok(found.len() > 0),
        Ok(found) => {
            let what = name_of(FileType::from_raw_mode(found.mode()));
            wrong(format!("{} is {what}: name a file, or none", path.display()))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(SnapshotError::file("cannot look at", path)(e)),
    }
}

fn foreign(field: &'static str, path: &Path, wanted: &str) -> SnapshotError {
    let path = path.display();
    let why = format!("{path} is there, and is not {wanted}: name another file, or remove it");
    SnapshotError::Field { field, why }
}

/// Whether two paths lead to one file, or would.
fn are_same(one: &Path, other: &Path) -> bool {
    let node = |path: &Path| std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    let are_linked = node(one).is_some_and(|found| node(other) == Some(found));
    let are_together = node(parent(one)) == node(parent(other));
    are_linked || (are_together && one.file_name() == other.file_name())
}

#[cfg(test)]
mod tests {
    use super::super::temporary::tests::{names, scratch};
    use super::*;

    const ID: &str = "00112233445566778899aabbccddeeff";

    #[test]
    fn only_what_is_left_over_here_is_removed() {
        let directory = scratch();
        let in_directory = Place::Directory(directory.clone());
        let [state, memory] = ["a", MEMORY].map(|name| directory.join(name));
        let in_files = Place::Files { state, memory };
        for (place, gone, kept) in [
            // Its state file may be unreadable, or be on its way back.
            (&in_directory, "", "memory-ID memory.ID memory.ID.tmp overlay-d-ID state.ID"),
            (&in_directory, "memory-ID.tmp overlay-d-ID.tmp state.ID.tmp", "memory-other.tmp"),
            (&in_directory, "working-set.ID.tmp", "working-set"),
            // Another snapshot's, which is a directory.
            (&in_files, "", "memory-ID memory-ID.tmp overlay-d-ID overlay-d-ID.tmp"),
            (&in_files, "memory.ID.tmp a.ID.tmp a.overlay-d-ID.tmp", "memory.ID state.ID.tmp"),
        ] {
            let [gone, kept] = [gone, kept].map(|names| names.replace("ID", ID));
            for name in gone.split_whitespace().chain(kept.split_whitespace()) {
                std::fs::write(directory.join(name), "").unwrap();
            }
            place.prune();
            let mut kept: Vec<_> = kept.split_whitespace().collect();
            kept.sort_unstable();
            assert_eq!(names(&directory), kept, "of {gone:?} in {place:?}");
            std::fs::remove_dir_all(&directory).unwrap();
            std::fs::create_dir(&directory).unwrap();
        }
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_directory_that_was_made_goes_with_its_files() {
        let directory = scratch();
        let place = Place::Directory(directory.join("new"));
        let mut files = Files::create(place, ID, 4096, false).unwrap();
        // The second has no place by then.
        files.add("overlay-d").unwrap();
        files.add("overlay-d").unwrap();
        files.commit(b"state").unwrap_err();
        assert!(names(&directory).is_empty(), "the directory is left behind");
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
