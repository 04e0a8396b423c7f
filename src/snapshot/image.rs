//! A snapshot that was opened: judged, and ready to be made a VM of, as often as one likes.
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arch::{VcpuState, VmState};
use devices::backend::file::{self, Access, OpenError};
use devices::legacy::acpi::AcpiState;
use devices::legacy::i8042::I8042State;
use devices::legacy::rtc::RtcState;
use devices::legacy::serial::SerialState;
use devices::virtio::mmio::Saved;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::chain::{CHAIN_MAX, Parent, ParentDocument};
use super::extent::{Extent, Kind};
use super::format::StateFile;
use super::layers::{self, LayerDocument};
use super::overrides::forget_descriptors;
use super::params::{LoadParams, Place};
use super::{Overrides, SnapshotError};
use crate::config::VmConfig;
use crate::identity::IdentityState;
use crate::memory::Ram;

/// More than any state has: 32 vCPUs, 17 devices, and extents for RAM of 16 TiB are less.
const STATE_MAX: u64 = 4 << 30;

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
    /// Bytes.
    pub(crate) len: u64,
    /// Where in it the snapshot's id is, 16 bytes.
    pub(crate) id_at: u64,
    /// What follows RAM: address and bytes of each region of memory that is plugged while the guest runs.
    #[serde(default)]
    pub(crate) plugged: Vec<(u64, u64)>,
    /// The snapshot that it goes over, if it is of what has changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<ParentDocument>,
}

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
    pub(crate) memory_path: PathBuf,
    /// What of the image is in its own memory file. An image in memory has none.
    pub(super) own: Option<Own>,
    /// As what others can be changes to it.
    pub(crate) parent: Option<Parent>,
}

/// The memory file of a snapshot.
#[derive(Clone, Debug)]
pub(super) struct Own {
    pub(super) file: Arc<File>,
    pub(super) extents: Arc<[Extent]>,
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
        layers::open(state, &mut document.machine)?;
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let nothing = rustix::fs::memfd_create("husk-no-memory", flags)
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
            let opened = open_memory(place, &document).and_then(|memory| {
                // What drives have written since the beginning: those under it have nothing to add.
                if depth == 0 {
                    layers::open(&place.state(), &mut document.machine)?;
                }
                Ok(memory)
            });
            match opened {
                Ok((memory, memory_path)) => {
                    document.check(&file.extents)?;
                    let own = Own::find(place, &document, memory, file.extents, depth)?;
                    let memory = own.image(&memory_path)?;
                    let older = match &own.rest {
                        Rest::Parent(parent) => parent.parent.as_ref(),
                        Rest::Zeroes | Rest::Merged => None,
                    };
                    let before = memory.extents.clone();
                    let parent = Parent::new(&document.id, place, &memory_path, before, older);
                    let document = Arc::new(document);
                    let (own, parent) = (Some(own), Some(parent));
                    return Ok(Self { document, memory, memory_path, own, parent });
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
        let (memory_path, own, parent) = (PathBuf::new(), None, None);
        Self { document: Arc::new(document), memory, memory_path, own, parent }
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
        file: File,
        extents: Vec<Extent>,
        depth: usize,
    ) -> Result<Self, SnapshotError> {
        let rest = match &document.memory.parent {
            None => Rest::Zeroes,
            Some(parent) if !parent.is_partial => Rest::Zeroes,
            Some(parent) if parent.is_merged(&file) => Rest::Merged,
            Some(parent) => Rest::Parent(Arc::new(find_parent(place, parent, document, depth)?)),
        };
        Ok(Self { file: Arc::new(file), extents: extents.into(), rest })
    }

    /// All of the memory.
    fn image(&self, path: &Path) -> Result<MemoryImage, SnapshotError> {
        let Self { file, extents, rest } = self;
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

/// Reads and checks a state file.
pub(super) fn read_state_file(path: &Path) -> Result<(StateFile, Document), SnapshotError> {
    let file = StateFile::decode(&read_state(path)?)?;
    let document = Document::read(&file)?;
    Ok((file, document))
}

impl Document {
    fn read(file: &StateFile) -> Result<Self, SnapshotError> {
        let mut document: Self =
            serde_json::from_slice(&file.json).map_err(SnapshotError::Document)?;
        forget_descriptors(&mut document.config);
        match document.arch == std::env::consts::ARCH {
            true => Ok(document),
            false => Err(SnapshotError::Arch(document.arch)),
        }
    }

    /// Refuses numbers that could lead out of the memory file, or one device into the place of another.
    fn check(&self, extents: &[Extent]) -> Result<(), SnapshotError> {
        let wrong = |why: String| Err(SnapshotError::Inconsistent(why));
        let MemoryDocument { len, id_at, .. } = self.memory;
        if len % PAGE != 0 || id_at.checked_add(16).is_none_or(|end| end > len) {
            return wrong(format!("its id is at {id_at:#x} of {len:#x} bytes of memory"));
        }
        let is_wrong = |extent: &&Extent| {
            let Extent { start, len: size, kind, at, stored, .. } = **extent;
            let is_kept = match kind {
                Kind::Plain => stored == size,
                // There is nothing to be over.
                Kind::Zero => stored == 0 && self.memory.parent.is_some(),
            };
            start % PAGE != 0
                || u64::from(size) % PAGE != 0
                || extent.end() > len
                || at != start
                || !is_kept
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
    fn memory_name(&self) -> Result<&Path, SnapshotError> {
        let name = self.memory.file.as_deref();
        let name =
            name.filter(|name| name.file_name().is_some_and(|file| file == name.as_os_str()));
        let why = "its memory file is elsewhere: name both files";
        name.ok_or_else(|| SnapshotError::Field { field: "directory", why: why.into() })
    }
}

/// What a state file says of its files.
#[derive(Debug, Deserialize)]
pub(super) struct Summary {
    pub(super) id: String,
    memory: MemoryDocument,
}

impl Summary {
    /// Reads and checks a state file.
    pub(super) fn read(state: &Path) -> Result<Self, SnapshotError> {
        let file = StateFile::decode(&read_state(state)?)?;
        serde_json::from_slice(&file.json).map_err(SnapshotError::Document)
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

fn read_state(path: &Path) -> Result<Vec<u8>, SnapshotError> {
    let file = file::open(path, Access::Read, file::Kind::Regular)
        .map_err(|source| SnapshotError::Open { what: "state file", source })?;
    let mut bytes = Vec::new();
    let read = file.take(STATE_MAX).read_to_end(&mut bytes);
    read.map_err(SnapshotError::file("cannot read the state file", path))?;
    Ok(bytes)
}

/// Opens the memory file, under the name that it had when it was written if it did not get to the one that it was
/// to have.
fn open_memory(place: &Place, document: &Document) -> Result<(File, PathBuf), SnapshotError> {
    let check = |path: PathBuf| Ok((check_memory(&path, document)?, path));
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
        Place::Files { memory, .. } => check(memory.clone()).or_else(|e| {
            let side = super::files::side(memory, &document.id);
            if side.exists() { check(side) } else { Err(e) }
        }),
    }
}

fn check_memory(path: &Path, document: &Document) -> Result<File, SnapshotError> {
    let wrong = |why| Err(SnapshotError::Memory { path: path.into(), why });
    let failed = |source| SnapshotError::File { what: "cannot read", path: path.into(), source };
    let file = file::open(path, Access::Read, file::Kind::Regular)
        .map_err(|source| SnapshotError::Open { what: "memory file", source })?;
    let (is, want) = (file.metadata().map_err(failed)?.len(), document.memory.len);
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

/// An id as it is shown.
pub(crate) fn hex(id: &[u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(*id))
}
