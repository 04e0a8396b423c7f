//! What runs models of races, and what shuttle lacks for them.
//!
//! Shuttle runs the threads of a model by turns, in orders that it draws, and changes over at each use of
//! what [`sync`](super) has. It knows sequential consistency only: a step in the wrong place is found, a
//! memory ordering that is too weak is not.
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, MaxSteps, Runner};

/// Runs are the same every time, so that a gate does not depend on luck; what is found is found again.
const SEED: u64 = 0x6875_736b;

/// A model that takes more steps waits for what does not come.
const STEPS_MAX: usize = 20_000;

/// Runs `model` so often in orders drawn at random, and as often in such as have few changes of threads,
/// each where it hurts ("A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs", 2010).
/// A model that panics or does not come to its end is a failure.
pub fn explore(iterations: usize, model: fn()) {
    let mut config = Config::new();
    config.max_steps = MaxSteps::FailAfter(STEPS_MAX);
    Runner::new(RandomScheduler::new_from_seed(SEED, iterations), config.clone()).run(model);
    Runner::new(PctScheduler::new_from_seed(SEED, 3, iterations), config).run(model);
}

/// Whether it happens this time: a deadline passes, say.
pub fn happens() -> bool {
    shuttle::rand::Rng::gen_bool(&mut shuttle::rand::thread_rng(), 0.5)
}

/// Other threads may go on here: before what is one step to the kernel.
pub fn step() {
    shuttle::thread::yield_now();
}

/// Waits, as a model has to: by looking again, since whoever slept in the kernel would stop all threads.
pub fn wait_until(mut is_so: impl FnMut() -> bool) {
    while !is_so() {
        step();
    }
}

/// std's, with a step before each use.
#[derive(Debug, Default)]
pub struct OnceLock<T>(std::sync::OnceLock<T>);

impl<T> OnceLock<T> {
    /// As std's.
    pub const fn new() -> Self {
        Self(std::sync::OnceLock::new())
    }

    /// As std's.
    pub fn get(&self) -> Option<&T> {
        step();
        self.0.get()
    }

    /// As std's.
    pub fn set(&self, value: T) -> Result<(), T> {
        step();
        self.0.set(value)
    }
}

/// Shuttle's channels, of which a receiver's patience can end, and what nobody will receive goes with the
/// receiver, as with std's.
pub mod mpsc {
    use std::time::Duration;

    pub use shuttle::sync::mpsc::{
        RecvError, RecvTimeoutError, SendError, Sender, SyncSender, TryRecvError,
    };

    /// As std's.
    #[derive(Debug)]
    pub struct Receiver<T>(shuttle::sync::mpsc::Receiver<T>);

    /// As std's.
    pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
        let (sender, receiver) = shuttle::sync::mpsc::channel();
        (sender, Receiver(receiver))
    }

    /// As std's.
    pub fn sync_channel<T>(bound: usize) -> (SyncSender<T>, Receiver<T>) {
        let (sender, receiver) = shuttle::sync::mpsc::sync_channel(bound);
        (sender, Receiver(receiver))
    }

    impl<T> Drop for Receiver<T> {
        fn drop(&mut self) {
            // No thread changes over between the look that finds nothing and the end of the receiver.
            while !std::thread::panicking() && self.0.try_recv().is_ok() {}
        }
    }

    impl<T> Receiver<T> {
        /// As std's.
        pub fn recv(&self) -> Result<T, RecvError> {
            self.0.recv()
        }

        /// As std's.
        pub fn try_recv(&self) -> Result<T, TryRecvError> {
            self.0.try_recv()
        }

        /// As std's, but how long the time is is drawn: for ever, or not longer than another thread's step.
        pub fn recv_timeout(&self, _: Duration) -> Result<T, RecvTimeoutError> {
            if !super::happens() {
                return self.0.recv().map_err(|RecvError| RecvTimeoutError::Disconnected);
            }
            super::step();
            self.0.try_recv().map_err(|e| match e {
                TryRecvError::Empty => RecvTimeoutError::Timeout,
                TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
            })
        }
    }
}
