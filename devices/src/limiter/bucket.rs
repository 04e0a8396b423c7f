//! Tokens that come back with time. Exact: no token is lost or made by rounding, whatever the size
//! and the time, and however often one asks.
use super::TokenBucket;

const NS_PER_MS: u128 = 1_000_000;

/// A bucket of tokens. It knows no clock: whoever asks says what time it is, in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    size: u64,
    /// Nanoseconds from empty to full.
    refill_ns: u128,
    /// Tokens there. Above `size` while some of the burst is left, below 0 in debt.
    level: i128,
    /// What has come beside whole tokens, in parts of which `refill_ns` are one.
    fraction: u128,
    /// When `level` was right.
    at_ns: u64,
    /// Whether somebody waits. He may be woken late, on a busy host much later, and what comes in
    /// between is his: as much again fits.
    is_awaited: bool,
}

impl Bucket {
    /// A full bucket; none if `config` means no limit.
    pub fn new(config: &TokenBucket, now_ns: u64) -> Option<Self> {
        let &TokenBucket { size, one_time_burst, refill_time } = config;
        let burst = one_time_burst.unwrap_or(0);
        (size > 0 && refill_time > 0).then(|| Self {
            size,
            refill_ns: u128::from(refill_time).saturating_mul(NS_PER_MS),
            level: i128::from(size).saturating_add(burst.into()),
            fraction: 0,
            at_ns: now_ns,
            is_awaited: false,
        })
    }

    /// Nanoseconds until there are `need` tokens, or as many as the bucket holds; 0 if there are.
    pub fn wait_ns(&mut self, need: u64, now_ns: u64) -> u64 {
        self.refill(now_ns);
        let need = need.min(self.size);
        let missing = i128::from(need).saturating_sub(self.level);
        let Some(missing) = u128::try_from(missing).ok().filter(|&missing| missing > 0) else {
            return 0;
        };
        self.is_awaited = true;
        let parts = missing.saturating_mul(self.refill_ns).saturating_sub(self.fraction);
        u64::try_from(parts.div_ceil(self.size.into())).unwrap_or(u64::MAX)
    }

    /// Takes `tokens`, though they may not be there.
    pub fn charge(&mut self, tokens: u64, now_ns: u64) {
        self.refill(now_ns);
        self.level = self.level.saturating_sub(tokens.into());
    }

    /// Takes up to `most` tokens, as many as there are; how many.
    pub fn take_up_to(&mut self, most: u64, now_ns: u64) -> u64 {
        self.refill(now_ns);
        let taken = u64::try_from(self.level).unwrap_or(0).min(most);
        self.level = self.level.saturating_sub(taken.into());
        taken
    }

    /// Gives back what was just taken.
    pub(super) fn refund(&mut self, tokens: u64) {
        self.level = self.level.saturating_add(tokens.into());
    }

    /// Nobody waits any more.
    pub(super) fn forget_waiter(&mut self) {
        self.is_awaited = false;
    }

    fn refill(&mut self, now_ns: u64) {
        let elapsed = now_ns.saturating_sub(self.at_ns);
        self.at_ns = self.at_ns.max(now_ns);
        let size = i128::from(self.size);
        let full = if self.is_awaited { size.saturating_add(size) } else { size };
        if self.level < full {
            // 2^128 of them take longer than there is time.
            let parts =
                u128::from(elapsed).saturating_mul(self.size.into()).saturating_add(self.fraction);
            let tokens = parts.checked_div(self.refill_ns).unwrap_or(0);
            self.fraction = parts.checked_rem(self.refill_ns).unwrap_or(0);
            let tokens = i128::try_from(tokens).unwrap_or(i128::MAX);
            self.level = self.level.saturating_add(tokens).min(full);
        }
        if self.level >= full {
            self.fraction = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn bucket(size: u64, burst: u64, refill_time: u64) -> Bucket {
        let config = TokenBucket { size, one_time_burst: Some(burst), refill_time };
        Bucket::new(&config, 0).unwrap()
    }

    /// Takes as a device does: waits until it may. When it could go on.
    fn take(bucket: &mut Bucket, tokens: u64, now: u64) -> u64 {
        let then = now.saturating_add(bucket.wait_ns(tokens, now));
        assert_eq!(bucket.wait_ns(tokens, then), 0, "woken too early");
        bucket.charge(tokens, then);
        bucket.forget_waiter();
        then
    }

    #[test]
    fn zero_is_no_limit() {
        for (size, refill_time) in [(0, 1), (1, 0), (0, 0)] {
            let config = TokenBucket { size, one_time_burst: Some(5), refill_time };
            assert_eq!(Bucket::new(&config, 7), None);
        }
    }

    #[test]
    fn gives_its_size_at_once_and_then_its_rate_exactly() {
        for (size, refill_time) in [(10, 1000), (1, 1), (7, 3), (1000, 7), (4096, 1), (999_983, 97)]
        {
            let mut bucket = bucket(size, 0, refill_time);
            for _ in 0..size {
                assert_eq!(take(&mut bucket, 1, 0), 0);
            }
            let mut now = 0;
            let more = 100_000_u32;
            for _ in 0..more {
                now = take(&mut bucket, 1, now);
            }
            // The least whole nanosecond at which so many tokens have come.
            let due =
                (u128::from(more) * u128::from(refill_time) * NS_PER_MS).div_ceil(size.into());
            assert_eq!(u128::from(now), due, "{size} in {refill_time} ms");
        }
    }

    #[test]
    fn asking_often_changes_nothing() {
        let mut asked = bucket(1000, 0, 977);
        let mut left_alone = asked.clone();
        asked.charge(1000, 0);
        left_alone.charge(1000, 0);
        for now in (0..SECOND / 2).step_by(333_331) {
            asked.charge(0, now);
        }
        assert_eq!(asked.wait_ns(1000, SECOND / 2), left_alone.wait_ns(1000, SECOND / 2));
        assert_eq!(asked, left_alone);
    }

    #[test]
    fn does_not_fill_beyond_its_size() {
        let mut bucket = bucket(10, 0, 10);
        bucket.charge(10, 0);
        assert_eq!(bucket.take_up_to(100, 50 * SECOND), 10);
        assert_eq!(bucket.take_up_to(100, 50 * SECOND), 0);
        assert_eq!(bucket.take_up_to(100, 50 * SECOND + 1_500_000), 1);
        assert_eq!(bucket.take_up_to(100, 50 * SECOND + 2_000_000), 1);
    }

    #[test]
    fn the_burst_comes_first_and_once() {
        let mut bucket = bucket(10, 5, 1000);
        // Nothing comes while there is some of it.
        assert_eq!(bucket.take_up_to(3, SECOND), 3);
        assert_eq!(bucket.take_up_to(100, 2 * SECOND), 12);
        assert_eq!(bucket.take_up_to(100, 9 * SECOND), 10);
    }

    #[test]
    fn what_is_larger_than_the_bucket_is_paid_for_afterwards() {
        let mut bucket = bucket(100, 0, 1000);
        assert_eq!(take(&mut bucket, 250, 0), 0);
        // 150 missing, and a full bucket for the next.
        assert_eq!(bucket.wait_ns(1, 0), 1_510_000_000);
        assert_eq!(take(&mut bucket, 1000, 0), 2_500_000_000);
        let mut now = 2_500_000_000;
        for _ in 0..10 {
            now = take(&mut bucket, 1000, now);
        }
        assert_eq!(now, 102_500_000_000);
    }

    #[test]
    fn who_wakes_late_loses_nothing() {
        let mut bucket = bucket(1, 0, 1);
        assert_eq!(take(&mut bucket, 1, 0), 0);
        let mut now = 0;
        for _ in 0..1000 {
            // Woken some 0.3 ms after each token, the bucket full.
            now += bucket.wait_ns(1, now);
            now += 300_000;
            assert_eq!(bucket.wait_ns(1, now), 0);
            bucket.charge(1, now);
            bucket.forget_waiter();
        }
        assert_eq!(now, 1000 * 1_000_000 + 300_000);
        // But no more than as much again piles up, and nothing if nobody waits.
        bucket.charge(1, now);
        assert!(bucket.wait_ns(1, now) > 0);
        assert_eq!(bucket.take_up_to(10, now + SECOND), 2);
        bucket.forget_waiter();
        assert_eq!(bucket.take_up_to(10, now + 2 * SECOND), 1);
    }

    #[test]
    fn a_clock_that_stands_or_goes_back_gives_nothing() {
        let mut bucket = bucket(10, 0, 10);
        bucket.charge(10, SECOND);
        assert_eq!(bucket.take_up_to(1, SECOND), 0);
        assert_eq!(bucket.take_up_to(1, 0), 0);
        assert_eq!(bucket.take_up_to(9, SECOND + 1_000_000), 1);
    }

    #[test]
    fn extreme_values_neither_overflow_nor_lift_the_limit() {
        for size in [1, 1 << 40, u64::MAX] {
            for refill_time in [1, 1 << 63, u64::MAX] {
                for burst in [0, u64::MAX] {
                    let mut bucket = bucket(size, burst, refill_time);
                    bucket.charge(size, 0);
                    bucket.charge(burst, 0);
                    let wait = bucket.wait_ns(u64::MAX, 1);
                    let whole = u128::from(refill_time) * NS_PER_MS;
                    assert_eq!(wait, u64::try_from(whole - 1).unwrap_or(u64::MAX));
                    for _ in 0..3 {
                        bucket.charge(u64::MAX, u64::MAX / 2);
                    }
                    assert!(bucket.wait_ns(1, u64::MAX / 2) > 0 || refill_time == 1);
                    bucket.take_up_to(u64::MAX, u64::MAX);
                    bucket.wait_ns(u64::MAX, u64::MAX);
                }
            }
        }
        // A token in 292 million years is none for anybody who asks.
        let mut never = bucket(1, 0, 1 << 63);
        assert_eq!(never.take_up_to(1, 0), 1);
        assert_eq!(never.wait_ns(1, SECOND), u64::MAX);
        assert_eq!(never.take_up_to(1, u64::MAX / 2), 0);
    }
}
