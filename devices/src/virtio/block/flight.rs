//! Requests that the host executes while more are taken from the queue: `io_engine` Async.
//!
//! ```text
//!   begin ──► in flight ──► next: the driver gets its status
//!               │  ▲
//!               └──┘ short transfers
//! ```
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use super::QUEUE_SIZE;
use super::request::{Failure, HEADER_BYTES, STATUS_BYTES};
use crate::GuestRam;
use crate::sys::rw::{Full, IoSlices};
use crate::sys::uring::{Direction, Reserve, Uring};
use crate::virtio::chain::{Buffers, Chain, Fault};

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
    /// Make safe what was written.
    Flush,
}

/// A request in flight.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) kind: Kind,
    /// On the disk.
    pub(super) offset: u64,
    /// Of data.
    pub(super) bytes: u64,
    pub(super) begun: Instant,
    /// Where its data and its status belong.
    pub(super) buffers: Buffers,
}

/// Requests in flight, by their heads.
#[derive(Debug)]
pub(super) struct Flight {
    ring: Uring,
    requests: Vec<Option<Request>>,
    /// Of data, of all of them.
    bytes: u64,
    /// Storage of requests that have ended, for the next ones.
    spare: Vec<Buffers>,
}

impl Flight {
    /// Of nothing yet, by the ring in `reserve` over memory in `mem`.
    pub(super) fn new(reserve: &Reserve, mem: GuestRam) -> std::io::Result<Self> {
        let ring = Uring::new(reserve, mem)?;
        let requests = (0..QUEUE_SIZE).map(|_| None).collect();
        Ok(Self { ring, requests, bytes: 0, spare: Vec::new() })
    }

    /// The ring: its event, its waiting.
    pub(super) fn ring(&mut self) -> &mut Uring {
        &mut self.ring
    }

    /// Readable when a request has ended.
    pub(super) fn event(&self) -> &vmm_sys_util::eventfd::EventFd {
        self.ring.event()
    }

    /// Bytes of data in flight.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Begins the request in `chain`, which was found to be in order.
    pub(super) fn begin(
        &mut self,
        chain: &Chain<'_>,
        kind: Kind,
        file: &Arc<File>,
        offset: u64,
        bytes: u64,
    ) -> Result<(), Failure> {
        let head = chain.head();
        let place = self.requests.get_mut(usize::from(head)).ok_or(Failure::Invalid)?;
        let mut buffers = self.spare.pop().unwrap_or_default();
        buffers.copy(chain.buffers());
        let begun = match kind {
            Kind::Flush => self.ring.sync(head, file).map_err(Unfit::from),
            Kind::Read => self.ring.transfer(head, Direction::Read, file, offset, |mem, slices| {
                gather_input(&buffers, mem, slices)
            }),
            Kind::Write => {
                self.ring.transfer(head, Direction::Write, file, offset, |mem, slices| {
                    gather_output(&buffers, mem, slices)
                })
            }
        };
        match begun {
            Ok(()) => {
                self.bytes = self.bytes.saturating_add(bytes);
                *place = Some(Request { kind, offset, bytes, begun: Instant::now(), buffers });
                Ok(())
            }
            Err(Unfit) => {
                self.spare.push(buffers);
                Err(Failure::Invalid)
            }
        }
    }

    /// The next request that has ended: its head, and how it went.
    pub(super) fn next(&mut self) -> Option<(u16, Request, std::io::Result<()>)> {
        loop {
            let ended = self.ring.next_ended()?;
            let place = self.requests.get_mut(usize::from(ended.token));
            if let Some(request) = place.and_then(Option::take) {
                self.bytes = self.bytes.saturating_sub(request.bytes);
                return Some((ended.token, request, ended.result));
            }
        }
    }

    /// Keeps the storage of a request that has ended.
    pub(super) fn recycle(&mut self, mut request: Request) {
        request.buffers.clear();
        self.spare.push(request.buffers);
    }
}

/// What a request's memory is when it cannot be transferred: not RAM, or in too many pieces.
struct Unfit;

impl From<Full> for Unfit {
    fn from(_: Full) -> Self {
        Self
    }
}

impl From<Fault> for Unfit {
    fn from(_: Fault) -> Self {
        Self
    }
}

/// Where a read goes: all that may be written but the status.
fn gather_input<'m>(
    buffers: &Buffers,
    mem: &'m GuestRam,
    slices: &mut IoSlices<'m>,
) -> Result<(), Unfit> {
    let mut result = Ok(());
    buffers.pieces_to_write(mem, STATUS_BYTES, |slice| {
        result = result.and_then(|()| slices.push_writable(&slice));
    })?;
    Ok(result?)
}

/// Where a write comes from: all that may be read but the header.
fn gather_output<'m>(
    buffers: &Buffers,
    mem: &'m GuestRam,
    slices: &mut IoSlices<'m>,
) -> Result<(), Unfit> {
    let mut result = Ok(());
    buffers.pieces_to_read(mem, HEADER_BYTES, |slice| {
        result = result.and_then(|()| slices.push(&slice));
    })?;
    Ok(result?)
}
