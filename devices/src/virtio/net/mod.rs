//! virtio-net (virtio 1.2, 5.1): one receive and one transmit queue over a [`Tap`]. This file is
//! what the driver and the user see; `worker` moves the frames; `detour` leads some of them to the
//! metadata service.
mod detour;
mod worker;

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::detour::Junction;
use self::worker::{Limiters, NetWorker};
use super::model::{Change, Claim, DeviceError, Env, Model, VirtioDevice, check_id};
use super::queue::{VirtQueue, split};
use crate::backend::passed::Name;
use crate::backend::tap::{self, Tap, TapError, offload};
use crate::counters;
use crate::io::Worker;
use crate::limiter::{Limits, RateLimiter};
use crate::metrics::{CounterSet, Group};

/// Feature bits (virtio 1.2, 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const GUEST_UFO: u64 = 1 << 10;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const HOST_UFO: u64 = 1 << 14;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
}

/// What the tap can do; what it means that the driver may leave to it; and what to the driver.
const OFFLOADS: [(u32, u64, u64); 5] = [
    (offload::CSUM, feature::CSUM, feature::GUEST_CSUM),
    (offload::TSO4, feature::HOST_TSO4, feature::GUEST_TSO4),
    (offload::TSO6, feature::HOST_TSO6, feature::GUEST_TSO6),
    (offload::ECN, feature::HOST_ECN, feature::GUEST_ECN),
    (offload::UFO, feature::HOST_UFO, feature::GUEST_UFO),
];

const QUEUE_SIZES: [u16; 2] = [256; 2];

/// What the user says about an interface.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "NetworkInterface")]
pub struct Config {
    /// The id: 1 to 64 letters, digits, underscores or hyphens.
    pub iface_id: String,
    /// The tap on the host, which must exist; or `fd:N` for the descriptor N, of a tap or a packet socket, that husk has
    /// been started with; or `passed:N` for one that came with the request.
    pub host_dev_name: Name<String>,
    /// The guest's address, as in `06:00:AC:10:00:02`. Without one the guest makes one up.
    #[serde(default)]
    pub guest_mac: Option<String>,
    /// The largest packet that the network takes, 68 to 65535 bytes, if the guest is to know.
    #[serde(default)]
    #[schemars(range(min = 68, max = 65535))]
    pub mtu: Option<u16>,
    /// Limits on what the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits on what the guest sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// The group whose limits it shares in receiving. husk only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limit_group: Option<String>,
    /// The group whose limits it shares in sending. husk only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limit_group: Option<String>,
}

impl Config {
    /// An interface without address, MTU and limits.
    pub fn new(iface_id: impl Into<String>, host_dev_name: impl Into<String>) -> Self {
        Self {
            iface_id: iface_id.into(),
            host_dev_name: Name::from(host_dev_name.into()),
            guest_mac: None,
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
            rx_rate_limit_group: None,
            tx_rate_limit_group: None,
        }
    }

    /// Refuses what is wrong whatever the host has; the address and the MTU otherwise.
    fn check_words(&self) -> Result<(Option<[u8; 6]>, Option<u16>), DeviceError> {
        check_id("iface_id", &self.iface_id)?;
        tap::check_name(&self.host_dev_name).map_err(refused)?;
        if let Some(mtu) = self.mtu.filter(|mtu| *mtu < 68) {
            return Err(DeviceError::field("mtu", format!("{mtu} is not in 68 to 65535")));
        }
        Ok((self.guest_mac.as_deref().map(parse_mac).transpose()?, self.mtu))
    }
}

/// What the user may change while the guest runs.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "PartialNetworkInterface")]
pub struct Patch {
    /// The interface.
    pub iface_id: String,
    /// Limits on what the guest receives: buckets to replace.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits on what the guest sends: buckets to replace.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// The control half.
#[derive(Debug)]
pub struct Net {
    id: String,
    tap: Arc<Tap>,
    rx_limits: Limits,
    tx_limits: Limits,
    features: u64,
    space: [u8; 12],
    counters: Arc<Counters>,
    /// To the metadata service, if the interface leads there.
    junction: Option<Junction>,
}

counters! {
    /// What is counted. Receive is to the guest, transmit from it.
    struct Counters as "net" {
        /// Times the driver kicked the receive queue.
        rx_queue_event_count: Counter,
        /// Times the tap had something.
        rx_tap_event_count: Counter,
        /// Frames given to the driver.
        rx_packets_count: Counter,
        /// Bytes of these frames.
        rx_bytes_count: Counter,
        /// Reads of the tap that gave a frame.
        rx_count: Counter,
        /// Frames dropped: they do not fit the driver's buffers, or are too short.
        rx_fails: Counter,
        /// Receive buffers given back unused: not RAM, too short or too many pieces.
        rx_bad_buffers: Counter,
        /// Times the driver had no receive buffer left.
        no_rx_avail_buffer: Counter,
        /// Reads of the tap that failed.
        tap_read_fails: Counter,
        /// Times the driver kicked the transmit queue.
        tx_queue_event_count: Counter,
        /// Frames taken from the driver and sent.
        tx_packets_count: Counter,
        /// Bytes of these frames.
        tx_bytes_count: Counter,
        /// Writes to the tap that succeeded.
        tx_count: Counter,
        /// Frames dropped, whatever the cause.
        tx_fails: Counter,
        /// Frames dropped because they are too short or too long, or not in RAM.
        tx_malformed_frames: Counter,
        /// Frames dropped because the tap did not take them.
        tap_write_fails: Counter,
        /// How long the tap took to take a frame, failures included.
        tap_write_agg: Latency,
        /// Times the guest had to wait for frames because of a rate limit.
        rx_rate_limiter_throttled: Counter,
        /// Times a rate limit let it receive on.
        rx_event_rate_limiter_count: Counter,
        /// Times frames of the guest had to wait because of a rate limit.
        tx_rate_limiter_throttled: Counter,
        /// Times a rate limit let them go on.
        tx_rate_limiter_event_count: Counter,
        /// Times the tap was found to be gone.
        tap_gone: Counter,
    }
}

impl Net {
    /// An interface plugged into a descriptor that somebody else opened: a tap, or a packet socket
    /// whose peer reads and writes a 12-byte virtio-net header before each frame. The
    /// `host_dev_name` of `config` is not looked at.
    pub fn from_fd(config: &Config, env: &Env, fd: OwnedFd) -> Result<Self, DeviceError> {
        Self::plug(config, env, Tap::from_fd(fd).map_err(refused)?)
    }

    fn plug(config: &Config, env: &Env, tap: Tap) -> Result<Self, DeviceError> {
        let (mac, mtu) = config.check_words()?;
        let limits = |own: &Option<RateLimiter>, field, group: &Option<String>| {
            env.limits(own.as_ref(), field, group.as_deref())
        };
        let rx = (&config.rx_rate_limiter, &config.rx_rate_limit_group);
        let tx = (&config.tx_rate_limiter, &config.tx_rate_limit_group);
        let mut features = feature::MRG_RXBUF;
        for (offload, host, guest) in OFFLOADS {
            if tap.offloads() & offload != 0 {
                features |= host | guest;
            }
        }
        features |= if mac.is_some() { feature::MAC } else { 0 };
        features |= if mtu.is_some() { feature::MTU } else { 0 };
        let service = env.mmds.as_ref().filter(|service| service.is_on(&config.iface_id));
        let junction = service.map(|service| Junction::new(service.clone(), mtu));
        Ok(Self {
            id: config.iface_id.clone(),
            tap: Arc::new(tap),
            rx_limits: limits(rx.0, "rx_rate_limit_group", rx.1)?,
            tx_limits: limits(tx.0, "tx_rate_limit_group", tx.1)?,
            features,
            space: config_space(mac.unwrap_or_default(), mtu.unwrap_or_default()),
            counters: Arc::default(),
            junction,
        })
    }
}

impl Model for Net {
    const NAME: &'static str = "network-interfaces";
    const MANY: bool = true;
    const ID_FIELD: &'static str = "iface_id";
    const PATCHABLE: bool = true;
    const REMOVABLE: bool = true;
    const OUTSIDE: &'static [&'static str] = &[
        "host_dev_name",
        "guest_mac",
        "rx_rate_limiter",
        "tx_rate_limiter",
        "rx_rate_limit_group",
        "tx_rate_limit_group",
    ];
    const OPENABLE: &'static [&'static str] = &["host_dev_name"];
    const DESCRIPTORS: &'static [&'static str] = &["host_dev_name"];
    const ABOUT: &'static str = "A network interface, plugged into a tap of the host";
    const METRICS: Group = Counters::GROUP;
    type Config = Config;
    type Patch = Patch;

    fn id(config: &Config) -> &str {
        &config.iface_id
    }

    fn claims(config: &Config) -> Vec<Claim> {
        let tap = &config.host_dev_name;
        let mut claims = vec![Claim {
            key: format!("tap {tap}"),
            is_shared: false,
            is_of_host: true,
            refusal: refused(TapError::InUse(tap.to_string())),
        }];
        claims.extend(config.guest_mac.as_ref().map(|mac| Claim {
            key: format!("mac {}", mac.to_ascii_lowercase()),
            is_shared: false,
            is_of_host: false,
            refusal: DeviceError::MacInUse(mac.clone()),
        }));
        claims
    }

    fn rate_limit_groups(config: &Config) -> Vec<(&'static str, &str)> {
        let rx = config.rx_rate_limit_group.as_deref().map(|id| ("rx_rate_limit_group", id));
        let tx = config.tx_rate_limit_group.as_deref().map(|id| ("tx_rate_limit_group", id));
        rx.into_iter().chain(tx).collect()
    }

    fn check(config: &Config) -> Result<(), DeviceError> {
        config.check_words()?;
        Tap::open(&config.host_dev_name).map(|_tap| ()).map_err(refused)
    }

    fn open(config: &Config, env: &Env) -> Result<Self, DeviceError> {
        config.check_words()?;
        Self::plug(config, env, Tap::open(&config.host_dev_name).map_err(refused)?)
    }
}

fn refused(e: TapError) -> DeviceError {
    match e {
        TapError::Host { what, source } => {
            DeviceError::host(format!("host_dev_name: cannot {what}"))(source)
        }
        // The name is good; it is the host that does not have the tap, or not for us.
        e @ (TapError::Missing(_)
        | TapError::InUse(_)
        | TapError::NotOurs(_)
        | TapError::NoDescriptor(_)) => {
            DeviceError::host("host_dev_name")(std::io::Error::other(e.to_string()))
        }
        e => DeviceError::field("host_dev_name", e.to_string()),
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        1
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config_space(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.space)
    }

    fn activate(
        &mut self,
        queues: Vec<VirtQueue>,
        features: u64,
        saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError> {
        let [rx, tx] = split(queues)?;
        let set = offloads_for(features);
        let is_mergeable = features & feature::MRG_RXBUF != 0;
        if let Err(e) = self.tap.set_offloads(set) {
            // Deleted meanwhile: the guest's interface is quiet then, but the guest lives.
            log::warn!("{} {}: cannot set offloads: {e}", Self::NAME, self.id);
        }
        let detour = self.junction.as_ref().map(|junction| junction.open(saved.is_some()));
        let detour = detour.transpose().map_err(DeviceError::host("metadata service"))?;
        let (tap, counters) = (self.tap.clone(), self.counters.clone());
        let limiters = Limiters { rx: self.rx_limits.limiter()?, tx: self.tx_limits.limiter()? };
        Ok(Box::new(NetWorker::new(rx, tx, tap, is_mergeable, limiters, counters, detour)))
    }

    fn update(&mut self, _view: Option<&str>, patch: &Value) -> Result<Change, DeviceError> {
        let patch = Patch::deserialize(patch)?;
        self.rx_limits.update(patch.rx_rate_limiter.as_ref());
        self.tx_limits.update(patch.tx_rate_limiter.as_ref());
        Ok(Change::Silent)
    }

    fn counters(&self) -> Arc<dyn CounterSet> {
        self.counters.clone()
    }
}

/// What the driver takes from the tap. The kernel refuses segments without checksums (as does
/// virtio 1.2, 5.1.3.1), so a driver that asks for them gets neither.
fn offloads_for(features: u64) -> u32 {
    if features & feature::GUEST_CSUM == 0 {
        return 0;
    }
    let taken = OFFLOADS.iter().filter(|(_, _, guest)| features & guest != 0);
    taken.map(|(offload, ..)| offload).fold(0, |set, offload| set | offload)
}

/// `struct virtio_net_config` (virtio 1.2, 5.1.4): address, status, queue pairs, MTU.
fn config_space(mac: [u8; 6], mtu: u16) -> [u8; 12] {
    let mut space = [0; 12];
    let fields = mac.into_iter().chain([0; 4]).chain(mtu.to_le_bytes());
    space.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
    space
}

fn parse_mac(text: &str) -> Result<[u8; 6], DeviceError> {
    let bad = |why: &str| DeviceError::field("guest_mac", format!("{text:?} {why}"));
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part =
            parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
        let value = part.and_then(|p| u8::from_str_radix(p, 16).ok());
        *byte = value.ok_or_else(|| {
            bad("is no address; want six pairs of hex digits like 06:00:AC:10:00:02")
        })?;
    }
    if parts.next().is_some() {
        return Err(bad("has more than six bytes"));
    }
    // Drivers make up an address in place of one that no interface may have.
    if mac.first().is_some_and(|first| first & 1 != 0) || mac == [0; 6] {
        return Err(bad("is a multicast address or zero, which no interface may have"));
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_addresses() {
        assert_eq!(parse_mac("06:00:AC:10:00:02").unwrap(), [6, 0, 0xac, 0x10, 0, 2]);
        for bad in [
            "",
            "06",
            "06:00:ac:10:00",
            "06:00:ac:10:00:02:03",
            "6:0:ac:10:0:2",
            "06:00:ac:10:00:0g",
            "06:00:ac:10:00:+2",
            "01:00:00:00:00:00",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
        ] {
            let e = parse_mac(bad).unwrap_err().to_string();
            assert!(e.starts_with("guest_mac: ") && e.contains(bad), "{e}");
        }
    }

    #[test]
    fn segments_need_checksums() {
        assert_eq!(offloads_for(feature::GUEST_TSO4), 0);
        let both = offloads_for(feature::GUEST_TSO4 | feature::GUEST_CSUM | feature::HOST_TSO6);
        assert_eq!(both, offload::CSUM | offload::TSO4);
    }
}
