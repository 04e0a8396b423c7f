//! State changes of a VM, for whoever wants to follow them.
use std::time::Instant;

use serde::Serialize;

use crate::exit::Ending;

/// Something that happened to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Event {
    /// Microseconds of the monotonic clock since husk (or the library's VM) started.
    pub time_us: u64,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum What {
    /// The vCPUs run for the first time.
    Started,
    /// The vCPUs and devices stand still.
    Paused,
    /// They go on.
    Resumed,
    /// The power button was pressed.
    ShutdownRequested,
    /// The guest reset itself and boots again.
    Rebooted,
    /// The VM is over. The last event.
    Ended(Ending),
}

/// Takes events until it returns false. Runs on the VMM thread: must not block.
pub struct Sink(Box<dyn FnMut(&Event) -> bool + Send>);

impl Sink {
    /// A sink that calls `f`.
    pub fn new(f: impl FnMut(&Event) -> bool + Send + 'static) -> Self {
        Self(Box::new(f))
    }
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sink").finish_non_exhaustive()
    }
}

/// Hands each event to every sink.
#[derive(Debug)]
pub(crate) struct Hub {
    started: Instant,
    sinks: Vec<Sink>,
}

impl Hub {
    /// A hub whose clock starts at `started`.
    pub(crate) fn new(started: Instant) -> Self {
        Self { started, sinks: Vec::new() }
    }

    pub(crate) fn subscribe(&mut self, sink: Sink) {
        self.sinks.push(sink);
    }

    pub(crate) fn publish(&mut self, what: What) {
        let time_us = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        let event = Event { time_us, what };
        log::info!("event: {:?}", event.what);
        self.sinks.retain_mut(|sink| (sink.0)(&event));
    }
}
