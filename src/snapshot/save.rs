//! A snapshot in the making: prepared while the guest goes on, begun while it stands still, finished while it goes on
//! again.
//!
//! ```text
//!   Draft ──begin──► Saving ──Writer──► files
//!   what can be      state read,        a thread waits for the copy, describes it, commits, answers
//!   refused is       memory forked
//! ```
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use arch::layout;
use devices::memory::PAGE;
use devices::sys::again::spawn;
use rustix::process::{Signal, pidfd_send_signal};
use serde_json::Value;

use super::chain::{Missing, Parent, over};
use super::document::{Document, MachineState, MemoryDocument, hex};
use super::files::Files;
use super::format::StateFile;
use super::layers;
use super::params::{Place, SnapshotParams, SnapshotType};
use super::{Compression, SnapshotError};
use crate::error::chain;
use crate::memory::{Changes, Dump, Dumped, Plan, Ram, Since, Tracker, Zeroes};

/// A snapshot whose files are there, and nothing in them.
#[derive(Debug)]
pub(crate) struct Draft {
    id: [u8; 16],
    kind: SnapshotType,
    compression: Compression,
    place: Place,
    files: Files,
    /// The snapshot that it can go over.
    over: Option<String>,
}

impl Draft {
    /// Makes the files for a VM with such RAM, and refuses what cannot be or must not be replaced.
    pub(crate) fn new(params: &SnapshotParams, ram: &Ram) -> Result<Self, SnapshotError> {
        let place = params.place()?;
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| SnapshotError::Copy(e.into()))?;
        let compression = params.compression;
        let len = if compression.is_none() { ram.len() } else { 0 };
        let files = Files::create(place.clone(), &hex(&id), len, params.sync)?;
        let kind = params.snapshot_type;
        let parent = ram.tracker.parent().filter(|_| kind == SnapshotType::Diff);
        let over = parent.filter(|parent| can_go_over(parent, &place)).map(|parent| parent.id);
        Ok(Self { id, kind, compression, place, files, over })
    }

    /// Begins with the memory of a VM that stands still; it may go on when this returns.
    pub(crate) fn begin(
        self,
        config: Value,
        machine: MachineState,
        ram: &Ram,
    ) -> Result<Saving, SnapshotError> {
        let Self { id, kind, compression, place, files, over } = self;
        let id_at = if compression.is_none() { ram.offset_of(layout::SNAPSHOT_ID) } else { 0 };
        let patch = ram.patch(id);
        // Of any snapshot: the next one is of what changes from now on.
        let since = ram.collect().map_err(SnapshotError::Copy)?;
        let since = since.filter(|_| kind == SnapshotType::Diff);
        let (plan, parent) = plan(since, over.as_deref(), &place, ram.len());
        let dump = ram.dump(&plan, patch, files.memory(), compression);
        let dump = dump.map_err(SnapshotError::Copy)?;
        let memory = MemoryDocument {
            file: files.memory_name(),
            len: ram.len(),
            compression,
            id_at,
            plugged: ram.plugged(),
            parent: parent.as_ref().map(|parent| parent.document(&place.state())),
        };
        let document = Document {
            husk: env!("CARGO_PKG_VERSION").into(),
            arch: std::env::consts::ARCH.into(),
            id: hex(&id),
            memory,
            config,
            machine,
        };
        let (files, tracker) = (Arc::new(Mutex::new(Some(files))), ram.tracker.clone());
        Ok(Saving { place, files, dump, document, parent, tracker })
    }
}

/// Whether a snapshot in this place can go over that one. It is looked for while the guest goes on: its state file has
/// to be read, and so have those of all that it goes over.
fn can_go_over(parent: &Parent, place: &Place) -> bool {
    if !parent.allows(place) {
        return false;
    }
    let found = parent.look();
    if let Err(Missing { id, path, why }) = &found {
        let (state, path, why) = (place.state(), path.display(), chain(why));
        log::warn!(
            "{} is complete: snapshot {id}, which it would go over, is not to be had at {path}: {why}",
            state.display()
        );
    }
    found.is_ok()
}

/// What is copied, and what it goes over: the snapshot `over`, or nothing.
fn plan(
    since: Option<Since>,
    over: Option<&str>,
    place: &Place,
    ram_len: u64,
) -> (Plan, Option<Parent>) {
    let Some(Since { parent, pages }) = since else { return (Plan::Full, None) };
    if over != Some(&*parent.id) {
        return (complete(&parent, ram_len, place), None);
    }
    let changes = Changes {
        before: parent.before.clone(),
        witnesses: parent.witnesses(pages.as_deref()),
        // Two files may be merged by others, who see what is in the file only.
        zeroes: match place {
            Place::Directory(_) => Zeroes::Told,
            Place::Files { .. } => Zeroes::Written,
        },
        pages,
    };
    (Plan::Changes(changes), Some(parent))
}

/// All of the memory, by itself.
fn complete(parent: &Parent, ram_len: u64, place: &Place) -> Plan {
    match place {
        Place::Directory(_) => Plan::Full,
        // It may be merged all the same: then what has become zero must not be as it was.
        Place::Files { .. } => {
            let pages = usize::try_from(ram_len).unwrap_or(usize::MAX) / PAGE;
            Plan::Changes(Changes {
                pages: Some(vec![u64::MAX; pages.div_ceil(64)]),
                before: parent.before.clone(),
                witnesses: Vec::new(),
                zeroes: Zeroes::Written,
            })
        }
    }
}

/// Files that nothing is done with while memory is copied into them. Whoever takes them has them alone.
type InTheMaking = Arc<Mutex<Option<Files>>>;

fn take(files: &InTheMaking) -> Option<Files> {
    files.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// A snapshot whose state has been read, and whose memory is being copied.
#[derive(Debug)]
pub(crate) struct Saving {
    place: Place,
    files: InTheMaking,
    dump: Dump,
    document: Document,
    /// What it goes over.
    parent: Option<Parent>,
    /// Learns that it is there.
    tracker: Arc<Tracker>,
}

/// A snapshot that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) id: String,
    /// Whether it goes over another one.
    pub(crate) kind: SnapshotType,
    /// Bytes of state, memory, and what drives have written.
    pub(crate) bytes: u64,
}

impl Saving {
    /// Waits for the memory, then describes and names the files, unless that is called off.
    fn finish(self, flags: &Flags) -> Result<Written, SnapshotError> {
        let Self { place, files, dump, mut document, parent, tracker } = self;
        let check = || match flags.is_off.load(Ordering::SeqCst) {
            true => Err(SnapshotError::Ended),
            false => Ok(()),
        };
        let dumped = dump.finish();
        let files = take(&files);
        let dumped = dumped.map_err(|e| check().err().unwrap_or(SnapshotError::Copy(e)))?;
        let mut files = files.ok_or(SnapshotError::Ended)?;
        let Dumped { extents, witnesses, is_partial } = dumped;
        if let Some(parent) = &mut document.memory.parent {
            parent.is_partial = is_partial;
            parent.hear(&witnesses);
        }
        let of_layers = layers::write(&mut files, &mut document.machine, &flags.is_off)
            .map_err(|e| check().err().unwrap_or(e))?;
        let json = serde_json::to_vec(&document).map_err(SnapshotError::Document)?;
        let state = StateFile::encode(&json, &extents);
        let of_memory: u64 = extents.iter().map(|extent| u64::from(extent.stored)).sum();
        let kind = match parent {
            Some(_) => SnapshotType::Diff,
            None => SnapshotType::Full,
        };
        flags.is_committing.store(true, Ordering::SeqCst);
        check()?;
        let memory = place.memory(&document.id);
        files.commit(&state)?;
        let before = match &parent {
            None => extents.into(),
            Some(parent) => over(&parent.before, &extents),
        };
        let older = parent.as_ref().filter(|_| is_partial);
        tracker.commit(Parent::new(&document.id, &place, &memory, before, older));
        Ok(Written { id: document.id, kind, bytes: of_memory + of_layers + state.len() as u64 })
    }
}

/// Says how a snapshot went.
type Answer = Box<dyn FnOnce(Result<Written, SnapshotError>) + Send>;

/// The thread that sees a snapshot through. It is there before the guest has to stand still for it.
#[derive(Debug)]
pub(crate) struct Writer {
    work: SyncSender<(Saving, Answer)>,
    flags: Arc<Flags>,
}

#[derive(Debug, Default)]
struct Flags {
    /// Nobody wants it any more.
    is_off: AtomicBool,
    /// It may be there at any moment, unless it was called off before this.
    is_committing: AtomicBool,
    /// It is there, or will never be.
    is_done: AtomicBool,
}

impl Writer {
    /// Starts the thread. It ends if the writer is dropped.
    pub(crate) fn spawn() -> std::io::Result<Self> {
        let (work, to_do) = sync_channel::<(Saving, Answer)>(1);
        let flags = Arc::new(Flags::default());
        let shared = flags.clone();
        let see_through = move || {
            if let Ok((saving, answer)) = to_do.recv() {
                let finished = saving.finish(&shared);
                // Whoever hears of it may ask for the next.
                shared.is_done.store(true, Ordering::Release);
                answer(finished);
            }
        };
        spawn(
            |work| std::thread::Builder::new().name("husk_snapshot".into()).spawn(work),
            see_through,
        )?;
        Ok(Self { work, flags })
    }

    /// Sees a snapshot through, and says how it went.
    pub(crate) fn write(self, saving: Saving, answer: Answer) -> Writing {
        let Self { work, flags } = self;
        let (copier, files) = (saving.dump.process(), saving.files.clone());
        let sent = work.send((saving, answer));
        debug_assert!(sent.is_ok(), "the thread waits for it");
        Writing { copier, files, flags }
    }
}

/// A snapshot that is being written by a thread.
#[derive(Debug)]
pub(crate) struct Writing {
    /// The process that copies memory.
    copier: Option<OwnedFd>,
    files: InTheMaking,
    flags: Arc<Flags>,
}

impl Writing {
    /// Whether it is there, or will never be.
    pub(crate) fn is_done(&self) -> bool {
        self.flags.is_done.load(Ordering::Acquire)
    }

    /// Calls it off. What its end is then, unless it has been said: nothing of it is left, or nobody knows.
    pub(crate) fn call_off(&self) -> SnapshotError {
        self.flags.is_off.store(true, Ordering::SeqCst);
        if let Some(copier) = &self.copier
            && let Err(e) = pidfd_send_signal(copier, Signal::KILL)
        {
            log::debug!("the process that copies memory has ended: {e}");
        }
        // How long that process takes to end, with all of the guest's memory, is not known: its files do not wait for it.
        drop(take(&self.files));
        match self.flags.is_committing.load(Ordering::SeqCst) {
            true => SnapshotError::Unsettled,
            false => SnapshotError::Ended,
        }
    }
}
