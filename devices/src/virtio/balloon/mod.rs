//! virtio-balloon (virtio 1.2, 5.5): memory that the guest does not use goes back to the host, by
//! order (the balloon), as it becomes free (reporting) or once (hinting). This file is what the
//! driver and the user see; `worker` serves the queues.
mod hinting;
mod pages;
mod stats;
mod worker;

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::hinting::Hinting;
pub use self::hinting::{Start, Status};
pub use self::stats::{GuestStatistics, Statistics};
use self::worker::BalloonWorker;
use super::model::{
    Change, DeviceError, Env, Model, NoPatch, PatchType, SchemaFn, View, VirtioDevice, schema_of,
};
use super::queue::{QueueError, VirtQueue};
use crate::counters;
use crate::io::Worker;
use crate::metrics::{CounterSet, Group};

/// Feature bits (virtio 1.2, 5.5.3).
mod feature {
    pub(super) const STATS_VQ: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const FREE_PAGE_HINT: u64 = 1 << 3;
    pub(super) const PAGE_REPORTING: u64 = 1 << 5;
}

/// Paths of the views.
mod path {
    pub(super) const STATISTICS: &str = "balloon/statistics";
    pub(super) const START: &str = "balloon/hinting/start";
    pub(super) const STATUS: &str = "balloon/hinting/status";
    pub(super) const STOP: &str = "balloon/hinting/stop";
}

/// Inflate, deflate; then statistics, hints and reports, as far as they are offered.
const QUEUE_SIZES: [u16; 5] = [256; 5];
/// The driver's field of the configuration space: pages that it holds.
const ACTUAL_AT: u64 = 4;
/// 4 KiB pages in a MiB.
const PAGES_PER_MIB: u32 = 256;

/// What the user says about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Balloon")]
pub struct Config {
    /// MiB that the balloon is to hold: memory that the guest does not have.
    pub amount_mib: u32,
    /// Whether the guest may take from the balloon before it kills a process for want of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two statistics. 0: none, ever.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Whether the guest can be asked to name its free pages once.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest names pages as they become free.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// What the user may change while the guest runs.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "BalloonUpdate")]
pub struct Patch {
    /// MiB that the balloon is to hold.
    pub amount_mib: u32,
}

/// What the user may change of the statistics.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "BalloonStatsUpdate")]
pub struct StatisticsPatch {
    /// Seconds between two statistics; the next one is asked for at once. Statistics cannot be
    /// switched on or off.
    pub stats_polling_interval_s: u16,
}

/// Why a balloon does not do as told. Firecracker's words.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// More than there is.
    #[error(
        "Amount of pages requested is too large. \
         The microVM has {ram_mib} MiB, the balloon is to hold {amount_mib} MiB."
    )]
    TooLarge {
        /// Asked for.
        amount_mib: u32,
        /// The VM's RAM.
        ram_mib: u64,
    },
    /// No driver is there to be told.
    #[error("Device not activated yet.")]
    Inactive,
    /// There is a driver, but it does not do this.
    #[error("The guest's driver does not know free page hinting.")]
    NoHints,
    /// The configuration does not offer it.
    #[error("Attempting to use hinting when not enabled.")]
    HintingDisabled,
    /// The configuration does not offer it.
    #[error("Received stats query when stats are disabled.")]
    StatisticsDisabled,
    /// The queues are there or not from the start.
    #[error("Statistics cannot be enabled/disabled after activation.")]
    StatisticsStateChange,
}

counters! {
    /// What is counted.
    struct Counters as "balloon" {
        /// Lists of pages that the driver gave.
        inflate_count: Counter,
        /// Bytes given back as the balloon grew.
        inflate_freed: Counter,
        /// Lists of pages, and ranges of them, that could not be given back.
        inflate_fails: Counter,
        /// Lists of pages that the driver took back.
        deflate_count: Counter,
        /// Statistics that the driver sent.
        stats_updates_count: Counter,
        /// Statistics that were malformed or unknown, or did not come in time.
        stats_update_fails: Counter,
        /// Ranges that the driver reported free.
        free_page_report_count: Counter,
        /// Bytes given back as they were reported.
        free_page_report_freed: Counter,
        /// Reported ranges that could not be given back.
        free_page_report_fails: Counter,
        /// Ranges that the driver hinted at.
        free_page_hint_count: Counter,
        /// Bytes given back as they were hinted at.
        free_page_hint_freed: Counter,
        /// Hints that were malformed or could not be given back.
        free_page_hint_fails: Counter,
    }
}

/// What both halves and the driver's accesses to the configuration space share.
#[derive(Debug, Default)]
struct Shared {
    /// Held for moments only, never across a system call: a vCPU may be waiting for it.
    state: Mutex<State>,
    counters: Arc<Counters>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What has come of a driver and its balloon. A snapshot keeps it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
struct State {
    /// 4 KiB pages that the driver says it holds.
    actual_pages: u32,
    hinting: Hinting,
    statistics: GuestStatistics,
    /// In what is kept only: the first buffer in the queue for statistics was read and counted.
    is_statistics_read: bool,
}

/// The control half.
#[derive(Debug)]
pub struct Balloon {
    config: Config,
    timer: Option<Arc<OwnedFd>>,
    shared: Arc<Shared>,
    /// What the driver accepted, while there is one.
    active: Option<u64>,
}

const VIEWS: &[View] = &[
    View {
        path: path::STATISTICS,
        about: "What the guest tells of its memory",
        shown: Some(schema_of::<Statistics>),
        patch: Some(PatchType::of::<StatisticsPatch>()),
    },
    View {
        path: path::START,
        about: "A run of free page hinting begins",
        shown: None,
        patch: Some(PatchType::of::<Start>().optional()),
    },
    View {
        path: path::STATUS,
        about: "How the run is doing",
        shown: Some(schema_of::<Status>),
        patch: None,
    },
    View {
        path: path::STOP,
        about: "The run ends: the guest may use its pages again",
        shown: None,
        patch: Some(PatchType::of::<NoPatch>().optional()),
    },
];

impl Model for Balloon {
    const NAME: &'static str = "balloon";
    const PATCHABLE: bool = true;
    const SHOWN: Option<SchemaFn> = Some(schema_of::<Config>);
    const VIEWS: &'static [View] = VIEWS;
    const ABOUT: &'static str = "Memory that the guest gives back to the host";
    const METRICS: Group = Counters::GROUP;
    type Config = Config;
    type Patch = Patch;

    fn check(config: &Config) -> Result<(), DeviceError> {
        pages(config.amount_mib).map(|_| ())
    }

    fn check_ram(config: &Config, ram_mib: u64) -> Result<(), DeviceError> {
        let amount_mib = config.amount_mib;
        if u64::from(amount_mib) > ram_mib {
            return Err(BalloonError::TooLarge { amount_mib, ram_mib }.into());
        }
        Ok(())
    }

    fn open(config: &Config, _env: &Env) -> Result<Self, DeviceError> {
        Self::check(config)?;
        let timer = (config.stats_polling_interval_s > 0).then(make_timer).transpose()?;
        Ok(Self {
            config: config.clone(),
            timer: timer.map(Arc::new),
            shared: Arc::default(),
            active: None,
        })
    }
}

impl Balloon {
    /// The queues and what they need, each with its feature.
    fn options(&self) -> [(bool, u64); 3] {
        let Config { stats_polling_interval_s, free_page_hinting, free_page_reporting, .. } =
            self.config;
        [
            (stats_polling_interval_s > 0, feature::STATS_VQ),
            (free_page_hinting, feature::FREE_PAGE_HINT),
            (free_page_reporting, feature::PAGE_REPORTING),
        ]
    }

    fn statistics(&self) -> Result<Statistics, DeviceError> {
        if self.config.stats_polling_interval_s == 0 {
            return Err(BalloonError::StatisticsDisabled.into());
        }
        let state = self.shared.lock();
        Ok(Statistics {
            target_pages: pages(self.config.amount_mib)?,
            actual_pages: state.actual_pages,
            target_mib: self.config.amount_mib,
            actual_mib: state.actual_pages / PAGES_PER_MIB,
            guest: state.statistics.clone(),
        })
    }

    fn set_interval(&mut self, patch: &StatisticsPatch) -> Result<Change, DeviceError> {
        let (now, then) = (self.config.stats_polling_interval_s, patch.stats_polling_interval_s);
        if (now == 0) != (then == 0) {
            return Err(BalloonError::StatisticsStateChange.into());
        }
        if now != then {
            self.config.stats_polling_interval_s = then;
            self.set_timer(AT_ONCE)?;
        }
        Ok(Change::Silent)
    }

    /// Asks for statistics after `first`, and then as often as the user wants.
    fn set_timer(&self, first: Timespec) -> Result<(), DeviceError> {
        let Some(timer) = &self.timer else { return Ok(()) };
        let it_interval = seconds(self.config.stats_polling_interval_s);
        let spec = Itimerspec { it_interval, it_value: first };
        timerfd_settime(timer, TimerfdTimerFlags::empty(), &spec)
            .map_err(|e| DeviceError::host("cannot set a timer")(e.into()))?;
        Ok(())
    }

    /// Refuses hinting where it is not configured.
    fn check_hinting(&self) -> Result<(), BalloonError> {
        if self.config.free_page_hinting { Ok(()) } else { Err(BalloonError::HintingDisabled) }
    }

    fn hinting(&mut self, change: impl FnOnce(&mut Hinting)) -> Result<Change, DeviceError> {
        self.check_hinting()?;
        let features = self.active.ok_or(BalloonError::Inactive)?;
        if features & feature::FREE_PAGE_HINT == 0 {
            return Err(BalloonError::NoHints.into());
        }
        change(&mut self.shared.lock().hinting);
        Ok(Change::Config)
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        5
    }

    fn queue_sizes(&self) -> &[u16] {
        let count = self.options().iter().filter(|(is_there, _)| *is_there).count();
        QUEUE_SIZES.get(..count.saturating_add(2)).unwrap_or_default()
    }

    fn features(&self) -> u64 {
        let oom = (self.config.deflate_on_oom, feature::DEFLATE_ON_OOM);
        let all = self.options().into_iter().chain([oom]);
        all.filter(|(is_there, _)| *is_there).fold(0, |features, (_, bit)| features | bit)
    }

    /// `struct virtio_balloon_config` (virtio 1.2, 5.5.4), as far as the features go.
    fn config_space(&self) -> Cow<'_, [u8]> {
        let state = self.shared.lock();
        let target = self.config.amount_mib.saturating_mul(PAGES_PER_MIB);
        let words = [target, state.actual_pages, state.hinting.host_cmd()];
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    /// One field is the driver's, and it is written as a whole (4.2.2.2).
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL_AT, Ok(bytes)) = (offset, data.try_into()) {
            self.shared.lock().actual_pages = u32::from_le_bytes(bytes);
        }
    }

    fn activate(
        &mut self,
        queues: Vec<VirtQueue>,
        features: u64,
        saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError> {
        let count = queues.len();
        if count != self.queue_sizes().len() {
            return Err(QueueError::Count(count).into());
        }
        let saved = saved.filter(|saved| !saved.is_null()).map(State::deserialize).transpose()?;
        let is_read = saved.as_ref().is_some_and(|saved| saved.is_statistics_read);
        // A worker that is only back from a change or a pause: what it left has been changed since.
        if self.active.is_none() {
            *self.shared.lock() = State { is_statistics_read: false, ..saved.unwrap_or_default() };
            self.set_timer(seconds(self.config.stats_polling_interval_s))?;
        }
        self.active = Some(features);
        let (timer, shared) = (self.timer.clone(), self.shared.clone());
        let worker = BalloonWorker::new(queues, features, timer, shared, is_read);
        Ok(Box::new(worker.ok_or(QueueError::Count(count))?))
    }

    fn reset(&mut self) {
        self.active = None;
        *self.shared.lock() = State::default();
    }

    fn counters(&self) -> Arc<dyn CounterSet> {
        self.shared.counters.clone()
    }

    fn update(&mut self, view: Option<&str>, patch: &Value) -> Result<Change, DeviceError> {
        match view {
            None => {
                let Patch { amount_mib } = Patch::deserialize(patch)?;
                pages(amount_mib)?;
                self.config.amount_mib = amount_mib;
                Ok(Change::Config)
            }
            Some(path::STATISTICS) => self.set_interval(&StatisticsPatch::deserialize(patch)?),
            Some(path::START) => {
                let start = Start::deserialize(patch)?;
                self.hinting(|hinting| hinting.start(&start))
            }
            Some(path::STOP) => self.hinting(Hinting::stop),
            Some(_) => Err(DeviceError::Fixed),
        }
    }

    fn show(&self, view: Option<&str>) -> Result<Value, DeviceError> {
        match view {
            None => Ok(json!(self.config)),
            Some(path::STATISTICS) => Ok(json!(self.statistics()?)),
            Some(path::STATUS) => {
                self.check_hinting()?;
                Ok(json!(self.shared.lock().hinting.status()))
            }
            Some(_) => Err(DeviceError::Fixed),
        }
    }
}

/// `amount_mib` in pages, if they can be counted.
fn pages(amount_mib: u32) -> Result<u32, DeviceError> {
    amount_mib.checked_mul(PAGES_PER_MIB).ok_or_else(|| {
        let max = u32::MAX / PAGES_PER_MIB;
        DeviceError::field("amount_mib", format!("{amount_mib} is more than {max}"))
    })
}

/// As soon as can be said: zero would mean never.
const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 1 };

fn seconds(count: u16) -> Timespec {
    Timespec { tv_sec: count.into(), tv_nsec: 0 }
}

fn make_timer() -> Result<OwnedFd, DeviceError> {
    let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
    timerfd_create(TimerfdClockId::Monotonic, flags)
        .map_err(|e| DeviceError::host("cannot make a timer")(e.into()))
}
