//! A virtqueue as virtio 1.2, 2.7 has it, in few words and without speed: what husk's is compared with.
use devices::GuestRam;
use devices::virtio::chain::MAX_BUFFERS;
use devices::virtio::queue::QueueConfig;
use vm_memory::{Bytes as _, GuestAddress};

use crate::guest::is_ram;
use crate::ring::{INDIRECT, NEXT, WRITE};

/// What the queue should be.
#[derive(Debug)]
pub struct Model {
    pub config: QueueConfig,
    pub is_indirect: bool,
    pub is_event_idx: bool,
    pub next_avail: u16,
    pub next_used: u16,
    pub notified: u16,
    pub staged: u16,
    /// Heads that are with the device, the last one popped last.
    pub taken: Vec<u16>,
    pub is_latched: bool,
    pub interrupts: u64,
}

/// What a chain is made of: what the device reads, and what it writes.
pub type Chain = (Vec<(u64, u32)>, Vec<(u64, u32)>);

impl Model {
    /// Takes the next chain, or is latched.
    pub fn pop(&mut self, mem: &GuestRam) -> Option<(u16, Chain)> {
        if self.is_latched {
            return None;
        }
        // virtio-queue takes an available ring at 0 for none. Nobody puts one there: it is where a BIOS has its data.
        if self.config.avail_ring == 0 {
            self.is_latched = true;
            return None;
        }
        let word = |at: u64| mem.read_obj::<u16>(GuestAddress(at)).expect("rings are RAM");
        let index = word(self.config.avail_ring + 2);
        let ahead = index.wrapping_sub(self.next_avail);
        if ahead == 0 {
            return None;
        }
        let slot = u64::from(self.next_avail % self.config.size);
        let head = word(self.config.avail_ring + 4 + 2 * slot);
        let is_good =
            ahead <= self.config.size && head < self.config.size && !self.taken.contains(&head);
        match self.walk(mem, head).filter(|_| is_good) {
            Some(chain) => {
                self.next_avail = self.next_avail.wrapping_add(1);
                self.taken.push(head);
                Some((head, chain))
            }
            None => {
                self.is_latched = true;
                None
            }
        }
    }

    /// 2.7.5: a chain in the queue's table or in one of its own, that ends.
    fn walk(&self, mem: &GuestRam, head: u16) -> Option<Chain> {
        let (mut table, mut size) = (self.config.desc_table, u32::from(self.config.size));
        let (mut index, mut steps, mut bytes) = (u32::from(head), 0, 0_u64);
        let mut is_in_own_table = false;
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        loop {
            steps += 1;
            let at = table.checked_add(16 * u64::from(index))?;
            if steps > size || index >= size || !is_ram(at, 16) {
                return None;
            }
            let mut desc = [0; 16];
            mem.read_slice(&mut desc, GuestAddress(at)).ok()?;
            let word = |at: usize| u16::from_le_bytes([desc[at], desc[at + 1]]);
            let addr = u64::from_le_bytes(desc[..8].try_into().ok()?);
            let len = u32::from_le_bytes(desc[8..12].try_into().ok()?);
            let (flags, next) = (word(12), word(14));
            if flags & INDIRECT != 0 {
                let count = len / 16;
                let is_allowed = self.is_indirect && !is_in_own_table && flags & NEXT == 0;
                if !is_allowed || len % 16 != 0 || count == 0 || count as usize > MAX_BUFFERS {
                    return None;
                }
                (table, size, index, steps, is_in_own_table) = (addr, count, 0, 0, true);
                continue;
            }
            bytes += u64::from(len);
            if bytes > u32::MAX.into() {
                return None;
            }
            if flags & WRITE != 0 {
                writes.push((addr, len))
            } else {
                reads.push((addr, len))
            }
            if flags & NEXT == 0 {
                return Some((reads, writes));
            }
            index = next.into();
        }
    }

    /// The entry is there, though not to be seen yet.
    pub fn stage(&mut self, mem: &GuestRam, head: u16, len: u32) {
        let Some(at) = self.taken.iter().position(|taken| *taken == head) else { return };
        if self.is_latched {
            return;
        }
        self.taken.remove(at);
        let slot = u64::from(self.next_used.wrapping_add(self.staged) % self.config.size);
        self.staged = self.staged.wrapping_add(1);
        let entry: [u32; 2] = [0, 4].map(|half| {
            let at = GuestAddress(self.config.used_ring + 4 + 8 * slot + half);
            mem.read_obj(at).expect("rings are RAM")
        });
        assert_eq!(entry, [u32::from(head), len]);
    }

    /// Shows the driver what was staged.
    pub fn publish(&mut self, mem: &GuestRam) {
        if self.is_latched || self.staged == 0 {
            return;
        }
        self.next_used = self.next_used.wrapping_add(std::mem::take(&mut self.staged));
        self.check_used(mem);
    }

    /// Whether the driver sees that.
    pub fn check_used(&self, mem: &GuestRam) {
        let at = GuestAddress(self.config.used_ring + 2);
        assert_eq!(mem.read_obj::<u16>(at).ok(), Some(self.next_used));
    }

    /// Whether the driver is to be interrupted (2.7.7).
    pub fn wants_interrupt(&mut self, mem: &GuestRam) -> bool {
        if self.is_latched {
            return false;
        }
        let (new, old) = (self.next_used, std::mem::replace(&mut self.notified, self.next_used));
        if new == old {
            return false;
        }
        let word = |at: u64| mem.read_obj::<u16>(GuestAddress(at)).expect("rings are RAM");
        if !self.is_event_idx {
            return word(self.config.avail_ring) & 1 == 0;
        }
        let event = word(self.config.avail_ring + 4 + 2 * u64::from(self.config.size));
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }
}

/// Whether the rings are aligned, RAM, and apart (2.7).
pub fn is_sound(config: &QueueConfig) -> bool {
    let QueueConfig { size, desc_table, avail_ring, used_ring, .. } = *config;
    let count = u64::from(size);
    let rings = [
        (desc_table, 16 * count, 16),
        (avail_ring, 6 + 2 * count, 2),
        (used_ring, 6 + 8 * count, 4),
    ];
    let is_fit = |(start, len, align): &(u64, u64, u64)| is_ram(*start, *len) && start % align == 0;
    let is_apart = |(a, b): (usize, usize)| {
        let ((a, a_len, _), (b, b_len, _)) = (rings[a], rings[b]);
        a + a_len <= b || b + b_len <= a
    };
    size.is_power_of_two()
        && size <= 256
        && rings.iter().all(is_fit)
        && [(0, 1), (0, 2), (1, 2)].into_iter().all(is_apart)
}
