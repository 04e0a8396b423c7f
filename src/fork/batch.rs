//! What the zygote is sent, and what children say: JSON in a file in memory, and in messages.
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use devices::backend::overlay::{Description, Frozen};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::retry_on_intr;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::freeze::{seal, sealable_file};
use crate::config::{Defaults, LoggerConfig, Payload};
use crate::snapshot::{Document, EXTENT_LEN, Extent, Image, MemoryImage};

/// What children have of the process that their parent runs in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Household {
    /// Whether it has the manners of `firecracker`.
    pub(crate) is_firecracker: bool,
    /// Where the parent listens.
    pub(crate) api_sock: PathBuf,
    /// Largest body of a request.
    pub(crate) body_limit: usize,
}

/// What a child is to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) id: String,
    /// `None` in a library.
    pub(crate) api_sock: Option<PathBuf>,
    /// As in `GET /vm/config`.
    pub(crate) config: Value,
    /// The guest's metadata.
    pub(crate) mmds: Option<Value>,
    /// What the guest is given.
    pub(crate) payload: Option<Payload>,
    pub(crate) is_paused: bool,
    pub(crate) ends_with_parent: bool,
}

/// Children of one image.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Batch {
    pub(crate) household: Household,
    pub(crate) defaults: Defaults,
    /// How the parent logs.
    pub(crate) logger: LoggerConfig,
    pub(crate) document: Document,
    pub(crate) layers: Vec<Layer>,
    /// Where each child's [`Spec`] is in a file that nobody reads but the child, and that no further than that: what
    /// one tenant is given is never in the memory of another's process.
    pub(crate) children: Vec<Range<u64>>,
}

/// What a device had written on the host, in a file of its own.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Layer {
    /// Which of the document's devices.
    device: usize,
    description: Description,
}

/// What children are told, a byte each. Nothing, if nobody is left to tell them: that is [`DIE`] too.
pub(super) const LIVE: u8 = 1;
/// The other.
pub(super) const DIE: u8 = 0;

/// What a child says when it is there, or why it is not; or what the zygote says of it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    /// Which child, from 0.
    pub(super) index: usize,
    pub(super) result: Result<Arrival, Absence>,
}

/// Why a child is not there.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Absence {
    /// It says why.
    Refused(String),
    /// Its process has ended, whatever it had said.
    Ended,
}

/// A child that is there.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Arrival {
    pub(super) pid: u32,
    pub(super) serial_path: Option<PathBuf>,
}

/// A child in its own process: what it is to be, and how it tells.
#[derive(Debug)]
pub(crate) struct Newborn {
    pub(crate) household: Household,
    pub(crate) defaults: Defaults,
    pub(crate) logger: LoggerConfig,
    pub(crate) spec: Spec,
    /// What it is restored from.
    pub(crate) image: Image,
    index: usize,
    reports: OwnedFd,
    go: OwnedFd,
}

impl Batch {
    /// Writes what devices had written to files in memory, in the order of [`Self::layers`].
    pub(super) fn write_layers(&mut self) -> io::Result<Vec<File>> {
        let mut files = Vec::new();
        for (device, saved) in self.document.machine.devices.iter().enumerate() {
            if let Some(frozen) = saved.state.files() {
                let file = sealable_file(c"husk-layer")?;
                let description = frozen.write_to(&file, || false)?;
                seal(&file)?;
                self.layers.push(Layer { device, description });
                files.push(file);
            }
        }
        Ok(files)
    }

    /// Gives devices what they had written, once the batch has been read.
    pub(super) fn adopt_layers(&mut self, files: &[File]) -> io::Result<()> {
        for (Layer { device, description }, file) in self.layers.iter().zip(files) {
            let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let frozen = Frozen::open(&path, description).map_err(io::Error::other)?;
            if let Some(saved) = self.document.machine.devices.get_mut(*device) {
                saved.state.set_files(frozen);
            }
        }
        Ok(())
    }

    /// Writes what children are to be to a file in memory.
    pub(super) fn write_specs(&mut self, specs: &[Spec]) -> io::Result<File> {
        let mut file =
            File::from(retry_on_intr(|| memfd_create("husk-children", MemfdFlags::CLOEXEC))?);
        let mut at = 0;
        for spec in specs {
            let json = serde_json::to_vec(spec)?;
            file.write_all(&json)?;
            let end = at + json.len() as u64;
            self.children.push(at..end);
            at = end;
        }
        Ok(file)
    }

    /// Writes it, and the extents of an image, to a file in memory.
    pub(super) fn to_file(&self, extents: &[Extent]) -> io::Result<File> {
        let flags = MemfdFlags::CLOEXEC;
        let mut file = File::from(retry_on_intr(|| memfd_create("husk-fork", flags))?);
        let json = serde_json::to_vec(self)?;
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json);
        bytes.extend(extents.iter().flat_map(|extent| extent.to_bytes()));
        file.write_all(&bytes)?;
        Ok(file)
    }

    /// The same, read.
    pub(super) fn from_file(file: &File) -> io::Result<(Self, Vec<Extent>)> {
        let wrong = || io::Error::from(io::ErrorKind::InvalidData);
        let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).map_err(|_| wrong())?];
        file.read_exact_at(&mut bytes, 0)?;
        let (len, rest) = bytes.split_first_chunk().ok_or_else(wrong)?;
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| wrong())?;
        let (json, table) = rest.split_at_checked(len).ok_or_else(wrong)?;
        let (records, _) = table.as_chunks::<EXTENT_LEN>();
        let extents: Option<Vec<_>> = records.iter().map(Extent::from_bytes).collect();
        Ok((serde_json::from_slice(json)?, extents.ok_or_else(wrong)?))
    }
}

impl Spec {
    /// Reads that of one child.
    pub(super) fn read(file: &File, place: &Range<u64>) -> io::Result<Self> {
        let len = usize::try_from(place.end.saturating_sub(place.start)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, place.start)?;
        Ok(serde_json::from_slice(&bytes)?)
    }
}

impl Newborn {
    /// Child `index` of a batch.
    pub(super) fn new(
        batch: Batch,
        mut spec: Spec,
        memory: MemoryImage,
        index: usize,
        (reports, go): (OwnedFd, OwnedFd),
    ) -> Self {
        // Moved, not copied: what is not touched stays shared with its siblings.
        let Batch { household, defaults, logger, mut document, children, .. } = batch;
        // Nor given back: whoever frees memory writes to it, and then has a copy of it.
        std::mem::forget(children);
        std::mem::forget(std::mem::replace(&mut document.config, spec.config.take()));
        let image = Image::in_memory(document, memory);
        std::mem::forget(image.document.clone());
        Self { household, defaults, logger, spec, image, index, reports, go }
    }

    /// Tells that it is there, or why it is not.
    pub(crate) fn report(&self, result: Result<Option<PathBuf>, String>) -> io::Result<()> {
        let arrival = |serial_path| Arrival { pid: std::process::id(), serial_path };
        let result = result.map(arrival).map_err(Absence::Refused);
        Report { index: self.index, result }.send(&self.reports)
    }

    /// Waits until all its siblings are there. False if it is not to live: then whoever waits sees its
    /// end when this is dropped.
    pub(crate) fn may_live(&self) -> bool {
        let mut word = [DIE];
        let read = retry_on_intr(|| rustix::io::read(&self.go, &mut word));
        read == Ok(1) && word == [LIVE]
    }
}

/// Longest text of a report: a message has to be sent whole.
const TEXT_MAX: usize = 4096;

impl Report {
    pub(super) fn send(mut self, socket: &OwnedFd) -> io::Result<()> {
        if let Err(Absence::Refused(why)) = &mut self.result
            && let Some((at, _)) = why.char_indices().find(|(at, _)| *at >= TEXT_MAX)
        {
            why.truncate(at);
        }
        let message = serde_json::to_vec(&self)?;
        retry_on_intr(|| rustix::net::send(socket, &message, rustix::net::SendFlags::NOSIGNAL))?;
        Ok(())
    }
}
