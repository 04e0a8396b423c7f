//! From a configuration or a snapshot to a VM that is live: boot, restore, in place of another or not, and
//! the guest's reset.
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::rewind::Origin;
use super::{Controller, Instance, Live, Phase};
use crate::boot::{BootPhases, Stopwatch};
use crate::config::VmConfig;
use crate::error::Refusal;
use crate::events::What;
use crate::exit::Ending;
use crate::machine::Machine;
use crate::metrics::Source;
use crate::parts::{self, Parts};
use crate::sandbox;
use crate::snapshot::{LoadParams, Noted, Overrides, Restore};
use crate::takeover::Taken;

/// A machine that does not run yet.
struct Made {
    machine: Machine,
    serial_path: Option<PathBuf>,
    /// The devices that it takes over from another.
    taken_over: Vec<(&'static str, String)>,
}

impl Controller {
    pub(super) fn start(&mut self) -> Result<(), Refusal> {
        let config = self.configuring()?.clone();
        let watch = Stopwatch::start(self.instance.started);
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
        if restore.is_none() {
            Self::check_for_children(&config);
        }
        // What another process serves cannot be mapped.
        let mapped = restore.filter(|restore| restore.handler.is_none());
        let image = mapped.filter(|restore| restore.prefaults()).map(|restore| &restore.image);
        // Found before files can no longer be.
        let noted = image.and_then(Noted::find);
        let records = mapped
            .filter(|restore| restore.record_ms.is_some())
            .and_then(|restore| restore.image.working_set_path());
        if records.is_some() && sandbox::opens_nothing() {
            return Err(Refusal::NeedsPaths("what the guest touches is noted in a file"));
        }
        let devices_before = self.hub.watched();
        let made = self.make(&config, &mut watch, restore);
        let Made { mut machine, serial_path, .. } = made
            .and_then(|made| self.replace_old(made, &config, restore))
            .and_then(|made| self.close_sandbox(&config, records).map(|()| made))
            .inspect_err(|_| self.hub.forget_after(devices_before))?;
        let has_port = self.see_off_old(&machine);
        self.hub.forget_before(devices_before, has_port.then_some(parts::SERIAL));
        if let Some(path) = serial_path.as_ref().filter(|_| !has_port) {
            (self.instance.announce)(path);
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
        if let Some(noted) = noted {
            machine.prefault(noted);
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
                self.instance.counters.latencies.vmm_load_snapshot().set(took_us);
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
        let Instance { names, quit, .. } = self.instance.clone();
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
            self.instance.id.clone_from(id);
        }
    }

    /// All or nothing: what was configured before stays if this is refused.
    pub(super) fn launch(&mut self, body: &[u8]) -> Result<(), Refusal> {
        let watch = Stopwatch::start(self.instance.started);
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
    pub(super) fn load(&mut self, params: &LoadParams) -> Result<(), Refusal> {
        let watch = Stopwatch::start(self.instance.started);
        self.config()?;
        self.restore(&Restore::open(params)?, watch)
    }

    /// The same, of a snapshot that was opened.
    pub(super) fn restore(
        &mut self,
        restore: &Restore,
        mut watch: Stopwatch,
    ) -> Result<(), Refusal> {
        let before = self.config()?;
        let mut config = restore.config()?;
        // These are of this process.
        config.defaults = before.defaults.clone();
        (config.logger, config.metrics) = (before.logger.clone(), before.metrics.clone());
        watch.phases.image_us = watch.lap();
        self.start_with(config, watch, Some(restore)).map_err(|e| restore.explain(e))
    }

    pub(super) fn reboot(&mut self) {
        let Phase::Live(live) = std::mem::replace(&mut self.phase, Phase::Ended(Ending::Reset))
        else {
            return;
        };
        // Paused just as the guest reset itself: it then waits at its first instruction.
        let Live { config, machine, serial_path, is_paused, origin, .. } = *live;
        let Instance { names, started, .. } = self.instance;
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
}

/// The guest runs: so long it took.
fn finish(mut watch: Stopwatch) -> BootPhases {
    watch.phases.running_us = watch.lap();
    log::info!("{}", watch.phases);
    watch.phases
}
