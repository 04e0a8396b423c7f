//! A driver for any virtio device, honest or not: registers, rings and interrupts, no kernel.
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devices::GuestRam;
use devices::bus::{Bus, BusDevice};
use devices::io::IoThread;
use devices::memory::{Backing, Leases, PAGE, Piece, Placement, Slots};
use devices::metrics::{CounterSet, Value};
use devices::sync::{Condvar, Mutex};
use devices::virtio::mmio::{MmioTransport, Saved, WINDOW_SIZE, Window, WindowDevice};
use devices::virtio::model::{DeviceError, VirtioDevice};
use devices::virtio::notifier::{Counters, Interrupt, Notifier};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// RAM: two pieces with a hole between them.
pub(crate) const LOW: (u64, u64) = (0, 0x10_0000);
pub(crate) const HIGH: (u64, u64) = (0x20_0000, 0x10_0000);
/// Where memory lies that the device brings along.
pub(crate) const OWN: GuestAddress = GuestAddress(4 << 30);
/// Where the two windows are.
pub(crate) const ACPI: u64 = 0xd000_0000;
pub(crate) const COMMAND_LINE: u64 = 0xd000_1000;

pub(crate) const F_INDIRECT: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_VERSION_1: u64 = 1 << 32;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const NEEDS_RESET: u32 = 64;

/// Long enough for the slowest machine; nothing waits this long when it works.
const DEADLINE: Duration = Duration::from_secs(10);

/// Counts interrupts, and wakes who waits for one.
#[derive(Default)]
pub(crate) struct Irq {
    counts: Mutex<(u64, u64)>,
    changed: Condvar,
}

impl Interrupt for Irq {
    fn used_buffer(&self, _queue: u16) {
        self.counts.lock().unwrap().0 += 1;
        self.changed.notify_all();
    }
    fn config_change(&self) {
        self.counts.lock().unwrap().1 += 1;
        self.changed.notify_all();
    }
}

impl Irq {
    /// Interrupts so far: for used buffers and for configuration changes.
    pub(crate) fn counts(&self) -> (u64, u64) {
        *self.counts.lock().unwrap()
    }

    /// Waits until `is_done`, looking again at each interrupt.
    pub(crate) fn wait(&self, what: &str, mut is_done: impl FnMut() -> bool) {
        let end = Instant::now() + DEADLINE;
        let mut counts = self.counts.lock().unwrap();
        while !is_done() {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited in vain for {what}; interrupts {counts:?}");
            counts = self.changed.wait_timeout(counts, left).unwrap().0;
        }
    }
}

/// What the guest is shown of a device's memory: KVM's slots.
#[derive(Debug, Default)]
pub(crate) struct Shown {
    pieces: Mutex<BTreeMap<u32, Piece>>,
    /// Whether the host refuses to show more.
    pub(crate) is_full: AtomicBool,
    /// Whether the host takes its time to hide some, as KVM does on a slow host.
    pub(crate) is_slow: AtomicBool,
}

/// How long a slow host takes.
const SLOW: Duration = Duration::from_millis(30);

impl Shown {
    pub(crate) fn pieces(&self) -> Vec<Piece> {
        self.pieces.lock().unwrap().values().cloned().collect()
    }
}

impl Slots for Shown {
    fn show(&self, piece: &Piece) -> std::io::Result<()> {
        if self.is_full.load(Ordering::Relaxed) {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        let before = self.pieces.lock().unwrap().insert(piece.slot, piece.clone());
        assert_eq!(before, None, "the slot was taken");
        Ok(())
    }

    fn hide(&self, piece: &Piece) -> std::io::Result<()> {
        let start = Instant::now();
        while self.is_slow.load(Ordering::Relaxed) && start.elapsed() < SLOW {
            std::thread::yield_now();
        }
        let before = self.pieces.lock().unwrap().remove(&piece.slot);
        assert_eq!(before.as_ref(), Some(piece), "another piece was shown");
        Ok(())
    }
}

/// A device at its two addresses, with RAM and an I/O thread.
pub(crate) struct Machine {
    /// RAM without what the device brought along.
    pub(crate) ram: GuestRam,
    pub(crate) mem: GuestRam,
    pub(crate) irq: Arc<Irq>,
    pub(crate) transport: Arc<Mutex<MmioTransport>>,
    pub(crate) bus: Bus,
    /// Features that are negotiated whatever a test asks for.
    pub(crate) always: u64,
    _tally: Tally,
}

/// Names the file that what has counted is appended to.
pub(crate) const COUNTED_FILE: &str = "HUSK_TEST_COUNTED";

/// Notes, when its machine goes, what in it has counted.
struct Tally([Arc<dyn CounterSet>; 2]);

impl Drop for Tally {
    fn drop(&mut self) {
        let Some(path) = std::env::var_os(COUNTED_FILE) else { return };
        let mut lines = String::new();
        for set in &self.0 {
            for (declared, value) in set.group().declared.iter().zip(set.values()) {
                if value.amount() > 0 || matches!(value, Value::Gauge(_)) {
                    lines += &format!("{} {}\n", set.group().name, declared.name);
                }
            }
        }
        let mut file = std::fs::File::options().append(true).create(true).open(path).unwrap();
        file.write_all(lines.as_bytes()).unwrap();
    }
}

/// RAM whose pages that are written are recorded.
pub(crate) fn ram() -> GuestRam {
    let piece = |(start, len): (u64, u64)| (GuestAddress(start), usize::try_from(len).unwrap());
    let ram = GuestMemoryMmap::<()>::from_ranges(&[piece(LOW), piece(HIGH)]).unwrap();
    let recording = |region: &GuestRegionMmap<()>| Backing::of(&region.get_mmap()).recording();
    GuestRam::backed(&ram, ram.iter().map(|region| Arc::new(recording(region)))).unwrap()
}

/// Begins to record anew what is written.
pub(crate) fn forget_written(mem: &GuestRam) {
    for region in mem.iter() {
        region.backing().written().as_ref().unwrap().take();
    }
}

/// The pages of guest memory that there are, and their contents.
pub(crate) fn pages_of(mem: &GuestRam) -> Vec<(GuestAddress, Vec<u8>)> {
    let mut pages = Vec::new();
    for region in mem.iter() {
        for (offset, len) in region.present() {
            for page in (offset..offset + len).step_by(PAGE) {
                let addr = GuestAddress(region.start_addr().0 + page);
                let mut bytes = vec![0; PAGE];
                mem.read_slice(&mut bytes, addr).unwrap();
                pages.push((addr, bytes));
            }
        }
    }
    pages
}

/// Whether the page at `addr` is recorded to have been written.
pub(crate) fn is_written(mem: &GuestRam, addr: GuestAddress) -> bool {
    let (region, offset) = mem.to_region_addr(addr).unwrap();
    region.bitmap().dirty_at(usize::try_from(offset.0).unwrap())
}

impl Machine {
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with(device, ram(), None).unwrap()
    }

    /// A machine with memory that another one left, restored from `saved`, paused.
    pub(crate) fn with(
        device: Box<dyn VirtioDevice>,
        mem: GuestRam,
        saved: Option<&Saved>,
    ) -> Result<Self, DeviceError> {
        Self::placed(device, mem, saved, Arc::default())
    }

    /// The same; what the guest is shown is kept in `shown`.
    pub(crate) fn placed(
        mut device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        saved: Option<&Saved>,
        shown: Arc<Shown>,
    ) -> Result<Self, DeviceError> {
        let mut mem = ram.clone();
        if let Some(own) = device.own_memory() {
            let leases = Arc::<Leases>::default();
            let leased = leases.clone();
            let placement =
                Placement { addr: OWN, slots: shown, leases: leased, is_recorded: true };
            mem = mem.with(own.place(placement)?, leases).unwrap();
        }
        let io = Arc::new(IoThread::spawn("test-io").unwrap());
        let irq = Arc::new(Irq::default());
        let notifier = Notifier::new(irq.clone(), Arc::<Counters>::default());
        let transport = MmioTransport::new(device, mem.clone(), notifier, io, saved)?;
        let tally = Tally(transport.counters());
        let transport = Arc::new(Mutex::new(transport));
        let mut bus = Bus::default();
        for (base, window) in [(ACPI, Window::Acpi), (COMMAND_LINE, Window::CommandLine)] {
            let device = Arc::new(WindowDevice::new(transport.clone(), window));
            bus.insert(base, WINDOW_SIZE, device).unwrap();
        }
        Ok(Self { ram, mem, irq, transport, bus, always: 0, _tally: tally })
    }

    pub(crate) fn device(&self) -> (&dyn BusDevice, u64) {
        self.bus.resolve(ACPI, 4).unwrap()
    }

    /// Reads a register.
    pub(crate) fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device().0.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub(crate) fn set(&self, offset: u64, value: u32) {
        self.device().0.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn status(&self) -> u32 {
        self.get(0x70)
    }

    pub(crate) fn features(&self) -> u64 {
        self.set(0x14, 1);
        let high = u64::from(self.get(0x10));
        self.set(0x14, 0);
        high << 32 | u64::from(self.get(0x10))
    }

    pub(crate) fn config(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0xaa; len];
        self.device().0.read(0x100 + offset, &mut data);
        data
    }

    /// Resets the device and negotiates `features` beside VERSION_1 and those of `always`.
    pub(crate) fn negotiate(&self, features: u64) {
        self.set(0x70, 0);
        assert_eq!(self.status(), 0);
        self.set(0x70, 1);
        self.set(0x70, 3);
        let features = features | self.always | F_VERSION_1;
        for page in 0..2u32 {
            self.set(0x24, page);
            self.set(0x20, u32::try_from(features >> (32 * page) & 0xffff_ffff).unwrap());
        }
        self.set(0x70, 11);
        assert_eq!(self.status(), 11, "features {features:#x} refused");
    }

    /// Tells the device where `rings` are; queues without one stay unready.
    pub(crate) fn place(&self, rings: &[Ring]) {
        for ring in rings {
            self.set(0x30, ring.queue.into());
            self.set(0x38, ring.size.into());
            for (register, address) in [(0x80, ring.desc), (0x90, ring.avail), (0xa0, ring.used)] {
                self.set(register, u32::try_from(address & 0xffff_ffff).unwrap());
                self.set(register + 4, u32::try_from(address >> 32).unwrap());
            }
            self.set(0x44, 1);
        }
    }

    /// Brings the device up with a ring of 16 entries for each queue.
    pub(crate) fn start(&self, features: u64) -> Vec<Ring> {
        self.negotiate(features);
        let rings: Vec<_> =
            (0..self.queues()).map(|queue| Ring::new(&self.mem, queue, 16)).collect();
        self.place(&rings);
        self.set(0x70, 15);
        assert_eq!(self.status(), 15);
        rings
    }

    pub(crate) fn queues(&self) -> u16 {
        let exists = |queue: &u16| {
            self.set(0x30, (*queue).into());
            self.get(0x34) != 0
        };
        (0..64).take_while(exists).count().try_into().unwrap()
    }

    pub(crate) fn kick(&self, ring: &Ring) {
        self.set(0x50, ring.queue.into());
    }

    /// Kicks and waits until the device has used `count` chains since the ring was made.
    pub(crate) fn finish(&self, ring: &Ring, count: u16) {
        ring.set_used_event(count.wrapping_sub(1));
        self.kick(ring);
        self.irq.wait("used buffers", || ring.used_idx() == count);
    }

    /// Waits until the device asks for a reset, as it must after a ring that lies: by its status,
    /// and by a configuration interrupt.
    pub(crate) fn wait_for_latch(&self, what: &str) {
        self.irq.wait(what, || self.status() & NEEDS_RESET != 0 && self.get(0x60) & 2 != 0);
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        let sets = self.transport.lock().unwrap().counters();
        let mut counted = sets.iter().flat_map(|set| {
            let names = set.group().declared.iter().map(|declared| declared.name);
            names.zip(set.values())
        });
        counted.find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no {name}")).1.amount()
    }
}

impl Drop for Machine {
    /// Memory was all zero: what is not has been written by somebody, and must have been recorded.
    fn drop(&mut self) {
        let is_quiet = self.transport.lock().is_ok_and(|mut transport| transport.pause().is_ok());
        if std::thread::panicking() || !is_quiet {
            return;
        }
        for (addr, bytes) in pages_of(&self.mem) {
            let is_missed = bytes.iter().any(|byte| *byte != 0) && !is_written(&self.mem, addr);
            assert!(!is_missed, "a write to the page at {:#x} was not recorded", addr.0);
        }
    }
}

/// A buffer: address, length, whether the device writes it.
pub(crate) type Buf = (u64, u32, bool);
/// A descriptor: address, length, flags, next.
pub(crate) type Desc = (u64, u32, u16, u16);

/// A split virtqueue from the driver's side.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    pub(crate) mem: GuestRam,
    pub(crate) queue: u16,
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    avail_idx: u16,
    free: u16,
}

impl Ring {
    /// A ring for `queue` at an address of its own, emptied.
    pub(crate) fn new(mem: &GuestRam, queue: u16, size: u16) -> Self {
        let base = 0x1_0000 + u64::from(queue) * 0x4000;
        let ring = Self {
            mem: mem.clone(),
            queue,
            size,
            desc: base,
            avail: base + 0x2000,
            used: base + 0x3000,
            avail_idx: 0,
            free: 0,
        };
        mem.write_slice(&[0; 0x4000], GuestAddress(base)).unwrap();
        ring
    }

    pub(crate) fn write_desc(&self, table: u64, index: u16, desc: Desc) {
        let (addr, len, flags, next) = desc;
        let at = table + 16 * u64::from(index);
        self.mem.write_obj(addr, GuestAddress(at)).unwrap();
        self.mem.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.mem.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes `head` available.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.mem.write_obj(head, GuestAddress(self.avail + 4 + 2 * slot)).unwrap();
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    pub(crate) fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        self.mem.write_obj(index, GuestAddress(self.avail + 2)).unwrap();
    }

    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.size);
        self.mem.write_obj(index, GuestAddress(at)).unwrap();
    }

    pub(crate) fn avail_event(&self) -> u16 {
        self.mem.read_obj(GuestAddress(self.used + 4 + 8 * u64::from(self.size))).unwrap()
    }

    /// Chains `buffers` (address, length, whether the device writes) and makes them available.
    pub(crate) fn add(&mut self, buffers: &[Buf]) -> u16 {
        let head = self.free % self.size;
        for (i, &(addr, len, is_writable)) in (0u16..).zip(buffers) {
            let is_last = usize::from(i) + 1 == buffers.len();
            let flags = if is_writable { WRITE } else { 0 } | if is_last { 0 } else { NEXT };
            let index = (head + i) % self.size;
            self.write_desc(self.desc, index, (addr, len, flags, (index + 1) % self.size));
        }
        self.free = (head + u16::try_from(buffers.len()).unwrap()) % self.size;
        self.offer(head);
        head
    }

    /// The same by way of an indirect table at `table`.
    pub(crate) fn add_indirect(&mut self, table: u64, buffers: &[Buf]) -> u16 {
        for (i, &(addr, len, is_writable)) in (0u16..).zip(buffers) {
            let is_last = usize::from(i) + 1 == buffers.len();
            let flags = if is_writable { WRITE } else { 0 } | if is_last { 0 } else { NEXT };
            self.write_desc(table, i, (addr, len, flags, i + 1));
        }
        let head = self.free;
        let len = u32::try_from(buffers.len() * 16).unwrap();
        self.write_desc(self.desc, head, (table, len, INDIRECT, 0));
        self.free = (head + 1) % self.size;
        self.offer(head);
        head
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.mem.read_obj(GuestAddress(self.used + 2)).unwrap()
    }

    /// The used entry at `slot`: head and length.
    pub(crate) fn used_entry(&self, slot: u16) -> (u32, u32) {
        let at = self.used + 4 + 8 * u64::from(slot % self.size);
        let read = |at| self.mem.read_obj(GuestAddress(at)).unwrap();
        (read(at), read(at + 4))
    }
}
