//! The blocks of a memory device: which are plugged, what of the host is behind them, and what of
//! them the guest is shown.
//!
//! A block that is not plugged holds no memory of the host, and cannot be made to. The guest sees
//! nothing of a slot without plugged blocks; in others it reads zeroes there, and writing is its
//! end. Devices cannot look it up.
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::memory::{GuestRegion, Piece, Placement, PluggedMemory};
use crate::sys::map::{Access, Mapping, Pages};

/// How the memory is divided, in bytes. Each is a multiple of the one before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub(super) block: u64,
    pub(super) slot: u64,
    pub(super) total: u64,
}

impl Geometry {
    pub(super) fn slots(&self) -> u64 {
        self.total.checked_div(self.slot).unwrap_or(0)
    }

    pub(super) fn blocks(&self) -> u64 {
        self.total.checked_div(self.block).unwrap_or(0)
    }

    fn blocks_of_slot(&self, slot: u64) -> Range<u64> {
        let per_slot = self.slot.checked_div(self.block).unwrap_or(0);
        let first = slot.saturating_mul(per_slot);
        first..first.saturating_add(per_slot)
    }

    /// The slots that have some of `blocks`.
    fn slots_of(&self, blocks: &Range<u64>) -> Range<u64> {
        let bytes = self.bytes(blocks);
        let first = bytes.start.checked_div(self.slot).unwrap_or(0);
        first..bytes.end.div_ceil(self.slot)
    }

    fn bytes(&self, blocks: &Range<u64>) -> Range<u64> {
        blocks.start.saturating_mul(self.block)..blocks.end.saturating_mul(self.block)
    }
}

/// Most slots that one request plugs or unplugs something in. It is granted wholly or not at all, so
/// that nothing can come in between, and KVM takes up to 17 ms for a slot: a pause waits that long.
/// Linux asks for 2 GiB at most, a block of its own, which are so many slots of the usual size.
const SLOTS_MAX: u64 = 16;
/// The same, to step by.
const SLOTS_STEP: usize = 16;
/// Most bytes of it, or one block: giving those back takes its time too, however large slots are.
const BYTES_MAX: u64 = 2 << 30;

/// Memory in its place.
#[derive(Debug)]
pub(super) struct Blocks {
    geometry: Geometry,
    pages: Pages,
    memory: Arc<PluggedMemory>,
    place: Placement,
}

/// What became of blocks that were to be unplugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unplugged {
    /// They are, and the host has its memory back.
    Freed,
    /// They are, but the host failed to take its memory back.
    Kept,
    /// They are not: a device is in the middle of using them.
    InUse,
    /// They are not: the host has no mapping left to divide for them.
    Refused,
}

impl Blocks {
    /// Memory of which nothing is plugged.
    pub(super) fn new(geometry: Geometry, pages: Pages, place: Placement) -> io::Result<Self> {
        let mut mapping = Mapping::anonymous(geometry.total, pages, idle(pages))?;
        if place.is_recorded {
            mapping = mapping.recording();
        }
        let memory = Arc::new(PluggedMemory::new(mapping, geometry.block));
        Ok(Self { geometry, pages, memory, place })
    }

    /// How devices look it up.
    pub(super) fn region(&self) -> GuestRegion {
        GuestRegion::plugged(self.place.addr, self.memory.clone())
    }

    /// First address.
    pub(super) fn start(&self) -> u64 {
        self.place.addr.0
    }

    /// How many of `blocks` are plugged.
    pub(super) fn count(&self, blocks: Range<u64>) -> u64 {
        self.memory.count(blocks)
    }

    /// Runs of plugged blocks: first and count.
    pub(super) fn runs(&self) -> Vec<(u64, u64)> {
        self.memory.runs()
    }

    /// Plugs `blocks`, which are not. If the host refuses, nothing has changed.
    pub(super) fn plug(&self, blocks: Range<u64>) -> io::Result<()> {
        if !self.memory.divide(&blocks) {
            return Err(io::Error::other("too many places are plugged"));
        }
        let bytes = self.geometry.bytes(&blocks);
        let done = self.take(bytes.clone()).and_then(|()| self.show(&blocks));
        match done {
            Ok(()) => self.memory.plug(blocks),
            Err(_) => {
                // What cannot be given back either is of no use to anybody.
                let _ = self.give_back(bytes);
            }
        }
        done
    }

    /// Plugs `runs`, however long they are, where nothing is plugged yet. What one request is granted is
    /// never longer, so that [`Self::step`] always finds an end of what was plugged at once.
    pub(super) fn restore(&self, runs: &[Range<u64>]) -> io::Result<()> {
        runs.iter().try_for_each(|run| self.plug(run.clone()))?;
        // Afterwards: these are not worth what a run needs.
        for run in runs {
            for slot in self.geometry.slots_of(run).skip(1).step_by(SLOTS_STEP) {
                let first = self.geometry.blocks_of_slot(slot).start;
                if !self.memory.divide(&(first..run.end)) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Unplugs `blocks`, which are plugged.
    pub(super) fn unplug(&self, blocks: Range<u64>) -> Unplugged {
        if !self.memory.divide(&blocks) {
            return Unplugged::Refused;
        }
        if !self.memory.withdraw(blocks.clone(), &self.place.leases) {
            return Unplugged::InUse;
        }
        let (bytes, mapping) = (self.geometry.bytes(&blocks), self.memory.mapping());
        // First, because it is what can still be undone.
        if let Err(e) = mapping.protect(bytes.clone(), idle(self.pages)) {
            log::error!("memory hotplug: cannot take memory away: {e}");
            // A part may have gone. Bringing that back divides nothing that is not divided already.
            if mapping.protect(bytes.clone(), Access::ReadWrite).is_ok() {
                self.memory.plug(blocks);
                return Unplugged::Refused;
            }
        }
        let slots = self.geometry.slots_of(&blocks);
        let hidden = slots
            .filter(|&slot| self.is_empty(slot))
            .try_for_each(|slot| self.place.slots.hide(&self.piece(slot)?));
        // Even if it was not hidden.
        let given_back = self.give_back(bytes);
        // Nobody is shown anything once nothing is plugged: what could not be given back goes now.
        let united = hidden.and_then(|()| self.memory.unite(idle(self.pages)));
        match united.and_then(|is_anew| if is_anew { Ok(()) } else { given_back }) {
            Ok(()) => Unplugged::Freed,
            Err(e) => {
                log::error!("memory hotplug: unplugged memory stays in use: {e}");
                Unplugged::Kept
            }
        }
    }

    /// The first of `blocks`, a run that is plugged, as many as are unplugged in one go: those of a slot,
    /// or where that would take a mapping that there is not, those that were plugged in one go.
    pub(super) fn step(&self, blocks: Range<u64>) -> Range<u64> {
        let slot = self.geometry.slots_of(&blocks).start;
        let end = self.geometry.blocks_of_slot(slot).end.min(blocks.end);
        let step = self.memory.undivided(blocks.start..end);
        if self.memory.divide(&step) { step } else { self.memory.undivided(blocks) }
    }

    /// Whether plugging or unplugging `blocks` at once would take too long.
    pub(super) fn are_too_many(&self, blocks: &Range<u64>) -> bool {
        let slots = self.geometry.slots_of(blocks);
        let bytes = self.geometry.bytes(blocks);
        let len = bytes.end.saturating_sub(bytes.start);
        slots.end.saturating_sub(slots.start) > SLOTS_MAX
            || len > BYTES_MAX.max(self.geometry.block)
    }

    /// Makes memory usable, and with pages of the pool takes them: later they may be gone.
    fn take(&self, bytes: Range<u64>) -> io::Result<()> {
        self.memory.mapping().protect(bytes.clone(), Access::ReadWrite)?;
        match self.pages {
            Pages::Huge2M => self.memory.mapping().populate(bytes),
            Pages::Normal | Pages::Transparent => Ok(()),
        }
    }

    fn give_back(&self, bytes: Range<u64>) -> io::Result<()> {
        // In this order: what a write that comes in between brings is given back as well.
        let protected = self.memory.mapping().protect(bytes.clone(), idle(self.pages));
        self.memory.mapping().discard(bytes, idle(self.pages)).and(protected)
    }

    /// Shows the guest the slots of `blocks` that it does not see yet.
    fn show(&self, blocks: &Range<u64>) -> io::Result<()> {
        let mut shown = Vec::new();
        for slot in self.geometry.slots_of(blocks).filter(|&slot| self.is_empty(slot)) {
            let piece = self.piece(slot)?;
            if let Err(e) = self.place.slots.show(&piece) {
                for piece in &shown {
                    self.place.slots.hide(piece)?;
                }
                return Err(e);
            }
            shown.push(piece);
        }
        Ok(())
    }

    fn is_empty(&self, slot: u64) -> bool {
        self.memory.count(self.geometry.blocks_of_slot(slot)) == 0
    }

    fn piece(&self, slot: u64) -> io::Result<Piece> {
        let number = u32::try_from(slot).map_err(|_| io::ErrorKind::InvalidInput)?;
        let offset = slot.saturating_mul(self.geometry.slot);
        Ok(Piece {
            slot: number,
            addr: vm_memory::GuestAddress(self.start().saturating_add(offset)),
            host: self.memory.mapping().host_address(offset),
            len: self.geometry.slot,
            is_read_only: false,
        })
    }
}

/// What a block that is not plugged allows. Reading: Linux reads a word past the end of a page where
/// that is faster, and whoever reads zeroes takes no memory. Except of the host's pool, which has no
/// page of zeroes for it.
fn idle(pages: Pages) -> Access {
    match pages {
        Pages::Normal | Pages::Transparent => Access::Read,
        Pages::Huge2M => Access::None,
    }
}
