//! From what a driver names to ranges of guest memory that are given back.
//!
//! A turn is bounded by a [`Budget`]: whoever makes a driver name all of its memory at once must not
//! keep the other devices of the thread from their work.
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::Counters;
use crate::GuestRam;
use crate::sys::discard::{DiscardError, discard};
use crate::virtio::chain::Chain;

/// Most page frame numbers in one chain. Linux sends 256, Windows up to 1024.
const MAX_FRAMES: usize = 1024;
const FRAME_BYTES: usize = size_of::<u32>();
/// Page frames are of 4 KiB, whatever pages guest and host have.
const FRAME_SHIFT: u32 = 12;
/// Ranges are cut where this divides the address, so that huge pages stay whole.
const CUT_BYTES: u64 = 2 << 20;

/// What a turn may still cost.
#[derive(Debug)]
pub(super) struct Budget {
    calls: u32,
    bytes: u64,
}

impl Budget {
    /// Worth some 10 ms where it is slow: measured were 13 us a call that gives back one page, and
    /// 1 us a page in long ranges.
    pub(super) fn of_a_turn() -> Self {
        Self { calls: 512, bytes: 32 << 20 }
    }

    pub(super) fn is_spent(&self) -> bool {
        self.calls == 0 || self.bytes == 0
    }

    fn spend(&mut self, bytes: u64) {
        self.calls = self.calls.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// As much of `len` bytes at `start` as there is budget for, to a boundary if that is not all.
    fn cut(&self, start: u64, len: u64) -> u64 {
        if len <= self.bytes {
            return len;
        }
        let end = start.saturating_add(self.bytes);
        let end = end.saturating_sub(end.checked_rem(CUT_BYTES).unwrap_or(0));
        match end.saturating_sub(start) {
            0 => self.bytes,
            whole => whole,
        }
    }
}

/// What became of the ranges in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// All of them were dealt with.
    Done,
    /// The budget is spent: the chain has to come again.
    Part,
}

/// What gives pages back for all queues of a device.
#[derive(Debug)]
pub(super) struct Pages {
    mem: GuestRam,
    counters: Arc<Counters>,
    list: Box<[u8; MAX_FRAMES * FRAME_BYTES]>,
    frames: Vec<u32>,
    has_warned: bool,
}

impl Pages {
    pub(super) fn new(mem: GuestRam, counters: Arc<Counters>) -> Self {
        let list = Box::new([0; _]);
        Self { mem, counters, list, frames: Vec::new(), has_warned: false }
    }

    /// Gives back the pages whose numbers are in what `chain` has to read (virtio 1.2, 5.5.6.1).
    pub(super) fn inflate(&mut self, chain: &Chain<'_>, budget: &mut Budget) {
        let mut from = chain.readable();
        let len = usize::try_from(from.len()).unwrap_or(usize::MAX);
        let is_list = len > 0 && len.is_multiple_of(FRAME_BYTES);
        let list = self.list.get_mut(..len).filter(|_| is_list);
        let Some(list) = list.and_then(|list| from.read(list).ok().map(|()| list)) else {
            self.counters.inflate_fails().inc();
            return;
        };
        self.frames.clear();
        let (frames, _) = list.as_chunks();
        self.frames.extend(frames.iter().map(|frame| u32::from_le_bytes(*frame)));
        self.frames.sort_unstable();
        let frames = std::mem::take(&mut self.frames);
        for (start, len) in runs(&frames) {
            match self.discard(start, len, budget) {
                Some(freed) => self.counters.inflate_freed().add(freed),
                None => self.counters.inflate_fails().inc(),
            }
        }
        self.frames = frames;
    }

    /// Gives back the ranges that are what `chain` has to write to, from the `done`th byte on, and
    /// calls `count` with what became of each: the bytes given back, if it was possible.
    pub(super) fn release(
        &mut self,
        chain: &Chain<'_>,
        done: &mut u64,
        budget: &mut Budget,
        count: impl Fn(Option<u64>),
    ) -> Progress {
        let mut rest = chain.writable();
        // Shorter than before: the driver has rewritten a chain that it does not have.
        if rest.take(std::mem::take(done)).is_err() {
            return Progress::Done;
        }
        let all = chain.writable().len();
        let mut left = rest.len();
        for buffer in rest.buffers() {
            let (mut start, mut here) = (buffer.addr.0, u64::from(buffer.len));
            while here > 0 {
                if budget.is_spent() {
                    *done = all.saturating_sub(left);
                    return Progress::Part;
                }
                let len = budget.cut(start, here);
                count(self.discard(start, len, budget));
                start = start.saturating_add(len);
                here = here.saturating_sub(len);
                left = left.saturating_sub(len);
            }
        }
        Progress::Done
    }

    fn discard(&mut self, start: u64, len: u64, budget: &mut Budget) -> Option<u64> {
        match discard(&self.mem, GuestAddress(start), len) {
            Ok(freed) => {
                budget.spend(freed);
                return Some(freed);
            }
            // The driver's fault: it is counted, and not worth a line that it could fill a log with.
            Err(e @ DiscardError::NotRam { .. }) => log::debug!("balloon: {e}"),
            Err(e) if self.has_warned => log::debug!("balloon: {e}"),
            Err(e) => {
                self.has_warned = true;
                log::warn!("balloon: {e}");
            }
        }
        budget.spend(0);
        None
    }
}

/// The ranges that sorted page frames make, in bytes: start and length.
fn runs(frames: &[u32]) -> impl Iterator<Item = (u64, u64)> {
    let is_next = |a: &u32, b: &u32| b.wrapping_sub(*a) <= 1;
    frames.chunk_by(is_next).filter_map(|run| {
        let (first, last) = (u64::from(*run.first()?), u64::from(*run.last()?));
        let count = last.saturating_sub(first).saturating_add(1);
        Some((first << FRAME_SHIFT, count << FRAME_SHIFT))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_side_by_side_are_one_range() {
        let ranges = |frames: &[u32]| runs(frames).collect::<Vec<_>>();
        assert_eq!(ranges(&[]), []);
        assert_eq!(ranges(&[7]), [(0x7000, 0x1000)]);
        assert_eq!(ranges(&[1, 2, 2, 3, 5]), [(0x1000, 0x3000), (0x5000, 0x1000)]);
        let last = u32::MAX;
        let top = (u64::from(last - 1)) << 12;
        assert_eq!(ranges(&[0, last - 1, last]), [(0, 0x1000), (top, 0x2000)]);
    }

    #[test]
    fn ranges_are_cut_between_huge_pages() {
        let budget = Budget { calls: 1, bytes: 5 << 20 };
        assert_eq!(budget.cut(0, 5 << 20), 5 << 20);
        assert_eq!(budget.cut(0, 6 << 20), 4 << 20);
        assert_eq!(budget.cut(1 << 20, 9 << 20), 5 << 20);
        assert_eq!(budget.cut(0x1000, 6 << 20), (4 << 20) - 0x1000);
        let little = Budget { calls: 1, bytes: 1 << 20 };
        assert_eq!(little.cut(0x1000, 6 << 20), 1 << 20);
        // No address is too high to be cut.
        assert!(budget.cut(u64::MAX - 0x1000, 6 << 20) > 0);
    }

    #[test]
    fn a_turn_ends() {
        let mut budget = Budget::of_a_turn();
        let mut calls = 0;
        while !budget.is_spent() {
            budget.spend(0);
            calls += 1;
        }
        assert_eq!(calls, 512);
        let mut budget = Budget::of_a_turn();
        budget.spend(1 << 40);
        assert!(budget.is_spent());
    }
}
