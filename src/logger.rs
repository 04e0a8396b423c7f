//! The log: lines to a file, a FIFO or a standard stream, that never block and never end husk.
//!
//! A line that cannot be written now (a full pipe, a full disk, a closed stream) is lost and
//! counted; the next that can be written says how many were. `println!` does the opposite: it waits
//! for the reader and panics when it is gone.
use std::fmt::Write as _;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};

use devices::backend::stream::{self, Direction};
use log::{LevelFilter, Log, Metadata, Record};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::retry_on_intr;

use crate::config::{LogLevel, LoggerConfig};
use crate::error::Refusal;

static LOGGER: OnceLock<Logger> = OnceLock::new();
/// The process has one log, however many VMs are in it.
static COUNTERS: LazyLock<Arc<Counters>> = LazyLock::new(Arc::default);

devices::counters! {
    /// What is counted of the log.
    pub(crate) struct Counters as "logger" {
        /// Lines that nobody took, or that were too many.
        missed_log_count: Counter,
    }
}

/// What is counted of the log.
pub(crate) fn counters() -> &'static Arc<Counters> {
    &COUNTERS
}

/// The names under which husk speaks, and which of them it is.
const PROGRAMS: [&str; 3] = ["husk", "firecracker", "jailer"];
static PROGRAM: AtomicUsize = AtomicUsize::new(0);

/// A pipe takes as much as this whole or not at all (POSIX: `PIPE_BUF`).
const PIPE_BUF: usize = 4096;
/// Longest line; a guest or a client may have a say in what is in it. What is written with it (the
/// count of lost lines, the end of a torn one, an ellipsis) leaves all within `PIPE_BUF`.
const LINE_MAX: usize = PIPE_BUF - 64;
/// Most lines a second from devices, whose mistakes and malice the guest decides.
const DEVICE_LINES_MAX: u32 = 10;

/// Which standard stream the log goes to while no file is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard error: for people.
    Error,
    /// Standard output: what tools that spawn `firecracker` read.
    Output,
}

#[derive(Debug)]
struct State {
    sink: Sink,
    /// Where the file is, if it is one.
    path: Option<PathBuf>,
    shows_level: bool,
    shows_origin: bool,
    module: Option<String>,
    /// What a line starts with besides the time; none for people.
    instance: Option<String>,
    devices: Limit,
}

/// Counts lines in the current second.
#[derive(Debug, Default)]
struct Limit {
    second: i64,
    lines: u32,
}

impl Limit {
    /// Whether there is room for one more line in `second`.
    fn admits(&mut self, second: i64) -> bool {
        if self.second != second {
            *self = Self { second, lines: 0 };
        }
        self.lines = self.lines.saturating_add(1);
        self.lines <= DEVICE_LINES_MAX
    }
}

#[derive(Debug)]
enum Sink {
    Stream(Stream),
    File(Outlet),
}

/// Where lines leave: each is written now or lost, and what was lost is told with the next.
#[derive(Debug, Default)]
struct Outlet {
    /// None if the host gave none: then every line is lost.
    stream: Option<stream::Stream>,
    lost: u64,
    /// The last line was cut short: a terminal takes part of what it has no room for.
    is_torn: bool,
}

#[derive(Debug)]
struct Logger(Mutex<State>);

/// Starts logging. With `instance` lines look as Firecracker's do, else as people like them.
pub(crate) fn init(level: LogLevel, stream: Stream, instance: Option<String>) {
    drop(stream.outlet());
    let state = State {
        sink: Sink::Stream(stream),
        path: None,
        shows_level: false,
        shows_origin: false,
        module: None,
        instance,
        devices: Limit::default(),
    };
    let logger = match LOGGER.get() {
        // That of the process that this one was forked from.
        Some(logger) => {
            *logger.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
            log::set_max_level(filter(level));
            logger
        }
        None => LOGGER.get_or_init(|| Logger(Mutex::new(state))),
    };
    // Already set: a library's host has its own logger, and keeps it.
    if log::set_logger(logger).is_ok() {
        log::set_max_level(filter(level));
    }
}

/// Opens standard streams again, in a process that was forked and has closed what it had: a file for the log among that.
pub(crate) fn open_again() {
    let forget = |outlet: &mut Outlet| {
        // Its descriptor is closed, or somebody else's by now.
        std::mem::forget(outlet.stream.take());
    };
    if let Some(Logger(state)) = LOGGER.get() {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Sink::File(outlet) = &mut state.sink {
            forget(outlet);
            state.sink = Sink::Stream(Stream::Error);
            state.path = None;
        }
    }
    for stream in [Stream::Error, Stream::Output] {
        if let Some(outlet) = stream.cell().get() {
            let mut outlet = outlet.lock().unwrap_or_else(PoisonError::into_inner);
            forget(&mut outlet);
            *outlet = stream.open();
        }
    }
}

/// Says why a file of lines could not be written to, without making it.
pub(crate) fn check(path: &Path) -> Result<(), String> {
    match std::fs::metadata(path).map(|found| found.file_type()) {
        Ok(found) if found.is_dir() || found.is_socket() || found.is_block_device() => {
            Err(format!("{} is not a file, FIFO or character device", path.display()))
        }
        _ => devices::backend::file::check_writable(path)
            .map_err(|e| format!("cannot open {}: {e}", path.display())),
    }
}

/// Applies `PUT /logger`. In a library, whose host has a logger of its own, nothing is.
pub(crate) fn configure(config: &LoggerConfig) -> Result<(), Refusal> {
    let Some(Logger(state)) = LOGGER.get() else { return Ok(()) };
    let refuse = |why| Refusal::Field { section: "logger", field: "log_path", why };
    let sink = config.log_path.as_deref().map(open).transpose().map_err(refuse)?;
    if let Some(level) = config.level {
        log::set_max_level(filter(level));
    }
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(sink) = sink {
        state.path.clone_from(&config.log_path);
        state.sink = Sink::File(Outlet::new(Some(stream::Stream::owned(sink))));
    }
    state.shows_level = config.show_level.unwrap_or(state.shows_level);
    state.shows_origin = config.show_log_origin.unwrap_or(state.shows_origin);
    state.module = config.module.clone().or(state.module.take());
    Ok(())
}

/// How it logs now, for a process that is to log in the same way. Nothing is said in a library.
pub(crate) fn current() -> LoggerConfig {
    let Some(Logger(state)) = LOGGER.get() else { return LoggerConfig::default() };
    let state = state.lock().unwrap_or_else(PoisonError::into_inner);
    LoggerConfig {
        log_path: state.path.clone(),
        level: Some(level(log::max_level())),
        show_level: Some(state.shows_level),
        show_log_origin: Some(state.shows_origin),
        module: state.module.clone(),
    }
}

fn level(filter: LevelFilter) -> LogLevel {
    match filter {
        LevelFilter::Off => LogLevel::Off,
        LevelFilter::Error => LogLevel::Error,
        LevelFilter::Warn => LogLevel::Warning,
        LevelFilter::Info => LogLevel::Info,
        LevelFilter::Debug => LogLevel::Debug,
        LevelFilter::Trace => LogLevel::Trace,
    }
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::Off,
        LogLevel::Error => LevelFilter::Error,
        LogLevel::Warning => LevelFilter::Warn,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Debug => LevelFilter::Debug,
        LogLevel::Trace => LevelFilter::Trace,
    }
}

/// Opens a file for lines, of a log or of metrics: appended to, made if missing. A FIFO is opened for
/// both directions, so that one that nobody reads can be opened and one whose reader goes away gives
/// no SIGPIPE.
pub(crate) fn open(path: &Path) -> Result<OwnedFd, String> {
    let shown = path.display();
    let is_fifo = rustix::fs::stat(path)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo);
    let access = if is_fifo { OFlags::RDWR } else { OFlags::WRONLY | OFlags::CREATE };
    let flags = OFlags::APPEND | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let mode = Mode::RUSR | Mode::WUSR;
    let fd = retry_on_intr(|| rustix::fs::open(path, access | flags, mode))
        .map_err(|e| format!("cannot open {shown}: {}", std::io::Error::from(e)))?;
    match rustix::fs::fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
        Ok(FileType::RegularFile | FileType::Fifo | FileType::CharacterDevice) => Ok(fd),
        Ok(_) => Err(format!("{shown} is not a file, FIFO or character device")),
        Err(e) => Err(format!("{shown}: {}", std::io::Error::from(e))),
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_filtered = state
            .module
            .as_deref()
            .is_some_and(|module| !record.module_path().unwrap_or_default().starts_with(module));
        if is_filtered {
            return;
        }
        let is_device = record.target().starts_with("devices::");
        if is_device && !state.devices.admits(now().tv_sec) {
            state.with_outlet(Outlet::lose);
        } else {
            let line = state.format(record);
            state.with_outlet(|outlet| outlet.write(&line));
        }
    }

    fn flush(&self) {}
}

impl State {
    fn format(&self, record: &Record<'_>) -> String {
        let mut line = String::new();
        // Writing to a String does not fail.
        let _ = match &self.instance {
            Some(instance) => {
                let thread = std::thread::current();
                let name = thread.name().unwrap_or("-");
                write!(line, "{} [{instance}:{name}", timestamp())
            }
            None => write!(line, "{}: ", program()),
        };
        let origin = self
            .shows_origin
            .then(|| format!("{}:{}", record.file().unwrap_or("?"), record.line().unwrap_or(0)));
        if self.instance.is_some() {
            if self.shows_level {
                let _ = write!(line, ":{}", record.level());
            }
            if let Some(origin) = origin {
                let _ = write!(line, ":{origin}");
            }
            line.push_str("] ");
        } else {
            if record.level() <= log::Level::Warn || self.shows_level {
                let _ = write!(line, "{}: ", record.level().as_str().to_ascii_lowercase());
            }
            if let Some(origin) = origin {
                let _ = write!(line, "{origin}: ");
            }
        }
        let start = line.len();
        let _ = write!(line, "{}", record.args());
        // One line a record, whatever a client or a guest put into it.
        let message = line.split_off(start);
        line.extend(message.chars().map(|c| if c.is_control() { ' ' } else { c }));
        if line.len() > LINE_MAX {
            line.truncate(line.floor_char_boundary(LINE_MAX));
            line.push('…');
        }
        line.push('\n');
        line
    }

    /// The lock on a standard stream is the last to be taken.
    fn with_outlet(&mut self, act: impl FnOnce(&mut Outlet)) {
        match &mut self.sink {
            Sink::File(outlet) => act(outlet),
            Sink::Stream(stream) => act(&mut stream.outlet()),
        }
    }
}

impl Stream {
    /// Opened once for all who write to it: before anything else is, as words are wanted most when
    /// there are no descriptors left.
    fn outlet(self) -> MutexGuard<'static, Outlet> {
        let open = || self.open().into();
        self.cell().get_or_init(open).lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cell(self) -> &'static OnceLock<Mutex<Outlet>> {
        static ERROR: OnceLock<Mutex<Outlet>> = OnceLock::new();
        static OUTPUT: OnceLock<Mutex<Outlet>> = OnceLock::new();
        match self {
            Self::Error => &ERROR,
            Self::Output => &OUTPUT,
        }
    }

    fn open(self) -> Outlet {
        let fd = match self {
            Self::Error => rustix::stdio::stderr(),
            Self::Output => rustix::stdio::stdout(),
        };
        Outlet::new(stream::Stream::shared(fd, Direction::Output).ok())
    }
}

impl Outlet {
    fn new(stream: Option<stream::Stream>) -> Self {
        Self { stream, lost: 0, is_torn: false }
    }

    /// Writes `line`, which ends in a newline, or what there is room for.
    fn write(&mut self, line: &str) {
        let mut text = String::new();
        if self.is_torn {
            text.push('\n');
        }
        if self.lost > 0 {
            // Writing to a String does not fail.
            let _ = writeln!(text, "{}: {} log lines were lost", program(), self.lost);
        }
        let preface = text.len();
        text += line;
        let written = self.try_write(text.as_bytes());
        if written > 0 {
            self.is_torn = text.as_bytes()[written - 1] != b'\n';
        }
        if written >= preface {
            self.lost = 0;
        }
        if written < text.len() {
            self.lose();
        }
    }

    fn lose(&mut self) {
        self.lost += 1;
        COUNTERS.missed_log_count().inc();
    }

    /// Writes what there is room for; how much that was.
    fn try_write(&self, bytes: &[u8]) -> usize {
        let Some(stream) = &self.stream else { return 0 };
        let mut written = 0;
        while written < bytes.len() {
            match stream.write(&bytes[written..]) {
                Ok(0) | Err(_) => break,
                Ok(more) => written += more,
            }
        }
        written
    }
}

fn now() -> rustix::time::Timespec {
    rustix::time::clock_gettime(rustix::time::ClockId::Realtime)
}

/// Time as Firecracker writes it, in UTC: `2026-01-31T23:59:59.123456789`.
fn timestamp() -> String {
    let now = now();
    let date = devices::legacy::rtc::Date::from_unix(now.tv_sec);
    format!("{date}.{:09}", now.tv_nsec)
}

/// Opens standard error for what is said to people in the name of `name`; for the start of a process, and for one that
/// becomes another program.
pub(crate) fn start_as(name: &str) {
    drop(Stream::Error.outlet());
    let index = PROGRAMS.iter().position(|known| *known == name);
    PROGRAM.store(index.unwrap_or_default(), Ordering::Relaxed);
}

/// What is open for that: the only descriptor of a process that has just begun, besides those it was given.
pub(crate) fn descriptor() -> Option<RawFd> {
    Stream::Error.outlet().stream.as_ref().map(AsRawFd::as_raw_fd)
}

/// The name under which husk speaks. Async-signal-safe.
pub(crate) fn program() -> &'static str {
    PROGRAMS[PROGRAM.load(Ordering::Relaxed)]
}

/// Says `text` to people, in husk's name.
pub(crate) fn complain(text: &str) {
    say(&format!("{}: {text}", program()));
}

/// Writes `text` and a newline to standard error as is, if it can be written without waiting.
pub(crate) fn say(text: &str) {
    Stream::Error.outlet().write(&format!("{text}\n"));
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn state(sink: Sink, instance: Option<&str>) -> State {
        State {
            sink,
            path: None,
            shows_level: true,
            shows_origin: false,
            module: None,
            instance: instance.map(Into::into),
            devices: Limit::default(),
        }
    }

    fn outlet(fd: &OwnedFd) -> Outlet {
        Outlet::new(Some(stream::Stream::shared(fd.as_fd(), Direction::Output).unwrap()))
    }

    fn record<'a>(args: std::fmt::Arguments<'a>) -> Record<'a> {
        Record::builder().level(log::Level::Warn).args(args).build()
    }

    #[test]
    fn a_record_is_one_line_of_bounded_length() {
        let state = state(Sink::Stream(Stream::Error), None);
        assert_eq!(state.format(&record(format_args!("a\nb\x1bc"))), "husk: warn: a b c\n");
        let long = "ä".repeat(LINE_MAX);
        let line = state.format(&record(format_args!("{long}")));
        assert!(line.len() <= LINE_MAX + 4 && line.ends_with("…\n"));
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut outlet = outlet(&writer);
        (outlet.lost, outlet.is_torn) = (u64::MAX, true);
        outlet.write(&line);
        let written = rustix::io::read(&reader, &mut [0; 2 * PIPE_BUF]).unwrap();
        assert!(written > LINE_MAX && written <= PIPE_BUF, "{written} bytes are torn by a pipe");
    }

    #[test]
    fn lines_look_as_firecrackers_do() {
        let line = state(Sink::Stream(Stream::Output), Some("vm1"))
            .format(&record(format_args!("Vmm is stopping.")));
        let (time, rest) = line.split_once(' ').unwrap();
        assert_eq!(time.len(), "2026-01-31T23:59:59.123456789".len());
        assert!(rest.starts_with("[vm1:") && rest.ends_with(":WARN] Vmm is stopping.\n"), "{rest}");
    }

    #[test]
    fn lines_show_what_they_are_told_to_show() {
        let line = |instance, shows_level, shows_origin| {
            let state =
                State { shows_level, shows_origin, ..state(Sink::Stream(Stream::Error), instance) };
            let args = format_args!("said");
            let record = Record::builder()
                .level(log::Level::Info)
                .file(Some("src/x.rs"))
                .line(Some(7))
                .args(args)
                .build();
            let line = state.format(&record);
            line.split_once("lines_show_what_they_are_told_to_show")
                .map_or(line.clone(), |l| l.1.into())
        };
        assert_eq!(line(None, false, false), "husk: said\n");
        assert_eq!(line(None, true, true), "husk: info: src/x.rs:7: said\n");
        assert_eq!(line(Some("vm1"), false, false), "] said\n");
        assert_eq!(line(Some("vm1"), true, false), ":INFO] said\n");
        assert_eq!(line(Some("vm1"), false, true), ":src/x.rs:7] said\n");
        assert_eq!(line(Some("vm1"), true, true), ":INFO:src/x.rs:7] said\n");
    }

    #[test]
    fn what_nobody_reads_is_lost_counted_and_told() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut outlet = outlet(&writer);
        let long = "x".repeat(4000) + "\n";
        let mut written = 0;
        while outlet.lost == 0 {
            outlet.write(&long);
            written += 1;
            assert!(written < 1000, "a pipe does not hold this much");
        }
        outlet.write(&long);
        assert_eq!(outlet.lost, 2);
        let mut drain = vec![0; 1 << 20];
        rustix::io::read(&reader, &mut drain).unwrap();
        outlet.write("heard\n");
        let n = rustix::io::read(&reader, &mut drain).unwrap();
        assert_eq!(&drain[..n], b"husk: 2 log lines were lost\nheard\n");
    }

    #[test]
    fn a_terminal_nobody_reads_is_waited_for_by_nobody() {
        let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
        let mut outlet = outlet(&slave);
        for _ in 0..20 {
            outlet.write(&("x".repeat(1500) + "\n"));
        }
        assert!(outlet.lost > 0 && outlet.is_torn);
        let mut all = Vec::new();
        let mut buf = [0; 65_536];
        let lost = outlet.lost;
        while !all.ends_with(b"heard\r\n") {
            outlet.write("heard\n");
            let n = rustix::io::read(&master, &mut buf).unwrap();
            all.extend(&buf[..n]);
        }
        let all = String::from_utf8(all).unwrap();
        assert!(
            all.contains("\r\nhusk: ") && all.contains(" log lines were lost\r\nheard"),
            "{all}"
        );
        assert!(lost < 20);
    }

    #[test]
    fn devices_get_ten_lines_a_second() {
        let mut limit = Limit::default();
        assert_eq!((0..100).filter(|_| limit.admits(7)).count(), 10);
        assert!(limit.admits(8));
    }
}
