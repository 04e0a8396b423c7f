//! A virtqueue with everything needed to serve it: ring, guest memory, kick, notifier.
//!
//! The available ring and kick suppression are rust-vmm's `virtio-queue`. The walk of a chain is
//! ours ([`super::chain`]), because a request must be read once and a malformed one told from an
//! empty one. So is the used ring, because a packet that fills several chains must become visible
//! at once. No device repeats the loop in [`VirtQueue::serve`].
//!
//! ```text
//!            pop                     complete
//!   avail ─────────► with the device ─────────► used ──notify──► driver
//!     ▲                 │ undo_pop
//!     └─────────────────┘          a ring that lies: latched, dead until reset
//! ```
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, Le64};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Buffers, Chain, ChainError};
use super::notifier::Notifier;
use crate::GuestRam;
use crate::observer::Happening;

const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// What became of a chain given to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// Done; so many bytes were written to the driver's buffers.
    Used(u32),
    /// Not now (a rate limit, no data): it goes back, and serving stops until asked again.
    Later,
    /// In progress; the device will [`VirtQueue::complete`] it.
    Pending,
}

/// Why a ring is not worth another look.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Indices or ring memory are bad.
    #[error("ring")]
    Ring(#[from] virtio_queue::Error),
    /// A chain is bad.
    #[error("descriptor chain")]
    Chain(#[from] ChainError),
    /// A head is not below the queue size.
    #[error("head {0} is not below the queue size")]
    Head(u16),
    /// A head that the device still has is available again.
    #[error("head {0} is available twice")]
    Twice(u16),
    /// The device was given the wrong number of queues.
    #[error("a device got {0} queues")]
    Count(usize),
    /// A ring is not in RAM, or two of them share bytes.
    #[error("a ring at {0:#x} is not in guest memory or overlaps another")]
    Placement(u64),
}

/// The addresses and size the driver chose for a queue: input to `VirtQueue::new`, of no effect
/// on a live queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct QueueConfig {
    /// Entries in the ring.
    pub size: u16,
    /// Whether the driver has set up the queue.
    pub is_ready: bool,
    /// Descriptor table.
    pub desc_table: u64,
    /// Available ring, the driver area.
    pub avail_ring: u64,
    /// Used ring, the device area.
    pub used_ring: u64,
}

/// A live queue. One that the driver has not set up exists too, and is always empty.
pub struct VirtQueue {
    index: u16,
    ring: Queue,
    is_indirect_negotiated: bool,
    is_latched: bool,
    /// One bit for each head that is with the device.
    taken: Vec<u64>,
    /// Used entries written but not yet visible.
    staged: u16,
    /// The used index the driver was last told of.
    notified: u16,
    kick: Arc<EventFd>,
    mem: GuestRam,
    notifier: Arc<Notifier>,
    scratch: Buffers,
}

impl std::fmt::Debug for VirtQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtQueue")
            .field("index", &self.index)
            .field("ring", &self.ring)
            .field("is_latched", &self.is_latched)
            .finish_non_exhaustive()
    }
}

/// Ring features the driver accepted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingFeatures {
    pub(crate) is_indirect: bool,
    pub(crate) is_event_idx: bool,
}

impl VirtQueue {
    /// Checks `config` and makes it a live queue. `max_size` is a power of two.
    pub(crate) fn new(
        index: u16,
        max_size: u16,
        config: &QueueConfig,
        features: RingFeatures,
        kick: Arc<EventFd>,
        mem: GuestRam,
        notifier: Arc<Notifier>,
    ) -> Result<Self, QueueError> {
        let mut ring = Queue::new(max_size)?;
        if config.is_ready {
            ring.try_set_size(config.size)?;
            ring.try_set_desc_table_address(GuestAddress(config.desc_table))?;
            ring.try_set_avail_ring_address(GuestAddress(config.avail_ring))?;
            ring.try_set_used_ring_address(GuestAddress(config.used_ring))?;
            check_rings(&mem, config)?;
            ring.set_event_idx(features.is_event_idx);
            ring.set_ready(true);
        }
        Ok(Self {
            index,
            ring,
            is_indirect_negotiated: features.is_indirect,
            is_latched: false,
            taken: vec![0; usize::from(max_size).div_ceil(64)],
            staged: 0,
            notified: 0,
            kick,
            mem,
            notifier,
            scratch: Buffers::default(),
        })
    }

    /// Whether the ring lied and is dead until the driver resets the device.
    pub fn is_latched(&self) -> bool {
        self.is_latched
    }

    /// Becomes readable when the driver kicks.
    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// Guest memory, in which the buffers lie.
    pub fn mem(&self) -> &GuestRam {
        &self.mem
    }

    /// Indices and addresses, for a snapshot.
    pub fn state(&self) -> QueueState {
        self.ring.state()
    }

    /// Goes on where a saved queue stopped.
    pub(super) fn seek(&mut self, next_avail: u16, next_used: u16) {
        self.ring.set_next_avail(next_avail);
        self.ring.set_next_used(next_used);
        self.notified = next_used;
    }

    /// Consumes the kick, so that the descriptor becomes quiet.
    pub fn consume_kick(&self) {
        // EAGAIN when nobody kicked: nothing to consume.
        let _ = self.kick.read();
    }

    /// Consumes the kick, then serves every available chain. The driver is interrupted once, and
    /// only if it asked to be. A driver that never stops adding gets its turn, then the next device.
    pub fn serve(&mut self, mut f: impl FnMut(Chain<'_>) -> Served) {
        self.consume_kick();
        let mut buffers = std::mem::take(&mut self.scratch);
        let mut budget = u32::from(self.ring.size()).saturating_mul(2);
        self.disable_kicks();
        while budget > 0 {
            budget = budget.saturating_sub(1);
            buffers.clear();
            let Some(head) = self.pop(&mut buffers) else {
                if self.enable_kicks() {
                    continue;
                }
                break;
            };
            match f(Chain { mem: &self.mem, buffers: &buffers, head }) {
                Served::Used(len) => self.complete(head, len),
                Served::Pending => {}
                Served::Later => {
                    self.undo_pop(head);
                    break;
                }
            }
        }
        if budget == 0 {
            self.kick_again();
        }
        self.scratch = buffers;
        self.notify();
    }

    /// Takes the next available chain and appends its buffers to `buffers`; the head, to complete
    /// it with. A ring that lies is latched and empty from then on.
    pub fn pop(&mut self, buffers: &mut Buffers) -> Option<u16> {
        if self.is_latched || !self.ring.ready() {
            return None;
        }
        self.try_pop(buffers).unwrap_or_else(|e| {
            self.latch(&e);
            None
        })
    }

    fn try_pop(&mut self, buffers: &mut Buffers) -> Result<Option<u16>, QueueError> {
        let Some(chain) = self.ring.iter(&self.mem)?.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        let size = self.ring.size();
        if head >= size {
            return Err(QueueError::Head(head));
        }
        let table = GuestAddress(self.ring.desc_table());
        buffers.walk(&self.mem, table, size, head, self.is_indirect_negotiated)?;
        if self.set_taken(head, true) {
            return Err(QueueError::Twice(head));
        }
        Ok(Some(head))
    }

    /// Puts `head`, which was popped last, back. To put back several, begin with the last.
    pub fn undo_pop(&mut self, head: u16) {
        self.set_taken(head, false);
        self.ring.go_to_previous_position();
    }

    /// Whether `head` was taken until now.
    fn set_taken(&mut self, head: u16, is_taken: bool) -> bool {
        let bit = 1u64.wrapping_shl(u32::from(head));
        let Some(word) = self.taken.get_mut(usize::from(head) / 64) else { return false };
        let was_taken = *word & bit != 0;
        *word = if is_taken { *word | bit } else { *word & !bit };
        was_taken
    }

    /// Gives a chain back to the driver with `written` bytes in it. Does not interrupt:
    /// [`Self::notify`].
    pub fn complete(&mut self, head: u16, written: u32) {
        self.stage(head, written);
        self.publish();
    }

    /// Does the same, but the driver does not see it before [`Self::publish`].
    pub fn stage(&mut self, head: u16, written: u32) {
        if self.is_latched || !self.set_taken(head, false) {
            return;
        }
        let slot = self.ring.next_used().wrapping_add(self.staged).checked_rem(self.ring.size());
        // The rings were checked to be RAM: neither sum can overflow.
        let offset = u64::from(slot.unwrap_or(0)).wrapping_mul(8).wrapping_add(4);
        let address = GuestAddress(self.ring.used_ring().wrapping_add(offset));
        // Two little-endian words (virtio 1.2, 2.7.8): head, then length.
        let entry = Le64::from(u64::from(written) << 32 | u64::from(head));
        match self.mem.write_obj(entry, address) {
            Ok(()) => self.staged = self.staged.wrapping_add(1),
            Err(e) => self.latch(&virtio_queue::Error::GuestMemory(e).into()),
        }
    }

    /// Shows the driver all staged chains at once.
    pub fn publish(&mut self) {
        if self.is_latched || self.staged == 0 {
            return;
        }
        let index = self.ring.next_used().wrapping_add(std::mem::take(&mut self.staged));
        self.ring.set_next_used(index);
        let address = GuestAddress(self.ring.used_ring().wrapping_add(2));
        if let Err(e) = self.mem.store(index.to_le(), address, Ordering::Release) {
            self.latch(&virtio_queue::Error::GuestMemory(e).into());
        }
    }

    /// Interrupts the driver if chains were completed since the last call and it wants to know.
    pub fn notify(&mut self) {
        if self.is_latched || !self.ring.ready() {
            return;
        }
        match self.wants_interrupt() {
            Ok(true) => self.notifier.used_buffer(self.index),
            Ok(false) => {}
            Err(e) => self.latch(&e),
        }
    }

    fn wants_interrupt(&mut self) -> Result<bool, QueueError> {
        let new = self.ring.next_used();
        let old = std::mem::replace(&mut self.notified, new);
        if old == new {
            return Ok(false);
        }
        // The driver must see the used index before we look at whether it wants to hear of it.
        fence(Ordering::SeqCst);
        if self.ring.event_idx_enabled() {
            let offset = u64::from(self.ring.size()).wrapping_mul(2).wrapping_add(4);
            let used_event = self.avail_word(offset)?;
            // Virtio 1.2, 2.7.7.2: whether the driver's mark is among what is new.
            let past_mark = new.wrapping_sub(used_event).wrapping_sub(1);
            return Ok(past_mark < new.wrapping_sub(old));
        }
        Ok(self.avail_word(0)? & AVAIL_F_NO_INTERRUPT == 0)
    }

    fn avail_word(&self, offset: u64) -> Result<u16, QueueError> {
        let address = GuestAddress(self.ring.avail_ring().wrapping_add(offset));
        let word = self.mem.load(address, Ordering::Relaxed);
        Ok(word.map(u16::from_le).map_err(virtio_queue::Error::GuestMemory)?)
    }

    /// Interrupts the driver for somebody else who has completed chains: another process.
    pub fn interrupt(&self) {
        self.notifier.used_buffer(self.index);
    }

    /// Tells the driver that the device cannot go on until it is reset.
    pub fn needs_reset(&self) {
        self.notifier.needs_reset();
    }

    /// Says to whoever observes the device that its host side is gone.
    pub fn host_gone(&self) {
        self.notifier.notice(Happening::HostGone);
    }

    /// The used index, of a queue that somebody else serves.
    pub(super) fn used_index(&self) -> u16 {
        let address = GuestAddress(self.ring.used_ring().wrapping_add(2));
        self.mem.load(address, Ordering::Acquire).map_or(0, u16::from_le)
    }

    /// Asks the driver not to kick while its chains are being served anyway.
    pub fn disable_kicks(&mut self) {
        if !self.is_latched
            && self.ring.ready()
            && let Err(e) = self.ring.disable_notification(&self.mem)
        {
            self.latch(&e.into());
        }
    }

    /// Asks the driver to kick; true if chains came in just before it could know.
    pub fn enable_kicks(&mut self) -> bool {
        if self.is_latched || !self.ring.ready() {
            return false;
        }
        self.ring.enable_notification(&self.mem).unwrap_or_else(|e| {
            self.latch(&e.into());
            false
        })
    }

    /// Tells the driver that the device's configuration space changed.
    pub fn announce_config_change(&self) {
        self.notifier.config_change();
    }

    /// Makes the kick descriptor readable again.
    pub fn kick_again(&self) {
        if let Err(e) = self.kick.write(1) {
            log::warn!("queue {}: cannot kick: {e}", self.index);
        }
    }

    fn latch(&mut self, why: &QueueError) {
        self.is_latched = true;
        let detail = std::error::Error::source(why).map(ToString::to_string).unwrap_or_default();
        log::warn!("queue {}: latched until the driver resets: {why} {detail}", self.index);
        self.notifier.needs_reset();
    }
}

/// Takes a device's queues apart.
pub fn split<const N: usize>(queues: Vec<VirtQueue>) -> Result<[VirtQueue; N], QueueError> {
    queues.try_into().map_err(|queues: Vec<_>| QueueError::Count(queues.len()))
}

/// Refuses rings that are not wholly RAM or that overlap each other (virtio 1.2, 2.7).
fn check_rings(mem: &GuestRam, config: &QueueConfig) -> Result<(), QueueError> {
    let size = u64::from(config.size);
    // 16 bytes a descriptor; flags, index and event beside 2 or 8 bytes an entry. 2^16 entries of
    // 16 bytes cannot overflow.
    let rings = [
        (config.desc_table, size.wrapping_mul(16)),
        (config.avail_ring, size.wrapping_mul(2).wrapping_add(6)),
        (config.used_ring, size.wrapping_mul(8).wrapping_add(6)),
    ];
    for (i, &(start, len)) in rings.iter().enumerate() {
        let bad = QueueError::Placement(start);
        let Some(end) = start.checked_add(len) else { return Err(bad) };
        let count = usize::try_from(len).unwrap_or(usize::MAX);
        let shares = rings
            .iter()
            .skip(i.saturating_add(1))
            .any(|&(other, other_len)| start < other.saturating_add(other_len) && other < end);
        if shares || !mem.check_range(GuestAddress(start), count) {
            return Err(bad);
        }
    }
    Ok(())
}
