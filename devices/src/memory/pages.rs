//! A set of pages: what devices have written, or what has been mapped over.
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// Bytes of a page, as x86-64 tracks them.
pub const PAGE: usize = 4096;
const BITS: usize = 64;

/// A bit for each page of a piece of memory. Any thread may set some at any time.
#[derive(Debug)]
pub struct PageSet {
    words: Box<[AtomicU64]>,
}

impl PageSet {
    /// None of the pages of `len` bytes.
    pub fn new(len: u64) -> Self {
        let words = len.div_ceil((PAGE as u64).saturating_mul(BITS as u64));
        let words = usize::try_from(words).unwrap_or(usize::MAX);
        Self { words: std::iter::repeat_with(AtomicU64::default).take(words).collect() }
    }

    /// Adds every page of which one of the `len` bytes at `offset` is.
    pub fn add(&self, offset: usize, len: usize) {
        self.for_each_word(offset, len, |word, mask| {
            // Most writes are where there were some: a look is cheaper than a locked bus.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        });
    }

    /// Takes every page out of which one of the `len` bytes at `offset` is.
    pub fn remove(&self, offset: usize, len: usize) {
        self.for_each_word(offset, len, |word, mask| {
            word.fetch_and(!mask, Ordering::Relaxed);
        });
    }

    /// Whether the page with the byte at `offset` is in it.
    pub fn contains(&self, offset: usize) -> bool {
        let mut is_in = false;
        self.for_each_word(offset, 1, |word, mask| {
            is_in = word.load(Ordering::Relaxed) & mask != 0;
        });
        is_in
    }

    /// How many runs of pages in it there are among those of which one of the `len` bytes at `offset` is,
    /// and the pages right before and behind.
    pub fn runs_at(&self, offset: usize, len: usize) -> usize {
        let first = offset.saturating_sub(PAGE);
        let end = offset.saturating_add(len).saturating_add(PAGE);
        let (mut runs, mut goes_on) = (0_usize, false);
        self.for_each_word(first, end.saturating_sub(first), |word, mask| {
            let bits = word.load(Ordering::Relaxed) & mask;
            let begin = bits & !(bits << 1 | u64::from(goes_on));
            runs = runs.saturating_add(usize::try_from(begin.count_ones()).unwrap_or(usize::MAX));
            goes_on = bits >> 63 != 0;
        });
        runs
    }

    /// All of it: bit n of word m is page 64 m + n.
    pub fn words(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Relaxed)).collect()
    }

    /// The same; afterwards it is empty.
    pub fn take(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.swap(0, Ordering::Relaxed)).collect()
    }

    fn for_each_word(&self, offset: usize, len: usize, mut f: impl FnMut(&AtomicU64, u64)) {
        let Some(last) = len.checked_sub(1).map(|more| offset.saturating_add(more) / PAGE) else {
            return;
        };
        let first = offset / PAGE;
        // Skipped before they are numbered: numbers would be counted up one by one.
        for (word, at) in self.words.iter().skip(first / BITS).zip(first / BITS..=last / BITS) {
            let base = at.saturating_mul(BITS);
            let from = first.saturating_sub(base).min(BITS);
            let to = last.saturating_sub(base).min(BITS.saturating_sub(1));
            let above = u64::MAX.checked_shl(u32::try_from(from).unwrap_or(u32::MAX)).unwrap_or(0);
            let below = u64::MAX >> (BITS.saturating_sub(1).saturating_sub(to));
            f(word, above & below);
        }
    }
}

impl<'a> WithBitmapSlice<'a> for PageSet {
    type S = PageSlice<'a>;
}

impl Bitmap for PageSet {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.add(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.contains(offset)
    }

    fn slice_at(&self, offset: usize) -> PageSlice<'_> {
        PageSlice { set: self, offset }
    }
}

/// A set of pages, as a piece of the memory sees it.
#[derive(Clone, Copy, Debug)]
pub struct PageSlice<'a> {
    set: &'a PageSet,
    offset: usize,
}

impl WithBitmapSlice<'_> for PageSlice<'_> {
    type S = Self;
}

impl BitmapSlice for PageSlice<'_> {}

impl Bitmap for PageSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.set.add(self.offset.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.set.contains(self.offset.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { set: self.set, offset: self.offset.saturating_add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_the_pages_of_every_byte() {
        let ranges = [(0, 1), (4095, 2), (63 * PAGE, PAGE + 1), (5 * PAGE + 7, 200 * PAGE), (9, 0)];
        for (offset, len) in ranges {
            let set = PageSet::new(256 * PAGE as u64);
            set.slice_at(offset).mark_dirty(0, len);
            for page in 0..256 {
                let is_touched =
                    page * PAGE < offset + len && (page + 1) * PAGE > offset && len > 0;
                assert_eq!(set.contains(page * PAGE), is_touched, "{offset}+{len}: {page}");
            }
            set.remove(offset, len);
            assert_eq!(set.take(), [0; 4]);
        }
    }

    #[test]
    fn counts_the_runs_at_a_place() {
        let set = PageSet::new(256 * PAGE as u64);
        for (first, count) in [(0, 1), (3, 2), (60, 80), (190, 2), (193, 1)] {
            set.add(first * PAGE, count * PAGE);
        }
        let runs = |first: usize, count: usize| set.runs_at(first * PAGE, count * PAGE);
        assert_eq!([runs(0, 1), runs(1, 1), runs(2, 1), runs(1, 2), runs(6, 53)], [1, 1, 1, 2, 0]);
        let long = [runs(6, 54), runs(64, 64), runs(70, 1), runs(140, 1), runs(141, 1)];
        assert_eq!(long, [1, 1, 1, 1, 0]);
        assert_eq!([runs(192, 1), runs(195, 61), runs(0, 256), runs(300, 1)], [2, 0, 5, 0]);
    }

    #[test]
    fn what_is_beyond_the_end_is_not_in_it() {
        let set = PageSet::new(PAGE as u64);
        set.add(64 * PAGE, PAGE);
        set.add(usize::MAX, 5);
        assert!(!set.contains(64 * PAGE));
        assert_eq!(set.words(), [0]);
        set.add(0, usize::MAX);
        assert_eq!((set.take(), set.take()), (vec![u64::MAX], vec![0]));
    }
}
