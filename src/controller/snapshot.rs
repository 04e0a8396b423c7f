//! Snapshots of a VM that goes on: begun here, seen through by a thread of its own.
use std::time::{Duration, Instant};

use super::owed::owe;
use super::{Controller, Live, done};
use crate::error::Refusal;
use crate::events::{Poster, What};
use crate::fork::ForkError;
use crate::metrics::micros_since;
use crate::request::Respond;
use crate::snapshot::{Draft, Saving, SnapshotError, SnapshotParams, Writer, Written};

/// How long a snapshot that is called off may take to clean up behind itself.
const CLEANUP: Duration = Duration::from_millis(100);

/// A snapshot that has begun.
struct Begun {
    saving: Saving,
    writer: Writer,
    /// For how long the guest stood still.
    paused_us: u64,
    /// Tells of it.
    poster: Poster,
}

impl Controller {
    /// Begins a snapshot; a thread of its own sees it through and answers, while the guest goes on.
    pub(super) fn snapshot(&mut self, params: &SnapshotParams, respond: Respond) {
        let start = Instant::now();
        let Begun { saving, writer, paused_us, poster } = match self.begin_snapshot(params) {
            Ok(begun) => begun,
            Err(e) => return respond(Err(e)),
        };
        let written = self.live().map(|live| live.origin.written());
        let latencies = self.instance.counters.latencies.clone();
        let load_params = params.load_params();
        let (owing, owed) = owe(respond);
        let answer = move |saved: Result<Written, _>| {
            let Some(respond) = owing.claim() else { return };
            respond(done(saved.map_err(Refusal::Snapshot).map(|Written { id, kind, bytes }| {
                if let Ok(written) = written {
                    written.tell(load_params);
                }
                let took_us = micros_since(start);
                latencies.wrote_snapshot(kind).set(took_us);
                poster.post(What::SnapshotCreated { id, kind, took_us, paused_us, bytes });
            })));
        };
        self.saving = Some((writer.write(saving, Box::new(answer)), owed));
    }

    /// What can be refused is, before the guest stands still; whatever fails, it then does what it did before.
    fn begin_snapshot(&mut self, params: &SnapshotParams) -> Result<Begun, Refusal> {
        if self.saving.as_ref().is_some_and(|(writing, _)| !writing.is_done()) {
            return Err(SnapshotError::Busy.into());
        }
        let poster = self.hub.poster().map_err(Refusal::host("cannot make an eventfd"))?;
        let Live { config, machine, .. } = self.live()?;
        if let Some(recipe) = config.devices().find(|recipe| recipe.needs_shared_memory()) {
            let (model, id) = (recipe.model(), recipe.id().to_owned());
            return Err(SnapshotError::Elsewhere { model, id }.into());
        }
        let draft = Draft::new(params, machine.ram())?;
        let writer = Writer::spawn();
        let writer = writer.map_err(Refusal::host("cannot start a thread to write a snapshot"))?;
        self.stand_still()?;
        let start = Instant::now();
        let Live { config, machine, is_paused, .. } = self.live()?;
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

    /// Waits so long for what threads of their own see through, and then calls it off. The process may end after
    /// this: whoever asked has been answered, and nothing that is half done is left.
    pub(crate) fn settle(&mut self, patience: Duration) {
        if self.saving.is_some() || !self.forks.is_empty() {
            self.with_paths(|this| this.settle_here(patience));
        }
    }

    fn settle_here(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut late = Vec::new();
        if let Some((writing, owed)) = self.saving.take()
            && !owed.wait(deadline)
        {
            log::warn!("a snapshot was not written in time: it is called off");
            late.push((owed, writing.call_off().into()));
        }
        for owed in self.forks.drain(..).filter(|owed| !owed.wait(deadline)) {
            owed.answer(ForkError::Ended.into());
            late.push((owed, ForkError::Ended.into()));
        }
        let deadline = Instant::now() + CLEANUP;
        for (owed, why) in late {
            if !owed.wait(deadline) {
                owed.answer(why);
            }
        }
    }
}
