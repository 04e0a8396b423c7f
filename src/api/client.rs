//! A small HTTP client for the API's socket: one request a connection, no waiting without bound
//! unless asked to.
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use devices::backend::file;
use rustix::fs::FileType;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::socket;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The file is not there.
    #[error("there is no socket at {path}: is husk running, with --api-sock {path}?")]
    NoSocket { path: PathBuf },
    /// The file is there, its owner is not.
    #[error("nobody listens on {path}: the husk that made it has ended")]
    Refused { path: PathBuf },
    /// Too slow.
    #[error("no answer on {path} within {patience:?}")]
    Timeout { path: PathBuf, patience: Duration },
    /// The file is not a socket.
    #[error("{path} is {found}, not a socket that husk listens on")]
    NotSocket { path: PathBuf, found: &'static str },
    /// The connection failed.
    #[error("talking to {path}")]
    Io { path: PathBuf, source: io::Error },
    /// The other side does not speak HTTP.
    #[error("the answer on {path} is not HTTP: {why}")]
    Protocol { path: PathBuf, why: String },
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    /// HTTP's status code.
    pub(crate) status: u16,
    /// Empty or JSON.
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// Whether the request was carried out.
    pub(crate) fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// What a refusal says: `fault_message`, or the body as it is.
    pub(crate) fn fault(&self) -> String {
        let json: Option<serde_json::Value> = serde_json::from_slice(&self.body).ok();
        let message = json.as_ref().and_then(|json| json.get("fault_message")?.as_str());
        message.map_or_else(|| String::from_utf8_lossy(&self.body).into_owned(), str::to_owned)
    }
}

/// What goes with a request's line.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ask<'a> {
    /// JSON.
    pub(crate) body: Option<&'a [u8]>,
    /// Descriptors that the body names, `passed:0` the first.
    pub(crate) passed: &'a [OwnedFd],
}

impl<'a> From<Option<&'a [u8]>> for Ask<'a> {
    fn from(body: Option<&'a [u8]>) -> Self {
        Self { body, passed: &[] }
    }
}

/// How long to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Ten seconds for each step: connect, write, read.
    Normal,
    /// For ever, once connected: `/wait`, `/events`.
    Endless,
}

const PATIENCE: Duration = Duration::from_secs(10);
const HEAD_LIMIT: u64 = 64 << 10;
const BODY_LIMIT: u64 = 16 << 20;
const HEADERS_MAX: usize = 64;

/// Talks to the husk behind a socket.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    path: PathBuf,
    patience: Duration,
}

impl Client {
    /// A client of the socket at `path`. Does not connect yet.
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), patience: PATIENCE }
    }

    /// Sends a request and reads the whole answer.
    pub(crate) fn call<'a>(
        &self,
        method: &str,
        target: &str,
        ask: impl Into<Ask<'a>>,
        patience: Patience,
    ) -> Result<Answer, ClientError> {
        self.exchange(method, target, ask.into(), patience).map_err(|failure| self.error(failure))
    }

    /// Hands each line of a `GET`'s answer to `on_line` as it comes. If the request is refused, the
    /// answer comes back instead; `None` means that the lines have ended.
    pub(crate) fn follow(
        &self,
        target: &str,
        on_line: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Option<Answer>, ClientError> {
        self.read_lines(target, on_line).map_err(|failure| self.error(failure))
    }

    fn exchange(
        &self,
        method: &str,
        target: &str,
        ask: Ask<'_>,
        patience: Patience,
    ) -> Result<Answer, Failure> {
        let stream = self.connect(patience)?;
        Reading::start(stream, method, target, ask)?.into_answer()
    }

    fn read_lines(
        &self,
        target: &str,
        mut on_line: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Option<Answer>, Failure> {
        let stream = self.connect(Patience::Endless)?;
        let reading = Reading::start(stream, "GET", target, Ask::default())?;
        if reading.status != 200 {
            return reading.into_answer().map(Some);
        }
        for line in BufReader::new(reading).lines() {
            if on_line(&line?).is_break() {
                break;
            }
        }
        Ok(None)
    }

    fn connect(&self, patience: Patience) -> Result<UnixStream, Failure> {
        let stream = socket::connect(&self.path, Instant::now() + self.patience);
        let stream = UnixStream::from(stream.map_err(Failure::Connect)?);
        stream.set_write_timeout(Some(self.patience))?;
        if patience == Patience::Normal {
            stream.set_read_timeout(Some(self.patience))?;
        }
        Ok(stream)
    }

    fn error(&self, failure: Failure) -> ClientError {
        let path = self.path.clone();
        match failure {
            Failure::Connect(e) if e.kind() == io::ErrorKind::NotFound => {
                ClientError::NoSocket { path }
            }
            Failure::Connect(e) if e.kind() == io::ErrorKind::ConnectionRefused => refused(path),
            Failure::Connect(e) | Failure::Io(e)
                if matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) =>
            {
                ClientError::Timeout { path, patience: self.patience }
            }
            Failure::Connect(source) | Failure::Io(source) => ClientError::Io { path, source },
            Failure::Protocol(why) => ClientError::Protocol { path, why },
        }
    }
}

/// Linux says the same of a socket without a listener and of what is no socket.
fn refused(path: PathBuf) -> ClientError {
    match rustix::fs::stat(&path).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
        Ok(FileType::Socket) | Err(_) => ClientError::Refused { path },
        Ok(other) => ClientError::NotSocket { path, found: file::name_of(other) },
    }
}

/// A [`ClientError`] that does not know the path yet.
enum Failure {
    Connect(io::Error),
    Io(io::Error),
    Protocol(String),
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

/// An answer whose head has been read; reading it gives the body.
struct Reading {
    stream: BufReader<UnixStream>,
    status: u16,
    rest: Rest,
}

/// How much of the body is still to come (RFC 9112, 6.3).
enum Rest {
    Bytes(u64),
    /// Bytes left of the chunk at hand.
    Chunks(u64),
    UntilClosed,
}

impl Reading {
    /// Sends a request and reads the answer's head.
    fn start(
        mut stream: UnixStream,
        method: &str,
        target: &str,
        Ask { body, passed }: Ask<'_>,
    ) -> Result<Self, Failure> {
        let mut request = format!(
            "{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
             Connection: close\r\n"
        );
        if let Some(body) = body {
            let length = body.len();
            request += &format!("Content-Type: application/json\r\nContent-Length: {length}\r\n");
        }
        request += "\r\n";
        let mut bytes = request.into_bytes();
        bytes.extend_from_slice(body.unwrap_or_default());
        let sent = send(&mut stream, &bytes, passed);

        let mut stream = BufReader::new(stream);
        // A server that refuses a body answers without having read it: the answer tells more than
        // the broken pipe.
        match (read_head(&mut stream), sent) {
            (Ok((status, rest)), _) => Ok(Self { stream, status, rest }),
            (Err(_), Err(e)) => Err(e.into()),
            (Err(failure), Ok(())) => Err(failure),
        }
    }

    fn into_answer(self) -> Result<Answer, Failure> {
        let status = self.status;
        let mut body = Vec::new();
        let length = self.take(BODY_LIMIT + 1).read_to_end(&mut body)?;
        if length as u64 > BODY_LIMIT {
            return Err(Failure::Protocol(format!("more than {BODY_LIMIT} bytes")));
        }
        Ok(Answer { status, body })
    }

    /// Reads the line before a chunk; the line end after the one before is skipped.
    fn next_chunk(&mut self) -> io::Result<u64> {
        let mut line = Vec::new();
        while line.iter().all(u8::is_ascii_whitespace) {
            line.clear();
            if (&mut self.stream).take(HEAD_LIMIT).read_until(b'\n', &mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        match httparse::parse_chunk_size(&line) {
            Ok(httparse::Status::Complete((_, size))) => Ok(size),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "bad chunk size")),
        }
    }
}

impl Read for Reading {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Rest::Chunks(0) = self.rest {
            self.rest = match self.next_chunk()? {
                0 => Rest::Bytes(0),
                size => Rest::Chunks(size),
            };
        }
        let left = match &mut self.rest {
            Rest::UntilClosed => return self.stream.read(buffer),
            Rest::Bytes(left) | Rest::Chunks(left) => left,
        };
        let room = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.stream.read(buffer.get_mut(..room).unwrap_or_default())?;
        if count == 0 && room > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        *left = left.saturating_sub(count as u64);
        Ok(count)
    }
}

/// Sends bytes, and descriptors with the first of them.
fn send(stream: &mut UnixStream, bytes: &[u8], passed: &[OwnedFd]) -> io::Result<()> {
    if passed.is_empty() {
        return stream.write_all(bytes);
    }
    let passed: Vec<_> = passed.iter().map(AsFd::as_fd).collect();
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(passed.len()))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let has_room = control.push(SendAncillaryMessage::ScmRights(&passed));
    debug_assert!(has_room, "the space is made for so many");
    let count = sendmsg(&*stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    stream.write_all(bytes.get(count..).unwrap_or_default())
}

fn read_head(stream: &mut BufReader<UnixStream>) -> Result<(u16, Rest), Failure> {
    loop {
        let mut bytes = Vec::new();
        while !bytes.ends_with(b"\r\n\r\n") {
            let room = HEAD_LIMIT.saturating_sub(bytes.len() as u64);
            if stream.take(room).read_until(b'\n', &mut bytes)? == 0 {
                return Err(Failure::Protocol("it has no head".to_owned()));
            }
        }
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut head = httparse::Response::new(&mut headers);
        head.parse(&bytes).map_err(|e| Failure::Protocol(e.to_string()))?;
        match head.code {
            // 100 Continue and its like come before the answer.
            Some(100..=199) => (),
            Some(status) => return Ok((status, rest(status, head.headers))),
            None => return Err(Failure::Protocol("it has no status".to_owned())),
        }
    }
}

fn rest(status: u16, headers: &[httparse::Header<'_>]) -> Rest {
    let value = |name: &str| {
        let header = headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(header.value).ok()
    };
    if status == 204 {
        Rest::Bytes(0)
    } else if value("Transfer-Encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
        Rest::Chunks(0)
    } else if let Some(length) = value("Content-Length").and_then(|v| v.trim().parse().ok()) {
        Rest::Bytes(length)
    } else {
        Rest::UntilClosed
    }
}
