//! Pauses against kicks. The gate is the real one; the kernel's side of a vCPU is a double: KVM_RUN, a
//! signal that may come at any step, and its handler (see [`crate::vcpu`]).
use std::ops::ControlFlow;
use std::sync::Arc;

use devices::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use devices::sync::models::{explore, happens, step, wait_until};
use devices::sync::thread;

use super::*;

const RUNS: usize = 2000;

/// A vCPU as the kernel has it.
#[derive(Default)]
struct Vcpu {
    /// A signal was sent, and its handler has not run yet.
    is_pending: AtomicBool,
    immediate_exit: AtomicBool,
}

impl Vcpu {
    /// pthread_kill.
    fn kick(&self) {
        self.is_pending.store(true, Ordering::SeqCst);
    }

    /// What the kernel does before the thread goes on in husk, and the handler.
    fn deliver(&self) {
        if self.is_pending.swap(false, Ordering::SeqCst) {
            self.immediate_exit.store(true, Ordering::SeqCst);
        }
    }

    /// KVM_RUN until EINTR, with exits to devices in between, and what husk does about EINTR.
    fn run_until_kicked(&self, in_guest: &AtomicUsize) -> ControlFlow<()> {
        loop {
            self.deliver();
            if self.immediate_exit.load(Ordering::SeqCst) {
                break;
            }
            in_guest.fetch_add(1, Ordering::SeqCst);
            wait_until(|| self.is_pending.load(Ordering::SeqCst) || happens());
            in_guest.fetch_sub(1, Ordering::SeqCst);
        }
        self.immediate_exit.store(false, Ordering::SeqCst);
        ControlFlow::Continue(())
    }
}

/// Two vCPUs, and their threads.
struct Guest {
    gate: Arc<Gate>,
    vcpus: [Arc<Vcpu>; 2],
    in_guest: Arc<AtomicUsize>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Guest {
    fn new() -> Self {
        let gate = Arc::new(Gate::new(None));
        let vcpus = <[Arc<Vcpu>; 2]>::default();
        let in_guest = Arc::<AtomicUsize>::default();
        let threads = (0u8..).zip(vcpus.clone()).map(|(index, vcpu)| {
            let (gate, in_guest) = (gate.clone(), in_guest.clone());
            thread::spawn(move || gate.drive(index, || vcpu.run_until_kicked(&in_guest)))
        });
        let threads = threads.collect();
        Self { gate, vcpus, in_guest, threads }
    }

    fn kick(&self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.kick());
    }

    fn assert_still(&self) {
        for _ in 0..8 {
            assert_eq!(self.in_guest.load(Ordering::SeqCst), 0, "a vCPU runs in a pause");
            step();
        }
    }

    fn stop(self) {
        self.gate.aim(Target::Stop);
        self.kick();
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_kick_is_never_lost_and_no_vcpu_runs_in_a_pause() {
    explore(RUNS, || {
        let guest = Guest::new();
        for _ in 0..2 {
            guest.gate.aim(Target::Run);
            assert!(guest.gate.park(|| guest.kick(), None));
            guest.assert_still();
        }
        guest.gate.aim(Target::Run);
        guest.stop();
    });
}

#[test]
fn a_pause_that_follows_a_look_at_the_generation_id_finds_who_looked() {
    explore(RUNS, || {
        let gate = Arc::new(Gate::new(None));
        let is_told = Arc::new(AtomicBool::new(false));
        let vcpus: Vec<_> = (0..2u8)
            .map(|index| {
                let (gate, is_told) = (gate.clone(), is_told.clone());
                thread::spawn(move || {
                    gate.drive(index, || {
                        // The guest looks when it is told to, and once more when it goes on.
                        wait_until(|| is_told.load(Ordering::SeqCst));
                        let registers = kvm_regs { rip: index.into(), ..Default::default() };
                        match gate.is_stopped_by_look(index, || Some(registers)) {
                            true => ControlFlow::Continue(()),
                            false => ControlFlow::Break(()),
                        }
                    });
                })
            })
            .collect();
        gate.aim(Target::Run);
        let tell = || is_told.store(true, Ordering::SeqCst);
        assert!(gate.await_look(tell, Duration::from_secs(3600)), "nobody looked");
        assert!(gate.park(|| (), None));
        let (index, registers) = gate.first().unwrap();
        assert_eq!(registers.unwrap().rip, u64::from(index));
        gate.aim(Target::Run);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    });
}
