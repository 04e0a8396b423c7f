//! Buckets that one device has, or several share, and who waits for them.
//!
//! Waiters go in the order in which they came: whoever wants much is not overtaken for ever by
//! those who want little. The first has its timer set to when there is enough; when it has taken
//! its share, it wakes the next.
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bucket::Bucket;
use super::{RateLimiter, TokenBucket};
use crate::timer::{Timer, now_ns};

/// Buckets for bytes and operations.
#[derive(Debug, Default)]
pub struct Pool {
    /// All of it. Held for a few instructions; never while another pool's is.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
    /// Those who wait, the first first.
    waiting: VecDeque<Arc<Timer>>,
}

/// What an operation takes.
#[derive(Clone, Copy, Debug)]
struct Cost {
    ops: u64,
    bytes: u64,
}

impl Pool {
    /// Full buckets, as far as `config` has any.
    pub fn new(config: Option<&RateLimiter>) -> Self {
        let pool = Self::default();
        if let Some(config) = config {
            pool.update(config);
        }
        pool
    }

    /// Replaces the buckets that `patch` names by new ones, full; one without size or refill time
    /// lifts the limit. Whoever waits looks again at once.
    pub fn update(&self, patch: &RateLimiter) {
        let now = now_ns();
        let mut state = self.lock();
        let set = |bucket: &mut Option<Bucket>, patch: Option<&TokenBucket>| {
            if let Some(config) = patch {
                *bucket = Bucket::new(config, now);
            }
        };
        set(&mut state.bandwidth, patch.bandwidth.as_ref());
        set(&mut state.ops, patch.ops.as_ref());
        state.wake_first();
    }

    pub(super) fn is_limited(&self) -> bool {
        let state = self.lock();
        state.bandwidth.is_some() || state.ops.is_some()
    }

    /// Takes `cost` if it is `timer`'s turn and there is enough.
    fn take(&self, timer: &Arc<Timer>, cost: Cost, now_ns: u64) -> bool {
        let mut state = self.lock();
        let is_admitted = state.admit(timer, cost, now_ns);
        if is_admitted {
            state.charge(cost, now_ns);
        }
        is_admitted
    }

    fn refund(&self, cost: Cost) {
        let mut state = self.lock();
        state.each(cost, |bucket, tokens| bucket.refund(tokens));
    }

    /// Waits no longer.
    fn leave(&self, timer: &Arc<Timer>) {
        let mut state = self.lock();
        let was_first = state.is_first(timer);
        state.waiting.retain(|other| !Arc::ptr_eq(other, timer));
        if was_first {
            state.each(Cost::NONE, |bucket, _| bucket.forget_waiter());
            state.wake_first();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cost {
    const NONE: Self = Self { ops: 0, bytes: 0 };
    /// The least that something can cost.
    const LEAST: Self = Self { ops: 1, bytes: 1 };
}

impl State {
    /// Whether `timer`'s owner may go on with what costs `cost`: it then waits no longer, and the
    /// next one looks. Otherwise it is woken when it may.
    fn admit(&mut self, timer: &Arc<Timer>, cost: Cost, now_ns: u64) -> bool {
        if !self.waiting.is_empty() && !self.is_first(timer) {
            if !self.waiting.iter().any(|other| Arc::ptr_eq(other, timer)) {
                self.waiting.push_back(timer.clone());
            }
            return false;
        }
        let mut wait_ns = 0;
        self.each(cost, |bucket, tokens| wait_ns = bucket.wait_ns(tokens, now_ns).max(wait_ns));
        if wait_ns > 0 {
            if self.waiting.is_empty() {
                self.waiting.push_back(timer.clone());
            }
            timer.set(now_ns.saturating_add(wait_ns));
            return false;
        }
        if self.waiting.pop_front().is_some() {
            self.wake_first();
        }
        true
    }

    fn charge(&mut self, cost: Cost, now_ns: u64) {
        self.each(cost, |bucket, tokens| {
            bucket.charge(tokens, now_ns);
            bucket.forget_waiter();
        });
    }

    fn each(&mut self, cost: Cost, mut f: impl FnMut(&mut Bucket, u64)) {
        if let Some(bucket) = &mut self.bandwidth {
            f(bucket, cost.bytes);
        }
        if let Some(bucket) = &mut self.ops {
            f(bucket, cost.ops);
        }
    }

    fn is_first(&self, timer: &Arc<Timer>) -> bool {
        self.waiting.front().is_some_and(|first| Arc::ptr_eq(first, timer))
    }

    fn wake_first(&self) {
        if let Some(first) = self.waiting.front() {
            first.fire();
        }
    }
}

/// One who takes from one pool or from two at a time, and waits for them.
#[derive(Debug)]
pub(super) struct Waiter {
    pools: Vec<Arc<Pool>>,
    timer: Arc<Timer>,
    /// It was refused, and has not been woken since.
    is_waiting: Cell<bool>,
}

impl Waiter {
    pub(super) fn new(pools: Vec<Arc<Pool>>, timer: Arc<Timer>) -> Self {
        Self { pools, timer, is_waiting: Cell::new(false) }
    }

    pub(super) fn timer(&self) -> &Timer {
        &self.timer
    }

    /// Makes the timer quiet; whether it had fired.
    pub(super) fn wake(&self) -> bool {
        let has_fired = self.timer.has_fired();
        if has_fired {
            self.is_waiting.set(false);
        }
        has_fired
    }

    /// Leaves its turn to others if it has not been refused since it was woken: it has nothing to
    /// do any more.
    pub(super) fn settle(&self) {
        if !self.is_waiting.get() {
            self.pools.iter().for_each(|pool| pool.leave(&self.timer));
        }
    }

    /// Takes an operation on `bytes` from all pools, or from none.
    pub(super) fn take(&self, bytes: u64, now_ns: u64) -> bool {
        let cost = Cost { ops: 1, bytes };
        self.ask(|pool| pool.take(&self.timer, cost, now_ns), |pool| pool.refund(cost))
    }

    /// Whether all pools have something.
    pub(super) fn is_open(&self, now_ns: u64) -> bool {
        self.ask(|pool| pool.lock().admit(&self.timer, Cost::LEAST, now_ns), |_| {})
    }

    /// Takes what an operation on `bytes` has cost.
    pub(super) fn charge(&self, bytes: u64, now_ns: u64) {
        for pool in &self.pools {
            pool.lock().charge(Cost { ops: 1, bytes }, now_ns);
        }
    }

    /// Asks each pool in turn; if one refuses, undoes what those before it gave.
    fn ask(&self, mut ask: impl FnMut(&Pool) -> bool, undo: impl Fn(&Pool)) -> bool {
        let refused = self.pools.iter().position(|pool| !ask(pool));
        self.is_waiting.set(refused.is_some());
        let Some(refused) = refused else { return true };
        self.pools.iter().take(refused).for_each(|pool| undo(pool));
        // Its turn there is not to be held while it waits here.
        self.pools.iter().skip(refused).skip(1).for_each(|pool| pool.leave(&self.timer));
        false
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.pools.iter().for_each(|pool| pool.leave(&self.timer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiter(pools: &[&Arc<Pool>]) -> Waiter {
        let pools = pools.iter().map(|&pool| pool.clone()).collect();
        Waiter::new(pools, Arc::new(Timer::new().unwrap()))
    }

    fn bucket(size: u64, refill_time: u64) -> TokenBucket {
        TokenBucket { size, one_time_burst: None, refill_time }
    }

    /// So slow that nothing comes while the test runs.
    fn slow(bytes: u64, ops: u64) -> RateLimiter {
        let bandwidth = (bytes > 0).then(|| bucket(bytes, 1 << 40));
        let ops = (ops > 0).then(|| bucket(ops, 1 << 40));
        RateLimiter { bandwidth, ops }
    }

    #[test]
    fn both_buckets_are_asked_and_neither_pays_for_the_other() {
        let pool = Arc::new(Pool::new(Some(&slow(100, 3))));
        let one = waiter(&[&pool]);
        let now = now_ns();
        assert!(one.take(60, now));
        assert!(!one.take(60, now) && !one.take(60, now));
        assert!(one.take(20, now) && one.take(20, now));
        assert!(!one.take(0, now), "three operations were taken");
    }

    #[test]
    fn what_one_pool_refuses_no_other_pays() {
        let own = Arc::new(Pool::new(Some(&slow(100, 0))));
        let group = Arc::new(Pool::new(Some(&slow(50, 0))));
        let (one, other) = (waiter(&[&own, &group]), waiter(&[&group]));
        let now = now_ns();
        assert!(one.take(40, now));
        assert!(!one.take(20, now));
        drop(other);
        group.update(&slow(1000, 0));
        assert!(one.timer().has_fired());
        assert!(one.take(60, now), "the refused one was not paid for");
        assert!(!one.take(1, now));
    }

    #[test]
    fn the_first_to_wait_is_the_first_to_go_on() {
        let pool = Arc::new(Pool::new(Some(&slow(100, 0))));
        let (large, small) = (waiter(&[&pool]), waiter(&[&pool]));
        let now = now_ns();
        assert!(large.take(50, now));
        assert!(!large.take(100, now));
        assert!(!small.take(1, now), "it would overtake");
        pool.update(&slow(101, 0));
        assert!(large.wake() && !small.wake());
        assert!(large.take(100, now));
        assert!(small.wake() && small.take(1, now));
        assert!(!small.take(1, now));
    }

    #[test]
    fn who_leaves_lets_the_next_one_look() {
        for leaves in [
            |one: Waiter| drop(one),
            |one: Waiter| {
                assert!(!one.wake());
                one.is_waiting.set(false);
                one.settle();
            },
        ] {
            let pool = Arc::new(Pool::new(Some(&slow(100, 0))));
            let (first, second) = (waiter(&[&pool]), waiter(&[&pool]));
            let now = now_ns();
            assert!(second.take(50, now));
            assert!(!first.take(100, now) && !second.take(10, now));
            first.settle();
            assert!(!second.wake(), "the first still waits");
            leaves(first);
            assert!(second.wake() && second.take(10, now));
        }
    }

    #[test]
    fn without_buckets_everything_goes() {
        let pool = Arc::new(Pool::new(Some(&slow(1, 1))));
        let one = waiter(&[&pool]);
        assert!(one.take(1, 0) && !one.take(1, 0));
        // One is lifted, the other is not named and stays.
        pool.update(&RateLimiter { bandwidth: Some(bucket(0, 5)), ops: None });
        assert!(!one.take(u64::MAX, 0));
        pool.update(&RateLimiter { bandwidth: None, ops: Some(bucket(5, 0)) });
        assert!(!pool.is_limited());
        for _ in 0..10 {
            assert!(one.take(u64::MAX, 0));
        }
    }

    #[test]
    fn the_timer_fires_when_there_is_enough_and_not_before() {
        let config = RateLimiter { bandwidth: Some(bucket(1000, 20)), ops: None };
        let pool = Arc::new(Pool::new(Some(&config)));
        let one = waiter(&[&pool]);
        let start = now_ns();
        assert!(one.take(1000, start) && !one.take(1000, start));
        let mut fds = [rustix::event::PollFd::new(&*one.timer, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        assert!(one.wake() && !one.wake());
        let now = now_ns();
        assert!(now - start >= 20_000_000 && one.take(1000, now));
    }
}
