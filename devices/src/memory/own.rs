//! Memory that devices bring along: files (pmem) and memory that is plugged while the guest runs.
//!
//! ```text
//!  OwnMemory ──place(address, slots, leases)──► GuestRegion    for device buffers
//!      │                                            │ shares
//!      └──show, hide──► Slots (KVM)              Mapping
//! ```
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use vm_memory::GuestAddress;

use super::backing::Runs;
use super::{GuestRegion, Leases};
use crate::GuestSlice;
use crate::sys::map::{Access, Mapping};
use crate::virtio::model::DeviceError;

/// A device's memory that the guest sees at an address of the VMM's choice.
pub trait OwnMemory {
    /// Bytes of the guest's address space that it takes, a multiple of
    /// [`crate::sys::map::ALIGNMENT`].
    fn size(&self) -> u64;
    /// Most pieces of it that are shown to the guest at once.
    fn slots(&self) -> u64;
    /// Takes its place in a new machine, in the state in which a machine is switched on.
    fn place(&mut self, place: Placement) -> Result<GuestRegion, DeviceError>;
    /// Refuses what was not saved of such memory, before it has a place.
    fn check(&self, _saved: &Value) -> Result<(), DeviceError> {
        Ok(())
    }
    /// What is to be saved of it, besides its contents: `null` if nothing is.
    fn save(&self) -> Value;
    /// Brings about what was saved, in its place; the contents come afterwards.
    fn restore(&mut self, saved: &Value) -> Result<(), DeviceError>;
}

/// The place of a device's memory in a machine.
#[derive(Clone, Debug)]
pub struct Placement {
    /// First address.
    pub addr: GuestAddress,
    /// How to show it to the guest.
    pub slots: Arc<dyn Slots>,
    /// Who may be using it.
    pub leases: Arc<Leases>,
    /// Whether husk's writes to it are recorded.
    pub is_recorded: bool,
}

/// Shows host memory to the guest: KVM's memory slots, or a test's stand-in.
pub trait Slots: Debug + Send + Sync {
    /// The guest sees `piece` from now on. Its slot is free.
    fn show(&self, piece: &Piece) -> io::Result<()>;
    /// The guest sees it no more.
    fn hide(&self, piece: &Piece) -> io::Result<()>;
}

/// Host memory, and where the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which of the device's slots it takes, from 0.
    pub slot: u32,
    /// Where the guest sees it.
    pub addr: GuestAddress,
    /// Where it is in this process.
    pub host: u64,
    /// Bytes.
    pub len: u64,
    /// Whether the guest may only read it.
    pub is_read_only: bool,
}

/// A file in the guest's memory. Devices reach it with system calls only, which fail where the
/// file has become shorter; an ordinary access would be a SIGBUS.
#[derive(Debug)]
pub struct FileMemory {
    mapping: Mapping,
    is_gone: AtomicBool,
}

impl FileMemory {
    /// Memory over `mapping`.
    pub fn new(mapping: Mapping) -> Self {
        Self { mapping, is_gone: AtomicBool::new(false) }
    }

    /// What is mapped.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Makes it impossible to look up, for good. False if somebody goes on using it.
    pub fn withdraw(&self, leases: &Leases) -> bool {
        self.is_gone.store(true, Ordering::SeqCst);
        leases.wait_for_others()
    }

    pub(super) fn slice(&self, offset: u64, count: usize) -> Option<GuestSlice<'_>> {
        match self.is_gone.load(Ordering::SeqCst) {
            true => None,
            false => self.mapping.slice(offset, count),
        }
    }
}

/// Memory in blocks, of which those that are plugged can be used.
#[derive(Debug)]
pub struct PluggedMemory {
    mapping: Mapping,
    block_size: u64,
    /// A bit for each block.
    plugged: Vec<AtomicU64>,
    cuts: Mutex<Cuts>,
}

/// Where the kernel may have divided a mapping, of which a process has so many.
///
/// What has been divided once counts as divided. Linux does not always join two pieces that allow the
/// same again: not if each was written to while it was on its own, nor of huge pages, nor what is an
/// image's. A guest can bring that about, so the number of plugged runs says too little.
#[derive(Debug, Default)]
struct Cuts {
    /// The blocks that have one before them.
    before: BTreeSet<u64>,
    /// What they cost.
    runs: Runs,
}

impl PluggedMemory {
    /// Memory over `mapping`, nothing of it plugged. A block has `block_size` bytes, not 0.
    pub fn new(mapping: Mapping, block_size: u64) -> Self {
        let blocks = mapping.len().checked_div(block_size).unwrap_or(0);
        let words = usize::try_from(blocks.div_ceil(64)).unwrap_or(0);
        let plugged = std::iter::repeat_with(AtomicU64::default).take(words).collect();
        Self { mapping, block_size, plugged, cuts: Mutex::default() }
    }

    /// What is mapped.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// How many of `blocks` are plugged.
    pub fn count(&self, blocks: Range<u64>) -> u64 {
        let words = self.words(blocks);
        words.map(|(word, mask)| u64::from((word.load(Ordering::SeqCst) & mask).count_ones())).sum()
    }

    /// Says that all of `blocks` can be used.
    pub fn plug(&self, blocks: Range<u64>) {
        self.words(blocks).for_each(|(word, mask)| {
            word.fetch_or(mask, Ordering::SeqCst);
        });
    }

    /// Makes it impossible to look `blocks` up, which are plugged. False, and they can be used as
    /// before, if somebody goes on using what may be one of them.
    pub fn withdraw(&self, blocks: Range<u64>, leases: &Leases) -> bool {
        let before: Vec<u64> = self
            .words(blocks.clone())
            .map(|(word, mask)| word.fetch_and(!mask, Ordering::SeqCst) & mask)
            .collect();
        let is_gone = leases.wait_for_others();
        if !is_gone {
            self.words(blocks).zip(before).for_each(|((word, _), was)| {
                word.fetch_or(was, Ordering::SeqCst);
            });
        }
        is_gone
    }

    /// Runs of blocks that are plugged: first and count. Words of which nothing is plugged cost nothing
    /// but a look.
    pub fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (base, word) in (0..).step_by(64).zip(&self.plugged) {
            let mut bits = word.load(Ordering::SeqCst);
            while bits != 0 {
                let from = bits.trailing_zeros();
                let len = bits.wrapping_shr(from).trailing_ones();
                let first = u64::saturating_add(base, from.into());
                match runs.last_mut() {
                    Some((at, count)) if at.saturating_add(*count) == first => {
                        *count = count.saturating_add(len.into());
                    }
                    _ => runs.push((first, len.into())),
                }
                // Without its lowest run: a carry goes through it, and nothing else of it is lost.
                bits &= bits.wrapping_add(1_u64.wrapping_shl(from));
            }
        }
        runs
    }

    /// Says that access to `blocks` is about to become another than that around them, which may divide
    /// the mapping at their ends. False, and nothing has changed, if the process has no more mappings
    /// for such.
    pub fn divide(&self, blocks: &Range<u64>) -> bool {
        let end = self.mapping.len().checked_div(self.block_size).unwrap_or(0);
        let mut cuts = self.cuts();
        let is_new = |at: &u64| *at > 0 && *at < end && !cuts.before.contains(at);
        let new: Vec<u64> = [blocks.start, blocks.end].into_iter().filter(is_new).collect();
        // Two to a run.
        let count = cuts.before.len().saturating_add(new.len()).div_ceil(2);
        let is_had = cuts.runs.set(count);
        if is_had {
            cuts.before.extend(new);
        }
        is_had
    }

    /// The first of `blocks`, up to where the mapping may be divided already.
    pub fn undivided(&self, blocks: Range<u64>) -> Range<u64> {
        let inner = blocks.start.saturating_add(1)..blocks.end.max(blocks.start.saturating_add(1));
        let cut = self.cuts().before.range(inner).next().copied();
        blocks.start..cut.unwrap_or(blocks.end)
    }

    /// Maps the whole anew as one piece, all zero, which allows `access`, if it may be divided and nothing
    /// of it is plugged. Whether it was.
    pub fn unite(&self, access: Access) -> io::Result<bool> {
        let mut cuts = self.cuts();
        if cuts.before.is_empty() || self.plugged.iter().any(|w| w.load(Ordering::SeqCst) != 0) {
            return Ok(false);
        }
        self.mapping.renew(access)?;
        cuts.before.clear();
        cuts.runs.set(0);
        Ok(true)
    }

    fn cuts(&self) -> MutexGuard<'_, Cuts> {
        self.cuts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The words with the bits of `blocks`, each with a mask of them. Only these are looked at: it is
    /// done for each access of a device.
    fn words(&self, blocks: Range<u64>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let first = blocks.start / 64;
        let skipped = usize::try_from(first).unwrap_or(usize::MAX);
        let bases = (first.saturating_mul(64)..blocks.end).step_by(64);
        bases.zip(self.plugged.iter().skip(skipped)).filter_map(move |(base, word)| {
            let from = blocks.start.max(base).saturating_sub(base);
            let to = blocks.end.min(base.saturating_add(64)).saturating_sub(base);
            let count = to.checked_sub(from).filter(|&count| count > 0)?;
            let ones = u64::MAX.checked_shr(u32::try_from(64u64.saturating_sub(count)).ok()?)?;
            Some((word, ones.checked_shl(u32::try_from(from).ok()?)?))
        })
    }

    /// `count` bytes from `offset`, if every block that they touch is plugged.
    pub(super) fn slice(&self, offset: u64, count: usize) -> Option<GuestSlice<'_>> {
        let first = offset.checked_div(self.block_size)?;
        let end = offset.checked_add(count as u64)?;
        let blocks = first..end.div_ceil(self.block_size).max(first);
        let want = blocks.end.saturating_sub(blocks.start);
        (self.count(blocks) == want).then(|| self.mapping.slice(offset, count))?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::sys::map::{ALIGNMENT, Pages};

    const BLOCK: u64 = 4096;

    fn memory(left: &'static AtomicUsize) -> PluggedMemory {
        let mapping = Mapping::anonymous(ALIGNMENT, Pages::Normal, Access::Read).unwrap();
        let memory = PluggedMemory::new(mapping, BLOCK);
        memory.cuts().runs = Runs::none(left);
        memory
    }

    fn left(runs: usize) -> &'static AtomicUsize {
        Box::leak(Box::new(AtomicUsize::new(runs)))
    }

    #[test]
    fn runs_go_on_from_word_to_word() {
        let memory = memory(left(0));
        let runs = [(0, 1), (2, 3), (60, 4), (65, 63), (130, 190), (511, 1)];
        for (first, count) in runs {
            memory.plug(first..first + count);
        }
        assert_eq!(memory.runs(), runs);
        memory.plug(0..512);
        assert_eq!(memory.runs(), [(0, 512)]);
    }

    #[test]
    fn memory_is_divided_in_so_many_places() {
        let left = left(2);
        let (one, other) = (memory(left), memory(left));
        // The ends of the whole are not where it is divided.
        assert!(one.divide(&(0..512)) && one.divide(&(0..8)) && one.divide(&(510..512)));
        assert_eq!(left.load(Ordering::Relaxed), 1);
        assert!(one.divide(&(8..16)) && one.divide(&(8..9)) && one.divide(&(16..510)));
        assert!(!one.divide(&(7..9)) && !one.divide(&(100..110)), "no more are left");
        // Linux may not join what could be joined: nothing is given back.
        one.plug(0..16);
        assert!(!one.divide(&(100..110)));
        assert_eq!(one.undivided(0..512), 0..8);
        assert_eq!(one.undivided(9..512), 9..16);
        assert_eq!(one.undivided(16..100), 16..100);
        assert!(!other.divide(&(1..2)));
        drop(one);
        assert!(other.divide(&(1..2)) && other.divide(&(3..4)) && !other.divide(&(5..6)));
        other.plug(3..4);
        assert!(!other.unite(Access::Read).unwrap());
        assert!(other.withdraw(3..4, &Leases::default()));
        assert!(other.unite(Access::Read).unwrap() && !other.unite(Access::Read).unwrap());
        assert_eq!((left.load(Ordering::Relaxed), other.undivided(0..512)), (2, 0..512));
    }
}
