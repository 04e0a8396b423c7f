//! Rate limits on the command line: `bw=10M`, `ops=500`, a second.
use std::str::FromStr;

use devices::limiter::{RateLimiter, TokenBucket};

use super::device_args::options;
use crate::config::RateLimitGroup;

/// Limits as they are put together, word by word.
#[derive(Clone, Debug, Default)]
pub(super) struct LimitArgs {
    limiter: Option<RateLimiter>,
    pub(super) group: Option<String>,
}

impl LimitArgs {
    /// Takes `bw`, `ops` or `group`; false if `key` is none of them.
    pub(super) fn take(&mut self, key: &str, value: &str) -> Result<bool, String> {
        match key {
            "bw" => self.limits().bandwidth = Some(a_second(key, value)?),
            "ops" => self.limits().ops = Some(a_second(key, value)?),
            "group" => self.group = Some(value.into()),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The limits of its own, if it has some.
    pub(super) fn limiter(&self) -> Option<RateLimiter> {
        self.limiter.clone()
    }

    fn limits(&mut self) -> &mut RateLimiter {
        self.limiter.get_or_insert_default()
    }
}

/// `[bw=N][,ops=N][,group=ID]`, of a device of which nothing else is said.
impl FromStr for LimitArgs {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut limits = Self::default();
        for word in options(s.split(',').filter(|_| !s.is_empty()))? {
            let is_limit = word.split_once('=').map(|(key, value)| limits.take(key, value));
            if !is_limit.transpose()?.unwrap_or(false) {
                return Err(format!("'{word}' is not one of bw=N, ops=N, group=ID"));
            }
        }
        Ok(limits)
    }
}

/// So many a second, a tenth of them at once.
fn a_second(key: &str, value: &str) -> Result<TokenBucket, String> {
    let bad = || {
        format!(
            "'{key}={value}': want a number above 0, K, M or G (10^3, 10^6, 10^9) after it or not"
        )
    };
    let (digits, unit) = match value.as_bytes().last() {
        Some(b'K' | b'k') => (&value[..value.len() - 1], 1_000),
        Some(b'M' | b'm') => (&value[..value.len() - 1], 1_000_000),
        Some(b'G' | b'g') => (&value[..value.len() - 1], 1_000_000_000),
        _ => (value, 1),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let rate = number.checked_mul(unit).filter(|&rate| rate > 0).ok_or_else(bad)?;
    Ok(match rate % 10 {
        0 => TokenBucket { size: rate / 10, one_time_burst: None, refill_time: 100 },
        _ => TokenBucket { size: rate, one_time_burst: None, refill_time: 1000 },
    })
}

/// `id=ID[,bw=N][,ops=N]`
#[derive(Clone, Debug)]
pub(super) struct GroupArg(pub(super) RateLimitGroup);

impl FromStr for GroupArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (mut id, mut limits) = (None, LimitArgs::default());
        for word in options(s.split(','))? {
            match word.split_once('=') {
                Some(("id", value)) => id = Some(value.to_owned()),
                Some((key @ ("bw" | "ops"), value)) => {
                    limits.take(key, value)?;
                }
                _ => return Err(format!("'{word}' is not one of id=ID, bw=N, ops=N")),
            }
        }
        let id = id.ok_or("want id=ID")?;
        Ok(Self(RateLimitGroup { id, rate_limiter: limits.limiter() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_rates() {
        let bucket = |text| a_second("bw", text).map(|bucket| (bucket.size, bucket.refill_time));
        assert_eq!(bucket("10M"), Ok((1_000_000, 100)));
        assert_eq!(bucket("1k"), Ok((100, 100)));
        assert_eq!(bucket("7"), Ok((7, 1000)));
        assert_eq!(bucket("18G"), Ok((1_800_000_000, 100)));
        for bad in [
            "",
            "K",
            "0",
            "0M",
            "-1",
            "1.5M",
            "x",
            "1MM",
            "18446744073709551616",
            "99999999999G",
            "é",
        ] {
            assert!(bucket(bad).unwrap_err().contains("want a number"), "{bad}");
        }
    }

    #[test]
    fn reads_groups() {
        let group: GroupArg = "id=slow,ops=500".parse().unwrap();
        assert_eq!(group.0.id, "slow");
        assert_eq!(group.0.rate_limiter.unwrap().ops.unwrap().size, 50);
        for bad in ["", "ops=5", "id=a,group=b", "id=a,ro", "id=a,bw=0"] {
            assert!(bad.parse::<GroupArg>().is_err(), "{bad}");
        }
    }

    #[test]
    fn reads_limits_alone() {
        let limits: LimitArgs = "ops=500,group=slow".parse().unwrap();
        assert_eq!(limits.group.as_deref(), Some("slow"));
        assert_eq!(limits.limiter().unwrap().ops.unwrap().size, 50);
        assert!("".parse::<LimitArgs>().unwrap().limiter().is_none());
        for bad in ["ro", "bw=0", "bw=1,", "x=1"] {
            assert!(bad.parse::<LimitArgs>().is_err(), "{bad}");
        }
    }
}
