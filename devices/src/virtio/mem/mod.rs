//! virtio-mem (virtio 1.2, 5.15): memory that is plugged and unplugged while the guest runs. The user
//! says how much there should be; the driver asks for blocks until there is, and gives them back.
//!
//! ```text
//!   PATCH ──► requested size ──interrupt──► driver ──plug, unplug──► Blocks ──► Slots (KVM), mapping
//! ```
mod blocks;
mod request;

use std::borrow::Cow;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::blocks::{Blocks, Geometry, Unplugged};
use self::request::MemWorker;
use super::model::{
    Change, DeviceError, Env, Left, Model, SchemaFn, VirtioDevice, null_is_default, schema_of,
};
use super::queue::{VirtQueue, split};
use crate::counters;
use crate::io::{IoError, Worker};
use crate::memory::{GuestRegion, OwnMemory, Placement};
use crate::metrics::{CounterSet, Group};
use crate::sys::map::Pages;

const QUEUE_SIZE: u16 = 256;
/// The driver does not touch unplugged memory (5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
const BLOCK_MIN_MIB: u64 = 2;
const SLOT_MIN_MIB: u64 = 128;
/// More than any processor addresses; smaller limits are the VMM's to know.
const TOTAL_MAX_MIB: u64 = 1 << (52 - 20);

/// What the user says about it.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "MemoryHotplugConfig")]
pub struct Config {
    /// Most that can be plugged, in MiB.
    pub total_size_mib: u64,
    /// What is plugged at once, in MiB.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schemars(with = "Option<u64>", range(min = 2))]
    pub block_size_mib: BlockSize,
    /// What the guest is shown at once, in MiB.
    #[serde(default, deserialize_with = "null_is_default")]
    #[schemars(with = "Option<u64>", range(min = 128))]
    pub slot_size_mib: SlotSize,
}

/// MiB of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(transparent)]
pub struct BlockSize(pub u64);

impl Default for BlockSize {
    fn default() -> Self {
        Self(BLOCK_MIN_MIB)
    }
}

/// MiB of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(transparent)]
pub struct SlotSize(pub u64);

impl Default for SlotSize {
    fn default() -> Self {
        Self(SLOT_MIN_MIB)
    }
}

impl Config {
    /// Room for `total_size_mib` in blocks and slots of the usual size.
    pub fn new(total_size_mib: u64) -> Self {
        let (block_size_mib, slot_size_mib) = Default::default();
        Self { total_size_mib, block_size_mib, slot_size_mib }
    }

    /// Firecracker's rules in its words.
    fn geometry(&self) -> Result<Geometry, DeviceError> {
        let (total, block, slot) =
            (self.total_size_mib, self.block_size_mib.0, self.slot_size_mib.0);
        let refuse = |field, why: String| Err(DeviceError::field(field, why));
        let of_slot = |why: &str| refuse("slot_size_mib", why.to_owned());
        if block < BLOCK_MIN_MIB {
            let why = format!("Block size must not be lower than {BLOCK_MIN_MIB} MiB");
            return refuse("block_size_mib", why);
        }
        if !block.is_power_of_two() {
            return refuse("block_size_mib", "Block size must be a power of 2".into());
        }
        if slot < SLOT_MIN_MIB {
            return of_slot(&format!("Slot size must not be lower than {SLOT_MIN_MIB} MiB"));
        }
        if !slot.is_multiple_of(block) {
            return of_slot(&format!("Slot size must be a multiple of block size ({block} MiB)"));
        }
        if total < slot {
            let why = format!("Total size must not be lower than slot size ({slot} MiB)");
            return refuse("total_size_mib", why);
        }
        if !total.is_multiple_of(slot) {
            let why = format!("Total size must be a multiple of slot size ({slot} MiB)");
            return refuse("total_size_mib", why);
        }
        if total > TOTAL_MAX_MIB {
            return refuse("total_size_mib", format!("{total} is more than {TOTAL_MAX_MIB}"));
        }
        let bytes = |mib: u64| mib.saturating_mul(1 << 20);
        Ok(Geometry { block: bytes(block), slot: bytes(slot), total: bytes(total) })
    }
}

/// What the user may change while the guest runs.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "MemoryHotplugSizeUpdate")]
pub struct Patch {
    /// How much is to be plugged, in MiB.
    pub requested_size_mib: u64,
}

/// What `GET` shows.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(rename = "MemoryHotplugStatus")]
pub struct Status {
    /// Most that can be plugged, in MiB.
    pub total_size_mib: u64,
    /// What is plugged at once, in MiB.
    pub block_size_mib: u64,
    /// What the guest is shown at once, in MiB.
    pub slot_size_mib: u64,
    /// How much is plugged, in MiB. Of a guest that runs only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plugged_size_mib: Option<u64>,
    /// How much is to be plugged, in MiB. Of a guest that runs only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requested_size_mib: Option<u64>,
}

/// What the driver is told, in bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Sizes {
    requested: u64,
    /// What the driver may plug blocks in. Grows with what is requested; shrinks only when all is
    /// unplugged (5.15.6.2).
    usable: u64,
    plugged: u64,
}

/// What both halves have: the driver's numbers, and the memory. Who locks both locks the memory
/// first. The memory is locked as long as the host takes to plug or unplug; the numbers never.
#[derive(Debug)]
struct Shared {
    geometry: Geometry,
    sizes: Mutex<Sizes>,
    /// Once a machine is put together.
    blocks: Mutex<Option<Blocks>>,
}

impl Shared {
    fn sizes(&self) -> MutexGuard<'_, Sizes> {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blocks(&self) -> MutexGuard<'_, Option<Blocks>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What must be usable for `requested` bytes: whole slots.
    fn usable_for(&self, requested: u64) -> u64 {
        let slots = requested.div_ceil(self.geometry.slot);
        slots.saturating_mul(self.geometry.slot).min(self.geometry.total)
    }
}

/// The control half.
#[derive(Debug)]
pub struct Mem {
    shared: Arc<Shared>,
    pages: Pages,
    /// Its first address.
    start: u64,
    counters: Arc<Counters>,
}

counters! {
    /// What is counted.
    struct Counters as "memory_hotplug" {
        /// Times the driver kicked the queue.
        queue_event_count: Counter,
        /// Requests without room for an answer, or too short to be any.
        queue_event_fails: Counter,
        /// Requests to plug blocks.
        plug_count: Counter,
        /// Bytes plugged.
        plug_bytes: Counter,
        /// Requests to plug that were not granted.
        plug_fails: Counter,
        /// How long plugging took.
        plug_agg: Latency,
        /// Requests to unplug blocks.
        unplug_count: Counter,
        /// Bytes unplugged, one way or the other.
        unplug_bytes: Counter,
        /// Requests to unplug that were not granted.
        unplug_fails: Counter,
        /// How long unplugging took.
        unplug_agg: Latency,
        /// Times unplugged memory could not be given back to the host.
        unplug_discard_fails: Counter,
        /// Requests to unplug everything.
        unplug_all_count: Counter,
        /// Requests to unplug everything that were not granted.
        unplug_all_fails: Counter,
        /// How long unplugging everything took.
        unplug_all_agg: Latency,
        /// Questions about the state of blocks.
        state_count: Counter,
        /// Questions about blocks that there are not.
        state_fails: Counter,
        /// How long answering them took.
        state_agg: Latency,
    }
}

impl Model for Mem {
    const NAME: &'static str = "memory-hotplug";
    const PATH: &'static str = "hotplug/memory";
    const PATCHABLE: bool = true;
    const SHOWN: Option<SchemaFn> = Some(schema_of::<Status>);
    const ABOUT: &'static str = "Memory that is plugged and unplugged while the guest runs";
    const METRICS: Group = Counters::GROUP;
    type Config = Config;
    type Patch = Patch;

    fn check(config: &Config) -> Result<(), DeviceError> {
        config.geometry().map(drop)
    }

    fn open(config: &Config, env: &Env) -> Result<Self, DeviceError> {
        let geometry = config.geometry()?;
        let (sizes, blocks) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { geometry, sizes, blocks });
        let (pages, counters) = (env.pages, Arc::default());
        Ok(Self { shared, pages, start: 0, counters })
    }
}

impl VirtioDevice for Mem {
    fn device_id(&self) -> u32 {
        24
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    /// `struct virtio_mem_config` (5.15.4).
    fn config_space(&self) -> Cow<'_, [u8]> {
        let Geometry { block, total, .. } = self.shared.geometry;
        let Sizes { requested, usable, plugged } = *self.shared.sizes();
        let node_and_padding = 0;
        let fields = [block, node_and_padding, self.start, total, usable, plugged, requested];
        Cow::Owned(fields.into_iter().flat_map(u64::to_le_bytes).collect())
    }

    fn own_memory(&mut self) -> Option<&mut dyn OwnMemory> {
        Some(self)
    }

    /// The host takes its time to show memory to a running guest.
    fn may_block(&self) -> bool {
        true
    }

    fn activate(
        &mut self,
        queues: Vec<VirtQueue>,
        _features: u64,
        saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError> {
        let [requests] = split(queues)?;
        let (shared, counters) = (self.shared.clone(), self.counters.clone());
        let unplugging = saved.and_then(Value::as_u64).map(Duration::from_micros);
        Ok(Box::new(MemWorker { requests, shared, counters, unplugging }))
    }

    /// As after power-on: [`OwnMemory::restore`] plugs what was plugged.
    fn rewind(&mut self) -> Result<Left, DeviceError> {
        let blocks = self.shared.blocks();
        let blocks = blocks.as_ref().ok_or(DeviceError::Saved("it has no place"))?;
        for (first, count) in blocks.runs() {
            match blocks.unplug(first..first.saturating_add(count)) {
                Unplugged::Freed => {}
                Unplugged::Kept => self.counters.unplug_discard_fails().inc(),
                Unplugged::InUse => return Err(IoError::Busy.into()),
                Unplugged::Refused => {
                    let (what, source) = ("cannot unplug memory".into(), ErrorKind::OutOfMemory);
                    return Err(DeviceError::Host { what, source: source.into() });
                }
            }
        }
        let mut sizes = self.shared.sizes();
        sizes.plugged = 0;
        sizes.usable = self.shared.usable_for(sizes.requested);
        Ok(Left::Nothing)
    }

    fn counters(&self) -> Arc<dyn CounterSet> {
        self.counters.clone()
    }

    fn update(&mut self, _view: Option<&str>, patch: &Value) -> Result<Change, DeviceError> {
        let mib = Patch::deserialize(patch)?.requested_size_mib;
        let Geometry { block, total, .. } = self.shared.geometry;
        let requested = mib.checked_mul(1 << 20);
        let fits = |size: &u64| *size <= total && size.is_multiple_of(block);
        let requested = requested.filter(fits).ok_or_else(|| {
            let why = format!(
                "Size {mib} MiB is invalid: it must be a multiple of block size and less than the \
                 total size"
            );
            DeviceError::field("requested_size_mib", why)
        })?;
        let usable = self.shared.usable_for(requested);
        let mut sizes = self.shared.sizes();
        sizes.requested = requested;
        sizes.usable = sizes.usable.max(usable);
        Ok(Change::Config)
    }

    fn show(&self, _view: Option<&str>) -> Result<Value, DeviceError> {
        let Geometry { block, slot, total } = self.shared.geometry;
        let Sizes { requested, plugged, .. } = *self.shared.sizes();
        Ok(json!(Status {
            total_size_mib: total >> 20,
            block_size_mib: block >> 20,
            slot_size_mib: slot >> 20,
            plugged_size_mib: Some(plugged >> 20),
            requested_size_mib: Some(requested >> 20),
        }))
    }
}

impl OwnMemory for Mem {
    fn size(&self) -> u64 {
        self.shared.geometry.total
    }

    fn slots(&self) -> u64 {
        self.shared.geometry.slots()
    }

    /// A machine is switched on with nothing plugged; what was requested still is (5.15.5).
    fn place(&mut self, place: Placement) -> Result<GuestRegion, DeviceError> {
        let geometry = self.shared.geometry;
        // What was plugged is given back before more is taken.
        *self.shared.blocks() = None;
        self.start = place.addr.0;
        let what = format!("cannot map {} MiB of address space", geometry.total >> 20);
        let blocks = Blocks::new(geometry, self.pages, place).map_err(DeviceError::host(what))?;
        let region = blocks.region();
        *self.shared.blocks() = Some(blocks);
        let mut sizes = self.shared.sizes();
        sizes.plugged = 0;
        sizes.usable = self.shared.usable_for(sizes.requested);
        Ok(region)
    }

    fn save(&self) -> Value {
        let plugged = self.shared.blocks().as_ref().map(Blocks::runs).unwrap_or_default();
        let Sizes { requested, usable, .. } = *self.shared.sizes();
        json!(Saved { requested, usable, plugged })
    }

    /// Plugs what was plugged.
    fn restore(&mut self, saved: &Value) -> Result<(), DeviceError> {
        let Saved { requested, usable, plugged } = Saved::deserialize(saved)?;
        let geometry = self.shared.geometry;
        if requested.max(usable) > geometry.total {
            return Err(DeviceError::Saved("it has more memory"));
        }
        let blocks = self.shared.blocks();
        let blocks = blocks.as_ref().ok_or(DeviceError::Saved("it has no place"))?;
        let (mut count, mut runs) = (0u64, Vec::new());
        let mut until = 0;
        for (first, len) in plugged {
            let end = first.checked_add(len).filter(|&end| end <= geometry.blocks());
            let run = first..end.ok_or(DeviceError::Saved("it has more blocks"))?;
            if first < until || blocks.count(run.clone()) > 0 {
                return Err(DeviceError::Saved("it has a block twice"));
            }
            until = run.end;
            runs.push(run);
            count = count.saturating_add(len);
        }
        blocks.restore(&runs).map_err(DeviceError::host("cannot plug what was plugged"))?;
        let plugged = count.saturating_mul(geometry.block);
        *self.shared.sizes() = Sizes { requested, usable, plugged };
        Ok(())
    }
}

/// What is saved of the memory.
#[derive(Debug, Deserialize, Serialize)]
struct Saved {
    requested: u64,
    usable: u64,
    /// Runs of plugged blocks: first and count.
    plugged: Vec<(u64, u64)>,
}
