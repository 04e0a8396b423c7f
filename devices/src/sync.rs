//! What threads meet by where their races are modelled (`tests/models`): std's, or shuttle's, which tries
//! the orders in which threads may take their steps. The two differ in nothing that a caller sees; what
//! both lack is not here.
//!
//! With the feature `models`, which is for these tests alone, none of it works outside of `models::explore`.
#[cfg(feature = "models")]
pub mod models;

#[cfg(feature = "models")]
pub use self::models::{OnceLock, mpsc};
#[cfg(feature = "models")]
pub use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread,
};
#[cfg(not(feature = "models"))]
pub use std::{
    sync::{Condvar, Mutex, MutexGuard, OnceLock, atomic, mpsc},
    thread,
};
