//! The metadata service (MMDS): data that the host's user puts there, and that the guest reads by
//! HTTP at a link-local address, on the interfaces that allow it. Firecracker's protocol and words.
//!
//! ```text
//!  store.rs     the data: put, patch, show; what of it the guest sees
//!  token.rs     session tokens of version 2
//!  http.rs      a request of the guest to a reply, bytes to bytes
//!  stack.rs     frames to TCP connections and back, over smoltcp
//! ```
//!
//! Nothing here knows virtio: frames come and go as bytes.
mod http;
mod stack;
mod store;
mod token;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use self::stack::{HEAD_BYTES, Stack};
use self::store::{Format, Store};
pub use self::store::{StoreError, merge};
use self::token::Tokens;
use crate::counters;
use crate::metrics::CounterSet;

/// Where the service is if the user says nothing.
pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Bytes that the data may have as JSON if the user says nothing.
pub const DEFAULT_SIZE_LIMIT: usize = 51200;

/// Whether the guest needs a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(rename = "MmdsVersion")]
pub enum Version {
    /// It does not, but may use one. Deprecated.
    #[default]
    V1,
    /// It does.
    V2,
}

/// What the user says about the service.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "MmdsConfig")]
pub struct Config {
    /// Whether the guest needs a token: with V2.
    #[serde(default)]
    pub version: Version,
    /// Ids of the interfaces on which the guest reaches the service.
    pub network_interfaces: Vec<String>,
    /// The service's address, link-local; 169.254.169.254 by default.
    #[serde(default)]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Whether replies are text whatever the guest accepts, as those of EC2's service.
    #[serde(default)]
    pub imds_compat: bool,
}

/// Why a configuration is refused. Firecracker's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No interface.
    #[error("The list of network interface IDs that allow forwarding MMDS requests is empty.")]
    NoInterface,
    /// Not 169.254.1.0 to 169.254.254.255.
    #[error("The MMDS IPv4 address is not link local.")]
    Address,
    /// An interface that is not there.
    #[error(
        "The list of network interface IDs provided contains at least one ID that does not \
         correspond to any existing network interface."
    )]
    UnknownInterface,
}

impl Config {
    /// Refuses what is wrong, given the ids of the interfaces that there are.
    pub fn check(&self, interfaces: &[&str]) -> Result<(), ConfigError> {
        // RFC 3927, 2.1: the first and the last 256 addresses are reserved.
        if !matches!(self.address().octets(), [169, 254, 1..=254, _]) {
            return Err(ConfigError::Address);
        }
        if self.network_interfaces.is_empty() {
            return Err(ConfigError::NoInterface);
        }
        match self.network_interfaces.iter().all(|id| interfaces.contains(&id.as_str())) {
            true => Ok(()),
            false => Err(ConfigError::UnknownInterface),
        }
    }

    /// The service's address.
    pub fn address(&self) -> Ipv4Addr {
        self.ipv4_address.unwrap_or(DEFAULT_ADDRESS)
    }
}

counters! {
    /// What is counted. Receive is from the guest, transmit to it.
    pub struct Counters as "mmds" {
        /// Frames taken from the guest, for the service's address.
        rx_accepted: Counter,
        /// Of these, TCP segments that are broken, for another port, or that the guest sends faster
        /// than it takes replies.
        rx_accepted_err: Counter,
        /// Of these, neither ARP nor whole TCP segments.
        rx_accepted_unusual: Counter,
        /// Of these, frames whose sender no frame can be sent to.
        rx_bad_eth: Counter,
        /// Requests with a token that is not valid.
        rx_invalid_token: Counter,
        /// Requests for data without a token.
        rx_no_token: Counter,
        /// TCP segments received.
        rx_count: Counter,
        /// Bytes of frames given to the driver.
        tx_bytes: Counter,
        /// Frames made.
        tx_count: Counter,
        /// Frames lost because they do not fit the driver's buffers.
        tx_errors: Counter,
        /// Frames given to the driver.
        tx_frames: Counter,
        /// Connections that the guest has begun.
        connections_created: Counter,
        /// Connections that have ended.
        connections_destroyed: Counter,
    }
}

/// The data of one VM, which is there whether the guest can reach it or not.
#[derive(Debug)]
pub struct Mmds {
    /// Protects the data. Held while one request of the host or the guest looks at it.
    store: Mutex<Store>,
    counters: Arc<Counters>,
}

impl Mmds {
    /// No data yet; at most `size_limit` bytes of JSON.
    pub fn new(size_limit: usize) -> Self {
        Self { store: Mutex::new(Store::new(size_limit)), counters: Arc::default() }
    }

    /// The data; an empty object if there are none.
    pub fn show(&self) -> Value {
        self.store().show()
    }

    /// Refuses what [`Self::put`] would refuse.
    pub fn check(&self, data: &Value) -> Result<(), StoreError> {
        self.store().check(data)
    }

    /// Replaces the data.
    pub fn put(&self, data: Value) -> Result<(), StoreError> {
        self.store().put(data)
    }

    /// Changes the data (RFC 7396).
    pub fn patch(&self, patch: &Value) -> Result<(), StoreError> {
        self.store().patch(patch)
    }

    /// What the service counts, on all interfaces.
    pub fn counters(&self) -> Arc<dyn CounterSet> {
        self.counters.clone()
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        // Every change is made at once, so a panic elsewhere leaves the data whole.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The service as the guest sees it: shared by the interfaces that lead to it.
#[derive(Debug)]
pub struct Service {
    mmds: Arc<Mmds>,
    config: Config,
    tokens: Tokens,
}

impl Service {
    /// A service with a key of its own for its tokens.
    pub fn new(mmds: Arc<Mmds>, config: Config) -> std::io::Result<Self> {
        Ok(Self { mmds, config, tokens: Tokens::new()? })
    }

    /// Whether it can be reached over an interface.
    pub fn is_on(&self, iface_id: &str) -> bool {
        self.config.network_interfaces.iter().any(|id| id == iface_id)
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.mmds.counters
    }

    fn value(&self, path: &str, format: Format) -> Result<String, StoreError> {
        self.mmds.store().value(path, format)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn refuses_addresses_and_interfaces_in_firecrackers_words() {
        let check = |change: Value| {
            let mut config = json!({"network_interfaces": ["eth0"]});
            config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let config: Config = serde_json::from_value(config).unwrap();
            config.check(&["eth0", "eth1"]).map_err(|e| e.to_string())
        };
        assert_eq!(check(json!({})), Ok(()));
        assert_eq!(check(json!({"network_interfaces": ["eth1", "eth0"], "version": "V2"})), Ok(()));
        let link_local = Err("The MMDS IPv4 address is not link local.".to_owned());
        for (address, expected) in [
            ("169.254.1.0", Ok(())),
            ("169.254.254.255", Ok(())),
            ("169.254.0.255", link_local.clone()),
            ("169.254.255.0", link_local.clone()),
            ("169.253.1.1", link_local.clone()),
            ("127.0.0.1", link_local),
        ] {
            assert_eq!(check(json!({"ipv4_address": address})), expected, "{address}");
        }
        let empty =
            "The list of network interface IDs that allow forwarding MMDS requests is empty.";
        assert_eq!(check(json!({"network_interfaces": []})), Err(empty.to_owned()));
        let unknown = "The list of network interface IDs provided contains at least one ID that \
                       does not correspond to any existing network interface.";
        assert_eq!(check(json!({"network_interfaces": ["eth0", "x"]})), Err(unknown.to_owned()));
    }
}
