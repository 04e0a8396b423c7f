//! virtio-blk (virtio 1.2, 5.2) over a [`Disk`]. This file is what the driver and the user see;
//! `request` executes what is in the queue.
mod flight;
mod request;
mod vhost_user;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use event_manager::EventSet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::flight::Flight;
use self::request::{Executor, Outcome};
use self::vhost_user::VhostUserBlock;
use super::file::{claim, refused};
use super::model::{
    Change, Claim, DeviceError, Env, Left, Model, VirtioDevice, check_id, null_is_default,
};
use super::queue::{Served, VirtQueue, split};
use crate::backend::disk::{Disk, DiskError, SECTOR_SIZE};
use crate::backend::file::{Access, is_shortage};
pub use crate::backend::overlay::Place;
use crate::backend::overlay::{Frozen, Keeping};
use crate::backend::passed::Name;
use crate::counters;
use crate::io::{Retired, Source, Watch, Worker};
use crate::limiter::{Limits, RateLimiter};
use crate::metrics::{CounterSet, Group};
use crate::sys::uring::{Reserve, Uring};

const QUEUE_SIZE: u16 = 256;
const OVERLAY: &str = "overlay";
const NO_URING: &str = "io_engine: Async needs io_uring";
/// Data buffers in one request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes in one request, and bytes served before other devices get their turn.
const MAX_REQUEST_BYTES: u64 = 64 << 20;
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
const MAX_DISCARD_SEGMENTS: u32 = 16;
/// Fewer, because a file system without holes has to write them all.
const MAX_ZERO_SECTORS: u32 = 1 << 17;
const MAX_ZERO_SEGMENTS: u32 = 1;
/// Holes are made of whole pages.
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;
const ID_BYTES: usize = 20;

/// Feature bits (virtio 1.2, 5.2.3).
mod feature {
    pub(super) const SIZE_MAX: u64 = 1 << 1;
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const GEOMETRY: u64 = 1 << 4;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// What a flush by the driver means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum CacheType {
    /// Nothing: it is not offered, and the host writes back when it likes. A crash of the host may
    /// lose what the guest believes is safe.
    #[default]
    Unsafe,
    /// What was written survives a crash of the host.
    Writeback,
}

/// How the file is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum IoEngine {
    /// One call at a time.
    #[default]
    Sync,
    /// Many at a time, with io_uring.
    Async,
}

/// What the user says about a drive.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Drive")]
pub struct Config {
    /// The id: 1 to 64 letters, digits, underscores or hyphens.
    pub drive_id: String,
    /// A regular file or block device; `passed:N` is a descriptor that came with the request.
    #[serde(default)]
    pub path_on_host: Option<Name>,
    /// Whether the guest boots from it. It then comes first: `/dev/vda`.
    pub is_root_device: bool,
    /// Whether the guest may only read it.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schemars(with = "Option<bool>")]
    pub is_read_only: bool,
    /// The root partition, by its id, if it is not the whole drive.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// What a flush means.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schemars(with = "Option<CacheType>")]
    pub cache_type: CacheType,
    /// How the file is read and written.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schemars(with = "Option<IoEngine>")]
    pub io_engine: IoEngine,
    /// Limits on the drive's use of the host.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// The group whose limits it shares. husk only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_group: Option<String>,
    /// Where what the guest writes goes, if not to the file, which is then only read and may be shared.
    /// husk only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Place>,
    /// Socket of a vhost-user back end, in place of a path: another process serves the drive.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

impl Config {
    /// A writable drive that is not the root device.
    pub fn new(drive_id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            drive_id: drive_id.into(),
            path_on_host: Some(Name::from(path.into())),
            is_root_device: false,
            is_read_only: false,
            partuuid: None,
            cache_type: CacheType::default(),
            io_engine: IoEngine::default(),
            rate_limiter: None,
            rate_limit_group: None,
            overlay: None,
            socket: None,
        }
    }

    /// Of the file.
    fn access(&self) -> Access {
        match self.is_read_only || self.overlay.is_some() {
            true => Access::Read,
            false => Access::ReadWrite,
        }
    }

    /// How soon a layer that is kept knows what it has: no later than the driver may expect.
    fn keeping(&self) -> Keeping {
        match self.cache_type {
            CacheType::Unsafe => Keeping::AtOnce,
            CacheType::Writeback => Keeping::AtFlush,
        }
    }

    /// Refuses what is wrong whatever the host has; the path otherwise.
    fn check_words(&self) -> Result<&Path, DeviceError> {
        self.check_names()?;
        if self.is_read_only && self.overlay.is_some() {
            let why = "nothing is written to a drive that is read-only: leave one of the two out";
            return Err(DeviceError::field(OVERLAY, why));
        }
        let path = self.path_on_host.as_ref().map(|path| path.as_path());
        path.ok_or_else(|| DeviceError::field("path_on_host", "is missing"))
    }

    /// Refuses ids that cannot be.
    fn check_names(&self) -> Result<(), DeviceError> {
        check_id("drive_id", &self.drive_id)?;
        let is_part_of_id = |c: char| c.is_ascii_alphanumeric() || "-/=".contains(c);
        if let Some(id) = &self.partuuid
            && (id.is_empty() || !id.chars().all(is_part_of_id))
        {
            return Err(DeviceError::field("partuuid", format!("{id:?} is no partition id")));
        }
        Ok(())
    }
}

/// What the user may change while the guest runs.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "PartialDrive")]
pub struct Patch {
    /// The drive.
    pub drive_id: String,
    /// The file to go on with: another one, or the same with another size; `passed:N` is a descriptor that came with the
    /// request.
    #[serde(default)]
    pub path_on_host: Option<Name>,
    /// Limits on the drive's use of the host: buckets to replace.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// The control half.
#[derive(Debug)]
pub struct Block {
    config: Config,
    disk: Arc<Disk>,
    limits: Limits,
    space: [u8; 60],
    /// For the asynchronous engine.
    ring: Option<Reserve>,
    counters: Arc<Counters>,
}

counters! {
    /// What is counted.
    struct Counters as "block" {
        /// Times the driver kicked the queue.
        queue_event_count: Counter,
        /// Reads that succeeded.
        read_count: Counter,
        /// Writes that succeeded.
        write_count: Counter,
        /// Bytes read.
        read_bytes: Counter,
        /// Bytes written.
        write_bytes: Counter,
        /// How long the host took to read, failures included.
        read_agg: Latency,
        /// How long the host took to write, failures included.
        write_agg: Latency,
        /// Flushes that succeeded.
        flush_count: Counter,
        /// Discards that succeeded.
        discard_count: Counter,
        /// Requests to write zeroes that succeeded.
        write_zeroes_count: Counter,
        /// Requests that the host failed.
        execute_fails: Counter,
        /// Requests that broke the rules or are not known.
        invalid_reqs_count: Counter,
        /// Times a request had to wait because of a rate limit.
        rate_limiter_throttled_events: Counter,
        /// Times a rate limit let requests go on.
        rate_limiter_event_count: Counter,
        /// Changes by the user that were applied.
        update_count: Counter,
        /// Changes by the user that were refused.
        update_fails: Counter,
    }
}

impl Model for Block {
    const NAME: &'static str = "drives";
    const MANY: bool = true;
    const ID_FIELD: &'static str = "drive_id";
    const PATCHABLE: bool = true;
    const REMOVABLE: bool = true;
    const OUTSIDE: &'static [&'static str] =
        &["path_on_host", "io_engine", "rate_limiter", "rate_limit_group", "overlay"];
    const OPENABLE: &'static [&'static str] = &["path_on_host"];
    const ABOUT: &'static str = "A disk: a file or block device of the host";
    const METRICS: Group = Counters::GROUP;
    const OTHER_METRICS: &'static [Group] = &[vhost_user::GROUP];
    type Config = Config;
    type Patch = Patch;

    fn id(config: &Config) -> &str {
        &config.drive_id
    }

    fn is_first(config: &Config) -> bool {
        config.is_root_device
    }

    fn kernel_args(config: &Config) -> Option<String> {
        let mode = if config.is_read_only { "ro" } else { "rw" };
        config.is_root_device.then(|| match &config.partuuid {
            Some(id) => format!("root=PARTUUID={id} {mode}"),
            None => format!("root=/dev/vda {mode}"),
        })
    }

    fn claims(config: &Config) -> Vec<Claim> {
        let path = config.path_on_host.as_ref().map(|path| path.as_path());
        let base = path.and_then(|path| claim(path, config.access()));
        let layer = match &config.overlay {
            Some(Place::File(path)) => claim(path, Access::ReadWrite),
            Some(Place::Memory | Place::Temporary) | None => None,
        };
        base.into_iter().chain(layer).collect()
    }

    fn needs_shared_memory(config: &Config) -> bool {
        config.socket.is_some()
    }

    fn rate_limit_groups(config: &Config) -> Vec<(&'static str, &str)> {
        let group = config.rate_limit_group.as_deref();
        group.map(|id| ("rate_limit_group", id)).into_iter().collect()
    }

    fn check(config: &Config) -> Result<(), DeviceError> {
        if let Some(socket) = &config.socket {
            config.check_names()?;
            return vhost_user::check(config, socket);
        }
        let path = config.check_words()?;
        if config.io_engine == IoEngine::Async {
            Uring::check().map_err(DeviceError::host(NO_URING))?;
        }
        match &config.overlay {
            Some(place) => Disk::check_over(path, place).map_err(unfit),
            None => Disk::check(path, config.access()).map_err(refused),
        }
    }

    fn open_any(config: &Config, env: &Env) -> Result<Box<dyn VirtioDevice>, DeviceError> {
        let Some(socket) = &config.socket else { return Ok(Box::new(Self::open(config, env)?)) };
        Self::check(config)?;
        Ok(Box::new(VhostUserBlock::connect(config, socket, env)?))
    }

    fn open(config: &Config, env: &Env) -> Result<Self, DeviceError> {
        let path = config.check_words()?;
        let group = config.rate_limit_group.as_deref();
        let limits = env.limits(config.rate_limiter.as_ref(), "rate_limit_group", group)?;
        let disk = match &config.overlay {
            Some(place) => Disk::open_over(path, place, config.keeping()).map_err(unfit)?,
            None => Disk::open(path, config.access()).map_err(refused)?,
        };
        let space = config_space(disk.size(), disk.is_writable());
        let ring = match config.io_engine {
            IoEngine::Sync => None,
            IoEngine::Async => Some(Reserve::new(QUEUE_SIZE).map_err(DeviceError::host(NO_URING))?),
        };
        let (disk, config) = (Arc::new(disk), config.clone());
        Ok(Self { config, disk, limits, space, ring, counters: Arc::default() })
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        2
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// A file system may hang, and a flush may take its time.
    fn may_block(&self) -> bool {
        true
    }

    fn features(&self) -> u64 {
        let mut features = feature::SEG_MAX | feature::BLK_SIZE;
        features |= match self.disk.is_writable() {
            false => feature::RO,
            true => feature::DISCARD | feature::WRITE_ZEROES,
        };
        if self.config.cache_type == CacheType::Writeback {
            features |= feature::FLUSH;
        }
        features
    }

    fn config_space(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.space)
    }

    fn activate(
        &mut self,
        queues: Vec<VirtQueue>,
        features: u64,
        _saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError> {
        let [requests] = split(queues)?;
        let mut id = [0; ID_BYTES];
        id.iter_mut().zip(self.config.drive_id.bytes()).for_each(|(to, from)| *to = from);
        let (disk, counters) = (self.disk.clone(), self.counters.clone());
        let limiter = self.limits.limiter()?;
        let flight = self.ring.as_ref().map(|ring| Flight::new(ring, requests.mem().clone()));
        let flight = flight.transpose().map_err(DeviceError::host(NO_URING))?;
        let executor = Executor { disk, id, features, limiter, flight, counters };
        Ok(Box::new(BlockWorker { requests, executor, is_held: false }))
    }

    fn rewind(&mut self) -> Result<Left, DeviceError> {
        Ok(if self.disk.is_writable() { Left::File } else { Left::Nothing })
    }

    fn update(&mut self, _view: Option<&str>, patch: &Value) -> Result<Change, DeviceError> {
        let change = self.try_update(patch);
        match &change {
            Ok(_) => self.counters.update_count().inc(),
            Err(_) => self.counters.update_fails().inc(),
        }
        change
    }

    fn counters(&self) -> Arc<dyn CounterSet> {
        self.counters.clone()
    }

    fn can_open_twice(&self) -> bool {
        matches!(self.config.overlay, Some(Place::Temporary | Place::Memory))
    }

    fn freeze_files(&mut self) -> Result<Option<Frozen>, DeviceError> {
        match self.disk.overlay() {
            Some(mut overlay) => overlay.freeze().map_err(|e| unfit(e.into())),
            None => Ok(None),
        }
    }

    fn adopt_files(&mut self, frozen: &Frozen) -> Result<(), DeviceError> {
        let mut overlay =
            self.disk.overlay().ok_or(DeviceError::Saved("its drive has no overlay here"))?;
        overlay.adopt(frozen).map_err(|e| unfit(e.into()))
    }
}

impl Block {
    fn try_update(&mut self, patch: &Value) -> Result<Change, DeviceError> {
        let patch = Patch::deserialize(patch)?;
        let Some(path) = patch.path_on_host else {
            self.limits.update(patch.rate_limiter.as_ref());
            return Ok(Change::Silent);
        };
        if self.disk.overlay().is_some() {
            let why = "what is under an overlay cannot change: the overlay belongs to it";
            return Err(DeviceError::field("path_on_host", why));
        }
        self.disk = Arc::new(self.disk.reopen(&path).map_err(refused)?);
        self.limits.update(patch.rate_limiter.as_ref());
        self.space = config_space(self.disk.size(), self.disk.is_writable());
        self.config.path_on_host = Some(path);
        Ok(Change::Config)
    }
}

/// Names the field that is at fault: the overlay, or the path of what is under it.
fn unfit(e: DiskError) -> DeviceError {
    match e {
        DiskError::Layer(e) if is_shortage(&e) => {
            DeviceError::host(OVERLAY)(std::io::Error::other(e))
        }
        DiskError::Layer(e) => DeviceError::field(OVERLAY, e.to_string()),
        e => refused(e),
    }
}

/// `struct virtio_blk_config` (virtio 1.2, 5.2.4), without what is not offered.
fn config_space(size: u64, is_writable: bool) -> [u8; 60] {
    let mut space = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| {
        space.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
    };
    put(0, &(size / SECTOR_SIZE).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &512u32.to_le_bytes());
    if is_writable {
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        put(44, &DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &MAX_ZERO_SEGMENTS.to_le_bytes());
        put(56, &[1]);
    }
    space
}

#[derive(Debug)]
struct BlockWorker {
    requests: VirtQueue,
    executor: Executor,
    /// There may be more to serve when what is in flight has come down.
    is_held: bool,
}

const KICK: usize = 0;

impl BlockWorker {
    /// Gives the driver what the host has done meanwhile.
    fn give_back(&mut self) {
        let Self { requests, executor, .. } = self;
        let Some(flight) = &executor.flight else { return };
        // EAGAIN if nothing has ended: the look at the ring tells, too.
        let _ = flight.event().read();
        while let Some((head, used)) = executor.ended(requests.mem()) {
            requests.complete(head, used);
        }
        requests.notify();
    }
}

impl Worker for BlockWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        let kick: Source<'_> = (self.requests.kick_fd(), EventSet::IN);
        let flight = self.executor.flight.as_ref();
        let ended = flight.map(|flight| -> Source<'_> { (flight.event(), EventSet::IN) });
        [Some(kick), self.executor.limiter.source(), ended].into_iter().flatten().collect()
    }

    fn ready(&mut self, source: usize) -> Watch {
        self.give_back();
        let Self { requests, executor, is_held } = self;
        match source {
            KICK => executor.counters.queue_event_count().inc(),
            _ if executor.limiter.has_fired() => executor.counters.rate_limiter_event_count().inc(),
            _ if *is_held => {}
            _ => return Watch::Keep,
        }
        *is_held = false;
        // What is in flight must be finished before a pause, so there is no more of it than that.
        let in_flight = |executor: &Executor| executor.flight.as_ref().map_or(0, Flight::bytes);
        let mut budget = MAX_REQUEST_BYTES.saturating_sub(in_flight(executor));
        requests.serve(|chain| {
            if budget == 0 {
                return Served::Later;
            }
            let (served, cost) = match executor.serve(&chain) {
                Outcome::Done { used, cost } => (Served::Used(used), cost),
                Outcome::Begun { cost } => (Served::Pending, cost),
                Outcome::Throttled => (Served::Later, 0),
            };
            budget = budget.saturating_sub(cost);
            served
        });
        if let Some(flight) = &mut executor.flight
            && let Err(e) = flight.ring().submit()
        {
            log::error!("drive: io_uring: {e}");
        }
        if budget == 0 {
            *is_held = in_flight(executor) >= MAX_REQUEST_BYTES;
            if !*is_held {
                requests.kick_again();
            }
        }
        executor.limiter.settle();
        Watch::Keep
    }

    fn finish(&mut self, deadline: Instant) -> bool {
        loop {
            self.give_back();
            if self.executor.flight.as_mut().is_none_or(|flight| flight.ring().in_flight() == 0) {
                return true;
            }
            if !self.executor.has_settled(deadline) {
                return false;
            }
        }
    }

    fn retire(self: Box<Self>) -> Retired {
        Retired { queues: vec![self.requests], state: Value::Null }
    }
}
