//! What a process writes, captured as it comes.
use std::io::Read;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// A stream, read by a thread of its own until it ends.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    name: &'static str,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    captured: Mutex<Captured>,
    grown: Condvar,
}

#[derive(Debug, Default)]
struct Captured {
    bytes: Vec<u8>,
    /// Where the next search begins.
    seen: usize,
    has_ended: bool,
}

impl Output {
    /// Captures `stream`; `name` is for failures.
    pub(crate) fn capture(name: &'static str, mut stream: impl Read + Send + 'static) -> Self {
        let output = Self { name, shared: Arc::default() };
        let shared = output.shared.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let read = stream.read(&mut buffer);
                let mut captured = shared.captured.lock().unwrap();
                match read {
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                    // The end; on a terminal that is an error.
                    Ok(0) | Err(_) => captured.has_ended = true,
                    Ok(len) => captured.bytes.extend_from_slice(&buffer[..len]),
                }
                let has_ended = captured.has_ended;
                drop(captured);
                shared.grown.notify_all();
                if has_ended {
                    return;
                }
            }
        });
        output
    }

    /// Nothing was captured and nothing will be.
    pub(crate) fn none() -> Self {
        Self::capture("nothing", std::io::empty())
    }

    /// Waits for a line with `pattern` in it, after what was expected last; returns the line.
    pub(crate) fn line(&self, pattern: &str, deadline: Instant) -> Result<String, String> {
        self.search(pattern, deadline, |rest| {
            let mut start = 0;
            for line in rest.split_inclusive('\n') {
                start += line.len();
                if line.ends_with('\n') && line.contains(pattern) {
                    return Some((start, line.trim_end().to_owned()));
                }
            }
            None
        })
    }

    /// Waits for `text`, which need not end its line: a prompt.
    pub(crate) fn text(&self, text: &str, deadline: Instant) -> Result<(), String> {
        self.search(text, deadline, |rest| Some((rest.find(text)? + text.len(), ())))
    }

    /// Waits for the end of the stream; everything captured.
    pub(crate) fn end(&self, deadline: Instant) -> Result<String, String> {
        let mut captured = self.shared.captured.lock().unwrap();
        while !captured.has_ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Err(format!("{} did not end", self.name));
            }
            captured = self.shared.grown.wait_timeout(captured, left).unwrap().0;
        }
        Ok(String::from_utf8_lossy(&captured.bytes).into_owned())
    }

    /// Everything captured so far.
    pub(crate) fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.shared.captured.lock().unwrap().bytes).into_owned()
    }

    /// Bytes captured so far.
    pub(crate) fn len(&self) -> usize {
        self.shared.captured.lock().unwrap().bytes.len()
    }

    /// `find` looks at what has not been searched; it returns how far it got and what it found.
    fn search<T>(
        &self,
        pattern: &str,
        deadline: Instant,
        find: impl Fn(&str) -> Option<(usize, T)>,
    ) -> Result<T, String> {
        let mut captured = self.shared.captured.lock().unwrap();
        loop {
            let rest = &captured.bytes[captured.seen..];
            // Serial output is ASCII; a byte that is not must not move what follows it.
            let rest: String =
                rest.iter().map(|&b| if b.is_ascii() { b as char } else { '?' }).collect();
            if let Some((end, found)) = find(&rest) {
                captured.seen += end;
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if captured.has_ended || left == Duration::ZERO {
                let how = if captured.has_ended { "ended" } else { "was silent too long" };
                return Err(format!("{} {how} without {pattern:?}", self.name));
            }
            captured = self.shared.grown.wait_timeout(captured, left).unwrap().0;
        }
    }
}
