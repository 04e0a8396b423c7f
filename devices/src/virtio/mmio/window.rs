//! The two addresses of a device, as the bus sees them.
use std::sync::{Arc, PoisonError};

use serde::{Deserialize, Serialize};

use super::MmioTransport;
use crate::bus::BusDevice;
use crate::sync::Mutex;

/// One of the two addresses a device answers at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Window {
    /// The one that ACPI describes.
    Acpi,
    /// The one that `virtio_mmio.device=` on the kernel command line names.
    CommandLine,
}

/// One window of a transport, to put on a bus.
#[derive(Debug)]
pub struct WindowDevice {
    transport: Arc<Mutex<MmioTransport>>,
    window: Window,
}

impl WindowDevice {
    /// `transport` as seen at `window`.
    pub fn new(transport: Arc<Mutex<MmioTransport>>, window: Window) -> Self {
        Self { transport, window }
    }
}

impl BusDevice for WindowDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
        transport.read(self.window, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut transport = self.transport.lock().unwrap_or_else(PoisonError::into_inner);
        transport.write(self.window, offset, data);
    }
}
