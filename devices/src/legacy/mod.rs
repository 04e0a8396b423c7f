//! The few devices of a PC that a kernel expects without being told: thin wrappers on vm-superio
//! where it has them. Knows neither KVM nor the VM: an interrupt is a [`Line`], the way out of the
//! machine is [`Power`].
pub mod acpi;
pub mod boot_timer;
pub mod generation;
pub mod i8042;
pub mod rtc;
pub mod serial;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line: an irqfd in a VM, a counter in tests.
pub trait Line: Send + Sync {
    /// Raises one edge. Never blocks.
    fn raise(&self);
}

impl Line for EventFd {
    fn raise(&self) {
        if let Err(e) = self.write(1) {
            log::debug!("cannot raise an interrupt: {e}");
        }
    }
}

/// Counts edges.
impl Line for Arc<AtomicUsize> {
    fn raise(&self) {
        self.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a guest can do to the machine as a whole. May be called any number of times.
pub trait Power: Send + Sync {
    /// The guest powers the machine off.
    fn off(&self);
    /// The guest resets the machine.
    fn reset(&self);
}

/// Calls `read` for each byte of an access, with the register it falls on: an access wider than
/// one byte is one cycle a byte, as on the bus these devices come from.
fn read_bytes(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u8) {
    for (register, byte) in (offset..).zip(data) {
        *byte = read(register);
    }
}

/// The same for writes.
fn write_bytes(offset: u64, data: &[u8], mut write: impl FnMut(u64, u8)) {
    for (register, byte) in (offset..).zip(data) {
        write(register, *byte);
    }
}

#[cfg(test)]
mod testing {
    use super::*;

    /// Counts what the guest did to the machine.
    #[derive(Debug, Default)]
    pub(super) struct Counted {
        pub(super) off: AtomicUsize,
        pub(super) reset: AtomicUsize,
    }

    impl Counted {
        /// (power offs, resets) so far.
        pub(super) fn get(&self) -> (usize, usize) {
            (self.off.load(Ordering::Relaxed), self.reset.load(Ordering::Relaxed))
        }
    }

    impl Power for Counted {
        fn off(&self) {
            self.off.fetch_add(1, Ordering::Relaxed);
        }
        fn reset(&self) {
            self.reset.fetch_add(1, Ordering::Relaxed);
        }
    }
}
