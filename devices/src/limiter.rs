//! Rate limits as the user writes them (Firecracker's `RateLimiter`). No device applies one yet:
//! a configuration that has one is refused, not ignored.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    /// Whether it limits nothing.
    pub fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.ops.is_none()
    }
}

/// Holds `size` tokens and refills within `refill_time`.
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
