//! Races between vCPUs and I/O threads over a device, in the orders that shuttle draws: the devices, the
//! transport and the I/O thread as they are, and a driver that does what Linux's does. By `tests/models`.
#![expect(clippy::indexing_slicing, reason = "a test that panics is a test that fails")]

#[path = "../virtio/driver.rs"]
#[expect(dead_code, reason = "shared with the tests of each device")]
mod driver;
mod interrupt;
mod reset;
#[path = "../virtio/samples.rs"]
#[expect(dead_code, reason = "shared with the tests of each device")]
mod samples;

/// Registers (virtio 1.2, 4.2.2).
mod register {
    pub(crate) const INTERRUPT_STATUS: u64 = 0x60;
    pub(crate) const INTERRUPT_ACK: u64 = 0x64;
    pub(crate) const STATUS: u64 = 0x70;
    pub(crate) const CONFIG_GENERATION: u64 = 0xfc;
}
