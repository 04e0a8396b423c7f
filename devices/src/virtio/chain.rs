//! Descriptor chains (virtio 1.2, 2.7.5) and the bytes behind them.
//!
//! A chain is walked once, every descriptor is read once, and what was read is checked and kept:
//! a driver that rewrites its descriptors meanwhile changes nothing. Where the buffers lie is not
//! judged here; an access to a buffer that is not RAM fails when it is made ([`Fault`]).
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend};

use crate::{GuestRam, GuestSlice};

/// Most buffers in one chain. What an indirect table may hold beyond the queue size is bounded by
/// what one `preadv` takes.
pub const MAX_BUFFERS: usize = 1024;

const DESCRIPTOR_SIZE: u32 = 16;
/// Descriptor flags (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor as it lies in guest memory (virtio 1.2, 2.7.5).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[expect(unsafe_code, reason = "plain data read from guest memory")]
// SAFETY: four integers without padding; every bit pattern is a value.
unsafe impl ByteValued for Descriptor {}

/// Part of guest memory that one descriptor names. Not checked to be RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// First byte.
    pub addr: GuestAddress,
    /// Length in bytes; may be 0.
    pub len: u32,
}

/// Why a chain cannot be followed. The ring is then in no state to be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The descriptor table is not in RAM.
    #[error("a descriptor table is not in guest memory")]
    Table,
    /// A descriptor index is not below the table size.
    #[error("descriptor index {index} is not below {size}")]
    Index {
        /// The index.
        index: u16,
        /// Entries in the table.
        size: u32,
    },
    /// More descriptors than the table has, or than a chain may have: a loop.
    #[error("a chain is a loop or longer than {0} descriptors")]
    TooLong(u32),
    /// An indirect table that is empty, ragged, nested, mixed with NEXT, or not negotiated.
    #[error("an indirect descriptor is not allowed here or has a bad table length {0}")]
    Indirect(u32),
    /// More than 2^32 bytes in total.
    #[error("a chain describes more than 4 GiB")]
    TooBig,
}

/// How many buffers storage is kept for between chains: no driver's request has more, but one of a thousand would cost
/// as many bytes as all the others, for each chain that a device holds.
const KEPT: usize = 128;

/// The buffers of a chain, device-readable and device-writable apart; those without a byte are left out. Reused between
/// chains, so that serving a request allocates nothing.
#[derive(Debug, Default)]
pub struct Buffers {
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
    /// Whether one of them, be it without a byte, was writable.
    has_writable: bool,
    mixed: bool,
    bytes: u32,
}

impl Buffers {
    /// Forgets everything, keeps the storage that is of use for other chains.
    pub fn clear(&mut self) {
        for buffers in [&mut self.readable, &mut self.writable] {
            buffers.clear();
            buffers.shrink_to(KEPT);
        }
        self.has_writable = false;
        self.mixed = false;
        self.bytes = 0;
    }

    /// What the device may read.
    pub fn readable<'a>(&'a self, mem: &'a GuestRam) -> Readable<'a> {
        Readable(Span::new(mem, &self.readable))
    }

    /// What the device may write.
    pub fn writable<'a>(&'a self, mem: &'a GuestRam) -> Writable<'a> {
        Writable(Span::new(mem, &self.writable))
    }

    /// Calls `f` with each piece of memory behind what the device may read, from `skip` bytes on, for
    /// use by system calls only. The pieces, unlike those of [`Self::readable`], may outlive the
    /// buffers.
    pub(super) fn pieces_to_read<'m>(
        &self,
        mem: &'m GuestRam,
        skip: u64,
        f: impl FnMut(GuestSlice<'m>),
    ) -> Result<(), Fault> {
        let mut rest = Span::new(mem, &self.readable);
        rest.take(skip)?;
        rest.for_syscalls_on(mem, f)
    }

    /// The same with what the device may write, but for the last `tail` bytes.
    pub(super) fn pieces_to_write<'m>(
        &self,
        mem: &'m GuestRam,
        tail: u64,
        f: impl FnMut(GuestSlice<'m>),
    ) -> Result<(), Fault> {
        let mut all = Span::new(mem, &self.writable);
        let data = all.take(all.len.checked_sub(tail).ok_or(Fault)?)?;
        data.for_syscalls_on(mem, f)
    }

    /// Takes over what `other` has.
    pub(super) fn copy(&mut self, other: &Self) {
        self.readable.clone_from(&other.readable);
        self.writable.clone_from(&other.writable);
        self.has_writable = other.has_writable;
        self.mixed = other.mixed;
        self.bytes = other.bytes;
    }

    /// Appends the chain that starts at `head` of `table` with `size` entries.
    pub(super) fn walk(
        &mut self,
        mem: &GuestRam,
        table: GuestAddress,
        size: u16,
        head: u16,
        is_indirect_allowed: bool,
    ) -> Result<(), ChainError> {
        let mut table = Table { addr: table, size: size.into(), is_indirect: !is_indirect_allowed };
        let mut index = head;
        let mut left = u32::from(size);
        loop {
            left = left.checked_sub(1).ok_or(ChainError::TooLong(table.size))?;
            let desc = table.read(mem, index)?;
            if desc.flags & INDIRECT != 0 {
                table = table.enter(&desc)?;
                left = table.size;
                index = 0;
                continue;
            }
            self.push(&desc)?;
            if desc.flags & NEXT == 0 {
                return Ok(());
            }
            index = desc.next;
        }
    }

    fn push(&mut self, desc: &Descriptor) -> Result<(), ChainError> {
        self.bytes = self.bytes.checked_add(desc.len).ok_or(ChainError::TooBig)?;
        let buffer = Buffer { addr: GuestAddress(desc.addr), len: desc.len };
        let is_writable = desc.flags & WRITE != 0;
        self.mixed |= self.has_writable && !is_writable;
        self.has_writable |= is_writable;
        let buffers = if is_writable { &mut self.writable } else { &mut self.readable };
        if buffer.len > 0 {
            buffers.push(buffer);
        }
        Ok(())
    }
}

/// A descriptor table: the queue's own or an indirect one.
struct Table {
    addr: GuestAddress,
    size: u32,
    /// Whether a further indirect table is forbidden.
    is_indirect: bool,
}

impl Table {
    fn read(&self, mem: &GuestRam, index: u16) -> Result<Descriptor, ChainError> {
        if u32::from(index) >= self.size {
            return Err(ChainError::Index { index, size: self.size });
        }
        let offset = u64::from(index).wrapping_mul(u64::from(DESCRIPTOR_SIZE));
        let addr = self.addr.0.checked_add(offset).ok_or(ChainError::Table)?;
        mem.read_obj(GuestAddress(addr)).map_err(|_| ChainError::Table)
    }

    /// Virtio 1.2, 2.7.5.3.1: no table in a table, no NEXT beside INDIRECT.
    fn enter(&self, desc: &Descriptor) -> Result<Self, ChainError> {
        let size = desc.len / DESCRIPTOR_SIZE;
        let fits = size > 0 && size as usize <= MAX_BUFFERS;
        if self.is_indirect
            || desc.flags & NEXT != 0
            || !desc.len.is_multiple_of(DESCRIPTOR_SIZE)
            || !fits
        {
            return Err(ChainError::Indirect(desc.len));
        }
        Ok(Self { addr: GuestAddress(desc.addr), size, is_indirect: true })
    }
}

/// A buffer of the driver is not RAM, or is shorter than what was asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a buffer is not in guest memory or too short")]
pub struct Fault;

/// A request: the chain that starts at one head.
#[derive(Debug)]
pub struct Chain<'a> {
    pub(super) mem: &'a GuestRam,
    pub(super) buffers: &'a Buffers,
    pub(super) head: u16,
}

impl<'a> Chain<'a> {
    /// The head, by which the chain is completed.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read.
    pub fn readable(&self) -> Readable<'a> {
        self.buffers.readable(self.mem)
    }

    /// What the device may write.
    pub fn writable(&self) -> Writable<'a> {
        self.buffers.writable(self.mem)
    }

    /// Where its data lies, to be kept beyond the serving of the queue.
    pub(super) fn buffers(&self) -> &Buffers {
        self.buffers
    }

    /// Whether a readable buffer follows a writable one, which no driver may do (2.7.4.2).
    pub fn is_mixed(&self) -> bool {
        self.buffers.mixed
    }
}

/// A cursor over device-readable bytes.
#[derive(Clone, Debug)]
pub struct Readable<'a>(Span<'a>);

impl<'a> Readable<'a> {
    /// Bytes left.
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Reads the next `T`.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Result<T, Fault> {
        let mut value = T::default();
        self.read(value.as_mut_slice())?;
        Ok(value)
    }

    /// Fills `to` from the next bytes.
    pub fn read(&mut self, to: &mut [u8]) -> Result<(), Fault> {
        let mut rest = to;
        let len = rest.len() as u64;
        self.0.take(len)?.for_each(|slice| {
            let n = slice.copy_to(rest);
            rest = std::mem::take(&mut rest).get_mut(n..).unwrap_or_default();
        })
    }

    /// Cuts off the next `len` bytes.
    pub fn take(&mut self, len: u64) -> Result<Readable<'a>, Fault> {
        self.0.take(len).map(Readable)
    }

    /// Calls `f` with each piece of host memory behind the bytes left, in order.
    pub fn for_each(&self, f: impl FnMut(GuestSlice<'a>)) -> Result<(), Fault> {
        self.0.for_each(f)
    }

    /// The same for pieces that are handed to system calls and not touched otherwise: they may be
    /// files ([`GuestRam::for_syscalls`]).
    pub fn for_syscalls(&self, f: impl FnMut(GuestSlice<'a>)) -> Result<(), Fault> {
        self.0.for_syscalls(f)
    }
}

/// A cursor over device-writable bytes.
#[derive(Clone, Debug)]
pub struct Writable<'a>(Span<'a>);

impl<'a> Writable<'a> {
    /// Bytes left.
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Writes `value`.
    pub fn write_obj<T: ByteValued>(&mut self, value: T) -> Result<(), Fault> {
        self.write(value.as_slice())
    }

    /// Writes all of `from`.
    pub fn write(&mut self, from: &[u8]) -> Result<(), Fault> {
        let mut rest = from;
        self.0.take(from.len() as u64)?.for_each(|slice| {
            let n = slice.len().min(rest.len());
            slice.copy_from(rest.get(..n).unwrap_or_default());
            rest = rest.get(n..).unwrap_or_default();
        })
    }

    /// Cuts off the next `len` bytes.
    pub fn take(&mut self, len: u64) -> Result<Writable<'a>, Fault> {
        self.0.take(len).map(Writable)
    }

    /// Where the bytes left are, in order, for a device to which that is what matters. Not checked to
    /// be RAM.
    pub fn buffers(&self) -> impl Iterator<Item = Buffer> + use<'a> {
        self.0.buffers()
    }

    /// Calls `f` with each piece of host memory behind the bytes left, in order.
    pub fn for_each(&self, f: impl FnMut(GuestSlice<'a>)) -> Result<(), Fault> {
        self.0.for_each(f)
    }

    /// The same for pieces that are handed to system calls and not touched otherwise: they may be
    /// files ([`GuestRam::for_syscalls`]).
    pub fn for_syscalls(&self, f: impl FnMut(GuestSlice<'a>)) -> Result<(), Fault> {
        self.0.for_syscalls(f)
    }
}

/// `len` bytes of `buffers`, from `skip` bytes into the first.
#[derive(Clone, Debug)]
struct Span<'a> {
    mem: &'a GuestRam,
    buffers: &'a [Buffer],
    skip: u32,
    len: u64,
}

impl<'a> Span<'a> {
    fn new(mem: &'a GuestRam, buffers: &'a [Buffer]) -> Self {
        // The total is below 2^32: `push` counts.
        let len = buffers.iter().map(|b| u64::from(b.len)).fold(0, u64::wrapping_add);
        Self { mem, buffers, skip: 0, len }
    }

    fn take(&mut self, len: u64) -> Result<Self, Fault> {
        let rest = self.len.checked_sub(len).ok_or(Fault)?;
        let taken = Self { len, ..self.clone() };
        let mut left = len;
        while left > 0 {
            let (first, tail) = self.buffers.split_first().ok_or(Fault)?;
            let here = first.len.saturating_sub(self.skip);
            if u64::from(here) > left {
                self.skip = self.skip.wrapping_add(u32::try_from(left).map_err(|_| Fault)?);
                break;
            }
            left = left.saturating_sub(here.into());
            self.buffers = tail;
            self.skip = 0;
        }
        self.len = rest;
        Ok(taken)
    }

    fn buffers(&self) -> impl Iterator<Item = Buffer> + use<'a> {
        let mut left = self.len;
        let mut skip = self.skip;
        self.buffers.iter().map_while(move |buffer| {
            let here = u64::from(buffer.len.saturating_sub(skip)).min(left);
            // One that wraps around is no RAM wherever it is said to be.
            let addr = GuestAddress(buffer.addr.0.saturating_add(skip.into()));
            let part = Buffer { addr, len: u32::try_from(here).ok()? };
            let is_in = left > 0;
            left = left.saturating_sub(here);
            skip = 0;
            is_in.then_some(part)
        })
    }

    fn for_each(&self, mut f: impl FnMut(GuestSlice<'a>)) -> Result<(), Fault> {
        self.each_buffer(|start, count| {
            self.mem.get_slices(start, count).try_for_each(|slice| {
                f(slice.map_err(|_| Fault)?);
                Ok(())
            })
        })
    }

    fn for_syscalls(&self, f: impl FnMut(GuestSlice<'a>)) -> Result<(), Fault> {
        self.for_syscalls_on(self.mem, f)
    }

    /// The same with memory that may outlive the buffers.
    fn for_syscalls_on<'m>(
        &self,
        mem: &'m GuestRam,
        mut f: impl FnMut(GuestSlice<'m>),
    ) -> Result<(), Fault> {
        self.each_buffer(|start, count| mem.for_syscalls(start, count, &mut f).ok_or(Fault))
    }

    /// Calls `f` with start and length of each buffer, or of what is left of it.
    fn each_buffer(
        &self,
        mut f: impl FnMut(GuestAddress, usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut left = self.len;
        let mut skip = self.skip;
        for buffer in self.buffers {
            if left == 0 {
                break;
            }
            let here = u64::from(buffer.len.saturating_sub(skip)).min(left);
            let start = buffer.addr.0.checked_add(skip.into()).ok_or(Fault)?;
            let count = usize::try_from(here).map_err(|_| Fault)?;
            f(GuestAddress(start), count)?;
            left = left.saturating_sub(here);
            skip = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desc(len: u32, flags: u16) -> Descriptor {
        Descriptor { addr: 0, len, flags, next: 0 }
    }

    #[test]
    fn buffers_without_a_byte_are_left_out_and_long_chains_forgotten() {
        let mut buffers = Buffers::default();
        for (len, flags) in [(0, 0), (8, 0), (0, WRITE), (8, WRITE)] {
            buffers.push(&desc(len, flags)).unwrap();
        }
        assert_eq!((buffers.readable.len(), buffers.writable.len(), buffers.mixed), (1, 1, false));
        // Where they are in a chain matters all the same.
        buffers.push(&desc(0, 0)).unwrap();
        assert!(buffers.mixed);
        buffers.clear();
        buffers.push(&desc(0, WRITE)).unwrap();
        buffers.push(&desc(1, 0)).unwrap();
        assert!(buffers.mixed);
        for _ in 0..MAX_BUFFERS {
            buffers.push(&desc(1, 0)).unwrap();
        }
        buffers.clear();
        assert!(buffers.readable.capacity() < 2 * KEPT && !buffers.mixed);
    }
}
