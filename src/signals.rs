//! Signals that stop husk, as a descriptor to wait on; what ends husk if it does not heed them in time; and the
//! last words of a husk that crashes.
//!
//! SIGTERM, SIGINT, SIGHUP, SIGQUIT and SIGXCPU are noted by a handler, for whoever waits; but one that whoever
//! started us ignores (`nohup`, a script's background job) stays ignored. The handler also sets an alarm: what is
//! promised of a signal must hold while the VMM thread waits for a file system, or for the process that serves
//! guest memory. SIGXFSZ is blocked for good: a disk image that hits a file size
//! limit gets EFBIG, and the guest an I/O error. SIGPIPE is ignored by Rust's runtime. What would end
//! or stop us with the terminal raw is ignored here, or, where it means a crash, handled: the terminal
//! is restored, the signal is named, and then it does what it always did.
#![expect(unsafe_code, reason = "signal masks and handlers have no safe wrapper in our libraries")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, Ordering};

use crate::bell::Bell;
use crate::exit::Ending;
use crate::vmm::Signals;

/// When a husk that was told to stop is ended, whatever it does. 2 s are promised, and on a host with much to do a process
/// takes a moment to get there, and to be gone.
const LAST_RESORT_MS: i64 = 1600;
/// SIGXCPU: a limit on processor time is reached, and a second later it comes again.
const STOP: [libc::c_int; 5] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGXCPU];
/// They would end us and mean nothing here, as those for real time. SIGTSTP: whoever really wants us to stand still has
/// SIGSTOP, and a guest can be paused.
const IGNORED: [libc::c_int; 9] = [
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGTTOU,
    libc::SIGTSTP,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
];
/// What a crash comes as, and what is said of it.
const CRASH: [(libc::c_int, &str); 7] = [
    (libc::SIGTRAP, ": crashed: SIGTRAP\n"),
    (libc::SIGABRT, ": crashed: SIGABRT\n"),
    (libc::SIGSEGV, ": crashed: SIGSEGV\n"),
    (libc::SIGBUS, ": crashed: SIGBUS\n"),
    (libc::SIGILL, ": crashed: SIGILL\n"),
    (libc::SIGFPE, ": crashed: SIGFPE\n"),
    (libc::SIGSYS, ": crashed: SIGSYS\n"),
];

/// What handlers work with. A process that is forked off has them too, and leaves them alone.
static OWNER: AtomicI32 = AtomicI32::new(0);
/// The signals that have come and have not been heeded, a bit each.
static PENDING: AtomicU32 = AtomicU32::new(0);
/// The first of them, and when it came: milliseconds of the monotonic clock.
static FIRST: AtomicI32 = AtomicI32::new(0);
static FIRST_AT_MS: AtomicI64 = AtomicI64::new(0);
/// Rung when one has come.
static BELL: OnceLock<Bell> = OnceLock::new();

/// The process's stop signals.
#[derive(Debug)]
pub(crate) struct ProcessSignals(&'static Bell);

impl ProcessSignals {
    /// Holds them back until they are taken: what husk makes by then, its socket above all, would be left behind by
    /// one that ends it.
    pub(crate) fn hold() -> std::io::Result<Held> {
        // SAFETY: `sigset_t` is plain data, which the call fills in.
        let mut before: libc::sigset_t = unsafe { std::mem::zeroed() };
        change_mask(libc::SIG_BLOCK, &STOP, &raw mut before)?;
        Ok(Held { before })
    }

    /// Takes the signals over, those that are held back too.
    pub(crate) fn take() -> std::io::Result<Self> {
        // A second try of the same process finds the first one's.
        let bell = match BELL.get() {
            Some(bell) => bell,
            None => {
                let new = Bell::new()?;
                BELL.get_or_init(|| new)
            }
        };
        OWNER.store(std::process::id().cast_signed(), Ordering::Relaxed);
        // The first of the latter is what kicks vCPUs, which get a handler for it.
        for signal in IGNORED.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX()) {
            // SAFETY: ignoring a signal runs no code of ours.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        handle_crashes()?;
        handle(libc::SIGALRM, on_alarm, libc::SA_RESTART)?;
        for signal in STOP.into_iter().filter(|signal| !is_ignored(*signal)) {
            handle(signal, on_stop, libc::SA_RESTART)?;
        }
        mask(libc::SIG_BLOCK, &[libc::SIGXFSZ])?;
        // Whoever started us may have blocked them.
        mask(libc::SIG_UNBLOCK, &[libc::SIGALRM])?;
        mask(libc::SIG_UNBLOCK, &STOP)?;
        Ok(Self(bell))
    }

    /// Leaves it to the threads that are there to run handlers: this one may wait in the kernel for memory that
    /// another process serves, and only SIGKILL gets it out of there.
    pub(crate) fn leave_to_others() -> std::io::Result<()> {
        mask(libc::SIG_BLOCK, &STOP)?;
        mask(libc::SIG_BLOCK, &[libc::SIGALRM])
    }
}

/// Signals that are held back.
pub(crate) struct Held {
    before: libc::sigset_t,
}

impl Held {
    /// Lets them come again, in a process that has been forked off and does not take them.
    pub(crate) fn let_go(&self) -> std::io::Result<()> {
        // SAFETY: the mask that this thread had; the one that it has is not asked for.
        let failed = unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut())
        };
        done(failed)
    }
}

fn mask(how: libc::c_int, signals: &[libc::c_int]) -> std::io::Result<()> {
    change_mask(how, signals, std::ptr::null_mut())
}

/// `before` is null, or gets the mask that was.
fn change_mask(
    how: libc::c_int,
    signals: &[libc::c_int],
    before: *mut libc::sigset_t,
) -> std::io::Result<()> {
    // SAFETY: `sigset_t` is plain data, which `sigemptyset` fills in; the callers say what `before` is.
    let failed = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        libc::pthread_sigmask(how, &raw const set, before)
    };
    done(failed)
}

/// What a call of pthreads says.
fn done(failed: libc::c_int) -> std::io::Result<()> {
    match failed {
        0 => Ok(()),
        errno => Err(std::io::Error::from_raw_os_error(errno)),
    }
}

/// Has `handler` run when `signal` comes. It must be async-signal-safe.
fn handle(
    signal: libc::c_int,
    handler: extern "C" fn(libc::c_int),
    flags: libc::c_int,
) -> std::io::Result<()> {
    // SAFETY: `sigaction` is plain data; each handler says why it may run at any time.
    let failed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = flags;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(signal, &raw const action, std::ptr::null_mut())
    };
    match failed {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Async-signal-safe: atomics and system calls only.
extern "C" fn on_stop(signal: libc::c_int) {
    if !is_owner() {
        return;
    }
    // SAFETY: the thread's own errno, which whatever was interrupted may be about to read.
    let errno = unsafe { *libc::__errno_location() };
    PENDING.fetch_or(1 << signal, Ordering::Release);
    if FIRST.compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
        FIRST_AT_MS.store(now_ms(), Ordering::Relaxed);
        let (tv_sec, tv_usec) = (LAST_RESORT_MS / 1000, LAST_RESORT_MS % 1000 * 1000);
        let zero = libc::timeval { tv_sec: 0, tv_usec: 0 };
        let once =
            libc::itimerval { it_interval: zero, it_value: libc::timeval { tv_sec, tv_usec } };
        // SAFETY: a timer that is filled in; the old one is not asked for.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const once, std::ptr::null_mut()) };
    }
    if let Some(bell) = BELL.get() {
        let one = 1_u64.to_ne_bytes();
        // SAFETY: eight bytes to write to a descriptor that stays open.
        unsafe { libc::write(bell.as_fd().as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Ends a process that has not heeded a signal. Async-signal-safe: atomics and system calls only. An alarm that
/// somebody else sends is ignored.
extern "C" fn on_alarm(_: libc::c_int) {
    let signal = FIRST.load(Ordering::Relaxed);
    // The timer may be a moment early by another clock.
    let is_due = now_ms() - FIRST_AT_MS.load(Ordering::Relaxed) >= LAST_RESORT_MS - 20;
    if signal == 0 || !is_owner() || !is_due {
        return;
    }
    devices::backend::console::restore_terminal();
    crate::fork::remove_socket_later();
    say(match signal {
        libc::SIGHUP => ": stopped by SIGHUP: ",
        libc::SIGINT => ": stopped by SIGINT: ",
        libc::SIGQUIT => ": stopped by SIGQUIT: ",
        libc::SIGXCPU => ": stopped by SIGXCPU: ",
        _ => ": stopped by SIGTERM: ",
    });
    put("something that husk waits for does not answer\n");
    let code = Ending::Signalled { signal }.exit_code();
    // SAFETY: ends the process at once; nothing is left to be run in it.
    unsafe { libc::_exit(code as libc::c_int) };
}

/// Whether this is the process that took the signals, and was not forked off it. Async-signal-safe.
fn is_owner() -> bool {
    // SAFETY: asks the kernel, nothing else.
    let this = unsafe { libc::getpid() };
    this == OWNER.load(Ordering::Relaxed)
}

fn now_ms() -> i64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills in plain data.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec * 1000 + now.tv_nsec / 1_000_000
}

/// Whether whoever started us wants `signal` ignored.
fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: `sigaction` is plain data, which the call fills in; nothing is changed by it.
    let action = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        match libc::sigaction(signal, std::ptr::null(), &raw mut action) {
            0 => action,
            _ => return false,
        }
    };
    action.sa_sigaction == libc::SIG_IGN
}

/// Takes the place of Rust's own handler of SIGSEGV and SIGBUS, which tells a stack overflow from
/// other crashes: what it says is worth less than a terminal that works. Its alternate stack is used.
fn handle_crashes() -> std::io::Result<()> {
    // The default action is back once the handler runs: a crash in it is the end.
    CRASH.iter().try_for_each(|(signal, _)| {
        handle(*signal, on_crash, libc::SA_ONSTACK | libc::SA_RESETHAND)
    })
}

/// Async-signal-safe: system calls only, no allocation, no lock that is waited for.
extern "C" fn on_crash(signal: libc::c_int) {
    // One that copies memory may lose the pages of a file; the console goes on.
    let is_owner = is_owner();
    if is_owner {
        devices::backend::console::restore_terminal();
        say(CRASH.iter().find(|(number, _)| *number == signal).map_or("", |(_, line)| line));
    }
    // SAFETY: the default action, which SA_RESETHAND set, follows when the handler returns and the
    // signal is no longer blocked. The first process of a namespace has none (pid_namespaces(7)), and one that was forked
    // off in the sandbox may send signals to its parent alone: these end as a shell would say that they have.
    unsafe {
        if libc::getpid() == 1 || !is_owner {
            libc::_exit(128 + signal);
        }
        libc::raise(signal)
    };
}

/// The program's name and `text` on standard error. Async-signal-safe.
fn say(text: &str) {
    put(crate::logger::program());
    put(text);
}

/// `text` on standard error, if that takes it. Async-signal-safe.
fn put(text: &str) {
    let mut ready = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // A byte at a time: all that a terminal that is ready has room for.
    for byte in text.bytes() {
        // SAFETY: one descriptor to poll, and one byte to write.
        unsafe {
            if libc::poll(&raw mut ready, 1, 0) <= 0 {
                break;
            }
            libc::write(libc::STDERR_FILENO, (&raw const byte).cast(), 1);
        }
    }
}

impl Signals for ProcessSignals {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn next(&mut self) -> Option<i32> {
        self.0.hush();
        let first = |pending: u32| (pending != 0).then(|| pending & (pending - 1));
        let pending = PENDING.fetch_update(Ordering::Acquire, Ordering::Relaxed, first).ok()?;
        Some(pending.trailing_zeros().cast_signed())
    }
}
