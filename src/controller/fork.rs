//! Freezing and forking: the guest stands still for as long as its state is read; a thread of its own
//! sees the rest through and answers.
use std::time::Instant;

use devices::sys::again::spawn;
use devices::virtio::{mem, model::Model};
use serde_json::{Value, json};

use super::Controller;
use super::owed::{Owed, owe};
use crate::config::VmConfig;
use crate::error::Refusal;
use crate::events::What;
use crate::fork::{
    Batch, Birth, ForkError, ForkParams, Forked, Freezing, ImageSink, Nursery, Parent, Spec, plan,
};
use crate::metrics::micros_since;
use crate::request::{Reply, Respond};

impl Controller {
    /// Says where children come from.
    pub(crate) fn set_nursery(&mut self, nursery: Nursery) {
        self.nursery = Some(nursery);
    }

    /// Says what speaks against children of the VM that is about to start.
    pub(super) fn check_for_children(config: &VmConfig) {
        let is_forkable = config.machine.forkable;
        if is_forkable && config.devices().any(|recipe| recipe.model() == mem::Mem::NAME) {
            log::warn!(
                "forkable is of no use with memory hotplug: all memory is copied for each fork"
            );
        }
    }

    /// Gives an image of the VM to `sink`, and then answers.
    pub(super) fn freeze(&mut self, sink: ImageSink, respond: Respond) {
        match self.begin_freeze() {
            Ok((freezing, _)) => {
                let (owing, owed) = owe(respond);
                see_through(&owed, move || {
                    let frozen = freezing.finish().map_err(Refusal::from);
                    if let Some(respond) = owing.claim() {
                        respond(frozen.map(|image| {
                            sink.take(image);
                            Value::Null
                        }));
                    }
                });
            }
            Err(e) => respond(Err(e)),
        }
    }

    /// Makes children of the VM, and answers when they run.
    pub(super) fn fork(&mut self, params: &ForkParams, respond: Respond) {
        let start = Instant::now();
        let (specs, nursery) = match self.plan_fork(params) {
            Ok(planned) => planned,
            Err(e) => return respond(Err(e)),
        };
        let poster = self.hub.poster().map_err(Refusal::host("cannot make an eventfd"));
        let begun = poster.and_then(|poster| Ok((poster, self.begin_freeze()?)));
        let (poster, (freezing, paused_us)) = match begun {
            Ok(begun) => begun,
            Err(e) => return respond(Err(e)),
        };
        self.children += specs.len() as u64;
        let defaults = self.defaults();
        let (owing, owed) = owe(respond);
        see_through(&owed, move || {
            let count = specs.len();
            let mut respond = None;
            let deliver = || -> Reply {
                let image = freezing.finish()?;
                let batch = Batch {
                    household: nursery.household.clone(),
                    defaults,
                    logger: crate::logger::current(),
                    document: (*image.document).clone(),
                    layers: Vec::new(),
                    children: Vec::new(),
                };
                let claim = || {
                    respond = owing.claim();
                    respond.is_some()
                };
                let children = Birth { batch, specs, image }.deliver(&nursery, claim)?;
                Ok(json!(Forked { paused_us, children }))
            };
            let reply = deliver();
            if reply.is_ok() {
                let took_us = micros_since(start);
                poster.post(What::Forked { children: count, paused_us, took_us });
            }
            if let Some(respond) = respond.or_else(|| owing.claim()) {
                respond(reply);
            }
        });
        self.forks.retain(|owed| !owed.is_settled());
        self.forks.push(owed);
    }

    /// What children are to be, and where they come from.
    fn plan_fork(&mut self, params: &ForkParams) -> Result<(Vec<Spec>, Nursery), Refusal> {
        self.live()?;
        let nursery = self.nursery.clone().ok_or(ForkError::Library)?;
        let parent = Parent {
            config: self.config()?,
            id: &self.instance.id,
            api_sock: Some(&nursery.household.api_sock),
            children: self.children,
        };
        Ok((plan(parent, params)?, nursery))
    }

    /// What is to be finished, and for how many microseconds the guest stood still for it.
    fn begin_freeze(&mut self) -> Result<(Freezing, u64), Refusal> {
        self.stand_still()?;
        let start = Instant::now();
        let live = self.live()?;
        if live.is_paused {
            return Ok((live.machine.freeze(&live.config)?, 0));
        }
        let freezing = live.machine.freeze(&live.config);
        live.machine.run();
        let paused_us = micros_since(start);
        Ok((freezing?, paused_us))
    }
}

/// Runs `work`, which is to answer, on a thread of its own. If there is none, that is the answer.
fn see_through(owed: &Owed, work: impl FnOnce() + Send + 'static) {
    if let Err(e) =
        spawn(|work| std::thread::Builder::new().name("husk_fork".into()).spawn(work), work)
    {
        owed.answer(Refusal::host("cannot start a thread to fork the microVM")(e));
    }
}
