//! A driver's life, as the input has it. There are two kinds of driver. An honest one leaves its rings alone, so that
//! what the device does on them can be judged: each head comes back once. A wild one writes anywhere.
use devices::bus::BusDevice;
use devices::virtio::model::VirtioDevice;
use vm_memory::{Bytes as _, GuestAddress};

use crate::bytes::Bytes;
use crate::guest::{HIGH, LOW, OWN, ram_as_it_is};
use crate::machine::{DRIVER_OK, F_INDIRECT, Machine, NEEDS_RESET};
use crate::ring::{Desc, INDIRECT, RING_BYTES, RINGS, Ring, WRITE};

/// More steps than these say nothing new.
const STEPS_MAX: usize = 96;

/// What a driver of one kind of device asks, and what the host does meanwhile.
pub trait Model {
    /// The queue of a request, and its buffers.
    fn request(&mut self, session: &mut Session<'_>) -> (u16, Vec<Buffer>);
    /// Something happens on the host.
    fn host(&mut self, _session: &mut Session<'_>) {}
    /// The device is gone.
    fn end(&mut self) {}
    /// The device that a snapshot is restored to; none if the one that there is would be in its way.
    fn again(&mut self) -> Option<Box<dyn VirtioDevice>> {
        None
    }
}

/// A buffer of a request.
#[derive(Debug)]
pub enum Buffer {
    /// The device reads this.
    Out(Vec<u8>),
    /// The device writes so many bytes.
    In(u32),
    /// The fuzzer has said where.
    At(u64, u32, bool),
}

/// The device, its driver and the rest of the input.
#[derive(Debug)]
pub struct Session<'a> {
    pub machine: Machine,
    pub input: Bytes<'a>,
    rings: Vec<Ring>,
    is_honest: bool,
    /// Whether the device was told of things before it came here.
    is_restored: bool,
    /// Where the next buffer goes.
    next: u64,
}

impl<'a> Session<'a> {
    /// A device that is up, or with `is_raw` one that nobody has touched.
    pub fn new(device: Box<dyn VirtioDevice>, mut input: Bytes<'a>, is_raw: bool) -> Self {
        let machine = Machine::new(device);
        let is_honest = input.flip() && !is_raw;
        let (rings, is_restored) = (Vec::new(), false);
        let mut session = Self { machine, input, rings, is_honest, is_restored, next: HIGH.0 };
        if !is_raw {
            session.start();
        }
        session
    }

    /// A device that was restored, of whose rings nothing is known.
    pub fn restored(machine: Machine, input: Bytes<'a>) -> Self {
        let (rings, is_honest, is_restored) = (Vec::new(), false, true);
        Self { machine, input, rings, is_honest, is_restored, next: HIGH.0 }
    }

    /// Lives until the input ends.
    pub fn live(&mut self, model: &mut impl Model) {
        for _ in 0..STEPS_MAX {
            if self.input.is_empty() {
                return;
            }
            self.step(model);
            self.check();
        }
    }

    /// The same, to the end of the device's life.
    pub fn run(&mut self, model: &mut impl Model) {
        self.live(model);
        self.machine.settle();
        self.check();
        // Whatever it was up to, it can be stopped, and begun anew.
        self.machine.pause();
        self.machine.reset();
    }

    fn step(&mut self, model: &mut impl Model) {
        match self.input.below(16) {
            0..4 => {
                let (queue, buffers) = model.request(self);
                self.ask(queue, &buffers);
            }
            4 => model.host(self),
            5 => self.machine.settle(),
            6 => drop(self.machine.turn()),
            7 => self.kick(),
            8 => self.write_desc(),
            9 => self.offer(),
            10 => self.write_memory(),
            11 => self.access(),
            12 => self.stand_still(),
            13 => self.save(model),
            14 => self.set_ring(),
            _ => self.start(),
        }
    }

    /// Brings the device up, with features and sizes of the input's choice.
    pub fn start(&mut self) {
        let mut features = self.input.u64();
        if self.is_honest {
            features &= !F_INDIRECT;
        }
        self.machine.negotiate(features);
        self.rings.clear();
        for queue in 0..self.machine.queues() {
            let size = 1 << self.input.below(9).min(8);
            let size = self.machine.size_max(queue).min(size);
            let ring = Ring::new(&self.machine.mem, queue, size);
            let mut rings = [ring.desc, ring.avail, ring.used];
            if !self.is_honest && self.input.below(16) == 15 {
                let which = usize::from(self.input.below(3));
                rings[which] = self.address();
            }
            self.machine.place(queue, size, rings);
            self.rings.push(ring);
        }
        self.machine.set(0x70, 15);
        if self.is_honest {
            assert_eq!(self.machine.status(), 15, "good rings are refused");
        }
    }

    /// An address that may be anything, more often one that is sensible.
    pub fn address(&mut self) -> u64 {
        let offset = u64::from(self.input.u16());
        match self.input.below(12) {
            0..3 => HIGH.0 + offset,
            3 => offset,
            4 => HIGH.0 + offset * 2,
            // Ends of RAM, and the hole.
            5 => LOW.1 - offset % 64,
            6 => HIGH.0 + HIGH.1 - offset % 64,
            7 => LOW.1 + offset,
            8 => OWN.0 + offset * 512,
            9 => u64::MAX - offset % 64,
            10 if !self.is_honest => RINGS + offset % (4 * RING_BYTES),
            _ => self.input.u64(),
        }
    }

    /// A length that may be anything, more often one that is sensible.
    pub fn length(&mut self) -> u32 {
        match self.input.below(8) {
            0 => 0,
            1 => 1,
            2 => 512,
            3 => 4096,
            4 => self.input.u8().into(),
            5 | 6 => self.input.u16().into(),
            _ => self.input.u32(),
        }
    }

    /// A place for `len` bytes of data that nobody else has for a while.
    fn take_place(&mut self, len: u64) -> u64 {
        let len = len.min(HIGH.1);
        if self.next + len > HIGH.0 + HIGH.1 {
            self.next = HIGH.0;
        }
        let place = self.next;
        self.next += len.next_multiple_of(16);
        place
    }

    /// An honest driver lets the device write to where data are, and nowhere else.
    fn is_fit(&self, addr: u64, len: u32, is_writable: bool) -> bool {
        let end = addr.saturating_add(len.into());
        let is_rings = addr < LOW.0 + LOW.1 && end > RINGS;
        !(self.is_honest && is_writable && is_rings)
    }

    /// Makes a chain of `buffers`, and perhaps makes it available and kicks.
    fn ask(&mut self, queue: u16, buffers: &[Buffer]) {
        let mut chain = Vec::new();
        for buffer in buffers {
            let (addr, len, is_writable) = match buffer {
                Buffer::Out(bytes) => {
                    let bytes = &bytes[..bytes.len().min(0x4000)];
                    let addr = self.take_place(bytes.len() as u64);
                    self.machine.mem.write_slice(bytes, GuestAddress(addr)).expect("it is RAM");
                    (addr, bytes.len() as u32, false)
                }
                Buffer::In(len) => (self.take_place((*len).into()), *len, true),
                Buffer::At(addr, len, is_writable) => (*addr, *len, *is_writable),
            };
            if self.is_fit(addr, len, is_writable) {
                chain.push((addr, len, is_writable));
            }
        }
        let how = self.input.u8();
        let mut table = None;
        if !self.is_honest && how & 8 != 0 {
            table = Some(self.take_place(16 * chain.len() as u64));
        }
        let Some(ring) = self.rings.get_mut(usize::from(queue)) else { return };
        if chain.is_empty() || self.is_honest && ring.is_full() {
            return;
        }
        let head = match table {
            None => ring.chain(&chain),
            // The same, in a table of its own.
            Some(table) => {
                let count = chain.len() as u16;
                for (n, (addr, len, is_writable)) in (0..).zip(&chain) {
                    let flags = u16::from(n + 1 < count) | if *is_writable { WRITE } else { 0 };
                    ring.write_desc(table, n, Desc { addr: *addr, len: *len, flags, next: n + 1 });
                }
                let head = ring.chain(&[(table, 16 * u32::from(count), false)]);
                let desc =
                    Desc { addr: table, len: 16 * u32::from(count), flags: INDIRECT, next: 0 };
                ring.write_desc(ring.desc, head, desc);
                head
            }
        };
        if how & 1 == 0 {
            ring.offer(head);
        }
        if how & 2 == 0 {
            self.machine.set(0x50, queue.into());
        }
        if how & 4 == 0 {
            self.machine.settle();
        }
    }

    fn kick(&mut self) {
        let queue = match self.input.below(8) {
            n @ 0..6 => n.into(),
            6 => self.input.u16().into(),
            _ => self.input.u32(),
        };
        self.machine.set(0x50, queue);
    }

    fn ring(&mut self) -> Option<usize> {
        let count = u8::try_from(self.rings.len()).unwrap_or(u8::MAX);
        (count > 0).then(|| usize::from(self.input.below(count)))
    }

    fn write_desc(&mut self) {
        let Some(at) = self.ring() else { return };
        let index = u16::from(self.input.u8());
        let (addr, len) = (self.address(), self.length());
        let (flags, next) = (u16::from(self.input.u8()), u16::from(self.input.u8()));
        if self.is_fit(addr, len, flags & WRITE != 0) && index < self.rings[at].size {
            let ring = &self.rings[at];
            ring.write_desc(ring.desc, index, Desc { addr, len, flags, next });
        }
    }

    fn offer(&mut self) {
        let Some(at) = self.ring() else { return };
        let head = if self.input.below(8) == 7 { self.input.u16() } else { self.input.u8().into() };
        if !(self.is_honest && self.rings[at].is_full()) {
            self.rings[at].offer(head);
        }
    }

    fn write_memory(&mut self) {
        let addr = self.address();
        let len = self.input.u8();
        let bytes = self.input.take(len.into());
        if self.is_fit(addr, bytes.len() as u32, true) {
            let _ = self.machine.mem.write_slice(bytes, GuestAddress(addr));
        }
    }

    /// An access to a register or to the configuration space.
    fn access(&mut self) {
        let (how, offset) = (self.input.u8(), u64::from(self.input.u16() % 0x1000));
        let offset = if how & 0x10 == 0 { offset % 0x140 } else { offset };
        let width = 1 << (how & 3);
        let window = how & 0x20 != 0;
        if how & 4 == 0 {
            let mut data = [0; 8];
            self.machine.window(window).read(offset, &mut data[..width]);
        } else {
            let value = if how & 8 == 0 { self.input.u8().into() } else { self.input.u64() };
            self.machine.window(window).write(offset, &value.to_le_bytes()[..width]);
        }
        self.judge_rings();
    }

    /// After raw accesses the rings may be others, or none.
    fn judge_rings(&mut self) {
        if self.machine.status() & DRIVER_OK == 0 {
            self.rings.clear();
        }
    }

    fn stand_still(&mut self) {
        let how = self.input.u8();
        self.machine.pause();
        if how & 1 == 0 {
            self.kick();
            assert!(!self.machine.turn(), "a device works that was paused");
        }
        // One that cannot go on says so, and needs a reset.
        if self.machine.transport().resume().is_err() {
            assert_ne!(self.machine.status() & NEEDS_RESET, 0);
        }
    }

    /// A snapshot, and a restore of it to the same kind of device.
    fn save(&mut self, model: &mut impl Model) {
        self.machine.pause();
        let saved = self.machine.transport().save();
        let text = serde_json::to_vec(&saved).expect("it can be saved");
        let Some(device) = model.again() else {
            let _ = self.machine.transport().resume();
            return;
        };
        let saved = serde_json::from_slice(&text).expect("what was saved can be read");
        // A layer over a disk is not in what is saved: then it is refused.
        if let Ok(machine) = Machine::with(device, ram_as_it_is(), Some(&saved)) {
            assert_eq!(machine.status(), self.machine.status());
            (self.machine, self.is_restored) = (machine, true);
        }
        let _ = self.machine.transport().resume();
    }

    fn set_ring(&mut self) {
        let Some(at) = self.ring() else { return };
        let (how, value) = (self.input.below(4), self.input.u16());
        let ring = &mut self.rings[at];
        match how {
            0 => ring.set_flags(value),
            1 => ring.set_used_event(value),
            // Whatever is in the slots is available: of that the ledger knows nothing.
            2 if !self.is_honest => ring.jump(value),
            _ => ring.set_used_event(ring.used_idx().wrapping_add(value % 4)),
        }
    }

    /// What holds of every device after every step.
    fn check(&mut self) {
        let status = self.machine.status();
        let is_lost = status & NEEDS_RESET != 0 && status & DRIVER_OK != 0;
        if is_lost && !self.is_restored {
            assert!(self.machine.interrupts().1 > 0, "a driver is not told that it has to reset");
        }
        if self.is_honest && !self.rings.is_empty() {
            self.rings.iter_mut().for_each(Ring::check);
        }
    }

    /// Lets the device be changed as by `PATCH`: `json` is the input's.
    pub fn patch(&mut self, view: Option<&str>, json: &[u8]) {
        if let Ok(patch) = serde_json::from_slice(json) {
            let _ = self.machine.transport().update(view, &patch);
        }
    }
}
