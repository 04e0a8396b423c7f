//! Requests of the driver (virtio 1.2, 5.15.6): plug, unplug, unplug all, state.
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::EventSet;
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
/// what it uses. Whoever wants the worker back waits for the request in progress, not for all; and not
/// for all of one that unplugs everything, which is done step by step.
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
    /// How long the next request has taken so far, if it has begun to unplug everything.
    pub(super) unplugging: Option<Duration>,
}

impl Worker for MemWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        vec![(self.requests.kick_fd(), EventSet::IN)]
    }

    fn ready(&mut self, _source: usize) -> Watch {
        let Self { requests, shared, counters, unplugging } = self;
        counters.queue_event_count().inc();
        let blocks = shared.blocks();
        let Some(blocks) = blocks.as_ref() else { return Watch::Keep };
        let started = Instant::now();
        let mut executor = Executor { shared, blocks, counters, started, unplugging };
        let mut is_more_left = false;
        requests.serve(|chain| {
            is_more_left = executor.is_late();
            if is_more_left {
                return Served::Later;
            }
            match executor.serve(&chain) {
                Ok(Some(written)) => Served::Used(written),
                Ok(None) => {
                    is_more_left = true;
                    Served::Later
                }
                Err(Fault) => {
                    counters.queue_event_fails().inc();
                    Served::Used(0)
                }
            }
        });
        if is_more_left {
            requests.kick_again();
        }
        Watch::Keep
    }

    fn retire(self: Box<Self>) -> Retired {
        let micros = |spent: Duration| u64::try_from(spent.as_micros()).unwrap_or(u64::MAX);
        let state = self.unplugging.map(micros).into();
        Retired { queues: vec![self.requests], state }
    }
}

struct Executor<'a> {
    shared: &'a Shared,
    blocks: &'a Blocks,
    counters: &'a Counters,
    /// When the turn began.
    started: Instant,
    unplugging: &'a mut Option<Duration>,
}

impl Executor<'_> {
    fn is_late(&self) -> bool {
        self.started.elapsed() >= TURN
    }

    /// Serves one request; the bytes written to the driver's buffers. `None` if it is to be served again
    /// to go on.
    fn serve(&mut self, chain: &Chain<'_>) -> Result<Option<u32>, Fault> {
        // Whatever is there now: the driver may have changed its mind.
        let begun = self.unplugging.take();
        let mut output = chain.writable();
        if chain.is_mixed() || output.len() < RESPONSE_LEN.into() {
            return Err(Fault);
        }
        let request = chain.readable().read_obj::<Request>()?;
        let Some(answer) = self.execute(&request, begun) else { return Ok(None) };
        output.write_obj(answer.response())?;
        Ok(Some(RESPONSE_LEN))
    }

    /// `begun`: how long the request has taken so far, if it is one to unplug everything that goes on.
    /// `None` if it is to go on again.
    fn execute(&mut self, request: &Request, begun: Option<Duration>) -> Option<Answer> {
        let c = self.counters;
        let kind = request.kind.to_native();
        let begun = begun.filter(|_| kind == kind::UNPLUG_ALL);
        let (count, agg, fails) = match kind {
            kind::PLUG => (c.plug_count(), c.plug_agg(), c.plug_fails()),
            kind::UNPLUG => (c.unplug_count(), c.unplug_agg(), c.unplug_fails()),
            kind::UNPLUG_ALL => (c.unplug_all_count(), c.unplug_all_agg(), c.unplug_all_fails()),
            kind::STATE => (c.state_count(), c.state_agg(), c.state_fails()),
            _ => {
                c.queue_event_fails().inc();
                return Some(Answer::Error);
            }
        };
        if begun.is_none() {
            count.inc();
        }
        let now = Instant::now();
        let since = begun.and_then(|spent| now.checked_sub(spent)).unwrap_or(now);
        let answer = match kind {
            kind::UNPLUG_ALL => self.unplug_all(),
            kind => Some(match self.range(request) {
                None => Answer::Error,
                Some(range) if kind == kind::STATE => self.state(range),
                Some(range) if kind == kind::PLUG => self.plug(range),
                Some(range) => self.unplug_at_once(range),
            }),
        };
        match answer {
            None => *self.unplugging = Some(since.elapsed()),
            Some(answer) => {
                agg.since(since);
                if !answer.is_granted() {
                    fails.inc();
                }
            }
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
        if self.blocks.are_too_many(&range) {
            return Answer::Busy;
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

    fn unplug_at_once(&self, range: Range<u64>) -> Answer {
        let count = range.end.saturating_sub(range.start);
        if self.blocks.count(range.clone()) != count {
            return Answer::Error;
        }
        match self.blocks.are_too_many(&range) {
            true => Answer::Busy,
            false => self.unplug(range),
        }
    }

    /// Unplugs what is plugged.
    fn unplug(&self, range: Range<u64>) -> Answer {
        let count = range.end.saturating_sub(range.start);
        match self.blocks.unplug(range) {
            Unplugged::InUse | Unplugged::Refused => return Answer::Busy,
            Unplugged::Kept => self.counters.unplug_discard_fails().inc(),
            Unplugged::Freed => {}
        }
        let len = self.bytes(count);
        self.counters.unplug_bytes().add(len);
        let mut sizes = self.shared.sizes();
        sizes.plugged = sizes.plugged.saturating_sub(len);
        Answer::Ack
    }

    /// Goes on until the turn is over, but for one step at least: `None` if more is left. What has been
    /// unplugged stays so.
    fn unplug_all(&self) -> Option<Answer> {
        let mut is_begun = false;
        for (first, count) in self.blocks.runs() {
            let mut run = first..first.saturating_add(count);
            while !run.is_empty() {
                if is_begun && self.is_late() {
                    return None;
                }
                is_begun = true;
                let step = self.blocks.step(run.clone());
                run.start = step.end;
                let answer = self.unplug(step);
                if answer != Answer::Ack {
                    return Some(answer);
                }
            }
        }
        let mut sizes = self.shared.sizes();
        sizes.usable = self.shared.usable_for(sizes.requested);
        Some(Answer::Ack)
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
