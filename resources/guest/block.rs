//! A virtio-blk driver (virtio 1.2, 5.2): requests by slot, any number in flight up to the queue's room.

use crate::memory;
use crate::virtio::{self, Buffer, Device, Queue};
use crate::{Failure, ensure};

pub const F_RO: u64 = 1 << 5;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Request types.
pub const READ: u32 = 0;
pub const WRITE: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// Status bytes.
pub const OK: u8 = 0;
pub const IO_ERROR: u8 = 1;
pub const UNSUPPORTED: u8 = 2;

pub const SECTOR: u64 = 512;
/// Descriptors a slot has: header, data, status.
const SLOT: u16 = 3;
const QUEUE_SIZE: u16 = 256;
const TIMEOUT_US: u64 = 10_000_000;
/// What no device writes as a status.
const PENDING: u8 = 0xee;

/// `struct virtio_blk_req` without data and status.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// A live block device.
#[derive(Debug)]
pub struct Block {
    pub device: Device,
    pub features: u64,
    /// Capacity in sectors.
    pub sectors: u64,
    pub queue: Queue,
    headers: *mut Header,
    states: *mut u8,
}

impl Block {
    /// Brings up the `nth` block device of the command line with everything it offers that this driver knows.
    pub fn open(cmdline: &str, nth: usize) -> Result<Self, Failure> {
        let device = virtio::find(cmdline, virtio::ID_BLOCK, nth)?;
        let features = device.negotiate(F_RO | F_FLUSH | F_DISCARD | F_WRITE_ZEROES)?;
        let sectors = device.config64(0);
        let queue = device.queue(0, QUEUE_SIZE)?;
        device.start()?;
        let headers = memory::allocate(size_of::<Header>() * usize::from(QUEUE_SIZE));
        let states = memory::allocate(QUEUE_SIZE.into()).as_mut_ptr();
        Ok(Self { device, features, sectors, queue, headers: headers.as_mut_ptr().cast(), states })
    }

    /// Brings the device up again after a reset, on the same rings.
    pub fn reopen(&mut self) -> Result<(), Failure> {
        self.device.negotiate(self.features)?;
        self.queue.clear();
        self.device.place(&self.queue);
        self.device.start()
    }

    /// How many requests may be in flight.
    pub fn slots(&self) -> u16 {
        self.queue.size / SLOT
    }

    /// Offers a request in a slot, without a kick.
    pub fn submit(&mut self, slot: u16, kind: u32, sector: u64, data: Option<Buffer>) {
        // SAFETY: both arrays have room for more than `slots`.
        let (header, state) = unsafe {
            let header = self.headers.add(slot.into());
            header.write_volatile(Header { kind, reserved: 0, sector });
            let state = self.states.add(slot.into());
            state.write_volatile(PENDING);
            (header as u64, state as u64)
        };
        let first = Buffer { address: header, len: 16, is_device_written: false };
        let last = Buffer { address: state, len: 1, is_device_written: true };
        match data {
            Some(data) => self.queue.chain(slot * SLOT, &[first, data, last]),
            None => self.queue.chain(slot * SLOT, &[first, last]),
        }
        self.queue.offer(slot * SLOT);
    }

    /// A finished request, if there is one: slot, status and bytes written.
    pub fn poll(&mut self) -> Option<(u16, u8, u32)> {
        let (head, len) = self.queue.poll()?;
        let slot = head / SLOT;
        // SAFETY: heads beyond the table would be the device's lie; the array covers the queue's size.
        let status = unsafe { self.states.add((slot % QUEUE_SIZE).into()).read_volatile() };
        Some((slot, status, len))
    }

    /// Makes one request and waits for it: status and bytes written.
    pub fn request(
        &mut self,
        kind: u32,
        sector: u64,
        data: Option<Buffer>,
    ) -> Result<(u8, u32), Failure> {
        self.submit(0, kind, sector, data);
        self.queue.kick();
        let (head, len) = self.queue.wait(TIMEOUT_US)?;
        ensure!(head == 0, "request type {kind}: used head {head}, not 0");
        // SAFETY: slot 0's.
        Ok((unsafe { self.states.read_volatile() }, len))
    }

    /// Reads whole sectors.
    pub fn read(&mut self, sector: u64, into: &mut [u8]) -> Result<(), Failure> {
        let want = into.len() as u32 + 1;
        let (status, len) = self.request(READ, sector, Some(Buffer::writable(into)))?;
        ensure!(status == OK, "read of sector {sector}: status {status}");
        ensure!(len == want, "read of sector {sector}: {len} bytes, not {want}");
        Ok(())
    }

    /// Writes whole sectors.
    pub fn write(&mut self, sector: u64, from: &[u8]) -> Result<(), Failure> {
        let (status, len) = self.request(WRITE, sector, Some(Buffer::readable(from)))?;
        ensure!(status == OK, "write of sector {sector}: status {status}");
        ensure!(len == 1, "write of sector {sector}: {len} bytes, not 1");
        Ok(())
    }
}
