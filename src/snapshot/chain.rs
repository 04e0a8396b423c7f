//! Snapshots of what has changed since another one, the parent, and what they need of it.
//!
//! ```text
//!   Full ◄──parent── Diff ◄──parent── Diff        the memory of the last one:
//!     │                │                │           its own pages, over those of the one before,
//!     └── mapped ──────┴── laid over ───┴─►         over those of the first
//! ```
//!
//! The memory file of a Diff is as long as the image, and sparse: a hole is what has not changed, and its
//! pages are at their places. So it can be merged by copying what is in it over the file of its parent,
//! and such a file can be loaded with the state of the Diff. It has the Diff's id by then, as has the Diff's own file;
//! what tells them apart are witnesses: pages of the parent that have not changed, and their sums.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::SnapshotError;
use super::extent::{Extent, Kind, checksum};
use super::image::{MemoryImage, Segment};
use super::opening::Summary;
use super::params::Place;

/// Bytes of a page.
const PAGE: u64 = PAGE_LEN as u64;
const PAGE_LEN: usize = 4096;
/// Most witnesses that are called.
const WITNESSES_MAX: u64 = 64;
/// Most snapshots in a chain. The next one is complete.
pub(super) const CHAIN_MAX: usize = 64;

/// What a state file says of the snapshot that its own goes over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ParentDocument {
    pub(crate) id: String,
    /// Its state file, seen from the directory of this one's.
    pub(crate) state: PathBuf,
    /// Its memory file, if it is not beside its state file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory: Option<PathBuf>,
    /// Whether something is in the parent only. If not, the parent is not needed.
    pub(crate) is_partial: bool,
    /// Pages that are in the parent only, and their sums.
    #[serde(default)]
    pub(crate) witnesses: Vec<(u64, u64)>,
}

/// A snapshot that others can be changes to.
#[derive(Clone, Debug)]
pub(crate) struct Parent {
    pub(crate) id: String,
    /// Where it is.
    pub(super) place: Place,
    /// What of its memory may not be zero.
    pub(super) before: Arc<[Extent]>,
    /// The memory files that it needs, its own first.
    pub(super) needs: Vec<PathBuf>,
}

/// A snapshot that is not where it was.
#[derive(Debug)]
pub(super) struct Missing {
    pub(super) id: String,
    /// Where its state file should be.
    pub(super) path: PathBuf,
    pub(super) why: SnapshotError,
}

impl Parent {
    /// A snapshot by itself, or with what its own parent needs.
    pub(super) fn new(
        id: &str,
        place: &Place,
        memory: &Path,
        before: Arc<[Extent]>,
        older: Option<&Self>,
    ) -> Self {
        let mut needs = vec![absolute(memory)];
        needs.extend(older.iter().flat_map(|older| older.needs.iter().cloned()));
        let place = match place {
            Place::Directory(directory) => Place::Directory(absolute(directory)),
            Place::Files { state, memory } => {
                Place::Files { state: absolute(state), memory: absolute(memory) }
            }
        };
        Self { id: id.into(), place, before, needs }
    }

    /// Whether a snapshot in this place can go over this one: the chain is not too long, and nothing that it
    /// needs would be taken away.
    pub(super) fn allows(&self, place: &Place) -> bool {
        self.needs.len() < CHAIN_MAX && !self.is_replaced_by(place)
    }

    fn is_replaced_by(&self, place: &Place) -> bool {
        match place {
            Place::Directory(directory) => {
                let directory = absolute(directory);
                self.needs.iter().any(|memory| memory.parent() == Some(&directory))
            }
            Place::Files { memory, .. } => self.needs.contains(&absolute(memory)),
        }
    }

    /// Looks whether it is where it was, and what it goes over: others may have taken it away, or have put another
    /// snapshot in its place.
    pub(super) fn look(&self) -> Result<(), Missing> {
        let (mut place, mut id) = (self.place.clone(), self.id.clone());
        for _ in 0..CHAIN_MAX {
            match look_at(&place, &id) {
                Ok(Some(older)) => (place, id) = (older.place(&place.state()), older.id),
                Ok(None) => break,
                Err(why) => return Err(Missing { id, path: place.state(), why }),
            }
        }
        Ok(())
    }

    /// How a snapshot with its state file at `state` names it.
    pub(super) fn document(&self, state: &Path) -> ParentDocument {
        let from = absolute(state);
        let from = from.parent().unwrap_or(Path::new("/"));
        let memory = match &self.place {
            Place::Directory(_) => None,
            Place::Files { memory, .. } => Some(relative(from, memory)),
        };
        let (id, state) = (self.id.clone(), relative(from, &self.place.state()));
        ParentDocument { id, state, memory, is_partial: true, witnesses: Vec::new() }
    }

    /// Pages of it that may serve as witnesses, spread over all of it; none that is known to have
    /// `changed`.
    pub(super) fn witnesses(&self, changed: Option<&[u64]>) -> Vec<u64> {
        let pages = |extent: &Extent| u64::from(extent.len) / PAGE;
        let total: u64 = self.before.iter().map(pages).sum();
        // Some are zero, though their extent is not.
        let step = (total / (8 * WITNESSES_MAX)).max(1);
        let has_changed = |page: u64| {
            let word = changed.and_then(|words| words.get(usize::try_from(page / 64).ok()?));
            word.is_some_and(|word| word & 1 << (page % 64) != 0)
        };
        let all = self.before.iter().flat_map(|extent| extent.start / PAGE..extent.end() / PAGE);
        let some = all.step_by(usize::try_from(step).unwrap_or(usize::MAX));
        some.filter(|page| !has_changed(*page)).map(|page| page * PAGE).collect()
    }
}

/// Looks whether the snapshot `id` is there; the one that it goes over, if that has to be there, too.
fn look_at(place: &Place, id: &str) -> Result<Option<ParentDocument>, SnapshotError> {
    let Summary { id: is, memory } = Summary::glance(&place.state())?;
    if is != id {
        return Err(SnapshotError::Inconsistent(format!("it is snapshot {is} by now")));
    }
    // Of two files the memory is for others to merge, and perhaps to remove then; with all that was under it.
    let Place::Directory(directory) = place else { return Ok(None) };
    let path = directory.join(memory.file.unwrap_or_default());
    path.metadata().map_err(SnapshotError::file("cannot look at", &path))?;
    Ok(memory.parent.filter(|older| older.is_partial))
}

impl ParentDocument {
    /// Takes what witnesses say: some, spread over all.
    pub(super) fn hear(&mut self, witnesses: &[Extent]) {
        let step = witnesses.len().div_ceil(usize::try_from(WITNESSES_MAX).unwrap_or(1)).max(1);
        let some = witnesses.iter().step_by(step);
        self.witnesses = some.map(|witness| (witness.start, witness.sum)).collect();
    }

    /// Whether `file` has what is in the parent only, too.
    pub(super) fn is_merged(&self, file: &File) -> bool {
        let mut page = [0; PAGE_LEN];
        let mut is_there = |&(at, sum): &(u64, u64)| {
            file.read_exact_at(&mut page, at).is_ok() && checksum(&page) == sum
        };
        !self.witnesses.is_empty() && self.witnesses.iter().all(&mut is_there)
    }

    /// Where it is, for a snapshot with its state file at `state`.
    pub(super) fn place(&self, state: &Path) -> Place {
        let directory = devices::backend::file::parent(state);
        let state = directory.join(&self.state);
        match &self.memory {
            Some(memory) => Place::Files { state, memory: directory.join(memory) },
            None => Place::Directory(devices::backend::file::parent(&state).into()),
        }
    }
}

impl MemoryImage {
    /// What is in a file by itself.
    pub(super) fn alone(file: Arc<File>, extents: &[Extent]) -> Self {
        let extents = extents.iter().filter(|extent| extent.kind != Kind::Zero).copied().collect();
        Self { file, extents, over: Arc::default() }
    }

    /// What is in a file that what has changed was merged into, besides the table of what has changed.
    pub(super) fn merged(file: Arc<File>, extents: &[Extent]) -> std::io::Result<Self> {
        let zeroes = extents.iter().filter(|extent| extent.kind == Kind::Zero);
        let laid =
            zeroes.map(|zero| Segment { start: zero.start, len: zero.len.into(), from: None });
        let found = over(&data(&file)?, extents);
        Ok(Self { extents: found, over: laid.collect(), file })
    }

    /// This, and over it what has changed since.
    pub(super) fn with(&self, file: &Arc<File>, extents: &[Extent]) -> Self {
        let mut laid: Vec<Segment> = Vec::new();
        for extent in extents {
            let from = (extent.kind != Kind::Zero).then(|| file.clone());
            match laid.last_mut() {
                Some(last)
                    if last.end() == extent.start && last.from.is_some() == from.is_some() =>
                {
                    last.len += u64::from(extent.len);
                }
                _ => laid.push(Segment { start: extent.start, len: extent.len.into(), from }),
            }
        }
        let mut all = cut(&self.over, &laid);
        all.extend(laid);
        all.sort_unstable_by_key(|segment| segment.start);
        let extents = over(&self.extents, extents);
        Self { file: self.file.clone(), extents, over: all.into() }
    }

    /// Reads what the image holds at `start`, within what may not be zero.
    pub(super) fn read(&self, start: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(bytes, start)?;
        let end = start + bytes.len() as u64;
        let first = self.over.partition_point(|segment| segment.end() <= start);
        for segment in self.over.iter().skip(first).take_while(|segment| segment.start < end) {
            let (from, to) = (segment.start.max(start), segment.end().min(end));
            let at = |place: u64| usize::try_from(place - start).map_err(std::io::Error::other);
            let piece = &mut bytes[at(from)?..at(to)?];
            match &segment.from {
                Some(file) => file.read_exact_at(piece, from)?,
                None => piece.fill(0),
            }
        }
        Ok(())
    }
}

/// What of `below` no segment of `above` covers. Both are in order.
fn cut(below: &[Segment], above: &[Segment]) -> Vec<Segment> {
    let mut left = Vec::new();
    for segment in below {
        let mut start = segment.start;
        let mut keep = |start: u64, end: u64| {
            if start < end {
                left.push(Segment { start, len: end - start, from: segment.from.clone() });
            }
        };
        let first = above.partition_point(|above| above.end() <= start);
        for above in above.iter().skip(first).take_while(|above| above.start < segment.end()) {
            keep(start, above.start);
            start = above.end();
        }
        keep(start, segment.end());
    }
    left
}

/// Where something may not be zero if `extents` are over what is `before`: places only, without sums.
pub(super) fn over(before: &[Extent], extents: &[Extent]) -> Arc<[Extent]> {
    let segment =
        |extent: &Extent| Segment { start: extent.start, len: extent.len.into(), from: None };
    let before: Vec<_> = before.iter().map(segment).collect();
    let above: Vec<_> = extents.iter().map(segment).collect();
    let mut all = cut(&before, &above);
    all.extend(extents.iter().filter(|extent| extent.kind != Kind::Zero).map(segment));
    all.sort_unstable_by_key(|segment| segment.start);
    all.iter().flat_map(|segment| pieces(segment.start, segment.end())).collect()
}

/// Where there is something in a file.
fn data(file: &File) -> std::io::Result<Vec<Extent>> {
    let (mut extents, mut at) = (Vec::new(), 0);
    loop {
        at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(at) => at,
            Err(Errno::NXIO) => return Ok(extents),
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(at))?;
        let (first, last) = (at / PAGE * PAGE, end.next_multiple_of(PAGE));
        extents.extend(pieces(first, last));
        at = last;
    }
}

/// A range in extents without sums.
fn pieces(start: u64, end: u64) -> impl Iterator<Item = Extent> {
    let step = usize::try_from(Extent::LEN_MAX).unwrap_or(usize::MAX);
    (start..end).step_by(step).map(move |start| {
        let len = u32::try_from(end - start).unwrap_or(u32::MAX).min(Extent::LEN_MAX);
        Extent { start, len, kind: Kind::Plain, at: start, stored: len, sum: 0 }
    })
}

/// The same file, whatever the current directory becomes, and without links as far as it is there.
fn absolute(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.into());
    if let Ok(found) = whole.canonicalize() {
        return found;
    }
    match (whole.parent().map(Path::canonicalize), whole.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => whole,
    }
}

/// `to` as seen from the directory `from`, both absolute.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| Component::ParentDir);
    up.chain(to.components().skip(common)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(bytes: &[(u64, u8)]) -> Arc<File> {
        let fd = rustix::fs::memfd_create("chain", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(16 * PAGE).unwrap();
        for (page, byte) in bytes {
            file.write_all_at(&[*byte; PAGE_LEN], page * PAGE).unwrap();
        }
        Arc::new(file)
    }

    fn extents(pages: &[(u64, u32, Kind)]) -> Vec<Extent> {
        let extent = |(first, count, kind): &(u64, u32, Kind)| {
            let (start, len) = (first * PAGE, count * 4096);
            Extent { start, len, kind: *kind, at: start, stored: len, sum: 0 }
        };
        pages.iter().map(extent).collect()
    }

    fn content(image: &MemoryImage) -> Vec<u8> {
        let mut bytes = vec![0; 16 * PAGE_LEN];
        image.read(0, &mut bytes).unwrap();
        bytes.chunks(PAGE_LEN).map(|page| page[0]).collect()
    }

    fn may_be_full(image: &MemoryImage) -> Vec<u64> {
        let pages = |extent: &Extent| extent.start / PAGE..extent.end() / PAGE;
        image.extents.iter().flat_map(pages).collect()
    }

    #[test]
    fn what_is_later_lies_over_what_is_earlier() {
        use Kind::{Plain, Zero};
        let all: Vec<_> = (0..8).map(|page| (page, 1)).collect();
        let first = MemoryImage::alone(memory(&all), &extents(&[(0, 8, Plain)]));
        let second = memory(&[(2, 2), (3, 2), (9, 2)]);
        let second = first.with(&second, &extents(&[(2, 2, Plain), (5, 1, Zero), (9, 1, Plain)]));
        assert_eq!(content(&second), [1, 1, 2, 2, 1, 0, 1, 1, 0, 2, 0, 0, 0, 0, 0, 0]);
        assert_eq!(may_be_full(&second), [0, 1, 2, 3, 4, 6, 7, 9]);
        let third = memory(&[(3, 3), (4, 3), (5, 3)]);
        let third = second.with(&third, &extents(&[(2, 1, Zero), (3, 3, Plain), (9, 1, Zero)]));
        assert_eq!(content(&third), [1, 1, 0, 3, 3, 3, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(may_be_full(&third), [0, 1, 3, 4, 5, 6, 7]);
        // What was laid over by the second only, and nowhere twice.
        assert!(third.over.iter().zip(third.over.iter().skip(1)).all(|(a, b)| a.end() <= b.start));
    }

    #[test]
    fn witnesses_tell_a_merged_file_from_one_that_is_not() {
        let base = memory(&[(0, 1), (1, 2), (2, 3)]);
        let before = extents(&[(0, 3, Kind::Plain)]).into();
        let place = Place::Directory("/nowhere/base".into());
        let parent = Parent::new("id", &place, Path::new("/nowhere/base/memory-id"), before, None);
        assert_eq!(parent.witnesses(Some(&[0b10])), [0, 2 * PAGE]);
        let mut document = parent.document(Path::new("/nowhere/diffs/one/state"));
        assert_eq!(document.state, Path::new("../../base/state"));
        assert_eq!(
            document.place(Path::new("x/diffs/one/state")).state(),
            Path::new("x/diffs/one/../../base/state")
        );
        document.hear(&[Extent {
            sum: checksum(&[3; PAGE_LEN]),
            ..extents(&[(2, 1, Kind::Plain)])[0]
        }]);
        assert!(document.is_merged(&base));
        assert!(!document.is_merged(&memory(&[(1, 2)])));
        let there = Place::Directory("/nowhere/base".into());
        assert!(parent.is_replaced_by(&there));
        assert!(!parent.is_replaced_by(&Place::Directory("/nowhere/other".into())));
    }
}
