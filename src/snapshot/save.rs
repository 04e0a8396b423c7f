//! A snapshot in the making: prepared while the guest goes on, begun while it stands still, finished while it goes on
//! again.
//!
//! ```text
//!   Draft ──begin──► Saving ──Writer──► files
//!   what can be      state read,        a thread waits for the copy, describes it, commits, answers
//!   refused is       memory forked
//! ```
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use rustix::process::{Signal, pidfd_send_signal};
use serde_json::Value;

use super::SnapshotError;
use super::files::Files;
use super::format::StateFile;
use super::image::{Document, MachineState, MemoryDocument, hex};
use super::params::SnapshotParams;
use crate::memory::{Dump, Patch, Ram};

/// A snapshot whose files are there, and nothing in them.
#[derive(Debug)]
pub(crate) struct Draft {
    id: [u8; 16],
    files: Files,
}

impl Draft {
    /// Makes the files for a VM with `ram_len` bytes of RAM, and refuses what cannot be or must not be replaced.
    pub(crate) fn new(params: &SnapshotParams, ram_len: u64) -> Result<Self, SnapshotError> {
        let place = params.place()?;
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| SnapshotError::Copy(e.into()))?;
        let files = Files::create(place, &hex(&id), ram_len, params.sync)?;
        Ok(Self { id, files })
    }

    /// Begins with the memory of a VM that stands still; it may go on when this returns.
    pub(crate) fn begin(
        self,
        config: Value,
        machine: MachineState,
        ram: &Ram,
    ) -> Result<Saving, SnapshotError> {
        let Self { id, files } = self;
        let id_at = ram.offset_of(arch::layout::GENERATION_ID);
        let patch = Patch { at: id_at, bytes: id };
        let dump = ram.dump(patch, files.memory()).map_err(SnapshotError::Copy)?;
        let memory = MemoryDocument {
            file: files.memory_name(),
            len: ram.len(),
            id_at,
            plugged: ram.plugged(),
        };
        let document = Document {
            husk: env!("CARGO_PKG_VERSION").into(),
            arch: std::env::consts::ARCH.into(),
            id: hex(&id),
            memory,
            config,
            machine,
        };
        Ok(Saving { files, dump, document })
    }
}

/// A snapshot whose state has been read, and whose memory is being copied.
#[derive(Debug)]
pub(crate) struct Saving {
    files: Files,
    dump: Dump,
    document: Document,
}

/// A snapshot that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) id: String,
    /// Bytes of state and memory.
    pub(crate) bytes: u64,
}

impl Saving {
    /// Waits for the memory, then describes and names the files, unless that is called off.
    fn finish(self, is_off: &AtomicBool) -> Result<Written, SnapshotError> {
        let Self { files, dump, document } = self;
        let check = || match is_off.load(Ordering::Acquire) {
            true => Err(SnapshotError::Ended),
            false => Ok(()),
        };
        let extents = dump.finish().map_err(|e| check().err().unwrap_or(SnapshotError::Copy(e)))?;
        let json = serde_json::to_vec(&document).map_err(SnapshotError::Document)?;
        let state = StateFile::encode(&json, &extents);
        let of_memory: u64 = extents.iter().map(|extent| u64::from(extent.stored)).sum();
        check()?;
        files.commit(&state)?;
        Ok(Written { id: document.id, bytes: of_memory + state.len() as u64 })
    }
}

/// Says how a snapshot went.
type Answer = Box<dyn FnOnce(Result<Written, SnapshotError>) + Send>;

/// The thread that sees a snapshot through. It is there before the guest has to stand still for it.
#[derive(Debug)]
pub(crate) struct Writer {
    work: SyncSender<(Saving, Answer)>,
    /// Disconnected when the answer has been given.
    answered: Receiver<()>,
    flags: Arc<Flags>,
}

#[derive(Debug, Default)]
struct Flags {
    /// Nobody wants it any more.
    is_off: AtomicBool,
    /// It is there, or will never be.
    is_done: AtomicBool,
}

impl Writer {
    /// Starts the thread. It ends if the writer is dropped.
    pub(crate) fn spawn() -> std::io::Result<Self> {
        let (work, to_do) = sync_channel::<(Saving, Answer)>(1);
        let (answering, answered) = sync_channel::<()>(0);
        let flags = Arc::new(Flags::default());
        let shared = flags.clone();
        std::thread::Builder::new().name("husk_snapshot".into()).spawn(move || {
            if let Ok((saving, answer)) = to_do.recv() {
                let finished = saving.finish(&shared.is_off);
                // Whoever hears of it may ask for the next.
                shared.is_done.store(true, Ordering::Release);
                answer(finished);
                drop(answering);
            }
        })?;
        Ok(Self { work, answered, flags })
    }

    /// Sees a snapshot through, and says how it went.
    pub(crate) fn write(self, saving: Saving, answer: Answer) -> Writing {
        let Self { work, answered, flags } = self;
        let copier = saving.dump.process();
        let sent = work.send((saving, answer));
        debug_assert!(sent.is_ok(), "the thread waits for it");
        Writing { copier, answered, flags }
    }
}

/// A snapshot that is being written by a thread.
#[derive(Debug)]
pub(crate) struct Writing {
    /// The process that copies memory.
    copier: Option<OwnedFd>,
    answered: Receiver<()>,
    flags: Arc<Flags>,
}

impl Writing {
    /// Whether it is there, or will never be.
    pub(crate) fn is_done(&self) -> bool {
        self.flags.is_done.load(Ordering::Acquire)
    }

    /// Waits until whoever asked for it has been answered. False if it takes longer than that.
    pub(crate) fn wait(&self, patience: Duration) -> bool {
        self.answered.recv_timeout(patience) == Err(RecvTimeoutError::Disconnected)
    }

    /// Calls it off: nothing of it is left, unless it was about to be done.
    pub(crate) fn call_off(&self) {
        self.flags.is_off.store(true, Ordering::Release);
        if let Some(copier) = &self.copier
            && let Err(e) = pidfd_send_signal(copier, Signal::KILL)
        {
            log::debug!("the process that copies memory has ended: {e}");
        }
    }
}
