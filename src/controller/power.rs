//! A VM that runs, stands still, and ends.
use std::time::Instant;

use serde_json::json;

use super::{Controller, Phase};
use crate::config::OnReboot;
use crate::error::Refusal;
use crate::events::What;
use crate::exit::Ending;
use crate::metrics::micros_since;
use crate::outcome::Outcome;

impl Controller {
    pub(super) fn pause(&mut self) -> Result<(), Refusal> {
        let live = self.live()?;
        if !live.is_paused {
            let start = Instant::now();
            // What is paused is often copied next.
            live.machine.pause_to_copy()?;
            live.is_paused = true;
            self.instance.counters.latencies.vmm_pause_vm().set(micros_since(start));
            self.hub.publish(What::Paused);
            // What the guest did last comes first: it boots again, or has ended, before anybody asks.
            self.heed_outcome();
        }
        self.live().map(drop)
    }

    /// Stops a guest that runs, to be copied. One that had ended by then ends the VM, or boots again and is stopped.
    pub(super) fn stand_still(&mut self) -> Result<(), Refusal> {
        for _ in 0..2 {
            let live = self.live()?;
            if live.is_paused {
                return Ok(());
            }
            live.machine.pause_to_copy()?;
            if live.machine.ended().is_none() {
                return Ok(());
            }
            self.heed_outcome();
        }
        Err(Refusal::Ended(Ending::Reset))
    }

    pub(super) fn resume(&mut self) -> Result<(), Refusal> {
        let live = self.live()?;
        if live.is_paused {
            let start = Instant::now();
            live.machine.run();
            live.is_paused = false;
            self.instance.counters.latencies.vmm_resume_vm().set(micros_since(start));
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

    pub(super) fn kill(&mut self) -> Result<(), Refusal> {
        self.live()?;
        self.end(Ending::Killed);
        Ok(())
    }

    /// Whether a guest runs that could be asked to power off.
    pub(crate) fn is_running(&self) -> bool {
        matches!(&self.phase, Phase::Live(live) if !live.is_paused)
    }

    /// The live machine's outcome, to wait for.
    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        match &self.phase {
            Phase::Live(live) => Some(live.machine.outcome()),
            Phase::Configuring(_) | Phase::Ended(_) => None,
        }
    }

    /// Draws the consequence if the guest has ended its run: boots it again, or ends the VM.
    pub(crate) fn heed_outcome(&mut self) {
        let Phase::Live(live) = &self.phase else { return };
        if live.machine.outcome().get().is_some() {
            // What ends may have sockets to remove.
            self.with_paths(Self::draw_consequence);
        }
    }

    fn draw_consequence(&mut self) {
        let Phase::Live(live) = &self.phase else { return };
        let Some(ending) = live.machine.outcome().get().cloned() else { return };
        let restarts = live.config.on_reboot() == OnReboot::Restart && live.machine.can_reboot();
        if ending == Ending::Reset && restarts {
            self.reboot();
        } else {
            self.end(ending);
        }
    }

    /// Ends the VM, whatever it is doing. The first ending stays.
    pub(crate) fn end(&mut self, ending: Ending) {
        self.with_paths(|this| this.end_here(ending));
    }

    fn end_here(&mut self, ending: Ending) {
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
}
