//! A virtio device at its registers, as a vCPU finds it, with its worker driven by hand: what happens depends on the
//! input alone.
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use devices::GuestRam;
use devices::bus::BusDevice;
use devices::io::{IoError, IoThread};
use devices::memory::{Leases, Piece, Placement, Slots};
use devices::virtio::mmio::{MmioTransport, Saved, Window, WindowDevice};
use devices::virtio::model::{DeviceError, VirtioDevice};
use devices::virtio::notifier::{Counters, Interrupt, Notifier};

use crate::guest::{OWN, ram};

pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;
pub const NEEDS_RESET: u32 = 64;
pub const DRIVER_OK: u32 = 4;

/// More turns than any number of chains takes that fits into RAM: a worker that wants more never stops.
const TURNS_MAX: usize = 4096;
/// How often a device is asked to stop, which waits for half a second each time.
const TRIES_MAX: usize = 16;

/// The interrupts so far, for used buffers and for the configuration.
#[derive(Debug, Default)]
pub struct Irq {
    used: AtomicU64,
    config: AtomicU64,
}

impl Interrupt for Irq {
    fn used_buffer(&self, _queue: u16) {
        self.used.fetch_add(1, Ordering::Relaxed);
    }
    fn config_change(&self) {
        self.config.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the guest is shown of a device's memory is not KVM's here.
#[derive(Debug, Default)]
struct Shown(Mutex<Vec<Piece>>);

impl Slots for Shown {
    fn show(&self, piece: &Piece) -> std::io::Result<()> {
        let mut pieces = self.0.lock().expect("no panic goes on");
        assert!(pieces.iter().all(|other| other.slot != piece.slot), "the slot was taken");
        pieces.push(piece.clone());
        Ok(())
    }

    fn hide(&self, piece: &Piece) -> std::io::Result<()> {
        let mut pieces = self.0.lock().expect("no panic goes on");
        let at = pieces.iter().position(|other| other == piece);
        pieces.swap_remove(at.expect("what is hidden was shown"));
        Ok(())
    }
}

/// The device, its windows and its worker.
#[derive(Debug)]
pub struct Machine {
    pub mem: GuestRam,
    pub irq: Arc<Irq>,
    transport: Arc<Mutex<MmioTransport>>,
    windows: [WindowDevice; 2],
    io: Arc<IoThread>,
}

impl Machine {
    /// A machine with RAM that is all zero.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with(device, ram(), None).expect("a device that is not restored has a place")
    }

    /// The same with RAM that another one left, and what was saved of it.
    pub fn with(
        mut device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        saved: Option<&Saved>,
    ) -> Result<Self, DeviceError> {
        let mut mem = ram;
        if let Some(own) = device.own_memory() {
            let leases = Arc::<Leases>::default();
            let (slots, used) = (Arc::<Shown>::default(), leases.clone());
            let place = Placement { addr: OWN, slots, leases: used, is_recorded: true };
            mem = mem.with(own.place(place)?, leases).expect("it is beside RAM");
        }
        let io = Arc::new(IoThread::by_hand()?);
        let irq = Arc::<Irq>::default();
        let notifier = Notifier::new(irq.clone(), Arc::<Counters>::default());
        let transport = MmioTransport::new(device, mem.clone(), notifier, io.clone(), saved)?;
        let transport = Arc::new(Mutex::new(transport));
        let windows = [Window::Acpi, Window::CommandLine]
            .map(|window| WindowDevice::new(transport.clone(), window));
        Ok(Self { mem, irq, transport, windows, io })
    }

    /// What the VMM thread has to do with it.
    pub fn transport(&self) -> MutexGuard<'_, MmioTransport> {
        self.transport.lock().expect("no panic goes on")
    }

    /// Handles what is ready until nothing is.
    pub fn settle(&self) {
        let turns = (0..TURNS_MAX).take_while(|_| self.io.turn() > 0).count();
        assert!(turns < TURNS_MAX, "the worker does not come to rest");
    }

    /// Handles what is ready now; whether something was.
    pub fn turn(&self) -> bool {
        self.io.turn() > 0
    }

    /// The device at one of its two addresses.
    pub fn window(&self, is_second: bool) -> &WindowDevice {
        &self.windows[usize::from(is_second)]
    }

    /// Reads a register.
    pub fn get(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.windows[0].read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn set(&self, offset: u64, value: u32) {
        self.windows[0].write(offset, &value.to_le_bytes());
    }

    /// The device status.
    pub fn status(&self) -> u32 {
        self.get(0x70)
    }

    /// The features that are offered.
    pub fn features(&self) -> u64 {
        self.set(0x14, 1);
        let high = u64::from(self.get(0x10));
        self.set(0x14, 0);
        high << 32 | u64::from(self.get(0x10))
    }

    /// Pauses the device. A request that is with the host comes back, but on a host that is busy not at once.
    pub fn pause(&self) {
        for _ in 0..TRIES_MAX {
            match self.transport().pause() {
                Ok(()) => return,
                Err(DeviceError::Io(IoError::Busy)) => {}
                Err(e) => panic!("a device cannot be paused: {e}"),
            }
        }
        panic!("a request does not come back from the host");
    }

    /// Resets the device; nothing of it is at work then.
    pub fn reset(&self) {
        for _ in 0..TRIES_MAX {
            // By whichever of its addresses it was found: at the other nothing has an effect.
            for window in &self.windows {
                window.write(0x70, &0_u32.to_le_bytes());
            }
            if self.status() == 0 {
                break;
            }
        }
        assert_eq!(self.status(), 0, "a reset that is not one");
        assert!(!self.turn(), "something is at work after a reset");
    }

    /// Negotiates those of `features` that are offered, as a driver that knows what it does.
    pub fn negotiate(&self, features: u64) -> u64 {
        self.reset();
        self.set(0x70, 1);
        self.set(0x70, 3);
        let features = features & self.features() | F_VERSION_1;
        for page in 0..2u32 {
            self.set(0x24, page);
            self.set(0x20, (features >> (32 * page)) as u32);
        }
        self.set(0x70, 11);
        assert_eq!(self.status(), 11, "features {features:#x} refused");
        features
    }

    /// How many queues there are.
    pub fn queues(&self) -> u16 {
        let exists = |queue: &u16| {
            self.set(0x30, (*queue).into());
            self.get(0x34) != 0
        };
        (0..16).take_while(exists).count() as u16
    }

    /// The largest size of a queue.
    pub fn size_max(&self, queue: u16) -> u16 {
        self.set(0x30, queue.into());
        self.get(0x34) as u16
    }

    /// Says where a queue is.
    pub fn place(&self, queue: u16, size: u16, rings: [u64; 3]) {
        self.set(0x30, queue.into());
        self.set(0x38, size.into());
        for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(rings) {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    /// Interrupts for used buffers and for the configuration.
    pub fn interrupts(&self) -> (u64, u64) {
        (self.irq.used.load(Ordering::Relaxed), self.irq.config.load(Ordering::Relaxed))
    }
}
