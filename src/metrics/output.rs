//! Where lines of metrics go: a file or a FIFO, which is never waited for.
//!
//! A line is longer than what a pipe takes as a whole. What it did not take of one is written before
//! the next, so that no line is ever torn; while there is such a rest, further lines are lost.
use std::path::Path;

use devices::backend::stream::Stream;

devices::counters! {
    /// What is counted of the metrics themselves, beside the log.
    pub(crate) struct Counters as "logger" {
        /// Lines of metrics that nobody took. The next has what they would have told.
        missed_metrics_count: Counter,
        /// Lines of metrics that somebody asked for and that nobody took.
        metrics_fails: Counter,
    }
}

/// A file or FIFO.
#[derive(Debug)]
pub(super) struct Output {
    stream: Stream,
    /// What is left of the last line taken.
    rest: Vec<u8>,
}

impl Output {
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let stream = Stream::owned(crate::logger::open(path)?);
        Ok(Self { stream, rest: Vec::new() })
    }

    /// Takes `line`, or says why it is lost.
    pub(super) fn write(&mut self, line: &[u8]) -> Result<(), String> {
        let rest = std::mem::take(&mut self.rest);
        let (written, why) = self.try_write(&rest);
        if written < rest.len() {
            self.rest = rest[written..].to_vec();
            return Err(why);
        }
        match self.try_write(line) {
            (0, why) => Err(why),
            (written, _) => {
                self.rest = line[written..].to_vec();
                Ok(())
            }
        }
    }

    /// Writes what there is room for: how much, and why not more.
    fn try_write(&self, bytes: &[u8]) -> (usize, String) {
        let mut written = 0;
        while written < bytes.len() {
            match self.stream.write(&bytes[written..]) {
                Ok(0) => break,
                Ok(more) => written += more,
                Err(e) => return (written, std::io::Error::from(e).to_string()),
            }
        }
        (written, "it takes nothing".into())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::fs::Mode;

    use super::*;

    #[test]
    fn a_fifo_gets_whole_lines_or_none() {
        let dir = std::env::temp_dir().join(format!("husk-metrics-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RWXU).unwrap();
        let mut output = Output::open(&path).unwrap();
        let line = |number: usize| format!("{number} {}\n", "x".repeat(7000));
        let taken: Vec<bool> =
            (0..30).map(|number| output.write(line(number).as_bytes()).is_ok()).collect();
        assert!(taken[0] && !taken[29], "{taken:?}");
        // A reader comes: it gets each line that was taken, as soon as there is another.
        let mut reader = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let mut got = vec![0; 1 << 20];
        let mut len = reader.read(&mut got).unwrap();
        output.write(line(30).as_bytes()).unwrap();
        len += reader.read(&mut got[len..]).unwrap();
        let text = String::from_utf8(got[..len].to_vec()).unwrap();
        let expected = (0..30).filter(|number| taken[*number]).chain([30]).map(line);
        assert_eq!(text, expected.collect::<String>());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_full_disk_loses_lines_and_nothing_else() {
        let mut output = Output::open(Path::new("/dev/full")).unwrap();
        let why = output.write(b"line\n").unwrap_err();
        assert!(why.contains("No space left"), "{why}");
    }

    #[test]
    fn a_directory_is_refused_by_name() {
        let why = Output::open(Path::new("/tmp")).unwrap_err();
        assert!(why.contains("/tmp"), "{why}");
    }
}
