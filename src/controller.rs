//! The one place that knows which request is legal when.
//!
//! ```text
//!               Start, Load               the guest ends, Kill, a signal
//!   Configuring ──────────► Live ────────────────────────────────────────► Ended
//!                            │ ▲
//!                            └─┘ Pause, Resume, a guest's reset, Load
//! ```
mod confine;
mod fork;
mod live;
mod owed;
mod power;
mod rewind;
mod snapshot;
mod start;

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use devices::mmds::Mmds;
use serde_json::{Value, json};

use self::confine::Confinement;
use self::owed::Owed;
use self::rewind::Origin;
use crate::boot::{BootPhases, Stopwatch};
use crate::config::{Defaults, VmConfig};
use crate::error::Refusal;
use crate::events::Hub;
use crate::exit::Ending;
use crate::fork::Nursery;
use crate::instance::{InstanceInfo, State};
use crate::machine::{Machine, ThreadNames};
use crate::metrics::{self, Metrics, Source};
use crate::request::{Call, Reply, Request, Respond};
use crate::snapshot::Writing;

/// What does not change during a VM's life.
#[derive(Clone)]
pub(crate) struct Instance {
    /// The VM's id, for `GET /`.
    pub(crate) id: String,
    /// Names of its threads.
    pub(crate) names: ThreadNames,
    /// When it started.
    pub(crate) started: Instant,
    /// What is counted besides the machine.
    pub(crate) counters: Arc<metrics::Counters>,
    /// Whether `GET /` shows what varies from one VM to the next besides what Firecracker shows. Some of
    /// its clients read a reply of certain lengths for ever, which its own replies never have.
    pub(crate) tells_more: bool,
    /// Called when the user leaves the console.
    pub(crate) quit: Arc<dyn Fn() + Send + Sync>,
    /// Called with what leads to the serial port, a pseudo-terminal or a socket, before the guest runs.
    pub(crate) announce: fn(&Path),
}

/// A machine and what it was made from.
struct Live {
    config: VmConfig,
    machine: Machine,
    /// What leads to the serial port, if it is a pseudo-terminal or a socket.
    serial_path: Option<PathBuf>,
    is_paused: bool,
    /// What it goes back to.
    origin: Origin,
    /// When it is noted which pages it has touched.
    record_at: Option<Instant>,
    /// How long the last start took.
    boot: BootPhases,
}

enum Phase {
    Configuring(Box<VmConfig>),
    Live(Box<Live>),
    Ended(Ending),
}

/// The state of a VM, and all that may change it.
pub(crate) struct Controller {
    instance: Instance,
    phase: Phase,
    hub: Hub,
    metrics: Metrics,
    /// The guest's metadata, whether it can reach them or not.
    mmds: Arc<Mmds>,
    waiting: Vec<Respond>,
    /// Where children come from: not in a library.
    nursery: Option<Nursery>,
    /// How many have been asked for.
    children: u64,
    /// Whoever waits for children.
    forks: Vec<Owed>,
    /// The snapshot that is being written, and whoever waits for it.
    saving: Option<(Writing, Owed)>,
    confinement: Confinement,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("state", &self.state()).finish_non_exhaustive()
    }
}

impl Controller {
    pub(crate) fn new(instance: Instance, config: VmConfig) -> Self {
        let hub = Hub::new(instance.started);
        let Instance { id, started, counters, .. } = instance.clone();
        let mmds = Arc::new(Mmds::new(config.defaults.mmds_size_limit));
        let metrics = Metrics::new(id, started, counters, mmds.counters());
        let phase = Phase::Configuring(Box::new(config));
        Self {
            instance,
            phase,
            hub,
            metrics,
            mmds,
            waiting: Vec::new(),
            nursery: None,
            children: 0,
            forks: Vec::new(),
            saving: None,
            confinement: Confinement::default(),
        }
    }

    /// Answers a request, now or (for [`Request::Wait`]) when there is an answer.
    pub(crate) fn answer(&mut self, call: Call) {
        let Call { request, arrived, respond } = call;
        let respond = self.explain(respond);
        if let Err(e) = self.check_paths(&request) {
            return respond(Err(e));
        }
        self.with_paths_if_needed(request, |this, request| {
            arrived.with(|| this.answer_here(request, respond));
        });
    }

    fn answer_here(&mut self, request: Request, respond: Respond) {
        match (request, self.ending()) {
            (Request::Wait, None) => self.waiting.push(respond),
            (Request::Wait, Some(ending)) => respond(Ok(json!(ending))),
            (Request::Snapshot(params), None) => self.snapshot(&params, respond),
            (Request::Freeze(sink), None) => self.freeze(sink, respond),
            (Request::Fork(params), None) => self.fork(&params, respond),
            (request, _) => respond(self.handle(request)),
        }
    }

    /// One line per request; the first word after `self.` is its precondition.
    fn handle(&mut self, request: Request) -> Reply {
        match request {
            Request::Put { section, id, body } => done(self.put(&section, id.as_deref(), &body)),
            Request::Patch { section, body, .. } if VmConfig::is_patched_before_start(&section) => {
                done(self.configuring()?.patch(&section, &body))
            }
            Request::Patch { section, id, body } => done(self.live()?.update(&section, id, &body)),
            Request::Get { section } => self.show(&section),
            Request::Delete { section, id } => done(self.remove(&section, id)),
            Request::Launch { body } => done(self.launch(&body)),
            Request::Start => done(self.start()),
            Request::Pause => done(self.pause()),
            Request::Resume => done(self.resume()),
            Request::Shutdown => done(self.shutdown()),
            Request::CtrlAltDel => done(self.live()?.ctrl_alt_del()),
            Request::Kill => done(self.kill()),
            Request::Quit => {
                self.end(Ending::Killed);
                Ok(Value::Null)
            }
            Request::FlushMetrics => done(self.flush_metrics()),
            Request::Metrics => Ok(self.metrics.text(&self.sources(), self.boot()).into()),
            Request::Metadata => Ok(self.metadata()?.show()),
            Request::PutMetadata { data } => done(self.put_metadata(data)),
            Request::PatchMetadata { patch } => done(Ok(self.metadata()?.patch(&patch)?)),
            Request::Describe => Ok(self.describe()),
            Request::Config => Ok(self.config()?.to_json()),
            Request::Subscribe(sink) => {
                self.hub.subscribe(sink);
                Ok(self.describe())
            }
            Request::Load(params) => done(self.load(&params)),
            Request::Record => done(self.record()),
            Request::Rewind(params) => done(self.rewind(&params)),
            Request::Restore(restore) => {
                done(self.restore(&restore, Stopwatch::start(self.instance.started)))
            }
            // Answered elsewhere, as they may take a while; only the VM's end brings them here.
            Request::Wait | Request::Snapshot(_) | Request::Freeze(_) | Request::Fork(_) => {
                Err(self.ending().map_or(Refusal::Gone, |ending| Refusal::Ended(ending.clone())))
            }
        }
    }

    fn configuring(&mut self) -> Result<&mut VmConfig, Refusal> {
        match &mut self.phase {
            Phase::Configuring(config) => Ok(config),
            Phase::Live(_) => Err(Refusal::AlreadyStarted),
            Phase::Ended(ending) => Err(Refusal::Ended(ending.clone())),
        }
    }

    fn live(&mut self) -> Result<&mut Live, Refusal> {
        match &mut self.phase {
            Phase::Live(live) => Ok(live),
            Phase::Configuring(_) => Err(Refusal::NotStarted),
            Phase::Ended(ending) => Err(Refusal::Ended(ending.clone())),
        }
    }

    fn config(&self) -> Result<&VmConfig, Refusal> {
        match &self.phase {
            Phase::Configuring(config) => Ok(config),
            Phase::Live(live) => Ok(&live.config),
            Phase::Ended(ending) => Err(Refusal::Ended(ending.clone())),
        }
    }

    fn show(&self, section: &str) -> Reply {
        match &self.phase {
            Phase::Live(live) => live.show(section),
            Phase::Configuring(_) | Phase::Ended(_) => self.config()?.show(section),
        }
    }

    fn put(&mut self, section: &str, id: Option<&str>, body: &[u8]) -> Result<(), Refusal> {
        let mut changed = self.configuring()?.clone();
        changed.put(section, id, body)?;
        match section {
            "logger" => VmConfig::change_log(body)?,
            "metrics" => self.open_metrics(&changed)?,
            _ => {}
        }
        *self.configuring()? = changed;
        Ok(())
    }

    /// Opens the file that `config` wants the metrics in. There can be one.
    fn open_metrics(&mut self, config: &VmConfig) -> Result<(), Refusal> {
        if config.metrics.is_some() && self.metrics.is_open() {
            return Err(Refusal::MetricsAgain);
        }
        let file = self.metrics.open(config.metrics.as_ref())?;
        self.metrics.adopt(file);
        Ok(())
    }

    /// Opens the file for metrics before anything is started, if it is known by then.
    pub(crate) fn open_configured_metrics(&mut self) -> Result<(), Refusal> {
        let config = self.configuring()?.clone();
        self.open_metrics(&config)
    }

    fn remove(&mut self, section: &str, id: Option<String>) -> Result<(), Refusal> {
        let gone = self.live()?.remove(section, id)?;
        self.metrics.see_off(gone);
        Ok(())
    }

    fn flush_metrics(&mut self) -> Result<(), Refusal> {
        let sources = self.live()?.machine.sources();
        self.metrics.flush(&sources)
    }

    /// The guest's metadata, as long as there may be a guest.
    fn metadata(&self) -> Result<&Mmds, Refusal> {
        self.config().map(|_| &*self.mmds)
    }

    /// Replaces the guest's metadata.
    pub(crate) fn put_metadata(&self, data: Value) -> Result<(), Refusal> {
        Ok(self.metadata()?.put(data)?)
    }

    /// When [`Self::tick`] has something to do.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.metrics.due().into_iter().chain(self.hub.due()).chain(self.record_due()).min()
    }

    /// Readable when devices have something to tell, and [`Self::tick`] something to do.
    pub(crate) fn bell(&self) -> Option<BorrowedFd<'_>> {
        self.hub.bell()
    }

    /// Does what is to be done from time to time.
    pub(crate) fn tick(&mut self) {
        self.hub.heed();
        let now = Instant::now();
        if self.metrics.due().is_some_and(|due| due <= now) {
            let sources = self.sources();
            self.metrics.tick(now, &sources);
        }
        if self.record_due().is_some_and(|due| due <= now) {
            self.with_paths(|this| this.record_if_due(now));
        }
    }

    /// How long the last start took, if there was one.
    fn boot(&self) -> Option<&BootPhases> {
        match &self.phase {
            Phase::Live(live) => Some(&live.boot),
            Phase::Configuring(_) | Phase::Ended(_) => None,
        }
    }

    /// What counts in the machine, if there is one.
    fn sources(&self) -> Vec<Source> {
        match &self.phase {
            Phase::Live(live) => live.machine.sources(),
            Phase::Configuring(_) | Phase::Ended(_) => Vec::new(),
        }
    }

    /// What holds where the configuration says nothing.
    fn defaults(&self) -> Defaults {
        self.config().map(|config| config.defaults.clone()).unwrap_or_default()
    }

    fn state(&self) -> State {
        match &self.phase {
            Phase::Configuring(_) => State::NotStarted,
            Phase::Live(live) if live.is_paused => State::Paused,
            Phase::Live(_) => State::Running,
            Phase::Ended(_) => State::Ended,
        }
    }

    fn describe(&self) -> Value {
        let mut info = InstanceInfo::new(self.instance.id.clone(), self.state());
        if let (Phase::Live(live), true) = (&self.phase, self.instance.tells_more) {
            info.serial_path = live.serial_path.clone();
            info.boot = Some(live.boot);
        }
        json!(info)
    }
}

fn done(result: Result<(), Refusal>) -> Reply {
    result.map(|()| Value::Null)
}
