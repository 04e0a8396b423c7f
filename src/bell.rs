//! A descriptor that one thread rings and another waits for (eventfd).
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::todo)]
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, retry_on_intr};

/// How often it is rung if that fails.
const TRIES: u32 = 8;

/// Rung or quiet. Ringing twice is ringing once.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self(retry_on_intr(|| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK))?))
    }

    /// Makes the descriptor readable. Never waits.
    pub(crate) fn ring(&self) {
        #[cfg(feature = "models")]
        devices::sync::models::step();
        for _ in 0..TRIES {
            match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
                // The counter is full, so it is readable already.
                Ok(_) | Err(Errno::AGAIN) => return,
                // No kernel is known to refuse; but who is not rung may wait for ever.
                Err(_) => {}
            }
        }
    }

    /// Makes it quiet; true if it was rung.
    pub(crate) fn hush(&self) -> bool {
        #[cfg(feature = "models")]
        devices::sync::models::step();
        rustix::io::read(&self.0, &mut [0u8; 8]).is_ok()
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
