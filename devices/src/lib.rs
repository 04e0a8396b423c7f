//! Device models. Knows guest memory, queues and file descriptors; knows nothing of KVM, HTTP or
//! the command line, so that every device is tested without `/dev/kvm`.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::todo)]
#![cfg_attr(
    test,
    expect(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "a test that panics is a test that fails"
    )
)]

pub mod backend;
pub mod bus;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod io;
pub mod legacy;
pub mod limiter;
pub mod memory;
pub mod metrics;
pub mod mmds;
pub mod observer;
pub mod sync;
pub mod sys;
mod timer;
pub mod virtio;

pub use memory::GuestRam;

/// What records the pages that devices write. `None` records nothing.
pub type GuestBitmap = Option<memory::PageSet>;

/// A piece of guest RAM where the host has it.
pub type GuestSlice<'a> = vm_memory::VolatileSlice<'a, vm_memory::bitmap::BS<'a, GuestBitmap>>;
