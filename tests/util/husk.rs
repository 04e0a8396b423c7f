//! The process under test.
#![expect(unsafe_code, reason = "a process is told between fork and exec to die with its parent")]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use rustix::time::Timespec;

use super::{Api, Network, Output, PATIENCE, Scratch, Terminal, guest, require_host, terminal};

/// A process to be started. Standard input is empty unless the test is to type.
#[derive(Debug)]
pub(crate) struct Husk {
    program: OsString,
    args: Vec<OsString>,
    scratch: Scratch,
    socket: Option<PathBuf>,
    network: Option<Network>,
    input: Input,
    directory: Option<PathBuf>,
    preparation: Option<String>,
    blocks_signals: bool,
}

/// Where standard input comes from, and standard output goes.
#[derive(Debug)]
enum Input {
    None,
    Pipe,
    Terminal,
    /// Standard output too; none of it is captured.
    Files(File, File),
}

impl Husk {
    /// `husk` with these arguments.
    pub(crate) fn new<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        require_host();
        Self {
            program: env!("CARGO_BIN_EXE_husk").into(),
            args: args.into_iter().map(|arg| arg.as_ref().to_owned()).collect(),
            scratch: Scratch::new(),
            socket: None,
            network: None,
            input: Input::None,
            directory: None,
            preparation: None,
            blocks_signals: false,
        }
    }

    /// Another program in husk's place.
    pub(crate) fn of<S: AsRef<OsStr>>(
        program: impl AsRef<OsStr>,
        args: impl IntoIterator<Item = S>,
    ) -> Self {
        Self { program: program.as_ref().to_owned(), ..Self::new(args) }
    }

    /// `husk run` with a kernel.
    pub(crate) fn run(kernel: impl AsRef<Path>) -> Self {
        Self::new(["run", "--kernel"]).arg(kernel.as_ref())
    }

    /// `husk run` with the test guest `tests/guests/NAME.rs` and a command line.
    pub(crate) fn guest(name: &str, cmdline: &str) -> Self {
        Self::run(guest(name)).cmdline(cmdline)
    }

    /// `husk check` with a kernel.
    pub(crate) fn check(kernel: impl AsRef<Path>) -> Self {
        Self::new(["check", "--kernel"]).arg(kernel.as_ref())
    }

    /// `husk api`, which is listening when [`Self::start`] returns.
    pub(crate) fn api() -> Self {
        Self::new(["api"]).listening()
    }

    /// husk under the name `firecracker`.
    pub(crate) fn firecracker<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        Self::named("firecracker", args)
    }

    /// husk under another name.
    pub(crate) fn named<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Self {
        let mut husk = Self::new(args);
        husk.program = husk.under_the_name(name);
        husk
    }

    /// husk under the name `jailer`, to start what is called `firecracker` and is husk.
    pub(crate) fn jailer<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        let mut husk = Self::new([] as [&str; 0]);
        let program = husk.under_the_name("firecracker");
        husk.program = husk.under_the_name("jailer");
        let husk = husk.option("--exec-file", program);
        args.into_iter().fold(husk, Self::arg)
    }

    fn under_the_name(&self, name: &str) -> OsString {
        let link = self.scratch.path(name);
        symlink(&self.program, &link).unwrap();
        link.into()
    }

    /// `husk restore` in place of `run`, in the same network, with what such a process is told of itself.
    pub(crate) fn restored_from(mut self, snapshot: impl AsRef<Path>) -> Self {
        const KEPT: [&str; 3] = ["--metadata", "--mmds-size-limit", "--on-reboot"];
        let kept = self.args.windows(2).filter(|pair| KEPT.iter().any(|flag| pair[0] == *flag));
        let kept: Vec<_> = kept.flatten().cloned().collect();
        self.args = vec!["restore".into(), snapshot.as_ref().into()];
        self.args.extend(kept);
        self
    }

    /// Adds an argument.
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds a flag and its value.
    pub(crate) fn option(self, flag: &str, value: impl AsRef<OsStr>) -> Self {
        self.arg(flag).arg(value)
    }

    pub(crate) fn cmdline(self, text: &str) -> Self {
        self.option("--cmdline", text)
    }

    pub(crate) fn cpus(self, count: u32) -> Self {
        self.option("--cpus", count.to_string())
    }

    pub(crate) fn memory(self, mib: u64) -> Self {
        self.option("--memory", mib.to_string())
    }

    pub(crate) fn initrd(self, path: impl AsRef<Path>) -> Self {
        self.option("--initrd", path.as_ref())
    }

    pub(crate) fn disk(self, path: impl AsRef<Path>) -> Self {
        self.option("--disk", path.as_ref())
    }

    pub(crate) fn read_only_disk(self, path: impl AsRef<Path>) -> Self {
        self.option("--disk", format!("{},ro", path.as_ref().display()))
    }

    pub(crate) fn serial(self, to: &str) -> Self {
        self.option("--serial", to)
    }

    pub(crate) fn exit_on_reboot(self) -> Self {
        self.option("--on-reboot", "exit")
    }

    /// Gives it the tap `tap0` of a network, and runs it there. `more` is the rest of the option, from a comma on.
    pub(crate) fn network(self, network: &Network, more: &str) -> Self {
        self.within(network).option("--net", format!("tap=tap0{more}"))
    }

    /// Gives it this address for vsock, and the host this socket.
    pub(crate) fn vsock(self, cid: u32, socket: &Path) -> Self {
        self.option("--vsock", format!("cid={cid},uds={}", socket.display()))
    }

    /// Runs it in a network.
    pub(crate) fn within(mut self, network: &Network) -> Self {
        self.network = Some(network.clone());
        self
    }

    /// Runs it in a directory.
    pub(crate) fn in_directory(mut self, path: impl AsRef<Path>) -> Self {
        self.directory = Some(path.as_ref().to_owned());
        self
    }

    /// Runs a line of shell before it, in its process and in a mount namespace of its own: limits, mounts.
    pub(crate) fn after(mut self, shell: &str) -> Self {
        self.preparation = Some(shell.to_owned());
        self
    }

    /// Runs it by another program: its name, and the arguments before husk's own.
    pub(crate) fn by<S: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        let mut words: Vec<OsString> = words.into_iter().map(|w| w.as_ref().to_owned()).collect();
        let first = words.remove(0);
        words.push(std::mem::replace(&mut self.program, first));
        words.append(&mut self.args);
        self.args = words;
        self
    }

    /// Runs it as a root for whom the modes of files hold that are not its own.
    pub(crate) fn heeding_modes(self) -> Self {
        self.by(["setpriv", "--bounding-set", "-dac_override,-dac_read_search"])
    }

    /// Gives it an API socket, and a log that tells when it listens.
    pub(crate) fn listening(self) -> Self {
        let socket = self.scratch.path("api.sock");
        self.listening_at(&socket)
    }

    /// The same at a path of the test's choice.
    pub(crate) fn listening_at(mut self, socket: &Path) -> Self {
        self.socket = Some(socket.to_owned());
        self.option("--api-sock", socket).option("--log-level", "info")
    }

    /// Lets the test type.
    pub(crate) fn typing(mut self) -> Self {
        self.input = Input::Pipe;
        self
    }

    /// Runs it on a terminal, in the foreground.
    pub(crate) fn on_terminal(mut self) -> Self {
        self.input = Input::Terminal;
        self
    }

    /// Gives it these standard streams; its output is not captured.
    pub(crate) fn streams(mut self, input: File, output: File) -> Self {
        self.input = Input::Files(input, output);
        self
    }

    /// Starts it with every signal blocked, as a careless parent may.
    pub(crate) fn with_signals_blocked(mut self) -> Self {
        self.blocks_signals = true;
        self
    }

    /// Starts it. If it is to listen, it does.
    #[track_caller]
    pub(crate) fn start(self) -> TestVm {
        let vm = self.start_unheard();
        if vm.setup.socket.is_some() {
            vm.expect_error("Listening on API socket");
        }
        vm
    }

    /// Starts it, and does not wait for it to listen.
    pub(crate) fn start_unheard(self) -> TestVm {
        let mut command = match &self.preparation {
            None => Command::new(&self.program),
            Some(shell) => {
                let script = format!("set -e; {shell}; exec \"$0\" \"$@\"");
                let mut command = Command::new("unshare");
                command.args(["--mount", "sh", "-c", &script]).arg(&self.program);
                command
            }
        };
        command.args(&self.args).stderr(Stdio::piped());
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        if let Some(network) = &self.network {
            network.enter(&mut command);
        }
        let terminal = attach(&mut command, &self.input);
        die_with_parent(&mut command);
        if self.blocks_signals {
            block_signals(&mut command);
        }
        let started = Instant::now();
        let mut child =
            command.spawn().unwrap_or_else(|e| panic!("{}: {e}", self.program.display()));
        // It holds the terminal's other side, or copies of the files.
        drop(command);
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let errors = Output::capture("stderr", child.stderr.take().unwrap());
        let serial = match (&terminal, child.stdout.take()) {
            (Some(terminal), _) => Output::capture("the terminal", terminal.file()),
            (None, Some(stdout)) => Output::capture("stdout", stdout),
            (None, None) => Output::none(),
        };
        let input = match &terminal {
            Some(terminal) => Some(terminal.file()),
            None => child.stdin.take().map(|stdin| File::from(OwnedFd::from(stdin))),
        };
        TestVm { setup: self, child, pidfd, started, serial, errors, input, terminal }
    }

    /// Starts it and waits for its end.
    #[track_caller]
    pub(crate) fn wait(self) -> End {
        self.start().wait()
    }
}

fn attach(command: &mut Command, input: &Input) -> Option<Terminal> {
    match input {
        Input::None => drop(command.stdin(Stdio::null()).stdout(Stdio::piped())),
        Input::Pipe => drop(command.stdin(Stdio::piped()).stdout(Stdio::piped())),
        Input::Files(input, output) => {
            command.stdin(input.try_clone().unwrap()).stdout(output.try_clone().unwrap());
        }
        Input::Terminal => {
            let (ours, theirs) = Terminal::new();
            command.stdin(theirs.try_clone().unwrap()).stdout(theirs);
            terminal::control(command);
            return Some(ours);
        }
    }
    None
}

/// A test that is killed must not leave VMs behind.
fn die_with_parent(command: &mut Command) {
    // SAFETY: one system call between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        })
    };
}

fn block_signals(command: &mut Command) {
    // SAFETY: plain data and system calls between fork and exec.
    unsafe {
        command.pre_exec(|| {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            match libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut()) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    };
}

/// A process that runs. Dropping it kills it; a test that fails shows what it said.
#[derive(Debug)]
pub(crate) struct TestVm {
    setup: Husk,
    child: Child,
    pidfd: OwnedFd,
    started: Instant,
    /// Standard output: the serial console.
    pub(crate) serial: Output,
    /// Standard error.
    pub(crate) errors: Output,
    input: Option<File>,
    terminal: Option<Terminal>,
}

impl TestVm {
    /// Waits for the next line of serial output with `pattern` in it; the line.
    #[track_caller]
    pub(crate) fn expect(&self, pattern: &str) -> String {
        self.expect_within(pattern, PATIENCE)
    }

    /// The same with another deadline.
    #[track_caller]
    pub(crate) fn expect_within(&self, pattern: &str, patience: Duration) -> String {
        self.give_up_on(self.serial.line(pattern, Instant::now() + patience))
    }

    /// Waits for serial output that need not end its line: a prompt.
    #[track_caller]
    pub(crate) fn expect_text(&self, text: &str) {
        self.give_up_on(self.serial.text(text, Instant::now() + PATIENCE));
    }

    /// Waits for the next line of standard error with `pattern` in it; the line.
    #[track_caller]
    pub(crate) fn expect_error(&self, pattern: &str) -> String {
        self.give_up_on(self.errors.line(pattern, Instant::now() + PATIENCE))
    }

    /// Types on standard input.
    pub(crate) fn type_in(&self, text: impl AsRef<[u8]>) {
        let mut input = self.input.as_ref().expect("a test that types says so by typing()");
        input.write_all(text.as_ref()).unwrap();
    }

    /// Ends standard input.
    pub(crate) fn end_input(&mut self) {
        self.input = None;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process that copies its memory, if there is one.
    pub(crate) fn copier(&self) -> Option<Pid> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).ok()?;
        let children = tasks.flatten().filter_map(|task| {
            // Threads come and go.
            std::fs::read_to_string(task.path().join("children")).ok()
        });
        let pids: Vec<String> = children
            .flat_map(|pids| pids.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .collect();
        let pid = pids.into_iter().find(|pid| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name.trim_end() != "husk_zygote")
        })?;
        Pid::from_raw(pid.parse().ok()?)
    }

    /// Its API.
    pub(crate) fn api(&self) -> Api {
        Api::new(self.socket())
    }

    /// The path of its API socket.
    pub(crate) fn socket(&self) -> &Path {
        self.setup.socket.as_deref().expect("a test that uses the API says so by listening()")
    }

    /// The terminal it runs on.
    pub(crate) fn terminal(&self) -> &Terminal {
        self.terminal.as_ref().expect("a test that looks at the terminal says so by on_terminal()")
    }

    /// Whether it still runs.
    pub(crate) fn is_running(&self) -> bool {
        !self.ends_within(Duration::ZERO)
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn wait(self) -> End {
        self.wait_within(PATIENCE)
    }

    /// The same with another deadline.
    #[track_caller]
    pub(crate) fn wait_within(mut self, patience: Duration) -> End {
        if !self.ends_within(patience) {
            panic!("{:?} still runs after {patience:?}", self.setup.args);
        }
        let took = self.started.elapsed();
        let status = self.child.wait().unwrap();
        let deadline = Instant::now() + PATIENCE;
        let output = self.give_up_on(self.serial.end(deadline));
        let errors = self.give_up_on(self.errors.end(deadline));
        let terminal = self.terminal.take();
        End { args: self.setup.args.clone(), status, output, errors, took, terminal }
    }

    /// Waits so long for its end; whether that came.
    pub(crate) fn ends_within(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&Timespec::try_from(left).unwrap())) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => panic!("poll: {e}"),
            }
        }
    }

    #[track_caller]
    fn give_up_on<T>(&self, result: Result<T, String>) -> T {
        result.unwrap_or_else(|why| panic!("{why}"))
    }
}

impl Drop for TestVm {
    fn drop(&mut self) {
        // It may have ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let deadline = Instant::now() + Duration::from_secs(2);
            let _ = (self.serial.end(deadline), self.errors.end(deadline));
            eprintln!("husk {:?} said:\n{}", self.setup.args, self.serial.so_far());
            eprintln!("and on standard error:\n{}", self.errors.so_far());
        }
    }
}

/// Types commands of one letter to a test guest, and gives what it says to the last.
#[track_caller]
pub(crate) fn tell(vm: &TestVm, commands: &str) -> String {
    let mut said = String::new();
    for command in commands.chars() {
        vm.type_in(command.to_string());
        said = vm.expect("=");
    }
    said
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct End {
    args: Vec<OsString>,
    pub(crate) status: ExitStatus,
    /// Standard output: the serial console.
    pub(crate) output: String,
    /// Standard error.
    pub(crate) errors: String,
    /// From its start to its end.
    pub(crate) took: Duration,
    /// What it ran on.
    pub(crate) terminal: Option<Terminal>,
}

impl End {
    /// It ended with this exit code, or the test fails.
    #[track_caller]
    pub(crate) fn code(self, code: i32) -> Self {
        let is_right = self.status.code() == Some(code);
        assert!(is_right, "want exit code {code}, got {}\n{self}", self.status);
        self
    }

    /// The signal that killed it.
    pub(crate) fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// The guest was content and powered off.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert!(self.output.contains("RESULT ok"), "the guest is not content\n{self}");
        self.code(0)
    }

    /// It ended with this exit code and one line on standard error, which is returned.
    #[track_caller]
    pub(crate) fn refused(self, code: i32) -> String {
        let end = self.code(code);
        let is_one_line = end.errors.ends_with('\n') && end.errors.lines().count() == 1;
        assert!(is_one_line, "want one line on standard error\n{end}");
        end.errors.trim_end().to_owned()
    }

    /// It took no longer than a refusal may take. 100 ms are promised; the machine may be busy.
    #[track_caller]
    pub(crate) fn quickly(self) -> Self {
        assert!(self.took < Duration::from_secs(1), "too slow\n{self}");
        self
    }

    /// The values of all lines `key=value` of the serial output.
    pub(crate) fn values(&self, key: &str) -> Vec<&str> {
        let lines = self.output.lines();
        lines.filter_map(|l| Some(l.strip_prefix(key)?.strip_prefix('=')?.trim_end())).collect()
    }

    /// The value of the first such line.
    #[track_caller]
    pub(crate) fn value(&self, key: &str) -> &str {
        let values = self.values(key);
        values.first().unwrap_or_else(|| panic!("no line {key}=\n{self}"))
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { args, status, output, errors, took, .. } = self;
        write!(f, "husk {args:?} ended after {took:?} with {status}\n--- serial\n{output}\n")?;
        write!(f, "--- standard error\n{errors}\n---")
    }
}
