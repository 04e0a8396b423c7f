//! A1-A3: what is no HTTP, too much of it, or too slow. Nobody else is kept waiting, and nothing is left of it.
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use super::subject::{Subject, differs};
use crate::util::*;

/// How long a reply or the end of a connection may take; 1 s is promised of a machine that has time.
const SOON: Duration = Duration::from_secs(4);
/// The largest body, and one byte more than that.
const BODY_MAX: usize = 51_200;

/// What comes of bytes that somebody sends.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// The first reply's status; and the connection is closed, or not.
    Status(u16, bool),
    /// Closed without a word.
    Closed,
    /// Neither.
    Silence,
}

/// Sends bytes, and looks what comes, and whether that was the end.
fn answer(subject: &Subject, bytes: &[u8]) -> Answer {
    let stream = subject.api().connect();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    // It may hang up before it has heard everything.
    let _ = (&stream).write_all(bytes);
    let mut reader = BufReader::new(stream);
    let reply = match Reply::try_read(&mut reader) {
        Ok(reply) => reply,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Answer::Silence,
        Err(_) => return Answer::Closed,
    };
    // A connection that goes on answers the next request.
    let next = reader.get_mut().write_all(b"GET / HTTP/1.1\r\n\r\n");
    let is_open = next.is_ok() && Reply::try_read(&mut reader).is_ok_and(|r| r.status == 200);
    Answer::Status(reply.status, !is_open)
}

/// A request with this head, and a body.
fn put(headers: &str, body: &[u8]) -> Vec<u8> {
    [format!("PUT /machine-config HTTP/1.1\r\n{headers}\r\n").as_bytes(), body].concat()
}

fn get(headers: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\n{headers}\r\n").into_bytes()
}

/// Bytes, and which answers are right: refused, and the connection closed, unless it says so.
struct Case(&'static str, Vec<u8>, &'static [Answer]);

const REFUSED: &[Answer] = &[Answer::Status(400, true)];
/// The request is a whole one, so that the next can be found.
const REFUSED_AND_KEPT: &[Answer] = &[Answer::Status(400, false)];
/// RFC 9110, 8.6: they may be taken for one.
const DONE: &[Answer] = &[Answer::Status(204, false)];
/// Who begins so would not understand.
const CLOSED: &[Answer] = &[Answer::Closed];
const TOO_LARGE: &[Answer] = &[Answer::Status(431, true)];

fn a01_cases() -> Vec<Case> {
    let json = br#"{"vcpu_count": 1, "mem_size_mib": 64}"#;
    let len = json.len();
    let sized = |size: &str| put(&format!("Content-Length: {size}\r\n"), json);
    let chunked = |chunks: &[u8]| put("Transfer-Encoding: chunked\r\n", chunks);
    let large = |len: usize| put(&format!("Content-Length: {len}\r\n"), &vec![b' '; len]);
    let mut cases = vec![
        Case("body of the limit and 1", large(BODY_MAX + 1), REFUSED_AND_KEPT),
        Case("body of 1 MiB", large(1 << 20), REFUSED_AND_KEPT),
        Case("length of 1 GiB", sized("1073741824"), REFUSED),
        Case("length of 2^62", sized("4611686018427387904"), REFUSED),
        Case("length of 2^63", sized("9223372036854775808"), REFUSED),
        Case("length of 2^64", sized("18446744073709551616"), REFUSED),
        Case("length 0", put("Content-Length: 0\r\n", b""), REFUSED_AND_KEPT),
        Case("more than the length", put("Content-Length: 2\r\n", b"{}xx"), REFUSED),
        Case("no length", put("", b""), REFUSED_AND_KEPT),
        Case("two equal lengths", sized(&format!("{len}\r\nContent-Length: {len}")), DONE),
        Case("two lengths", sized(&format!("{len}\r\nContent-Length: 1")), REFUSED),
        Case("list of lengths", sized(&format!("{len}, {len}")), REFUSED),
        Case("chunks", chunked(b"1\r\n{\r\n0\r\n\r\n"), REFUSED_AND_KEPT),
        Case("chunk of no size", chunked(b"\r\n{}\r\n"), REFUSED),
        Case("chunk of a size that is none", chunked(b"zz\r\n{}\r\n0\r\n\r\n"), REFUSED),
        Case("chunk of 2^64", chunked(b"10000000000000000\r\n"), REFUSED),
        Case("chunk that is longer than it says", chunked(b"1\r\n{}\r\n0\r\n\r\n"), REFUSED),
        Case("gzip", put("Transfer-Encoding: gzip\r\n", b""), REFUSED),
        Case("NUL in the path", b"GET /\0 HTTP/1.1\r\n\r\n".to_vec(), REFUSED),
        Case("NUL in a header", get("X: a\0b\r\n"), REFUSED),
        Case("CR in a header", get("X: a\rb\r\n"), REFUSED),
        Case("no colon", get("X\r\n"), REFUSED),
        Case("space before the colon", get("X : a\r\n"), REFUSED),
        Case("a folded header", get("X: a\r\n b\r\n"), REFUSED),
        Case("header of 64 KiB", get(&format!("X: {}\r\n", "x".repeat(64 << 10))), TOO_LARGE),
        Case("name of 64 KiB", get(&format!("{}: x\r\n", "x".repeat(64 << 10))), TOO_LARGE),
        Case("1000 headers", get(&"X: x\r\n".repeat(1000)), TOO_LARGE),
        Case("no version", b"GET /\r\n\r\n".to_vec(), REFUSED),
        Case("another version", b"GET / HTTP/9.9\r\n\r\n".to_vec(), REFUSED),
        Case("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), CLOSED),
        Case("TLS", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n".to_vec(), REFUSED),
        Case("two paths", b"GET / / HTTP/1.1\r\n\r\n".to_vec(), REFUSED),
        Case("zeroes", vec![0; 4096], REFUSED),
    ];
    for size in ["-1", "+5", "0x5", "5 5", "five", "1e3", "\u{663}"] {
        cases.push(Case("length that is no number", sized(size), REFUSED));
    }
    cases
}

#[test]
fn a01_requests_that_are_none_or_too_large() {
    let mut subject = Subject::start("A1");
    let mut wrong = Vec::new();
    subject.settle();
    for Case(name, bytes, right) in a01_cases() {
        let is = answer(&subject, &bytes);
        println!("A1 {name}: {is:?}");
        if !right.contains(&is) {
            wrong.push((name, is, right));
        }
    }
    assert!(wrong.is_empty() || differs("A1"), "{wrong:#?}");
    subject.serves_as_before();
}

/// How long a head and a body may take, and how long a reply may not be read: 5, 10 and 10 s. Another way of being slow
/// is no different for the connection; all go at once.
#[test]
fn a02_clients_that_are_slow_are_dropped_in_time() {
    let mut subject = Subject::start("A2");
    subject.settle();
    let dropped = thread::scope(|scope| {
        let ways: [(&str, &[u8], u64); 4] = [
            ("nothing at all", b"", 5),
            ("a head", b"GET / HTTP/1.1\r\nX: ", 5),
            ("a body", b"PUT /vm HTTP/1.1\r\nContent-Length: 50000\r\n\r\n", 10),
            ("chunks", b"PUT /vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n", 10),
        ];
        let slow: Vec<_> = ways
            .into_iter()
            .map(|(name, head, seconds)| (name, seconds, subject.api().connect(), head))
            .map(|(name, seconds, stream, head)| {
                (name, seconds, scope.spawn(move || lasts(stream, head)))
            })
            .collect();
        let deaf = subject.api().connect();
        let deaf = ("replies unread", 10, scope.spawn(move || fills(deaf)));
        // Everybody else is answered meanwhile.
        let mut most = Duration::ZERO;
        while !slow.iter().all(|(_, _, thread)| thread.is_finished()) {
            let begin = Instant::now();
            assert!(subject.ask("GET", "/", "").0 == 200 || differs("A2"));
            most = most.max(begin.elapsed());
            thread::sleep(Duration::from_millis(20));
        }
        println!("A2: replies to others take {most:?} at most");
        let all = slow.into_iter().chain([deaf]);
        all.map(|(name, seconds, thread)| (name, seconds, thread.join().unwrap()))
            .collect::<Vec<_>>()
    });
    for (name, seconds, lasted) in dropped {
        println!("A2 {name}: dropped after {lasted:?}");
        // Not before its time, and not long after it.
        let is_right = lasted.is_some_and(|lasted| {
            let range = Duration::from_millis(seconds * 900)..Duration::from_secs(seconds + 5);
            range.contains(&lasted)
        });
        assert!(is_right || differs("A2"), "{name}: want {seconds} s: {lasted:?}");
    }
    subject.serves_as_before();
}

/// What another program may take; beyond it, it never drops anybody.
const NEVER: Duration = Duration::from_secs(20);

/// How long a connection lasts that gets a byte now and then.
fn lasts(mut stream: UnixStream, head: &[u8]) -> Option<Duration> {
    let begin = Instant::now();
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    stream.write_all(head).unwrap();
    while begin.elapsed() < NEVER {
        // Whoever sends nothing sends nothing.
        let is_sent = head.is_empty() || stream.write_all(b" ").is_ok();
        let is_over = match stream.read(&mut [0; 4096]) {
            Ok(0) => true,
            Ok(_) => false,
            Err(e) => e.kind() != io::ErrorKind::WouldBlock,
        };
        if is_over || !is_sent {
            return Some(begin.elapsed());
        }
    }
    None
}

/// How long a connection lasts whose replies are not read: until nothing more can be sent because it is closed.
fn fills(mut stream: UnixStream) -> Option<Duration> {
    let request = b"GET /version HTTP/1.1\r\n\r\n".repeat(100);
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let begin = Instant::now();
    while begin.elapsed() < NEVER {
        match stream.write(&request) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return Some(begin.elapsed()),
        }
    }
    None
}

/// Requests in one go, which have one answer each, in their order.
#[test]
fn a03_ten_thousand_requests_at_once_are_answered_in_order() {
    const COUNT: usize = 10_000;
    let mut subject = Subject::start("A3");
    subject.settle();
    let paths = ["/", "/version", "/nope"];
    let mut writer = subject.api().connect();
    let mut reader = BufReader::new(writer.try_clone().unwrap());
    let sender = thread::spawn(move || {
        for n in 0..COUNT {
            let path = paths[n % 3];
            if write!(writer, "GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").is_err() {
                return;
            }
        }
    });
    for n in 0..COUNT {
        let body = Reply::try_read(&mut reader).map(|reply| reply.body);
        let sign = ["\"state\"", "firecracker_version", "fault_message"][n % 3];
        let is_right = body.as_ref().is_ok_and(|body| body.contains(sign));
        if !is_right {
            assert!(differs("A3"), "reply {n}: {body:?}");
            break;
        }
    }
    // Nor does it wait to send what nobody answers.
    let _ = reader.get_ref().shutdown(std::net::Shutdown::Both);
    drop(reader);
    sender.join().unwrap();
    subject.serves_as_before();
}

#[test]
fn a03_client_that_sends_no_more_gets_its_reply() {
    let subject = Subject::start("A3");
    for requests in [1, 2, 50] {
        let mut stream = subject.api().connect();
        stream.write_all(&b"GET / HTTP/1.1\r\n\r\n".repeat(requests)).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut all = String::new();
        let end = stream.read_to_string(&mut all);
        let replies = all.matches("HTTP/1.1 200").count();
        println!("A3: {replies} replies to {requests} requests, {end:?}");
        assert!(replies == requests && end.is_ok() || differs("A3"), "{all}");
    }
    subject.serves_as_before();
}

/// Connections that are closed at once, in the middle of a request, or of its reply.
#[test]
fn a03_connections_that_come_and_go_leave_nothing() {
    const COUNT: usize = 20_000;
    let mut subject = Subject::start("A3");
    subject.settle();
    let begin = Instant::now();
    let what: [&[u8]; 4] = [
        b"",
        b"PUT /vm HTTP/1.1\r\nContent-Le",
        b"GET /openapi.json HTTP/1.1\r\n\r\n",
        b"\xff\xfe",
    ];
    for n in 0..COUNT {
        let mut stream = UnixStream::connect(subject.socket()).unwrap();
        // It may be closed by now.
        let _ = stream.write_all(what[n % 4]);
    }
    println!("A3: {COUNT} connections in {:?}", begin.elapsed());
    subject.serves_as_before();
}
