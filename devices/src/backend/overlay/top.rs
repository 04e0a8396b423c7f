//! The layer that is written to: where its file comes from, and how one that is kept knows what it has.
use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, openat, unlinkat};
use rustix::io::{Errno, retry_on_intr};

use super::layer::{self, Description, Layer, LayerError};
use super::map::Map;
use super::{Keeping, Place};
use crate::backend::file::{self, Access};
use crate::sys::rw::{self, Lock};

/// Where files without a name go if `TMPDIR` does not say: to a disk, which `/tmp` often is not.
const TEMPORARY: &str = "/var/tmp";

/// Where new layers are made. Nothing is opened by path later on.
#[derive(Debug)]
pub(super) enum Room {
    Memory,
    Directory { fd: OwnedFd, path: PathBuf },
}

impl Room {
    pub(super) fn open(place: &Place) -> Result<Self, LayerError> {
        if *place == Place::Memory {
            return Ok(Self::Memory);
        }
        let path = std::env::var_os("TMPDIR").filter(|path| !path.is_empty());
        let path = path.map_or_else(|| TEMPORARY.into(), PathBuf::from);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = retry_on_intr(|| rustix::fs::open(&path, flags, Mode::empty()));
        let fd = fd.map_err(|e| LayerError::host("open", &path)(e.into()))?;
        Ok(Self::Directory { fd, path })
    }

    /// A new layer of a disk of `size` bytes, with nothing in it.
    pub(super) fn top(&self, size: u64) -> Result<Top, LayerError> {
        let path = match self {
            Self::Memory => Path::new("memory"),
            Self::Directory { path, .. } => path,
        };
        let failed = LayerError::host("make a layer in", path);
        let file = self.file().map(File::from).map_err(std::io::Error::from);
        let sized = file.and_then(|file| {
            file.set_len(size.next_multiple_of(super::GRANULE))?;
            Ok(file)
        });
        let layer = Layer { file: Arc::new(sized.map_err(failed)?), map: Map::default() };
        Ok(Top { layer, kept: None })
    }

    fn file(&self) -> rustix::io::Result<OwnedFd> {
        let Self::Directory { fd, .. } = self else {
            return retry_on_intr(|| memfd_create("husk-overlay", MemfdFlags::CLOEXEC));
        };
        let (flags, mode) =
            (OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
        match retry_on_intr(|| openat(fd, ".", flags | OFlags::TMPFILE, mode)) {
            // Not every file system has files without a name: one that has just lost it, then.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
            made => return made,
        }
        let mut random = [0; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let name = format!(".husk-overlay-{:032x}", u128::from_ne_bytes(random));
        let file = retry_on_intr(|| openat(fd, &name, flags | OFlags::CREATE, mode))?;
        unlinkat(fd, &name, rustix::fs::AtFlags::empty())?;
        Ok(file)
    }
}

/// The layer that is written to.
#[derive(Debug)]
pub(super) struct Top {
    pub(super) layer: Layer,
    pub(super) kept: Option<Kept>,
}

/// What a layer has besides, whose file is kept.
#[derive(Debug)]
pub(super) struct Kept {
    path: PathBuf,
    size: u64,
    keeping: Keeping,
    /// Chunks of the map that the file has otherwise.
    changed: BTreeSet<u64>,
    /// A flush failed: what was written before may be lost.
    has_failed: bool,
}

impl Top {
    /// Opens the layer at `path`, or makes it.
    pub(super) fn open(
        path: &Path,
        size: u64,
        witness: u64,
        keeping: Keeping,
    ) -> Result<Self, LayerError> {
        let new = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        let layer = match new {
            Ok(file) => {
                let description =
                    Description { size, witness, is_sealed: false, map_sum: 0, data_sum: 0 };
                lock(&file, path)?;
                let written = layer::write_empty(&file, description);
                written.map_err(LayerError::host("make", path))?;
                Layer { file: Arc::new(file), map: Map::default() }
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                let file = layer::open(path, Access::ReadWrite)?;
                lock(&file, path)?;
                look(path, file, size, witness)?
            }
            Err(e) => return Err(LayerError::host("make", path)(e)),
        };
        let path = path.into();
        let kept = Kept { path, size, keeping, changed: BTreeSet::new(), has_failed: false };
        Ok(Self { layer, kept: Some(kept) })
    }

    /// Whether [`Self::open`] would succeed now.
    pub(super) fn check(path: &Path, size: u64, witness: u64) -> Result<(), LayerError> {
        match std::fs::symlink_metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                file::check_parent(path).map_err(LayerError::host("make", path))
            }
            _ => {
                let file = layer::open(path, Access::ReadWrite)?;
                match rw::can_lock(&file, Lock::Exclusive) {
                    Ok(true) => look(path, file, size, witness).map(drop),
                    Ok(false) => Err(in_use(path)),
                    Err(e) => Err(LayerError::host("lock", path)(e)),
                }
            }
        }
    }

    /// The name of a layer that is kept.
    pub(super) fn path(&self) -> Option<&Path> {
        self.kept.as_ref().map(|kept| &*kept.path)
    }

    /// Notes that the file has `granules` now.
    pub(super) fn insert(&mut self, granules: Range<u64>) -> std::io::Result<()> {
        let Self { layer, kept } = self;
        let Some(kept) = kept else {
            layer.map.insert(granules, |_chunk| {});
            return Ok(());
        };
        layer.map.insert(granules, |chunk| {
            kept.changed.insert(chunk);
        });
        match kept.keeping {
            Keeping::AtOnce => kept.write_map(layer),
            Keeping::AtFlush => Ok(()),
        }
    }

    /// Makes what is kept survive a loss of power: first the data, so that the map never tells of
    /// granules that are not there.
    pub(super) fn flush(&mut self) -> std::io::Result<()> {
        let Self { layer, kept: Some(kept) } = self else { return Ok(()) };
        if kept.has_failed {
            return Err(std::io::Error::other("an earlier flush failed"));
        }
        let mut flush = || {
            layer.file.sync_data()?;
            if !kept.changed.is_empty() {
                kept.write_map(layer)?;
                layer.file.sync_data()?;
            }
            Ok(())
        };
        let flushed = flush();
        kept.has_failed = flushed.is_err();
        flushed
    }

    /// Makes the map in the file what it is here, for whoever looks at the file now.
    pub(super) fn tell(&mut self) -> std::io::Result<()> {
        let Self { layer, kept } = self;
        kept.as_mut().map_or(Ok(()), |kept| kept.write_map(layer))
    }

    /// Leaves the file so that it can be gone on with.
    pub(super) fn close(&mut self) {
        let Self { kept: Some(kept), .. } = &*self else { return };
        if kept.has_failed || kept.changed.is_empty() {
            return;
        }
        if let Err(e) = self.flush()
            && let Some(path) = self.path()
        {
            let path = path.display();
            log::error!("overlay {path}: what was written since the last flush is lost: {e}");
        }
    }
}

impl Kept {
    fn write_map(&mut self, layer: &Layer) -> std::io::Result<()> {
        while let Some(&chunk) = self.changed.first() {
            layer::write_chunk(&layer.file, self.size, &layer.map, chunk)?;
            self.changed.remove(&chunk);
        }
        Ok(())
    }
}

fn lock(file: &File, path: &Path) -> Result<(), LayerError> {
    match rw::try_lock(file, Lock::Exclusive) {
        Ok(true) => Ok(()),
        Ok(false) => Err(in_use(path)),
        Err(e) => Err(LayerError::host("lock", path)(e)),
    }
}

fn in_use(path: &Path) -> LayerError {
    let source = std::io::Error::other("it is in use by another drive or process");
    LayerError::host("lock", path)(source)
}

/// Reads a layer that is there, and refuses it if it is another disk's or a snapshot's.
fn look(path: &Path, file: Arc<File>, size: u64, witness: u64) -> Result<Layer, LayerError> {
    let (layer, description) = Layer::read(path, file, size)?;
    match description {
        Description { is_sealed: true, .. } => Err(LayerError::Sealed { path: path.into() }),
        found if found.witness != witness => Err(LayerError::OtherBase { path: path.into() }),
        _ => Ok(layer),
    }
}
