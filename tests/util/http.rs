//! A client for the API that knows as little of husk as curl does.
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

use super::PATIENCE;

/// An API socket. Each request has a connection of its own.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    path: PathBuf,
}

/// What came back.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// Status line and header lines, as they came.
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Api {
    pub(crate) fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        self.request("GET", path, "")
    }

    /// `body` is JSON, or is to be refused for not being it.
    pub(crate) fn put(&self, path: &str, body: impl ToString) -> Reply {
        self.request("PUT", path, &body.to_string())
    }

    pub(crate) fn delete(&self, path: &str) -> Reply {
        self.request("DELETE", path, "")
    }

    pub(crate) fn patch(&self, path: &str, body: impl ToString) -> Reply {
        self.request("PATCH", path, &body.to_string())
    }

    /// `PUT /actions`.
    pub(crate) fn act(&self, action: &str) -> Reply {
        self.put("/actions", serde_json::json!({ "action_type": action }))
    }

    /// The state in `GET /`.
    pub(crate) fn state(&self) -> String {
        self.get("/").json()["state"].as_str().unwrap().to_owned()
    }

    /// The lines of a reply that goes on until the VM ends.
    pub(crate) fn follow(&self, path: &str) -> Lines {
        let mut reader = BufReader::new(self.connect());
        reader.get_mut().write_all(&request("GET", path, "")).unwrap();
        let head = read_head(&mut reader).expect("a reply");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.to_lowercase().contains("transfer-encoding: chunked"), "{head}");
        Lines { reader, pending: String::new() }
    }

    /// A connection, for requests that no client should make.
    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path)
            .unwrap_or_else(|e| panic!("{}: {e}", self.path.display()));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A request with descriptors, all of which come with its first byte.
    pub(crate) fn pass(
        &self,
        (method, path): (&str, &str),
        body: impl ToString,
        fds: &[impl AsFd],
    ) -> Reply {
        let mut stream = self.connect();
        let bytes = request(method, path, &body.to_string());
        send_with(&stream, &bytes[..1], fds);
        stream.write_all(&bytes[1..]).unwrap();
        Reply::read(&mut BufReader::new(stream))
    }

    pub(crate) fn request(&self, method: &str, path: &str, body: &str) -> Reply {
        let mut stream = self.connect();
        stream.write_all(&request(method, path, body)).unwrap();
        Reply::read(&mut BufReader::new(stream))
    }

    /// The same of a program that may not answer within `patience`, or not at all.
    pub(crate) fn try_request(
        &self,
        (method, path, body): (&str, &str, &str),
        patience: Duration,
    ) -> io::Result<Reply> {
        let mut stream = UnixStream::connect(&self.path)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        stream.write_all(&request(method, path, body))?;
        Reply::try_read(&mut BufReader::new(stream))
    }
}

/// One sendmsg(2) of bytes and descriptors.
pub(crate) fn send_with(stream: &UnixStream, bytes: &[u8], fds: &[impl AsFd]) {
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    assert_eq!(sent.unwrap(), bytes.len());
}

/// A request as bytes.
pub(crate) fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
    if !body.is_empty() {
        text += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    }
    (text + "\r\n" + body).into_bytes()
}

impl Reply {
    /// Reads one reply, whose length its head tells.
    pub(crate) fn read(reader: &mut impl BufRead) -> Self {
        Self::try_read(reader).expect("a reply")
    }

    /// The same where there may be none.
    pub(crate) fn try_read(reader: &mut impl BufRead) -> io::Result<Self> {
        let head = read_head(reader)?;
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("no HTTP reply: {head:?}")))?;
        let len = head
            .lines()
            .find_map(|l| {
                l.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok()
            })
            .unwrap_or(0);
        let mut body = vec![0; len];
        reader.read_exact(&mut body)?;
        let body = String::from_utf8(body).map_err(io::Error::other)?;
        Ok(Self { status, head, body })
    }

    /// The reply is 204, or the test fails.
    #[track_caller]
    pub(crate) fn done(&self) {
        assert_eq!((self.status, self.body.as_str()), (204, ""));
    }

    /// The JSON of a 200.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        serde_json::from_str(&self.body).unwrap()
    }

    /// The `fault_message` of a 400.
    #[track_caller]
    pub(crate) fn fault(&self) -> String {
        assert_eq!(self.status, 400, "{}", self.body);
        let body: Value = serde_json::from_str(&self.body).unwrap();
        let fields = body.as_object().unwrap();
        assert_eq!(fields.len(), 1, "{body}");
        fields["fault_message"].as_str().unwrap().to_owned()
    }
}

/// Method and path of everything that an OpenAPI document describes.
pub(crate) fn operations(document: &Value) -> impl Iterator<Item = (String, &str)> {
    let paths = document["paths"].as_object().expect("an OpenAPI document").iter();
    paths.flat_map(|(path, item)| {
        let methods = item.as_object().expect("a path's operations").keys();
        methods.map(move |method| (method.to_ascii_uppercase(), path.as_str()))
    })
}

fn read_head(reader: &mut impl BufRead) -> io::Result<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Err(io::Error::other(format!("the connection ended after {head:?}")));
        }
    }
    Ok(head)
}

/// JSON lines, as they come.
#[derive(Debug)]
pub(crate) struct Lines {
    reader: BufReader<UnixStream>,
    pending: String,
}

impl Iterator for Lines {
    type Item = Value;

    fn next(&mut self) -> Option<Value> {
        while !self.pending.contains('\n') {
            let mut size = String::new();
            self.reader.read_line(&mut size).expect("a chunk");
            let size = usize::from_str_radix(size.trim(), 16).expect("a chunk's size");
            let mut chunk = vec![0; size + 2];
            self.reader.read_exact(&mut chunk).unwrap();
            if size == 0 {
                assert_eq!(self.pending, "", "half a line");
                return None;
            }
            self.pending += std::str::from_utf8(&chunk[..size]).unwrap();
        }
        let rest = self.pending.split_off(self.pending.find('\n')? + 1);
        let line = std::mem::replace(&mut self.pending, rest);
        Some(serde_json::from_str(&line).unwrap())
    }
}
