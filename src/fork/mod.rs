//! Forks: children of a live VM, each with its own copy-on-write memory.
//!
//! ```text
//!             pause, save,      ┌─ in a library: Vm::restore, as often as one likes
//!   Machine ──freeze, resume──► Image
//!                               └─ Batch ──► zygote ──fork(2)──► a husk that restores, per child
//!                                              a process of one thread, which waits
//! ```
//!
//! ```text
//!  params.rs   what is asked, what is answered
//!  plan.rs     the configuration of each child; refuses what parent and child cannot both have
//!  freeze.rs   an image in memory of a VM that stands still
//!  batch.rs    what the zygote is sent, and what children say
//!  zygote.rs   the process that forks: the end that asks it, and the end that is it
//!  birth.rs    from a batch to children that run: all of them or none
//! ```
//!
//! The VMM's process has many threads, so it cannot fork itself. docs/fork.md says what a child has of
//! its parent.
mod batch;
mod birth;
mod freeze;
mod params;
mod plan;
mod zygote;

pub(crate) use self::batch::{Batch, Household, Newborn, Spec};
pub(crate) use self::birth::{Birth, Nursery};
pub(crate) use self::freeze::Freezing;
pub use self::freeze::ImageSink;
pub use self::params::{Child, ChildOverrides, ForkParams, Forked};
pub(crate) use self::plan::{Parent, plan};
pub(crate) use self::zygote::{fork, remove_socket_later};

use crate::exit::ExitCode;

/// Most children of one request.
pub const CHILDREN_MAX: u32 = 1000;

/// Why a VM is not forked.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// What the request says cannot be.
    #[error("{field}: {why}")]
    Field {
        /// The field, as in the API.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A child would have what its parent has, or another child.
    #[error("child {}: {why}", number.saturating_add(1))]
    Child {
        /// Which, from 0, as the list of overrides has them; people are told from 1.
        number: usize,
        /// What it said, or what is said of it.
        why: String,
    },
    /// The VM has what cannot be in a child.
    #[error("this microVM cannot be forked: {0}")]
    Unforkable(String),
    /// There is no process that could make children.
    #[error("cannot make processes: {0}")]
    Process(std::io::Error),
    /// A VM of a library has no processes for children.
    #[error("a VM in a library is forked by Vm::fork")]
    Library,
    /// Somebody has ended the process that makes children.
    #[error("the process that makes children has been ended: there can be no more")]
    Barren,
    /// The VM ended meanwhile.
    #[error("the microVM ended before its children ran")]
    Ended,
    /// Children did not get as far as running.
    #[error("{missing} of {count} children ended before they were there")]
    Lost {
        /// How many.
        missing: usize,
        /// Of how many.
        count: usize,
    },
    /// Children did not say that they are there.
    #[error("{missing} of {count} children were not there in time")]
    Late {
        /// How many.
        missing: usize,
        /// Of how many.
        count: usize,
    },
}

impl ForkError {
    /// A [`ForkError::Child`] of what something says of it.
    fn child(number: usize, why: &dyn std::error::Error) -> Self {
        Self::Child { number, why: crate::error::chain(why) }
    }

    /// The exit code of a process that ends for this reason.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Field { .. }
            | Self::Child { .. }
            | Self::Unforkable(_)
            | Self::Library
            | Self::Ended => ExitCode::Config,
            Self::Barren | Self::Process(_) | Self::Lost { .. } | Self::Late { .. } => {
                ExitCode::Host
            }
        }
    }
}
