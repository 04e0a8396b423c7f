//! Session tokens. The service keeps nothing of those it gives out, so that a guest that asks for
//! millions costs nothing: a token says when it ends, and a MAC with a key that only this VM's
//! service has says that it is genuine. There is nothing secret in a token, so that it is not
//! encrypted, as Firecracker's are: a MAC has no nonce that could be used twice.
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// Seconds that a token may last.
pub(super) const TTL_SECONDS: std::ops::RangeInclusive<u32> = 1..=21600;

/// Hexadecimal digits of one number in a token.
const DIGITS: usize = 16;

/// Why there is no token. Firecracker's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "Invalid time to live value provided for token: {0}. Please provide a value between {min} and \
     {max}.",
    min = TTL_SECONDS.start(), max = TTL_SECONDS.end()
)]
pub(super) struct InvalidTtl(u32);

/// Gives tokens out and knows them again.
pub(super) struct Tokens {
    key: [u8; 64],
    epoch: Instant,
    /// Tells tokens that end together apart.
    given: AtomicU64,
}

impl std::fmt::Debug for Tokens {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").field("given", &self.given).finish_non_exhaustive()
    }
}

impl Tokens {
    /// A new key.
    pub(super) fn new() -> std::io::Result<Self> {
        let mut key = [0; 64];
        // So few bytes come at once or not at all (getrandom(2)).
        let got = rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())?;
        match got == key.len() {
            true => Ok(Self { key, epoch: Instant::now(), given: AtomicU64::new(0) }),
            false => Err(std::io::Error::other("too few random bytes")),
        }
    }

    /// A token that lasts for `ttl_seconds` from `now`.
    pub(super) fn give(&self, ttl_seconds: u32, now: Instant) -> Result<String, InvalidTtl> {
        if !TTL_SECONDS.contains(&ttl_seconds) {
            return Err(InvalidTtl(ttl_seconds));
        }
        let end = self.ms(now).saturating_add(u64::from(ttl_seconds).saturating_mul(1000));
        let number = self.given.fetch_add(1, Ordering::Relaxed);
        let tag = self.mac(end, number).finalize().into_bytes();
        let mut halves =
            tag.chunks_exact(8).map(|half| half.iter().fold(0, |n, b| n << 8 | u64::from(*b)));
        let (high, low) = (halves.next().unwrap_or_default(), halves.next().unwrap_or_default());
        Ok(format!("{end:016x}{number:016x}{high:016x}{low:016x}"))
    }

    /// Whether `token` was given out here, and has not ended.
    pub(super) fn is_valid(&self, token: &str, now: Instant) -> bool {
        let Some([end, number, high, low]) = parse(token) else { return false };
        let tag = [high.to_be_bytes(), low.to_be_bytes()].concat();
        self.mac(end, number).verify_truncated_left(&tag).is_ok() && end > self.ms(now)
    }

    fn ms(&self, now: Instant) -> u64 {
        let since = now.checked_duration_since(self.epoch).unwrap_or(Duration::ZERO);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    /// HMAC-SHA256; a token has its first 128 bits.
    fn mac(&self, end: u64, number: u64) -> Hmac<Sha256> {
        let mut mac = Hmac::new(&self.key.into());
        mac.update(&end.to_be_bytes());
        mac.update(&number.to_be_bytes());
        mac
    }
}

fn parse(token: &str) -> Option<[u64; 4]> {
    let mut numbers = [0; 4];
    if token.len() != DIGITS.checked_mul(numbers.len())?
        || !token.bytes().all(|byte| byte.is_ascii_hexdigit())
    {
        return None;
    }
    let mut rest = token;
    for number in &mut numbers {
        let (digits, tail) = rest.split_at_checked(DIGITS)?;
        *number = u64::from_str_radix(digits, 16).ok()?;
        rest = tail;
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_valid_until_it_ends() {
        let tokens = Tokens::new().unwrap();
        let now = Instant::now();
        let token = tokens.give(60, now).unwrap();
        assert_eq!(token.len(), 64);
        assert!(tokens.is_valid(&token, now));
        assert!(tokens.is_valid(&token, now + Duration::from_millis(59_998)));
        assert!(!tokens.is_valid(&token, now + Duration::from_secs(60)));
        assert_ne!(token, tokens.give(60, now).unwrap());
    }

    #[test]
    fn lifetimes_have_bounds() {
        let tokens = Tokens::new().unwrap();
        let now = Instant::now();
        assert!(tokens.give(1, now).is_ok() && tokens.give(21600, now).is_ok());
        for ttl in [0, 21601, u32::MAX] {
            let e = tokens.give(ttl, now).unwrap_err().to_string();
            assert_eq!(
                e,
                format!(
                    "Invalid time to live value provided for token: {ttl}. Please provide a value \
                     between 1 and 21600."
                )
            );
        }
    }

    #[test]
    fn nothing_else_is_a_token() {
        let tokens = Tokens::new().unwrap();
        let now = Instant::now();
        let token = tokens.give(21600, now).unwrap();
        // Every change of one digit, the end and the number included.
        for at in 0..token.len() {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            assert!(!tokens.is_valid(std::str::from_utf8(&changed).unwrap(), now), "{at}");
        }
        // No room for a sign, nor for anything that is not ASCII.
        let signed = format!("+{}", &token[1..]);
        let wide = "é".repeat(32);
        for other in ["", "0", &token[1..], &format!("{token}0"), &signed, &wide, &"0".repeat(64)] {
            assert!(!tokens.is_valid(other, now), "{other}");
        }
        assert!(!Tokens::new().unwrap().is_valid(&token, now), "another VM's");
        assert!(!format!("{tokens:?}").contains("key"));
    }
}
