//! How long an answer of the API takes.
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::attack::{self, ATTACKS};
use crate::report::{Report, Samples, Target};
use crate::vmm::{Running, husk};
use crate::{Bench, Result, guest};

const CALLS: usize = 2000;
const PAUSES: usize = 200;
const START: &str = r#"{"action_type": "InstanceStart"}"#;

const ATTACKED_CALLS: usize = 500;
const ATTACKED_P99_MS: f64 = 100.0;
/// Buffers of as many connections as there may be.
const ATTACKED_GROWTH_KIB: f64 = 8192.0;

/// Method, path and body.
type Call<'a> = (&'a str, &'a str, &'a str);

/// What can be set before the start, besides what needs files.
const BEFORE: &[Call<'_>] = &[
    ("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128}"#),
    ("PATCH", "/machine-config", r#"{"smt": false}"#),
    ("PUT", "/entropy", "{}"),
    ("PUT", "/serial", r#"{"to": "Stdio"}"#),
    ("PUT", "/logger", r#"{"level": "Warning"}"#),
    ("PUT", "/cpu-config", "{}"),
    ("PUT", "/mmds", r#"{"latest": {"meta-data": {"ami-id": "ami-12345678"}}}"#),
    ("PATCH", "/mmds", r#"{"latest": {"meta-data": {"ami-id": "ami-87654321"}}}"#),
    ("GET", "/mmds", ""),
    ("PUT", "/balloon", r#"{"amount_mib": 0, "deflate_on_oom": false}"#),
];

const RUNNING: &[Call<'_>] = &[
    ("GET", "/", ""),
    ("GET", "/version", ""),
    ("GET", "/machine-config", ""),
    ("GET", "/vm/config", ""),
    ("GET", "/metrics", ""),
    ("GET", "/balloon", ""),
    ("PATCH", "/balloon", r#"{"amount_mib": 0}"#),
    ("GET", "/openapi.json", ""),
];

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
        Ok(self.ask(method, path, body)?.0)
    }

    /// The same, and the answer.
    pub(crate) fn ask(
        &mut self,
        method: &str,
        path: &str,
        body: &str,
    ) -> Result<(Duration, String)> {
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
        let text = String::from_utf8_lossy(&answer).into_owned();
        match answer.starts_with(b"HTTP/1.1 2") {
            true => Ok((took, text)),
            false => Err(text.into()),
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
    let (boot, drive) = (boot_source(bench)?, drive(bench)?);
    let socket = bench.scratch.join("api.sock");
    let (mut process, mut client) = start(&socket)?;
    let own = [("PUT", "/boot-source", boot.as_str()), ("PUT", "/drives/root", drive.as_str())];
    for call in BEFORE.iter().chain(&own) {
        repeat(&mut client, "before the start", call, report)?;
    }
    client.call("PUT", "/actions", START)?;
    process.await_byte()?;
    let change = ("PATCH", "/drives/root", r#"{"drive_id": "root"}"#);
    for call in RUNNING.iter().chain([&change]) {
        repeat(&mut client, "while a guest runs", call, report)?;
    }
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

/// One call many times, on an open connection.
fn repeat(client: &mut Client, when: &str, call: &Call<'_>, report: &mut Report) -> Result<()> {
    let (method, path, body) = call;
    let times = (0..CALLS).map(|_| client.call(method, path, body)).collect::<Result<Vec<_>>>();
    let times = times.map_err(|e| format!("{method} {path}, {when}: {e}"))?;
    report.add(format!("{method} {path}, {when}"), "us", Samples::micros(&times));
    Ok(())
}

/// The same VM configured and started by five calls and by one, from the first call's first byte to the
/// last call's reply, and to the guest's first byte.
pub(crate) fn configure(bench: &Bench, report: &mut Report) -> Result<()> {
    let (boot, drive) = (boot_source(bench)?, drive(bench)?);
    let machine = BEFORE[0].2;
    let five = [
        ("PUT", "/machine-config", machine),
        ("PUT", "/boot-source", &boot),
        ("PUT", "/drives/root", &drive),
        ("PUT", "/entropy", "{}"),
        ("PUT", "/actions", START),
    ];
    let whole = format!(
        r#"{{"machine-config": {machine}, "boot-source": {boot}, "drives": [{drive}], "entropy": {{}}}}"#
    );
    let ways = [("five calls", &five[..]), ("PUT /vm", &[("PUT", "/vm", whole.as_str())])];
    let mut times = [(); 2].map(|()| (Vec::new(), Vec::new()));
    for _ in 0..bench.runs {
        // In turns: what the host does meanwhile happens to both.
        for ((_, calls), (answered, spoken)) in ways.iter().zip(&mut times) {
            let (mut process, mut client) = start(&bench.scratch.join("configure.sock"))?;
            let begin = Instant::now();
            for (method, path, body) in *calls {
                client.call(method, path, body)?;
            }
            answered.push(begin.elapsed());
            process.await_byte()?;
            spoken.push(begin.elapsed());
            process.kill()?;
            process.reap()?;
        }
    }
    for ((name, _), (answered, spoken)) in ways.iter().zip(&times) {
        report.add(format!("configure and start, {name}"), "ms", Samples::millis(answered));
        let name = format!("the same to the guest's first byte, {name}");
        report.add(name, "ms", Samples::millis(spoken));
    }
    Ok(())
}

/// What a good client sees beside each of the API's enemies and beside all of them, and what they cost.
pub(crate) fn under_attack(bench: &Bench, report: &mut Report) -> Result<()> {
    let socket = bench.scratch.join("attacked.sock");
    let (process, _) = start(&socket)?;
    let before = attack::resident_kib(process.pid())?;
    let each = ATTACKS.chunks(1).map(|attacks| (attacks[0].name, attacks));
    for (name, attacks) in each.chain([("all of these", ATTACKS)]) {
        let times = attack::under(&socket, attacks, || attack::ask(&socket, ATTACKED_CALLS))?;
        let times = Samples::millis(&times);
        let p99 = times.at(99);
        report.add(format!("GET / beside {name}"), "ms", times);
        if attacks.len() == ATTACKS.len() {
            report.add_one("the same, 99 of 100", "ms", p99, Target::AtMost(ATTACKED_P99_MS));
        }
    }
    let grown = attack::resident_kib(process.pid())?.saturating_sub(before);
    let target = Target::AtMost(ATTACKED_GROWTH_KIB);
    report.add_one("memory more than before the attacks", "KiB", grown as f64, target);
    Ok(())
}

/// A husk that waits to be configured, and a connection to it. Its standard output is the guest's.
fn start(socket: &Path) -> Result<(Running, Client)> {
    // A husk that was killed leaves its socket.
    let _ = fs::remove_file(socket);
    let mut command = Command::new(husk());
    command.arg("api").arg("--api-sock").arg(socket).stdin(Stdio::null()).stdout(Stdio::piped());
    let process = Running::start(&mut command)?;
    let patience = Instant::now() + Duration::from_secs(5);
    loop {
        match Client::connect(socket) {
            Ok(client) => return Ok((process, client)),
            Err(e) if Instant::now() > patience => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn boot_source(bench: &Bench) -> Result<String> {
    let kernel = guest::idle(bench)?;
    Ok(format!(r#"{{"kernel_image_path": "{}"}}"#, kernel.display()))
}

fn drive(bench: &Bench) -> Result<String> {
    let path = bench.scratch.join("disk.img");
    fs::File::create(&path)?.set_len(1 << 20)?;
    let path = path.display();
    Ok(format!(r#"{{"drive_id": "root", "path_on_host": "{path}", "is_root_device": true}}"#))
}
