//! A virtio 1.2 driver for devices on virtio-mmio: registers, negotiation, split queues with polled rings.
//!
//! It serves well-behaved guests and the tests' hostile ones: registers and rings are open to whoever wants to break a
//! rule. It knows no device type; see the guests for those.

use core::sync::atomic::{Ordering, fence};

use crate::clock;
use crate::memory::{self, mmio_read8, mmio_read32, mmio_write32};
use crate::options;
use crate::{Failure, fail};

/// Register offsets (virtio 1.2, 4.2.2).
pub mod reg {
    pub const MAGIC: usize = 0x00;
    pub const VERSION: usize = 0x04;
    pub const DEVICE_ID: usize = 0x08;
    pub const VENDOR_ID: usize = 0x0c;
    pub const DEVICE_FEATURES: usize = 0x10;
    pub const DEVICE_FEATURES_SEL: usize = 0x14;
    pub const DRIVER_FEATURES: usize = 0x20;
    pub const DRIVER_FEATURES_SEL: usize = 0x24;
    pub const QUEUE_SEL: usize = 0x30;
    pub const QUEUE_NUM_MAX: usize = 0x34;
    pub const QUEUE_NUM: usize = 0x38;
    pub const QUEUE_READY: usize = 0x44;
    pub const QUEUE_NOTIFY: usize = 0x50;
    pub const INTERRUPT_STATUS: usize = 0x60;
    pub const INTERRUPT_ACK: usize = 0x64;
    pub const STATUS: usize = 0x70;
    pub const QUEUE_DESC: usize = 0x80;
    pub const QUEUE_DRIVER: usize = 0x90;
    pub const QUEUE_DEVICE: usize = 0xa0;
    pub const CONFIG_GENERATION: usize = 0xfc;
    pub const CONFIG: usize = 0x100;
}

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// "virt" in little endian.
pub const MAGIC: u32 = 0x7472_6976;
/// Device ids (virtio 1.2, 5).
pub const ID_NET: u32 = 1;
pub const ID_BLOCK: u32 = 2;
pub const ID_RNG: u32 = 4;
pub const ID_VSOCK: u32 = 19;
pub const ID_MEM: u32 = 24;
pub const ID_PMEM: u32 = 27;
/// The one feature every modern driver must take.
pub const F_VERSION_1: u64 = 1 << 32;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// A device of the command line: `virtio_mmio.device=SIZE@BASE:IRQ`.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    pub base: usize,
    pub size: usize,
    pub irq: u32,
}

/// The devices the command line names, in order.
pub fn devices(cmdline: &str) -> impl Iterator<Item = Device> {
    options::values(cmdline, "virtio_mmio.device").filter_map(|spec| {
        let (size, place) = spec.split_once('@')?;
        let mut place = place.split(':');
        let base = options::parse(place.next()?)? as usize;
        let irq = options::parse(place.next()?)? as u32;
        Some(Device { base, size: options::parse(size)? as usize, irq })
    })
}

/// The `nth` device with this id, counted from 0.
pub fn find(cmdline: &str, id: u32, nth: usize) -> Result<Device, Failure> {
    match devices(cmdline).filter(|d| d.is_present() && d.id() == id).nth(nth) {
        Some(device) => Ok(device),
        None => fail!("no virtio device {nth} with id {id}"),
    }
}

impl Device {
    pub fn read(&self, register: usize) -> u32 {
        mmio_read32(self.base + register)
    }

    pub fn write(&self, register: usize, value: u32) {
        mmio_write32(self.base + register, value);
    }

    pub fn is_present(&self) -> bool {
        self.read(reg::MAGIC) == MAGIC && self.id() != 0
    }

    pub fn id(&self) -> u32 {
        self.read(reg::DEVICE_ID)
    }

    pub fn status(&self) -> u32 {
        self.read(reg::STATUS)
    }

    pub fn set_status(&self, status: u32) {
        self.write(reg::STATUS, status);
    }

    /// A byte of the device's configuration, for fields of bytes; wider fields need wider reads (4.2.2.2).
    pub fn config8(&self, offset: usize) -> u8 {
        mmio_read8(self.base + reg::CONFIG + offset)
    }

    pub fn config32(&self, offset: usize) -> u32 {
        self.read(reg::CONFIG + offset)
    }

    /// A 64-bit field, read until its halves belong together (2.5.3).
    pub fn config64(&self, offset: usize) -> u64 {
        loop {
            let generation = self.read(reg::CONFIG_GENERATION);
            let halves = [self.config32(offset), self.config32(offset + 4)];
            if self.read(reg::CONFIG_GENERATION) == generation {
                return u64::from(halves[0]) | u64::from(halves[1]) << 32;
            }
        }
    }

    pub fn features(&self) -> u64 {
        let half = |select| {
            self.write(reg::DEVICE_FEATURES_SEL, select);
            u64::from(self.read(reg::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    pub fn set_features(&self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(reg::DRIVER_FEATURES_SEL, select);
            self.write(reg::DRIVER_FEATURES, half);
        }
    }

    /// Resets the device and waits until it says so.
    pub fn reset(&self) -> Result<(), Failure> {
        self.set_status(0);
        if !clock::wait_until(1_000_000, || self.status() == 0) {
            fail!("device at {:#x} does not reset", self.base);
        }
        Ok(())
    }

    /// Resets, then takes those of the `wanted` features that are offered, up to FEATURES_OK (3.1.1). Returns them.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, Failure> {
        self.reset()?;
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let features = self.features() & (wanted | F_VERSION_1);
        self.set_features(features);
        let done = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.set_status(done);
        if self.status() != done {
            fail!("features {features:#x} refused, status {:#x}", self.status());
        }
        Ok(features)
    }

    /// Sets a queue up with fresh rings of `size` entries at most.
    pub fn queue(&self, index: u16, size: u16) -> Result<Queue, Failure> {
        self.write(reg::QUEUE_SEL, index.into());
        let max = self.read(reg::QUEUE_NUM_MAX);
        if max == 0 || self.read(reg::QUEUE_READY) != 0 {
            fail!("queue {index}: max size {max}, ready {}", self.read(reg::QUEUE_READY));
        }
        let queue = Queue::new(*self, index, size.min(max as u16));
        self.place(&queue);
        Ok(queue)
    }

    /// Tells the device where the rings are.
    pub fn place(&self, queue: &Queue) {
        self.write(reg::QUEUE_SEL, queue.index.into());
        self.write(reg::QUEUE_NUM, queue.size.into());
        for (register, address) in [
            (reg::QUEUE_DESC, queue.desc as u64),
            (reg::QUEUE_DRIVER, queue.avail as u64),
            (reg::QUEUE_DEVICE, queue.used as u64),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(reg::QUEUE_READY, 1);
    }

    /// Sets DRIVER_OK: the device goes live.
    pub fn start(&self) -> Result<(), Failure> {
        let done = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.set_status(done);
        if self.status() != done {
            fail!("not live, status {:#x}", self.status());
        }
        Ok(())
    }
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    pub is_device_written: bool,
}

impl Buffer {
    /// Bytes the device reads.
    pub fn readable(bytes: &[u8]) -> Self {
        let (address, len) = (bytes.as_ptr() as u64, bytes.len() as u32);
        Self { address, len, is_device_written: false }
    }

    /// Bytes the device writes.
    pub fn writable(bytes: &mut [u8]) -> Self {
        let (address, len) = (bytes.as_mut_ptr() as u64, bytes.len() as u32);
        Self { address, len, is_device_written: true }
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// A split virtqueue (virtio 1.2, 2.7). The rings are raw on purpose: the device shares them.
#[derive(Debug)]
pub struct Queue {
    device: Device,
    pub index: u16,
    pub size: u16,
    pub desc: *mut Descriptor,
    pub avail: *mut u16,
    pub used: *mut u16,
    next_avail: u16,
    next_used: u16,
}

impl Queue {
    fn new(device: Device, index: u16, size: u16) -> Self {
        let n = usize::from(size);
        let desc = memory::allocate(n * 16).as_mut_ptr().cast();
        let avail = memory::allocate(6 + n * 2).as_mut_ptr().cast();
        let used = memory::allocate(6 + n * 8).as_mut_ptr().cast();
        let mut queue =
            Self { device, index, size, desc, avail, used, next_avail: 0, next_used: 0 };
        queue.clear();
        queue
    }

    /// Forgets everything, as after a device reset; interrupts are not wanted, as the rings are polled.
    pub fn clear(&mut self) {
        let n = usize::from(self.size);
        // SAFETY: the rings' own memory; the device is not live.
        unsafe {
            self.avail.write_bytes(0, 3 + n);
            self.used.write_bytes(0, 3 + n * 4);
            self.avail.write_volatile(AVAIL_NO_INTERRUPT);
        }
        (self.next_avail, self.next_used) = (0, 0);
    }

    /// Asks for interrupts, or not.
    pub fn want_interrupts(&mut self, wanted: bool) {
        let flags = if wanted { 0 } else { AVAIL_NO_INTERRUPT };
        // SAFETY: the first word of the available ring.
        unsafe { self.avail.write_volatile(flags) };
    }

    /// Writes a chain into the descriptors from `head` on, without offering it.
    pub fn chain(&mut self, head: u16, buffers: &[Buffer]) {
        for (i, buffer) in (head..).zip(buffers) {
            let is_last = usize::from(i - head) + 1 == buffers.len();
            let flags = if is_last { 0 } else { DESC_NEXT }
                | if buffer.is_device_written { DESC_WRITE } else { 0 };
            let next = if is_last { 0 } else { i + 1 };
            self.describe(i, Descriptor { address: buffer.address, len: buffer.len, flags, next });
        }
    }

    /// Writes one descriptor as given, valid or not.
    pub fn describe(&mut self, index: u16, descriptor: Descriptor) {
        assert!(index < self.size, "descriptor {index} of {}", self.size);
        // SAFETY: inside the table.
        unsafe { self.desc.add(index.into()).write_volatile(descriptor) };
    }

    /// Offers the chain at `head` to the device.
    pub fn offer(&mut self, head: u16) {
        let slot = usize::from(self.next_avail % self.size);
        self.next_avail = self.next_avail.wrapping_add(1);
        // SAFETY: inside the available ring: flags, idx, ring[size].
        unsafe {
            self.avail.add(2 + slot).write_volatile(head);
            fence(Ordering::SeqCst);
            self.avail.add(1).write_volatile(self.next_avail);
        }
        fence(Ordering::SeqCst);
    }

    /// Notifies the device unless it asked not to be.
    pub fn kick(&self) {
        // SAFETY: the first word of the used ring.
        if unsafe { self.used.read_volatile() } & USED_NO_NOTIFY == 0 {
            self.notify();
        }
    }

    /// Notifies the device.
    pub fn notify(&self) {
        self.device.write(reg::QUEUE_NOTIFY, self.index.into());
    }

    /// The next used chain: its head and the bytes written.
    pub fn poll(&mut self) -> Option<(u16, u32)> {
        // SAFETY: inside the used ring: flags, idx, ring[size] of two u32.
        unsafe {
            if self.used.add(1).read_volatile() == self.next_used {
                return None;
            }
            fence(Ordering::SeqCst);
            let slot = usize::from(self.next_used % self.size);
            self.next_used = self.next_used.wrapping_add(1);
            let element = self.used.add(2 + slot * 4).cast::<u32>();
            Some((element.read_unaligned() as u16, element.add(1).read_unaligned()))
        }
    }

    /// Waits for a used chain.
    pub fn wait(&mut self, timeout_us: u64) -> Result<(u16, u32), Failure> {
        let mut used = None;
        clock::wait_until(timeout_us, || {
            used = self.poll();
            used.is_some()
        });
        match used {
            Some(used) => Ok(used),
            None => fail!("queue {}: nothing used in {timeout_us} us", self.index),
        }
    }

    /// Offers one chain at descriptor 0, kicks and waits; returns the bytes written.
    pub fn round_trip(&mut self, buffers: &[Buffer], timeout_us: u64) -> Result<u32, Failure> {
        self.chain(0, buffers);
        self.offer(0);
        self.kick();
        match self.wait(timeout_us)? {
            (0, len) => Ok(len),
            (head, _) => fail!("queue {}: used head {head}, not 0", self.index),
        }
    }
}
