//! The log: lines to a file, a FIFO or a standard stream, that never block and never end husk.
//!
//! A line that cannot be written now (a full pipe, a full disk, a closed stream) is lost and
//! counted; the next that can be written says how many were. `println!` does the opposite: it waits
//! for the reader and panics when it is gone.
use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use log::{LevelFilter, Log, Metadata, Record};
use rustix::fs::{FileType, Mode, OFlags};

use crate::config::{LogLevel, LoggerConfig};
use crate::error::Refusal;

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Longest line; a guest or a client may have a say in what is in it.
const LINE_MAX: usize = 4096;
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
    shows_level: bool,
    shows_origin: bool,
    module: Option<String>,
    /// What a line starts with besides the time; none for people.
    instance: Option<String>,
    lost: u64,
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
    File(OwnedFd),
}

#[derive(Debug)]
struct Logger(Mutex<State>);

/// Starts logging. With `instance` lines look as Firecracker's do, else as people like them.
pub(crate) fn init(level: LogLevel, stream: Stream, instance: Option<String>) {
    let state = State {
        sink: Sink::Stream(stream),
        shows_level: false,
        shows_origin: false,
        module: None,
        instance,
        lost: 0,
        devices: Limit::default(),
    };
    let logger = LOGGER.get_or_init(|| Logger(Mutex::new(state)));
    // Already set: a library's host has its own logger, and keeps it.
    if log::set_logger(logger).is_ok() {
        log::set_max_level(filter(level));
    }
}

/// Applies `PUT /logger`. Without a logger of ours (in a library) only the level matters.
pub(crate) fn configure(config: &LoggerConfig) -> Result<(), Refusal> {
    let sink = config.log_path.as_deref().map(open).transpose()?;
    if let Some(level) = config.level {
        log::set_max_level(filter(level));
    }
    if let Some(Logger(state)) = LOGGER.get() {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sink) = sink {
            state.sink = Sink::File(sink);
        }
        state.shows_level = config.show_level.unwrap_or(state.shows_level);
        state.shows_origin = config.show_log_origin.unwrap_or(state.shows_origin);
        state.module = config.module.clone().or(state.module.take());
    }
    Ok(())
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

/// Opens a log file: appended to, made if missing. A FIFO is opened for both directions, so that
/// one that nobody reads can be opened and one whose reader goes away gives no SIGPIPE.
fn open(path: &Path) -> Result<OwnedFd, Refusal> {
    let refuse = |why: String| Refusal::Field { section: "logger", field: "log_path", why };
    let shown = path.display();
    let is_fifo = rustix::fs::stat(path)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo);
    let access = if is_fifo { OFlags::RDWR } else { OFlags::WRONLY | OFlags::CREATE };
    let flags = OFlags::APPEND | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, access | flags, Mode::RUSR | Mode::WUSR)
        .map_err(|e| refuse(format!("cannot open {shown}: {}", std::io::Error::from(e))))?;
    match rustix::fs::fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
        Ok(FileType::RegularFile | FileType::Fifo | FileType::CharacterDevice) => Ok(fd),
        Ok(_) => Err(refuse(format!("{shown} is not a file, FIFO or character device"))),
        Err(e) => Err(refuse(format!("{shown}: {}", std::io::Error::from(e)))),
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
        let is_device = record.target().starts_with("devices::");
        if is_device && !state.devices.admits(now().tv_sec) {
            state.lost += 1;
        } else if !is_filtered {
            let line = state.format(record);
            state.write(line);
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
            None => write!(line, "husk: "),
        };
        if let Some(_instance) = &self.instance {
            if self.shows_level {
                let _ = write!(line, ":{}", record.level());
            }
            if self.shows_origin {
                let file = record.file().unwrap_or("?");
                let _ = write!(line, ":{file}:{}", record.line().unwrap_or(0));
            }
            line.push_str("] ");
        } else if record.level() <= log::Level::Warn || self.shows_level {
            let _ = write!(line, "{}: ", record.level().as_str().to_ascii_lowercase());
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

    fn write(&mut self, mut line: String) {
        if self.lost > 0 {
            line.insert_str(0, &format!("husk: {} log lines were lost\n", self.lost));
        }
        if self.try_write(line.as_bytes()) {
            self.lost = 0;
        } else {
            self.lost += 1;
        }
    }

    /// One write, which waits for nobody.
    fn try_write(&self, line: &[u8]) -> bool {
        let fd = match &self.sink {
            Sink::File(fd) => fd.as_fd(),
            Sink::Stream(Stream::Error) => rustix::stdio::stderr(),
            Sink::Stream(Stream::Output) => rustix::stdio::stdout(),
        };
        // The streams are shared with whoever started us, so they cannot be made non-blocking: ask
        // first. A pipe that is ready takes at least PIPE_BUF bytes, and a line is shorter.
        let mut ready =
            [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::OUT)];
        let is_ready = rustix::event::poll(&mut ready, Some(&rustix::time::Timespec::default()));
        is_ready.is_ok_and(|n| n > 0)
            && rustix::io::write(fd, line).is_ok_and(|written| written == line.len())
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

/// Writes `line` to standard error as is, if it can be written without waiting.
pub(crate) fn say(line: &str) {
    let stderr = File::from(match rustix::io::dup(rustix::stdio::stderr()) {
        Ok(fd) => fd,
        Err(_) => return,
    });
    // Nobody is left to be told.
    let _ = std::io::Write::write_all(&mut &stderr, format!("{line}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(sink: Sink, instance: Option<&str>) -> State {
        State {
            sink,
            shows_level: true,
            shows_origin: false,
            module: None,
            instance: instance.map(Into::into),
            lost: 0,
            devices: Limit::default(),
        }
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
    fn what_nobody_reads_is_lost_counted_and_told() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut state = state(Sink::File(writer), None);
        let mut written = 0;
        while state.lost == 0 {
            state.write("x".repeat(4000) + "\n");
            written += 1;
            assert!(written < 1000, "a pipe does not hold this much");
        }
        state.write("lost too\n".into());
        assert_eq!(state.lost, 2);
        let mut drain = vec![0; 1 << 20];
        rustix::io::read(&reader, &mut drain).unwrap();
        state.write("heard\n".into());
        let n = rustix::io::read(&reader, &mut drain).unwrap();
        assert_eq!(&drain[..n], b"husk: 2 log lines were lost\nheard\n");
    }

    #[test]
    fn devices_get_ten_lines_a_second() {
        let mut limit = Limit::default();
        assert_eq!((0..100).filter(|_| limit.admits(7)).count(), 10);
        assert!(limit.admits(8));
    }
}
