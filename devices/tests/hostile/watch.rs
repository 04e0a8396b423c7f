//! Time: what a case has cost, whether anybody is busy still, and a case that does not end.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Nothing takes so long: a device that hangs its driver is named before the run is given up.
pub(crate) const DEADLINE: Duration = Duration::from_secs(40);
/// A device that has nothing to do does nothing for so long.
const WINDOW: Duration = Duration::from_millis(3);

/// Processor time of this process.
pub(crate) fn work_so_far() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap())
}

/// Nobody spins. There is no event for nothing happening, so a moment is looked at; one in which this
/// process is busy all the time, three times in a row, is a loop.
#[track_caller]
pub(crate) fn assert_quiet() {
    let is_busy = |_| {
        let (work, begun) = (work_so_far(), Instant::now());
        std::thread::sleep(WINDOW);
        work_so_far().saturating_sub(work) > begun.elapsed() / 2
    };
    assert!(!(0..3).all(is_busy), "a thread of the device does not come to rest");
}

/// Ends the process, with the name of the case, when one does not end.
pub(crate) struct Watchdog {
    case: Arc<Mutex<(String, Instant)>>,
    is_over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watchdog {
    pub(crate) fn start() -> Self {
        let case = Arc::new(Mutex::new((String::from("setting up"), Instant::now())));
        let is_over = Arc::new(AtomicBool::new(false));
        let (watched, stop) = (case.clone(), is_over.clone());
        let thread = std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                std::thread::park_timeout(Duration::from_secs(1));
                let (name, begun) = watched.lock().unwrap().clone();
                if begun.elapsed() > 2 * DEADLINE {
                    eprintln!("{name} does not end");
                    std::process::abort();
                }
            }
        });
        Self { case, is_over, thread: Some(thread) }
    }

    pub(crate) fn begin(&self, name: &str) {
        *self.case.lock().unwrap() = (name.into(), Instant::now());
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// What the suite looks for it finds.
#[test]
fn a_thread_that_spins_is_found() {
    let _alone = crate::bench::alone();
    let stop = AtomicBool::new(false);
    let spins = || {
        while !stop.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
    };
    std::thread::scope(|scope| {
        // One for each processor, so that one at least has its turn in each window.
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(spins);
        }
        let found = (0..100).any(|_| std::panic::catch_unwind(assert_quiet).is_err());
        stop.store(true, Ordering::Relaxed);
        assert!(found);
    });
}
