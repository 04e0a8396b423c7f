//! Rate limits: how many bytes and operations a device may cost the host.
//!
//! ```text
//!   RateLimiter ──► Limits (control half) ──limiter()──► Limiter (worker): take, or wait for the timer
//!   (the user's)      │ own Pool, shared by nobody           │
//!                     └ a group's Pool, shared by devices ◄──┘
//! ```
//!
//! What is left in the buckets belongs to the [`Pool`], which outlives workers: neither a pause nor
//! a reset by the guest fills a bucket. A device without limits has no timer and never looks at the
//! clock.
mod bucket;
mod pool;

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::EventSet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::bucket::Bucket;
pub use self::pool::Pool;
use self::pool::Waiter;
use crate::io::Source;
use crate::timer::Timer;
pub use crate::timer::now_ns;
use crate::virtio::model::DeviceError;

/// Limits on bytes and on operations; either may be absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes.
    #[serde(default)]
    pub bandwidth: Option<TokenBucket>,
    /// Requests or packets.
    #[serde(default)]
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// Replaces the buckets that `patch` names.
    pub fn merge(&mut self, patch: &Self) {
        let merged = |was: &Option<_>, patch: &Option<_>| patch.clone().or_else(|| was.clone());
        self.bandwidth = merged(&self.bandwidth, &patch.bandwidth);
        self.ops = merged(&self.ops, &patch.ops);
    }
}

/// Holds `size` tokens and refills within `refill_time`. No limit if either is 0.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens the bucket holds.
    pub size: u64,
    /// Tokens given once, at the start, beside those of the bucket.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds from empty to full.
    pub refill_time: u64,
}

/// The pools that devices may share, by the id of their group.
pub type Groups = BTreeMap<String, Arc<Pool>>;

/// What a device keeps of one of its limiters.
#[derive(Debug, Default)]
pub struct Limits {
    own: Arc<Pool>,
    group: Option<Arc<Pool>>,
}

impl Limits {
    /// Limits of a device's own, and those of the group that it is in.
    pub fn new(own: Option<&RateLimiter>, group: Option<Arc<Pool>>) -> Self {
        Self { own: Arc::new(Pool::new(own)), group }
    }

    /// Replaces the buckets of its own that `patch` names by new ones, full.
    pub fn update(&self, patch: Option<&RateLimiter>) {
        if let Some(patch) = patch {
            self.own.update(patch);
        }
    }

    /// The limiter for a worker.
    pub fn limiter(&self) -> Result<Limiter, DeviceError> {
        let own = self.own.is_limited().then(|| self.own.clone());
        let pools: Vec<_> = own.into_iter().chain(self.group.clone()).collect();
        if pools.is_empty() {
            return Ok(Limiter(None));
        }
        let timer = Timer::new().map_err(DeviceError::host("cannot make a timer"))?;
        Ok(Limiter(Some(Waiter::new(pools, Arc::new(timer)))))
    }
}

/// What a worker asks before it does something. Nothing at all if there is no limit.
#[derive(Debug, Default)]
pub struct Limiter(Option<Waiter>);

impl Limiter {
    /// What becomes ready when it is worth asking again: one of the worker's sources.
    pub fn source(&self) -> Option<Source<'_>> {
        self.0.as_ref().map(|waiter| (waiter.timer() as &dyn AsRawFd, EventSet::IN))
    }

    /// Makes the source quiet; whether it was ready.
    pub fn has_fired(&self) -> bool {
        self.0.as_ref().is_some_and(Waiter::wake)
    }

    /// To be called after serving: whoever has nothing more to do leaves its turn to the others of
    /// its group.
    pub fn settle(&self) {
        if let Some(waiter) = &self.0 {
            waiter.settle();
        }
    }

    /// Takes what an operation on `bytes` costs. False if it has to wait until the source is ready.
    /// One that is larger than the bucket waits for a full one and leaves a debt.
    #[inline]
    pub fn take(&self, bytes: u64) -> bool {
        self.0.as_ref().is_none_or(|waiter| waiter.take(bytes, now_ns()))
    }

    /// Whether an operation may begin whose bytes are not known yet; [`Self::charge`] says them.
    /// False if it has to wait until the source is ready.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.0.as_ref().is_none_or(|waiter| waiter.is_open(now_ns()))
    }

    /// Takes what an operation on `bytes` has cost, though it may leave a debt.
    #[inline]
    pub fn charge(&self, bytes: u64) {
        if let Some(waiter) = &self.0 {
            waiter.charge(bytes, now_ns());
        }
    }
}
