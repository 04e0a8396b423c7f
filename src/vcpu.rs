//! vCPU threads: run the guest until it exits, give the exit to its device, run on.
//!
//! ```text
//!              run                    pause
//!   Parked ◄────────────► Running ───────────► Parked
//!     │                      │ the guest ends the run
//!     └───────► Finished ◄───┘
//!        stop
//! ```
//!
//! A thread is moved between states by the [`Gate`] it shares with its siblings. A signal kicks it
//! out of KVM_RUN; the signal's handler sets `immediate_exit`, so that a kick between the look at
//! the gate and KVM_RUN is not lost.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::todo)]
#![expect(unsafe_code, reason = "signal handler, kvm_run union and thread kicks")]

use std::cell::Cell;
use std::ops::ControlFlow;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use arch::{again, layout};
use devices::bus::Bus;
use devices::legacy::generation::Generation;
use devices::sys::again::spawn;
use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_regs, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::error::Refusal;
use crate::exit::Ending;
use crate::gate::{Gate, Target};
use crate::outcome::Outcome;
use crate::sandbox::{self, Role};

/// Stack of a vCPU thread: the exit path is shallow, and only what is touched costs memory.
const STACK_SIZE: usize = 128 << 10;

/// What EFAULT of KVM_RUN means. Which of them it was KVM does not tell.
const NO_MEMORY: &str = "the host has nothing behind memory that the guest used: a file of a pmem \
                         device has become shorter, a block that is not plugged was written to, or \
                         the host's pool of huge pages is empty";

/// What EAGAIN of KVM_RUN means, if it comes again and again.
const NO_THREAD: &str = "KVM cannot start a thread of its own: raise the limit on processes of the user (RLIMIT_NPROC) or \
                         of the cgroup (pids.max; --pids-max of a jail)";

/// So often KVM may have no thread. A vCPU that another one wakes is asked for once.
const REFUSED_MAX: u32 = 1000;

thread_local! {
    /// `kvm_run` of the vCPU that this thread runs, for the signal handler.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(std::ptr::null_mut()) };
}

devices::counters! {
    /// What is counted of a vCPU. The times are what the exits took in husk.
    pub(crate) struct Counters as "vcpu" {
        /// Exits to read from a port.
        exit_io_in: Counter,
        /// Exits to write to a port.
        exit_io_out: Counter,
        /// Exits to read from a device's memory.
        exit_mmio_read: Counter,
        /// Exits to write to a device's memory.
        exit_mmio_write: Counter,
        /// Exits after which the vCPU could not go on.
        failures: Counter,
        /// Times the guest could not be told that it stood still.
        kvmclock_ctrl_fails: Counter,
        /// Accesses that no device claimed.
        unclaimed_count: Counter,
        /// How long it took to read from ports.
        exit_io_in_agg: Latency,
        /// How long it took to write to ports.
        exit_io_out_agg: Latency,
        /// How long it took to read from a device's memory.
        exit_mmio_read_agg: Latency,
        /// How long it took to write to a device's memory.
        exit_mmio_write_agg: Latency,
    }
}

/// Accesses that no device claimed.
#[derive(Debug, Default)]
pub(crate) struct Unclaimed(AtomicU64);

impl Unclaimed {
    /// Counts unless `is_claimed`, and says so in the log for the first and each power of two after it.
    fn unless(&self, is_claimed: bool, counters: &Counters, what: &str, addr: u64) {
        if is_claimed {
            return;
        }
        counters.unclaimed_count().inc();
        let count = self.0.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if count.is_power_of_two() {
            log::debug!("{count} accesses that no device claims; the last: {what} {addr:#x}");
        }
    }
}

/// What every vCPU of a VM needs.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) pio: Bus,
    pub(crate) mmio: Bus,
    pub(crate) outcome: Arc<Outcome>,
    pub(crate) unclaimed: Unclaimed,
    /// One for each vCPU: shared, they would travel between the host's caches at every exit.
    pub(crate) counters: Vec<Arc<Counters>>,
}

/// The vCPU threads of a VM. Stopped when dropped.
#[derive(Debug)]
pub(crate) struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
    /// Each locked by its thread while it is not parked.
    fds: Vec<Arc<Mutex<VcpuFd>>>,
}

impl Vcpus {
    /// Starts a thread per vCPU, parked. `name` is that of vCPU 0 without its number; `first` is the vCPU
    /// that stands before a look at the generation id, if one does.
    pub(crate) fn spawn(
        vcpus: Vec<VcpuFd>,
        world: &Arc<World>,
        name: &str,
        first: Option<u8>,
    ) -> Result<Self, Refusal> {
        register_kick()?;
        let gate = Arc::new(Gate::new(first));
        let mut threads = Self { gate, threads: Vec::new(), fds: Vec::new() };
        for (index, fd) in (0u8..).zip(vcpus) {
            let counters = world.counters.get(usize::from(index)).cloned().unwrap_or_default();
            let fd = Arc::new(Mutex::new(fd));
            threads.fds.push(fd.clone());
            let vcpu = Vcpu { index, fd, world: world.clone(), counters };
            let gate = threads.gate.clone();
            let builder = || thread::Builder::new().name(format!("{name}{index}"));
            let start = |work| builder().stack_size(STACK_SIZE).spawn(work);
            let thread = spawn(start, move || vcpu.run(&gate))
                .map_err(Refusal::host(format!("cannot start the thread of vCPU {index}")))?;
            threads.threads.push(thread);
        }
        Ok(threads)
    }

    /// Lets the vCPUs run.
    pub(crate) fn run(&self) {
        self.gate.aim(Target::Run);
    }

    /// Parks the vCPUs; returns when none of them is in the guest or in a device. False if there is a
    /// deadline and it has passed: one of them waits for the host.
    pub(crate) fn park(&self, deadline: Option<Instant>) -> bool {
        self.gate.park(|| self.kick(), deadline)
    }

    /// See [`Gate::await_look`].
    pub(crate) fn await_look(&self, tell: impl FnOnce(), max: Duration) -> bool {
        self.gate.await_look(tell, max)
    }

    /// See [`Gate::first`].
    pub(crate) fn first(&self) -> Option<(u8, Option<kvm_regs>)> {
        self.gate.first()
    }

    /// Lets parked vCPUs go on as if they were new: `first` by itself at first, if it is given.
    pub(crate) fn begin_with(&self, first: Option<u8>) {
        self.gate.begin_with(first);
    }

    /// Calls `f` with each vCPU in turn, all of which must be parked.
    pub(crate) fn each<E>(
        &self,
        mut f: impl FnMut(usize, &VcpuFd) -> Result<(), E>,
    ) -> Result<(), E> {
        self.fds.iter().enumerate().try_for_each(|(index, fd)| f(index, &lock(fd)))
    }

    fn kick(&self) {
        for thread in &self.threads {
            if !thread.is_finished() {
                // SAFETY: the thread has not been joined, so its handle is valid.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.gate.aim(Target::Stop);
        self.kick();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a vCPU thread panicked");
            }
        }
    }
}

/// The signal that kicks a vCPU out of the guest: the first that libc leaves to programs.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

fn register_kick() -> Result<(), Refusal> {
    extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let run = RUN.get();
        if !run.is_null() {
            // SAFETY: set only while this thread owns the vCPU, and with it the mapping. Volatile,
            // because the kernel reads it behind our back.
            unsafe { std::ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
        }
    }
    vmm_sys_util::signal::register_signal_handler(kick_signal(), on_kick)
        .map_err(Refusal::host("cannot register the signal that stops vCPUs"))
}

/// Whoever started us may have blocked every signal, and masks are inherited.
fn unblock_kick() {
    // SAFETY: `sigset_t` is plain data, and `sigemptyset` gives it a value before it is used; the mask
    // changed is this thread's, and the old one is not asked for.
    let failed = unsafe {
        let mut kick: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut kick);
        libc::sigaddset(&raw mut kick, kick_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const kick, std::ptr::null_mut())
    };
    if failed != 0 {
        log::error!("cannot unblock the signal that stops a vCPU: error {failed}");
    }
}

fn lock(fd: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    fd.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One vCPU, on its thread.
struct Vcpu {
    index: u8,
    fd: Arc<Mutex<VcpuFd>>,
    world: Arc<World>,
    counters: Arc<Counters>,
}

impl Vcpu {
    fn run(&self, gate: &Gate) {
        unblock_kick();
        sandbox::enter(Role::Vcpu);
        RUN.set(std::ptr::from_mut(lock(&self.fd).get_kvm_run()));
        gate.drive(self.index, || {
            let mut fd = lock(&self.fd);
            if let Some(ending) = self.run_until_kicked(&mut fd, gate) {
                self.world.outcome.set(ending);
            }
            if self.world.outcome.get().is_some() {
                return ControlFlow::Break(());
            }
            // Tells the guest's watchdogs that the time until it goes on was not its own. Refused
            // where the guest does not use kvm-clock: then there is nobody to tell.
            if again(|| fd.kvmclock_ctrl()).is_err() {
                self.counters.kvmclock_ctrl_fails().inc();
            }
            ControlFlow::Continue(())
        });
        RUN.set(std::ptr::null_mut());
    }

    /// Runs the guest until a kick or `gate` stops it (none) or until this vCPU cannot go on.
    fn run_until_kicked(&self, fd: &mut VcpuFd, gate: &Gate) -> Option<Ending> {
        let counters = &self.counters;
        let mut refused = 0_u32;
        loop {
            let run = std::ptr::from_mut(fd.get_kvm_run());
            let exit = fd.run();
            if exit.is_ok() {
                refused = 0;
            }
            let start = Instant::now();
            match exit {
                Ok(VcpuExit::IoOut(port, data)) => {
                    // SAFETY: the exit was for port I/O, so `io` is the member of the union that
                    // the kernel filled in.
                    let size = unsafe { (*run).__bindgen_anon_1.io.size };
                    let is_claimed = self.world.pio.write_burst(port.into(), size.into(), data);
                    counters.exit_io_out().inc();
                    counters.exit_io_out_agg().since(start);
                    self.world.unclaimed.unless(is_claimed, counters, "out", port.into());
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    // SAFETY: as above.
                    let size = unsafe { (*run).__bindgen_anon_1.io.size };
                    let mut is_claimed = true;
                    for item in data.chunks_mut(usize::from(size).max(1)) {
                        is_claimed &= self.world.pio.read(port.into(), item);
                    }
                    counters.exit_io_in().inc();
                    counters.exit_io_in_agg().since(start);
                    self.world.unclaimed.unless(is_claimed, counters, "in", port.into());
                }
                Ok(VcpuExit::MmioRead(addr, data)) => {
                    let is_claimed = self.world.mmio.read(addr, data);
                    counters.exit_mmio_read().inc();
                    counters.exit_mmio_read_agg().since(start);
                    self.world.unclaimed.unless(is_claimed, counters, "read", addr);
                    let looks = addr.checked_sub(layout::GENERATION_ID);
                    if looks.is_some_and(Generation::is_first)
                        && gate.is_stopped_by_look(self.index, || again(|| fd.get_regs()).ok())
                    {
                        // KVM finishes the read, and gives the vCPU back.
                        fd.set_kvm_immediate_exit(1);
                    }
                }
                Ok(VcpuExit::MmioWrite(addr, data)) => {
                    let is_claimed = self.world.mmio.write(addr, data);
                    counters.exit_mmio_write().inc();
                    counters.exit_mmio_write_agg().since(start);
                    self.world.unclaimed.unless(is_claimed, counters, "write", addr);
                }
                Ok(VcpuExit::Intr) => return None,
                Ok(exit) => {
                    let ending = Exit::of(&exit);
                    return Some(self.end(fd, ending));
                }
                Err(e) if e.errno() == libc::EINTR => {
                    fd.set_kvm_immediate_exit(0);
                    return None;
                }
                // A vCPU that another one has woken; or KVM cannot start a thread of its own, and then it does not see
                // that the vCPU is kicked.
                Err(e) if e.errno() == libc::EAGAIN => {
                    refused = refused.saturating_add(1);
                    if fd.get_kvm_run().immediate_exit != 0 {
                        fd.set_kvm_immediate_exit(0);
                        return None;
                    }
                    if refused > REFUSED_MAX {
                        let why = format!("KVM_RUN: {e}: {NO_THREAD}");
                        return Some(self.end(fd, Exit::Failed(why)));
                    }
                }
                Err(e) if e.errno() == libc::EFAULT => {
                    return Some(self.end(fd, Exit::Failed(format!("KVM_RUN: {e}: {NO_MEMORY}"))));
                }
                Err(e) => return Some(self.end(fd, Exit::Failed(format!("KVM_RUN: {e}")))),
            }
            if self.world.outcome.get().is_some() {
                // A device ended the run during this exit: the guest gets no further.
                return None;
            }
        }
    }

    fn end(&self, fd: &mut VcpuFd, exit: Exit) -> Ending {
        let rip = again(|| fd.get_regs()).map_or(0, |regs| regs.rip);
        let vcpu = self.index;
        if !matches!(exit, Exit::PoweredOff | Exit::Reset) {
            self.counters.failures().inc();
        }
        match exit {
            Exit::PoweredOff => Ending::PoweredOff,
            Exit::Reset => Ending::Reset,
            Exit::TripleFault => Ending::TripleFault { vcpu, rip },
            Exit::Failed(detail) => Ending::KvmError { vcpu, rip, detail },
            Exit::InternalError => {
                Ending::KvmError { vcpu, rip, detail: internal_error(fd.get_kvm_run()) }
            }
        }
    }
}

/// An exit after which a vCPU cannot go on.
enum Exit {
    PoweredOff,
    Reset,
    TripleFault,
    InternalError,
    Failed(String),
}

impl Exit {
    fn of(exit: &VcpuExit<'_>) -> Self {
        match exit {
            VcpuExit::Shutdown => Self::TripleFault,
            VcpuExit::InternalError => Self::InternalError,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Self::PoweredOff,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Self::Reset,
            VcpuExit::FailEntry(reason, cpu) => {
                Self::Failed(format!("entry failed with hardware reason {reason:#x} on CPU {cpu}"))
            }
            other => Self::Failed(format!("unexpected exit {other:?}")),
        }
    }
}

/// What KVM_EXIT_INTERNAL_ERROR says (Documentation/virt/kvm/api.rst, 5).
fn internal_error(run: &kvm_run) -> String {
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return "internal error".into();
    }
    // SAFETY: the exit reason says that `internal` is the member of the union that is filled in.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let what = match internal.suberror {
        1 => "an instruction it cannot emulate",
        2 => "a second exception while delivering one",
        3 => "an exit while delivering an event",
        4 => "an unexpected exit reason",
        _ => "an unknown cause",
    };
    format!("internal error, suberror {}: {what}", internal.suberror)
}
