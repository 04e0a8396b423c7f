//! A live VM goes back to a snapshot of it.
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use arch::Clock;

use super::{Controller, Live, Phase};
use crate::error::{Refusal, chain};
use crate::events::What;
use crate::exit::Ending;
use crate::memory::RewindTools;
use crate::metrics::micros_since;
use crate::snapshot::{Image, LoadParams, RewindParams, SnapshotError};

/// What a VM goes back to if nothing else is said: what it was restored from, or saved to later.
#[derive(Debug, Default)]
pub(super) struct Origin {
    image: Option<Image>,
    /// The last snapshot, once it is there. It is not opened before it is needed.
    written: Written,
}

/// Where a snapshot has been written: told by the thread that writes it.
#[derive(Clone, Debug, Default)]
pub(super) struct Written(Arc<Mutex<Option<LoadParams>>>);

impl Written {
    /// A snapshot is there.
    pub(super) fn tell(&self, params: LoadParams) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(params);
    }

    fn get(&self) -> Option<LoadParams> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Origin {
    /// That of a VM that was restored.
    pub(super) fn of(image: Option<&Image>) -> Self {
        Self { image: image.cloned(), ..Self::default() }
    }

    /// Who is to hear of snapshots that are there.
    pub(super) fn written(&self) -> Written {
        self.written.clone()
    }

    /// What it was restored from.
    pub(super) fn restored(&self) -> Option<&Image> {
        self.image.as_ref()
    }

    fn image(&mut self) -> Result<Image, SnapshotError> {
        if let Some(params) = self.written.get() {
            self.set(Image::load(&params)?);
        }
        self.image.clone().ok_or(SnapshotError::NoOrigin)
    }

    fn set(&mut self, image: Image) {
        self.image = Some(image);
        self.written = Written::default();
    }
}

impl Controller {
    /// Puts the VM back. It stays as it was if this is refused; if it fails half-way, the VM ends.
    pub(super) fn rewind(&mut self, params: &RewindParams) -> Result<(), Refusal> {
        let start = Instant::now();
        let live = self.live()?;
        let image = match params.load_params() {
            Some(params) => Image::load(&params)?,
            None => live.origin.image()?,
        };
        live.machine.check_rewind(&live.config, &image)?;
        let tools = RewindTools::open().map_err(Refusal::host("the kernel's page map"))?;
        if !live.is_paused {
            live.machine.pause()?;
        }
        if let Some(ending) = live.machine.ended() {
            return Err(Refusal::Ended(ending.clone()));
        }
        let clock = if params.clock_realtime { Clock::CatchesUp } else { Clock::GoesOn };
        match live.rewind(image, clock, &tools) {
            Ok((id, bytes)) => {
                live.is_paused = params.resume_vm.map_or(live.is_paused, |resumes| !resumes);
                let paused = live.is_paused;
                if !paused {
                    live.machine.run();
                }
                let took_us = micros_since(start);
                self.instance.counters.latencies.rewind().set(took_us);
                self.hub.publish(What::Rewound { id, paused, took_us, bytes });
                Ok(())
            }
            Err(e) => {
                self.end(Ending::HostError { detail: format!("cannot rewind: {}", chain(&e)) });
                Err(e)
            }
        }
    }
}

impl Controller {
    /// Notes which pages a restored VM has touched.
    pub(super) fn record(&mut self) -> Result<(), Refusal> {
        let live = self.live()?;
        live.record_at = None;
        let image = live.origin.restored().ok_or(SnapshotError::NoWorkingSet)?;
        let path = image.working_set_path().ok_or(SnapshotError::NoWorkingSet)?;
        let set = live.machine.ram().touched().map_err(Refusal::host("the kernel's page map"))?;
        let set = set.ok_or(SnapshotError::NoWorkingSet)?;
        set.write(&path, image.id())?;
        log::info!("noted {} KiB that the guest touches first", set.bytes() >> 10);
        Ok(())
    }

    /// Does the same when its time has come.
    pub(super) fn record_if_due(&mut self, now: Instant) {
        if self.record_due().is_some_and(|due| due <= now)
            && let Err(e) = self.record()
        {
            log::warn!("cannot note which pages the guest touches: {}", chain(&e));
        }
    }

    /// When that is.
    pub(super) fn record_due(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Live(live) => live.record_at,
            Phase::Configuring(_) | Phase::Ended(_) => None,
        }
    }
}

impl Live {
    /// The snapshot's id, and how many bytes had been written.
    fn rewind(
        &mut self,
        image: Image,
        clock: Clock,
        tools: &RewindTools,
    ) -> Result<(String, u64), Refusal> {
        let bytes = self.machine.rewind(&self.config, &image, clock, tools)?;
        let id = image.document.id.clone();
        self.origin.set(image);
        Ok((id, bytes))
    }
}
