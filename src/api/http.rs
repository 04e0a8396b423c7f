//! From an HTTP request to a question for the VMM, and from its reply to an HTTP response.
use std::cell::OnceCell;
use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use devices::backend::passed::in_senders_words;
use devices::mmds::StoreError;
use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::http::request::Parts;
use hyper::{Response, StatusCode, Version as HttpVersion};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use super::chime::Chime;
use super::message::{FaultMessage, StateLine, StateTag, Version};
use super::openapi;
use super::passed::{self, PassedError};
use super::route::{Act, Content, Logged, Method, Route, RouteError, Routes};
use super::stream::{Phase, Progress};
use crate::arrived::Arrived;
use crate::error::Refusal;
use crate::events::{Sink, What};
use crate::instance::FIRECRACKER_VERSION;
use crate::metrics::{self, micros_since};
use crate::request::{Handle, Request};

/// What every connection needs.
#[derive(Debug)]
pub(super) struct Api {
    pub(super) handle: Handle,
    /// What the VMM thread answers is heard by it.
    pub(super) chime: Arc<Chime>,
    pub(super) routes: Routes,
    /// See [`super::Options`].
    pub(super) refusals: log::Level,
    pub(super) counters: Arc<metrics::Counters>,
    /// Bytes.
    pub(super) body_limit: usize,
    /// The OpenAPI document, once somebody has asked for it: milliseconds go into making it.
    pub(super) document: OnceCell<Bytes>,
}

impl Api {
    fn document(&self) -> Bytes {
        let document =
            self.document.get_or_init(|| to_json(&openapi::document(&self.routes)).into());
        document.clone()
    }
}

/// A body this much too large is read to its end, so that the client gets to see the refusal rather
/// than a broken pipe. Beyond it the connection is closed.
const DRAIN_LIMIT: usize = 1 << 20;
/// Events that a client may be behind before it is cut off.
const EVENTS_BEHIND_MAX: usize = 64;

/// Answers one request.
pub(super) fn serve(
    api: Rc<Api>,
    progress: Rc<Progress>,
    request: hyper::Request<Incoming>,
) -> impl Future<Output = Result<Response<ReplyBody>, Infallible>> {
    // Before this is first polled: hyper looks whether the client has hung up in between.
    progress.enter(Phase::Body);
    // From here on, however this ends, the connection is between requests again when the reply is
    // out or given up.
    let in_progress = InProgress(progress.clone());
    async move {
        progress.flushed().await;
        let started = Instant::now();
        let (parts, body) = request.into_parts();
        let outcome = handle(&api, &progress, &parts, body).await;
        let is_last = outcome.as_ref().is_err_and(Fault::ends_connection)
            || progress.is_closing()
            || !client_keeps_alive(&parts);
        let response = respond(outcome, is_last, in_progress);
        log::info!("Total previous API call duration: {} us.", started.elapsed().as_micros());
        Ok(response)
    }
}

/// Reads the body, answers, and logs both in Firecracker's words.
async fn handle(
    api: &Api,
    progress: &Progress,
    parts: &Parts,
    body: Incoming,
) -> Result<Reply, Fault> {
    let body = read_body(body, parts, api, progress).await;
    let arrived = progress.take_descriptors();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let found = api.routes.find(parts.method.as_str(), path);
    let logged = found.as_ref().map_or(Logged::Whole, |(route, _)| route.logged);
    let shown = Described { parts, body: body.as_deref().unwrap_or_default(), logged };
    log::info!("The API server received a {shown}.");
    progress.enter(Phase::Serving);
    let counted = found.as_ref().ok().and_then(|(route, _)| api.counters.requests.get()?.of(route));
    match counted {
        Some(counted) => counted.count.inc(),
        None => api.counters.api_server.unknown_request_count().inc(),
    }
    let outcome = match (body, found) {
        (Ok(body), Ok((route, id))) => match arrived {
            Ok(arrived) => answer(api, progress, (route, id), &body, arrived).await,
            Err(why) => Err(why.into()),
        },
        (Err(fault), _) => Err(fault),
        (Ok(body), Err(unknown)) => {
            Err(wrong_body(&parts.method, &body).unwrap_or_else(|| unknown.into()))
        }
    };
    match &outcome {
        Ok(Reply { answer, deprecated }) => {
            log::info!("The request was executed successfully. Status code: {}.", answer.status());
            if let Some(what) = deprecated {
                api.counters.deprecated.deprecated_http_api_calls().inc();
                log::warn!("{what}");
            }
        }
        Err(fault) => {
            if let Some(counted) = counted {
                counted.fails.inc();
            }
            let status = fault.status();
            log::log!(api.refusals, "Received Error. Status code: {status}. Message: {fault}");
        }
    }
    outcome
}

/// Why a request was refused here or by the VMM.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error("{0} request cannot have a body.")]
    NeedlessBody(&'static str),
    #[error("Empty {} request.", .0.name())]
    NoBody(Method),
    #[error(
        "Request payload with size {size} is larger than the limit of {limit} allowed by server."
    )]
    TooLarge { size: u64, limit: usize, is_drained: bool },
    #[error("The request's body did not arrive within {0:?}.")]
    TooSlow(std::time::Duration),
    #[error("The request's body ended early.")]
    CutShort,
    #[error("The request's body is broken: {0}.")]
    Broken(hyper::Error),
    #[error(transparent)]
    Passed(#[from] PassedError),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("{0}")]
    OfPassed(String, Refusal),
}

impl Fault {
    /// Firecracker's: one for all but one.
    fn status(&self) -> StatusCode {
        match self {
            Self::Refused(Refusal::Metadata(StoreError::TooLarge))
            | Self::OfPassed(_, Refusal::Metadata(StoreError::TooLarge)) => {
                StatusCode::PAYLOAD_TOO_LARGE
            }
            _ => StatusCode::BAD_REQUEST,
        }
    }

    /// Whether there may be bytes left that are no request.
    fn ends_connection(&self) -> bool {
        matches!(
            self,
            Self::TooSlow(_)
                | Self::CutShort
                | Self::Broken(_)
                | Self::TooLarge { is_drained: false, .. }
        )
    }
}

/// What goes back when all went well, and what is to be told of the request.
struct Reply {
    answer: Answer,
    /// What was deprecated in it.
    deprecated: Option<String>,
}

enum Answer {
    Nothing,
    Json(Bytes),
    Text { mime: &'static str, text: Bytes },
    Lines { first: Bytes, rest: Rest },
}

impl Answer {
    fn json(value: &impl Serialize) -> Self {
        Self::Json(Bytes::from(to_json(value)))
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::Nothing => StatusCode::NO_CONTENT,
            _ => StatusCode::OK,
        }
    }
}

async fn read_body(
    mut body: Incoming,
    parts: &Parts,
    api: &Api,
    progress: &Progress,
) -> Result<Vec<u8>, Fault> {
    let limit = api.body_limit;
    let announced = parts.headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    let drain_limit = limit.saturating_add(DRAIN_LIMIT) as u64;
    if let Some(size) = announced.filter(|size| *size > drain_limit) {
        return Err(Fault::TooLarge { size, limit, is_drained: false });
    }
    let read = async {
        let mut bytes = Vec::new();
        let mut size = 0_u64;
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(Fault::Broken)?.into_data() else { continue };
            size = size.saturating_add(data.len() as u64);
            if size > drain_limit {
                return Err(Fault::TooLarge { size, limit, is_drained: false });
            }
            if size <= limit as u64 {
                bytes.extend_from_slice(&data);
            }
        }
        if size > limit as u64 {
            return Err(Fault::TooLarge { size, limit, is_drained: true });
        }
        Ok(bytes)
    };
    let patience = progress.deadlines().body;
    let mut read = pin!(read);
    let read = poll_fn(|cx| match read.as_mut().poll(cx) {
        Poll::Pending if progress.is_cut_short() => Poll::Ready(Err(Fault::CutShort)),
        polled => polled,
    });
    tokio::time::timeout(patience, read).await.unwrap_or(Err(Fault::TooSlow(patience)))
}

/// What is wrong with a body whatever the path: Firecracker says it first.
fn wrong_body(method: &hyper::Method, body: &[u8]) -> Option<Fault> {
    match (method, body) {
        (&hyper::Method::PUT, []) => Some(Fault::NoBody(Method::Put)),
        (&hyper::Method::PATCH, []) => Some(Fault::NoBody(Method::Patch)),
        (&hyper::Method::GET, [_, ..]) => Some(Fault::NeedlessBody(Method::Get.name())),
        _ => None,
    }
}

async fn answer(
    api: &Api,
    progress: &Progress,
    (route, id): (&Route, Option<String>),
    body: &[u8],
    arrived: Arrived,
) -> Result<Reply, Fault> {
    let body = match (&route.body, body) {
        (Some(_), b"") if route.is_body_optional => b"{}",
        (Some(_), b"") => return Err(Fault::NoBody(route.method)),
        (None, [_, ..]) => return Err(Fault::NeedlessBody(route.method.name())),
        (_, body) => body,
    };
    passed::check(&api.routes, route, body, arrived.held().len())?;
    let answer = match route.act {
        Act::Ask(make) => {
            let request = arrived.with(|| make(body))?;
            of_route(route, ask_with(api, request, arrived).await?)
        }
        Act::Section(name) => {
            let request = about_section(route.method, name, id, body);
            of_route(route, ask_with(api, request, arrived).await?)
        }
        Act::Wait => {
            progress.enter(Phase::Waiting);
            of_route(route, ask(api, Request::Wait).await?)
        }
        Act::Events => follow(api, progress).await?,
        Act::Version => Answer::json(&Version { firecracker_version: FIRECRACKER_VERSION }),
        Act::Document => Answer::Json(api.document()),
    };
    let found = route.deprecated.find(body);
    let deprecated = found.map(|what| format!("{} {}: {what}", route.method.name(), route.path));
    Ok(Reply { answer, deprecated })
}

fn about_section(method: Method, name: &str, id: Option<String>, body: &[u8]) -> Request {
    let section = name.to_owned();
    match method {
        Method::Get => Request::Get { section },
        Method::Put => Request::Put { section, id, body: body.to_vec() },
        Method::Patch | Method::Post => Request::Patch { section, id, body: body.to_vec() },
        Method::Delete => Request::Delete { section, id },
    }
}

/// A route that promises JSON gives JSON, `null` included.
fn of_route(route: &Route, value: Value) -> Answer {
    match (&route.reply, value) {
        (Content::Nothing, Value::Null) => Answer::Nothing,
        (Content::Text(mime), Value::String(text)) => Answer::Text { mime, text: text.into() },
        (_, value) => Answer::json(&value),
    }
}

async fn ask(api: &Api, request: Request) -> Result<Value, Refusal> {
    send(api, request, Arrived::default()).await
}

/// Asks what came with descriptors. What is refused is refused in the words of whoever passed them.
async fn ask_with(api: &Api, request: Request, arrived: Arrived) -> Result<Value, Fault> {
    let held = arrived.held().clone();
    let reply = send(api, request, arrived).await;
    reply.map_err(|refusal| match held.is_empty() {
        true => refusal.into(),
        false => Fault::OfPassed(in_senders_words(&refusal.to_string(), &held), refusal),
    })
}

async fn send(api: &Api, request: Request, arrived: Arrived) -> Result<Value, Refusal> {
    let latencies = &api.counters.latencies;
    let latency = match request {
        Request::Pause => Some(latencies.pause_vm()),
        Request::Resume => Some(latencies.resume_vm()),
        Request::Snapshot(ref params) => Some(latencies.asked_for_snapshot(params.snapshot_type)),
        Request::Load(_) => Some(latencies.load_snapshot()),
        _ => None,
    };
    let asked = Instant::now();
    let (sender, receiver) = oneshot::channel();
    api.handle.send_with(request, arrived, move |reply| {
        // Without a receiver the client has gone.
        let _ = sender.send(reply);
    });
    let reply = api.chime.hear(receiver).await.unwrap_or(Err(Refusal::Gone));
    if let (Some(latency), Ok(_)) = (latency, &reply) {
        latency.set(micros_since(asked));
    }
    reply
}

/// Subscribes, and makes lines of what comes. A client that falls behind is cut off rather than
/// waited for or remembered without bound.
async fn follow(api: &Api, progress: &Progress) -> Result<Answer, Fault> {
    let (sender, rest) = mpsc::channel(EVENTS_BEHIND_MAX);
    let sink = Sink::new(move |event| {
        let is_taken = sender.try_send(line(event)).is_ok();
        is_taken && !matches!(event.what, What::Ended(_))
    });
    let instance = ask(api, Request::Subscribe(sink)).await?;
    progress.enter(Phase::Waiting);
    let rest = Rest { lines: rest, chime: api.chime.clone() };
    Ok(Answer::Lines { first: line(&StateLine { event: StateTag::State, instance }), rest })
}

fn respond(
    outcome: Result<Reply, Fault>,
    is_last: bool,
    in_progress: InProgress,
) -> Response<ReplyBody> {
    let is_deprecated = outcome.as_ref().is_ok_and(|reply| reply.deprecated.is_some());
    let (status, frames, mime) = match outcome.map(|reply| reply.answer) {
        Ok(Answer::Nothing) => (StatusCode::NO_CONTENT, Frames::Done, None),
        Ok(Answer::Json(bytes)) => (StatusCode::OK, Frames::One(bytes), Some("application/json")),
        Ok(Answer::Text { mime, text }) => (StatusCode::OK, Frames::One(text), Some(mime)),
        Ok(Answer::Lines { first, rest }) => {
            (StatusCode::OK, Frames::Lines { first, rest }, Some("application/x-ndjson"))
        }
        Err(fault) => {
            let status = fault.status();
            let fault_message = fault.to_string();
            let bytes = Bytes::from(to_json(&FaultMessage { fault_message }));
            (status, Frames::One(bytes), Some("application/json"))
        }
    };
    let mut response = Response::new(ReplyBody { frames, _in_progress: in_progress });
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(SERVER, HeaderValue::from_static("Firecracker API"));
    let connection = if is_last { "close" } else { "keep-alive" };
    headers.insert(CONNECTION, HeaderValue::from_static(connection));
    if is_deprecated {
        headers.insert("deprecation", HeaderValue::from_static("true"));
    }
    if let Some(mime) = mime {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(mime));
    }
    response
}

/// As HTTP/1.1 and 1.0 have it (RFC 9112, 9.3).
fn client_keeps_alive(parts: &Parts) -> bool {
    let says = |word: &str| {
        let values = parts.headers.get_all(CONNECTION).into_iter();
        values
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|token| token.trim().eq_ignore_ascii_case(word))
    };
    !says("close") && (parts.version == HttpVersion::HTTP_11 || says("keep-alive"))
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("values made here have string keys and cannot fail")
}

fn line(value: &impl Serialize) -> Bytes {
    let mut json = to_json(value);
    json.push(b'\n');
    Bytes::from(json)
}

/// Sees the connection through to the end of the reply: dropped with its last byte.
struct InProgress(Rc<Progress>);

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.enter(Phase::Sent);
    }
}

/// What is still to be sent of a reply.
pub(super) struct ReplyBody {
    frames: Frames,
    _in_progress: InProgress,
}

enum Frames {
    Done,
    One(Bytes),
    Lines {
        /// Empty once sent.
        first: Bytes,
        rest: Rest,
    },
}

/// Lines of events, which the VMM thread sends.
struct Rest {
    lines: mpsc::Receiver<Bytes>,
    chime: Arc<Chime>,
}

impl Rest {
    fn poll(&mut self, cx: &Context<'_>) -> Poll<Option<Bytes>> {
        self.lines.poll_recv(&mut Context::from_waker(&self.chime.waker(cx)))
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let data = match &mut self.frames {
            Frames::Done => Poll::Ready(None),
            Frames::One(bytes) => {
                let bytes = std::mem::take(bytes);
                self.frames = Frames::Done;
                Poll::Ready(Some(bytes))
            }
            Frames::Lines { first, rest } if first.is_empty() => rest.poll(cx),
            Frames::Lines { first, .. } => Poll::Ready(Some(std::mem::take(first))),
        };
        data.map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.frames, Frames::Done)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.frames {
            Frames::Done => SizeHint::with_exact(0),
            Frames::One(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Frames::Lines { .. } => SizeHint::default(),
        }
    }
}

/// A request in the words of Firecracker's log.
struct Described<'a> {
    parts: &'a Parts,
    body: &'a [u8],
    logged: Logged,
}

/// As much of a body as a line of the log may have room for, and more.
const SHOWN_BODY_LEN: usize = 4096;

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { parts, body, logged } = self;
        let method = parts.method.as_str();
        let (initial, rest) = method.split_at_checked(1).unwrap_or((method, ""));
        write!(f, "{initial}{} request on {:?}", rest.to_ascii_lowercase(), parts.uri.path())?;
        match logged {
            _ if body.is_empty() => Ok(()),
            Logged::Never => Ok(()),
            Logged::AtDebug(what) if !log::log_enabled!(log::Level::Debug) => {
                write!(f, ". To view {what} received by the API, configure log-level to DEBUG")
            }
            Logged::Whole | Logged::AtDebug(_) => {
                let text = std::str::from_utf8(body).unwrap_or("inconvertible to UTF-8");
                match text.len() {
                    0..=SHOWN_BODY_LEN => write!(f, " with body {text:?}"),
                    len => {
                        let shown = &text[..text.floor_char_boundary(SHOWN_BODY_LEN)];
                        write!(f, " with body {shown:?}… of {len} bytes")
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(body: &[u8], logged: Logged) -> String {
        let request = hyper::Request::builder().method("PUT").uri("/a/b?c").body(()).unwrap();
        let (parts, ()) = request.into_parts();
        Described { parts: &parts, body, logged }.to_string()
    }

    #[test]
    fn logs_as_much_of_a_body_as_is_fit_to_be_seen() {
        assert_eq!(described(b"", Logged::Whole), r#"Put request on "/a/b""#);
        let whole = described(b"{\"x\": 1}\n", Logged::Whole);
        assert_eq!(whole, r#"Put request on "/a/b" with body "{\"x\": 1}\n""#);
        assert_eq!(described(b"{}", Logged::Never), r#"Put request on "/a/b""#);
        // No logger, no level: Debug is not on.
        assert_eq!(
            described(b"{}", Logged::AtDebug("the thing")),
            "Put request on \"/a/b\". To view the thing received by the API, configure log-level to DEBUG"
        );
        let said = described(b"\xff", Logged::Whole);
        assert!(said.ends_with(r#"with body "inconvertible to UTF-8""#), "{said}");
    }

    #[test]
    fn logs_the_start_of_a_long_body() {
        let long = "é".repeat(30_000);
        let said = described(long.as_bytes(), Logged::Whole);
        assert!(said.len() < SHOWN_BODY_LEN + 100, "{}", said.len());
        assert!(said.ends_with("é\"… of 60000 bytes"), "{said}");
    }
}
