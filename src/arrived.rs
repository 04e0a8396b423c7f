//! Descriptors that came with a request, and the room that there is for such. Knows neither how they came nor what they
//! are for.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use devices::backend::passed::{self, Held};

/// Most that there may be of all requests which have not been answered.
const ALL_MAX: usize = 64;

/// Named by what is in the request, and closed when that has been answered, but for what is kept.
#[derive(Debug, Default)]
pub(crate) struct Arrived {
    held: Arc<[Arc<Held>]>,
    /// What they take of the room, until then.
    _places: Vec<Place>,
}

impl Arrived {
    pub(crate) fn new(held: Vec<Arc<Held>>, places: Vec<Place>) -> Self {
        Self { held: held.into(), _places: places }
    }

    /// The descriptors, in the order in which they came.
    pub(crate) fn held(&self) -> &Arc<[Arc<Held>]> {
        &self.held
    }

    /// Reads, or does, what may name them.
    pub(crate) fn with<R>(&self, work: impl FnOnce() -> R) -> R {
        passed::with(&self.held, work)
    }
}

/// How many are on their way through this process.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    taken: Arc<AtomicUsize>,
    max: usize,
}

impl Room {
    /// For a process that may have so many descriptors.
    pub(crate) fn of(limit: Option<u64>) -> Self {
        let share = limit.map_or(ALL_MAX, |limit| usize::try_from(limit / 8).unwrap_or(ALL_MAX));
        Self { taken: Arc::default(), max: share.clamp(1, ALL_MAX) }
    }

    /// A place in it, if there is one.
    pub(crate) fn take(&self) -> Option<Place> {
        let more = |taken: usize| (taken < self.max).then_some(taken.saturating_add(1));
        let taken = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.is_ok().then(|| Place(self.taken.clone()))
    }
}

/// A descriptor's place in the room.
#[derive(Debug)]
pub(crate) struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
