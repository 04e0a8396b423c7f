//! Requests of the driver become calls on a [`Disk`], one after the other, straight between the file
//! and guest memory.
//!
//! A malformed request gets `IOERR` if its status byte can be reached, and comes back with nothing
//! written if not. It never stops the queue.
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::{Le32, Le64};

use super::flight::{Flight, Kind};
use super::{
    Counters, ID_BYTES, MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_REQUEST_BYTES,
    MAX_ZERO_SECTORS, MAX_ZERO_SEGMENTS, feature,
};
use crate::GuestRam;
use crate::backend::disk::{Disk, SECTOR_SIZE, Unmap};
use crate::limiter::Limiter;
use crate::sys::rw::IoSlices;
use crate::sys::uring::Direction;
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
    /// Requests that go on in the host, unless each is waited for.
    pub(super) flight: Option<Flight>,
    pub(super) counters: Arc<Counters>,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is done.
    Done {
        /// Bytes written to the driver's buffers.
        used: u32,
        /// What it cost, in bytes.
        cost: u64,
    },
    /// It goes on in the host, and [`Executor::ended`] gives it back.
    Begun {
        /// What it costs, in bytes.
        cost: u64,
    },
    /// A rate limit does not let it begin.
    Throttled,
}

/// Bytes of a request before its data: type, reserved, sector (virtio 1.2, 5.2.6).
pub(super) const HEADER_BYTES: u64 = 16;
/// Bytes after it: the status.
pub(super) const STATUS_BYTES: u64 = 1;

/// Status bytes of requests that failed (virtio 1.2, 5.2.6).
mod status {
    pub(super) const OK: u8 = 0;
    pub(super) const IOERR: u8 = 1;
    pub(super) const UNSUPP: u8 = 2;
}

impl Executor {
    /// Serves one request.
    pub(super) fn serve(&mut self, chain: &Chain<'_>) -> Outcome {
        let mut writable = chain.writable();
        let data = writable.len().checked_sub(1).and_then(|len| writable.take(len).ok());
        let Some(data) = data else {
            // Nowhere to put the status.
            self.counters.invalid_reqs_count().inc();
            return Outcome::Done { used: 0, cost: 0 };
        };
        let room = data.len();
        let result =
            if chain.is_mixed() { Err(Failure::Invalid) } else { self.execute(chain, data) };
        let (status, filled, cost) = match result {
            Ok(Step::Begun { cost }) => return Outcome::Begun { cost },
            Ok(Step::Done { filled, cost }) => (status::OK, filled, cost),
            Err(Failure::Throttled) => {
                self.counters.rate_limiter_throttled_events().inc();
                return Outcome::Throttled;
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
            return Outcome::Done { used: 0, cost };
        }
        Outcome::Done { used: used_len(filled, room), cost }
    }

    /// The next request that was begun and has ended: its head, and the bytes written to the
    /// driver's buffers. Its status is there already.
    pub(super) fn ended(&mut self, mem: &GuestRam) -> Option<(u16, u32)> {
        let flight = self.flight.as_mut()?;
        let (head, request, result) = flight.next()?;
        let result = match request.kind {
            Kind::Flush => self.disk.note_flush(result),
            Kind::Read | Kind::Write => result,
        };
        let (what, agg, count) = match request.kind {
            Kind::Read => ("read", Some(self.counters.read_agg()), self.counters.read_count()),
            Kind::Write => ("write", Some(self.counters.write_agg()), self.counters.write_count()),
            Kind::Flush => ("flush", None, self.counters.flush_count()),
        };
        if let Some(agg) = agg {
            agg.since(request.begun);
        }
        let mut writable = request.buffers.writable(mem);
        let room = writable.len().saturating_sub(STATUS_BYTES);
        let (status, filled) = match result {
            Ok(()) => {
                count.inc();
                match request.kind {
                    Kind::Read => self.counters.read_bytes().add(request.bytes),
                    Kind::Write => self.counters.write_bytes().add(request.bytes),
                    Kind::Flush => {}
                }
                (status::OK, if request.kind == Kind::Read { request.bytes } else { 0 })
            }
            Err(e) => {
                failed(what, request.offset, &e);
                self.counters.execute_fails().inc();
                (status::IOERR, 0)
            }
        };
        let is_told = writable.take(room).and_then(|_data| writable.write_obj(status)).is_ok();
        flight.recycle(request);
        Some((head, if is_told { used_len(filled, room) } else { 0 }))
    }

    /// Waits for what goes on in the host; whether it has all ended in time. What has is for
    /// [`Self::ended`].
    pub(super) fn has_settled(&mut self, deadline: Instant) -> bool {
        self.flight
            .as_mut()
            .is_none_or(|flight| flight.ring().submit().is_ok() && flight.ring().wait(deadline))
    }

    fn execute(&mut self, chain: &Chain<'_>, output: Writable<'_>) -> Result<Step, Failure> {
        let mut input = chain.readable();
        let request = input.read_obj::<Le32>()?.to_native();
        let _reserved = input.read_obj::<Le32>()?;
        let sector = input.read_obj::<Le64>()?.to_native();
        match request {
            kind::IN => self.read(chain, sector, &input, &output),
            kind::OUT => self.write(chain, sector, &input, &output),
            kind::FLUSH => self.flush(chain, &input, &output),
            kind::GET_ID => self.get_id(&input, output),
            kind::DISCARD | kind::WRITE_ZEROES => self.erase(request, input, &output),
            _ => Err(Failure::Unsupported),
        }
    }

    fn read(
        &mut self,
        chain: &Chain<'_>,
        sector: u64,
        input: &Readable<'_>,
        to: &Writable<'_>,
    ) -> Result<Step, Failure> {
        want(input.is_empty())?;
        let offset = self.offset(sector, to.len())?;
        if let Some(file) = self.file_for(Direction::Read, offset, to.len()) {
            return self.begin(chain, Kind::Read, &file, offset, to.len());
        }
        let mut slices = IoSlices::default();
        let mut result = Ok(());
        to.for_syscalls(|slice| result = result.and_then(|()| slices.push_writable(&slice)))?;
        result.map_err(|_| Failure::Invalid)?;
        self.admit(to.len())?;
        let read = || self.disk.read(&mut slices, offset);
        self.counters.read_agg().time(read).map_err(|e| failed("read", offset, &e))?;
        self.counters.read_count().inc();
        self.counters.read_bytes().add(to.len());
        Ok(Step::Done { filled: to.len(), cost: to.len() })
    }

    fn write(
        &mut self,
        chain: &Chain<'_>,
        sector: u64,
        from: &Readable<'_>,
        output: &Writable<'_>,
    ) -> Result<Step, Failure> {
        want(output.is_empty() && self.disk.is_writable())?;
        let offset = self.offset(sector, from.len())?;
        if let Some(file) = self.file_for(Direction::Write, offset, from.len()) {
            return self.begin(chain, Kind::Write, &file, offset, from.len());
        }
        let mut slices = IoSlices::default();
        let mut result = Ok(());
        from.for_syscalls(|slice| result = result.and_then(|()| slices.push(&slice)))?;
        result.map_err(|_| Failure::Invalid)?;
        self.admit(from.len())?;
        let write = || self.disk.write(&mut slices, offset);
        self.counters.write_agg().time(write).map_err(|e| failed("write", offset, &e))?;
        self.counters.write_count().inc();
        self.counters.write_bytes().add(from.len());
        Ok(Step::Done { filled: 0, cost: from.len() })
    }

    fn flush(
        &mut self,
        chain: &Chain<'_>,
        input: &Readable<'_>,
        output: &Writable<'_>,
    ) -> Result<Step, Failure> {
        self.negotiated(feature::FLUSH)?;
        want(input.is_empty() && output.is_empty())?;
        if self.flight.is_some()
            && let Some(file) = self.disk.file_to_flush().cloned()
        {
            return self.begin(chain, Kind::Flush, &file, 0, 0);
        }
        self.admit(0)?;
        self.disk.flush().map_err(|e| failed("flush", 0, &e))?;
        self.counters.flush_count().inc();
        Ok(Step::Done { filled: 0, cost: MAX_REQUEST_BYTES })
    }

    /// The file for a request that can go on in the host while others begin. What a layer is to have
    /// first, or what is in several layers, is waited for.
    fn file_for(&self, what: Direction, offset: u64, len: u64) -> Option<Arc<File>> {
        self.flight.as_ref()?;
        self.disk.file_for(what, offset, len)
    }

    /// Hands a request that is in order to the host. What it costs there is no other device's.
    fn begin(
        &mut self,
        chain: &Chain<'_>,
        kind: Kind,
        file: &Arc<File>,
        offset: u64,
        bytes: u64,
    ) -> Result<Step, Failure> {
        self.admit(bytes)?;
        let flight = self.flight.as_mut().ok_or(Failure::Host)?;
        flight.begin(chain, kind, file, offset, bytes)?;
        Ok(Step::Begun { cost: bytes })
    }

    fn get_id(&self, input: &Readable<'_>, mut to: Writable<'_>) -> Result<Step, Failure> {
        want(input.is_empty())?;
        self.admit(0)?;
        to.write(&self.id)?;
        Ok(Step::Done { filled: ID_BYTES as u64, cost: 0 })
    }

    /// DISCARD and WRITE_ZEROES: the data is a list of ranges. All are checked before the first has
    /// effect.
    fn erase(
        &self,
        request: u32,
        mut input: Readable<'_>,
        output: &Writable<'_>,
    ) -> Result<Step, Failure> {
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
        Ok(Step::Done { filled: 0, cost: MAX_REQUEST_BYTES })
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

/// How far a request has come that is in order.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// It succeeded: data bytes given to the driver, and its share of the budget.
    Done { filled: u64, cost: u64 },
    /// The host has it, with its share of the budget.
    Begun { cost: u64 },
}

/// The used length covers what was written from the start on without a gap: `filled` bytes of data,
/// and if these are all there is room for, the status.
fn used_len(filled: u64, room: u64) -> u32 {
    let used = if filled == room { filled.saturating_add(STATUS_BYTES) } else { filled };
    u32::try_from(used).unwrap_or(u32::MAX)
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
pub(super) enum Failure {
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
