//! Which granules of a disk a layer has: a bit each, in chunks that are there only if one of their bits
//! is set. So it takes memory by what is written, whatever size a disk is said to have.
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of a granule: what a layer has or has not. The block size of file systems and the page size,
/// so that hardly a write is of part of one.
pub const GRANULE: u64 = 4096;
/// Words of a chunk.
const WORDS: usize = 64;
const CHUNK_WORDS: u64 = WORDS as u64;
const WORD_BITS: u64 = 64;
/// Granules of a chunk.
pub(super) const CHUNK_GRANULES: u64 = WORD_BITS.saturating_mul(CHUNK_WORDS);
/// Bytes of a chunk where it is written.
pub(super) const CHUNK_BYTES: usize = WORDS.saturating_mul(8);

type Chunk = [u64; WORDS];

/// A set of granules.
#[derive(Clone, Debug, Default)]
pub(super) struct Map {
    /// By their numbers.
    chunks: BTreeMap<u64, Box<Chunk>>,
    /// Granules in it.
    count: u64,
}

impl Map {
    /// How many granules are in it.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Whether `granule` is in it, and the end of the run of granules from there on, `end` at most, of
    /// which that is true as well.
    pub(super) fn run(&self, granule: u64, end: u64) -> (bool, u64) {
        let is_in = self.has(granule);
        let mut at = granule;
        while at < end {
            let (word, bit) = (at / WORD_BITS, at % WORD_BITS);
            let number = at / CHUNK_GRANULES;
            let Some(chunk) = self.chunks.get(&number) else {
                if is_in {
                    break;
                }
                let next = self.chunks.range(number..).next();
                at = next.map_or(end, |(next, _)| next.saturating_mul(CHUNK_GRANULES));
                continue;
            };
            let bits = chunk.get(place_in_chunk(word)).copied().unwrap_or(0);
            let others = if is_in { !bits } else { bits };
            let same = u64::from((others >> bit).trailing_zeros());
            at = at.saturating_add(same.min(WORD_BITS.saturating_sub(bit)));
            if same < WORD_BITS.saturating_sub(bit) {
                break;
            }
        }
        (is_in, at.min(end))
    }

    /// Puts granules into it; calls `changed` with each chunk that this changed.
    pub(super) fn insert(&mut self, granules: Range<u64>, mut changed: impl FnMut(u64)) {
        let mut at = granules.start;
        while at < granules.end {
            let (word, bit) = (at / WORD_BITS, at % WORD_BITS);
            let len = WORD_BITS.saturating_sub(bit).min(granules.end.saturating_sub(at));
            let ones = u64::MAX >> WORD_BITS.saturating_sub(len).min(63);
            let added = self.add(word, ones << bit);
            if added > 0 {
                self.count = self.count.saturating_add(added);
                changed(at / CHUNK_GRANULES);
            }
            at = at.saturating_add(len);
        }
    }

    /// Runs of granules that are in it, of `end` in all.
    pub(super) fn runs(&self, end: u64) -> impl Iterator<Item = Range<u64>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let (is_in, until) = self.run(at, end);
            let start = if is_in { at } else { until };
            if start >= end {
                return None;
            }
            at = self.run(start, end).1;
            Some(start..at)
        })
    }

    /// The chunks that are not empty, by their numbers, as they are written.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u64, [u8; CHUNK_BYTES])> {
        self.chunks.iter().map(|(number, chunk)| (*number, bytes(chunk)))
    }

    /// One chunk as it is written.
    pub(super) fn chunk_bytes(&self, number: u64) -> [u8; CHUNK_BYTES] {
        self.chunks.get(&number).map_or([0; CHUNK_BYTES], |chunk| bytes(chunk))
    }

    /// Adds what was written of a chunk. False if it has granules from `end` on.
    pub(super) fn read_chunk(&mut self, number: u64, bytes: &[u8; CHUNK_BYTES], end: u64) -> bool {
        let first = number.saturating_mul(CHUNK_GRANULES);
        for (n, word) in (0..).zip(bytes.as_chunks::<8>().0) {
            let word = u64::from_le_bytes(*word);
            if word == 0 {
                continue;
            }
            let start = u64::saturating_add(first, WORD_BITS.saturating_mul(n));
            let last = start.saturating_add(word.ilog2().into());
            if last >= end {
                return false;
            }
            let added = self.add(start / WORD_BITS, word);
            self.count = self.count.saturating_add(added);
        }
        true
    }

    fn has(&self, granule: u64) -> bool {
        let chunk = self.chunks.get(&(granule / CHUNK_GRANULES));
        let word = chunk.and_then(|chunk| chunk.get(place_in_chunk(granule / WORD_BITS)));
        word.is_some_and(|word| word >> (granule % WORD_BITS) & 1 != 0)
    }

    /// Sets bits of a word; how many were not set before.
    fn add(&mut self, word: u64, bits: u64) -> u64 {
        let chunk = self.chunks.entry(word / CHUNK_WORDS).or_insert_with(|| Box::new([0; WORDS]));
        let Some(word) = chunk.get_mut(place_in_chunk(word)) else { return 0 };
        let added = bits & !*word;
        *word |= bits;
        added.count_ones().into()
    }
}

/// Where the granule begins that the byte at `at` is in.
pub(super) fn floor(at: u64) -> u64 {
    at.saturating_sub(at % GRANULE)
}

fn place_in_chunk(word: u64) -> usize {
    usize::try_from(word % CHUNK_WORDS).unwrap_or(0)
}

fn bytes(chunk: &Chunk) -> [u8; CHUNK_BYTES] {
    let mut bytes = [0; CHUNK_BYTES];
    let (places, _) = bytes.as_chunks_mut::<8>();
    places.iter_mut().zip(chunk).for_each(|(place, word)| *place = word.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Reproducible noise.
    fn noise(seed: &mut u64) -> u64 {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        *seed
    }

    #[test]
    fn is_the_set_that_was_put_into_it() {
        const END: u64 = 3 * CHUNK_GRANULES + 100;
        for mut seed in 1..50 {
            let (mut map, mut model) = (Map::default(), BTreeSet::new());
            for _ in 0..20 {
                let start = noise(&mut seed) % END;
                let len = 1 + noise(&mut seed)
                    % if noise(&mut seed).is_multiple_of(4) { 5000 } else { 70 };
                let end = (start + len).min(END);
                let mut changed = BTreeSet::new();
                map.insert(start..end, |chunk| {
                    changed.insert(chunk);
                });
                let new: BTreeSet<u64> =
                    (start..end).filter(|n| model.insert(*n)).map(|n| n / CHUNK_GRANULES).collect();
                assert_eq!(changed, new);
            }
            assert_eq!(map.count(), model.len() as u64);
            let listed: Vec<u64> = map.runs(END).flatten().collect();
            assert!(listed.iter().eq(&model));
            let mut at = 0;
            while at < END {
                let (is_in, until) = map.run(at, END);
                assert!(until > at && (at..until).all(|n| model.contains(&n) == is_in));
                assert!(until == END || model.contains(&until) != is_in, "the run ends too soon");
                at = until;
            }
            let mut copy = Map::default();
            for (n, bytes) in map.chunks() {
                assert_eq!(bytes, map.chunk_bytes(n));
                assert!(copy.read_chunk(n, &bytes, END));
            }
            assert_eq!(copy.count(), map.count());
            assert!(copy.runs(END).eq(map.runs(END)));
        }
    }

    #[test]
    fn granules_behind_the_end_are_refused() {
        let mut map = Map::default();
        let mut bytes = [0; CHUNK_BYTES];
        bytes[0] = 0x80;
        assert!(!map.read_chunk(0, &bytes, 7));
        assert!(map.read_chunk(0, &bytes, 8));
        assert_eq!(map.run(0, 8), (false, 7));
        assert_eq!(map.run(7, 1 << 60), (true, 8));
        assert_eq!(map.run(8, 1 << 60), (false, 1 << 60));
    }

    #[test]
    fn takes_no_memory_for_what_is_not_in_it() {
        const END: u64 = u64::MAX / GRANULE;
        let mut map = Map::default();
        let mut bytes = [0; CHUNK_BYTES];
        bytes[0] = 1;
        // Of a file with holes, which has no more than this: a word for each chunk before it would be 32 GiB.
        let number = 1 << 32;
        assert!(map.read_chunk(number, &bytes, END));
        let granule = number * CHUNK_GRANULES;
        assert_eq!(map.chunks.len(), 1);
        assert_eq!(map.run(0, END), (false, granule));
        assert!(map.runs(END).flatten().eq([granule]));
    }
}
