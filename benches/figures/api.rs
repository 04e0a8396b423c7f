//! How long an answer of the API takes.
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::report::{Report, Samples};
use crate::vmm::{Running, Vmm};
use crate::{Bench, Result, guest};

const CALLS: usize = 2000;
const PAUSES: usize = 200;

/// A connection to a husk, kept open.
pub(crate) struct Client(UnixStream);

impl Client {
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self(stream))
    }

    /// Asks, reads the whole answer, which is to be a success; how long that took.
    pub(crate) fn call(&mut self, method: &str, path: &str, body: &str) -> Result<Duration> {
        let len = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: husk\r\nContent-Length: {len}\r\n\r\n{body}"
        );
        let begin = Instant::now();
        self.0.write_all(request.as_bytes())?;
        let (mut answer, mut piece) = (Vec::new(), [0; 4096]);
        while !is_complete(&answer) {
            match self.0.read(&mut piece)? {
                0 => return Err(format!("{method} {path}: no answer").into()),
                read => answer.extend(&piece[..read]),
            }
        }
        let took = begin.elapsed();
        match answer.starts_with(b"HTTP/1.1 2") {
            true => Ok(took),
            false => Err(String::from_utf8_lossy(&answer).into()),
        }
    }
}

/// Whether all of the headers, and of the body that they announce, is there.
fn is_complete(answer: &[u8]) -> bool {
    let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") else { return false };
    let headers = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let announced = headers.lines().find_map(|line| line.strip_prefix("content-length:"));
    let body = announced.and_then(|len| len.trim().parse().ok()).unwrap_or(0);
    answer.len() - end - 4 >= body
}

pub(crate) fn latencies(bench: &Bench, report: &mut Report) -> Result<()> {
    let socket = bench.scratch.join("api.sock");
    let mut command = Vmm::Husk.command_that_stays(&guest::idle(bench)?)?;
    let mut process = Running::start(command.arg("--api-sock").arg(&socket))?;
    process.await_byte()?;
    let mut client = Client::connect(&socket)?;
    let gets = (0..CALLS).map(|_| client.call("GET", "/", "")).collect::<Result<Vec<_>>>()?;
    report.add("GET / on an open connection", "us", Samples::micros(&gets));
    let opened = (0..CALLS / 10).map(|_| {
        let begin = Instant::now();
        Client::connect(&socket)?.call("GET", "/", "")?;
        Ok(begin.elapsed())
    });
    let opened = opened.collect::<Result<Vec<_>>>()?;
    report.add("GET / on a new connection", "us", Samples::micros(&opened));
    let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
    for _ in 0..PAUSES {
        pauses.push(client.call("PATCH", "/vm", r#"{"state":"Paused"}"#)?);
        resumes.push(client.call("PATCH", "/vm", r#"{"state":"Resumed"}"#)?);
    }
    report.add("pause, by the API", "us", Samples::micros(&pauses));
    report.add("resume, by the API", "us", Samples::micros(&resumes));
    Ok(())
}
