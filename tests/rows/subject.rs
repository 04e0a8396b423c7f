//! The program under attack: husk, by its command line and by its API under the name `firecracker`, or, by its API
//! alone, whatever program `HUSK_HOSTILE_BINARY` names. Of that one the verdicts are printed and nothing is asserted.
use std::ffi::OsStr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::hostile::other;
use crate::util::*;

/// Another program may never answer.
const OTHERS_PATIENCE: Duration = Duration::from_secs(5);
/// A refusal is promised at once; the machine may be busy with other tests.
const REFUSAL_MAX: Duration = Duration::from_secs(1);
/// In KiB, what all refusals together may have taken: what was asked for is never kept.
const GROWTH_MAX_KIB: u64 = 4 << 10;

/// Of a process that serves, what must be the same after an attack.
pub(crate) struct Subject {
    row: &'static str,
    scratch: Scratch,
    vm: TestVm,
    /// What it had open, and KiB of memory, before the first case. The first requests make what the rest use as well.
    before: Option<(Vec<String>, u64)>,
}

/// What must be refused.
pub(crate) struct Bad<'a> {
    pub(crate) name: &'a str,
    /// As `PUT /vm` has it.
    pub(crate) config: Value,
    /// The same by husk's command line, if that can say it.
    pub(crate) husk: Option<Husk>,
    /// The exit code of that.
    pub(crate) code: i32,
    /// What the line and the fault messages name.
    pub(crate) words: &'a [&'a str],
}

/// Whether another program than husk is attacked: it has no command line that is known here. Says so.
pub(crate) fn is_husks_alone(row: &str) -> bool {
    if other().is_none() {
        return false;
    }
    println!("{row}: left out, it is of husk's command line");
    true
}

/// Whether what is not as it should be is another program's, which is told and no failure.
pub(crate) fn differs(row: &str) -> bool {
    if other().is_some() {
        println!("{row}: this is not as husk answers");
    }
    other().is_some()
}

impl Subject {
    /// One that waits for requests. `row` is for verdicts.
    #[track_caller]
    pub(crate) fn start(row: &'static str) -> Self {
        Self::start_with(row, |husk| husk)
    }

    /// The same, with what `prepare` does to it.
    #[track_caller]
    pub(crate) fn start_with(row: &'static str, prepare: impl FnOnce(Husk) -> Husk) -> Self {
        let scratch = Scratch::new();
        // Its log goes where the guest's words go, which it is not to be mixed with.
        let husk = program("--level").arg("Error").option("--api-sock", scratch.path("api.sock"));
        let vm = prepare(husk).start_unheard();
        let subject = Self { row, scratch, vm, before: None };
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(subject.socket()).is_err() {
            assert!(Instant::now() < deadline && subject.vm.is_running(), "it does not listen");
            std::thread::yield_now();
        }
        subject
    }

    pub(crate) fn api(&self) -> Api {
        Api::new(&self.socket())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.scratch.path("api.sock")
    }

    pub(crate) fn vm(&self) -> &TestVm {
        &self.vm
    }

    /// Asks something; how it was answered, in a word and what was said. Husk must answer in time.
    #[track_caller]
    pub(crate) fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let begin = Instant::now();
        let reply = self.api().try_request((method, path, body), OTHERS_PATIENCE);
        let took = begin.elapsed();
        match reply {
            Ok(reply) => {
                let is_slow = took > REFUSAL_MAX && other().is_none();
                assert!(!is_slow, "{method} {path} took {took:?}");
                (reply.status, reply.body)
            }
            Err(e) => {
                assert!(other().is_some(), "{}: {method} {path} {body}: {e}", self.row);
                (0, e.to_string())
            }
        }
    }

    /// Makes the settings of a configuration one by one, then starts; the first refusal.
    #[track_caller]
    pub(crate) fn refusal(&self, config: &Value) -> Option<(u16, String)> {
        for (path, body) in requests(config) {
            let (status, said) = self.ask("PUT", &path, &body);
            if status != 204 {
                return Some((status, said));
            }
        }
        None
    }

    /// Refuses a configuration in every way in which it can be given, by name and at once, and goes on as before.
    #[track_caller]
    pub(crate) fn refuses(&mut self, bad: Bad<'_>) {
        let Bad { name, config, husk, code, words } = bad;
        if other().is_some() {
            let verdict = self.refusal(&config);
            let verdict = verdict.map_or("accepted".into(), |(s, said)| format!("{s} {said}"));
            println!("{} {name}: {}", self.row, verdict.trim_end());
            if !self.vm.is_running() || self.ask("GET", "/", "").0 != 200 {
                println!("{} {name}: and then it does not serve any more", self.row);
            }
            *self = Self::start(self.row);
            return;
        }
        let contains = |text: &str| {
            for word in words {
                assert!(text.contains(word), "{} {name}: want {word:?} in: {text}", self.row);
            }
        };
        if let Some(husk) = husk {
            let line = husk.wait().quickly().refused(code);
            assert!(line.starts_with("husk: "), "{line}");
            contains(&line);
        }
        let (status, said) = self.ask("PUT", "/vm", &config.to_string());
        assert_eq!(status, 400, "{} {name}: {said}", self.row);
        contains(&said);
        let (status, said) = self.refusal(&config).unwrap_or_else(|| panic!("{name} is accepted"));
        assert_eq!(status, 400, "{} {name}: {said}", self.row);
        // Settings by themselves do not say which section they are of, but what is wrong.
        let reason = words.last().expect("a reason");
        assert!(said.contains(reason), "{} {name}: want {reason:?} in: {said}", self.row);
        assert_eq!(self.api().state(), "Not started");
        println!("{} {name}: 400 {}", self.row, said.trim_end());
        if self.before.is_none() {
            self.before = Some(self.size());
        }
    }

    /// Remembers what it has now, which must not become more. The first request makes what the others use as well.
    #[track_caller]
    pub(crate) fn settle(&mut self) {
        self.ask("GET", "/vm/config", "");
        self.ask("PUT", "/boot-source", &json!({"kernel_image_path": "/nope"}).to_string());
        // Another program may be dead by now.
        self.before = other().is_none().then(|| self.size());
    }

    /// It has no more than it had, once connections are closed: another thread does that.
    #[track_caller]
    pub(crate) fn has_no_more(&self) {
        let Some((open, kib)) = &self.before else { return };
        let deadline = Instant::now() + PATIENCE;
        let now = loop {
            let (still, now) = self.size();
            if still.len() <= open.len() {
                break now;
            }
            assert!(Instant::now() < deadline, "{}: {open:?} have become {still:?}", self.row);
            std::thread::yield_now();
        };
        assert!(now <= kib + GROWTH_MAX_KIB, "{}: {kib} KiB have become {now}", self.row);
    }

    /// What it has open, and memory in KiB.
    fn size(&self) -> (Vec<String>, u64) {
        let pid = self.vm.pid();
        (descriptors(pid), resident_kib(pid).unwrap())
    }

    /// Waits for a line of the guest, which another program may not have.
    #[track_caller]
    pub(crate) fn is_ready(&self, sign: &str) -> bool {
        if other().is_none() {
            self.vm.expect(sign);
            return true;
        }
        let line = self.vm.serial.line(sign, Instant::now() + OTHERS_PATIENCE);
        if line.is_err() {
            println!("{}: left out, the guest does not get ready", self.row);
        }
        line.is_ok()
    }

    /// The guest ends, and the program with it, with this exit code.
    #[track_caller]
    pub(crate) fn ends(self, code: i32) {
        let is_over = self.vm.ends_within(OTHERS_PATIENCE);
        if other().is_some() {
            println!("{}: the guest {}", self.row, if is_over { "ends" } else { "goes on" });
            return;
        }
        let end = self.vm.wait().code(code);
        assert!(!end.to_string().contains("panicked"), "{}: {end}", self.row);
    }

    /// Nothing is left of what was attempted: it serves, has no more than it had, and ends as it is told.
    #[track_caller]
    pub(crate) fn serves_as_before(self) {
        let is_alive = self.vm.is_running() && self.ask("GET", "/", "").0 == 200;
        if other().is_some() {
            println!("{}: afterwards it {}", self.row, if is_alive { "serves" } else { "is dead" });
            return;
        }
        assert!(is_alive, "{}: it does not serve any more", self.row);
        self.has_no_more();
        self.vm.signal(Signal::TERM);
        assert!(self.vm.ends_within(PATIENCE), "{}: it does not end", self.row);
        let Self { row, scratch, vm, .. } = self;
        let end = vm.wait().code(143);
        assert!(!end.to_string().contains("panicked"), "{row}: {end}");
        assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0, "{row}: something is left");
    }
}

/// The same file as another user's, whom root may read only by a capability.
pub(crate) fn not_ours(path: PathBuf) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    path
}

/// The program with its only argument so far.
pub(crate) fn program(arg: impl AsRef<OsStr>) -> Husk {
    match other() {
        None => Husk::firecracker([arg]),
        Some(program) => Husk::of(program, [arg]),
    }
}

/// A configuration of `PUT /vm` as the requests that Firecracker has for it, up to the start.
fn requests(config: &Value) -> Vec<(String, String)> {
    let mut requests = Vec::new();
    for (section, value) in config.as_object().expect("a configuration") {
        let id = match section.as_str() {
            "drives" => "drive_id",
            "network-interfaces" => "iface_id",
            "pmem" => "id",
            _ => {
                requests.push((format!("/{section}"), value.to_string()));
                continue;
            }
        };
        for device in value.as_array().expect("devices") {
            let path = format!("/{section}/{}", device[id].as_str().expect("an id"));
            requests.push((path, device.to_string()));
        }
    }
    requests.push(("/actions".into(), json!({"action_type": "InstanceStart"}).to_string()));
    requests
}

/// A configuration with the guest `hello`, and `more` sections.
pub(crate) fn hello(more: Value) -> Value {
    let mut config = json!({"boot-source": {"kernel_image_path": guest("hello")}});
    let sections = config.as_object_mut().expect("sections");
    sections.extend(more.as_object().expect("sections").clone());
    config
}

/// What is wrong with a file by its kind, whatever it is to serve as. Kept: the files are in `scratch`.
pub(crate) fn no_files(scratch: &Scratch) -> Vec<(PathBuf, &'static str)> {
    use std::os::unix::fs::symlink;
    let socket = scratch.path("socket");
    std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let lap = scratch.path("loop");
    symlink(&lap, &lap).unwrap();
    let dangling = scratch.path("dangling");
    symlink(scratch.path("missing"), &dangling).unwrap();
    let to_fifo = scratch.path("to-fifo");
    let fifo = scratch.fifo("fifo");
    symlink(&fifo, &to_fifo).unwrap();
    vec![
        (scratch.path("missing"), "No such file"),
        (scratch.path("missing/too"), "No such file"),
        (dangling, "No such file"),
        (AsRef::<Path>::as_ref(scratch).to_owned(), "directory"),
        (fifo, "FIFO"),
        (to_fifo, "FIFO"),
        (socket, "socket"),
        (lap, "symbolic links"),
        ("/dev/zero".into(), "device"),
        ("/dev/null".into(), "device"),
        // Without a terminal it cannot even be opened.
        ("/dev/tty".into(), "/dev/tty"),
    ]
}
