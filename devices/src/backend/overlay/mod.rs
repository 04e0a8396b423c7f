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
//! freeze is to put a new top over the stack: it takes as long for a large layer as for an empty one. Where layers
//! become too many, some are made one while the guest goes on (merge.rs).
mod layer;
mod map;
mod merge;
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
use self::merge::Merge;
use self::top::{Room, Top};
use crate::backend::disk::Unmap;
use crate::backend::file::Access;
use crate::sys::rw::IoSlices;

/// Frozen layers at most, but for a while: if there are more, those that are the smallest together become one.
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
    /// Of some of them.
    merge: Option<Merge>,
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
        let frozen = Vec::new();
        Ok(Self { base, size, witness, frozen, merge: None, top, room })
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
            let new = self.room.top(self.size)?;
            let Top { layer, .. } = std::mem::replace(&mut self.top, new);
            self.frozen.push(Arc::new(layer));
            self.settle_merge();
            if let Err(e) = self.thin_out() {
                log::warn!("the layers of a disk are not made fewer: {e}");
            }
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
        self.merge = None;
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

    /// Goes on with what has been made of frozen layers, if that is done.
    fn settle_merge(&mut self) {
        if self.merge.as_ref().is_some_and(|merge| merge.settle(&mut self.frozen)) {
            self.merge = None;
        }
    }

    /// Begins to make one of some frozen layers, if there are too many.
    fn thin_out(&mut self) -> Result<(), LayerError> {
        let excess = self.frozen.len().saturating_sub(DEPTH_MAX);
        if excess == 0 || self.merge.is_some() {
            return Ok(());
        }
        let size = |layers: &&[Arc<Layer>]| {
            layers.iter().map(|layer| layer.map.count()).fold(0, u64::saturating_add)
        };
        let windows = self.frozen.windows(excess.saturating_add(1));
        let Some(smallest) = windows.min_by_key(size) else { return Ok(()) };
        let Top { layer, .. } = self.room.top(self.size)?;
        let merge = Merge::begin(smallest.to_vec(), self.size, layer);
        self.merge = Some(merge.map_err(LayerError::host("start a thread for", "layers"))?);
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn overlay() -> Overlay {
        let base = File::from(memfd_create("base", MemfdFlags::CLOEXEC).unwrap());
        base.set_len(SIZE).unwrap();
        Overlay::open(base.into(), SIZE, &Place::Memory, Keeping::AtFlush).unwrap()
    }

    /// Writes its number to each granule in turn, and freezes that.
    fn freeze(overlay: &mut Overlay, numbers: std::ops::Range<usize>) {
        for number in numbers {
            let at = number as u64 * GRANULE;
            let bytes = [u8::try_from(number).unwrap(); 4096];
            overlay.change(at, GRANULE, |top| top.write_all_at(&bytes, at)).unwrap();
            overlay.freeze().unwrap();
        }
    }

    #[test]
    fn layers_become_fewer_and_no_freeze_waits_for_it() {
        const MORE: usize = 5;
        let mut overlay = overlay();
        freeze(&mut overlay, 0..DEPTH_MAX);
        let before = overlay.frozen.clone();
        freeze(&mut overlay, DEPTH_MAX..DEPTH_MAX + 1);
        let is_there =
            |layer: &Arc<Layer>| overlay.frozen.iter().any(|other| Arc::ptr_eq(layer, other));
        assert!(before.iter().all(is_there), "a layer was copied while the guest stood still");
        freeze(&mut overlay, DEPTH_MAX + 1..DEPTH_MAX + MORE);
        let patience = Instant::now() + Duration::from_secs(60);
        while overlay.frozen.len() > DEPTH_MAX {
            assert!(Instant::now() < patience, "{} layers", overlay.frozen.len());
            overlay.settle_merge();
            overlay.thin_out().unwrap();
            std::thread::yield_now();
        }
        for number in 0..SIZE / GRANULE {
            let mut byte = [0];
            let at = number * GRANULE;
            overlay.source(at, at + 1).0.read_exact_at(&mut byte, at).unwrap();
            let is_written = number < (DEPTH_MAX + MORE) as u64;
            assert_eq!(u64::from(byte[0]), if is_written { number } else { 0 });
        }
    }

    #[test]
    fn what_is_made_of_layers_that_are_gone_is_not_used() {
        let mut overlay = overlay();
        freeze(&mut overlay, 0..1);
        let first = overlay.freeze().unwrap().unwrap();
        freeze(&mut overlay, 1..DEPTH_MAX + 1);
        let merge = overlay.merge.take().unwrap();
        overlay.adopt(&first).unwrap();
        while !merge.settle(&mut overlay.frozen) {
            std::thread::yield_now();
        }
        assert!(overlay.frozen.len() == 1 && Arc::ptr_eq(&overlay.frozen[0], &first.layers[0]));
    }
}
