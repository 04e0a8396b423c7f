//! An end has one exit code, however often one looks: a triple fault is a triple fault, a SIGTERM a SIGTERM at whatever moment.
//!
//! `HUSK_TRIPLE_FAULTS` and `HUSK_SIGTERMS` say how many times, for long runs: docs/evidence.md.
use std::time::{Duration, Instant};

use crate::util::*;

/// Promised by docs/exit-codes.md.
pub(crate) const PROMISED: Duration = Duration::from_secs(2);

/// The number in this variable of the environment.
pub(crate) fn count(name: &str, usual: u64) -> u64 {
    match std::env::var(name) {
        Ok(number) => number.parse().unwrap_or_else(|e| panic!("{name}: {e}")),
        Err(_) => usual,
    }
}

/// What a test throws dice with; repeatable.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[test]
fn a_triple_fault_is_the_same_end_each_time() {
    let times = count("HUSK_TRIPLE_FAULTS", 50);
    for _ in 0..times {
        let said = Husk::guest("hello", "how=triple").memory(16).wait().refused(5);
        assert!(said.contains("triple fault"), "{said}");
    }
    println!("{times} triple faults, {times} times exit code 5");
}

/// So many VMs at once: most of their time they wait for a guest that does not heed the power button.
const WORKERS: u64 = 4;

/// From before it has parsed its arguments to a guest that has run for long. A signal that comes before husk has said
/// what to do with it ends husk by itself; that is the same to a shell, but not counted as 143 of husk's own.
#[test]
fn sigterm_ends_husk_in_time_at_any_moment() {
    let times = count("HUSK_SIGTERMS", 25);
    let workers = std::thread::scope(|scope| {
        let start = |worker| {
            scope.spawn(move || {
                let mut dice = Dice(0x2545_f491_4f6c_dd1d + worker);
                let numbers = (worker..times).step_by(WORKERS as usize);
                let ends = numbers.map(|number| ends_in_time(number, &mut dice));
                ends.collect::<Vec<_>>()
            })
        };
        let workers: Vec<_> = (0..WORKERS).map(start).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect::<Vec<_>>()
    });
    let ends = workers.concat();
    let of = |how| ends.iter().filter(|(_, was)| *was == how).count();
    let (early, last) = (of(How::Early), of(How::LastResort));
    let longest = ends.iter().map(|(took, _)| *took).max();
    assert_eq!(ends.len() as u64, times);
    let mut late: Vec<_> =
        ends.iter().map(|(took, _)| *took).filter(|took| *took >= PROMISED).collect();
    late.sort_unstable();
    println!(
        "{times} signals, {early} before husk had a handler, {last} last resorts, {} ends later than \
         {PROMISED:?}, the longest {longest:?}",
        late.len()
    );
    assert!(late.is_empty(), "later than {PROMISED:?}: {late:?}");
    // The machine may be so busy with other tests that husk does not get to its end in time. It is not the rule.
    assert!(last * 20 <= ends.len(), "{last} of {times} husks did not end by themselves");
}

/// How a signal ended husk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// Before it could know of signals.
    Early,
    /// As it should.
    Heeded,
    /// It was too late for that: docs/exit-codes.md.
    LastResort,
}

/// How long the end of a VM took, and how it came.
fn ends_in_time(number: u64, dice: &mut Dice) -> (Duration, How) {
    let scratch = Scratch::new();
    let (api, vsock) = (scratch.path("api.sock"), scratch.path("v.sock"));
    let how = ["how=hlt", "how=reboot-acpi", "how=hang"][(number % 3) as usize];
    let husk = Husk::guest("hello", how).memory(16).vsock(3, &vsock);
    let vm = husk.option("--api-sock", &api).start_unheard();
    // The moment is what is random here: there is no event to wait for.
    std::thread::sleep(Duration::from_micros(dice.below(100_000)));
    vm.signal(Signal::TERM);
    let since = Instant::now();
    let end = vm.wait();
    let took = since.elapsed();
    let how = match (end.status.code(), end.signal()) {
        (Some(143), None) if end.errors.contains("something that husk waits for") => {
            How::LastResort
        }
        (Some(143), None) => How::Heeded,
        (None, Some(15)) if end.errors.is_empty() && end.output.is_empty() => How::Early,
        _ => panic!("signal {number}: {end}"),
    };
    if how == How::LastResort {
        // By a process that husk leaves behind for that. The other stays until somebody takes its place.
        let deadline = Instant::now() + PATIENCE;
        while api.exists() {
            assert!(Instant::now() < deadline, "signal {number}: the API's socket is left: {end}");
            std::thread::yield_now();
        }
        return (took, how);
    }
    assert!(!api.exists() && !vsock.exists(), "signal {number}: a socket is left: {end}");
    (took, how)
}
