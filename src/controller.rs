//! The one place that knows which request is legal when.
//!
//! ```text
//!               Start, Load               the guest ends, Kill, a signal
//!   Configuring ──────────► Live ────────────────────────────────────────► Ended
//!                            │ ▲
//!                            └─┘ Pause, Resume, a guest's reset, Load
//! ```
mod fork;
mod rewind;

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::mmds::Mmds;
use devices::virtio;
use devices::virtio::model::{DeviceError, Row, View};
use serde_json::{Value, json};

use self::rewind::Origin;
use crate::boot::{BootPhases, Stopwatch};
use crate::config::{Defaults, OnReboot, RATE_LIMIT_GROUPS, RateLimitGroup, VmConfig};
use crate::error::Refusal;
use crate::events::{Hub, Poster, What};
use crate::exit::Ending;
use crate::fork::Nursery;
use crate::instance::{InstanceInfo, State};
use crate::machine::{Machine, Name, ThreadNames};
use crate::metrics::{self, Metrics, Source, micros_since};
use crate::parts::{self, Parts};
use crate::request::{Reply, Request, Respond};
use crate::snapshot::{
    Draft, LoadParams, Overrides, Restore, Saving, SnapshotError, SnapshotParams, Writer, Writing,
    Written,
};
use crate::takeover::Taken;

/// How long a snapshot that is called off may take to clean up behind itself.
const CLEANUP: Duration = Duration::from_millis(150);

/// What does not change during a VM's life.
#[derive(Clone)]
pub(crate) struct Identity {
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

/// A machine that does not run yet.
struct Made {
    machine: Machine,
    serial_path: Option<PathBuf>,
    /// The devices that it takes over from another.
    taken_over: Vec<(&'static str, String)>,
}

/// A snapshot that has begun.
struct Begun {
    saving: Saving,
    writer: Writer,
    /// For how long the guest stood still.
    paused_us: u64,
    /// Tells of it.
    poster: Poster,
}

enum Phase {
    Configuring(Box<VmConfig>),
    Live(Box<Live>),
    Ended(Ending),
}

/// The state of a VM, and all that may change it.
pub(crate) struct Controller {
    identity: Identity,
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
    /// The snapshot that is being written.
    saving: Option<Writing>,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("state", &self.state()).finish_non_exhaustive()
    }
}

impl Controller {
    pub(crate) fn new(identity: Identity, config: VmConfig) -> Self {
        let hub = Hub::new(identity.started);
        let Identity { id, started, counters, .. } = identity.clone();
        let mmds = Arc::new(Mmds::new(config.defaults.mmds_size_limit));
        let metrics = Metrics::new(id, started, counters, mmds.counters());
        let phase = Phase::Configuring(Box::new(config));
        Self {
            identity,
            phase,
            hub,
            metrics,
            mmds,
            waiting: Vec::new(),
            nursery: None,
            children: 0,
            saving: None,
        }
    }

    /// Answers a request, now or (for [`Request::Wait`]) when there is an answer.
    pub(crate) fn answer(&mut self, request: Request, respond: Respond) {
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
                done(self.restore(&restore, Stopwatch::start(self.identity.started)))
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
        self.record_if_due(now);
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

    fn start(&mut self) -> Result<(), Refusal> {
        let config = self.configuring()?.clone();
        let watch = Stopwatch::start(self.identity.started);
        self.start_with(config, watch, None)
    }

    /// Starts what is configured, or goes on with what was saved so.
    fn start_with(
        &mut self,
        config: VmConfig,
        mut watch: Stopwatch,
        restore: Option<&Restore>,
    ) -> Result<(), Refusal> {
        let is_paused = restore.is_some_and(|restore| restore.is_paused);
        let metadata = restore.and_then(|restore| restore.overrides.mmds.as_ref());
        metadata.map_or(Ok(()), |data| self.mmds.check(data))?;
        // Opened by now, or wanted by the request to start, which may yet be refused.
        let metrics = match self.metrics.is_open() {
            true => None,
            false => self.metrics.open(config.metrics.as_ref())?,
        };
        self.prepare_for_children(config.machine.forkable && restore.is_none())?;
        let devices_before = self.hub.watched();
        let made = self.make(&config, &mut watch, restore);
        let Made { mut machine, serial_path, .. } = made
            .and_then(|made| self.replace_old(made, &config, restore))
            .inspect_err(|_| self.hub.forget_after(devices_before))?;
        let has_port = self.see_off_old(&machine);
        self.hub.forget_before(devices_before, has_port.then_some(parts::SERIAL));
        if let Some(path) = serial_path.as_ref().filter(|_| !has_port) {
            (self.identity.announce)(path);
            self.hub.publish(What::SerialPath { path: path.clone() });
        }
        if let Some(restore) = restore {
            self.heed(&restore.overrides);
        }
        let runs_since = Instant::now();
        if !is_paused {
            machine.run();
        }
        let boot = finish(watch);
        // What another process serves cannot be mapped.
        let mapped = restore.filter(|restore| restore.handler.is_none());
        if let Some(restore) = mapped.filter(|restore| restore.prefaults()) {
            machine.prefault(&restore.image);
        }
        let origin = Origin::of(mapped.map(|restore| &restore.image));
        let wait = mapped.and_then(|restore| restore.record_ms).map(Duration::from_millis);
        let record_at = wait.and_then(|wait| runs_since.checked_add(wait));
        let live = Live { config, machine, serial_path, is_paused, origin, record_at, boot };
        self.metrics.adopt(metrics);
        self.metrics.start(Instant::now(), &live.machine.sources());
        self.phase = Phase::Live(Box::new(live));
        let what = match restore {
            None => What::Started,
            Some(Restore { image, .. }) => {
                let took_us = boot.total_us();
                self.identity.counters.latencies.vmm_load_snapshot().set(took_us);
                What::Restored { id: image.document.id.clone(), paused: is_paused, took_us }
            }
        };
        self.hub.tell(runs_since, what);
        Ok(())
    }

    /// Opens what is configured, and puts the machine together. A VM that is there goes on meanwhile.
    fn make(
        &mut self,
        config: &VmConfig,
        watch: &mut Stopwatch,
        restore: Option<&Restore>,
    ) -> Result<Made, Refusal> {
        let Identity { names, quit, .. } = self.identity.clone();
        let taken = match &self.phase {
            Phase::Live(old) => Taken::of(&old.machine, &old.config, config),
            Phase::Configuring(_) | Phase::Ended(_) => Taken::default(),
        };
        let taken_over: Vec<_> =
            taken.devices.iter().map(|part| (part.model, part.id.clone())).collect();
        let has_new_port = taken.port.is_none();
        let serial = restore.map(|restore| &restore.image.document.machine.legacy.serial);
        let mut parts = Parts::open(config, names.io, quit, &self.mmds, serial, taken)?;
        parts.observe(&mut self.hub, has_new_port)?;
        watch.phases.opened_us = watch.lap();
        let serial_path = parts.serial_path.clone();
        let machine = Machine::assemble(config, parts, names, watch, restore)?;
        Ok(Made { machine, serial_path, taken_over })
    }

    /// Gives a machine what it takes over from the one that is there, if there is one: that stands still
    /// then. If this is refused, it goes on as it was.
    fn replace_old(
        &mut self,
        made: Made,
        config: &VmConfig,
        restore: Option<&Restore>,
    ) -> Result<Made, Refusal> {
        let (Phase::Live(old), Some(restore)) = (&self.phase, restore) else { return Ok(made) };
        if !old.is_paused {
            old.machine.pause()?;
        }
        let saved = &restore.image.document.machine.legacy.serial;
        let limit = config.serial.rate_limiter.as_ref();
        let taken = made.machine.take_over(&old.machine, &made.taken_over, saved, limit);
        if taken.is_err() && !old.is_paused {
            old.machine.run();
        }
        taken.map(|()| made)
    }

    /// Ends the machine that is there, if there is one, because `new` takes its place. Whether that has
    /// its serial port.
    fn see_off_old(&mut self, new: &Machine) -> bool {
        let gone = Phase::Ended(Ending::Killed);
        let Phase::Live(old) = std::mem::replace(&mut self.phase, gone) else { return false };
        let kept = new.sources();
        let is_gone = |source: &Source| !kept.iter().any(|kept| kept.is_same_set(source));
        self.metrics.see_off(old.machine.sources().into_iter().filter(is_gone));
        let has_port = new.shares_port_with(&old.machine);
        match has_port {
            true => old.machine.leave(),
            false => old.machine.finish(),
        }
        has_port
    }

    /// Makes what is of the process as `overrides` say. They have been checked.
    fn heed(&mut self, overrides: &Overrides) {
        if let Some(Err(e)) = overrides.mmds.clone().map(|data| self.mmds.put(data)) {
            log::error!("metadata: {e}");
        }
        if let Some(id) = &overrides.id {
            self.identity.id.clone_from(id);
        }
    }

    /// All or nothing: what was configured before stays if this is refused.
    fn launch(&mut self, body: &[u8]) -> Result<(), Refusal> {
        let watch = Stopwatch::start(self.identity.started);
        let mut config = self.configuring()?.clone();
        let metrics = config.metrics.take();
        config.put_all(body)?;
        if config.metrics.is_some() && self.metrics.is_open() {
            return Err(Refusal::MetricsAgain);
        }
        config.metrics = config.metrics.or(metrics);
        if config.logger.is_some() {
            // The log starts before the machine, whose start it is to tell of; but not for a
            // machine that is refused.
            config.check()?;
            config.start_log()?;
        }
        self.start_with(config, watch, None)
    }

    /// Restores a VM, in place of the one that is there, if there is one. All or nothing: if this is
    /// refused, what was configured stays, and what ran goes on.
    fn load(&mut self, params: &LoadParams) -> Result<(), Refusal> {
        let watch = Stopwatch::start(self.identity.started);
        self.config()?;
        self.restore(&Restore::open(params)?, watch)
    }

    /// The same, of a snapshot that was opened.
    fn restore(&mut self, restore: &Restore, mut watch: Stopwatch) -> Result<(), Refusal> {
        let before = self.config()?;
        let mut config = restore.config()?;
        // These are of this process.
        config.defaults = before.defaults.clone();
        (config.logger, config.metrics) = (before.logger.clone(), before.metrics.clone());
        watch.phases.image_us = watch.lap();
        self.start_with(config, watch, Some(restore))
    }

    /// Begins a snapshot; a thread of its own sees it through and answers, while the guest goes on.
    fn snapshot(&mut self, params: &SnapshotParams, respond: Respond) {
        let start = Instant::now();
        let Begun { saving, writer, paused_us, poster } = match self.begin_snapshot(params) {
            Ok(begun) => begun,
            Err(e) => return respond(Err(e)),
        };
        let written = self.live().map(|live| live.origin.written());
        let latencies = self.identity.counters.latencies.clone();
        let load_params = params.load_params();
        let answer = move |saved: Result<Written, _>| {
            respond(done(saved.map_err(Refusal::Snapshot).map(|Written { id, kind, bytes }| {
                if let Ok(written) = written {
                    written.tell(load_params);
                }
                let took_us = micros_since(start);
                latencies.wrote_snapshot(kind).set(took_us);
                poster.post(What::SnapshotCreated { id, kind, took_us, paused_us, bytes });
            })));
        };
        self.saving = Some(writer.write(saving, Box::new(answer)));
    }

    /// What can be refused is, before the guest stands still; whatever fails, it then does what it did before.
    fn begin_snapshot(&mut self, params: &SnapshotParams) -> Result<Begun, Refusal> {
        if self.saving.as_ref().is_some_and(|writing| !writing.is_done()) {
            return Err(SnapshotError::Busy.into());
        }
        let poster = self.hub.poster().map_err(Refusal::host("cannot make an eventfd"))?;
        let Live { config, machine, is_paused, .. } = self.live()?;
        if let Some(recipe) = config.devices().find(|recipe| recipe.needs_shared_memory()) {
            let (model, id) = (recipe.model(), recipe.id().to_owned());
            return Err(SnapshotError::Elsewhere { model, id }.into());
        }
        let draft = Draft::new(params, machine.ram().len())?;
        let writer = Writer::spawn();
        let writer = writer.map_err(Refusal::host("cannot start a thread to write a snapshot"))?;
        let mut start = Instant::now();
        if !*is_paused {
            machine.pause_to_copy()?;
            start = Instant::now();
        }
        let state = machine.settle(config).and_then(|()| machine.save());
        let saving =
            state.and_then(|state| Ok(draft.begin(config.to_json(), state, machine.ram())?));
        let mut paused_us = 0;
        if !*is_paused {
            machine.run();
            paused_us = micros_since(start);
        }
        Ok(Begun { saving: saving?, writer, paused_us, poster })
    }

    /// Waits so long for the snapshot that is being written, if there is one, and then calls it off. The process may end
    /// after this: nothing that is half done is left.
    pub(crate) fn settle(&mut self, patience: Duration) {
        if let Some(writing) = self.saving.take()
            && !writing.wait(patience)
        {
            log::warn!("a snapshot was not written in time: nothing of it is kept");
            writing.call_off();
            writing.wait(CLEANUP);
        }
    }

    fn pause(&mut self) -> Result<(), Refusal> {
        let live = self.live()?;
        if !live.is_paused {
            let start = Instant::now();
            // What is paused is often copied next.
            live.machine.pause_to_copy()?;
            live.is_paused = true;
            self.identity.counters.latencies.vmm_pause_vm().set(micros_since(start));
            self.hub.publish(What::Paused);
            // What the guest did last comes first: it boots again, or has ended, before anybody asks.
            self.heed_outcome();
        }
        self.live().map(drop)
    }

    fn resume(&mut self) -> Result<(), Refusal> {
        let live = self.live()?;
        if live.is_paused {
            let start = Instant::now();
            live.machine.run();
            live.is_paused = false;
            self.identity.counters.latencies.vmm_resume_vm().set(micros_since(start));
            self.hub.publish(What::Resumed);
        }
        Ok(())
    }

    /// Asks the guest to power off.
    pub(crate) fn shutdown(&mut self) -> Result<(), Refusal> {
        self.live()?.machine.press_power_button();
        self.hub.publish(What::ShutdownRequested);
        Ok(())
    }

    fn kill(&mut self) -> Result<(), Refusal> {
        self.live()?;
        self.end(Ending::Killed);
        Ok(())
    }

    /// Whether a guest runs that could be asked to power off.
    pub(crate) fn is_running(&self) -> bool {
        matches!(&self.phase, Phase::Live(live) if !live.is_paused)
    }

    /// The live machine's outcome, to wait for.
    pub(crate) fn outcome(&self) -> Option<&crate::outcome::Outcome> {
        match &self.phase {
            Phase::Live(live) => Some(live.machine.outcome()),
            Phase::Configuring(_) | Phase::Ended(_) => None,
        }
    }

    /// Draws the consequence if the guest has ended its run: boots it again, or ends the VM.
    pub(crate) fn heed_outcome(&mut self) {
        let Phase::Live(live) = &self.phase else { return };
        let Some(ending) = live.machine.outcome().get().cloned() else { return };
        let restarts = live.config.on_reboot() == OnReboot::Restart && live.machine.can_reboot();
        if ending == Ending::Reset && restarts {
            self.reboot();
        } else {
            self.end(ending);
        }
    }

    fn reboot(&mut self) {
        let Phase::Live(live) = std::mem::replace(&mut self.phase, Phase::Ended(Ending::Reset))
        else {
            return;
        };
        // Paused just as the guest reset itself: it then waits at its first instruction.
        let Live { config, machine, serial_path, is_paused, origin, .. } = *live;
        let Identity { names, started, .. } = self.identity;
        let mut watch = Stopwatch::start(started);
        let machine = machine.dismantle().and_then(|parts| {
            watch.phases.opened_us = watch.lap();
            Machine::assemble(&config, parts, names, &mut watch, None)
        });
        match machine {
            Ok(machine) => {
                self.hub.publish(What::Rebooted);
                if !is_paused {
                    machine.run();
                }
                let boot = finish(watch);
                let live =
                    Live { config, machine, serial_path, is_paused, origin, record_at: None, boot };
                self.phase = Phase::Live(Box::new(live));
            }
            Err(e) => self.end(Ending::HostError { detail: format!("cannot reboot: {e}") }),
        }
    }

    /// Ends the VM, whatever it is doing. The first ending stays.
    pub(crate) fn end(&mut self, ending: Ending) {
        match std::mem::replace(&mut self.phase, Phase::Ended(ending.clone())) {
            Phase::Live(live) => {
                let sources = live.machine.sources();
                live.machine.finish();
                self.metrics.finish(&sources);
            }
            Phase::Configuring(_) | Phase::Ended(_) => {}
        }
        for respond in self.waiting.drain(..) {
            respond(Ok(json!(ending)));
        }
        self.hub.publish(What::Ended(ending));
    }

    /// How the VM ended, if it has.
    pub(crate) fn ending(&self) -> Option<&Ending> {
        match &self.phase {
            Phase::Ended(ending) => Some(ending),
            Phase::Configuring(_) | Phase::Live(_) => None,
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
        let mut info = InstanceInfo::new(self.identity.id.clone(), self.state());
        if let (Phase::Live(live), true) = (&self.phase, self.identity.tells_more) {
            info.serial_path = live.serial_path.clone();
            info.boot = Some(live.boot);
        }
        json!(info)
    }
}

impl Live {
    fn show(&self, section: &str) -> Reply {
        match device(section) {
            Some((row, view)) => {
                let name = Name { model: row.name, id: row.name };
                self.machine.show(name, view.map(|view| view.path))
            }
            None => self.config.show(section),
        }
    }

    fn update(&mut self, section: &str, id: Option<String>, body: &[u8]) -> Result<(), Refusal> {
        if section == RATE_LIMIT_GROUPS {
            return self.update_group(id.as_deref(), body);
        }
        let found = device(section).and_then(|(row, view)| {
            let patch = view.map_or(row.patch, |view| view.patch)?;
            Some((row, view, patch))
        });
        let (row, view, patch) = found.ok_or_else(|| no_route("PATCH", section, id.as_deref()))?;
        let id = id.as_deref().unwrap_or(row.name);
        let patch = (patch.parse)(body).map_err(|source| match source {
            DeviceError::Json(e) => Refusal::Body(e),
            source => Refusal::Device { section: row.name, id: id.into(), source },
        })?;
        // Checked here once, so that no device has to.
        if row.is_many && patch[row.id_field] != id {
            return Err(Refusal::IdMismatch);
        }
        self.config.check_update(row.name, id, &patch)?;
        let name = Name { model: row.name, id };
        self.machine.update(name, view.map(|view| view.path), &patch)?;
        self.config.note_update(row.name, id, &patch);
        Ok(())
    }

    fn update_group(&mut self, id: Option<&str>, body: &[u8]) -> Result<(), Refusal> {
        let patch: RateLimitGroup = serde_json::from_slice(body).map_err(Refusal::Body)?;
        if id.is_some_and(|id| id != patch.id) {
            return Err(Refusal::IdMismatch);
        }
        let limiter = patch.rate_limiter.clone().unwrap_or_default();
        self.machine.update_group(&patch.id, &limiter)?;
        self.config.note_group_update(&patch);
        Ok(())
    }

    /// What counted in the device goes on to be told of.
    fn remove(&mut self, section: &str, id: Option<String>) -> Result<Vec<Source>, Refusal> {
        let row = virtio::model(section)
            .filter(|row| row.is_removable)
            .ok_or_else(|| no_route("DELETE", section, id.as_deref()))?;
        let id = id.as_deref().unwrap_or(row.name);
        let gone = self.machine.remove(Name { model: row.name, id })?;
        self.config.remove(row.name, id);
        Ok(gone)
    }

    fn ctrl_alt_del(&mut self) -> Result<(), Refusal> {
        if !self.machine.ctrl_alt_del() {
            log::warn!("Ctrl-Alt-Del: the guest does not read its keyboard");
        }
        Ok(())
    }
}

/// The device, or the view of one, that a section is.
fn device(section: &str) -> Option<(&'static Row, Option<&'static View>)> {
    let row = virtio::model(section).map(|row| (row, None));
    row.or_else(|| virtio::view(section).map(|(row, view)| (row, Some(view))))
}

fn no_route(method: &'static str, section: &str, id: Option<&str>) -> Refusal {
    let path = id.map_or_else(|| section.to_owned(), |id| format!("{section}/{id}"));
    Refusal::Route { method, path }
}

/// The guest runs: so long it took.
fn finish(mut watch: Stopwatch) -> BootPhases {
    watch.phases.running_us = watch.lap();
    log::info!("{}", watch.phases);
    watch.phases
}

fn done(result: Result<(), Refusal>) -> Reply {
    result.map(|()| Value::Null)
}
