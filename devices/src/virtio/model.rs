//! What a virtio device is, and how one comes to be from its configuration.
//!
//! ```text
//!  JSON ──Row::parse──► Recipe ──build──► VirtioDevice ──activate(queues)──► Worker
//!        (the table)    (checked)         (in the transport)                 (on an I/O thread)
//! ```
use std::borrow::Cow;
use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize as _, Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::queue::VirtQueue;
use crate::backend::overlay::Frozen;
use crate::io::Worker;
use crate::limiter::{Groups, Limits, RateLimiter};
use crate::memory::OwnMemory;
use crate::metrics::{CounterSet, Group};
use crate::mmds::Service;
use crate::sys::errand::Errands;
use crate::sys::map::Pages;

/// The control half of a device: what the driver sees before and besides the queues. Lives in the
/// transport; called from vCPU exits and from the VMM thread, never from an I/O thread.
pub trait VirtioDevice: Send + Debug {
    /// The device ID (virtio 1.2, 5).
    fn device_id(&self) -> u32;
    /// Largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];
    /// Device features offered, bits 0-23 and 50 up. The transport adds the reserved ones.
    fn features(&self) -> u64 {
        0
    }
    /// The configuration space as it is now.
    fn config_space(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&[])
    }
    /// The driver writes `data` at `offset` of the configuration space. Most devices have nothing there
    /// that it may write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Turns configured queues into a worker that is ready to run. `saved` is what an earlier
    /// worker of this device left ([`crate::io::Retired`]). Called again after each reset, pause
    /// and change, so it keeps what it needs for that.
    fn activate(
        &mut self,
        queues: Vec<VirtQueue>,
        features: u64,
        saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError>;
    /// The device's memory that the guest sees, if it brings any.
    fn own_memory(&mut self) -> Option<&mut dyn OwnMemory> {
        None
    }
    /// The driver has reset the device, or its machine is being taken apart: nothing that it began
    /// goes on. There is no worker.
    fn reset(&mut self) {}
    /// The machine goes back to an earlier moment of its life: nothing that was begun goes on. There is no
    /// worker. The next [`Self::activate`] gets what was saved at that moment.
    fn rewind(&mut self) -> Result<Left, DeviceError> {
        self.reset();
        Ok(Left::Nothing)
    }
    /// Whether the worker may wait for the host longer than a moment. It then has a thread of its
    /// own, so that nobody waits with it.
    fn may_block(&self) -> bool {
        false
    }
    /// What the device counts: an instance of [`Model::METRICS`], the same one as long as the device
    /// lives, whatever workers come and go.
    fn counters(&self) -> Arc<dyn CounterSet>;
    /// Applies a run-time change, as sent by `PATCH` to the device or to the [`View`] of it that
    /// `view` names. The worker is off the I/O thread meanwhile.
    fn update(&mut self, _view: Option<&str>, _patch: &Value) -> Result<Change, DeviceError> {
        Err(DeviceError::Fixed)
    }
    /// Whether another device of this configuration can be opened while this one is there.
    fn can_open_twice(&self) -> bool {
        false
    }
    /// Fixes what the device has written on the host and a snapshot is to hold, and goes on without
    /// changing that. There is no worker.
    fn freeze_files(&mut self) -> Result<Option<Frozen>, DeviceError> {
        Ok(None)
    }
    /// Goes on with what another device of this configuration has frozen, or this one earlier, whatever
    /// it has written itself. There is no worker.
    fn adopt_files(&mut self, _frozen: &Frozen) -> Result<(), DeviceError> {
        Err(DeviceError::Saved("it has written what this device cannot have"))
    }
    /// What `GET` shows of the running device, or of the [`View`] of it that `view` names.
    fn show(&self, _view: Option<&str>) -> Result<Value, DeviceError> {
        Err(DeviceError::Fixed)
    }
}

/// What a run-time change means to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing it could see.
    Silent,
    /// The configuration space changed.
    Config,
}

/// What of a device stays as it is when its machine goes back to an earlier moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing the guest could notice.
    Nothing,
    /// The file that it writes to.
    File,
}

/// How a device comes to be: the part the table needs.
pub trait Model: VirtioDevice + Sized + 'static {
    /// Name in the API, the configuration file, snapshots, metrics and logs.
    const NAME: &'static str;
    /// Its path in the API, where that is not its name.
    const PATH: &'static str = Self::NAME;
    /// Whether a VM may have several, told apart by id.
    const MANY: bool = false;
    /// The field of configuration and change that holds the id, of a model with [`Self::MANY`].
    const ID_FIELD: &'static str = "";
    /// Whether more may follow the path in the API, and means nothing: `/vsock/vsock0`.
    const IGNORES_REST: bool = false;
    /// Whether `DELETE` takes it from a running VM.
    const REMOVABLE: bool = false;
    /// Whether `PATCH` changes it while the guest runs.
    const PATCHABLE: bool = false;
    /// Fields that are deprecated: the API says so to whoever uses them.
    const DEPRECATED: &'static [&'static str] = &[];
    /// Fields that name what is outside the VM, or that the guest need not know: they may be others
    /// when a snapshot is restored.
    const OUTSIDE: &'static [&'static str] = &[];
    /// Those of them that name what is opened on the host: a descriptor that was passed will do.
    const OPENABLE: &'static [&'static str] = &[];
    /// Those of them in which `fd:N` is the descriptor N of the process.
    const DESCRIPTORS: &'static [&'static str] = &[];
    /// What `GET` shows, if it is offered: the configuration before start, [`VirtioDevice::show`]
    /// afterwards.
    const SHOWN: Option<SchemaFn> = None;
    /// Parts that have paths of their own.
    const VIEWS: &'static [View] = &[];
    /// One line for people: what it is.
    const ABOUT: &'static str;
    /// What it counts, under Firecracker's name of the kind of device: the `GROUP` of its
    /// [`counters!`](crate::counters).
    const METRICS: Group;
    /// What devices of this model count that are made in another way, and have a kind of their own.
    const OTHER_METRICS: &'static [Group] = &[];
    /// What the user says about it.
    type Config: DeserializeOwned + Serialize + JsonSchema + Clone + Debug + Send + Sync + 'static;
    /// What the user may change while the guest runs, if [`Self::PATCHABLE`].
    type Patch: DeserializeOwned + Serialize + JsonSchema + 'static;

    /// The id that a configuration carries, of a model with [`Self::MANY`].
    fn id(_config: &Self::Config) -> &str {
        Self::NAME
    }
    /// Whether it comes before its siblings, whatever the order of requests: the root disk.
    fn is_first(_config: &Self::Config) -> bool {
        false
    }
    /// What to append to the kernel command line.
    fn kernel_args(_config: &Self::Config) -> Option<String> {
        None
    }
    /// What no other device of the VM may have.
    fn claims(_config: &Self::Config) -> Vec<Claim> {
        Vec::new()
    }
    /// Groups whose limits it shares: the field, and the id that it holds.
    fn rate_limit_groups(_config: &Self::Config) -> Vec<(&'static str, &str)> {
        Vec::new()
    }
    /// Refuses a configuration that cannot work, host side included, and leaves no trace.
    fn check(config: &Self::Config) -> Result<(), DeviceError>;
    /// Whether another process has to map guest memory for it.
    fn needs_shared_memory(_config: &Self::Config) -> bool {
        false
    }
    /// Where the host side makes a Unix socket, if it does: the file is to be removed in the end, and whoever connects
    /// may want to be connected to.
    fn listens_at(_config: &Self::Config) -> Option<&Path> {
        None
    }
    /// Refuses a configuration that cannot be in a VM with so much RAM.
    fn check_ram(_config: &Self::Config, _ram_mib: u64) -> Result<(), DeviceError> {
        Ok(())
    }
    /// Opens the host side.
    fn open(config: &Self::Config, env: &Env) -> Result<Self, DeviceError>;
    /// The same, of a model whose devices are not all of one type.
    fn open_any(config: &Self::Config, env: &Env) -> Result<Box<dyn VirtioDevice>, DeviceError> {
        Ok(Box::new(Self::open(config, env)?))
    }
}

/// What the devices of one VM share: given to each as it is opened.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Env {
    /// Which pages are behind guest memory.
    pub pages: Pages,
    /// Limits that devices share, by the id of their group.
    pub rate_limit_groups: Groups,
    /// The metadata service, if there is one.
    pub mmds: Option<Arc<Service>>,
    /// Starts a thread that connects to sockets of the host, where those that run devices may not.
    pub connector: Option<fn() -> std::io::Result<Errands>>,
}

impl Env {
    /// The thread that connects to sockets for a device whose own threads may not, if that is so.
    pub fn start_connector(&self) -> Result<Option<Errands>, DeviceError> {
        let started = self.connector.map(|start| start()).transpose();
        started.map_err(DeviceError::host("cannot start a thread to connect"))
    }

    /// The limits of a device: `own`, and those of `group`, which the configuration has in `field`.
    pub fn limits(
        &self,
        own: Option<&RateLimiter>,
        field: &'static str,
        group: Option<&str>,
    ) -> Result<Limits, DeviceError> {
        let found = |id: &str| {
            let pool = self.rate_limit_groups.get(id).cloned();
            pool.ok_or_else(|| DeviceError::field(field, no_group(id)))
        };
        Ok(Limits::new(own, group.map(found).transpose()?))
    }
}

/// Why a device cannot be in the group `id`.
pub fn no_group(id: &str) -> String {
    format!(
        "there is no rate limit group {id:?}: PUT /rate-limit-groups/{id} first, or give --rate-limit-group"
    )
}

/// Gives a type's JSON schema: [`schema_of`].
pub type SchemaFn = fn(&mut SchemaGenerator) -> Schema;

/// The schema of `T`.
pub fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// Part of a running device that has a path of its own in the API: `balloon/statistics`.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// Its path, which begins with the device's.
    pub path: &'static str,
    /// One line for people: what it is.
    pub about: &'static str,
    /// What `GET` shows, if it is offered.
    pub shown: Option<SchemaFn>,
    /// What `PATCH` takes, if it is offered.
    pub patch: Option<PatchType>,
}

/// A type of run-time change: its schema, and how its mistakes are found before it is applied.
#[derive(Clone, Copy, Debug)]
pub struct PatchType {
    /// Its JSON schema.
    pub schema: SchemaFn,
    /// Reads one.
    pub parse: fn(json: &[u8]) -> Result<Value, DeviceError>,
    /// Whether a request need not have a body: none means `{}`.
    pub is_optional: bool,
}

impl PatchType {
    /// That of `T`.
    pub const fn of<T: DeserializeOwned + Serialize + JsonSchema>() -> Self {
        Self {
            schema: schema_of::<T>,
            parse: |json| {
                let patch: T = serde_json::from_slice(json)?;
                Ok(serde_json::to_value(patch)?)
            },
            is_optional: false,
        }
    }

    /// The same, where a request need not have a body.
    pub const fn optional(self) -> Self {
        Self { is_optional: true, ..self }
    }
}

/// Something that two devices of a VM cannot both have: a disk, a tap, an address.
#[derive(Debug)]
pub struct Claim {
    /// What it is, to be compared.
    pub key: String,
    /// Whether others may have it who say so too.
    pub is_shared: bool,
    /// Whether it is the host's, so that no other VM can have it either.
    pub is_of_host: bool,
    /// What to answer if another device has it.
    pub refusal: DeviceError,
}

impl Claim {
    /// Why this cannot be had, if one of `others` has it.
    pub fn against(self, others: &[Self]) -> Option<DeviceError> {
        let collides = |o: &Self| o.key == self.key && !(o.is_shared && self.is_shared);
        others.iter().any(collides).then_some(self.refusal)
    }
}

/// Why a device was refused or could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The JSON does not fit the model.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    /// A field has a value the model cannot have.
    #[error("{field}: {why}")]
    Field {
        /// The field, as in the API.
        field: &'static str,
        /// What is wrong with its value, value included.
        why: String,
    },
    /// Another interface has the address. Firecracker's words.
    #[error("The guest MAC address {0} is already in use.")]
    MacInUse(String),
    /// The balloon does not do as told.
    #[error(transparent)]
    Balloon(#[from] super::balloon::BalloonError),
    /// The host does not give what the device needs.
    #[error("{what}: {source}")]
    Host {
        /// The resource, with its name.
        what: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// Nothing about the device can change while the guest runs.
    #[error("this device has no run-time settings")]
    Fixed,
    /// It was taken out of its VM.
    #[error("the device was removed")]
    Removed,
    /// A snapshot does not fit the device it is to be restored to.
    #[error("saved device: {0}")]
    Saved(&'static str),
    /// The queues cannot be used.
    #[error("queue")]
    Queue(#[from] super::queue::QueueError),
    /// No event loop.
    #[error(transparent)]
    Io(#[from] crate::io::IoError),
}

impl DeviceError {
    /// A [`DeviceError::Field`].
    pub fn field(field: &'static str, why: impl Into<String>) -> Self {
        Self::Field { field, why: why.into() }
    }

    /// Makes a [`DeviceError::Host`] of an I/O error.
    pub fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }

    /// Whether the user's words are at fault, rather than the host.
    pub fn is_config(&self) -> bool {
        matches!(
            self,
            Self::Json(_) | Self::Field { .. } | Self::MacInUse(_) | Self::Balloon(_) | Self::Fixed
        )
    }
}

/// Refuses an id that would not do as a path component of the API: 1 to 64 of `[A-Za-z0-9_-]`.
pub fn check_id(field: &'static str, id: &str) -> Result<(), DeviceError> {
    if is_id(id) {
        return Ok(());
    }
    Err(DeviceError::field(
        field,
        format!("{id:?} is not 1 to {ID_LEN_MAX} letters, digits, underscores or hyphens"),
    ))
}

/// Most bytes of an id.
pub const ID_LEN_MAX: usize = 64;

/// What [`is_id`] says, as a regular expression.
pub const ID_PATTERN: &str = "^[A-Za-z0-9_-]{1,64}$";

/// Whether `id` can name a VM or a device: a path component of the API that needs no escaping.
pub fn is_id(id: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    (1..=ID_LEN_MAX).contains(&id.len()) && id.chars().all(is_allowed)
}

/// Reads `null` as the default, as Firecracker does.
pub(crate) fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The run-time change of a model that has none.
#[derive(Clone, Debug, Default, Serialize, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoPatch {}

/// A parsed, not yet built device.
pub trait Recipe: Debug + Send + Sync {
    /// The model's name.
    fn model(&self) -> &'static str;
    /// The device's id; the model's name where there can be only one.
    fn id(&self) -> &str;
    /// See [`Model::is_first`].
    fn is_first(&self) -> bool;
    /// See [`Model::kernel_args`].
    fn kernel_args(&self) -> Option<String>;
    /// See [`Model::claims`].
    fn claims(&self) -> Vec<Claim>;
    /// See [`Model::needs_shared_memory`].
    fn needs_shared_memory(&self) -> bool;
    /// See [`Model::listens_at`].
    fn listens_at(&self) -> Option<&Path>;
    /// See [`Model::rate_limit_groups`].
    fn rate_limit_groups(&self) -> Vec<(&'static str, &str)>;
    /// See [`Model::check`].
    fn check(&self) -> Result<(), DeviceError>;
    /// See [`Model::check_ram`].
    fn check_ram(&self, ram_mib: u64) -> Result<(), DeviceError>;
    /// Opens the host side.
    fn open(&self, env: &Env) -> Result<Box<dyn VirtioDevice>, DeviceError>;
    /// The configuration, as `GET /vm/config` shows it.
    fn to_json(&self) -> Value;
    /// A copy.
    fn duplicate(&self) -> Box<dyn Recipe>;
}

impl Clone for Box<dyn Recipe> {
    fn clone(&self) -> Self {
        self.duplicate()
    }
}

#[derive(Debug)]
struct Configured<M: Model>(M::Config);

impl<M: Model> Recipe for Configured<M> {
    fn model(&self) -> &'static str {
        M::NAME
    }
    fn id(&self) -> &str {
        M::id(&self.0)
    }
    fn is_first(&self) -> bool {
        M::is_first(&self.0)
    }
    fn kernel_args(&self) -> Option<String> {
        M::kernel_args(&self.0)
    }
    fn claims(&self) -> Vec<Claim> {
        M::claims(&self.0)
    }
    fn needs_shared_memory(&self) -> bool {
        M::needs_shared_memory(&self.0)
    }
    fn listens_at(&self) -> Option<&Path> {
        M::listens_at(&self.0)
    }
    fn rate_limit_groups(&self) -> Vec<(&'static str, &str)> {
        M::rate_limit_groups(&self.0)
    }
    fn check(&self) -> Result<(), DeviceError> {
        M::check(&self.0)
    }
    fn check_ram(&self, ram_mib: u64) -> Result<(), DeviceError> {
        M::check_ram(&self.0, ram_mib)
    }
    fn open(&self, env: &Env) -> Result<Box<dyn VirtioDevice>, DeviceError> {
        M::open_any(&self.0, env)
    }
    fn to_json(&self) -> Value {
        serde_json::to_value(&self.0).unwrap_or(Value::Null)
    }
    fn duplicate(&self) -> Box<dyn Recipe> {
        Box::new(Self(self.0.clone()))
    }
}

/// Makes a recipe of a configuration made in Rust rather than parsed.
pub fn recipe<M: Model>(config: M::Config) -> Box<dyn Recipe> {
    Box::new(Configured::<M>(config))
}

/// What [`Row::parse`] gives.
pub type ParseResult = Result<Box<dyn Recipe>, DeviceError>;

/// One line of the device table.
#[derive(Debug)]
pub struct Row {
    /// [`Model::NAME`].
    pub name: &'static str,
    /// [`Model::MANY`].
    pub is_many: bool,
    /// [`Model::ID_FIELD`].
    pub id_field: &'static str,
    /// [`Model::PATH`].
    pub path: &'static str,
    /// [`Model::IGNORES_REST`].
    pub ignores_rest: bool,
    /// [`Model::REMOVABLE`].
    pub is_removable: bool,
    /// [`Model::DEPRECATED`].
    pub deprecated: &'static [&'static str],
    /// [`Model::OUTSIDE`].
    pub outside: &'static [&'static str],
    /// [`Model::OPENABLE`].
    pub openable: &'static [&'static str],
    /// [`Model::DESCRIPTORS`].
    pub descriptors: &'static [&'static str],
    /// [`Model::ABOUT`].
    pub about: &'static str,
    /// [`Model::METRICS`].
    pub metrics: Group,
    /// [`Model::OTHER_METRICS`].
    pub other_metrics: &'static [Group],
    /// Reads a configuration. Does not look at the host: [`Recipe::check`].
    pub parse: fn(json: &[u8]) -> ParseResult,
    /// JSON schema of the configuration.
    pub schema: SchemaFn,
    /// [`Model::SHOWN`].
    pub shown: Option<SchemaFn>,
    /// [`Model::Patch`], if [`Model::PATCHABLE`].
    pub patch: Option<PatchType>,
    /// [`Model::VIEWS`].
    pub views: &'static [View],
}

/// The table's line for `M`.
pub const fn row<M: Model>() -> Row {
    Row {
        name: M::NAME,
        is_many: M::MANY,
        id_field: M::ID_FIELD,
        path: M::PATH,
        ignores_rest: M::IGNORES_REST,
        is_removable: M::REMOVABLE,
        deprecated: M::DEPRECATED,
        outside: M::OUTSIDE,
        openable: M::OPENABLE,
        descriptors: M::DESCRIPTORS,
        about: M::ABOUT,
        metrics: M::METRICS,
        other_metrics: M::OTHER_METRICS,
        parse: |json| Ok(Box::new(Configured::<M>(serde_json::from_slice(json)?))),
        schema: schema_of::<M::Config>,
        shown: M::SHOWN,
        patch: if M::PATCHABLE { Some(PatchType::of::<M::Patch>()) } else { None },
        views: M::VIEWS,
    }
}
