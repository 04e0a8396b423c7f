//! Where a serial port leads: the user's terminal, a file, a pseudo-terminal, a Unix socket.
//!
//! Knows nothing of the serial port. Whatever the destination does, or nobody does, reading and
//! writing never wait, and at most [`Console::KEPT`] bytes of output are kept.
//!
//! One epoll descriptor, the [`Console::events`], stands for everything behind the console, as a
//! socket's client comes and goes while the console is in use. All in it is edge-triggered: a
//! terminal nobody reads and a pseudo-terminal nobody has open are no reason to spin.
mod output;
mod terminal;

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::pty::OpenptFlags;
use rustix::termios::OptionalActions;

pub use self::output::Counters;
use self::output::Output;
pub use self::terminal::restore_terminal;
use self::terminal::{Escape, HELP, Key, RawMode, is_foreground};
use super::stream::{Direction, Stream};
use super::unix::{self, ListenError, Listener, SocketName, StalePolicy};
use crate::limiter::{Bucket, TokenBucket, now_ns};

/// Called when the user asks to quit, on the I/O thread with the serial port locked: may set a
/// flag or an eventfd, and must not block.
pub type Quit = Box<dyn Fn() + Send>;

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file cannot be opened.
    #[error("cannot open {path} for serial output")]
    Open {
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// The file is there, but is not one to write to.
    #[error("{path} is {found}; serial output wants a file, a FIFO or a terminal")]
    Kind {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The socket cannot be listened on.
    #[error("no socket at {path} for the serial port")]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: ListenError,
    },
    /// The host refused something else.
    #[error("cannot {doing} for the serial port")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

impl ConsoleError {
    fn host<E: Into<std::io::Error>>(doing: &'static str) -> impl Fn(E) -> Self {
        move |e| Self::Host { doing, source: e.into() }
    }
}

/// What there is to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// This many bytes for the guest; may be none, when the user spoke to husk.
    Bytes(usize),
    /// Nothing until the console's events say so, perhaps never.
    Nothing,
}

/// What makes one destination different from another.
enum Kind {
    /// Nothing is kept and nothing is lost: nobody is meant to hear it.
    Nowhere,
    /// A file or whatever stdout is, without a terminal to type on.
    Plain,
    /// The user's terminal. Restored when this goes.
    Terminal { _raw: RawMode, escape: Escape, quit: Quit, typed: VecDeque<u8> },
    /// A pseudo-terminal. We keep its other side open, so that it hangs up for nobody.
    Pty { _slave: OwnedFd, path: PathBuf },
    /// A socket, with or without a client. Its name goes with the console unless it was taken.
    Socket { name: Option<SocketName>, fd: OwnedFd, path: PathBuf },
}

/// A destination, with the bytes on their way to it.
pub struct Console {
    kind: Kind,
    events: Arc<Readiness>,
    input: Option<Arc<Stream>>,
    output: Output,
    /// What the guest may write.
    limit: Option<Bucket>,
    /// Bytes lost to it.
    limited: u64,
    has_complained: bool,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console")
            .field("path", &self.path())
            .field("input", &self.input)
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

impl Console {
    /// Output kept while nobody takes it; beyond that the oldest goes.
    pub const KEPT: usize = Output::LIMIT;
    /// Bytes read from a terminal while the guest has no room for them: more than anybody types.
    const TYPED_AHEAD: usize = 4096;

    /// Leads nowhere: no input, and output is forgotten.
    pub fn none() -> Result<Self, ConsoleError> {
        Self::new(Kind::Nowhere)
    }

    /// Leads to stdin and stdout.
    ///
    /// If stdin is a terminal, and ours (we are not in the background), it becomes raw until the
    /// console is dropped or [`restore_terminal`] is called; Ctrl-A x then calls `quit`. A terminal
    /// in the background is not read. Any other stdin is passed to the guest as it is, until its
    /// end. Who calls this should ignore SIGPIPE, and SIGTTOU in case of `stty tostop`.
    pub fn stdio(quit: Quit) -> Result<Self, ConsoleError> {
        Self::from_fds(rustix::stdio::stdin(), rustix::stdio::stdout(), quit)
    }

    /// Writes to `path`: created with mode 0600 if missing, appended to otherwise. A FIFO is
    /// opened for reading too, so that it needs no reader, now or later.
    pub fn file(path: &Path) -> Result<Self, ConsoleError> {
        let host = Stream::owned(open_output(path)?);
        let mut console = Self::new(Kind::Plain)?;
        console.connect(None, Some(Arc::new(host)))?;
        Ok(console)
    }

    /// Leads to a new pseudo-terminal, whose [`path`](Self::path) the user opens.
    pub fn pty() -> Result<Self, ConsoleError> {
        let failed = ConsoleError::host::<Errno>;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let nonblocking = OpenptFlags::from_bits_retain(OFlags::NONBLOCK.bits());
        let master = rustix::pty::openpt(flags | nonblocking).map_err(failed("open a pty"))?;
        rustix::pty::unlockpt(&master).map_err(failed("unlock a pty"))?;
        let name = rustix::pty::ptsname(&master, Vec::new()).map_err(failed("name a pty"))?;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).map_err(failed("open a pty"))?;
        let mut modes = rustix::termios::tcgetattr(&slave).map_err(failed("set up a pty"))?;
        modes.make_raw();
        rustix::termios::tcsetattr(&slave, OptionalActions::Now, &modes)
            .map_err(failed("set up a pty"))?;
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let mut console = Self::new(Kind::Pty { _slave: slave, path })?;
        let master = Arc::new(Stream::owned(master));
        console.connect(Some(master.clone()), Some(master))?;
        Ok(console)
    }

    /// Listens at `path` for one client at a time; a new one takes the place of the one before,
    /// so that a client that hangs can always be replaced. What the guest wrote while there was
    /// none goes to the next, the last [`KEPT`](Self::KEPT) bytes of it. The socket has mode 0600,
    /// takes the place of a dead one only, and is removed when the console is dropped.
    pub fn socket(path: &Path) -> Result<Self, ConsoleError> {
        let listener = Listener::bind(path, StalePolicy::Replace)
            .map_err(|source| ConsoleError::Listen { path: path.into(), source })?;
        let path = listener.path().to_owned();
        let (name, fd) = listener.into_parts();
        let console = Self::new(Kind::Socket { name: Some(name), fd, path })?;
        if let Kind::Socket { fd, .. } = &console.kind {
            console.events.watch(fd.as_fd())?;
        }
        Ok(console)
    }

    /// The name of the socket, if it is one: for whoever may remove files when the console goes, as the thread that drops
    /// it last may not.
    pub fn take_name(&mut self) -> Option<SocketName> {
        match &mut self.kind {
            Kind::Socket { name, .. } => name.take(),
            Kind::Nowhere | Kind::Plain | Kind::Terminal { .. } | Kind::Pty { .. } => None,
        }
    }

    /// Whether [`Self::file`] would succeed now. Makes no file.
    pub fn check_file(path: &Path) -> Result<(), ConsoleError> {
        let stat = rustix::fs::stat(path).ok();
        match stat.and_then(|stat| unfit(FileType::from_raw_mode(stat.st_mode))) {
            Some(found) => Err(ConsoleError::Kind { path: path.into(), found }),
            None => super::file::check_writable(path)
                .map_err(|source| ConsoleError::Open { path: path.into(), source }),
        }
    }

    /// Whether [`Self::socket`] would succeed now. Leaves no trace.
    pub fn check_socket(path: &Path) -> Result<(), ConsoleError> {
        Listener::check(path).map_err(|source| ConsoleError::Listen { path: path.into(), source })
    }

    /// What the user opens or connects to: `/dev/pts/N`, or the socket.
    pub fn path(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Pty { path, .. } | Kind::Socket { path, .. } => Some(path),
            Kind::Nowhere | Kind::Plain | Kind::Terminal { .. } => None,
        }
    }

    /// What became of the guest's bytes so far.
    pub fn counters(&self) -> Counters {
        Counters { limited: self.limited, ..self.output.counters() }
    }

    /// Limits the guest's output, in bytes. What goes beyond is lost: a guest that writes to a port
    /// cannot be made to wait without stopping its vCPU.
    pub fn limit(&mut self, limit: Option<&TokenBucket>) {
        self.limit = limit.and_then(|config| Bucket::new(config, now_ns()));
    }

    /// Whether this is a socket with a client.
    pub fn has_client(&self) -> bool {
        matches!(self.kind, Kind::Socket { .. }) && self.output.host().is_some()
    }

    /// Readable when [`ready`](Self::ready) has something to do.
    pub fn events(&self) -> Arc<Readiness> {
        self.events.clone()
    }

    /// Handles the events: a client comes or goes, waiting output can go on. There may be input.
    pub fn ready(&mut self) {
        self.events.consume();
        self.accept();
        self.flush();
    }

    /// Takes the guest's bytes; [`flush`](Self::flush) sends them.
    pub fn push(&mut self, bytes: &[u8]) {
        if !matches!(self.kind, Kind::Nowhere) {
            self.output.push(bytes);
        }
    }

    /// Sends what can be sent without waiting.
    pub fn flush(&mut self) {
        let Err(e) = self.output.flush() else { return };
        if matches!(self.kind, Kind::Socket { .. }) {
            // The client is gone. What it did not get, the next one gets.
            log::debug!("serial console client is gone: {e}");
            self.output.connect(None);
            return;
        }
        self.output.discard();
        if !std::mem::replace(&mut self.has_complained, true) {
            log::warn!("serial output is being lost: {e}");
        }
    }

    /// Waits up to `deadline` until everything is sent: for the end of a VM.
    pub fn finish(&mut self, deadline: Duration) {
        let start = Instant::now();
        loop {
            self.accept();
            self.flush();
            let left = deadline.saturating_sub(start.elapsed());
            let Some(host) = self.output.host().filter(|_| self.output.is_waiting()) else {
                return;
            };
            if left.is_zero() {
                return;
            }
            let mut fds = [rustix::event::PollFd::new(&**host, rustix::event::PollFlags::OUT)];
            let timeout = rustix::time::Timespec::try_from(left.min(Duration::from_millis(100)));
            // An error, such as EINTR, only ends this wait early.
            if let Err(e) = rustix::event::poll(&mut fds, timeout.ok().as_ref()) {
                log::debug!("waiting for serial output: {e}");
            }
        }
    }

    /// Reads input for the guest into `buf`, without waiting.
    pub fn read(&mut self, buf: &mut [u8]) -> Input {
        let has_typed = self.read_ahead();
        if let Kind::Terminal { typed, .. } = &mut self.kind {
            let passed = typed.len().min(buf.len());
            for (place, byte) in buf.iter_mut().zip(typed.drain(..passed)) {
                *place = byte;
            }
            return if has_typed || passed > 0 { Input::Bytes(passed) } else { Input::Nothing };
        }
        match self.read_host(buf) {
            0 => Input::Nothing,
            read => Input::Bytes(read),
        }
    }

    /// Looks at what the user types although the guest has no room for it, lest a guest that hangs
    /// takes the keys that end it with it. False when there is nothing, or no terminal.
    pub fn read_ahead(&mut self) -> bool {
        let Kind::Terminal { typed, .. } = &self.kind else { return false };
        let mut buf = [0; Self::TYPED_AHEAD];
        // An escape left over from the last time may come out as a byte more.
        let room = Self::TYPED_AHEAD.saturating_sub(typed.len()).saturating_sub(1);
        if !self.input.as_ref().is_some_and(|host| is_foreground(host.as_fd())) {
            return false;
        }
        let read = self.read_host(buf.get_mut(..room).unwrap_or_default());
        let Kind::Terminal { escape, quit, typed, .. } = &mut self.kind else { return false };
        let mut wants_help = false;
        for byte in buf.iter().take(read) {
            match escape.filter(*byte, |byte| typed.push_back(byte)) {
                Some(Key::Quit) => quit(),
                Some(Key::Help) => wants_help = true,
                None => {}
            }
        }
        if wants_help {
            self.push(HELP);
            self.flush();
        }
        read > 0
    }

    fn from_fds(
        stdin: BorrowedFd<'_>,
        stdout: BorrowedFd<'_>,
        quit: Quit,
    ) -> Result<Self, ConsoleError> {
        let output = Stream::shared(stdout, Direction::Output)
            .map_err(ConsoleError::host("use standard output"))?;
        let input = match Stream::shared(stdin, Direction::Input) {
            Ok(host) => Some(host),
            Err(e) => {
                log::debug!("no serial input: {e}");
                None
            }
        };
        let kind = match &input {
            Some(host) if host.is_terminal() && is_foreground(host.as_fd()) => {
                let raw = RawMode::enter(host.as_fd())
                    .map_err(ConsoleError::host("set the terminal to raw mode"))?;
                Kind::Terminal {
                    _raw: raw,
                    escape: Escape::default(),
                    quit,
                    typed: VecDeque::new(),
                }
            }
            _ => Kind::Plain,
        };
        let is_usable =
            |host: &Stream| !host.is_terminal() || matches!(kind, Kind::Terminal { .. });
        let input = input.filter(is_usable).map(Arc::new);
        let mut console = Self::new(kind)?;
        console.connect(input, Some(Arc::new(output)))?;
        Ok(console)
    }

    fn new(kind: Kind) -> Result<Self, ConsoleError> {
        Ok(Self::waiting(kind, Arc::new(Readiness::new()?)))
    }

    fn waiting(kind: Kind, events: Arc<Readiness>) -> Self {
        Self {
            kind,
            events,
            input: None,
            output: Output::default(),
            limit: None,
            limited: 0,
            has_complained: false,
        }
    }

    /// Leads nowhere, for as long as this one is not in its place. Unlike [`Self::none`] it takes nothing of the host.
    pub fn stand_in(&self) -> Self {
        Self::waiting(Kind::Nowhere, self.events.clone())
    }

    fn connect(
        &mut self,
        input: Option<Arc<Stream>>,
        output: Option<Arc<Stream>>,
    ) -> Result<(), ConsoleError> {
        for host in [&input, &output].into_iter().flatten() {
            self.events.watch(host.as_fd())?;
        }
        self.input = input;
        self.output.connect(output);
        Ok(())
    }

    /// Takes a new client, at most one a call; looks whether the present one is still there.
    fn accept(&mut self) {
        let Kind::Socket { fd, .. } = &self.kind else { return };
        let accepted = unix::accept(fd);
        if accepted.is_ok()
            && let Err(e) = self.events.rearm(fd.as_fd())
        {
            log::warn!("serial console socket: {e}");
        }
        match accepted {
            Ok(client) => {
                let client = Arc::new(Stream::socket(client));
                // To close the one before, whose descriptor nobody else has, also ends its events.
                if let Err(e) = self.connect(Some(client.clone()), Some(client)) {
                    log::warn!("serial console client: {e}");
                }
            }
            Err(e) => {
                // Anything else, such as too many open files, passes: the next to connect is told
                // apart by its own edge.
                if e != Errno::AGAIN {
                    log::warn!("serial console client not accepted: {e}");
                }
                // What it sent before it left may not have been read yet.
                if self.output.host().is_some_and(|host| host.is_hung_up()) {
                    self.output.connect(None);
                }
            }
        }
    }

    /// Reads raw bytes; 0 for nothing, now or ever.
    fn read_host(&mut self, buf: &mut [u8]) -> usize {
        let Some(host) = self.input.as_ref().filter(|_| !buf.is_empty()) else { return 0 };
        match host.read(buf) {
            Err(Errno::AGAIN) => return 0,
            Ok(0) => {}
            Ok(read) => return read,
            Err(e) => log::debug!("end of serial input: {e}"),
        }
        // A socket's client may still listen.
        self.input = None;
        0
    }
}

/// For vm-superio, which writes and flushes byte by byte: it never fails, and sending is left to
/// whoever knows when the last byte is written.
impl std::io::Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let allowed = match &mut self.limit {
            Some(limit) if !matches!(self.kind, Kind::Nowhere) => limit.take_up_to(len, now_ns()),
            _ => len,
        };
        self.limited = self.limited.saturating_add(len.saturating_sub(allowed));
        self.push(usize::try_from(allowed).ok().and_then(|n| bytes.get(..n)).unwrap_or(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The epoll descriptor that stands for all descriptors of a console.
#[derive(Debug)]
pub struct Readiness(OwnedFd);

impl Readiness {
    fn new() -> Result<Self, ConsoleError> {
        let made = retry_on_intr(|| epoll::create(CreateFlags::CLOEXEC));
        made.map(Self).map_err(ConsoleError::host("make an epoll"))
    }

    const FLAGS: EventFlags = EventFlags::IN.union(EventFlags::OUT).union(EventFlags::ET);

    fn watch(&self, fd: BorrowedFd<'_>) -> Result<(), ConsoleError> {
        match retry_on_intr(|| epoll::add(&self.0, fd, EventData::new_u64(0), Self::FLAGS)) {
            // A regular file cannot be waited for and need not be: it is always ready. And input
            // and output may be one.
            Ok(()) | Err(Errno::PERM | Errno::EXIST) => Ok(()),
            Err(e) => Err(ConsoleError::host("wait")(e)),
        }
    }

    /// Says again that `fd` is ready, if it is, as if it had just become so.
    fn rearm(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        retry_on_intr(|| epoll::modify(&self.0, fd, EventData::new_u64(0), Self::FLAGS))
    }

    /// Takes the events. Which they were does not matter: everything is looked at.
    fn consume(&self) {
        let mut events =
            [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 8];
        let now = rustix::time::Timespec::default();
        if let Err(e) = epoll::wait(&self.0, &mut events[..], Some(&now)) {
            log::debug!("serial console events: {e}");
        }
    }
}

impl AsRawFd for Readiness {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Opens the file for output, whatever it may be, without being blocked by it.
fn open_output(path: &Path) -> Result<OwnedFd, ConsoleError> {
    let failed = |e: Errno| ConsoleError::Open { path: path.into(), source: e.into() };
    let refused = |found| ConsoleError::Kind { path: path.into(), found };
    let kind = |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode);
    let flags = OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let open = |access| {
        let mode = Mode::RUSR | Mode::WUSR;
        let open = || rustix::fs::open(path, access | flags | OFlags::CREATE, mode);
        retry_on_intr(open).map_err(|e| {
            // What cannot be opened is best explained by what it is.
            let found = rustix::fs::stat(path).ok().and_then(|stat| unfit(kind(stat)));
            found.map_or(failed(e), refused)
        })
    };
    // Write-only, a FIFO without a reader cannot be opened, and one that has lost its reader fails.
    let is_fifo = rustix::fs::stat(path).is_ok_and(|stat| kind(stat) == FileType::Fifo);
    let fd = open(if is_fifo { OFlags::RDWR } else { OFlags::WRONLY })?;
    match unfit(kind(rustix::fs::fstat(&fd).map_err(failed)?)) {
        Some(found) => Err(refused(found)),
        None => Ok(fd),
    }
}

fn unfit(kind: FileType) -> Option<&'static str> {
    match kind {
        FileType::Directory => Some("a directory"),
        FileType::Socket => Some("a socket"),
        FileType::BlockDevice => Some("a block device"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    /// A directory of the test's own, removed afterwards.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("husk-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn fifo(&self) -> PathBuf {
            let path = self.0.join("fifo");
            rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn send(console: &mut Console, bytes: &[u8]) {
        console.push(bytes);
        console.flush();
    }

    fn read(console: &mut Console) -> Vec<u8> {
        let mut buf = [0; 64];
        match console.read(&mut buf) {
            Input::Bytes(read) => buf[..read].to_vec(),
            Input::Nothing => Vec::new(),
        }
    }

    fn over(stdin: BorrowedFd<'_>, stdout: BorrowedFd<'_>) -> Console {
        Console::from_fds(stdin, stdout, Box::new(|| ())).unwrap()
    }

    fn is_nonblocking(fd: impl AsFd) -> bool {
        rustix::fs::fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK)
    }

    fn has_event(console: &Console) -> bool {
        let events = console.events();
        let mut fds = [rustix::event::PollFd::new(&events.0, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&Default::default())).unwrap() == 1
    }

    #[test]
    fn nowhere_takes_everything_and_counts_nothing() {
        let mut console = Console::none().unwrap();
        send(&mut console, &[b'x'; 100_000]);
        assert_eq!(console.counters(), Counters::default());
        assert_eq!(read(&mut console), b"");
        console.finish(Duration::from_secs(10));
    }

    #[test]
    fn a_file_is_created_private_and_appended_to() {
        let dir = Scratch::new("file");
        let path = dir.0.join("log");
        for _ in 0..2 {
            send(&mut Console::file(&path).unwrap(), b"hello\n");
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"hello\nhello\n");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_cannot_be_written_to_is_refused_by_name() {
        let dir = Scratch::new("refused");
        let socket = dir.0.join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        for (path, what) in [
            (&dir.0, "is a directory"),
            (&socket, "is a socket"),
            (&dir.0.join("none/file"), "cannot open"),
        ] {
            let e = Console::file(path).unwrap_err().to_string();
            assert!(e.contains(what) && e.contains(path.to_str().unwrap()), "{e}");
        }
    }

    #[test]
    fn a_fifo_nobody_reads_keeps_the_last_bytes() {
        let dir = Scratch::new("fifo");
        let path = dir.fifo();
        let mut console = Console::file(&path).unwrap();
        let chunk: Vec<u8> = (0..=255).collect();
        for _ in 0..4096 {
            send(&mut console, &chunk);
        }
        let Counters { written, dropped, .. } = console.counters();
        assert_eq!(written + dropped + Console::KEPT as u64, 4096 * 256);
        assert!(dropped > 0);

        console.ready();
        let mut reader =
            File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut all: Vec<u8> = Vec::new();
        let mut buf = [0; 65_536];
        for _ in 0..3 {
            while let Ok(read) = reader.read(&mut buf) {
                all.extend(&buf[..read]);
            }
            console.ready();
        }
        assert_eq!(all.len() as u64, written + Console::KEPT as u64);
        assert_eq!(all[all.len() - Console::KEPT..], chunk.repeat(Console::KEPT / 256));
        assert_eq!(console.counters().dropped, dropped);
    }

    #[test]
    fn a_full_disk_and_a_closed_pipe_only_cost_bytes() {
        let mut full = Console::file(Path::new("/dev/full")).unwrap();
        send(&mut full, b"hello");
        assert_eq!(full.counters(), Counters { written: 0, dropped: 5, limited: 0 });

        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let null = File::open("/dev/null").unwrap();
        let mut closed = over(null.as_fd(), writer.as_fd());
        send(&mut closed, b"hello");
        assert_eq!(closed.counters(), Counters { written: 0, dropped: 5, limited: 0 });
    }

    #[test]
    fn pipes_are_used_without_making_them_nonblocking() {
        let (their_in, to_guest) = rustix::pipe::pipe().unwrap();
        let (from_guest, their_out) = rustix::pipe::pipe().unwrap();
        let mut console = over(their_in.as_fd(), their_out.as_fd());
        assert_eq!(read(&mut console), b"");

        rustix::io::write(&to_guest, b"\x01xhi").unwrap();
        send(&mut console, b"out");

        assert_eq!(read(&mut console), b"\x01xhi", "no escape on a pipe");
        let mut buf = [0; 8];
        assert_eq!(rustix::io::read(&from_guest, &mut buf).unwrap(), 3);
        for _ in 0..100 {
            send(&mut console, &[b'x'; 4096]);
        }
        assert!(console.counters().dropped > 0);
        assert!(!is_nonblocking(&their_in) && !is_nonblocking(&their_out));

        drop(to_guest);
        assert_eq!(read(&mut console), b"");
        assert!(console.input.is_none(), "the end of the pipe is the end of input");
    }

    #[test]
    fn sockets_as_stdio_never_block() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut console = over(theirs.as_fd(), theirs.as_fd());
        assert_eq!(read(&mut console), b"");
        for _ in 0..200 {
            send(&mut console, &[b'x'; 4096]);
        }
        assert!(console.counters().dropped > 0);
        assert!(!is_nonblocking(&theirs));
        (&ours).write_all(b"in").unwrap();
        assert_eq!(read(&mut console), b"in");
    }

    #[test]
    fn a_file_as_stdin_is_read_to_its_end() {
        let dir = Scratch::new("stdin");
        let path = dir.0.join("in");
        std::fs::write(&path, [7; 100]).unwrap();
        let file = File::open(&path).unwrap();
        let null = File::options().write(true).open("/dev/null").unwrap();
        let mut console = over(file.as_fd(), null.as_fd());
        assert_eq!(read(&mut console).len(), 64);
        assert_eq!(read(&mut console).len(), 36);
        assert_eq!(read(&mut console), b"");
        assert!(console.input.is_none());
        send(&mut console, &[0; 10_000]);
        assert_eq!(console.counters(), Counters { written: 10_000, dropped: 0, limited: 0 });
    }

    #[test]
    fn output_beyond_the_limit_is_lost_and_counted() {
        let dir = Scratch::new("limit");
        let path = dir.0.join("out");
        let mut console = Console::file(&path).unwrap();
        let limit = TokenBucket { size: 10, one_time_burst: Some(5), refill_time: 1 << 40 };
        console.limit(Some(&limit));
        for byte in b'a'..=b'l' {
            assert_eq!(console.write(&[byte]).unwrap(), 1);
        }
        assert_eq!(console.write(b"mnopqrstu").unwrap(), 9);
        assert_eq!(console.write(b"!").unwrap(), 1);
        // Words of husk's own are not the guest's.
        console.push(b" help");
        console.flush();
        assert_eq!(std::fs::read(&path).unwrap(), b"abcdefghijklmno help");
        assert_eq!(console.counters(), Counters { written: 20, dropped: 0, limited: 7 });
        console.limit(None);
        send(&mut console, b"?");
        assert_eq!(console.counters().written, 21);
        // Nothing is lost where nobody hears it.
        let mut nowhere = Console::none().unwrap();
        nowhere.limit(Some(&limit));
        assert_eq!(nowhere.write(&[0; 100]).unwrap(), 100);
        assert_eq!(nowhere.counters(), Counters::default());
    }

    fn open_pty(console: &Console) -> File {
        let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
        File::options()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(console.path().unwrap())
            .unwrap()
    }

    #[test]
    fn a_pty_survives_users_that_come_and_go() {
        let mut console = Console::pty().unwrap();
        console.ready();
        for _ in 0..3 {
            send(&mut console, b"out\r\n");
            let mut user = open_pty(&console);
            user.write_all(b"in\x03\x04\r").unwrap();
            let mut buf = [0; 64];
            assert_eq!(user.read(&mut buf).unwrap(), 5);
            assert_eq!(read(&mut console), b"in\x03\x04\r");
            drop(user);
            assert_eq!(read(&mut console), b"");
            console.ready();
            assert!(!has_event(&console), "would spin");
            assert!(console.input.is_some());
        }
    }

    #[test]
    fn a_pty_nobody_reads_is_bounded_and_goes_on_when_read() {
        let mut console = Console::pty().unwrap();
        for _ in 0..1000 {
            send(&mut console, &[b'x'; 1000]);
        }
        let before = console.counters();
        assert!(before.dropped > 0);
        let mut user = open_pty(&console);
        let mut buf = [0; 4096];
        let mut total = 0;
        for _ in 0..1000 {
            while let Ok(read) = user.read(&mut buf) {
                total += read;
            }
            if has_event(&console) {
                console.ready();
            }
            std::thread::yield_now();
        }
        assert_eq!(total as u64, before.written + Console::KEPT as u64);
        assert_eq!(console.counters().dropped, before.dropped);
    }

    fn client(path: &Path) -> UnixStream {
        let client = UnixStream::connect(path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client
    }

    fn expect(client: &mut UnixStream, bytes: &[u8]) {
        let mut buf = vec![0; bytes.len()];
        client.read_exact(&mut buf).unwrap();
        assert_eq!(buf, bytes);
    }

    #[test]
    fn a_socket_replays_what_nobody_heard_to_the_next_client() {
        let dir = Scratch::new("replay");
        let path = dir.0.join("serial");
        let mut console = Console::socket(&path).unwrap();
        assert_eq!(std::fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        send(&mut console, b"boot\n");

        let mut first = client(&path);
        assert!(has_event(&console));
        console.ready();
        expect(&mut first, b"boot\n");
        first.write_all(b"ls\n").unwrap();
        drop(first);
        console.ready();
        assert_eq!(read(&mut console), b"ls\n", "what it sent before it left");
        send(&mut console, &[b'x'; 10]);
        send(&mut console, &vec![b'y'; Console::KEPT]);

        let mut second = client(&path);
        console.ready();
        expect(&mut second, &vec![b'y'; Console::KEPT]);
        assert_eq!(console.counters().dropped, 10);
        drop(console);
        assert!(!path.exists());
        assert_eq!(second.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_new_client_replaces_the_old_one() {
        let dir = Scratch::new("replace");
        let path = dir.0.join("serial");
        let mut console = Console::socket(&path).unwrap();
        let mut clients: Vec<_> = (0..5).map(|_| client(&path)).collect();
        while has_event(&console) {
            console.ready();
        }
        send(&mut console, b"hello");
        let mut last = clients.pop().unwrap();
        expect(&mut last, b"hello");
        last.write_all(b"hi").unwrap();
        assert_eq!(read(&mut console), b"hi");
        for mut old in clients {
            assert_eq!(old.read(&mut [0; 8]).unwrap(), 0);
        }
    }

    #[test]
    fn a_client_that_sends_no_more_still_listens() {
        let dir = Scratch::new("half");
        let mut console = Console::socket(&dir.0.join("serial")).unwrap();
        let mut client = client(console.path().unwrap());
        client.write_all(b"cmd").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        console.ready();
        assert_eq!(read(&mut console), b"cmd");
        assert_eq!(read(&mut console), b"");
        console.ready();
        send(&mut console, b"reply");
        expect(&mut client, b"reply");
    }

    #[test]
    fn a_client_that_never_reads_costs_bytes_only() {
        let dir = Scratch::new("deaf");
        let mut console = Console::socket(&dir.0.join("serial")).unwrap();
        let _client = client(console.path().unwrap());
        console.ready();
        for _ in 0..1000 {
            send(&mut console, &[b'x'; 1000]);
        }
        let Counters { written, dropped, .. } = console.counters();
        assert_eq!(written + dropped + Console::KEPT as u64, 1_000_000);
    }

    #[test]
    fn finish_waits_for_a_slow_reader_but_not_for_ever() {
        let (from_guest, their_out) = rustix::pipe::pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        let mut console = over(null.as_fd(), their_out.as_fd());
        for _ in 0..30 {
            send(&mut console, &[b'x'; 4096]);
        }
        let start = Instant::now();
        console.finish(Duration::from_millis(50));
        assert!(start.elapsed() >= Duration::from_millis(50));
        assert!(console.output.is_waiting());

        let mut reader = File::from(from_guest);
        let reading = std::thread::spawn(move || {
            let mut all = vec![0; 30 * 4096];
            reader.read_exact(&mut all).unwrap();
        });
        console.finish(Duration::from_secs(10));
        reading.join().unwrap();
        assert_eq!(console.counters(), Counters { written: 30 * 4096, dropped: 0, limited: 0 });
    }
}
