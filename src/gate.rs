//! Where vCPU threads wait until they may run: one gate for all vCPUs of a VM.
//!
//! A gate also knows of the moment at which a VM is copied best: when its guest has been told to look at
//! the generation id and is about to. Every copy then goes on with that look, finds another id, and
//! mixes it into its random numbers before it does anything else.
//!
//! ```text
//!   of the VM that is copied         All ──await_look──► Awaited ──a vCPU looks──► Caught
//!                                     ▲                     │ the time is up         │ run
//!                                     └─────────────────────┴────────────────────────┘
//!   of the copy                      Alone ──that vCPU looks──► Alone ──it looks again──► All
//!                                      └────────────────────────────┴─ the time is up ──►
//! ```
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::todo)]
use std::ops::ControlFlow;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use devices::sync::{Condvar, Mutex, MutexGuard};
use kvm_bindings::kvm_regs;

/// How long the other vCPUs of a copy wait for the one that has the new id first.
const ALONE_MAX: Duration = Duration::from_millis(250);

/// What the vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Run,
    Park,
    Stop,
}

/// Which of the vCPUs may run when all are to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Turn {
    All,
    /// All, until one looks at the generation id.
    Awaited,
    /// All but this, which has looked; its registers are those from before the look.
    Caught(u8, kvm_regs),
    /// Only this, which stands before the look, or `has_looked` and is not done with what it saw.
    Alone {
        vcpu: u8,
        has_looked: bool,
        until: Option<Instant>,
    },
}

#[derive(Debug)]
struct GateState {
    target: Target,
    turn: Turn,
    /// Threads that run, or are on their way to.
    running: usize,
}

/// Moves all vCPUs of a VM between states, and waits until they are there.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

impl Gate {
    /// A gate whose vCPUs are parked. `first` may run by itself at first, if it is given.
    pub(crate) fn new(first: Option<u8>) -> Self {
        let turn = Turn::beginning_with(first);
        let state = Mutex::new(GateState { target: Target::Park, turn, running: 0 });
        Self { state, changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs vCPU `index` on this thread whenever it may: `turn` runs it until it is kicked, and breaks when
    /// it is at its end.
    pub(crate) fn drive(&self, index: u8, mut turn: impl FnMut() -> ControlFlow<()>) {
        let mut is_running = false;
        while self.pass(index, &mut is_running) && turn().is_continue() {}
        self.leave(&mut is_running);
    }

    /// Waits while `index` is parked. False when it is time to stop.
    fn pass(&self, index: u8, is_running: &mut bool) -> bool {
        let mut state = self.lock();
        loop {
            match state.target {
                Target::Run if state.turn.is_of(index) => {
                    self.settle(&mut state, is_running, true);
                    return true;
                }
                Target::Run | Target::Park => self.settle(&mut state, is_running, false),
                Target::Stop => {
                    self.settle(&mut state, is_running, false);
                    return false;
                }
            }
            state = self.wait(state);
        }
    }

    /// Waits for a change, but not for longer than others may keep a vCPU waiting.
    fn wait<'a>(&'a self, mut state: MutexGuard<'a, GateState>) -> MutexGuard<'a, GateState> {
        let (Target::Run, Turn::Alone { until: Some(until), .. }) = (state.target, state.turn)
        else {
            return self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            state.turn = Turn::All;
            self.changed.notify_all();
            return state;
        }
        self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
    }

    fn settle(&self, state: &mut GateState, was: &mut bool, now: bool) {
        match (std::mem::replace(was, now), now) {
            (false, true) => state.running = state.running.saturating_add(1),
            (true, false) => {
                state.running = state.running.saturating_sub(1);
                self.changed.notify_all();
            }
            _ => {}
        }
    }

    /// Leaves for good.
    fn leave(&self, is_running: &mut bool) {
        let mut state = self.lock();
        self.settle(&mut state, is_running, false);
    }

    /// Says what the vCPUs are to do.
    pub(crate) fn aim(&self, target: Target) {
        let mut state = self.lock();
        if state.target != Target::Stop {
            state.target = target;
        }
        if target == Target::Run {
            match &mut state.turn {
                Turn::Alone { until, .. } => *until = Instant::now().checked_add(ALONE_MAX),
                turn => *turn = Turn::All,
            }
        }
        self.changed.notify_all();
    }

    /// Parks the vCPUs; returns when none of them is in the guest or in a device. False if there is a
    /// deadline and it has passed. `kick` gets them out of the guest: after the aim, so that whoever is
    /// kicked finds it.
    pub(crate) fn park(&self, kick: impl FnOnce(), deadline: Option<Instant>) -> bool {
        self.aim(Target::Park);
        kick();
        self.wait_until_parked(deadline)
    }

    /// Waits until no vCPU is in the guest or in a device. False if there is a deadline and it has passed.
    fn wait_until_parked(&self, deadline: Option<Instant>) -> bool {
        let mut state = self.lock();
        while state.running > 0 {
            let Some(deadline) = deadline else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Lets parked vCPUs go on as if they were new: `first` by itself at first, if it is given.
    pub(crate) fn begin_with(&self, first: Option<u8>) {
        self.lock().turn = Turn::beginning_with(first);
    }

    /// Has the guest told to look at the generation id, and waits for `max` until one of its vCPUs does.
    /// It is to be parked then, with all the others, and goes on when they do. Whether there is one.
    pub(crate) fn await_look(&self, tell: impl FnOnce(), max: Duration) -> bool {
        let now = Instant::now();
        let end = now.checked_add(max).unwrap_or(now);
        let mut state = self.lock();
        // A copy that is not done with its own new id finishes that first.
        while matches!(state.turn, Turn::Alone { .. }) && Instant::now() < end {
            state = self.wait(state);
        }
        state.turn = Turn::Awaited;
        tell();
        while state.turn == Turn::Awaited {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.turn = Turn::All;
                return false;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        matches!(state.turn, Turn::Caught(..))
    }

    /// A vCPU looks at the generation id, with `registers` from before it does. Whether it is to stop.
    pub(crate) fn is_stopped_by_look(
        &self,
        index: u8,
        registers: impl FnOnce() -> Option<kvm_regs>,
    ) -> bool {
        let mut state = self.lock();
        let was = state.turn;
        state.turn = match was {
            Turn::Awaited => registers().map_or(was, |registers| Turn::Caught(index, registers)),
            Turn::Alone { vcpu, has_looked: false, until } if vcpu == index => {
                Turn::Alone { vcpu, has_looked: true, until }
            }
            // It looks again: what it saw the first time has been dealt with.
            Turn::Alone { vcpu, .. } if vcpu == index => Turn::All,
            turn => turn,
        };
        if state.turn != was {
            self.changed.notify_all();
        }
        matches!(state.turn, Turn::Caught(..)) && was == Turn::Awaited
    }

    /// The vCPU with which a copy begins, as it looks at the generation id first; its registers before
    /// the look, if it has looked since.
    pub(crate) fn first(&self) -> Option<(u8, Option<kvm_regs>)> {
        match self.lock().turn {
            Turn::Caught(vcpu, registers) => Some((vcpu, Some(registers))),
            Turn::Alone { vcpu, has_looked: false, .. } => Some((vcpu, None)),
            _ => None,
        }
    }
}

impl Turn {
    fn beginning_with(first: Option<u8>) -> Self {
        match first {
            Some(vcpu) => Self::Alone { vcpu, has_looked: false, until: None },
            None => Self::All,
        }
    }

    fn is_of(self, index: u8) -> bool {
        match self {
            Self::All | Self::Awaited => true,
            Self::Caught(vcpu, _) => vcpu != index,
            Self::Alone { vcpu, .. } => vcpu == index,
        }
    }
}

#[cfg(all(test, feature = "models"))]
#[expect(clippy::unwrap_used, reason = "a model that panics is a race that was found")]
mod models;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that panics is a test that fails")]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    const SOON: Duration = Duration::from_secs(30);

    fn registers(rip: u64) -> kvm_regs {
        kvm_regs { rip, ..Default::default() }
    }

    fn running() -> Gate {
        let gate = Gate::new(None);
        gate.aim(Target::Run);
        gate
    }

    #[test]
    fn a_vcpu_that_looks_is_caught_and_goes_on_with_the_others() {
        let gate = Arc::new(running());
        let (looking, told) = (gate.clone(), Arc::new(Mutex::new(false)));
        let vcpu = thread::spawn(move || {
            let mut is_running = false;
            assert!(looking.pass(1, &mut is_running));
            while !looking.is_stopped_by_look(1, || Some(registers(7))) {
                thread::yield_now();
            }
            // Comes back when all run again.
            looking.pass(1, &mut is_running)
        });
        let hears = told.clone();
        assert!(gate.await_look(move || *hears.lock().unwrap() = true, SOON));
        assert!(*told.lock().unwrap());
        gate.aim(Target::Park);
        assert!(gate.wait_until_parked(None));
        assert_eq!(gate.first(), Some((1, Some(registers(7)))));
        assert!(!gate.is_stopped_by_look(0, || Some(registers(8))));
        gate.aim(Target::Run);
        assert!(vcpu.join().unwrap());
        assert_eq!(gate.first(), None);
    }

    #[test]
    fn a_guest_that_does_not_look_is_not_waited_for_for_ever() {
        let gate = running();
        assert!(!gate.await_look(|| {}, Duration::from_millis(1)));
        assert!(!gate.is_stopped_by_look(0, || Some(registers(7))));
        assert_eq!(gate.first(), None);
    }

    #[test]
    fn in_a_copy_the_others_wait_until_the_first_looks_again() {
        let gate = Arc::new(Gate::new(Some(0)));
        assert_eq!(gate.first(), Some((0, None)));
        let other = gate.clone();
        let other = thread::spawn(move || {
            let passed = other.pass(1, &mut false);
            (passed, other.first())
        });
        gate.aim(Target::Run);
        assert!(gate.pass(0, &mut false));
        assert!(!gate.is_stopped_by_look(0, || None));
        // It has looked: a copy of this copy begins like any other.
        assert_eq!(gate.first(), None);
        assert!(!gate.is_stopped_by_look(0, || None));
        assert_eq!(other.join().unwrap(), (true, None));
    }

    #[test]
    fn in_a_copy_the_others_do_not_wait_for_ever() {
        let gate = Gate::new(Some(7));
        gate.aim(Target::Run);
        let start = Instant::now();
        assert!(gate.pass(1, &mut false));
        assert!(start.elapsed() >= ALONE_MAX);
    }
}
