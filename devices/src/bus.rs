//! Routes an address to the device that owns it.
//!
//! Built once, then immutable and shared: a vCPU exit takes no lock to find its device. Two buses
//! exist in a VM, port I/O and MMIO; they differ only in what an address means.
use std::sync::{Arc, PoisonError};

use crate::sync::Mutex;

/// A device that answers reads and writes inside one address range.
///
/// `offset` is relative to the start of the range. `data` has the width of the access: 1, 2, 4 or
/// 8 bytes, never more than the range holds.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
    /// Takes several writes of `width` bytes to the same `offset`, made by one instruction
    /// (`rep outs`).
    fn write_burst(&self, offset: u64, width: usize, data: &[u8]) {
        data.chunks(width).for_each(|item| self.write(offset, item));
    }
}

/// The same, for devices content to be locked as a whole.
pub trait BusDeviceMut: Send {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
    /// As [`BusDevice::write_burst`].
    fn write_burst(&mut self, offset: u64, width: usize, data: &[u8]) {
        data.chunks(width).for_each(|item| self.write(offset, item));
    }
}

impl<D: BusDeviceMut> BusDevice for Mutex<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }
    fn write_burst(&self, offset: u64, width: usize, data: &[u8]) {
        self.lock().unwrap_or_else(PoisonError::into_inner).write_burst(offset, width, data);
    }
}

/// Why a range could not be inserted.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The range is empty or runs past the end of the address space.
    #[error("range {base:#x}+{len:#x} is empty or wraps")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device has part of the range.
    #[error("range {base:#x}+{len:#x} overlaps another device")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

struct Entry {
    base: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space. `insert` while building, then share as `Arc<Bus>`.
#[derive(Default)]
pub struct Bus {
    entries: Vec<Entry>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|e| (e.base, e.last))).finish()
    }
}

impl Bus {
    /// Gives `base..base + len` to `device`.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|l| base.checked_add(l))
            .ok_or(BusError::BadRange { base, len })?;
        let at = self.entries.partition_point(|e| e.last < base);
        if self.entries.get(at).is_some_and(|e| e.base <= last) {
            return Err(BusError::Overlap { base, len });
        }
        self.entries.insert(at, Entry { base, last, device });
        Ok(())
    }

    /// Finds the device at `addr` and the offset of `addr` in it. An access that starts inside a
    /// device but runs past its end belongs to nobody.
    pub fn resolve(&self, addr: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let at = self.entries.partition_point(|e| e.last < addr);
        let entry = self.entries.get(at)?;
        let offset = addr.checked_sub(entry.base)?;
        let last = addr.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        (last <= entry.last).then_some((&*entry.device, offset))
    }

    /// Reads at `addr`. What nobody owns reads as all ones, as on a real bus; false says so.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.resolve(addr, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes at `addr`. What nobody owns is ignored; false says so.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.resolve(addr, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes `data` to `addr` in items of `width` bytes, as one instruction may do.
    pub fn write_burst(&self, addr: u64, width: usize, data: &[u8]) -> bool {
        match self.resolve(addr, width) {
            Some((device, offset)) => {
                device.write_burst(offset, width, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(u8);
    impl BusDeviceMut for Fixed {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + u8::try_from(offset).unwrap());
        }
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    fn bus() -> Bus {
        let mut bus = Bus::default();
        bus.insert(0x20, 0x10, Arc::new(Mutex::new(Fixed(2)))).unwrap();
        bus.insert(0x10, 0x10, Arc::new(Mutex::new(Fixed(1)))).unwrap();
        bus.insert(u64::MAX, 1, Arc::new(Mutex::new(Fixed(3)))).unwrap();
        bus
    }

    #[test]
    fn routes_to_the_owner() {
        let bus = bus();
        let mut b = [0];
        assert!(bus.read(0x1f, &mut b));
        assert_eq!(b, [0x10]);
        assert!(bus.write(0x20, &[9]));
        assert!(bus.read(0x20, &mut b));
        assert_eq!(b, [9]);
        assert!(bus.read(u64::MAX, &mut b));
    }

    #[test]
    fn unclaimed_reads_as_ones_and_straddling_belongs_to_nobody() {
        let bus = bus();
        for (addr, len) in [(0xf, 1), (0x30, 4), (0x2e, 4), (0x1e, 4), (u64::MAX, 2)] {
            let mut data = vec![0; len];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, vec![0xff; len]);
            assert!(!bus.write(addr, &data));
        }
        assert!(bus.resolve(0x10, 0).is_none());
    }

    #[test]
    fn refuses_overlapping_empty_and_wrapping_ranges() {
        let mut bus = bus();
        let device = || Arc::new(Mutex::new(Fixed(0)));
        for (base, len) in [(0x10, 1), (0x1f, 1), (0xf, 2), (0, 0x100), (0x2f, 2)] {
            assert!(matches!(bus.insert(base, len, device()), Err(BusError::Overlap { .. })));
        }
        for (base, len) in [(0x40, 0), (u64::MAX, 2)] {
            assert!(matches!(bus.insert(base, len, device()), Err(BusError::BadRange { .. })));
        }
        bus.insert(0x30, 1, device()).unwrap();
        bus.insert(0, 0x10, device()).unwrap();
    }
}
