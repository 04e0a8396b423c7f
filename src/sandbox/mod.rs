//! The sandbox around husk itself: what a flaw in husk could still do.
//!
//! ```text
//!   process begins   no_new_privs, capability bounding set, core limit        privileges.rs
//!   each thread,     capabilities, Landlock, seccomp: what its loop needs     privileges.rs, paths.rs, filter.rs
//!   before its loop
//!   before the guest the VMM thread closes itself; what needs paths from      controller
//!   runs             then on is done by one thread, `husk_files`
//! ```
//!
//! The policy is the process's: [`begin`] sets it once, and in a library nobody does, so that nothing is closed there.
//! Whatever cannot be put in force ends the process: a thread that is less confined than the log says must not run.
#[cfg(test)]
mod escape;
mod filter;
mod inherited;
mod level;
mod paths;
mod privileges;
mod probe;
mod ready;

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use landlock::RulesetCreated;

pub(crate) use self::filter::Seccomp;
pub(crate) use self::level::Levels;
use self::paths::{Roots, Rules};
pub(crate) use self::probe::probe;
use crate::error::Refusal;
use crate::exit::ExitCode;

/// What a thread is there for, and so what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Runs a vCPU, and the registers of devices.
    Vcpu,
    /// Runs devices.
    Io,
    /// Connects to Unix sockets, for vsock.
    Connect,
    /// Serves the API.
    Api,
    /// Owns the VM.
    Main,
    /// Does what needs paths, for the VMM thread.
    Files,
    /// Removes husk's own sockets, for the VMM thread, where nothing may be opened by path.
    Names,
    /// Is the process that makes children.
    Zygote,
}

impl Role {
    /// All there are.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 8] = [
        Self::Vcpu,
        Self::Io,
        Self::Connect,
        Self::Api,
        Self::Main,
        Self::Files,
        Self::Names,
        Self::Zygote,
    ];
}

/// What the user wants of the sandbox.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// What becomes of a system call that is in no list.
    pub(crate) seccomp: Seccomp,
    /// Whether husk is to refuse to start unless every layer is whole.
    pub(crate) is_required: bool,
    /// Whether there is to be none at all.
    pub(crate) is_off: bool,
    /// Where files may be used once the guest runs.
    pub(crate) allowed: Allowed,
}

/// Where files may be used by path once the guest runs.
#[derive(Clone, Debug, Default)]
pub(crate) enum Allowed {
    /// It is not said.
    #[default]
    Unsaid,
    /// At or below these.
    Below(Vec<PathBuf>),
    /// Nowhere: nothing is opened but what comes open.
    Nothing,
}

/// What threads are closed with.
#[derive(Debug)]
struct Policy {
    seccomp: Seccomp,
    roots: Roots,
}

static POLICY: OnceLock<Policy> = OnceLock::new();

/// Whether threads of this process close themselves.
pub(crate) fn has_begun() -> bool {
    POLICY.get().is_some()
}

/// Takes from the process what none of its threads needs, and settles how threads are closed. Before any other thread
/// is there. Refused if the host has less than is `required`.
pub(crate) fn begin(wanted: &Wanted) -> Result<(), Refusal> {
    if wanted.is_off {
        log::warn!("the sandbox is off: a flaw in husk is a flaw in all that its user may do");
        return Ok(());
    }
    let roots = Roots::of(wanted)?;
    let levels = Levels::of(wanted.seccomp, &roots);
    if let (true, Some(why)) = (wanted.is_required, levels.shortfall()) {
        return Err(Refusal::Sandbox(why));
    }
    log::info!("sandbox: {levels}");
    if let Some(why) = levels.shortfall() {
        log::debug!("sandbox: less than --require-sandbox asks for: {why}");
    }
    privileges::give_up_for_good().map_err(Refusal::host("cannot give up privileges"))?;
    let policy = Policy { seccomp: wanted.seccomp, roots };
    paths::make_ready().map_err(Refusal::host("cannot make the sandbox's rules"))?;
    // A process begins once.
    let _ = POLICY.set(policy);
    Ok(())
}

/// Notes which descriptors the process was started with. Before any other is opened.
pub(crate) fn note_inherited() {
    inherited::note();
}

/// Says that this process, which was forked off, has closed all that its parent was started with.
pub(crate) fn forget_inherited() {
    inherited::forget();
    ready::forget();
}

/// Closes the descriptors that the process was started with, but for `kept`.
pub(crate) fn close_inherited(kept: &[RawFd]) {
    if is_on() {
        inherited::close_all_but(kept);
    }
}

/// Whether threads are closed.
pub(crate) fn is_on() -> bool {
    POLICY.get().is_some()
}

/// Whether files may be used in some places only.
pub(crate) fn has_roots() -> bool {
    POLICY.get().is_some_and(|policy| policy.roots != Roots::Anywhere)
}

/// Whether nothing is opened by path once the guest runs.
pub(crate) fn opens_nothing() -> bool {
    POLICY.get().is_some_and(|policy| policy.roots == Roots::Nowhere)
}

/// Closes the calling thread: from here on it may do what `role` needs, and so may threads that it starts. Does
/// nothing where there is no sandbox. If it cannot be done, the process ends.
pub(crate) fn enter(role: Role) {
    close(role, Rules::Closed);
}

/// The same, for the process that makes children, which may use files where the user allows it, and remove the API's socket
/// in the directories that are `removable`. One that a child makes for its own children is closed like the one that made
/// the child already. The kernel takes no more than 16 sets of rules one upon the other: with one more for each
/// generation there would be no 16th.
pub(crate) fn enter_zygote(removable: &[PathBuf]) {
    /// Where this process may remove files, since it or one that it was forked off from is a zygote.
    static CLOSED: Mutex<Option<Vec<PathBuf>>> = Mutex::new(None);

    let Some(Policy { roots, .. }) = POLICY.get() else { return };
    let mut closed = CLOSED.lock().unwrap_or_else(PoisonError::into_inner);
    let covers = |closed: &Vec<PathBuf>| *roots == Roots::Anywhere || closed == removable;
    if !closed.as_ref().is_some_and(covers) {
        close(Role::Zygote, Rules::Files { roots, removable, usable: &[] });
        *closed = Some(removable.to_owned());
    }
}

/// What a thread that may use paths is closed with, made before it begins: where there is no descriptor left for it,
/// whoever asked is told so, rather than the process ended.
#[derive(Debug)]
pub(crate) struct Prepared(Option<(Role, RulesetCreated)>);

impl Prepared {
    /// For the one thread that may use paths: files where the user allows it and in the directories `usable`. If none may,
    /// for the one that removes files. Either removes husk's own sockets, in the directories that are `removable`.
    pub(crate) fn new(removable: &[PathBuf], usable: &[PathBuf]) -> io::Result<Self> {
        let Some(Policy { roots, .. }) = POLICY.get() else { return Ok(Self(None)) };
        let (role, rules) = match roots {
            Roots::Nowhere => (Role::Names, Rules::Names { removable }),
            _ => (Role::Files, Rules::Files { roots, removable, usable }),
        };
        Ok(Self(Some((role, rules.ruleset()?))))
    }

    /// Closes the calling thread. If it cannot be done, the process ends.
    pub(crate) fn enter(self) {
        if let Some((role, rules)) = self.0 {
            close_by(role, || paths::enforce(rules));
        }
    }
}

fn close(role: Role, rules: Rules<'_>) {
    close_by(role, || rules.enforce());
}

fn close_by(role: Role, enforce: impl FnOnce() -> io::Result<()>) {
    let Some(policy) = POLICY.get() else { return };
    let closed = privileges::drop_capabilities()
        .and_then(|()| enforce())
        .and_then(|()| filter::install(role, policy.seccomp));
    if let Err(e) = closed {
        let name = std::thread::current().name().unwrap_or("?").to_owned();
        crate::logger::complain(&format!("cannot close the sandbox of thread {name}: {e}"));
        devices::backend::console::restore_terminal();
        std::process::exit(ExitCode::Host as i32);
    }
    #[cfg(test)]
    escape::attack(role);
}

/// The same, for threads that devices start.
pub(crate) fn enter_io() {
    enter(Role::Io);
}
