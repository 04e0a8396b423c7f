//! One connection's socket, between tokio and hyper: what the connection is doing, since when, and
//! how long it may.
//!
//! ```text
//!            first byte        head complete      body complete       reply taken over
//!  Opening ─────────────► Head ────────────► Body ────────────► Serving ────────────► Sent
//!                          ▲                                    (Waiting)              │
//!                          └───────────── Idle ◄───────────────────────────────────────┘
//!                            first byte          flushed
//! ```
//!
//! hyper has a deadline for heads, but it runs in idle connections too; it has none for writing; and
//! it does not say which connections are idle. All three are seen from here. The other reason for
//! this layer is that hyper answers what it cannot parse with an empty body, and clients want JSON.
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::Instant;

use super::passed::{self, PassedError, Received, Waiting};
use super::request_line::RequestLine;
use crate::arrived::{Arrived, Room};

/// How long a client may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadlines {
    /// From a head's first byte (the first one's: from the connection) to its last.
    pub(crate) head: Duration,
    /// From a head's end to the body's.
    pub(crate) body: Duration,
    /// To take a reply, or a line of events.
    pub(crate) write: Duration,
}

/// What a connection is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing has come yet.
    Opening,
    /// Between requests.
    Idle,
    /// A head is coming.
    Head,
    /// A body is coming.
    Body,
    /// The VMM has the request.
    Serving,
    /// The client waits for something to happen to the VM.
    Waiting,
    /// The reply is on its way out.
    Sent,
}

/// What the parts of one connection, all on one task, know of each other.
#[derive(Debug)]
pub(super) struct Progress {
    phase: Cell<Phase>,
    since: Cell<Instant>,
    /// When the oldest byte that hyper has and the kernel has not was written.
    unflushed: Cell<Option<Instant>>,
    /// Whether somebody was told "not now" whom the next flush makes ready.
    is_flush_awaited: Cell<bool>,
    is_closing: Cell<bool>,
    is_hung_up: Cell<bool>,
    is_cut_short: Cell<bool>,
    task: RefCell<Option<Waker>>,
    /// What came with the request that is coming.
    descriptors: RefCell<Waiting>,
    deadlines: Deadlines,
}

impl Progress {
    pub(super) fn new(deadlines: Deadlines, room: Room) -> Self {
        Self {
            phase: Cell::new(Phase::Opening),
            since: Cell::new(Instant::now()),
            unflushed: Cell::new(None),
            is_flush_awaited: Cell::new(false),
            is_closing: Cell::new(false),
            is_hung_up: Cell::new(false),
            is_cut_short: Cell::new(false),
            task: RefCell::new(None),
            descriptors: RefCell::new(Waiting::new(room)),
            deadlines,
        }
    }

    pub(super) fn deadlines(&self) -> Deadlines {
        self.deadlines
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase.get()
    }

    pub(super) fn since(&self) -> Instant {
        self.since.get()
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.set(phase);
        self.since.set(Instant::now());
    }

    /// Whether a client is owed something.
    pub(super) fn is_busy(&self) -> bool {
        self.unflushed.get().is_some()
            || matches!(self.phase(), Phase::Serving | Phase::Waiting | Phase::Sent)
    }

    /// Asks the connection to end after the reply in progress.
    pub(super) fn close(&self) {
        self.is_closing.set(true);
        self.wake();
    }

    /// Tells the connection that its client is gone.
    pub(super) fn hang_up(&self) {
        self.is_hung_up.set(true);
        self.wake();
    }

    pub(super) fn is_hung_up(&self) -> bool {
        self.is_hung_up.get()
    }

    /// Whether the client will send no more of a body of which some is missing.
    pub(super) fn is_cut_short(&self) -> bool {
        self.is_cut_short.get()
    }

    fn wake(&self) {
        if let Some(task) = self.task.borrow().as_ref() {
            task.wake_by_ref();
        }
    }

    /// Whether [`Self::close`] has been called; if not, `cx` is woken when it is.
    pub(super) fn poll_closing(&self, cx: &Context<'_>) -> bool {
        *self.task.borrow_mut() = Some(cx.waker().clone());
        self.is_closing.get()
    }

    pub(super) fn is_closing(&self) -> bool {
        self.is_closing.get()
    }

    /// When to give the connection up, as things are.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let head = matches!(self.phase(), Phase::Opening | Phase::Head)
            .then(|| self.since() + self.deadlines.head);
        let write = self.unflushed.get().map(|since| since + self.deadlines.write);
        head.into_iter().chain(write).min()
    }

    /// Ready when the replies so far have gone out, so that a client that pipelines requests and
    /// reads nothing makes no heap of replies here.
    pub(super) async fn flushed(&self) {
        poll_fn(|_| {
            if self.unflushed.get().is_some() {
                self.is_flush_awaited.set(true);
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
    }

    /// What came with the request that is there, whole.
    pub(super) fn take_descriptors(&self) -> Result<Arrived, PassedError> {
        self.descriptors.borrow_mut().take()
    }

    /// Keeps what came with `bytes`, if they are of a request.
    fn note_descriptors(&self, before: Phase, received: Received) {
        if received.fds.is_empty() && !received.is_cut {
            return;
        }
        let mut descriptors = self.descriptors.borrow_mut();
        match (before, self.phase()) {
            (Phase::Serving | Phase::Waiting, _) | (_, Phase::Opening | Phase::Idle) => {
                descriptors.refuse(PassedError::OutOfTurn);
            }
            _ => descriptors.add(received.fds, received.is_cut),
        }
    }

    fn note_read(&self, bytes: &[u8]) {
        // Line ends between requests are no head (RFC 9112, 2.2).
        let is_head = bytes.iter().any(|b| !b"\r\n".contains(b));
        if is_head && matches!(self.phase(), Phase::Opening | Phase::Idle) {
            self.enter(Phase::Head);
        }
    }

    fn note_write(&self) {
        if self.unflushed.get().is_none() {
            self.unflushed.set(Some(Instant::now()));
        }
    }

    fn note_flush(&self, cx: &Context<'_>) {
        self.unflushed.set(None);
        if self.phase() == Phase::Sent {
            self.enter(Phase::Idle);
        }
        if self.is_flush_awaited.take() {
            cx.waker().wake_by_ref();
        }
    }

    /// Whether what is being written is hyper's own answer to a head that it cannot parse: nobody
    /// else has anything to say before there is a request.
    fn is_refusing(&self) -> bool {
        matches!(self.phase(), Phase::Opening | Phase::Idle | Phase::Head)
    }
}

/// The socket as hyper sees it.
#[derive(Debug)]
pub(super) struct Stream {
    inner: UnixStream,
    progress: Rc<Progress>,
    line: RequestLine,
    /// What is written in place of hyper's empty refusal, and how much of it has been.
    refusal: Option<(Vec<u8>, usize)>,
}

impl Stream {
    pub(super) fn new(inner: UnixStream, progress: Rc<Progress>) -> Self {
        Self { inner, progress, line: RequestLine::Past, refusal: None }
    }

    /// Reads bytes, and notes the descriptors that come with them.
    fn poll_receive(
        &self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<Received>> {
        loop {
            ready!(self.inner.poll_read_ready(cx))?;
            let receive = || passed::receive(&self.inner, buffer.initialize_unfilled());
            match self.inner.try_io(Interest::READABLE, receive) {
                Ok(received) => {
                    buffer.advance(received.bytes);
                    return Poll::Ready(Ok(received));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }

    fn poll_write_with(
        &mut self,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.progress.note_write();
        if self.refusal.is_none()
            && self.progress.is_refusing()
            && let Some(status) = buffers.first().and_then(|head| error_status(head))
        {
            self.refusal = Some((refusal(status), 0));
        }
        let Some((bytes, written)) = &mut self.refusal else {
            return Pin::new(&mut self.inner).poll_write_vectored(cx, buffers);
        };
        while let Some(rest) = bytes.get(*written..).filter(|rest| !rest.is_empty()) {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => *written += count,
            }
        }
        Poll::Ready(Ok(buffers.iter().map(|buffer| buffer.len()).sum()))
    }

    /// Whether the client can still read: it has shut down its sending half only, as `nc -N` does.
    fn is_half_closed(&self) -> bool {
        let mut fds = [PollFd::new(&self.inner, PollFlags::empty())];
        let polled = rustix::event::poll(&mut fds, Some(&Timespec::default()));
        polled.is_ok() && !fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let received = ready!(self.poll_receive(cx, buffer))?;
        let bytes = buffer.filled().get(before..).unwrap_or_default();
        let is_owed = self.progress.is_busy() || self.progress.phase() == Phase::Body;
        if bytes.is_empty() && is_owed && self.is_half_closed() {
            // hyper would drop the reply. It sees the end when the reply has gone out.
            self.progress.is_flush_awaited.set(true);
            if self.progress.phase() == Phase::Body && !self.progress.is_cut_short.replace(true) {
                // Whoever waits for the rest is polled by the same task.
                cx.waker().wake_by_ref();
            }
            return Poll::Pending;
        }
        if matches!(self.progress.phase(), Phase::Opening | Phase::Idle) {
            self.line = RequestLine::Ahead;
        }
        let phase = self.progress.phase();
        self.progress.note_read(bytes);
        self.progress.note_descriptors(phase, received);
        let bytes = buffer.filled_mut().get_mut(before..).unwrap_or_default();
        self.line.pass(bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A Unix socket has no buffer of its own: what it took is the kernel's.
        self.progress.note_flush(cx);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// The status line of a head that reports an error.
fn error_status(head: &[u8]) -> Option<&str> {
    let end = head.iter().position(|&b| b == b'\r')?;
    let line = std::str::from_utf8(head.get(..end)?).ok()?;
    line.starts_with("HTTP/1.1 4").then_some(line)
}

/// The reply to what is not HTTP. Firecracker's has `error` only; `fault_message` is where clients
/// look.
fn refusal(status_line: &str) -> Vec<u8> {
    let what = match status_line.split(' ').nth(1) {
        Some("431") => "The request's headers are too large.",
        Some("414") => "The request's path is too long.",
        _ => "Invalid HTTP request.",
    };
    let text = format!("{what}\nAll previous unanswered requests will be dropped.");
    let body = serde_json::json!({ "error": text, "fault_message": text }).to_string();
    format!(
        "{status_line}\r\nServer: Firecracker API\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_belong_to_the_request_whose_bytes_they_come_with() {
        let deadline = Duration::from_secs(1);
        let deadlines = Deadlines { head: deadline, body: deadline, write: deadline };
        let progress = Progress::new(deadlines, Room::of(None));
        let come = |bytes: &[u8]| {
            let fds = vec![std::fs::File::open("/dev/null").unwrap().into()];
            let before = progress.phase();
            progress.note_read(bytes);
            progress.note_descriptors(before, Received { bytes: bytes.len(), fds, is_cut: false });
        };
        let taken = || progress.take_descriptors().map(|arrived| arrived.held().len());
        for (phase, bytes, count) in [
            (Phase::Opening, &b"GET"[..], Some(1)),
            (Phase::Idle, b"GET", Some(1)),
            (Phase::Head, b"\r\n", Some(1)),
            (Phase::Body, b"\r\n", Some(1)),
            // The reply has gone out, but for what the client has not read yet.
            (Phase::Sent, b"GET", Some(1)),
            (Phase::Idle, b"\r\n", None),
            (Phase::Serving, b"GET", None),
            (Phase::Waiting, b"GET", None),
        ] {
            progress.enter(phase);
            come(bytes);
            assert_eq!(taken(), count.ok_or(PassedError::OutOfTurn), "{phase:?}");
        }
        progress.enter(Phase::Head);
        come(b"a");
        come(b"b");
        assert_eq!((taken(), taken()), (Ok(2), Ok(0)));
    }
}
