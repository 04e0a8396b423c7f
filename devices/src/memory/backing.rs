//! What is behind a piece of guest memory. Whoever gives pages back, copies memory, or maps something
//! else in its place asks and says it here; nobody guesses from how memory was mapped once.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use vm_memory::mmap::MmapRegion;

use super::pages::PageSet;
use crate::GuestBitmap;
use crate::sys::map::Pages;

/// Most runs of pages that are mapped over images, or plugged, in this process, whichever VM they are
/// of: each costs up to two mappings, of which a process has 65,530. What is left of these is for
/// threads, images and everybody else.
const RUNS_MAX: usize = 16_384;
/// How many more there can be.
static RUNS_LEFT: AtomicUsize = AtomicUsize::new(RUNS_MAX);

/// What a page is that nobody has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// Zero: anonymous memory of this process.
    Anonymous,
    /// Zero: a file in memory, which others map too.
    Shared,
    /// What an image holds, mapped privately, but where zeroes have been mapped over it.
    Image,
    /// A file's, which is not given back.
    File,
}

/// What is behind a piece of guest memory without gaps.
#[derive(Debug)]
pub struct Backing {
    len: u64,
    pages: Pages,
    state: Mutex<State>,
    /// The pages of an image that have zeroes mapped over them. Made when there are some.
    vacated: OnceLock<PageSet>,
    /// The pages that husk has written. The guest's own writes are KVM's to know.
    written: GuestBitmap,
}

#[derive(Debug)]
struct State {
    behind: Behind,
    /// Of vacated pages.
    runs: Runs,
}

/// A number of runs, taken from those that there can be. Given back when it is dropped.
#[derive(Debug)]
pub(super) struct Runs {
    count: usize,
    left: &'static AtomicUsize,
}

impl Default for Runs {
    fn default() -> Self {
        Self::none(&RUNS_LEFT)
    }
}

impl Runs {
    pub(super) fn none(left: &'static AtomicUsize) -> Self {
        Self { count: 0, left }
    }

    /// Becomes another number. False if that is more than there can be.
    pub(super) fn set(&mut self, count: usize) -> bool {
        let rest = |left: usize| left.saturating_add(self.count).checked_sub(count);
        let is_had = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest).is_ok();
        if is_had {
            self.count = count;
        }
        is_had
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        self.set(0);
    }
}

impl Backing {
    /// Of `len` bytes in `pages`; writes are not recorded.
    pub fn new(len: u64, behind: Behind, pages: Pages) -> Self {
        let state = Mutex::new(State { behind, runs: Runs::default() });
        Self { len, pages, state, vacated: OnceLock::new(), written: None }
    }

    /// Of a mapping as it is now.
    pub fn of(region: &MmapRegion<()>) -> Self {
        let is_huge = region.flags() & libc::MAP_HUGETLB != 0;
        let pages = if is_huge { Pages::Huge2M } else { Pages::Normal };
        let behind = match region.file_offset() {
            _ if region.flags() & libc::MAP_SHARED != 0 => Behind::Shared,
            Some(_) => Behind::Image,
            None => Behind::Anonymous,
        };
        Self::new(region.size() as u64, behind, pages)
    }

    /// The same, which records from now on what husk writes.
    #[must_use]
    pub fn recording(self) -> Self {
        Self { written: Some(PageSet::new(self.len)), ..self }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Which pages it is made of.
    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// What is behind it now.
    pub fn behind(&self) -> Behind {
        self.lock().behind
    }

    /// Says that something else has been mapped in the place of all of it.
    pub fn set_behind(&self, behind: Behind) {
        let mut state = self.lock();
        state.behind = behind;
        state.runs.set(0);
        if let Some(vacated) = self.vacated.get() {
            vacated.take();
        }
    }

    /// The pages of an image that have zeroes mapped over them: bit n of word m is page 64 m + n.
    /// `None` if there never were any.
    pub fn vacated(&self) -> Option<Vec<u64>> {
        self.vacated.get().map(PageSet::words)
    }

    /// Where husk's writes are recorded.
    pub fn written(&self) -> &GuestBitmap {
        &self.written
    }

    /// Has `map` map zeroes over the `len` bytes at `offset` of an image: they are said to be there if
    /// it does. False, without a call, if there are too many such places.
    pub(crate) fn vacate<E>(
        &self,
        offset: usize,
        len: usize,
        map: impl FnOnce() -> Result<(), E>,
    ) -> Result<bool, E> {
        let mut state = self.lock();
        let vacated = self.vacated.get_or_init(|| PageSet::new(self.len));
        // Those that it joins become one with it.
        let joined = vacated.runs_at(offset, len);
        let before = state.runs.count;
        if !state.runs.set(before.saturating_sub(joined).saturating_add(1)) {
            return Ok(false);
        }
        match map() {
            Ok(()) => vacated.add(offset, len),
            Err(e) => {
                state.runs.set(before);
                return Err(e);
            }
        }
        Ok(true)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    const PAGE: usize = 4096;

    /// Memory with an image behind it, of which so many runs may be vacated.
    fn within(runs: usize) -> Backing {
        sharing(Box::leak(Box::new(AtomicUsize::new(runs))))
    }

    fn sharing(left: &'static AtomicUsize) -> Backing {
        let backing = Backing::new(64 * PAGE as u64, Behind::Image, Pages::Normal);
        backing.lock().runs = Runs::none(left);
        backing
    }

    /// Vacates `count` pages from the `first` on.
    fn vacate(backing: &Backing, first: usize, count: usize) -> bool {
        backing.vacate(first * PAGE, count * PAGE, || Ok::<_, Infallible>(())).unwrap()
    }

    #[test]
    fn places_of_zeroes_are_bounded() {
        let backing = within(4);
        for run in 0..4 {
            assert!(vacate(&backing, run * 2, 1), "{run}");
        }
        assert!(!vacate(&backing, 8, 1));
        // What joins two of them makes room, once.
        for _ in 0..2 {
            assert!(vacate(&backing, 1, 1));
        }
        assert!(vacate(&backing, 8, 1));
        assert!(!vacate(&backing, 10, 1));
        assert_eq!(backing.vacated(), Some(vec![0b1_0101_0111]));
        backing.set_behind(Behind::Shared);
        assert_eq!(backing.vacated(), Some(vec![0]));
        assert!(vacate(&backing, 8, 1));
    }

    #[test]
    fn a_process_has_so_many_for_all_of_its_memory() {
        let one = within(2);
        let other = sharing(one.lock().runs.left);
        assert!(vacate(&one, 0, 1) && vacate(&other, 0, 1));
        assert!(!vacate(&one, 2, 1) && !vacate(&other, 2, 1));
        drop(one);
        assert!(vacate(&other, 2, 1) && !vacate(&other, 4, 1));
    }

    #[test]
    fn what_could_not_be_mapped_is_not_vacated() {
        let backing = within(2);
        assert!(vacate(&backing, 1, 2));
        let refused = backing.vacate(0, 4 * PAGE, || Err("no memory"));
        assert_eq!(refused, Err("no memory"));
        assert_eq!(backing.vacated(), Some(vec![0b110]));
        assert!(vacate(&backing, 4, 1) && !vacate(&backing, 6, 1));
    }
}
