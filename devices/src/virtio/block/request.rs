//! Requests of the driver become calls on a [`Disk`], one after the other, straight between the file
//! and guest memory.
//!
//! A malformed request gets `IOERR` if its status byte can be reached, and comes back with nothing
//! written if not. It never stops the queue.
use std::sync::Arc;

use vm_memory::{Le32, Le64};

use super::{
    Counters, ID_BYTES, MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_REQUEST_BYTES,
    MAX_ZERO_SECTORS, MAX_ZERO_SEGMENTS, feature,
};
use crate::backend::disk::{Disk, SECTOR_SIZE, Unmap};
use crate::limiter::Limiter;
use crate::sys::rw::IoSlices;
use crate::virtio::chain::{Chain, Fault, Readable, Writable};

/// Request types (virtio 1.2, 5.2.6).
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// What executes requests: all of the device but its queue.
#[derive(Debug)]
pub(super) struct Executor {
    pub(super) disk: Arc<Disk>,
    pub(super) id: [u8; ID_BYTES],
    pub(super) features: u64,
    pub(super) limiter: Limiter,
    pub(super) counters: Arc<Counters>,
}

/// Status bytes of requests that failed (virtio 1.2, 5.2.6).
mod status {
    pub(super) const OK: u8 = 0;
    pub(super) const IOERR: u8 = 1;
    pub(super) const UNSUPP: u8 = 2;
}

impl Executor {
    /// Serves one request: the bytes written to the driver's buffers, and what it cost in bytes.
    /// Nothing if a rate limit does not let it begin.
    pub(super) fn serve(&self, chain: &Chain<'_>) -> Option<(u32, u64)> {
        let mut writable = chain.writable();
        let data = writable.len().checked_sub(1).and_then(|len| writable.take(len).ok());
        let Some(data) = data else {
            // Nowhere to put the status.
            self.counters.invalid_reqs_count().inc();
            return Some((0, 0));
        };
        let room = data.len();
        let result = if chain.is_mixed() {
            Err(Failure::Invalid)
        } else {
            self.execute(chain.readable(), data)
        };
        let (status, filled, cost) = match result {
            Ok(Done { filled, cost }) => (status::OK, filled, cost),
            Err(Failure::Throttled) => {
                self.counters.rate_limiter_throttled_events().inc();
                return None;
            }
            // How far the host got before it failed is not known: count it as far.
            Err(Failure::Host) => {
                self.counters.execute_fails().inc();
                (status::IOERR, 0, MAX_REQUEST_BYTES)
            }
            Err(failure) => {
                self.counters.invalid_reqs_count().inc();
                let is_known = failure != Failure::Unsupported;
                (if is_known { status::IOERR } else { status::UNSUPP }, 0, 0)
            }
        };
        if writable.write_obj(status).is_err() {
            return Some((0, cost));
        }
        // The used length covers what was written from the start on without a gap.
        let used = if filled == room { filled.saturating_add(1) } else { filled };
        Some((u32::try_from(used).unwrap_or(u32::MAX), cost))
    }

    fn execute(&self, mut input: Readable<'_>, output: Writable<'_>) -> Result<Done, Failure> {
        let request = input.read_obj::<Le32>()?.to_native();
        let _reserved = input.read_obj::<Le32>()?;
        let sector = input.read_obj::<Le64>()?.to_native();
        match request {
            kind::IN => self.read(sector, &input, &output),
            kind::OUT => self.write(sector, &input, &output),
            kind::FLUSH => self.flush(&input, &output),
            kind::GET_ID => self.get_id(&input, output),
            kind::DISCARD | kind::WRITE_ZEROES => self.erase(request, input, &output),
            _ => Err(Failure::Unsupported),
        }
    }

    fn read(&self, sector: u64, input: &Readable<'_>, to: &Writable<'_>) -> Result<Done, Failure> {
        want(input.is_empty())?;
        let offset = self.offset(sector, to.len())?;
        let mut slices = IoSlices::default();
        let mut result = Ok(());
        to.for_syscalls(|slice| result = result.and_then(|()| slices.push_writable(&slice)))?;
        result.map_err(|_| Failure::Invalid)?;
        self.admit(to.len())?;
        let read = || self.disk.read(&mut slices, offset);
        self.counters.read_agg().time(read).map_err(|e| failed("read", offset, &e))?;
        self.counters.read_count().inc();
        self.counters.read_bytes().add(to.len());
        Ok(Done { filled: to.len(), cost: to.len() })
    }

    fn write(
        &self,
        sector: u64,
        from: &Readable<'_>,
        output: &Writable<'_>,
    ) -> Result<Done, Failure> {
        want(output.is_empty() && self.disk.is_writable())?;
        let offset = self.offset(sector, from.len())?;
        let mut slices = IoSlices::default();
        let mut result = Ok(());
        from.for_syscalls(|slice| result = result.and_then(|()| slices.push(&slice)))?;
        result.map_err(|_| Failure::Invalid)?;
        self.admit(from.len())?;
        let write = || self.disk.write(&mut slices, offset);
        self.counters.write_agg().time(write).map_err(|e| failed("write", offset, &e))?;
        self.counters.write_count().inc();
        self.counters.write_bytes().add(from.len());
        Ok(Done { filled: 0, cost: from.len() })
    }

    fn flush(&self, input: &Readable<'_>, output: &Writable<'_>) -> Result<Done, Failure> {
        self.negotiated(feature::FLUSH)?;
        want(input.is_empty() && output.is_empty())?;
        self.admit(0)?;
        self.disk.flush().map_err(|e| failed("flush", 0, &e))?;
        self.counters.flush_count().inc();
        Ok(Done { filled: 0, cost: MAX_REQUEST_BYTES })
    }

    fn get_id(&self, input: &Readable<'_>, mut to: Writable<'_>) -> Result<Done, Failure> {
        want(input.is_empty())?;
        self.admit(0)?;
        to.write(&self.id)?;
        Ok(Done { filled: ID_BYTES as u64, cost: 0 })
    }

    /// DISCARD and WRITE_ZEROES: the data is a list of ranges. All are checked before the first has
    /// effect.
    fn erase(
        &self,
        request: u32,
        mut input: Readable<'_>,
        output: &Writable<'_>,
    ) -> Result<Done, Failure> {
        let (feature, limits) = match request {
            kind::DISCARD => (feature::DISCARD, (MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS)),
            _ => (feature::WRITE_ZEROES, (MAX_ZERO_SEGMENTS, MAX_ZERO_SECTORS)),
        };
        want(self.disk.is_writable())?;
        self.negotiated(feature)?;
        let count = input.len() / Range::BYTES;
        let is_whole = input.len().is_multiple_of(Range::BYTES);
        want(output.is_empty() && is_whole && count > 0 && count <= limits.0.into())?;
        let mut ranges = [Range::default(); MAX_DISCARD_SEGMENTS as usize];
        for (range, _) in ranges.iter_mut().zip(0..count) {
            *range = self.range(&mut input, limits.1)?;
            // Virtio 1.2, 5.2.6.2: the unmap flag is for WRITE_ZEROES only.
            if request == kind::DISCARD && range.unmap == Unmap::Allowed {
                return Err(Failure::Unsupported);
            }
        }
        // Zeroes may have to be written; what is discarded costs no bandwidth.
        let zeroed = ranges.iter().map(|range| range.len).fold(0, u64::saturating_add);
        self.admit(if request == kind::WRITE_ZEROES { zeroed } else { 0 })?;
        for (range, _) in ranges.iter().zip(0..count) {
            let done = match request {
                kind::DISCARD => self.disk.discard(range.offset, range.len),
                _ => self.disk.write_zeroes(range.offset, range.len, range.unmap),
            };
            done.map_err(|e| failed("erase", range.offset, &e))?;
        }
        match request {
            kind::DISCARD => self.counters.discard_count().inc(),
            _ => self.counters.write_zeroes_count().inc(),
        }
        Ok(Done { filled: 0, cost: MAX_REQUEST_BYTES })
    }

    /// One `struct virtio_blk_discard_write_zeroes` (virtio 1.2, 5.2.6).
    fn range(&self, input: &mut Readable<'_>, max_sectors: u32) -> Result<Range, Failure> {
        let sector = input.read_obj::<Le64>()?.to_native();
        let count = input.read_obj::<Le32>()?.to_native();
        let flags = input.read_obj::<Le32>()?.to_native();
        let unmap = match flags {
            0 => Unmap::Forbidden,
            1 => Unmap::Allowed,
            _ => return Err(Failure::Unsupported),
        };
        want(count <= max_sectors)?;
        let len = u64::from(count).saturating_mul(SECTOR_SIZE);
        Ok(Range { offset: self.within(sector, len)?, len, unmap })
    }

    /// Takes from the rate limits what a request on `bytes` costs, before it has effect.
    fn admit(&self, bytes: u64) -> Result<(), Failure> {
        if self.limiter.take(bytes) { Ok(()) } else { Err(Failure::Throttled) }
    }

    /// The byte offset of `len` bytes at `sector`, if they can be read or written in one request.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        want(len <= MAX_REQUEST_BYTES)?;
        self.within(sector, len)
    }

    /// The byte offset of `len` bytes at `sector`, if they are whole sectors inside the disk.
    fn within(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        want(len > 0 && len.is_multiple_of(SECTOR_SIZE))?;
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Failure::Invalid)?;
        let end = offset.checked_add(len).ok_or(Failure::Invalid)?;
        want(end <= self.disk.size())?;
        Ok(offset)
    }

    fn negotiated(&self, feature: u64) -> Result<(), Failure> {
        if self.features & feature == 0 { Err(Failure::Unsupported) } else { Ok(()) }
    }
}

/// A request that succeeded: data bytes given to the driver, and its share of the budget.
#[derive(Clone, Copy, Debug)]
struct Done {
    filled: u64,
    cost: u64,
}

/// Part of the disk, in bytes.
#[derive(Clone, Copy, Debug)]
struct Range {
    offset: u64,
    len: u64,
    unmap: Unmap,
}

impl Range {
    /// As the driver describes it.
    const BYTES: u64 = 16;
}

impl Default for Range {
    fn default() -> Self {
        Self { offset: 0, len: 0, unmap: Unmap::Forbidden }
    }
}

/// Why a request is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// It breaks the rules of the device.
    Invalid,
    /// The host could not do it.
    Host,
    /// The device does not know it.
    Unsupported,
    /// A rate limit does not let it begin yet: the driver hears nothing.
    Throttled,
}

impl From<Fault> for Failure {
    fn from(_: Fault) -> Self {
        Self::Invalid
    }
}

fn want(is_valid: bool) -> Result<(), Failure> {
    if is_valid { Ok(()) } else { Err(Failure::Invalid) }
}

fn failed(what: &str, offset: u64, e: &std::io::Error) -> Failure {
    log::warn!("drive: cannot {what} at {offset:#x}: {e}");
    Failure::Host
}
