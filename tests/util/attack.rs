//! Clients of the API that nobody wants, and a good one beside them. For tests and for benchmarks: it knows
//! nothing but the socket.
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// One way of being a nuisance.
pub(crate) struct Attack {
    pub(crate) name: &'static str,
    /// Goes on until the flag is set. Whatever the other side does is fine.
    run: fn(&Path, &AtomicBool),
}

/// All of them.
pub(crate) const ATTACKS: &[Attack] = &[
    Attack { name: "1,000 idle connections", run: |path, stop| crowd(path, stop, b"") },
    Attack {
        name: "1,000 half-open requests",
        run: |path, stop| crowd(path, stop, b"PUT /vm HTTP/1.1\r\nContent-Le"),
    },
    Attack { name: "slow bodies", run: slow_bodies },
    Attack { name: "pipelined requests, replies unread", run: pipelines },
    Attack { name: "bodies of 1 GiB", run: huge_bodies },
    Attack { name: "100,000 nested arrays", run: deep_json },
    Attack { name: "no UTF-8", run: noise },
];

const CROWD: usize = 1000;
/// Between a crowd's new connections: they are to take husk's time, not all of the machine's.
const PAUSE: Duration = Duration::from_millis(1);
const GOOD_PAUSE: Duration = Duration::from_millis(5);
const GIB: usize = 1 << 30;
const NESTED: usize = 100_000;

/// Runs `attacks` at once while `measure` does its work.
pub(crate) fn under<T>(path: &Path, attacks: &[Attack], measure: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for attack in attacks {
            scope.spawn(|| (attack.run)(path, &stop));
        }
        // Attackers stop, whatever happens to the good client.
        let _stop = SetAtEnd(&stop);
        measure()
    })
}

struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A good client: `GET /` again and again, each on a new connection, with a pause between them so that
/// attackers get to do their worst. How long each took from the connection on.
pub(crate) fn ask(path: &Path, count: usize) -> io::Result<Vec<Duration>> {
    let ask = |_| {
        thread::sleep(GOOD_PAUSE);
        let begin = Instant::now();
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")?;
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply)?;
        match reply.starts_with(b"HTTP/1.1 200 ") && reply.ends_with(b"}") {
            true => Ok(begin.elapsed()),
            false => Err(io::Error::other(format!("{:?}", String::from_utf8_lossy(&reply)))),
        }
    };
    (0..count).map(ask).collect()
}

/// A process's memory, in KiB.
pub(crate) fn resident_kib(pid: u32) -> io::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("no VmRSS of {pid}")))
}

fn goes_on(stop: &AtomicBool) -> bool {
    !stop.load(Ordering::Relaxed)
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    stream.set_write_timeout(Some(Duration::from_millis(100)))?;
    stream.set_read_timeout(Some(Duration::from_millis(100)))?;
    Ok(stream)
}

/// Many connections that send `head` and no more; as soon as there are all, the oldest is made anew.
fn crowd(path: &Path, stop: &AtomicBool, head: &[u8]) {
    let mut crowd = std::collections::VecDeque::new();
    while goes_on(stop) {
        if let Ok(mut stream) = connect(path) {
            let _ = stream.write_all(head);
            crowd.push_back(stream);
        }
        if crowd.len() > CROWD {
            crowd.pop_front();
            thread::sleep(PAUSE);
        }
    }
}

/// Many bodies at once, a byte at a time each.
fn slow_bodies(path: &Path, stop: &AtomicBool) {
    let mut streams = Vec::new();
    while goes_on(stop) {
        if streams.len() < 100
            && let Ok(mut stream) = connect(path)
        {
            let head = b"PUT /vm HTTP/1.1\r\nContent-Length: 50000\r\n\r\n{";
            let _ = stream.write_all(head);
            streams.push(stream);
        }
        streams.retain_mut(|stream| stream.write_all(b" ").is_ok());
        thread::sleep(PAUSE);
    }
}

/// More requests than there is room for replies, which are not read.
fn pipelines(path: &Path, stop: &AtomicBool) {
    let requests = b"GET /openapi.json HTTP/1.1\r\n\r\n".repeat(1000);
    while goes_on(stop) {
        if let Ok(mut stream) = connect(path) {
            let _ = stream.write_all(&requests);
            let _ = stream.read(&mut [0; 1]);
        }
    }
}

/// Of a length that is told, and of one that is not.
fn huge_bodies(path: &Path, stop: &AtomicBool) {
    let chunk = [b"10000\r\n", &[b' '; 1 << 16][..], b"\r\n"].concat();
    for head in
        [format!("Content-Length: {GIB}"), "Transfer-Encoding: chunked".into()].iter().cycle()
    {
        if !goes_on(stop) {
            return;
        }
        let Ok(mut stream) = connect(path) else { continue };
        let _ = stream.write_all(format!("PUT /vm HTTP/1.1\r\n{head}\r\n\r\n").as_bytes());
        let mut sent = 0;
        while goes_on(stop) && sent < GIB && stream.write_all(&chunk).is_ok() {
            sent += chunk.len();
        }
    }
}

fn deep_json(path: &Path, stop: &AtomicBool) {
    let arrays = "[".repeat(NESTED);
    let objects = r#"{"a":"#.repeat(NESTED / 2);
    let section = format!(r#"{{"drives": {arrays}"#);
    for (target, body) in
        [("/vm", &section), ("/drives/a", &arrays), ("/mmds", &objects)].iter().cycle()
    {
        if !goes_on(stop) {
            return;
        }
        put(path, target, body.as_bytes());
    }
}

fn noise(path: &Path, stop: &AtomicBool) {
    let bytes: Vec<u8> = (0..=255).collect();
    while goes_on(stop) {
        put(path, "/vm", &bytes);
        put(path, "/drives/a", b"{\"drive_id\": \"\xff\xfe\"}");
        for request in [
            &b"GET /\xff\xfe HTTP/1.1\r\n\r\n"[..],
            b"GET / HTTP/1.1\r\nX-\xff: \xfe\r\n\r\n",
            b"GET / HTTP/1.1\r\nX: \xc3\x28\r\n\r\n",
            b"\xff\xfe\xfd\r\n\r\n",
        ] {
            if let Ok(mut stream) = connect(path) {
                let _ = stream.write_all(request);
                let _ = stream.read(&mut [0; 4096]);
            }
        }
    }
}

fn put(path: &Path, target: &str, body: &[u8]) {
    if let Ok(mut stream) = connect(path) {
        let head = format!("PUT {target} HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(body);
        let _ = stream.read(&mut [0; 4096]);
    }
}
