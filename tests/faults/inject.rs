//! One system call of husk that fails, by strace: which calls there are, and what was done to them.
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustix::time::Timespec;

use crate::util::*;

/// The calls that are made to fail. What a scenario does not make, it has no faults of.
pub(crate) const CALLS: [&str; 26] = [
    "openat",
    "read",
    "pread64",
    "preadv",
    "write",
    "pwrite64",
    "pwritev",
    "fsync",
    "fdatasync",
    "ftruncate",
    "fallocate",
    "mmap",
    "madvise",
    "ioctl",
    "eventfd2",
    "epoll_create1",
    "epoll_ctl",
    "clone",
    "clone3",
    "socket",
    "bind",
    "memfd_create",
    "rename",
    "linkat",
    "io_uring_setup",
    "io_uring_enter",
];

/// What they fail with, and what that is called.
pub(crate) const ERRORS: [(&str, &str); 5] = [
    ("EIO", "Input/output error"),
    ("ENOSPC", "No space left on device"),
    ("ENOMEM", "Cannot allocate memory"),
    ("EINTR", "Interrupted system call"),
    ("EMFILE", "Too many open files"),
];

/// The first thing that husk does itself: what is before it is the loader's and the standard library's.
const BEGIN: &str = "PR_SET_NO_NEW_PRIVS";

/// The `nth` call of each thread fails.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) call: &'static str,
    pub(crate) error: &'static str,
    pub(crate) words: &'static str,
    pub(crate) nth: usize,
}

impl Fault {
    /// What strace is to do: nothing but look for `None`.
    fn options(fault: Option<&Self>, log: &Path) -> Vec<String> {
        let mut options =
            vec!["-f".to_owned(), "-o".into(), log.display().to_string(), "-e".into()];
        match fault {
            None => options.push(format!("trace=prctl,{}", CALLS.join(","))),
            Some(Self { call, error, nth, .. }) => options.extend([
                format!("trace={call}"),
                "-e".into(),
                format!("inject={call}:error={error}:when={nth}"),
            ]),
        }
        options
    }

    /// Whether what was interrupted is a call that no kernel interrupts, and that a library makes for us and does not
    /// make again: the mapping of a vCPU's `kvm_run`, that of a stack for signal handlers, and tokio's wait for a client
    /// that has just connected.
    pub(crate) fn is_beyond_us(&self, log: &Log, said: &str) -> bool {
        match self.call {
            "mmap" => said.contains("KVM_CREATE_VCPU") || said.contains("alternative stack"),
            "epoll_ctl" => log.injected().iter().any(|line| line.contains("EPOLLRDHUP|EPOLLET")),
            _ => false,
        }
    }

    /// `husk` with these arguments, from its first moment on. It is a child of the test, not of strace.
    pub(crate) fn husk(fault: Option<&Self>, log: &Path) -> Husk {
        let options = Self::options(fault, log);
        let words = ["-D", "--seccomp-bpf"].map(str::to_owned).into_iter().chain(options);
        Husk::of("strace", words).arg(env!("CARGO_BIN_EXE_husk"))
    }
}

/// Follows a process that runs.
pub(crate) struct Follower(Child);

impl Follower {
    pub(crate) fn attach(vm: &TestVm, fault: Option<&Fault>, log: &Path) -> Self {
        Self::follow(&vm.pid().to_string(), Fault::options(fault, log))
    }

    /// Follows its thread of this name alone, and does this to it.
    pub(crate) fn attach_to(vm: &TestVm, thread: &str, inject: &str, log: &Path) -> Self {
        let tasks = fs::read_dir(format!("/proc/{}/task", vm.pid())).unwrap().flatten();
        let is_it = |task: &Path| {
            fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() == thread)
        };
        let task = tasks.map(|task| task.path()).find(|task| is_it(task)).expect("the thread");
        let id = task.file_name().unwrap().to_str().unwrap().to_owned();
        let inject = format!("inject={inject}");
        Self::follow(&id, ["-o".into(), log.display().to_string(), "-e".into(), inject])
    }

    fn follow(id: &str, options: impl IntoIterator<Item = String>) -> Self {
        let mut command = Command::new("strace");
        command.args(options).args(["-p", id]);
        let mut child = command.stderr(Stdio::piped()).spawn().expect("strace");
        let said = Output::capture("strace", child.stderr.take().unwrap());
        said.line("attached", Instant::now() + PATIENCE).unwrap();
        Self(child)
    }

    /// Lets go of the process, and has the log written.
    pub(crate) fn detach(mut self) {
        let strace = Pid::from_child(&self.0);
        let ended = pidfd_open(strace, PidfdFlags::empty()).unwrap();
        // It ends with whom it follows. Told to let go of who is just ending, it waits for a thread that is gone.
        let _ = kill_process(strace, Signal::TERM);
        let mut ended = [PollFd::new(&ended, PollFlags::IN)];
        let patience = Timespec { tv_sec: 3, tv_nsec: 0 };
        if !poll(&mut ended, Some(&patience)).is_ok_and(|count| count > 0) {
            let _ = kill_process(strace, Signal::KILL);
        }
        self.0.wait().unwrap();
    }
}

/// What strace wrote.
#[derive(Debug)]
pub(crate) struct Log(String);

impl Log {
    pub(crate) fn read(path: &PathBuf) -> Self {
        Self(fs::read_to_string(path).unwrap_or_default())
    }

    /// The calls that failed by order, as strace shows them.
    pub(crate) fn injected(&self) -> Vec<String> {
        let mut begun: HashMap<&str, &str> = HashMap::new();
        let mut injected = Vec::new();
        for line in self.0.lines() {
            let (thread, call) = line.split_once(' ').unwrap_or_default();
            // Another thread's call may come between its two halves.
            if let Some((first, _)) = call.split_once(" <unfinished ...>") {
                begun.insert(thread, first);
            }
            if line.contains("(INJECTED)") {
                let first = begun.get(thread).filter(|_| call.contains(" resumed>"));
                injected.push(format!("{}{line}", first.unwrap_or(&"")));
            }
        }
        injected
    }

    /// All faults that can be made in a run like this one: the calls of each thread have numbers from 1 on. Of a vCPU
    /// whose guest goes on for ever what comes until its entry `runs_max` is as good as more.
    pub(crate) fn faults(&self, runs_max: usize) -> Vec<Fault> {
        let is_whole = self.0.contains(BEGIN) && self.0.contains("execve");
        let main = self.0.split(' ').next().unwrap_or_default();
        let mut has_begun = !is_whole && !self.0.contains(BEGIN);
        let mut counts: HashMap<(&str, &str), usize> = HashMap::new();
        let mut before: HashMap<&str, usize> = HashMap::new();
        let mut last: HashMap<&str, usize> = HashMap::new();
        let mut runs: HashMap<&str, usize> = HashMap::new();
        for line in self.0.lines() {
            let Some((pid, rest)) = line.split_once(' ') else { continue };
            has_begun |= pid == main && rest.contains(BEGIN);
            let Some((name, _)) = rest.trim_start().split_once('(') else { continue };
            let Some(call) = CALLS.iter().find(|call| **call == name) else { continue };
            let count = counts.entry((pid, call)).or_default();
            *count += 1;
            let runs = runs.entry(pid).or_default();
            *runs += usize::from(rest.contains("KVM_RUN"));
            if *runs <= runs_max {
                let last = last.entry(call).or_default();
                *last = (*last).max(*count);
            }
            if pid == main && !has_begun {
                *before.entry(call).or_default() += 1;
            }
        }
        let mut faults = Vec::new();
        for call in CALLS {
            let last = last.get(call).copied().unwrap_or(0);
            let first = before.get(call).unwrap_or(&0) + 1;
            for nth in first..=last {
                for (error, words) in ERRORS {
                    faults.push(Fault { call, error, words, nth });
                }
            }
        }
        faults
    }
}

/// How long a fault may take to come to something: a guest waits for its disk for 10 s.
pub(crate) const DEADLINE: Duration = Duration::from_secs(45);
