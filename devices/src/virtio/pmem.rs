//! virtio-pmem (virtio 1.2, 5.19): a file that the guest finds in its memory. What it reads and
//! writes there goes past husk; the queue is for flushes only.
use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

use event_manager::EventSet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::Le32;

use super::chain::{Chain, Fault};
use super::file::{claim, refused};
use super::model::{
    Change, Claim, DeviceError, Env, Left, Model, VirtioDevice, check_id, null_is_default,
};
use super::queue::{Served, VirtQueue, split};
use crate::backend::file::Access;
use crate::backend::mapped::MappedFile;
use crate::backend::passed::Name;
use crate::counters;
use crate::io::{Retired, Source, Watch, Worker};
use crate::limiter::{Limiter, Limits, RateLimiter};
use crate::memory::{GuestRegion, OwnMemory, Piece, Placement};
use crate::metrics::{CounterSet, Group};

const QUEUE_SIZE: u16 = 256;
/// The one request there is (5.19.6).
const FLUSH: u32 = 0;
/// What became of it.
const OK: u32 = 0;
const FAILED: u32 = u32::MAX;

/// What the user says about it.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Pmem")]
pub struct Config {
    /// The id: 1 to 64 letters, digits, underscores or hyphens.
    pub id: String,
    /// A regular file; `passed:N` is a descriptor that came with the request.
    pub path_on_host: Name,
    /// Whether the guest boots from it. It then comes first: `/dev/pmem0`.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schemars(with = "Option<bool>")]
    pub root_device: bool,
    /// Whether the guest may only read it.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schemars(with = "Option<bool>")]
    pub read_only: bool,
    /// Limits on flushes, each of which counts as the whole file.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// The group whose limits it shares. husk only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_group: Option<String>,
}

impl Config {
    /// A writable device that is not the root device.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            id: id.into(),
            path_on_host: Name::from(path.into()),
            root_device: false,
            read_only: false,
            rate_limiter: None,
            rate_limit_group: None,
        }
    }

    fn access(&self) -> Access {
        if self.read_only { Access::Read } else { Access::ReadWrite }
    }
}

/// What the user may change while the guest runs.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "PartialPmem")]
pub struct Patch {
    /// The device.
    pub id: String,
    /// Limits on flushes, each of which counts as the whole file.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// The control half.
#[derive(Debug)]
pub struct Pmem {
    config: Config,
    file: Arc<MappedFile>,
    limits: Limits,
    /// Where it is, once a machine is put together.
    place: Option<Placement>,
    counters: Arc<Counters>,
}

counters! {
    /// What is counted.
    struct Counters as "pmem" {
        /// Times the driver kicked the queue.
        queue_event_count: Counter,
        /// Flushes that the host failed.
        execute_fails: Counter,
        /// Requests that the driver got wrong.
        invalid_reqs_count: Counter,
        /// Flushes that succeeded.
        flush_count: Counter,
        /// How long the host took to flush.
        flush_agg: Latency,
        /// Times a flush had to wait because of a rate limit.
        rate_limiter_throttled_events: Counter,
        /// Times a rate limit let flushes go on.
        rate_limiter_event_count: Counter,
    }
}

impl Model for Pmem {
    const NAME: &'static str = "pmem";
    const MANY: bool = true;
    const ID_FIELD: &'static str = "id";
    const PATCHABLE: bool = true;
    const REMOVABLE: bool = true;
    const OUTSIDE: &'static [&'static str] = &["path_on_host", "rate_limiter", "rate_limit_group"];
    const OPENABLE: &'static [&'static str] = &["path_on_host"];
    const ABOUT: &'static str = "A file in the guest's memory, past its page cache";
    const METRICS: Group = Counters::GROUP;
    type Config = Config;
    type Patch = Patch;

    fn id(config: &Config) -> &str {
        &config.id
    }

    fn is_first(config: &Config) -> bool {
        config.root_device
    }

    fn kernel_args(config: &Config) -> Option<String> {
        let mode = if config.read_only { "ro" } else { "rw" };
        config.root_device.then(|| format!("root=/dev/pmem0 {mode}"))
    }

    fn claims(config: &Config) -> Vec<Claim> {
        claim(&config.path_on_host, config.access()).into_iter().collect()
    }

    fn rate_limit_groups(config: &Config) -> Vec<(&'static str, &str)> {
        let group = config.rate_limit_group.as_deref();
        group.map(|id| ("rate_limit_group", id)).into_iter().collect()
    }

    fn check(config: &Config) -> Result<(), DeviceError> {
        check_id("id", &config.id)?;
        MappedFile::check(&config.path_on_host, config.access()).map_err(refused)
    }

    fn open(config: &Config, env: &Env) -> Result<Self, DeviceError> {
        check_id("id", &config.id)?;
        let file = MappedFile::open(&config.path_on_host, config.access()).map_err(refused)?;
        let (file, config) = (Arc::new(file), config.clone());
        let group = config.rate_limit_group.as_deref();
        let limits = env.limits(config.rate_limiter.as_ref(), "rate_limit_group", group)?;
        Ok(Self { config, file, limits, place: None, counters: Arc::default() })
    }
}

impl VirtioDevice for Pmem {
    fn device_id(&self) -> u32 {
        27
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    /// `struct virtio_pmem_config` (5.19.4): where it begins, and how long it is.
    fn config_space(&self) -> Cow<'_, [u8]> {
        let start = self.place.as_ref().map_or(0, |place| place.addr.0);
        let fields = [start, self.size()];
        Cow::Owned(fields.into_iter().flat_map(u64::to_le_bytes).collect())
    }

    fn own_memory(&mut self) -> Option<&mut dyn OwnMemory> {
        Some(self)
    }

    /// A flush takes as long as the host's file system likes.
    fn may_block(&self) -> bool {
        true
    }

    fn activate(
        &mut self,
        queues: Vec<VirtQueue>,
        _features: u64,
        _saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError> {
        let [requests] = split(queues)?;
        let limiter = self.limits.limiter()?;
        let (file, counters) = (self.file.clone(), self.counters.clone());
        Ok(Box::new(PmemWorker { requests, limiter, file, counters }))
    }

    fn counters(&self) -> Arc<dyn CounterSet> {
        self.counters.clone()
    }

    fn rewind(&mut self) -> Result<Left, DeviceError> {
        Ok(if self.config.read_only { Left::Nothing } else { Left::File })
    }

    fn update(&mut self, _view: Option<&str>, patch: &Value) -> Result<Change, DeviceError> {
        let patch = Patch::deserialize(patch)?;
        self.limits.update(patch.rate_limiter.as_ref());
        Ok(Change::Silent)
    }
}

impl OwnMemory for Pmem {
    fn size(&self) -> u64 {
        self.file.memory().mapping().len()
    }

    fn slots(&self) -> u64 {
        1
    }

    fn place(&mut self, place: Placement) -> Result<GuestRegion, DeviceError> {
        let piece = self.piece(&place);
        place.slots.show(&piece).map_err(DeviceError::host("cannot show it to the guest"))?;
        let region = GuestRegion::file(place.addr, self.file.memory().clone());
        self.place = Some(place);
        Ok(region)
    }

    /// A guest that goes on knows how much there is: the file's size, not that of the mapping.
    fn check(&self, saved: &Value) -> Result<(), DeviceError> {
        let (is, was) = (self.file.size(), saved.get("bytes").and_then(Value::as_u64));
        match was.filter(|&was| was != is) {
            None => Ok(()),
            Some(was) => {
                let path = self.config.path_on_host.display();
                let why = format!(
                    "'{path}' has {is} bytes, and had {was} when it was saved: give a file of that size"
                );
                Err(DeviceError::field("path_on_host", why))
            }
        }
    }

    /// Its contents are the file's, and stay there.
    fn save(&self) -> Value {
        serde_json::json!({ "bytes": self.file.size() })
    }

    fn restore(&mut self, _saved: &Value) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl Pmem {
    fn piece(&self, place: &Placement) -> Piece {
        let host = self.file.memory().mapping().host_address(0);
        let is_read_only = self.config.read_only;
        Piece { slot: 0, addr: place.addr, host, len: self.size(), is_read_only }
    }
}

/// Nothing to do in a machine that is gone; in one that goes on, the guest's place is taken first,
/// then the file is let go, if no other device is in the middle of using it.
impl Drop for Pmem {
    fn drop(&mut self) {
        let Some(place) = self.place.take() else { return };
        let memory = self.file.memory();
        let hidden = place.slots.hide(&self.piece(&place));
        if let Err(e) = hidden.and_then(|()| match memory.withdraw(&place.leases) {
            true => memory.mapping().vacate(),
            false => Err(std::io::ErrorKind::ResourceBusy.into()),
        }) {
            let path = self.config.path_on_host.display();
            log::error!("pmem {}: {path} stays mapped: {e}", self.config.id);
        }
    }
}

#[derive(Debug)]
struct PmemWorker {
    requests: VirtQueue,
    limiter: Limiter,
    file: Arc<MappedFile>,
    counters: Arc<Counters>,
}

const KICK: usize = 0;

impl Worker for PmemWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        let kick: Source<'_> = (self.requests.kick_fd(), EventSet::IN);
        [Some(kick), self.limiter.source()].into_iter().flatten().collect()
    }

    fn ready(&mut self, source: usize) -> Watch {
        let Self { requests, limiter, file, counters } = self;
        match source {
            KICK => counters.queue_event_count().inc(),
            _ if limiter.has_fired() => counters.rate_limiter_event_count().inc(),
            _ => return Watch::Keep,
        }
        // One flush a turn: it may take the host long, and whoever wants the worker back waits for one.
        let mut has_flushed = false;
        let mut is_more_left = false;
        requests.serve(|chain| {
            if has_flushed {
                is_more_left = true;
                return Served::Later;
            }
            if !limiter.take(file.size()) {
                counters.rate_limiter_throttled_events().inc();
                return Served::Later;
            }
            let written = serve(&chain, file, counters);
            has_flushed = written.is_ok();
            if written.is_err() {
                counters.invalid_reqs_count().inc();
            }
            Served::Used(written.unwrap_or(0))
        });
        if is_more_left {
            requests.kick_again();
        }
        limiter.settle();
        Watch::Keep
    }

    fn retire(self: Box<Self>) -> Retired {
        Retired { queues: vec![self.requests], state: Value::Null }
    }
}

/// Serves one request; the bytes written to the driver's buffers.
fn serve(chain: &Chain<'_>, file: &MappedFile, counters: &Counters) -> Result<u32, Fault> {
    let (mut input, mut output) = (chain.readable(), chain.writable());
    let is_well_formed = input.len() == 4 && output.len() == 4 && !chain.is_mixed();
    if !is_well_formed || input.read_obj::<Le32>()?.to_native() != FLUSH {
        return Err(Fault);
    }
    let result = match counters.flush_agg().time(|| file.flush()) {
        Ok(()) => {
            counters.flush_count().inc();
            OK
        }
        Err(e) => {
            log::warn!("pmem: flush: {e}");
            counters.execute_fails().inc();
            FAILED
        }
    };
    output.write_obj(Le32::from(result))?;
    Ok(4)
}
