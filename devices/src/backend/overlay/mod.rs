//! A private, writable disk over a read-only one that many share: what is written goes to a layer over
//! it, in granules of [`GRANULE`] bytes.
//!
//! ```text
//!   reads ─► top     what was written since ─────────── a file of its own, this drive's alone
//!            frozen  … since an earlier snapshot ─┐
//!            frozen  what a snapshot holds ───────┴──── never change again, may be shared
//!            base    the image ──────────────────────── never written
//! ```
//!
//! Which granules a layer has is in memory (`map::Map`), and in the layer's file if that is kept. To
//! freeze is to put a new top over the stack: it takes as long for a large layer as for an empty one.
mod layer;
mod map;
mod top;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::layer::{Description, Layer, LayerError};
use self::layer::{granules, topmost};
pub use self::map::GRANULE;
use self::map::floor;
use self::top::{Room, Top};
use crate::backend::disk::Unmap;
use crate::backend::file::Access;
use crate::sys::rw::IoSlices;

/// Frozen layers at most: before there are more, the two that are the smallest together become one.
const DEPTH_MAX: usize = 32;

/// Where what is written goes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Place {
    /// A file without a name in `TMPDIR`, or in `/var/tmp`. It is gone when husk ends.
    Temporary,
    /// Memory of husk's. It is gone when husk ends.
    Memory,
    /// This file, made if it is missing. It is there when husk ends, and what it holds is there the next
    /// time it is named with the same base.
    File(PathBuf),
}

/// How soon a layer that is kept knows what it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeping {
    /// When the guest flushes, and at the end. What it wrote after its last flush may be lost.
    AtFlush,
    /// As it is written: only a crash of the host loses it.
    AtOnce,
}

/// The layers of a disk.
#[derive(Debug)]
pub struct Overlay {
    base: Arc<File>,
    size: u64,
    witness: u64,
    /// The oldest first.
    frozen: Vec<Arc<Layer>>,
    top: Top,
    room: Room,
}

/// What a disk holds at a moment, besides its base. Clones are the same.
#[derive(Clone, Debug)]
pub struct Frozen {
    size: u64,
    witness: u64,
    /// The oldest first.
    layers: Vec<Arc<Layer>>,
}

impl Overlay {
    /// Puts a layer over `base`, a file of `size` bytes that nobody writes.
    pub fn open(
        base: Arc<File>,
        size: u64,
        place: &Place,
        keeping: Keeping,
    ) -> Result<Self, LayerError> {
        let witness = layer::witness(&base, size);
        let witness = witness.map_err(LayerError::host("read", "the base"))?;
        let room = Room::open(place)?;
        let top = match place {
            Place::File(path) => Top::open(path, size, witness, keeping)?,
            Place::Memory | Place::Temporary => room.top(size)?,
        };
        Ok(Self { base, size, witness, frozen: Vec::new(), top, room })
    }

    /// Whether [`Self::open`] would succeed now. Leaves no trace.
    pub fn check(base: &File, size: u64, place: &Place) -> Result<(), LayerError> {
        match place {
            Place::File(path) => {
                let witness = layer::witness(base, size);
                Top::check(path, size, witness.map_err(LayerError::host("read", "the base"))?)
            }
            Place::Memory | Place::Temporary => Room::open(place)?.top(size).map(drop),
        }
    }

    /// Fills `slices` from `offset`.
    pub fn read(&self, slices: &mut IoSlices<'_>, offset: u64) -> std::io::Result<()> {
        let end = offset.saturating_add(slices.bytes());
        let mut at = offset;
        while at < end {
            let (file, until) = self.source(at, end);
            slices.read_part_at(file, at, until.saturating_sub(at))?;
            at = until;
        }
        Ok(())
    }

    /// Writes `slices` to `offset`.
    pub fn write(&mut self, slices: &mut IoSlices<'_>, offset: u64) -> std::io::Result<()> {
        let len = slices.bytes();
        self.change(offset, len, |top| slices.write_all_at(top, offset))
    }

    /// Makes a range read as zeroes.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: Unmap) -> std::io::Result<()> {
        self.change(offset, len, |top| super::disk::write_zeroes(top, offset, len, unmap))
    }

    /// Makes what is kept survive a loss of power.
    pub fn flush(&mut self) -> std::io::Result<()> {
        self.top.flush()
    }

    /// The one file that has all of a range, if there is one: whoever reads it there may do so without
    /// us.
    pub fn file_to_read(&self, offset: u64, len: u64) -> Option<&Arc<File>> {
        let end = offset.saturating_add(len);
        let (file, until) = self.source(offset, end);
        (until == end).then_some(file)
    }

    /// The file to write a range to, if it is wholly in the top layer already: whoever writes it there
    /// may do so without us.
    pub fn file_to_write(&self, offset: u64, len: u64) -> Option<&Arc<File>> {
        let end = offset.saturating_add(len).div_ceil(GRANULE);
        let run = self.top.layer.map.run(offset / GRANULE, end);
        (run == (true, end)).then_some(&self.top.layer.file)
    }

    /// Fixes what the disk holds now, and goes on with an empty layer. A layer that is kept is the
    /// user's, as a plain disk is: it goes on changing, and `None` is fixed.
    pub fn freeze(&mut self) -> Result<Option<Frozen>, LayerError> {
        if let Some(path) = self.top.path().map(Path::to_owned) {
            self.top.tell().map_err(LayerError::host("write", path))?;
            return Ok(None);
        }
        if self.top.layer.map.count() > 0 {
            if self.frozen.len() >= DEPTH_MAX {
                self.thin_out()?;
            }
            let new = self.room.top(self.size)?;
            let Top { layer, .. } = std::mem::replace(&mut self.top, new);
            self.frozen.push(Arc::new(layer));
        }
        let Self { size, witness, frozen, .. } = self;
        Ok(Some(Frozen { size: *size, witness: *witness, layers: frozen.clone() }))
    }

    /// Goes on with what `frozen` says and an empty layer of its own, whatever there was before.
    pub fn adopt(&mut self, frozen: &Frozen) -> Result<(), LayerError> {
        let path = || PathBuf::from("the layer of the snapshot");
        if frozen.size != self.size {
            return Err(LayerError::Size { path: path(), is: frozen.size, want: self.size });
        }
        if frozen.witness != self.witness {
            return Err(LayerError::OtherBase { path: path() });
        }
        if let Some(path) = self.top.path() {
            return Err(LayerError::NotOverLayer { path: path.into() });
        }
        if self.top.layer.map.count() > 0 {
            self.top = self.room.top(self.size)?;
        }
        self.frozen.clone_from(&frozen.layers);
        Ok(())
    }

    /// Which file has the byte at `at`, and the end of the run, `end` at most, of which that is true.
    fn source(&self, at: u64, end: u64) -> (&Arc<File>, u64) {
        let layers = self.frozen.iter().map(|layer| &**layer).chain([&self.top.layer]);
        let (layer, until) = topmost(layers, at / GRANULE, end.div_ceil(GRANULE));
        let file = layer.map_or(&self.base, |layer| &layer.file);
        (file, until.saturating_mul(GRANULE).min(end))
    }

    /// Changes part of the top layer, which has all granules of the range afterwards. If that fails, the
    /// granules it did not have before are as they were.
    fn change(
        &mut self,
        offset: u64,
        len: u64,
        change: impl FnOnce(&File) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let end = offset.saturating_add(len);
        let run = offset / GRANULE..end.div_ceil(GRANULE).min(granules(self.size));
        if self.top.layer.map.run(run.start, run.end) == (true, run.end) {
            return change(&self.top.layer.file);
        }
        // The first and the last granule may be changed in part: the rest is what it was.
        let last = run.end.saturating_sub(1).saturating_mul(GRANULE);
        self.fill(floor(offset), offset)?;
        self.fill(end, last.saturating_add(GRANULE).min(self.size))?;
        change(&self.top.layer.file)?;
        self.top.insert(run)
    }

    /// Copies part of a granule that the top layer has not.
    fn fill(&self, from: u64, to: u64) -> std::io::Result<()> {
        if from >= to {
            return Ok(());
        }
        let (source, _) = self.source(from, to);
        if std::ptr::eq(source, &self.top.layer.file) {
            return Ok(());
        }
        let mut bytes = [0; 4096];
        let len = usize::try_from(to.saturating_sub(from)).unwrap_or(bytes.len());
        let part = bytes.get_mut(..len).ok_or(std::io::ErrorKind::InvalidInput)?;
        source.read_exact_at(part, from)?;
        self.top.layer.file.write_all_at(part, from)
    }

    /// Makes one of two frozen layers.
    fn thin_out(&mut self) -> Result<(), LayerError> {
        let pairs = self.frozen.iter().zip(self.frozen.iter().skip(1));
        let sizes = pairs.map(|(a, b)| a.map.count().saturating_add(b.map.count()));
        let Some((first, _)) = (0_usize..).zip(sizes).min_by_key(|(_, size)| *size) else {
            return Ok(());
        };
        let both = first..first.saturating_add(2);
        let Some(pair) = self.frozen.get(both.clone()) else { return Ok(()) };
        let Top { mut layer, .. } = self.room.top(self.size)?;
        let copied = layer::flatten(pair, self.size, &layer.file, |_| Ok(()));
        layer.map = copied.map_err(LayerError::host("write", "a new layer"))?;
        self.frozen.splice(both, [Arc::new(layer)]);
        Ok(())
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        self.top.close();
    }
}

impl Frozen {
    /// Writes all of it to an empty file; what that says of itself. Gives up when `is_off` says so.
    pub fn write_to(&self, file: &File, is_off: impl Fn() -> bool) -> std::io::Result<Description> {
        layer::write_sealed(&self.layers, self.size, self.witness, file, is_off)
    }

    /// Opens what [`Self::write_to`] has written. The map is checked, the data not: [`Self::verify`].
    pub fn open(path: &Path, description: &Description) -> Result<Self, LayerError> {
        let Description { size, witness, .. } = *description;
        let file = layer::open(path, Access::Read)?;
        let (layer, found) = Layer::read(path, file, size)?;
        if found != *description || !found.is_sealed {
            return Err(LayerError::Damaged {
                path: path.into(),
                check: "it is not the layer that the snapshot was made with",
            });
        }
        Ok(Self { size, witness, layers: vec![Arc::new(layer)] })
    }

    /// Whether its data sums up to what `description` says.
    pub fn verify(&self, description: &Description) -> std::io::Result<bool> {
        match &*self.layers {
            [layer] => Ok(layer.data_sum(self.size)? == description.data_sum),
            _ => Ok(false),
        }
    }

    /// Bytes in it.
    pub fn bytes(&self) -> u64 {
        let counts = self.layers.iter().map(|layer| layer.map.count());
        counts.fold(0, u64::saturating_add).saturating_mul(GRANULE)
    }
}
