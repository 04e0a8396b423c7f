//! Requests of the driver (virtio 1.2, 5.15.6): plug, unplug, unplug all, state.
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::EventSet;
use serde_json::Value;
use vm_memory::{ByteValued, Le16, Le64};

use super::blocks::{Blocks, Unplugged};
use super::{Counters, Shared};
use crate::io::{Retired, Source, Watch, Worker};
use crate::virtio::chain::{Chain, Fault};
use crate::virtio::queue::{Served, VirtQueue};

/// Request types.
mod kind {
    pub(super) const PLUG: u16 = 0;
    pub(super) const UNPLUG: u16 = 1;
    pub(super) const UNPLUG_ALL: u16 = 2;
    pub(super) const STATE: u16 = 3;
}

/// `struct virtio_mem_req`: the same for every type.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Request {
    kind: Le16,
    padding: [Le16; 3],
    addr: Le64,
    blocks: Le16,
    more_padding: [Le16; 3],
}

#[expect(unsafe_code, reason = "plain data read from guest memory")]
// SAFETY: integers without padding; every bit pattern is a value.
unsafe impl ByteValued for Request {}

/// `struct virtio_mem_resp`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Response {
    kind: Le16,
    padding: [Le16; 3],
    state: Le16,
}

#[expect(unsafe_code, reason = "plain data written to guest memory")]
// SAFETY: integers without padding; every bit pattern is a value.
unsafe impl ByteValued for Response {}

/// Bytes of a [`Response`].
const RESPONSE_LEN: u32 = 10;
/// When a turn ends: KVM takes milliseconds to show a slot, and a device may take its time to give up
/// what it uses. Whoever wants the worker back waits for the request in progress, not for all.
const TURN: Duration = Duration::from_millis(20);

/// What the driver is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Ack,
    /// Of a state: plugged, unplugged or mixed.
    State(u16),
    /// Not granted: it would be more than is requested.
    Nack,
    /// Not now: the host has no memory, or a device uses what is to go.
    Busy,
    /// No such blocks, or not in the state in which that can be asked.
    Error,
}

impl Answer {
    fn response(self) -> Response {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::State(state) => (0, state),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        Response { kind: kind.into(), padding: Default::default(), state: state.into() }
    }

    fn is_granted(self) -> bool {
        matches!(self, Self::Ack | Self::State(_))
    }
}

/// The data half.
#[derive(Debug)]
pub(super) struct MemWorker {
    pub(super) requests: VirtQueue,
    pub(super) shared: Arc<Shared>,
    pub(super) counters: Arc<Counters>,
}

impl Worker for MemWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        vec![(self.requests.kick_fd(), EventSet::IN)]
    }

    fn ready(&mut self, _source: usize) -> Watch {
        let Self { requests, shared, counters } = self;
        counters.queue_event_count().inc();
        let blocks = shared.blocks();
        let Some(blocks) = blocks.as_ref() else { return Watch::Keep };
        let executor = Executor { shared, blocks, counters };
        let started = Instant::now();
        let mut is_more_left = false;
        requests.serve(|chain| {
            is_more_left = started.elapsed() >= TURN;
            if is_more_left {
                return Served::Later;
            }
            let written = executor.serve(&chain);
            if written.is_err() {
                counters.queue_event_fails().inc();
            }
            Served::Used(written.unwrap_or(0))
        });
        if is_more_left {
            requests.kick_again();
        }
        Watch::Keep
    }

    fn retire(self: Box<Self>) -> Retired {
        Retired { queues: vec![self.requests], state: Value::Null }
    }
}

struct Executor<'a> {
    shared: &'a Shared,
    blocks: &'a Blocks,
    counters: &'a Counters,
}

impl Executor<'_> {
    /// Serves one request; the bytes written to the driver's buffers.
    fn serve(&self, chain: &Chain<'_>) -> Result<u32, Fault> {
        let mut output = chain.writable();
        if chain.is_mixed() || output.len() < RESPONSE_LEN.into() {
            return Err(Fault);
        }
        let request = chain.readable().read_obj::<Request>()?;
        output.write_obj(self.execute(&request).response())?;
        Ok(RESPONSE_LEN)
    }

    fn execute(&self, request: &Request) -> Answer {
        let c = self.counters;
        let (count, agg, fails) = match request.kind.to_native() {
            kind::PLUG => (c.plug_count(), c.plug_agg(), c.plug_fails()),
            kind::UNPLUG => (c.unplug_count(), c.unplug_agg(), c.unplug_fails()),
            kind::UNPLUG_ALL => (c.unplug_all_count(), c.unplug_all_agg(), c.unplug_all_fails()),
            kind::STATE => (c.state_count(), c.state_agg(), c.state_fails()),
            _ => {
                c.queue_event_fails().inc();
                return Answer::Error;
            }
        };
        count.inc();
        let answer = agg.time(|| match request.kind.to_native() {
            kind::UNPLUG_ALL => self.unplug_all(),
            kind => match self.range(request) {
                None => Answer::Error,
                Some(range) if kind == kind::PLUG => self.plug(range),
                Some(range) if kind == kind::UNPLUG => self.unplug(range),
                Some(range) => self.state(range),
            },
        });
        if !answer.is_granted() {
            fails.inc();
        }
        answer
    }

    /// The blocks that a request is about, if there are such: one at least, within what is usable.
    fn range(&self, request: &Request) -> Option<Range<u64>> {
        let block = self.shared.geometry.block;
        let offset = request.addr.to_native().checked_sub(self.blocks.start())?;
        let count = u64::from(request.blocks.to_native());
        let end = offset.checked_add(count.checked_mul(block)?)?;
        let is_good = count > 0
            && request.addr.to_native().is_multiple_of(block)
            && offset.is_multiple_of(block)
            && end <= self.shared.sizes().usable;
        let first = offset.checked_div(block)?;
        is_good.then(|| first..first.saturating_add(count))
    }

    fn bytes(&self, count: u64) -> u64 {
        count.saturating_mul(self.shared.geometry.block)
    }

    fn plug(&self, range: Range<u64>) -> Answer {
        if self.blocks.count(range.clone()) > 0 {
            return Answer::Error;
        }
        let len = self.bytes(range.end.saturating_sub(range.start));
        let sizes = *self.shared.sizes();
        if sizes.plugged.saturating_add(len) > sizes.requested {
            return Answer::Nack;
        }
        if let Err(e) = self.blocks.plug(range) {
            log::warn!("memory hotplug: cannot plug {} MiB: {e}", len >> 20);
            return Answer::Busy;
        }
        self.counters.plug_bytes().add(len);
        let mut sizes = self.shared.sizes();
        sizes.plugged = sizes.plugged.saturating_add(len);
        Answer::Ack
    }

    fn unplug(&self, range: Range<u64>) -> Answer {
        let count = range.end.saturating_sub(range.start);
        if self.blocks.count(range.clone()) != count {
            return Answer::Error;
        }
        match self.blocks.unplug(range) {
            Unplugged::InUse => return Answer::Busy,
            Unplugged::Kept => self.counters.unplug_discard_fails().inc(),
            Unplugged::Freed => {}
        }
        let len = self.bytes(count);
        self.counters.unplug_bytes().add(len);
        let mut sizes = self.shared.sizes();
        sizes.plugged = sizes.plugged.saturating_sub(len);
        Answer::Ack
    }

    fn unplug_all(&self) -> Answer {
        for (first, count) in self.blocks.runs() {
            let answer = self.unplug(first..first.saturating_add(count));
            if answer != Answer::Ack {
                return answer;
            }
        }
        let mut sizes = self.shared.sizes();
        sizes.usable = self.shared.usable_for(sizes.requested);
        Answer::Ack
    }

    fn state(&self, range: Range<u64>) -> Answer {
        let count = range.end.saturating_sub(range.start);
        Answer::State(match self.blocks.count(range) {
            plugged if plugged == count => 0,
            0 => 1,
            _ => 2,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_long_as_the_specification_says() {
        assert_eq!((size_of::<Request>(), size_of::<Response>()), (24, 10));
    }
}
