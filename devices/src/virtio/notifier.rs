//! What a device can tell its driver (virtio 1.2, 2.1, 2.3 and 4.2.2): shared by the transport,
//! which the vCPUs lock, and the worker, which must not wait for them.
use std::sync::Arc;

use crate::counters;
use crate::observer::{Happening, Observer};
use crate::sync::atomic::{AtomicU32, Ordering};

/// Raises the device's interrupt in the guest. An irqfd in the VMM, a counter in tests.
pub trait Interrupt: Send + Sync {
    /// Queue `queue` has used buffers.
    fn used_buffer(&self, queue: u16);
    /// The configuration space or the device status changed.
    fn config_change(&self);
}

/// Bits of the device status field (virtio 1.2, 2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// The driver is ready; queues are live.
    pub const DRIVER_OK: u32 = 4;
    /// Features are negotiated.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on until it is reset.
    pub const NEEDS_RESET: u32 = 64;
    /// The driver gave up.
    pub const FAILED: u32 = 128;
}

const ISR_USED_BUFFER: u32 = 1;
const ISR_CONFIG_CHANGE: u32 = 2;

counters! {
    /// What is counted of every device, whatever it is.
    pub struct Counters as "virtio" {
        /// Times a driver brought the device up.
        activate_count: Counter,
        /// Times the device could not be brought up: bad queues, or the host failed.
        activate_fails: Counter,
        /// Times a driver reset the device.
        reset_count: Counter,
        /// Times the device was lost until a reset: a ring that lies, or the host failed.
        event_fails: Counter,
        /// Reads of the configuration space beyond its end.
        cfg_fails: Counter,
        /// Interrupts for used buffers.
        used_buffer_interrupt_count: Counter,
        /// Interrupts for a changed configuration or status.
        config_interrupt_count: Counter,
    }
}

/// Device status, interrupt status and configuration generation, with the line to the driver.
pub struct Notifier {
    line: Arc<dyn Interrupt>,
    counters: Arc<Counters>,
    observer: Option<Arc<dyn Observer>>,
    status: AtomicU32,
    isr: AtomicU32,
    generation: AtomicU32,
}

impl std::fmt::Debug for Notifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Notifier")
            .field("status", &self.status)
            .field("isr", &self.isr)
            .finish_non_exhaustive()
    }
}

impl Notifier {
    /// A notifier of a device that has just been reset. `counters` outlive it, so that they go on
    /// when the machine around a device is made anew.
    pub fn new(line: Arc<dyn Interrupt>, counters: Arc<Counters>) -> Self {
        Self {
            line,
            counters,
            observer: None,
            status: AtomicU32::new(0),
            isr: AtomicU32::new(0),
            generation: AtomicU32::new(0),
        }
    }

    /// Tells the driver that `queue` has used buffers.
    pub fn used_buffer(&self, queue: u16) {
        self.isr.fetch_or(ISR_USED_BUFFER, Ordering::SeqCst);
        self.counters.used_buffer_interrupt_count().inc();
        self.line.used_buffer(queue);
    }

    /// Tells the driver that the configuration space changed. The generation moves first, so that a
    /// driver that reads in between reads again.
    pub fn config_change(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.isr.fetch_or(ISR_CONFIG_CHANGE, Ordering::SeqCst);
        self.interrupt_for_config();
        self.notice(Happening::ConfigChanged);
    }

    /// The same, told of to `observer`.
    pub fn observed_by(mut self, observer: Arc<dyn Observer>) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Tells the observer.
    pub(super) fn notice(&self, what: Happening) {
        if let Some(observer) = &self.observer {
            observer.notice(what);
        }
    }

    fn interrupt_for_config(&self) {
        self.counters.config_interrupt_count().inc();
        self.line.config_change();
    }

    /// What is counted of every device.
    pub(super) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Latches the device: it is of no use until the driver resets it (virtio 1.2, 2.1.2).
    pub fn needs_reset(&self) {
        let was = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if was & status::NEEDS_RESET == 0 && was & status::DRIVER_OK != 0 {
            self.counters.event_fails().inc();
            self.notice(Happening::NeedsReset);
            self.isr.fetch_or(ISR_CONFIG_CHANGE, Ordering::SeqCst);
            self.interrupt_for_config();
        }
    }

    /// The device status field.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Adds bits to the device status.
    pub(super) fn set_status_bits(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    /// The interrupt status register.
    pub(super) fn isr(&self) -> u32 {
        self.isr.load(Ordering::SeqCst)
    }

    /// Clears the acknowledged bits of the interrupt status.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.isr.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The configuration generation.
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Back to the state after power-on, as far as the driver can see.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.isr.store(0, Ordering::SeqCst);
    }

    /// Takes over saved registers.
    pub(super) fn restore(&self, status: u32, isr: u32, generation: u32) {
        self.status.store(status, Ordering::SeqCst);
        self.isr.store(isr, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
    }

    /// Raises the line again if an interrupt was not acknowledged. A driver that has had it finds
    /// nothing new, as after any interrupt that two causes share.
    pub(super) fn tell_again(&self) {
        if self.isr() != 0 {
            self.interrupt_for_config();
        }
    }
}
