//! A device under attack: how it is brought up, and what became of an attack.
use rt::memory::allocate;
use rt::virtio::{self, Buffer, Device, Queue, reg, status};
use rt::{Failure, clock, println};

/// Entries of the rings.
pub(crate) const SIZE: u16 = 16;
/// How long a device may take to do what it does; the machine may be slow.
pub(crate) const PATIENCE_US: u64 = 3_000_000;
/// How long a chain that is not to be used is looked at.
pub(crate) const MOMENT_US: u64 = 3_000;
/// The status of a live device.
pub(crate) const LIVE: u32 = 15;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
/// Features: indirect tables.
pub(crate) const F_INDIRECT: u64 = 1 << 28;
/// The hole below the devices. No RAM ends here.
pub(crate) const HOLE: u64 = 0xbfff_f000;

/// A device, and rings for each of its queues.
pub(crate) struct Target {
    pub(crate) device: Device,
    pub(crate) name: &'static str,
    pub(crate) queues: usize,
    /// Memory that requests may use: a page each for what is read and what is written.
    pub(crate) data: u64,
}

/// What became of an attack.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Rejected,
    Used,
    Held,
    Latched,
    Broken,
}

impl Verdict {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Used => "used",
            Self::Held => "held",
            Self::Latched => "latched",
            Self::Broken => "broken",
        }
    }
}

impl Target {
    pub(crate) fn new(device: Device) -> Result<Self, Failure> {
        let name = match device.id() {
            virtio::ID_NET => "net",
            virtio::ID_BLOCK => "block",
            virtio::ID_RNG => "rng",
            5 => "balloon",
            virtio::ID_VSOCK => "vsock",
            virtio::ID_MEM => "mem",
            virtio::ID_PMEM => "pmem",
            _ => "unknown",
        };
        device.negotiate(0)?;
        let has = |queue: &u32| {
            device.write(reg::QUEUE_SEL, *queue);
            device.read(reg::QUEUE_NUM_MAX) != 0
        };
        let queues = (0..8).take_while(has).count();
        let data = allocate(4 * 4096).as_ptr() as u64;
        Ok(Self { device, name, queues, data })
    }

    /// Resets it and brings it up with rings of its own for `queue`.
    pub(crate) fn up(&self, queue: usize, features: u64) -> Result<Queue, Failure> {
        self.device.negotiate(features)?;
        let queue = self.device.queue(queue as u16, SIZE)?;
        self.device.start()?;
        Ok(queue)
    }

    /// The queue that is served without anybody on the host.
    pub(crate) fn served(&self) -> usize {
        match self.name {
            "vsock" | "net" | "balloon" => 1,
            _ => 0,
        }
    }

    pub(crate) fn parts(&self) -> [Buffer; 2] {
        [
            Buffer { address: self.data, len: 64, is_device_written: false },
            Buffer { address: self.data + 4096, len: 64, is_device_written: true },
        ]
    }

    /// Whether it works after a reset: a chain comes back.
    pub(crate) fn works(&self) -> bool {
        let Ok(mut queue) = self.up(self.served(), 0) else { return false };
        queue.round_trip(&self.parts(), PATIENCE_US).is_ok() && self.device.status() == LIVE
    }

    /// Prints what became of an attack, and whether the device is of use after it.
    pub(crate) fn report(
        &self,
        row: &str,
        what: &str,
        queue: Option<usize>,
        verdict: Verdict,
        want: &str,
    ) {
        let verdict = if self.works() { verdict } else { Verdict::Broken };
        match queue {
            Some(queue) => println!(
                "case={row}_{what}/{}/{queue} verdict={} want={want}",
                self.name,
                verdict.word()
            ),
            None => {
                println!("case={row}_{what}/{} verdict={} want={want}", self.name, verdict.word())
            }
        }
    }

    /// Kicks, and sees what becomes of what was offered.
    pub(crate) fn see(&self, queue: &mut Queue) -> Verdict {
        queue.notify();
        let mut verdict = Verdict::Held;
        let is_over = |verdict: &mut Verdict, queue: &mut Queue| {
            if self.is_latched() {
                *verdict = Verdict::Latched;
            } else if queue.poll().is_some() {
                *verdict = Verdict::Used;
            }
            *verdict != Verdict::Held
        };
        // Queues that keep their buffers are looked at for a moment only.
        let patience = if self.holds(queue.index) { 10 * MOMENT_US } else { PATIENCE_US };
        clock::wait_until(patience, || is_over(&mut verdict, queue));
        verdict
    }

    pub(crate) fn holds(&self, queue: u16) -> bool {
        matches!((self.name, queue), ("net", 0) | ("vsock", 0 | 2) | ("balloon", 2))
    }

    pub(crate) fn is_latched(&self) -> bool {
        self.device.status() & status::NEEDS_RESET != 0
            && self.device.read(reg::INTERRUPT_STATUS) & 2 != 0
    }

    pub(crate) fn await_latch(&self) -> Verdict {
        match clock::wait_until(PATIENCE_US, || self.is_latched()) {
            true => Verdict::Latched,
            false => Verdict::Held,
        }
    }
}
