//! How the guest's run ended, decided once by the first cause.
//!
//! vCPUs and power devices all may end a run, at the same time; whatever comes second, teardown
//! included, changes nothing.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::todo)]
use std::sync::Arc;

use devices::legacy::Power;
use devices::sync::OnceLock;

use crate::bell::Bell;
use crate::exit::Ending;

/// A slot for the first cause, and a descriptor that says it is there.
#[derive(Debug)]
pub(crate) struct Outcome {
    slot: OnceLock<Ending>,
    bell: Bell,
}

impl Outcome {
    pub(crate) fn new() -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self { slot: OnceLock::new(), bell: Bell::new()? }))
    }

    /// Ends the run for this reason, unless it has ended.
    pub(crate) fn set(&self, ending: Ending) {
        if self.slot.set(ending).is_ok() {
            self.bell.ring();
        }
    }

    /// Why the run ended, if it has.
    pub(crate) fn get(&self) -> Option<&Ending> {
        self.slot.get()
    }

    /// Rung once the run has ended.
    pub(crate) fn bell(&self) -> &Bell {
        &self.bell
    }
}

impl Power for Outcome {
    fn off(&self) {
        self.set(Ending::PoweredOff);
    }

    fn reset(&self) {
        self.set(Ending::Reset);
    }
}

#[cfg(all(test, feature = "models"))]
#[expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a model that panics is a race that was found"
)]
mod models;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that panics is a test that fails")]
mod tests {
    use super::*;

    #[test]
    fn the_first_cause_stays() {
        let outcome = Outcome::new().unwrap();
        assert!(outcome.get().is_none());
        outcome.off();
        outcome.reset();
        outcome.set(Ending::Killed);
        assert_eq!(outcome.get(), Some(&Ending::PoweredOff));
        assert!(outcome.bell().hush());
    }
}
