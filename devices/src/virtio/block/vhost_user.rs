//! A drive that another process serves: see [`crate::backend::vhost_user`]. What the driver sees is
//! the back end's; the worker only passes its interrupts on.
use std::borrow::Cow;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use event_manager::EventSet;
use serde::Deserialize;
use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use super::{CacheType, Config, Patch, QUEUE_SIZE, feature};
use crate::backend::vhost_user::{BackEnd, PATIENCE, Ring, VhostUserError};
use crate::io::{Retired, Watch, Worker};
use crate::metrics::{CounterSet, Group};
use crate::sys::again::eventfd;
use crate::sys::errand::Errands;
use crate::virtio::mmio::TRANSPORT_FEATURES;
use crate::virtio::model::{Change, DeviceError, Env, Left, VirtioDevice};
use crate::virtio::queue::{VirtQueue, split};

/// How often to look whether a back end has finished.
const GLANCE: Duration = Duration::from_micros(50);
/// What a driver may use if the back end offers it: what needs no help from here.
const FEATURES: u64 = feature::SIZE_MAX
    | feature::SEG_MAX
    | feature::GEOMETRY
    | feature::RO
    | feature::BLK_SIZE
    | feature::TOPOLOGY
    | feature::DISCARD
    | feature::WRITE_ZEROES;
/// Bytes of the configuration space that belong to these.
const SPACE_BYTES: u32 = 60;

crate::counters! {
    /// What is counted.
    struct Counters as "vhost_user_block" {
        /// Microseconds it took to connect to the back end and to learn what it offers.
        init_time_us: Gauge,
        /// Microseconds it took to hand the queue over, the last time.
        activate_time_us: Gauge,
        /// Microseconds it took to read a changed configuration space, the last time.
        config_change_time_us: Gauge,
        /// Times the back end did not give the queue back.
        stop_fails: Counter,
        /// Times the configuration space could not be read again.
        config_change_fails: Counter,
        /// Times the back end went away.
        gone_count: Counter,
    }
}

pub(super) const GROUP: Group = Counters::GROUP;

/// The control half.
#[derive(Debug)]
pub(super) struct VhostUserBlock {
    drive_id: String,
    path: PathBuf,
    back_end: Shared,
    /// The thread that connects again, if others may not.
    connector: Option<Errands>,
    features: u64,
    space: Vec<u8>,
    counters: Arc<Counters>,
}

/// The worker gives its queue back through it; otherwise the control half has it for itself.
type Shared = Arc<Mutex<BackEnd>>;

impl VhostUserBlock {
    /// Connects to the back end at `path`.
    pub(super) fn connect(config: &Config, path: &Path, env: &Env) -> Result<Self, DeviceError> {
        let connector = env.start_connector()?;
        let counters = Arc::new(Counters::default());
        let mut back_end =
            counters.init_time_us().time(|| BackEnd::connect(path, 1, None)).map_err(refused)?;
        let offered = back_end.features();
        if offered & TRANSPORT_FEATURES != TRANSPORT_FEATURES {
            let what = "VERSION_1, indirect descriptors or event indices";
            return Err(refused(VhostUserError::Lacks { path: path.into(), what }));
        }
        let flush = if config.cache_type == CacheType::Writeback { feature::FLUSH } else { 0 };
        Ok(Self {
            drive_id: config.drive_id.clone(),
            path: path.into(),
            features: offered & (FEATURES | flush),
            space: back_end.config(SPACE_BYTES).map_err(refused)?,
            back_end: Arc::new(Mutex::new(back_end)),
            connector,
            counters,
        })
    }

    /// Hands a queue over. A back end that was restarted is connected to anew.
    fn start(
        &mut self,
        features: u64,
        queue: &VirtQueue,
        call: &EventFd,
    ) -> Result<(), DeviceError> {
        let state = queue.state();
        let ring = Ring {
            size: state.size,
            max_size: state.max_size,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
            next_avail: state.next_avail,
            kick: queue.kick_fd(),
            call,
        };
        let rings = if state.ready { &[ring][..] } else { &[] };
        let mut back_end = lock(&self.back_end);
        if let Err(e) = back_end.start(queue.mem(), features, rings) {
            log::warn!("drive {}: {e}; connecting again", self.drive_id);
            let mut other =
                BackEnd::connect(&self.path, 1, self.connector.as_ref()).map_err(refused)?;
            if other.features() & features != features {
                let what = "what an earlier one offered";
                return Err(refused(VhostUserError::Lacks { path: self.path.clone(), what }));
            }
            other.start(queue.mem(), features, rings).map_err(refused)?;
            *back_end = other;
        }
        Ok(())
    }
}

impl VirtioDevice for VhostUserBlock {
    fn device_id(&self) -> u32 {
        2
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
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
        _saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError> {
        let [requests] = split(queues)?;
        let call = eventfd().map_err(DeviceError::host("cannot make an eventfd"))?;
        let counters = self.counters.clone();
        counters.activate_time_us().time(|| self.start(features, &requests, &call))?;
        // A second connection would see the end of the first as its own.
        let hangup = lock(&self.back_end).hangup().map_err(DeviceError::host("socket"))?;
        let back_end = self.back_end.clone();
        Ok(Box::new(Relay { requests, call, hangup, back_end, counters }))
    }

    /// Without anything to change, what the back end has changed is read again.
    fn update(&mut self, _view: Option<&str>, patch: &Value) -> Result<Change, DeviceError> {
        let patch = Patch::deserialize(patch)?;
        let theirs = "belongs to the back end of this drive";
        if patch.path_on_host.is_some() {
            return Err(DeviceError::field("path_on_host", theirs));
        }
        if patch.rate_limiter.is_some() {
            return Err(DeviceError::field("rate_limiter", theirs));
        }
        let counters = &self.counters;
        let read =
            counters.config_change_time_us().time(|| lock(&self.back_end).config(SPACE_BYTES));
        self.space = read.inspect_err(|_| counters.config_change_fails().inc()).map_err(refused)?;
        Ok(Change::Config)
    }

    /// Whoever serves it knows nothing of it.
    fn rewind(&mut self) -> Result<Left, DeviceError> {
        self.reset();
        Ok(Left::File)
    }

    fn counters(&self) -> Arc<dyn CounterSet> {
        self.counters.clone()
    }
}

/// Refuses a configuration that says what is the back end's to say.
pub(super) fn check(config: &Config, path: &Path) -> Result<(), DeviceError> {
    let theirs = "belongs to the back end of a drive with a socket";
    let given = [
        ("path_on_host", config.path_on_host.is_some()),
        ("is_read_only", config.is_read_only),
        ("io_engine", config.io_engine != super::IoEngine::Sync),
        ("rate_limiter", config.rate_limiter.is_some()),
        ("rate_limit_group", config.rate_limit_group.is_some()),
        ("overlay", config.overlay.is_some()),
    ];
    if let Some((field, _)) = given.into_iter().find(|(_, is_given)| *is_given) {
        return Err(DeviceError::field(field, theirs));
    }
    let found = std::fs::metadata(path)
        .map_err(|e| DeviceError::field("socket", format!("{}: {e}", path.display())))?;
    match std::os::unix::fs::FileTypeExt::is_socket(&found.file_type()) {
        true => Ok(()),
        false => Err(DeviceError::field("socket", format!("{} is no socket", path.display()))),
    }
}

fn refused(e: VhostUserError) -> DeviceError {
    let why = match std::error::Error::source(&e) {
        Some(cause) => format!("{e}: {cause}"),
        None => e.to_string(),
    };
    DeviceError::host("socket")(std::io::Error::other(why))
}

fn lock(back_end: &Shared) -> MutexGuard<'_, BackEnd> {
    back_end.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until the back end has finished what it had begun; the used index then. One that gives a
/// queue back may still be at it (QEMU's does), and has no descriptor any more to say when it is done.
fn finished(queue: &VirtQueue, next_avail: u16) -> u16 {
    let deadline = Instant::now().checked_add(PATIENCE);
    while queue.used_index() != next_avail {
        if deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            log::warn!("drive: its back end has given back a queue that it still serves");
            break;
        }
        std::thread::sleep(GLANCE);
    }
    queue.used_index()
}

/// The data half: passes interrupts on. The kicks go to the back end straight from the guest.
#[derive(Debug)]
struct Relay {
    requests: VirtQueue,
    call: EventFd,
    hangup: std::os::unix::net::UnixStream,
    back_end: Shared,
    counters: Arc<Counters>,
}

impl Worker for Relay {
    fn sources(&self) -> Vec<(&dyn AsRawFd, EventSet)> {
        vec![(&self.call, EventSet::IN), (&self.hangup, EventSet::READ_HANG_UP)]
    }

    fn ready(&mut self, source: usize) -> Watch {
        if source == 0 {
            // EAGAIN if it was read already: nothing to pass on.
            if self.call.read().is_ok() {
                self.requests.interrupt();
            }
            return Watch::Keep;
        }
        self.counters.gone_count().inc();
        self.requests.host_gone();
        log::warn!("drive: its back end is gone");
        self.requests.needs_reset();
        Watch::Drop
    }

    fn retire(mut self: Box<Self>) -> Retired {
        if self.requests.state().ready {
            match lock(&self.back_end).stop(0) {
                Ok(next_avail) => {
                    let used = finished(&self.requests, next_avail);
                    self.requests.seek(next_avail, used);
                }
                Err(e) => {
                    // What it had not finished is served again by the next one.
                    log::warn!("drive: {e}");
                    self.counters.stop_fails().inc();
                    let used = self.requests.used_index();
                    self.requests.seek(used, used);
                }
            }
        }
        Retired { queues: vec![self.requests], state: Value::Null }
    }
}
