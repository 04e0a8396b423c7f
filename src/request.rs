//! What can be asked of a VM, and how a question gets to the thread that may answer it.
//!
//! The API, the command line and the library all hold a [`Handle`]; the VMM thread holds the
//! [`Requests`] at the other end. Nobody else touches the VM.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::todo)]
use std::sync::Arc;

use devices::sync::mpsc::{self, Receiver, Sender};
use serde_json::Value;

use crate::arrived::Arrived;
use crate::bell::Bell;
use crate::error::Refusal;
use crate::events::Sink;
use crate::fork::{ForkParams, ImageSink};
use crate::snapshot::{LoadParams, Restore, RewindParams, SnapshotParams};

/// Everything that can be asked. Devices and sections of the configuration are data, not variants.
#[derive(Debug)]
pub enum Request {
    /// Set a section of the configuration, or one device of it.
    Put {
        /// The section: "boot-source", "drives".
        section: String,
        /// The device, where the section has several.
        id: Option<String>,
        /// JSON.
        body: Vec<u8>,
    },
    /// Change part of a section, or a running device.
    Patch {
        /// The section.
        section: String,
        /// The device, where the section has several.
        id: Option<String>,
        /// JSON.
        body: Vec<u8>,
    },
    /// Show one section, or a view of a running device.
    Get {
        /// The section: "machine-config", "balloon/statistics".
        section: String,
    },
    /// Take a device out of the running VM.
    Delete {
        /// The section.
        section: String,
        /// The device, where the section has several.
        id: Option<String>,
    },
    /// Set the whole configuration (JSON, as in a configuration file) and start.
    Launch {
        /// JSON.
        body: Vec<u8>,
    },
    /// Start what is configured.
    Start,
    /// Stop the vCPUs and devices where they are.
    Pause,
    /// Go on.
    Resume,
    /// Write a snapshot. Answered when it is there.
    Snapshot(SnapshotParams),
    /// Restore a VM from a snapshot that is to be opened.
    Load(Box<LoadParams>),
    /// Restore a VM from a snapshot that was opened.
    Restore(Box<Restore>),
    /// Put the VM back to a snapshot of it.
    Rewind(RewindParams),
    /// Note beside its snapshot which pages a restored VM has touched.
    Record,
    /// Make children of the VM, each in a process of its own. Answered when they run, with a
    /// [`crate::Forked`].
    Fork(ForkParams),
    /// Give an image of the VM, in memory, to the sink. Answered when it has it.
    Freeze(ImageSink),
    /// Press the power button.
    Shutdown,
    /// Press Ctrl-Alt-Del.
    CtrlAltDel,
    /// End the VM at once.
    Kill,
    /// End, whether there is a VM or not.
    Quit,
    /// Write the metrics now.
    FlushMetrics,
    /// The metrics as Prometheus reads them, in one string.
    Metrics,
    /// The guest's metadata: `GET /mmds`.
    Metadata,
    /// Set the guest's metadata.
    PutMetadata {
        /// Any JSON.
        data: Value,
    },
    /// Change the guest's metadata (RFC 7396).
    PatchMetadata {
        /// Any JSON.
        patch: Value,
    },
    /// Who and in what state: `GET /`.
    Describe,
    /// The whole configuration: `GET /vm/config`.
    Config,
    /// Answered when the VM has ended, with the [`crate::Ending`].
    Wait,
    /// Every [`crate::Event`] from now on goes to the sink, until it returns false. The reply is that
    /// of `Describe`: the state before the first of them.
    Subscribe(Sink),
}

/// `Null` where there is nothing to say.
pub type Reply = Result<Value, Refusal>;

/// Takes the reply to where it is wanted. Runs on the VMM thread: must not block.
pub(crate) type Respond = Box<dyn FnOnce(Reply) + Send>;

pub(crate) struct Call {
    pub(crate) request: Request,
    pub(crate) arrived: Arrived,
    pub(crate) respond: Respond,
}

/// Asks a VM; clones ask the same one.
#[derive(Clone)]
pub struct Handle {
    calls: Sender<Call>,
    wake: Arc<Bell>,
}

impl std::fmt::Debug for Requests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Requests").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    /// Asks, and waits for the reply.
    pub fn call(&self, request: Request) -> Reply {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.send(request, move |reply| {
            // The caller waits below, so it is there.
            let _ = sender.send(reply);
        });
        receiver.recv().unwrap_or(Err(Refusal::Gone))
    }

    /// Asks; `respond` gets the reply, on another thread. It must not block. If the VMM is gone,
    /// `respond` is dropped uncalled.
    pub fn send(&self, request: Request, respond: impl FnOnce(Reply) + Send + 'static) {
        self.send_with(request, Arrived::default(), respond);
    }

    /// The same, of a request that came with descriptors.
    pub(crate) fn send_with(
        &self,
        request: Request,
        arrived: Arrived,
        respond: impl FnOnce(Reply) + Send + 'static,
    ) {
        if self.calls.send(Call { request, arrived, respond: Box::new(respond) }).is_ok() {
            self.wake.ring();
        }
    }
}

/// The VMM's end.
pub(crate) struct Requests {
    calls: Receiver<Call>,
    wake: Arc<Bell>,
}

impl Requests {
    /// A pair of connected ends.
    pub(crate) fn channel() -> Result<(Handle, Requests), Refusal> {
        let wake = Bell::new().map(Arc::new).map_err(Refusal::host("cannot make an eventfd"))?;
        let (sender, receiver) = mpsc::channel();
        let handle = Handle { calls: sender, wake: wake.clone() };
        Ok((handle, Requests { calls: receiver, wake }))
    }

    /// Rung when there is a call.
    pub(crate) fn bell(&self) -> &Bell {
        &self.wake
    }

    /// The next call, if there is one.
    pub(crate) fn next(&self) -> Option<Call> {
        match self.calls.try_recv() {
            Ok(call) => Some(call),
            Err(_) => {
                // Quiet the descriptor, then look again: a call may have come in between.
                self.wake.hush();
                self.calls.try_recv().ok()
            }
        }
    }
}
