//! What has changed in guest memory since the last snapshot: KVM remembers what the guest writes, a set
//! of pages beside each region what husk writes itself.
//!
//! ```text
//!   KVM's log ───┐
//!                ├──collect──► pending ──commit──► nothing
//!   husk's log ──┘                │
//!                                 └──► the pages of a snapshot
//! ```
//!
//! What was collected stays pending until a snapshot is there: one that fails loses nothing.
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arch::again;
use devices::memory::PAGE;
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Ram;
use crate::snapshot::Parent;

/// What is known of changes.
#[derive(Debug, Default)]
pub(crate) struct Tracker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The snapshot that they are changes to.
    parent: Option<Parent>,
    /// Whether it is the one that memory is mapped from: then all that has been written to memory at
    /// all has been since.
    is_behind: bool,
    /// The pages of the image that have changed, a bit each.
    pending: Vec<u64>,
}

/// Changes since a snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Since {
    pub(crate) parent: Parent,
    /// The pages of the image that have changed, a bit each. `None` for all that have been written.
    pub(crate) pages: Option<Vec<u64>>,
}

impl Tracker {
    /// There is a snapshot: what was collected for it has changed no more.
    pub(crate) fn commit(&self, parent: Parent) {
        let mut state = self.lock();
        state.parent = Some(parent);
        state.is_behind = false;
        state.pending.fill(0);
    }

    /// The snapshot that changes are changes to.
    pub(crate) fn parent(&self) -> Option<Parent> {
        self.lock().parent.clone()
    }

    /// Of memory that is as an image has it, and mapped from it. What is no snapshot cannot be a parent.
    fn of_image(parent: Option<Parent>) -> Self {
        Self(Mutex::new(State { parent, is_behind: true, pending: Vec::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ram {
    /// Memory is as an image has it, and mapped from it. A snapshot that is being written is of what was
    /// there before: that it is done is nothing to what is known from here on.
    pub(crate) fn begin_tracking(&mut self, parent: Option<Parent>) {
        self.tracker = Arc::new(Tracker::of_image(parent));
    }

    /// Collects what has changed until now, while the VM stands still. `None` if there is no snapshot
    /// that it could be changes to.
    pub(crate) fn collect(&self) -> io::Result<Option<Since>> {
        let is_recorded = self.is_recorded();
        let mut state = self.tracker.lock();
        if is_recorded {
            let words = usize::try_from(self.len()).map_err(io::Error::other)? / PAGE / 64;
            state.pending.resize(words, 0);
            self.collect_into(&mut state.pending)?;
        }
        let State { parent: Some(parent), is_behind, pending } = &*state else { return Ok(None) };
        let pages = (is_recorded && !is_behind).then(|| pending.clone());
        Ok(Some(Since { parent: parent.clone(), pages }))
    }

    fn collect_into(&self, pending: &mut [u64]) -> io::Result<()> {
        let vm = self.vm.upgrade().ok_or(io::ErrorKind::NotFound)?;
        let mut first = 0;
        for (index, region) in self.all.iter().enumerate() {
            let count = usize::try_from(region.len()).map_err(io::Error::other)? / PAGE / 64;
            let pending = &mut pending[first..first + count];
            if let Some(written) = region.backing().written() {
                add(pending, &written.take());
            }
            match u32::try_from(index) {
                Ok(slot) if index < self.guest.num_regions() => {
                    add(pending, &log(&vm, slot, region.len())?);
                }
                _ => self.collect_slots(&vm, region.start_addr().0, pending)?,
            }
            first += count;
        }
        Ok(())
    }

    /// Of a region of plugged memory: what of it the guest sees now.
    fn collect_slots(&self, vm: &VmFd, start: u64, pending: &mut [u64]) -> io::Result<()> {
        for (slot, piece) in self.slots.iter().flat_map(|slots| slots.shown()) {
            let Some(offset) = piece.addr.0.checked_sub(start) else { continue };
            let first = usize::try_from(offset).map_err(io::Error::other)? / PAGE / 64;
            if let Some(pending) = pending.get_mut(first..) {
                add(pending, &log(vm, slot, piece.len)?);
            }
        }
        Ok(())
    }

    fn is_recorded(&self) -> bool {
        self.backings.iter().any(|backing| backing.written().is_some())
    }
}

/// What KVM has logged of a slot since it was asked last.
fn log(vm: &VmFd, slot: u32, len: u64) -> io::Result<Vec<u64>> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let log = again(|| vm.get_dirty_log(slot, len));
    log.map_err(|e| io::Error::other(format!("KVM_GET_DIRTY_LOG: {e}")))
}

fn add(to: &mut [u64], words: &[u64]) {
    to.iter_mut().zip(words).for_each(|(to, word)| *to |= word);
}
