//! One attack after another on a device: what became of each, and that it did nothing else.
//!
//! ```text
//!   up ──► attack ──► verdict, as expected? ──► red zones ──► quiet? ──► grown? ──► works after a reset?
//! ```
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::virtio::mmio::Saved;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::allocator;
use crate::driver::{Buf, F_INDIRECT, Machine, NEEDS_RESET, Ring};
use crate::kinds::{Kind, RESPONSE, UNTOUCHED};
use crate::samples::{Host, Sample, TempDir};
use crate::watch::{DEADLINE, Watchdog, assert_quiet, work_so_far};
use crate::zones::Zones;

/// Entries of the rings.
pub(crate) const SIZE: u16 = 16;
/// What an attack may make a device allocate at most, for a moment.
pub(crate) const ALLOWANCE: usize = 1 << 20;
/// What may be left of that after a reset.
const GROWTH_MAX: usize = 64 << 10;
/// Processor time that an attack may cost: it is bounded work, on a machine that may be slow.
const WORK_MAX: Duration = Duration::from_secs(5);
/// The same of many thousands.
const FLOOD_WORK_MAX: Duration = Duration::from_secs(30);

/// What becomes of an attack. The catalogue's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The access had no effect, or the one that the specification gives it.
    Rejected,
    /// The request was completed with an error in its response.
    IoErr,
    /// The chain came back with nothing written to it.
    Used0,
    /// The chain came back as of a request that is in order, which it may be for this device.
    Done,
    /// The device keeps the buffers until it has something for them.
    Held,
    /// The device asks for a reset, and its queues are dead until then.
    Latched,
    /// The connection was refused or ended.
    Rst,
    /// The device is as new, and nothing was written after its status read 0.
    Reset,
}

/// Whatever becomes of a chain whose ring is in order.
pub(crate) const ANY_END: &[Verdict] =
    &[Verdict::IoErr, Verdict::Used0, Verdict::Done, Verdict::Held];
/// The same, or the ring was ruined.
pub(crate) const ANY: &[Verdict] =
    &[Verdict::IoErr, Verdict::Used0, Verdict::Done, Verdict::Held, Verdict::Latched];
pub(crate) const LATCHED: &[Verdict] = &[Verdict::Latched];
pub(crate) const REJECTED: &[Verdict] = &[Verdict::Rejected];
pub(crate) const FAILED: &[Verdict] = &[Verdict::IoErr, Verdict::Used0];

type Attack = Box<dyn Fn(&mut Bench) -> Verdict>;

/// An attack, and what may become of it.
pub(crate) struct Case {
    /// `row_attack/device/queue`.
    pub(crate) name: String,
    expected: &'static [Verdict],
    attack: Attack,
    allowance: usize,
    work_max: Duration,
}

impl Case {
    /// On the device as a whole.
    pub(crate) fn on(
        kind: Kind,
        name: impl std::fmt::Display,
        expected: &'static [Verdict],
        attack: impl Fn(&mut Bench) -> Verdict + 'static,
    ) -> Self {
        let name = format!("{name}/{}", kind.name());
        Self::named(name, expected, Box::new(attack))
    }

    /// On one of its queues.
    pub(crate) fn on_queue(
        kind: Kind,
        queue: usize,
        name: impl std::fmt::Display,
        expected: &'static [Verdict],
        attack: impl Fn(&mut Bench) -> Verdict + 'static,
    ) -> Self {
        let name = format!("{name}/{}/{}", kind.name(), kind.queues()[queue]);
        Self::named(name, expected, Box::new(attack))
    }

    fn named(name: String, expected: &'static [Verdict], attack: Attack) -> Self {
        Self { name, expected, attack, allowance: ALLOWANCE, work_max: WORK_MAX }
    }

    /// What it may allocate.
    pub(crate) fn allowing(self, allowance: usize) -> Self {
        Self { allowance, ..self }
    }

    /// It is very many.
    pub(crate) fn flooding(self) -> Self {
        Self { work_max: FLOOD_WORK_MAX, ..self }
    }
}

/// A device under attack.
pub(crate) struct Bench {
    pub(crate) kind: Kind,
    pub(crate) m: Machine,
    pub(crate) host: Host,
    /// Where the host's sockets are, of vsock.
    pub(crate) directory: Option<TempDir>,
    pub(crate) rings: Vec<Ring>,
    /// Of each, the used index up to which it is known what became of chains.
    seen: Vec<u16>,
    /// Each tells whether a queue's doorbell has been rung and not heard.
    kicks: Vec<Epoll>,
    zones: Zones,
}

impl Bench {
    pub(crate) fn new(kind: Kind) -> Self {
        let mut bench = Self::made(kind, None);
        assert_eq!(usize::from(bench.m.queues()), kind.queues().len());
        bench.up();
        bench
    }

    /// Another device of the kind of `live`, with its rings, restored from what was saved of it. Paused.
    /// Its indices are at `at`.
    pub(crate) fn restored(live: &Self, saved: &Saved, at: u16) -> Self {
        let mut bench = Self::made(live.kind, Some(saved));
        let mem = &bench.m.mem;
        bench.rings = live.rings.iter().map(|ring| Ring::new(mem, ring.queue, ring.size)).collect();
        bench.seen = vec![at; bench.rings.len()];
        bench
    }

    fn made(kind: Kind, saved: Option<&Saved>) -> Self {
        let (Sample { device, host }, directory) = kind.open();
        let features = device.features();
        let (ram, zones) = Zones::new();
        let mut m = Machine::with(device, ram, saved).unwrap();
        m.always = features;
        if kind == Kind::Mem {
            // One block may be plugged.
            let patch = serde_json::json!({ "requested_size_mib": 2 });
            m.transport.lock().unwrap().update(None, &patch).unwrap();
        }
        let kicks = m.transport.lock().unwrap().kicks().iter().map(|kick| watch(kick)).collect();
        Self { kind, m, host, directory, rings: Vec::new(), seen: Vec::new(), kicks, zones }
    }

    /// Resets the device and brings it up with empty rings and all features but event indices.
    pub(crate) fn up(&mut self) {
        self.up_with(F_INDIRECT);
    }

    /// The same with these features of the ring.
    pub(crate) fn up_with(&mut self, features: u64) {
        self.rings = self.m.start(features);
        self.seen = vec![0; self.rings.len()];
    }

    pub(crate) fn ring(&mut self, queue: usize) -> &mut Ring {
        &mut self.rings[queue]
    }

    /// Bytes into guest memory.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.m.mem.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.m.mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// A request of `queue` that is in order, to be spoilt.
    pub(crate) fn honest(&self, queue: usize) -> Vec<Buf> {
        self.kind.honest(&self.m, queue)
    }

    /// Offers a chain, kicks, and sees what becomes of it.
    pub(crate) fn send(&mut self, queue: usize, buffers: &[Buf]) -> Verdict {
        self.rings[queue].add(buffers);
        self.kick_and_see(queue)
    }

    /// Kicks, and sees what becomes of the chain that was offered last.
    pub(crate) fn kick_and_see(&mut self, queue: usize) -> Verdict {
        // What was used before, not what is by now: a device that has just come up looks by itself.
        let before = self.seen[queue];
        self.m.kick(&self.rings[queue]);
        let end = Instant::now() + DEADLINE;
        loop {
            if self.is_latched() {
                return Verdict::Latched;
            }
            if self.rings[queue].used_idx() != before {
                self.seen[queue] = self.rings[queue].used_idx();
                return self.judge(queue);
            }
            if self.kind.holds(queue) && !self.is_kicked(queue) {
                // The event in progress, if there is one, is over after this.
                self.pause();
                let is_held = !self.is_latched() && self.rings[queue].used_idx() == before;
                self.resume();
                if is_held {
                    return Verdict::Held;
                }
            }
            assert!(Instant::now() < end, "nothing becomes of it");
            std::thread::yield_now();
        }
    }

    /// Offers a chain to a queue that holds it until something comes from the host, which is on its way.
    pub(crate) fn send_for_what_comes(&mut self, queue: usize, buffers: &[Buf]) -> Verdict {
        let verdict = self.send(queue, buffers);
        if verdict != Verdict::Held {
            return verdict;
        }
        let (before, end) = (self.seen[queue], Instant::now() + DEADLINE);
        while self.rings[queue].used_idx() == before {
            if self.is_latched() {
                return Verdict::Latched;
            }
            assert!(Instant::now() < end, "what comes is not handed over");
            std::thread::yield_now();
        }
        self.seen[queue] = self.rings[queue].used_idx();
        self.judge(queue)
    }

    /// Kicks a queue and waits until the device has looked at it.
    pub(crate) fn kick_and_settle(&self, queue: usize) {
        self.m.kick(&self.rings[queue]);
        self.settle();
    }

    /// Waits until the device has looked at all that was kicked.
    pub(crate) fn settle(&self) {
        let end = Instant::now() + DEADLINE;
        while (0..self.kicks.len()).any(|queue| self.is_kicked(queue)) && !self.is_latched() {
            assert!(Instant::now() < end, "it never stops");
            std::thread::yield_now();
        }
        self.pause();
        self.resume();
    }

    pub(crate) fn pause(&self) {
        self.m.transport.lock().unwrap().pause().unwrap();
    }

    pub(crate) fn resume(&self) {
        self.m.transport.lock().unwrap().resume().unwrap();
    }

    /// It says so by its status, by its interrupt status, and by an interrupt.
    pub(crate) fn is_latched(&self) -> bool {
        self.m.status() & NEEDS_RESET != 0 && self.m.get(0x60) & 2 != 0 && self.m.irq.counts().1 > 0
    }

    /// Waits for that.
    pub(crate) fn latched(&self) -> Verdict {
        self.m.wait_for_latch("a device that needs a reset");
        Verdict::Latched
    }

    fn is_kicked(&self, queue: usize) -> bool {
        let mut event = EpollEvent::default();
        self.kicks[queue].wait(0, std::slice::from_mut(&mut event)).unwrap() > 0
    }

    /// What the device said of the chain that it used last.
    fn judge(&self, queue: usize) -> Verdict {
        let ring = &self.rings[queue];
        let (_, len) = ring.used_entry(ring.used_idx().wrapping_sub(1));
        let response: [u8; 2] = self.read(RESPONSE);
        let has_response = self.kind.is_block() || matches!(self.kind, Kind::Mem | Kind::Pmem);
        match response[0] {
            _ if !has_response => {}
            UNTOUCHED => {}
            0 => return Verdict::Done,
            _ => return Verdict::IoErr,
        }
        if len == 0 { Verdict::Used0 } else { Verdict::Done }
    }

    /// The host's end of an interface's wire.
    pub(crate) fn peer(&self) -> &OwnedFd {
        self.host.peer.as_ref().unwrap()
    }

    fn run(&mut self, case: &Case) -> Verdict {
        self.up();
        let before = allocator::live();
        allocator::begin_peak();
        let work = work_so_far();
        let mut verdict = (case.attack)(self);
        // What came before the lie may have been done, and seen to be, a moment before the device found it out.
        if case.expected == [Verdict::Latched] && verdict != Verdict::Latched {
            verdict = self.latched();
        }
        let work = work_so_far().saturating_sub(work);
        let peak = allocator::peak().saturating_sub(before);
        self.zones.assert_untouched();
        assert!(case.expected.contains(&verdict), "{verdict:?}, want one of {:?}", case.expected);
        assert!(work < case.work_max, "it took {work:?} of processor time");
        assert!(peak <= case.allowance, "{peak} bytes were allocated at once");
        assert_quiet();
        self.works();
        self.zones.assert_untouched();
        let grown = allocator::live().saturating_sub(before);
        assert!(grown <= GROWTH_MAX, "{grown} bytes are left");
        verdict
    }
}

fn watch(kick: &EventFd) -> Epoll {
    let epoll = Epoll::new().unwrap();
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), event).unwrap();
    epoll
}

/// That no other test of this process runs: what is measured is the process.
pub(crate) struct Alone {
    _guard: MutexGuard<'static, ()>,
}

/// Waits until no other test of this process runs.
pub(crate) fn alone() -> Alone {
    static ALONE: Mutex<()> = Mutex::new(());
    Alone { _guard: ALONE.lock().unwrap_or_else(PoisonError::into_inner) }
}

/// Runs cases on one device and prints each with its verdict.
pub(crate) fn run(_alone: &Alone, kind: Kind, cases: &[Case]) {
    let watchdog = Watchdog::start();
    let mut bench = Bench::new(kind);
    bench.works();
    let descriptors = descriptors();
    let mut failures = Vec::new();
    let mut verdicts = Vec::with_capacity(cases.len());
    for case in cases {
        watchdog.begin(&case.name);
        let attempt = std::panic::AssertUnwindSafe(|| bench.run(case));
        match std::panic::catch_unwind(attempt) {
            Ok(verdict) => verdicts.push(verdict),
            Err(why) => {
                let text = why.downcast_ref::<String>().cloned();
                let text = text.or_else(|| why.downcast_ref::<&str>().map(|s| (*s).into()));
                failures.push(format!("{}: {}", case.name, text.unwrap_or_default()));
                break;
            }
        }
    }
    for (case, verdict) in cases.iter().zip(&verdicts) {
        println!("{}: {verdict:?}", case.name);
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(verdicts.len(), cases.len());
    assert_eq!(self::descriptors(), descriptors, "descriptors are left");
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
