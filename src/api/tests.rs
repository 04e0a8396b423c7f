//! The API through a real socket, with a stand-in for the VMM.
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use devices::backend::unix::StalePolicy;
use rustix::event::{PollFd, PollFlags};
use serde_json::{Value, json};
use vmm_sys_util::tempdir::TempDir;

use super::client::{Client, ClientError, Patience};
use super::stream::Deadlines;
use super::{Options, Server, bind, route};
use crate::error::{Refusal, chain};
use crate::events::{Hub, What};
use crate::exit::Ending;
use crate::request::{Call, Handle, Reply, Request, Requests, Respond};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(150);

/// A server, its socket and a thread in the VMM's place.
struct Fixture {
    server: Option<Server>,
    vmm: Option<JoinHandle<()>>,
    handle: Handle,
    path: PathBuf,
    _directory: TempDir,
}

fn options() -> Options {
    Options {
        sections: route::tests::sections(),
        deadlines: Deadlines { head: LONG, body: LONG, write: LONG },
        ..Options::default()
    }
}

impl Fixture {
    fn new(options: Options) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("husk.sock");
        let (handle, requests) = Requests::channel().unwrap();
        let listener = bind(&path, StalePolicy::Replace).unwrap();
        let server = Server::spawn(listener, handle.clone(), options).unwrap();
        let vmm = thread::spawn(move || FakeVmm::new().run(&requests));
        Self { server: Some(server), vmm: Some(vmm), handle, path, _directory: directory }
    }

    fn connect(&self) -> Connection {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        Connection(BufReader::new(stream))
    }

    /// Returns when what has been sent on other connections has been seen: a new one's request
    /// comes after it.
    fn settle(&self) {
        assert_eq!(self.call("GET", "/", "").0, 200);
    }

    fn call(&self, method: &str, target: &str, body: &str) -> (u16, String) {
        let body = (!body.is_empty()).then_some(body.as_bytes());
        let answer = Client::new(&self.path).call(method, target, body, Patience::Normal).unwrap();
        (answer.status, String::from_utf8(answer.body).unwrap())
    }

    fn fault(&self, method: &str, target: &str, body: &str) -> String {
        let (status, text) = self.call(method, target, body);
        assert_eq!(status, 400, "{text}");
        let json: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json.as_object().unwrap().len(), 1);
        json["fault_message"].as_str().unwrap().to_owned()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown(Duration::ZERO, None);
        }
        // It may have been killed by the test already.
        let _ = self.handle.call(Request::Kill);
        self.vmm.take().unwrap().join().unwrap();
        assert!(!self.path.exists());
    }
}

/// Answers requests until it is killed; then it publishes the end, answers who waits and goes.
struct FakeVmm {
    hub: Hub,
    waiting: Vec<Respond>,
}

impl FakeVmm {
    fn new() -> Self {
        Self { hub: Hub::new(Instant::now()), waiting: Vec::new() }
    }

    fn run(mut self, requests: &Requests) {
        loop {
            let mut fds = [PollFd::new(requests.bell(), PollFlags::IN)];
            rustix::event::poll(&mut fds, None).unwrap();
            while let Some(call) = requests.next() {
                if self.answer(call).is_break() {
                    return;
                }
            }
        }
    }

    fn answer(&mut self, Call { request, respond, .. }: Call) -> ControlFlow<()> {
        let info = json!({ "id": "t", "state": "Running", "app_name": "husk", "vmm_version": "0" });
        let mut reply: Reply = Ok(Value::Null);
        match request {
            Request::Describe => reply = Ok(info),
            Request::Subscribe(sink) => {
                self.hub.subscribe(sink);
                reply = Ok(info);
            }
            Request::Pause => self.hub.publish(What::Paused),
            Request::Start => reply = Err(Refusal::NotStarted),
            Request::Config => reply = Ok(json!({ "boot-source": null, "drives": [] })),
            Request::Get { .. } => reply = Ok(json!("x".repeat(4000))),
            Request::Put { section, id, body } => {
                let json: Result<Value, _> = serde_json::from_slice(&body);
                reply = json.map_err(Refusal::Body).map(|json| json!([section, id, json]));
                if section == "vsock" {
                    reply = reply.map(|_| Value::Null);
                }
            }
            Request::Wait => {
                self.waiting.push(respond);
                return ControlFlow::Continue(());
            }
            Request::Kill => {
                respond(Ok(Value::Null));
                self.hub.publish(What::Ended(Ending::Killed));
                let ending = serde_json::to_value(Ending::Killed).unwrap();
                self.waiting.drain(..).for_each(|respond| respond(Ok(ending.clone())));
                return ControlFlow::Break(());
            }
            _ => (),
        }
        respond(reply);
        ControlFlow::Continue(())
    }
}

/// A client that says exactly what it is told.
struct Connection(BufReader<UnixStream>);

impl Connection {
    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// The head, lines joined by `|`, and the body by its length.
    fn receive(&mut self) -> (String, String) {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "closed after {head:?}");
            match line.trim_end() {
                "" => break,
                line => head.push(line.to_owned()),
            }
        }
        let length = head.iter().find_map(|line| line.strip_prefix("Content-Length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        self.0.read_exact(&mut body).unwrap();
        (head.join("|"), String::from_utf8(body).unwrap())
    }

    fn is_closed(&mut self) -> bool {
        match self.0.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn answers_in_firecrackers_words() {
    let fixture = Fixture::new(options());
    let mut client = fixture.connect();

    client.send("GET / HTTP/1.1\r\n\r\n");
    let (head, body) = client.receive();
    assert!(head.starts_with("HTTP/1.1 200 OK|Server: Firecracker API|Connection: keep-alive|"));
    assert!(head.contains("|Content-Type: application/json|"), "{head}");
    assert!(!head.contains("Date"), "{head}");
    assert!(body.contains(r#""state":"Running""#));

    client.send("PUT /vsock/vsock0 HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}\n");
    let (head, _) = client.receive();
    assert_eq!(head, "HTTP/1.1 204 No Content|Server: Firecracker API|Connection: keep-alive");

    client.send(
        "PUT /actions HTTP/1.1\r\nContent-Length: 31\r\n\r\n{\"action_type\":\"InstanceStart\"}",
    );
    let (head, body) = client.receive();
    assert!(head.starts_with("HTTP/1.1 400 Bad Request|"));
    assert_eq!(
        body,
        r#"{"fault_message":"The requested operation is not supported before starting the microVM."}"#
    );

    client.send("GET /version HTTP/1.1\r\nConnection: close\r\n\r\n");
    let (head, body) = client.receive();
    assert!(head.contains("|Connection: close|"), "{head}");
    assert_eq!(body, r#"{"firecracker_version":"1.17.0"}"#);
    assert!(client.is_closed());
}

#[test]
fn tells_by_a_header_what_is_deprecated() {
    let fixture = Fixture::new(options());
    let mut client = fixture.connect();
    let mut head = |target: &str, body: &str| {
        let length = body.len();
        client.send(&format!("PUT {target} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}"));
        client.receive().0
    };
    assert_eq!(
        head("/vsock", r#"{"vmm_version": "0"}"#),
        "HTTP/1.1 204 No Content|Server: Firecracker API|Connection: keep-alive|Deprecation: true"
    );
    assert!(!head("/vsock", r#"{"vmm_version": null}"#).contains("Deprecation"));
    assert!(head("/drives/a", r#"{"vmm_version": 1}"#).contains("|Deprecation: true|"));
    assert!(!head("/actions", r#"{"action_type":"InstanceStart"}"#).contains("Deprecation"));
}

#[test]
fn hands_sections_over_unread() {
    let fixture = Fixture::new(options());
    assert_eq!(
        fixture.call("PUT", "/drives/a", r#"{"x":1}"#),
        (200, r#"["drives","a",{"x":1}]"#.to_owned())
    );
    assert_eq!(fixture.call("PUT", "/machine-config", "1").1, r#"["machine-config",null,1]"#);
    assert_eq!(fixture.call("PATCH", "/vm", r#"{"state":"Paused"}"#), (204, String::new()));
    assert_eq!(fixture.call("GET", "/vm/config", "").1, r#"{"boot-source":null,"drives":[]}"#);
    assert!(fixture.fault("PUT", "/drives/a", "{").contains("at line 1 column 1"));
}

#[test]
fn refuses_what_it_does_not_know() {
    let fixture = Fixture::new(options());
    assert_eq!(fixture.fault("GET", "/nope", ""), "Invalid request method and/or path: GET nope.");
    assert_eq!(fixture.fault("POST", "/vm", "{}"), "Invalid request method and/or path: POST vm.");
    assert_eq!(fixture.fault("PUT", "/actions", ""), "Empty PUT request.");
    assert_eq!(fixture.fault("PATCH", "/vm", ""), "Empty PATCH request.");
    assert_eq!(fixture.fault("GET", "/", "{}"), "GET request cannot have a body.");
    let said = fixture.fault("DELETE", "/drives/a", "{}");
    assert_eq!(said, "DELETE request cannot have a body.");
    assert!(fixture.fault("PUT", "/drives/%2e%2e", "{}").starts_with("API Resource IDs can only"));
    assert!(
        fixture.fault("PUT", "/actions", "{\"action_type\":\"X\"}").contains("unknown variant")
    );
    assert!(fixture.fault("PUT", "/actions", "\u{feff}{}").contains("line 1 column 1"));
    assert!(fixture.fault("PUT", "/actions", &"[".repeat(50_000)).contains("line 1 column"));
}

#[test]
fn refuses_what_is_not_http() {
    let fixture = Fixture::new(options());
    let long_head = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(100_000));
    let many_headers = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(1000));
    for (request, status) in [
        ("nonsense\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", "400"),
        ("PUT /vm HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}", "400"),
        ("GET /\0 HTTP/1.1\r\n\r\n", "400"),
        (&long_head, "431"),
        (&many_headers, "431"),
    ] {
        let mut client = fixture.connect();
        // The reply may come before all has been taken.
        let _ = client.0.get_mut().write_all(request.as_bytes());
        let (head, body) = client.receive();
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request:.40}: {head}");
        assert!(head.contains("|Server: Firecracker API|"), "{head}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert!(body["error"].as_str().unwrap().contains("unanswered requests will be dropped"));
        assert!(client.is_closed());
    }
}

#[test]
fn answers_what_came_before_what_is_not_http() {
    let fixture = Fixture::new(options());
    let mut client = fixture.connect();
    client.send("GET /version HTTP/1.1\r\n\r\nnonsense\r\n\r\n");
    assert!(client.receive().1.contains("firecracker_version"));
    assert!(client.receive().1.contains("\"error\""));
    assert!(client.is_closed());
}

#[test]
fn keeps_the_connection_of_old_clients_as_firecracker_does() {
    let fixture = Fixture::new(options());
    let mut client = fixture.connect();
    for _ in 0..3 {
        client.send("GET /version HTTP/1.0\r\n\r\n");
        assert!(client.receive().0.contains("|Connection: keep-alive|"));
    }
    client.send("GET /version HTTP/1.0\r\nConnection: close\r\n\r\n");
    assert!(client.receive().0.contains("|Connection: close|"));
    assert!(client.is_closed());
}

#[test]
fn answers_pipelined_requests_in_order() {
    let fixture = Fixture::new(options());
    let mut client = fixture.connect();
    let request = |n: usize| {
        let body = n.to_string();
        format!("PUT /drives/d{n} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    };
    // Longer than hyper's buffers, and than a socket's with the replies.
    client.send(&(0..100).map(request).collect::<String>());
    for n in 0..100 {
        assert_eq!(client.receive().1, format!("[\"drives\",\"d{n}\",{n}]"));
    }
}

#[test]
fn answers_who_has_stopped_sending() {
    let fixture = Fixture::new(options());
    // Often enough to have the end arrive together with the request, and after it.
    for _ in 0..100 {
        let mut client = fixture.connect();
        client.send("PUT /drives/a HTTP/1.1\r\nContent-Length: 1\r\n\r\n7");
        client.0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(client.receive().1, r#"["drives","a",7]"#);
        assert!(client.is_closed());
    }
    let mut client = fixture.connect();
    client.send("GET /wait HTTP/1.1\r\n\r\n");
    client.0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    fixture.settle();
    assert_eq!(fixture.handle.call(Request::Kill).unwrap(), Value::Null);
    assert_eq!(client.receive().1, r#"{"reason":"killed"}"#);
    assert!(client.is_closed());
}

#[test]
fn limits_bodies() {
    let fixture = Fixture::new(Options { body_limit: 100, ..options() });
    let refusal = |size: usize| {
        format!(
            "Request payload with size {size} is larger than the limit of 100 allowed by server."
        )
    };
    assert_eq!(fixture.call("PUT", "/drives/a", &format!("\"{}\"", "x".repeat(98))).0, 200);
    assert_eq!(fixture.fault("PUT", "/drives/a", &"x".repeat(101)), refusal(101));
    assert_eq!(fixture.fault("PUT", "/drives/a", &"x".repeat(1 << 20)), refusal(1 << 20));

    let mut client = fixture.connect();
    client.send("PUT /vm HTTP/1.1\r\nContent-Length: 1073741824\r\n\r\n{");
    let (head, body) = client.receive();
    assert!(head.contains("Connection: close") && body.contains(&refusal(1 << 30)), "{head}");
    assert!(client.is_closed());

    let mut client = fixture.connect();
    client.send("PUT /vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
    client.send(&format!("65\r\n{}\r\n0\r\n\r\n", "x".repeat(101)));
    assert!(client.receive().1.contains(&refusal(101)));
    client.send("GET /version HTTP/1.1\r\n\r\n");
    assert!(client.receive().0.starts_with("HTTP/1.1 200"));
}

#[test]
fn drops_slow_heads_but_not_idle_connections() {
    let deadlines = Deadlines { head: SHORT, ..options().deadlines };
    let fixture = Fixture::new(Options { deadlines, ..options() });
    let mut idle = fixture.connect();
    idle.send("GET / HTTP/1.1\r\n\r\n\r\n");
    idle.receive();
    let (mut silent, mut slow) = (fixture.connect(), fixture.connect());
    slow.send("GET / HT");
    let mut slow_second = fixture.connect();
    slow_second.send("GET / HTTP/1.1\r\n\r\n");
    slow_second.receive();
    slow_second.send("G");
    for client in [&mut silent, &mut slow, &mut slow_second] {
        assert!(client.is_closed());
    }
    idle.send("GET / HTTP/1.1\r\n\r\n");
    idle.receive();
}

#[test]
fn bodies_that_end_early_are_answered_at_once() {
    let fixture = Fixture::new(options());
    for body in ["", "{"] {
        let mut client = fixture.connect();
        client.send(&format!("PUT /vm HTTP/1.1\r\nContent-Length: 10\r\n\r\n{body}"));
        client.0.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
        let (head, body) = client.receive();
        assert!(head.starts_with("HTTP/1.1 400 ") && head.contains("Connection: close"), "{head}");
        assert!(body.contains("ended early"), "{body}");
        assert!(client.is_closed());
    }
}

#[test]
fn refuses_slow_bodies() {
    let deadlines = Deadlines { body: SHORT, ..options().deadlines };
    let fixture = Fixture::new(Options { deadlines, ..options() });
    let mut client = fixture.connect();
    client.send("PUT /vm HTTP/1.1\r\nContent-Length: 10\r\n\r\n{");
    let (head, body) = client.receive();
    assert!(head.starts_with("HTTP/1.1 400 ") && head.contains("Connection: close"), "{head}");
    assert!(body.contains("did not arrive within 150ms"), "{body}");
    assert!(client.is_closed());
}

#[test]
fn drops_who_does_not_read() {
    let deadlines = Deadlines { write: SHORT, ..options().deadlines };
    let fixture = Fixture::new(Options { deadlines, ..options() });
    let mut client = fixture.connect();
    let started = Instant::now();
    let end = loop {
        if let Err(e) =
            client.0.get_mut().write_all(&b"GET /machine-config HTTP/1.1\r\n\r\n".repeat(100))
        {
            break e;
        }
    };
    assert!(matches!(end.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset));
    assert!(started.elapsed() < LONG);
}

#[test]
fn makes_room_by_closing_the_oldest_idle_connection() {
    let fixture = Fixture::new(Options { connections_max: 4, ..options() });
    let mut waiting = fixture.connect();
    waiting.send("GET /wait HTTP/1.1\r\n\r\n");
    let mut idle: Vec<_> = (0..3)
        .map(|_| {
            let mut client = fixture.connect();
            client.send("GET / HTTP/1.1\r\n\r\n");
            client.receive();
            client
        })
        .collect();
    // The first becomes the youngest.
    idle[0].send("GET / HTTP/1.1\r\n\r\n");
    idle[0].receive();

    let mut new = fixture.connect();
    new.send("GET / HTTP/1.1\r\n\r\n");
    new.receive();
    assert!(idle[1].is_closed());
    for client in [0, 2] {
        idle[client].send("GET / HTTP/1.1\r\n\r\n");
        idle[client].receive();
    }

    // A crowd that says nothing does not keep anybody out, nor end who waits.
    let crowd: Vec<_> = (0..200).map(|_| fixture.connect()).collect();
    assert_eq!(fixture.call("GET", "/version", "").0, 200);
    drop(crowd);
    fixture.handle.call(Request::Kill).unwrap();
    assert_eq!(waiting.receive().1, r#"{"reason":"killed"}"#);
}

#[test]
fn streams_events_until_the_end() {
    let fixture = Fixture::new(options());
    let path = fixture.path.clone();
    let mut lines = Vec::new();
    let refused = Client::new(&path)
        .follow("/events", |line| {
            let line: Value = serde_json::from_str(line).unwrap();
            lines.push(line);
            let request = if lines.len() == 1 { Request::Pause } else { Request::Kill };
            if lines.len() < 3 {
                fixture.handle.call(request).unwrap();
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(refused.is_none());
    let [state, paused, ended] = lines.as_slice() else { panic!("{lines:?}") };
    assert_eq!((&state["event"], &state["state"]), (&json!("state"), &json!("Running")));
    assert_eq!(paused["event"], "paused");
    assert!(paused["time_us"].is_u64());
    assert_eq!((&ended["event"], &ended["reason"]), (&json!("ended"), &json!("killed")));
}

#[test]
fn sends_what_is_owed_before_it_goes() {
    let mut fixture = Fixture::new(options());
    let mut idle = fixture.connect();
    idle.send("GET / HTTP/1.1\r\n\r\n");
    idle.receive();
    let mut half_open = fixture.connect();
    half_open.send("GET");
    let mut waiting = fixture.connect();
    waiting.send("GET /wait HTTP/1.1\r\n\r\n");
    fixture.settle();
    let mut following = fixture.connect();
    following.send("GET /events HTTP/1.1\r\n\r\n");
    assert!(following.receive().0.contains("|Content-Type: application/x-ndjson|"));
    let mut killing = fixture.connect();
    killing.send("PUT /actions HTTP/1.1\r\nContent-Length: 22\r\n\r\n{\"action_type\":\"Kill\"}");
    fixture.vmm.take().unwrap().join().unwrap();

    let started = Instant::now();
    fixture.server.take().unwrap().shutdown(LONG, None);
    assert!(started.elapsed() < LONG / 2);

    assert!(killing.receive().0.starts_with("HTTP/1.1 204"));
    assert_eq!(waiting.receive().1, r#"{"reason":"killed"}"#);
    let mut rest = String::new();
    following.0.read_to_string(&mut rest).unwrap();
    assert!(rest.contains(r#""event":"ended","reason":"killed"}"#), "{rest}");
    assert!(rest.ends_with("0\r\n\r\n"), "{rest}");
    for client in [&mut idle, &mut half_open, &mut waiting, &mut killing] {
        assert!(client.is_closed());
    }
    assert!(!fixture.path.exists());
    fixture.vmm = Some(thread::spawn(|| ()));
}

#[test]
fn goes_in_time_though_a_client_is_never_answered() {
    let mut fixture = Fixture::new(options());
    let mut waiting = fixture.connect();
    waiting.send("GET /wait HTTP/1.1\r\n\r\n");
    fixture.settle();
    let started = Instant::now();
    fixture.server.take().unwrap().shutdown(SHORT, None);
    assert!((SHORT..LONG).contains(&started.elapsed()));
    assert!(waiting.is_closed());
}

#[test]
fn says_so_when_the_vmm_has_gone() {
    let fixture = Fixture::new(options());
    fixture.handle.call(Request::Kill).unwrap();
    assert_eq!(fixture.fault("GET", "/", ""), "the microVM is being torn down");
}

#[test]
fn leaves_no_descriptors_behind() {
    let fixture = Fixture::new(options());
    for n in 0..1000 {
        let mut client = fixture.connect();
        match n % 3 {
            0 => (),
            1 => client.send("GET / HT"),
            _ => client.send("GET / HTTP/1.1\r\n\r\n"),
        }
    }
    let give_up = Instant::now() + LONG;
    while sockets_of(&fixture.path) > 1 {
        assert!(Instant::now() < give_up, "{} left", sockets_of(&fixture.path));
        thread::sleep(Duration::from_millis(10));
    }
}

/// Sockets with the name `path`: the listening one, and the server's end of each connection.
fn sockets_of(path: &Path) -> usize {
    let all = fs::read_to_string("/proc/net/unix").unwrap();
    all.lines().filter(|line| line.ends_with(path.to_str().unwrap())).count()
}

fn temporary() -> (TempDir, PathBuf) {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    (directory, path)
}

#[test]
fn takes_its_file_along_before_it_stops_to_listen() {
    let (_directory, path) = temporary();
    let listener = bind(&path, StalePolicy::Replace).unwrap();
    let (name, socket) = listener.into_parts();
    drop(name);
    assert!(!path.exists());
    assert!(rustix::net::sockopt::socket_acceptconn(&socket).unwrap());
}

#[test]
fn replaces_a_dead_socket_unless_told_to_fail() {
    let (_directory, path) = temporary();
    drop(UnixListener::bind(&path).unwrap());
    let inode = fs::metadata(&path).unwrap().ino();
    let error = bind(&path, StalePolicy::Fail).unwrap_err();
    assert_eq!(
        chain(&error),
        format!(
            "Failed to open the API socket at: {}. Check that it is not already used.",
            path.display()
        )
    );
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    let _listener = bind(&path, StalePolicy::Replace).unwrap();
    UnixStream::connect(&path).unwrap();
}

#[test]
fn says_which_socket_is_refused_and_why() {
    let (directory, path) = temporary();
    let error = |path: &Path| chain(&bind(path, StalePolicy::Replace).unwrap_err());
    let _live = bind(&path, StalePolicy::Replace).unwrap();
    let start = format!("API socket {}: ", path.display());
    assert_eq!(error(&path), format!("{start}another process is listening on it"));
    let start = format!("API socket {}: ", directory.as_path().display());
    assert_eq!(
        error(directory.as_path()),
        format!("{start}there is a directory in its place; remove it or choose another path")
    );
    let missing = error(&directory.as_path().join("no/s"));
    assert!(missing.ends_with("no/s: cannot bind: No such file or directory (os error 2)"));
    assert!(error(Path::new(&"x".repeat(108))).ends_with("is 108 bytes long; the limit is 107"));
}

#[test]
fn the_client_says_why_there_is_no_answer() {
    let (directory, path) = temporary();
    let call = || Client::new(&path).call("GET", "/", None, Patience::Normal).unwrap_err();
    assert!(matches!(call(), ClientError::NoSocket { .. }));
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        listener.accept().unwrap().0.write_all(b"SSH-2.0-nope\r\n\r\n").unwrap();
    });
    assert!(matches!(call(), ClientError::Protocol { .. } | ClientError::Io { .. }));
    server.join().unwrap();
    assert!(matches!(call(), ClientError::Refused { .. }));
    for path in [directory.as_path().to_owned(), directory.as_path().join("file")] {
        let _ = fs::write(&path, "");
        let error = Client::new(&path).call("GET", "/", None, Patience::Normal).unwrap_err();
        assert!(matches!(error, ClientError::NotSocket { .. }), "{error}");
    }
}
