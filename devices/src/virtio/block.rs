//! virtio-blk (virtio 1.2, 5.2): requests of the driver become calls on a [`Disk`], one after the
//! other, straight between the file and guest memory.
//!
//! A malformed request gets `IOERR` if its status byte can be reached, and comes back with nothing
//! written if not. It never stops the queue.
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use event_manager::EventSet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::{Le32, Le64};

use super::chain::{Chain, Fault, Readable, Writable};
use super::model::{Change, DeviceError, Model, VirtioDevice, check_id, refuse_unsupported};
use super::queue::{Served, VirtQueue, split};
use crate::backend::disk::{Disk, DiskError, SECTOR_SIZE, Unmap};
use crate::backend::file::Access;
use crate::io::{Retired, Watch, Worker};
use crate::limiter::RateLimiter;
use crate::metrics::Counter;
use crate::sys::rw::IoSlices;

const QUEUE_SIZE: u16 = 256;
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
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types (virtio 1.2, 5.2.6).
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
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
    /// With io_uring. Not supported yet.
    Async,
}

/// What the user says about a drive.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The id: 1 to 64 letters, digits, underscores or hyphens.
    pub drive_id: String,
    /// A regular file or block device.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// Whether the guest boots from it. It then comes first: `/dev/vda`.
    pub is_root_device: bool,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub is_read_only: bool,
    /// The root partition, by its id, if it is not the whole drive.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// What a flush means.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How the file is read and written.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Limits on the drive's use of the host. Not supported yet.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// Socket of a vhost-user back end. Not supported yet.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

impl Config {
    /// A writable drive that is not the root device.
    pub fn new(drive_id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            drive_id: drive_id.into(),
            path_on_host: Some(path.into()),
            is_root_device: false,
            is_read_only: false,
            partuuid: None,
            cache_type: CacheType::default(),
            io_engine: IoEngine::default(),
            rate_limiter: None,
            socket: None,
        }
    }

    fn access(&self) -> Access {
        if self.is_read_only { Access::Read } else { Access::ReadWrite }
    }

    /// Refuses what is wrong whatever the host has; the path otherwise.
    fn check_words(&self) -> Result<&Path, DeviceError> {
        check_id("drive_id", &self.drive_id)?;
        refuse_unsupported("socket", self.socket.as_ref())?;
        refuse_unsupported("rate_limiter", self.rate_limiter.as_ref())?;
        if self.io_engine == IoEngine::Async {
            return Err(DeviceError::field("io_engine", "Async is not supported yet"));
        }
        let is_part_of_id = |c: char| c.is_ascii_alphanumeric() || "-/=".contains(c);
        if let Some(id) = &self.partuuid
            && (id.is_empty() || !id.chars().all(is_part_of_id))
        {
            return Err(DeviceError::field("partuuid", format!("{id:?} is no partition id")));
        }
        self.path_on_host.as_deref().ok_or_else(|| DeviceError::field("path_on_host", "is missing"))
    }
}

/// What the user may change while the guest runs.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Patch {
    /// The drive.
    pub drive_id: String,
    /// The file to go on with: another one, or the same with another size.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// Limits on the drive's use of the host. Not supported yet.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// The control half.
#[derive(Debug)]
pub struct Block {
    config: Config,
    disk: Arc<Disk>,
    space: [u8; 60],
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    queue_events: Counter,
    reads: Counter,
    writes: Counter,
    read_bytes: Counter,
    write_bytes: Counter,
    flushes: Counter,
    discards: Counter,
    write_zeroes: Counter,
    failed: Counter,
    invalid: Counter,
    updates: Counter,
    failed_updates: Counter,
}

impl Model for Block {
    const NAME: &'static str = "drives";
    const MANY: bool = true;
    const ABOUT: &'static str = "A disk: a file or block device of the host";
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

    fn check(config: &Config) -> Result<(), DeviceError> {
        let path = config.check_words()?;
        Disk::check(path, config.access()).map_err(refused)
    }

    fn open(config: &Config) -> Result<Self, DeviceError> {
        let path = config.check_words()?;
        let disk = Disk::open(path, config.access()).map_err(refused)?;
        let space = config_space(disk.size(), disk.is_writable());
        let (disk, config) = (Arc::new(disk), config.clone());
        Ok(Self { config, disk, space, counters: Arc::default() })
    }
}

/// The path is what the user can change, whatever is wrong with the file.
fn refused(e: DiskError) -> DeviceError {
    match e {
        DiskError::Host { source, .. } => {
            DeviceError::host("path_on_host: cannot lock or measure the file")(source)
        }
        e => DeviceError::field("path_on_host", e.to_string()),
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        2
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let mut features = feature::SEG_MAX | feature::BLK_SIZE;
        features |= match self.config.access() {
            Access::Read => feature::RO,
            Access::ReadWrite => feature::DISCARD | feature::WRITE_ZEROES,
        };
        if self.config.cache_type == CacheType::Writeback {
            features |= feature::FLUSH;
        }
        features
    }

    fn config_space(&self) -> &[u8] {
        &self.space
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
        let executor = Executor { disk, id, features, counters };
        Ok(Box::new(BlockWorker { requests, executor }))
    }

    fn update(&mut self, patch: &Value) -> Result<Change, DeviceError> {
        let change = self.try_update(patch);
        match &change {
            Ok(_) => self.counters.updates.inc(),
            Err(_) => self.counters.failed_updates.inc(),
        }
        change
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.counters;
        vec![
            ("queue_event_count", c.queue_events.get()),
            ("read_count", c.reads.get()),
            ("write_count", c.writes.get()),
            ("read_bytes", c.read_bytes.get()),
            ("write_bytes", c.write_bytes.get()),
            ("flush_count", c.flushes.get()),
            ("discard_count", c.discards.get()),
            ("write_zeroes_count", c.write_zeroes.get()),
            ("execute_fails", c.failed.get()),
            ("invalid_reqs_count", c.invalid.get()),
            ("update_count", c.updates.get()),
            ("update_fails", c.failed_updates.get()),
        ]
    }
}

impl Block {
    fn try_update(&mut self, patch: &Value) -> Result<Change, DeviceError> {
        let patch = Patch::deserialize(patch)?;
        if patch.drive_id != self.config.drive_id {
            let why = format!("{:?} is not this drive", patch.drive_id);
            return Err(DeviceError::field("drive_id", why));
        }
        refuse_unsupported("rate_limiter", patch.rate_limiter.as_ref())?;
        let Some(path) = patch.path_on_host else { return Ok(Change::Silent) };
        self.disk = Arc::new(self.disk.reopen(&path).map_err(refused)?);
        self.space = config_space(self.disk.size(), self.disk.is_writable());
        self.config.path_on_host = Some(path);
        Ok(Change::Config)
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
}

impl Worker for BlockWorker {
    fn sources(&self) -> Vec<(&dyn AsRawFd, EventSet)> {
        vec![(self.requests.kick_fd(), EventSet::IN)]
    }

    fn ready(&mut self, _source: usize) -> Watch {
        let Self { requests, executor } = self;
        executor.counters.queue_events.inc();
        let mut budget = MAX_REQUEST_BYTES;
        requests.serve(|chain| {
            if budget == 0 {
                return Served::Later;
            }
            let (used, cost) = executor.serve(&chain);
            budget = budget.saturating_sub(cost);
            Served::Used(used)
        });
        if budget == 0 {
            requests.kick_again();
        }
        Watch::Keep
    }

    fn retire(self: Box<Self>) -> Retired {
        Retired { queues: vec![self.requests], state: Value::Null }
    }
}

/// Why a request failed: the status byte that the driver gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// It breaks the rules of the device.
    Invalid,
    /// The host could not do it.
    Host,
    /// The device does not know it.
    Unsupported,
}

impl Failure {
    fn status(self) -> u8 {
        match self {
            Self::Invalid | Self::Host => 1,
            Self::Unsupported => 2,
        }
    }
}

impl From<Fault> for Failure {
    fn from(_: Fault) -> Self {
        Self::Invalid
    }
}

/// What executes requests: all of the device but its queue.
#[derive(Debug)]
struct Executor {
    disk: Arc<Disk>,
    id: [u8; ID_BYTES],
    features: u64,
    counters: Arc<Counters>,
}

impl Executor {
    /// Serves one request: the bytes written to the driver's buffers, and what it cost in bytes.
    fn serve(&self, chain: &Chain<'_>) -> (u32, u64) {
        let mut writable = chain.writable();
        let data = writable.len().checked_sub(1).and_then(|len| writable.take(len).ok());
        let Some(data) = data else {
            // Nowhere to put the status.
            self.counters.invalid.inc();
            return (0, 0);
        };
        let room = data.len();
        let result = if chain.is_mixed() {
            Err(Failure::Invalid)
        } else {
            self.execute(chain.readable(), data)
        };
        let (status, filled, cost) = match result {
            Ok(Done { filled, cost }) => (0, filled, cost),
            Err(failure) => {
                let counter = match failure {
                    Failure::Host => &self.counters.failed,
                    Failure::Invalid | Failure::Unsupported => &self.counters.invalid,
                };
                counter.inc();
                (failure.status(), 0, 0)
            }
        };
        if writable.write_obj(status).is_err() {
            return (0, cost);
        }
        // The used length covers what was written from the start on without a gap.
        let used = if filled == room { filled.saturating_add(1) } else { filled };
        (u32::try_from(used).unwrap_or(u32::MAX), cost)
    }

    fn execute(&self, mut input: Readable<'_>, output: Writable<'_>) -> Result<Done, Failure> {
        let request = input.read_obj::<Le32>()?.to_native();
        let _reserved = input.read_obj::<Le32>()?;
        let sector = input.read_obj::<Le64>()?.to_native();
        match request {
            kind::IN => self.read(sector, &input, &output),
            kind::OUT => self.write(sector, &input, &output),
            kind::FLUSH => self.flush(&input, &output),
            kind::GET_ID => self.get_id(&input, output),
            kind::DISCARD | kind::WRITE_ZEROES => self.erase(request, input, &output),
            _ => Err(Failure::Unsupported),
        }
    }

    fn read(&self, sector: u64, input: &Readable<'_>, to: &Writable<'_>) -> Result<Done, Failure> {
        want(input.is_empty())?;
        let offset = self.offset(sector, to.len())?;
        let mut slices = IoSlices::default();
        let mut result = Ok(());
        to.for_each(|slice| result = result.and_then(|()| slices.push_writable(&slice)))?;
        result.map_err(|_| Failure::Invalid)?;
        self.disk.read(&mut slices, offset).map_err(|e| failed("read", offset, &e))?;
        self.counters.reads.inc();
        self.counters.read_bytes.add(to.len());
        Ok(Done { filled: to.len(), cost: to.len() })
    }

    fn write(
        &self,
        sector: u64,
        from: &Readable<'_>,
        output: &Writable<'_>,
    ) -> Result<Done, Failure> {
        want(output.is_empty() && self.disk.is_writable())?;
        let offset = self.offset(sector, from.len())?;
        let mut slices = IoSlices::default();
        let mut result = Ok(());
        from.for_each(|slice| result = result.and_then(|()| slices.push(&slice)))?;
        result.map_err(|_| Failure::Invalid)?;
        self.disk.write(&mut slices, offset).map_err(|e| failed("write", offset, &e))?;
        self.counters.writes.inc();
        self.counters.write_bytes.add(from.len());
        Ok(Done { filled: 0, cost: from.len() })
    }

    fn flush(&self, input: &Readable<'_>, output: &Writable<'_>) -> Result<Done, Failure> {
        self.negotiated(feature::FLUSH)?;
        want(input.is_empty() && output.is_empty())?;
        self.disk.flush().map_err(|e| failed("flush", 0, &e))?;
        self.counters.flushes.inc();
        Ok(Done { filled: 0, cost: MAX_REQUEST_BYTES })
    }

    fn get_id(&self, input: &Readable<'_>, mut to: Writable<'_>) -> Result<Done, Failure> {
        want(input.is_empty())?;
        to.write(&self.id)?;
        Ok(Done { filled: ID_BYTES as u64, cost: 0 })
    }

    /// DISCARD and WRITE_ZEROES: the data is a list of ranges. All are checked before the first has
    /// effect.
    fn erase(
        &self,
        request: u32,
        mut input: Readable<'_>,
        output: &Writable<'_>,
    ) -> Result<Done, Failure> {
        let (feature, limits, counter) = match request {
            kind::DISCARD => {
                let limits = (MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS);
                (feature::DISCARD, limits, &self.counters.discards)
            }
            _ => {
                let limits = (MAX_ZERO_SEGMENTS, MAX_ZERO_SECTORS);
                (feature::WRITE_ZEROES, limits, &self.counters.write_zeroes)
            }
        };
        want(self.disk.is_writable())?;
        self.negotiated(feature)?;
        let count = input.len() / Range::BYTES;
        let is_whole = input.len().is_multiple_of(Range::BYTES);
        want(output.is_empty() && is_whole && count > 0 && count <= limits.0.into())?;
        let mut ranges = [Range::default(); MAX_DISCARD_SEGMENTS as usize];
        for (range, _) in ranges.iter_mut().zip(0..count) {
            *range = self.range(&mut input, limits.1)?;
            // Virtio 1.2, 5.2.6.2: the unmap flag is for WRITE_ZEROES only.
            if request == kind::DISCARD && range.unmap == Unmap::Allowed {
                return Err(Failure::Unsupported);
            }
        }
        for (range, _) in ranges.iter().zip(0..count) {
            let done = match request {
                kind::DISCARD => self.disk.discard(range.offset, range.len),
                _ => self.disk.write_zeroes(range.offset, range.len, range.unmap),
            };
            done.map_err(|e| failed("erase", range.offset, &e))?;
        }
        counter.inc();
        Ok(Done { filled: 0, cost: MAX_REQUEST_BYTES })
    }

    /// One `struct virtio_blk_discard_write_zeroes` (virtio 1.2, 5.2.6).
    fn range(&self, input: &mut Readable<'_>, max_sectors: u32) -> Result<Range, Failure> {
        let sector = input.read_obj::<Le64>()?.to_native();
        let count = input.read_obj::<Le32>()?.to_native();
        let flags = input.read_obj::<Le32>()?.to_native();
        let unmap = match flags {
            0 => Unmap::Forbidden,
            1 => Unmap::Allowed,
            _ => return Err(Failure::Unsupported),
        };
        want(count <= max_sectors)?;
        let len = u64::from(count).saturating_mul(SECTOR_SIZE);
        Ok(Range { offset: self.within(sector, len)?, len, unmap })
    }

    /// The byte offset of `len` bytes at `sector`, if they can be read or written in one request.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        want(len <= MAX_REQUEST_BYTES)?;
        self.within(sector, len)
    }

    /// The byte offset of `len` bytes at `sector`, if they are whole sectors inside the disk.
    fn within(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        want(len > 0 && len.is_multiple_of(SECTOR_SIZE))?;
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Failure::Invalid)?;
        let end = offset.checked_add(len).ok_or(Failure::Invalid)?;
        want(end <= self.disk.size())?;
        Ok(offset)
    }

    fn negotiated(&self, feature: u64) -> Result<(), Failure> {
        if self.features & feature == 0 { Err(Failure::Unsupported) } else { Ok(()) }
    }
}

/// A request that succeeded: data bytes given to the driver, and its share of the budget.
#[derive(Clone, Copy, Debug)]
struct Done {
    filled: u64,
    cost: u64,
}

/// Part of the disk, in bytes.
#[derive(Clone, Copy, Debug)]
struct Range {
    offset: u64,
    len: u64,
    unmap: Unmap,
}

impl Range {
    /// As the driver describes it.
    const BYTES: u64 = 16;
}

impl Default for Range {
    fn default() -> Self {
        Self { offset: 0, len: 0, unmap: Unmap::Forbidden }
    }
}

fn want(is_valid: bool) -> Result<(), Failure> {
    if is_valid { Ok(()) } else { Err(Failure::Invalid) }
}

fn failed(what: &str, offset: u64, e: &std::io::Error) -> Failure {
    log::warn!("drive: cannot {what} at {offset:#x}: {e}");
    Failure::Host
}
