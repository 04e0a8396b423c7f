//! A snapshot that was opened: judged, and ready to be made a VM of, as often as one likes.
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::retry_on_intr;
use serde_json::Value;

use super::chain::{CHAIN_MAX, Parent, ParentDocument};
use super::document::{Document, MemoryDocument};
use super::extent::Extent;
use super::layers;
use super::opening::{open_memory, read_state_file};
use super::params::{LoadParams, Place};
use super::{Overrides, SnapshotError, packed};
use crate::config::VmConfig;
use crate::memory::Ram;

/// Guest memory in a file that is mapped privately: page for page, RAM without the hole.
#[derive(Clone, Debug)]
pub(crate) struct MemoryImage {
    pub(crate) file: Arc<File>,
    /// What of the image is not zero.
    pub(crate) extents: Arc<[Extent]>,
    /// What is not in the file but over it: in order, and nowhere twice.
    pub(crate) over: Arc<[Segment]>,
}

/// A piece of an image.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    /// Its place in the image, and in its file.
    pub(crate) start: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// The file with its contents. Zeroes have none.
    pub(crate) from: Option<Arc<File>>,
}

impl Segment {
    /// The first byte of the image behind it.
    pub(crate) fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// An opened snapshot. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Image {
    pub(crate) document: Arc<Document>,
    pub(crate) memory: MemoryImage,
    /// What of the image is in its own memory file. An image in memory has none.
    pub(super) own: Option<Own>,
    /// As what others can be changes to it.
    pub(crate) parent: Option<Parent>,
}

/// The memory file of a snapshot, or what was in it.
#[derive(Clone, Debug)]
pub(super) struct Own {
    /// The file.
    pub(super) path: PathBuf,
    pub(super) file: Arc<File>,
    pub(super) extents: Arc<[Extent]>,
    /// Whether it is in memory, because the file is compressed. Then its sums have been compared.
    pub(super) is_unpacked: bool,
    pub(super) rest: Rest,
}

/// What is in a memory file besides what the state file has sums of.
#[derive(Clone, Debug)]
pub(super) enum Rest {
    /// Zeroes, which belong to the image.
    Zeroes,
    /// What others have merged into it.
    Merged,
    /// Zeroes, in whose place there is what the parent has.
    Parent(Arc<Image>),
}

impl Image {
    /// Opens the snapshot in a directory, as made by [`crate::SnapshotParams::to_directory`].
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, SnapshotError> {
        Self::load(&LoadParams::from_directory(directory))
    }

    /// What tells it from every other: 32 hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.document.id
    }

    /// Opens what a request names. The state is checked to its last bit, the memory file by its size
    /// and by the snapshot's id in it.
    pub fn load(params: &LoadParams) -> Result<Self, SnapshotError> {
        if params.handler().is_some() {
            return Self::without_memory(&params.state_alone()?);
        }
        let image = Self::at(&params.place()?)?;
        if params.verify {
            image.verify()?;
        }
        Ok(image)
    }

    /// The state alone, of a VM whose memory another process serves.
    fn without_memory(state: &Path) -> Result<Self, SnapshotError> {
        let (file, mut document) = read_state_file(state)?;
        document.check(&file.extents)?;
        let compression = document.memory.compression;
        if !compression.is_none() {
            let why = format!(
                "Uffd serves pages of a file, and this memory is compressed ({}): load it by File, or \
                 have `husk snapshot merge` make one that is not",
                compression.name()
            );
            return Err(SnapshotError::Field { field: "mem_backend", why });
        }
        layers::open(state, &mut document.machine)?;
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let nothing = retry_on_intr(|| rustix::fs::memfd_create("husk-no-memory", flags))
            .map_err(|e| SnapshotError::Copy(e.into()))?;
        let memory = MemoryImage {
            file: Arc::new(nothing.into()),
            extents: Arc::default(),
            over: Arc::default(),
        };
        Ok(Self::in_memory(document, memory))
    }

    /// The same, given where the files are.
    pub(super) fn at(place: &Place) -> Result<Self, SnapshotError> {
        Self::find(place, None, 0)
    }

    /// The same; it must be the snapshot `id`, if that is given, which `depth` others go over.
    fn find(place: &Place, id: Option<&str>, depth: usize) -> Result<Self, SnapshotError> {
        let (mut file, mut document) = read_state_file(&place.state())?;
        loop {
            // Before its own parent is looked for: chains that bite their tail have an end.
            if id.is_some_and(|id| id != document.id) {
                let why = format!("it is snapshot {} by now", document.id);
                return Err(SnapshotError::Inconsistent(why));
            }
            document.check(&file.extents)?;
            let opened = open_memory(place, &document, &file.extents).and_then(|memory| {
                // What drives have written since the beginning: those under it have nothing to add.
                if depth == 0 {
                    layers::open(&place.state(), &mut document.machine)?;
                }
                Ok(memory)
            });
            match opened {
                Ok((memory, memory_path)) => {
                    let own =
                        Own::find(place, &document, (memory, memory_path), file.extents, depth)?;
                    let memory = own.image()?;
                    let older = match &own.rest {
                        Rest::Parent(parent) => parent.parent.as_ref(),
                        Rest::Zeroes | Rest::Merged => None,
                    };
                    let before = memory.extents.clone();
                    let parent = place
                        .has_neighbours()
                        .then(|| Parent::new(&document.id, place, &own.path, before, older));
                    let (document, own) = (Arc::new(document), Some(own));
                    return Ok(Self { document, memory, own, parent });
                }
                Err(e) => {
                    // Replaced by another snapshot meanwhile: then that is what is there.
                    let again = read_state_file(&place.state())?;
                    if again.0 == file {
                        return Err(e);
                    }
                    (file, document) = again;
                }
            }
        }
    }

    /// Refuses memory of another shape than it is of.
    pub(crate) fn check_memory(&self, ram: &Ram) -> Result<(), SnapshotError> {
        let MemoryDocument { len, plugged, .. } = &self.document.memory;
        if (*len, plugged) == (ram.len(), &ram.plugged()) {
            return Ok(());
        }
        let (want, is) = (ram.len(), ram.plugged());
        let why = format!(
            "it has {len:#x} bytes of memory, with {plugged:x?} to be plugged, its configuration \
             {want:#x} with {is:x?}"
        );
        Err(SnapshotError::Inconsistent(why))
    }

    /// One that is not in files.
    pub(crate) fn in_memory(document: Document, memory: MemoryImage) -> Self {
        Self { document: Arc::new(document), memory, own: None, parent: None }
    }

    /// The same, of a VM that is configured in another way: as in `GET /vm/config`.
    pub(crate) fn with_config(&self, config: Value) -> Self {
        let document = Document { config, ..(*self.document).clone() };
        Self { document: Arc::new(document), ..self.clone() }
    }

    /// The configuration of the VM it is of, and what is to be different.
    pub(crate) fn config(&self, overrides: &Overrides) -> Result<VmConfig, crate::Refusal> {
        let Document { config, machine, .. } = &*self.document;
        let mut config = config.clone();
        overrides.apply(&mut config)?;
        let devices: Vec<_> =
            machine.devices.iter().map(|d| (d.model.as_str(), d.id.as_str())).collect();
        let config = VmConfig::restored(&config, &devices)?;
        let count = config.devices().count();
        if count != devices.len() {
            let why = format!("it has states of {} devices, and configures {count}", devices.len());
            return Err(SnapshotError::Inconsistent(why).into());
        }
        Ok(config)
    }
}

impl Own {
    /// Finds what a snapshot needs besides its memory file.
    fn find(
        place: &Place,
        document: &Document,
        (mut file, path): (File, PathBuf),
        mut extents: Vec<Extent>,
        depth: usize,
    ) -> Result<Self, SnapshotError> {
        let MemoryDocument { len, compression, .. } = document.memory;
        let is_unpacked = !compression.is_none();
        if is_unpacked {
            (file, extents) = packed::unpack(&path, &file, len, &extents)?;
        }
        let rest = match &document.memory.parent {
            None => Rest::Zeroes,
            Some(parent) if !parent.is_partial => Rest::Zeroes,
            Some(parent) if parent.is_merged(&file) => Rest::Merged,
            Some(_) if !place.has_neighbours() => {
                let why = "it goes over another snapshot, which is found from where it is itself: name its files by their \
                           paths, or have `husk snapshot merge` make it whole";
                return Err(SnapshotError::Field { field: "snapshot_path", why: why.into() });
            }
            Some(parent) => Rest::Parent(Arc::new(find_parent(place, parent, document, depth)?)),
        };
        let (file, extents) = (Arc::new(file), extents.into());
        Ok(Self { path, file, extents, is_unpacked, rest })
    }

    /// All of the memory.
    fn image(&self) -> Result<MemoryImage, SnapshotError> {
        let Self { path, file, extents, rest, .. } = self;
        match rest {
            Rest::Zeroes => Ok(MemoryImage::alone(file.clone(), extents)),
            Rest::Merged => MemoryImage::merged(file.clone(), extents)
                .map_err(SnapshotError::file("cannot look for what is in", path)),
            Rest::Parent(parent) => Ok(parent.memory.with(file, extents)),
        }
    }
}

/// Opens the snapshot that one goes over.
fn find_parent(
    place: &Place,
    parent: &ParentDocument,
    document: &Document,
    depth: usize,
) -> Result<Image, SnapshotError> {
    let at = parent.place(&place.state());
    let missing = |why: SnapshotError| SnapshotError::Parent {
        id: parent.id.clone(),
        path: at.state(),
        why: Box::new(why),
    };
    if depth + 1 >= CHAIN_MAX {
        let why = format!("the chain of snapshots is longer than {CHAIN_MAX}");
        return Err(missing(SnapshotError::Inconsistent(why)));
    }
    let found = Image::find(&at, Some(&parent.id), depth + 1).map_err(missing)?;
    if found.document.memory.len != document.memory.len {
        let why = "it has memory of another size".into();
        return Err(missing(SnapshotError::Inconsistent(why)));
    }
    Ok(found)
}
