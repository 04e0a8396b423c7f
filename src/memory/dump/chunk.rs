//! Pages in a row, few enough for sets of them to be the bits of a word.
#![expect(unsafe_code, reason = "reads guest memory")]

use super::PAGE;
use crate::snapshot::{Extent, Kind};

/// Pages of one extent at most: a bit each in a word.
pub(super) const CHUNK_PAGES: usize = Extent::LEN_MAX as usize / PAGE;
/// Bytes of an entry of the page map.
pub(super) const ENTRY: usize = 8;
/// The page is in memory (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
/// The page is in swap.
const SWAPPED: u64 = 1 << 62;
/// The page is a file's, or shared: it has not been written through a private mapping.
const OF_FILE: u64 = 1 << 61;

/// A page that is not as the guest has it: which of its chunk, and its bytes.
pub(super) type Patched = (usize, [u8; PAGE]);

/// Some pages in a row. Of each set a bit is a page.
pub(super) struct Chunk {
    /// Where they are in this process.
    pub(super) host: u64,
    /// Where they are in the image.
    pub(super) start: u64,
    /// Those that there are.
    pub(super) all: u64,
    /// Those that may not be as what is behind memory.
    pub(super) written: u64,
    /// Those that may not be zero.
    pub(super) present: u64,
    /// Those that may not have been zero in another snapshot.
    pub(super) before: u64,
}

impl Chunk {
    pub(super) fn pages(&self, first: usize, count: usize) -> &[u8] {
        let host = self.host + (first * PAGE) as u64;
        // SAFETY: the pages are guest memory, which this process alone has as it is, and nobody
        // writes.
        unsafe { std::slice::from_raw_parts(host as *const u8, count * PAGE) }
    }

    pub(super) fn page<'a>(&'a self, n: usize, patched: Option<&'a Patched>) -> &'a [u8] {
        match patched {
            Some((page, bytes)) if *page == n => bytes,
            _ => self.pages(n, 1),
        }
    }

    /// Which of `wanted` are not zero, and the one that is patched.
    pub(super) fn full(&self, wanted: u64, patched: Option<&Patched>) -> u64 {
        let of_patch = patched.map_or(0, |(page, _)| 1 << page);
        let is_full = |n: &usize| wanted & 1 << n != 0 && !is_zero(self.page(*n, patched));
        (0..CHUNK_PAGES).filter(is_full).fold(of_patch, |full, n| full | 1 << n)
    }

    /// An extent of `count` pages from the `first` on.
    pub(super) fn extent(&self, first: usize, count: usize, kind: Kind, sum: u64) -> Extent {
        let start = self.start + (first * PAGE) as u64;
        let len = u32::try_from(count * PAGE).unwrap_or(Extent::LEN_MAX);
        let stored = if kind == Kind::Zero { 0 } else { len };
        Extent { start, len, kind, at: start, stored, sum }
    }
}

pub(super) static ZEROS: [u8; PAGE] = [0; PAGE];

/// Which pages this process has touched, a bit each; written, if an image is behind them.
pub(super) fn touched(entries: &[[u8; ENTRY]], has_base: bool) -> u64 {
    entries.iter().enumerate().fold(0, |bits, (n, entry)| {
        let entry = u64::from_le_bytes(*entry);
        let is_touched =
            entry & SWAPPED != 0 || (entry & PRESENT != 0 && (!has_base || entry & OF_FILE == 0));
        bits | u64::from(is_touched) << n
    })
}

/// Runs of bits: the first of each, and how many.
pub(super) fn runs(mut bits: u64) -> impl Iterator<Item = (usize, usize)> {
    std::iter::from_fn(move || {
        let first = bits.trailing_zeros();
        let count = bits.checked_shr(first)?.trailing_ones();
        bits &= u64::MAX.checked_shl(first + count).unwrap_or(0);
        Some((first as usize, count as usize))
    })
}

/// `count` bits from the `first` on.
pub(super) fn mask(first: usize, count: usize) -> u64 {
    (u64::MAX >> (CHUNK_PAGES - count)) << first
}

fn is_zero(page: &[u8]) -> bool {
    // In words, which the compiler makes vectors of.
    let (words, _) = page.as_chunks::<16>();
    words
        .chunks(16)
        .all(|words| words.iter().fold(0, |all, word| all | u128::from_ne_bytes(*word)) == 0)
}

/// The extents of an image, looked up in order.
pub(super) struct Coverage<'a>(pub(super) &'a [Extent]);

impl Coverage<'_> {
    /// Which of `count` pages from `start` are in extents, a bit each. Starts only grow.
    pub(super) fn pages(&mut self, start: u64, count: usize) -> u64 {
        let end = start + (count * PAGE) as u64;
        while let [first, rest @ ..] = self.0
            && first.end() <= start
        {
            self.0 = rest;
        }
        let mut bits = 0;
        for extent in self.0.iter().take_while(|extent| extent.start < end) {
            let from = super::usize_of(extent.start.max(start) - start) / PAGE;
            let to = super::usize_of(extent.end().min(end) - start).div_ceil(PAGE);
            (from..to).for_each(|n| bits |= 1 << n);
        }
        bits
    }
}
