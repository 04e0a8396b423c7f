//! A split virtqueue from the driver's side, and a ledger of what is with the device.
use devices::GuestRam;
use vm_memory::{Bytes as _, GuestAddress};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Where rings lie: queue `n` has [`RING_BYTES`] from there on.
pub const RINGS: u64 = 0x1_0000;
/// Room for 256 entries.
pub const RING_BYTES: u64 = 0x2000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x1400;
/// The last word of the page that both rings are in, which no ring of 256 entries reaches.
const WITNESS: u64 = 0x1ff8;
const WITNESSED: u64 = 0x7769_746e_6573_7321;

/// A descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// One queue.
#[derive(Debug)]
pub struct Ring {
    mem: GuestRam,
    pub queue: u16,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub avail_idx: u16,
    /// The descriptor that is used next.
    free: u16,
    /// How often each head was made available and not completed.
    offered: Vec<u32>,
    seen: u16,
    /// The guest has given the memory away that the ring is in (a balloon takes any page): what is read there means
    /// nothing any more.
    is_gone: bool,
}

impl Ring {
    /// The ring of `queue`, emptied.
    pub fn new(mem: &GuestRam, queue: u16, size: u16) -> Self {
        let desc = RINGS + u64::from(queue) * RING_BYTES;
        let bytes = usize::try_from(RING_BYTES).expect("it is small");
        mem.write_slice(&vec![0; bytes], GuestAddress(desc)).expect("rings are in RAM");
        mem.write_obj(WITNESSED, GuestAddress(desc + WITNESS)).expect("rings are in RAM");
        Self {
            mem: mem.clone(),
            queue,
            size,
            desc,
            avail: desc + AVAIL,
            used: desc + USED,
            avail_idx: 0,
            free: 0,
            offered: vec![0; size.into()],
            seen: 0,
            is_gone: false,
        }
    }

    /// Writes descriptor `index` of `table`, if there is RAM.
    pub fn write_desc(&self, table: u64, index: u16, desc: Desc) {
        let Desc { addr, len, flags, next } = desc;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let _ = self.mem.write_slice(&bytes, GuestAddress(table + 16 * u64::from(index)));
    }

    /// Makes a chain of buffers, address, length and whether the device writes it, and gives its head.
    pub fn chain(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.free % self.size;
        for (n, (addr, len, is_writable)) in buffers.iter().enumerate() {
            let (index, next) = (self.free % self.size, (self.free + 1) % self.size);
            let next_flag = if n + 1 < buffers.len() { NEXT } else { 0 };
            let flags = next_flag | if *is_writable { WRITE } else { 0 };
            self.write_desc(self.desc, index, Desc { addr: *addr, len: *len, flags, next });
            self.free = next;
        }
        head
    }

    /// Whether as many are with the device as there are entries: an honest driver waits.
    pub fn is_full(&self) -> bool {
        self.avail_idx.wrapping_sub(self.used_idx()) >= self.size
    }

    /// Makes `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.mem.write_obj(head, GuestAddress(self.avail + 4 + 2 * slot)).expect("it is RAM");
        self.jump(self.avail_idx.wrapping_add(1));
        if let Some(count) = self.offered.get_mut(usize::from(head)) {
            *count += 1;
        }
    }

    /// Sets the available index, whatever is in the ring.
    pub fn jump(&mut self, index: u16) {
        self.avail_idx = index;
        self.mem.write_obj(index, GuestAddress(self.avail + 2)).expect("it is RAM");
    }

    /// Sets the flags of the available ring.
    pub fn set_flags(&self, flags: u16) {
        self.mem.write_obj(flags, GuestAddress(self.avail)).expect("it is RAM");
    }

    /// Sets the index after which the device is to interrupt.
    pub fn set_used_event(&self, index: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.size);
        self.mem.write_obj(index, GuestAddress(at)).expect("it is RAM");
    }

    /// How far the device has come.
    pub fn used_idx(&self) -> u16 {
        self.mem.read_obj(GuestAddress(self.used + 2)).expect("it is RAM")
    }

    /// Looks at what was completed since the last call: each head is one that the device had, and it has given it
    /// back once.
    pub fn check(&mut self) {
        let witness: u64 = self.mem.read_obj(GuestAddress(self.desc + WITNESS)).expect("it is RAM");
        self.is_gone |= witness != WITNESSED;
        if self.is_gone {
            return;
        }
        let new = self.used_idx().wrapping_sub(self.seen);
        assert!(new <= self.size, "queue {}: {new} chains completed at once", self.queue);
        for n in 0..new {
            let slot = u64::from(self.seen.wrapping_add(n) % self.size);
            let at = GuestAddress(self.used + 4 + 8 * slot);
            let head = self.mem.read_obj::<u32>(at).expect("it is RAM");
            let offered = self.offered.get_mut(head as usize);
            let offered = offered.unwrap_or_else(|| panic!("queue {}: no head {head}", self.queue));
            assert!(*offered > 0, "queue {}: head {head} came back twice", self.queue);
            *offered -= 1;
        }
        self.seen = self.seen.wrapping_add(new);
    }
}
