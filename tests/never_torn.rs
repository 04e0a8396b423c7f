//! A snapshot is there or it is not: whatever ends the one who writes it, whatever the disk says, the one before it
//! can be loaded, or the new one, and the guest goes on.
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use husk::{Image, LoadParams};
use serde_json::{Value, json};

use crate::util::*;

/// A guest that would notice a mixture, in as little RAM as there can be.
fn warm() -> Husk {
    Husk::guest("warm", "pages=256 every=5").memory(8)
}

/// The two forms of a place.
fn forms(scratch: &Scratch) -> [Value; 2] {
    let (state, memory) = (scratch.path("vm.state"), scratch.path("vm.mem"));
    [
        json!({"directory": scratch.path("warm")}),
        json!({"snapshot_path": state, "mem_file_path": memory}),
    ]
}

/// What `husk snapshot` takes for it.
fn verify(place: &Value) -> Husk {
    let husk = Husk::new(["snapshot", "verify"]);
    match place["directory"].as_str() {
        Some(directory) => husk.arg(directory),
        None => husk
            .arg(place["snapshot_path"].as_str().unwrap())
            .arg(place["mem_file_path"].as_str().unwrap()),
    }
}

/// Restores it in a process of its own, in which the guest goes on and finds all of its memory as it left it.
fn restore(place: &Value) {
    let vm = Husk::api().start();
    let mut body = place.clone();
    body["resume_vm"] = true.into();
    vm.api().put("/snapshot/load", body).done();
    assert_goes_on(&vm);
}

/// The guest wrote all of its memory, more than once, and found nothing in it that it had not written.
fn assert_goes_on(vm: &TestVm) {
    let tick = |line: String| line.trim().strip_prefix("tick=").and_then(|n| n.parse::<u64>().ok());
    let one = tick(vm.expect("tick=")).unwrap();
    while tick(vm.expect("=")).expect("no word of a mixture") < one + 2 {}
}

#[test]
fn only_a_snapshot_is_replaced() {
    let scratch = Scratch::new();
    let vm = warm().listening().start();
    vm.expect("tick=");
    let disk = scratch.file("disk", "a disk");
    let good = forms(&scratch)[1].clone();
    vm.api().put("/snapshot/create", &good).done();
    let path = |name: &str| scratch.path(name);
    std::os::unix::fs::symlink(&disk, path("link")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
    fs::create_dir(path("directory")).unwrap();
    scratch.fifo("fifo");
    let two =
        |state: PathBuf, memory: PathBuf| json!({"snapshot_path": state, "mem_file_path": memory});
    let is = |name: &str, what: &str| format!("{} is {what}", path(name).display());
    for (body, fault) in [
        (
            two(disk.clone(), path("m")),
            "snapshot_path: ".to_owned() + &is("disk", "there, and is not a snapshot's state file"),
        ),
        (
            two(path("s"), disk.clone()),
            "mem_file_path: ".to_owned() + &is("disk", "there, and is not the memory"),
        ),
        (
            two(path("s"), path("vm.mem")),
            "mem_file_path: ".to_owned() + &is("vm.mem", "there, and is not the memory"),
        ),
        (two(path("vm.state"), disk.clone()), "mem_file_path: ".to_owned() + &is("disk", "there")),
        (two(path("link"), path("m")), is("link", "a symbolic link")),
        (two(path("fifo"), path("m")), is("fifo", "a FIFO")),
        (two(path("s"), path("socket")), is("socket", "a socket")),
        (two(path("s"), path("directory")), is("directory", "a directory")),
        (two("/dev/zero".into(), path("m")), "/dev/zero is a character device".into()),
        (
            two(path("s"), path("directory/../s")),
            "mem_file_path: it is the file of snapshot_path".into(),
        ),
        (two(path("s"), path("s")), "mem_file_path: it is snapshot_path".into()),
        (two(path("none/s"), path("m")), "none/s: No such file or directory".into()),
        (two(path("disk/s"), path("m")), "disk/s: Not a directory".into()),
        (two("/proc/s".into(), path("m")), "cannot make /proc/s: ".into()),
        (
            json!({"directory": disk}),
            "directory: ".to_owned() + &is("disk", "a regular file, want a directory"),
        ),
        (json!({"directory": path("none/warm")}), "none/warm: No such file".into()),
        (json!({"directory": "/proc/self"}), "cannot make /proc/self/state: ".into()),
        (json!({"directory": path("s"), "mem_file_path": path("m")}), "directory: ".into()),
    ] {
        for is_paused in [false, true] {
            let state = if is_paused { "Paused" } else { "Resumed" };
            vm.api().patch("/vm", json!({ "state": state })).done();
            let said = vm.api().put("/snapshot/create", &body).fault();
            assert!(said.contains(&fault), "{body}: {said}, want {fault}");
            assert_eq!(vm.api().state(), if is_paused { "Paused" } else { "Running" }, "{body}");
        }
    }
    vm.api().patch("/vm", json!({"state": "Resumed"})).done();
    assert_goes_on(&vm);
    assert_eq!(fs::read_to_string(&disk).unwrap(), "a disk");
    let left = names(scratch.as_ref());
    assert_eq!(left, ["directory", "disk", "fifo", "link", "socket", "vm.mem", "vm.state"]);
    restore(&good);
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_snapshot_replaces_the_one_before() {
    let scratch = Scratch::new();
    let vm = warm().listening().start();
    vm.expect("tick=");
    for place in forms(&scratch) {
        if let Some(state) = place["snapshot_path"].as_str() {
            // Some make the files first.
            fs::write(state, "").unwrap();
        }
        let mut ids = Vec::new();
        for sync in [true, false, true] {
            let mut body = place.clone();
            body["sync"] = sync.into();
            vm.api().put("/snapshot/create", body).done();
            verify(&place).wait().code(0);
            ids.push(id_of(&place));
        }
        ids.dedup();
        assert_eq!(ids.len(), 3);
        restore(&place);
        let directory = place["directory"].as_str().map(Path::new);
        match directory {
            Some(directory) => {
                assert_eq!(names(directory), [format!("memory-{}", ids[2]), "state".into()])
            }
            None => assert_eq!(names(scratch.as_ref()), ["vm.mem", "vm.state", "warm"]),
        }
    }
    assert_goes_on(&vm);
}

fn id_of(place: &Value) -> String {
    let path = place["directory"].as_str().or(place["snapshot_path"].as_str()).unwrap();
    let end = Husk::new(["snapshot", "inspect", "--json", path]).wait().code(0);
    let found: Value = serde_json::from_str(&end.output).unwrap();
    found["id"].as_str().unwrap().to_owned()
}

/// Opens it as a load does, and reads all of it; its id.
fn sound(place: &Value) -> Result<String, String> {
    let params: LoadParams = serde_json::from_value(place.clone()).unwrap();
    let image = Image::load(&params).map_err(|e| e.to_string())?;
    image.verify().map_err(|e| e.to_string())?;
    Ok(image.id().to_owned())
}

/// A simple generator of numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// In all.
const KILLS: u32 = 1000;
/// At a time.
const KILLERS: u32 = 4;

#[test]
fn killed_at_any_instant_it_leaves_the_old_or_the_new() {
    let outcomes = [const { AtomicU32::new(0) }; 2];
    std::thread::scope(|scope| {
        for killer in 0..KILLERS {
            let outcomes = &outcomes;
            scope.spawn(move || {
                let scratch = Scratch::new();
                let base = scratch.path("base");
                // Beside the places, where what is left behind is counted.
                let outside = Scratch::new();
                let disk = outside.sparse("disk", 64 << 10);
                let overlay = format!("{},overlay", disk.display());
                let vm = warm().option("--disk", overlay).listening().start();
                vm.expect("tick=");
                vm.api().put("/snapshot/create", json!({ "directory": base })).done();
                let place = forms(&scratch)[killer as usize % 2].clone();
                let kinds = kinds(&place);
                let mut longest = Vec::new();
                for kind in &kinds {
                    let start = Instant::now();
                    vm.api().put("/snapshot/create", kind).done();
                    longest.push(start.elapsed());
                }
                drop(vm);
                let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ u64::from(killer + 1) << 32);
                let mut before = sound(&place).unwrap();
                for n in 0..(KILLS / KILLERS) as usize {
                    let kind = n % kinds.len();
                    // A VM that has just been restored takes longer.
                    kill_once(&base, &kinds[kind], &mut random, 2 * longest[kind]);
                    let after = sound(&place).unwrap_or_else(|e| panic!("torn: {e}"));
                    outcomes[usize::from(after != before)].fetch_add(1, Ordering::Relaxed);
                    before = after;
                }
                fs::remove_dir_all(&base).unwrap();
                clean_up(&scratch, &place);
            });
        }
    });
    let [old, new] = outcomes.map(AtomicU32::into_inner);
    println!("old={old} new={new}");
    // Or the instants were none of those that matter.
    assert!(old > KILLS / 20 && new > KILLS / 20, "{old} old, {new} new");
}

/// Snapshots of all kinds that can be there: complete ones and those of what has changed, compressed or not.
fn kinds(place: &Value) -> Vec<Value> {
    let all = [("Full", "none"), ("Full", "lz4"), ("Diff", "none"), ("Diff", "lz4")];
    let with = |(kind, compression): (&str, &str)| {
        let mut body = place.clone();
        (body["snapshot_type"], body["compression"]) = (kind.into(), compression.into());
        body
    };
    // Two files are for others to merge, who cannot read what is compressed.
    let is_possible =
        |body: &(&str, &str)| *body != ("Diff", "lz4") || place["directory"].is_string();
    all.into_iter().filter(is_possible).map(with).collect()
}

/// Kills who writes a snapshot over another. It was restored, which takes less time than a start.
fn kill_once(base: &Path, place: &Value, random: &mut Random, longest: Duration) {
    let vm = Husk::new(["restore"]).arg(base).listening().start();
    let api = vm.api();
    let asked = std::thread::spawn({
        let (mut stream, body) = (api.connect(), place.to_string());
        let head = "PUT /snapshot/create HTTP/1.1\r\nHost: localhost\r\nContent-Length:";
        move || write!(stream, "{head} {}\r\n\r\n{body}", body.len()).map(|()| stream)
    });
    let limit = u64::try_from(longest.as_micros()).unwrap();
    std::thread::sleep(Duration::from_micros(random.below(limit)));
    vm.signal(Signal::KILL);
    assert_eq!(vm.wait().signal(), Some(9));
    drop(asked.join().unwrap());
}

/// What the killed ones have left behind is gone with the next snapshot.
fn clean_up(scratch: &Scratch, place: &Value) {
    let vm = warm().listening().start();
    vm.api().put("/snapshot/create", place).done();
    let left = match place["directory"].as_str() {
        Some(directory) => names(Path::new(directory)).len(),
        None => names(scratch.as_ref()).len(),
    };
    assert_eq!(left, 2, "{:?}", names(scratch.as_ref()));
    sound(place).unwrap();
    restore(place);
}

/// The disk is full after so many bytes, for every number of them.
#[test]
fn a_full_disk_leaves_the_old_and_the_guest() {
    let scratch = Scratch::new();
    let mounted = scratch.path("mounted");
    fs::create_dir(&mounted).unwrap();
    let mount = format!("mount -t tmpfs -o size=12m tmpfs {}", mounted.display());
    let vm = warm().after(&mount).listening().start();
    vm.expect("tick=");
    let seen = PathBuf::from(format!("/proc/{}/root{}", vm.pid(), mounted.display()));
    for form in 0..2 {
        let form = |root: &Path| match form {
            0 => json!({"directory": root.join("warm")}),
            _ => {
                json!({"snapshot_path": root.join("vm.state"), "mem_file_path": root.join("vm.mem")})
            }
        };
        let (place, seen_place) = (form(&mounted), form(&seen));
        vm.api().put("/snapshot/create", &place).done();
        let old = sound(&seen_place).unwrap();
        let before = names(&seen);
        let filler = File::create(seen.join("filler")).unwrap();
        let (mut refused, mut free_kib) = (0, 0);
        loop {
            filler.set_len(0).unwrap();
            let host = rustix::fs::statvfs(&seen).unwrap();
            let len = host.f_bavail * host.f_bsize - (free_kib << 10);
            rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, len).unwrap();
            let reply = vm.api().put("/snapshot/create", &place);
            if reply.status == 204 {
                break;
            }
            let fault = reply.fault();
            assert!(fault.contains("No space left on device"), "{free_kib} KiB: {fault}");
            assert_eq!(sound(&seen_place).as_ref(), Ok(&old), "{free_kib} KiB");
            assert_eq!(vm.api().state(), "Running");
            let left = names(&seen).into_iter().filter(|name| name != "filler");
            assert!(left.eq(before.iter().cloned()), "{free_kib} KiB: {:?}", names(&seen));
            (refused, free_kib) = (refused + 1, free_kib + 12);
        }
        assert!(refused > 20, "{refused} refused, then {free_kib} KiB are enough");
        assert_ne!(sound(&seen_place).unwrap(), old);
        fs::remove_file(seen.join("filler")).unwrap();
    }
    assert_goes_on(&vm);
}

/// Follows a process, and does to it what `inject` says.
pub(crate) struct Strace {
    child: Child,
    log: PathBuf,
}

impl Strace {
    pub(crate) fn attach(vm: &TestVm, scratch: &Scratch, call: &str, inject: &str) -> Self {
        Self::attach_to(vm, scratch, None, call, inject)
    }

    /// The same for calls on one file, if it is one.
    pub(crate) fn attach_to(
        vm: &TestVm,
        scratch: &Scratch,
        path: Option<&str>,
        call: &str,
        inject: &str,
    ) -> Self {
        let log = scratch.path("strace");
        let mut child = Command::new("strace")
            .args(path.iter().flat_map(|path| ["-P", path]))
            .args(["-f", "-o", log.to_str().unwrap(), "-e", &format!("trace={call}")])
            .args(["-e", &format!("inject={call}:{inject}"), "-p", &vm.pid().to_string()])
            .stderr(Stdio::piped())
            .spawn()
            .expect("strace, of the package strace");
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        errors.read_line(&mut line).unwrap();
        assert!(line.contains("attached"), "{line}");
        // It must not wait for a reader.
        std::thread::spawn(move || std::io::copy(&mut errors, &mut std::io::sink()));
        Self { child, log }
    }

    /// Has the process stand still, and keeps it from being gone when it ends: nobody can wait for it until this is
    /// killed.
    fn hold(process: rustix::process::Pid, scratch: &Scratch) -> Self {
        let log = scratch.path("strace");
        let mut child = Command::new("strace")
            .args(["-o", log.to_str().unwrap(), "-e", "trace=none", "-p", &process.to_string()])
            .stderr(Stdio::piped())
            .spawn()
            .expect("strace, of the package strace");
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("attached"), "{line}");
        let tracer = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(tracer, Signal::STOP).unwrap();
        let stat = format!("/proc/{tracer}/stat");
        crate::fork::wait_until(|| fs::read_to_string(&stat).unwrap().contains(") T "));
        Self { child, log }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Lets go of the process; whether something was done to it.
    pub(crate) fn detach(mut self) -> bool {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, Signal::TERM).unwrap();
        self.child.wait().unwrap();
        let log = fs::read_to_string(&self.log).unwrap();
        log.contains("INJECTED") || log.contains("DELAYED") || log.contains("killed by SIGKILL")
    }
}

/// Each call to the host fails in its turn, in every process and thread that makes it.
#[test]
fn a_failing_disk_leaves_one_of_both_and_the_guest() {
    let scratch = Scratch::new();
    let vm = warm().listening().start();
    vm.expect("tick=");
    let mut refused = 0;
    for place in forms(&scratch) {
        vm.api().put("/snapshot/create", &place).done();
        for (call, error) in [
            ("openat", "EIO"),
            ("ftruncate", "EIO"),
            ("pwrite64", "EIO"),
            ("pwrite64", "EDQUOT"),
            ("pread64", "EIO"),
            ("fsync", "EIO"),
            ("linkat", "EROFS"),
            ("rename", "EIO"),
            ("flock", "ENOLCK"),
            ("getdents64", "EIO"),
            ("pipe2", "EMFILE"),
            ("clone", "EAGAIN"),
            ("clone3", "EAGAIN"),
            ("prctl", "EPERM"),
        ] {
            for when in 1.. {
                let what = format!("{call} number {when}: {error}");
                let before = sound(&place).unwrap();
                let strace =
                    Strace::attach(&vm, &scratch, call, &format!("error={error}:when={when}"));
                let reply = vm.api().put("/snapshot/create", &place);
                if !strace.detach() {
                    reply.done();
                    break;
                }
                let after = sound(&place).unwrap_or_else(|e| panic!("{what}: torn: {e}"));
                match reply.status {
                    204 => assert_ne!(after, before, "{what}"),
                    _ => drop((reply.fault(), refused += 1)),
                }
                assert_eq!(vm.api().state(), "Running", "{what}");
                let directory = place["directory"].as_str().map_or(scratch.as_ref(), Path::new);
                let left = names(directory);
                assert!(!left.iter().any(|name| name.ends_with(".tmp")), "{what}: {left:?}");
            }
        }
        vm.api().put("/snapshot/create", &place).done();
        match place["directory"].as_str() {
            Some(directory) => assert_eq!(names(Path::new(directory)).len(), 2),
            None => assert_eq!(names(scratch.as_ref()), ["strace", "vm.mem", "vm.state", "warm"]),
        }
        restore(&place);
    }
    assert!(refused > 20, "only {refused} were refused");
    assert_goes_on(&vm);
}

#[test]
fn a_directory_that_is_not_safe_is_not_left() {
    let scratch = Scratch::new();
    let vm = warm().listening().start();
    vm.expect("tick=");
    let body = json!({"directory": scratch.path("warm")});
    let strace = Strace::attach(&vm, &scratch, "fsync", "error=EIO:when=1");
    let fault = vm.api().put("/snapshot/create", &body).fault();
    assert!(strace.detach() && fault.contains("cannot sync the directory"), "{fault}");
    assert_eq!(names(scratch.as_ref()), ["strace"]);
}

#[test]
fn what_is_called_off_is_gone_before_its_copier_is() {
    let scratch = Scratch::new();
    let vm = warm().listening().start();
    vm.expect("tick=");
    let body = json!({"directory": scratch.path("warm")});
    // In the process that copies.
    let strace = Strace::attach(&vm, &scratch, "pwrite64", "delay_enter=1000000");
    let asked = std::thread::spawn({
        let (api, body) = (vm.api(), body.clone());
        move || api.put("/snapshot/create", body)
    });
    crate::fork::wait_until(|| vm.copier().is_some());
    let copier = vm.copier().unwrap();
    // At the call, where it waits: before, strace may still be about to take it on, and takes the signal for its own.
    let call = format!("/proc/{copier}/syscall");
    let write = format!("{} ", libc::SYS_pwrite64);
    crate::fork::wait_until(|| fs::read_to_string(&call).unwrap().starts_with(&write));
    rustix::process::kill_process(copier, Signal::STOP).unwrap();
    strace.detach();
    let tracer = Strace::hold(copier, &scratch);
    vm.api().act("Kill").done();
    let fault = asked.join().unwrap().fault();
    assert!(fault.contains("the microVM ended"), "{fault}");
    // Whoever reads what husk says sees its end when the last process has ended that could say something.
    crate::fork::wait_until(|| !vm.is_running());
    tracer.kill();
    vm.wait().code(0);
    assert_eq!(names(scratch.as_ref()), ["strace"]);
}

/// The calls that write to files and directories, and how a disk refuses them.
const WRITES: [&str; 5] = ["pwrite64", "ftruncate", "fsync", "linkat", "rename"];
const REFUSALS: [(&str, &str); 2] =
    [("EIO", "Input/output error"), ("ENOSPC", "No space left on device")];

/// A VM that is saved over and over, to a place that has a good snapshot already. It is paused, because strace stops
/// vCPUs that run at each of their exits.
struct Saved {
    scratch: Scratch,
    vm: TestVm,
    body: Value,
    /// The last that went well.
    id: String,
    rounds: u32,
    _outside: Scratch,
}

impl Saved {
    fn new(kind: &str, compression: &str, form: usize) -> Self {
        let scratch = Scratch::new();
        let outside = Scratch::new();
        let disk = outside.sparse("disk", 64 << 10);
        let husk = Husk::guest("steps", "pages=32").memory(2);
        let husk = husk.option("--disk", format!("{},overlay", disk.display()));
        let vm = husk.listening().typing().start();
        vm.expect("ready=1");
        let mut body = forms(&scratch)[form].clone();
        (body["snapshot_type"], body["compression"]) = (kind.into(), compression.into());
        let mut saved = Self { scratch, vm, body, id: String::new(), rounds: 0, _outside: outside };
        saved.change();
        saved.vm.api().put("/snapshot/create", &saved.body).done();
        saved.id = sound(&saved.place()).unwrap();
        saved.change();
        saved
    }

    fn place(&self) -> Value {
        let is_of_place =
            |(key, _): &(String, Value)| !["snapshot_type", "compression"].contains(&&**key);
        self.body.as_object().unwrap().clone().into_iter().filter(is_of_place).collect()
    }

    /// Writes to memory and to the disk, and has another snapshot for the next to go over.
    fn change(&mut self) {
        self.rounds += 1;
        self.set("Resumed");
        for (what, answer) in [("c", "count"), ("w", "wrote")] {
            self.vm.type_in(what);
            self.vm.expect(&format!("{answer}={}", self.rounds));
        }
        self.set("Paused");
        if self.body["snapshot_type"] == "Diff" {
            let base = self.scratch.path(&format!("base{}", self.rounds));
            self.vm.api().put("/snapshot/create", json!({ "directory": base })).done();
            self.set("Resumed");
            self.vm.type_in("b");
            self.vm.expect("disk=");
            self.set("Paused");
        }
    }

    fn set(&self, state: &str) {
        self.vm.api().patch("/vm", json!({ "state": state })).done();
    }

    /// Fails the call `when` in each thread and process that makes so many. False if none did.
    fn fail(&mut self, call: &str, (error, words): (&str, &str), when: u32) -> bool {
        let what = format!("{}: {call} number {when}: {error}", self.body);
        let inject = format!("error={error}:when={when}");
        let strace = Strace::attach(&self.vm, &self.scratch, call, &inject);
        let reply = self.vm.api().put("/snapshot/create", &self.body);
        let was_injected = strace.detach();
        let after = sound(&self.place()).unwrap_or_else(|e| panic!("{what}: torn: {e}"));
        match reply.status {
            204 => assert_ne!(after, self.id, "{what}"),
            _ => {
                let fault = reply.fault();
                assert!(was_injected && fault.contains(words), "{what}: {fault}");
            }
        }
        assert_eq!(self.vm.api().state(), "Paused", "{what}");
        let directory = self.body["directory"].as_str().map_or(self.scratch.as_ref(), Path::new);
        let left = names(directory);
        assert!(!left.iter().any(|name| name.ends_with(".tmp")), "{what}: {left:?}");
        if after != self.id {
            self.id = after;
            self.change();
        }
        was_injected
    }

    /// What failed has lost nothing.
    fn end(self) {
        self.vm.api().put("/snapshot/create", &self.body).done();
        let vm = Husk::api().typing().start();
        let mut body = self.place();
        body["resume_vm"] = true.into();
        vm.api().put("/snapshot/load", body).done();
        for (what, answer) in
            [("s", format!("second={}", self.rounds)), ("c", format!("count={}", self.rounds + 1))]
        {
            vm.type_in(what);
            vm.expect(&answer);
        }
    }
}

#[test]
fn every_write_that_fails_leaves_one_of_both_and_the_guest() {
    let kinds = [
        ("Full", "none", 0),
        ("Full", "none", 1),
        ("Full", "lz4", 0),
        ("Diff", "none", 0),
        ("Diff", "lz4", 0),
    ];
    let failed = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for (kind, compression, form) in kinds {
            let failed = &failed;
            scope.spawn(move || {
                let begun = Instant::now();
                let mut saved = Saved::new(kind, compression, form);
                for call in WRITES {
                    for refusal in REFUSALS {
                        let count =
                            (1..).take_while(|when| saved.fail(call, refusal, *when)).count();
                        assert!(count > 0, "{kind} {compression}: nobody calls {call}");
                        failed.fetch_add(count as u32, Ordering::Relaxed);
                    }
                }
                saved.end();
                println!("{kind} {compression} {form}: {:?}", begun.elapsed());
            });
        }
    });
    println!("{} calls failed", failed.into_inner());
}

/// The same of a merge in the place of another snapshot.
#[test]
fn every_write_of_a_merge_that_fails_leaves_one_of_both() {
    let saved = Saved::new("Diff", "none", 0);
    saved.vm.api().put("/snapshot/create", &saved.body).done();
    let scratch = Scratch::new();
    let paths = ["other", "output", "strace"].map(|name| scratch.path(name));
    let [other, output, log] = paths.each_ref().map(|path| path.to_str().unwrap());
    let place = saved.place();
    let source = place["directory"].as_str().unwrap();
    let husk = [env!("CARGO_BIN_EXE_husk"), "snapshot", "merge"];
    let run = |words: &[&str]| {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).output().expect("strace, of the package strace")
    };
    let base = saved.scratch.path(&format!("base{}", saved.rounds));
    let made = run(&[&husk[..], &[base.to_str().unwrap(), "-o", other]].concat());
    assert!(made.status.success(), "{made:?}");
    let put_back = || {
        let _ = fs::remove_dir_all(output);
        fs::create_dir(output).unwrap();
        for name in names(Path::new(other)) {
            fs::copy(Path::new(other).join(&name), Path::new(output).join(&name)).unwrap();
        }
    };
    let target = json!({ "directory": output });
    put_back();
    let (old, new) = (sound(&target).unwrap(), sound(&place).unwrap());
    let before = names(Path::new(output));
    for compression in ["none", "lz4"] {
        for call in WRITES {
            for (when, (error, words)) in (1..).zip(REFUSALS.iter().cycle()) {
                let what = format!("{compression}: {call} number {when}: {error}");
                let trace = format!("trace={call}");
                let inject = format!("inject={call}:error={error}:when={when}");
                let strace = ["strace", "-f", "--seccomp-bpf", "-e", &trace, "-e", &inject];
                let merge = [source, "-o", output, "--compression", compression];
                let end = run(&[&strace[..], &["-o", log], &husk, &merge].concat());
                let was_injected = fs::read_to_string(log).unwrap().contains("INJECTED");
                let said = String::from_utf8_lossy(&end.stderr);
                let is = sound(&target).unwrap_or_else(|e| panic!("{what}: torn: {e}"));
                if is == new {
                    put_back();
                } else {
                    assert_eq!((&is, &names(Path::new(output))), (&old, &before), "{what}");
                    assert!(!end.status.success(), "{what}: it says that it has done it");
                }
                if !was_injected {
                    assert!(end.status.success() && when > 1, "{what}: {said}");
                    break;
                }
                assert!(end.status.success() || said.contains(words), "{what}: {said}");
            }
            assert_eq!(sound(&place).as_ref(), Ok(&new), "{call}: the source");
        }
    }
    saved.end();
}

/// Flips each bit of a state file, on as many threads as there are processors.
fn every_bit_of_the_state(directory: &Path, memory: &Path) {
    let good = fs::read(directory.join("state")).unwrap();
    let threads = std::thread::available_parallelism().unwrap().get();
    let flipped = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for share in 0..threads {
            let (good, flipped) = (&good, &flipped);
            scope.spawn(move || {
                let scratch = Scratch::new();
                fs::copy(memory, scratch.path(memory.file_name().unwrap().to_str().unwrap()))
                    .unwrap();
                fs::write(scratch.path("state"), good).unwrap();
                Image::open(scratch.as_ref()).expect("a copy");
                let state = File::options().write(true).open(scratch.path("state")).unwrap();
                for at in (share..good.len()).step_by(threads) {
                    for bit in 0..8 {
                        state.write_all_at(&[good[at] ^ 1 << bit], at as u64).unwrap();
                        let opened = Image::open(scratch.as_ref());
                        assert!(opened.is_err(), "bit {bit} of byte {at} of the state");
                        flipped.fetch_add(1, Ordering::Relaxed);
                    }
                    state.write_all_at(&[good[at]], at as u64).unwrap();
                }
                Image::open(scratch.as_ref()).expect("the copy again");
            });
        }
    });
    assert_eq!(flipped.into_inner() as usize, good.len() * 8);
}

/// What a load does not find, a reading of all of it does.
#[test]
fn every_damage_is_found() {
    let scratch = Scratch::new();
    let vm = Husk::guest("warm", "pages=16").memory(4).listening().start();
    vm.expect("tick=");
    let [place, other] = forms(&scratch);
    vm.api().put("/snapshot/create", &place).done();
    vm.api().put("/snapshot/create", &other).done();
    drop(vm);
    let directory = scratch.path("warm");
    let state = directory.join("state");
    let memory =
        directory.join(names(&directory).iter().find(|name| name.starts_with("memory-")).unwrap());
    sound(&place).unwrap();

    every_bit_of_the_state(&directory, &memory);
    let good = fs::read(&state).unwrap();
    let word = |at: usize| u64::from_le_bytes(good[at..at + 8].try_into().unwrap()) as usize;
    let (json, extents) = (64 + word(16), word(24));
    assert_eq!(good.len(), json + 40 * extents);
    let boundaries = (0..=64).chain((64..json).step_by(512)).chain((json..good.len()).step_by(8));
    for len in boundaries {
        fs::write(&state, &good[..len]).unwrap();
        assert!(Image::open(&directory).is_err(), "{len} bytes of the state");
    }
    // The state of another one.
    fs::copy(other["snapshot_path"].as_str().unwrap(), &state).unwrap();
    let said = verify(&place).wait().code(3).errors;
    assert!(said.contains("its memory file is elsewhere"), "{said}");
    fs::write(&state, &good).unwrap();

    let file = File::options().read(true).write(true).open(&memory).unwrap();
    let len = file.metadata().unwrap().len();
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for _ in 0..1000 {
        let (at, bit) = (random.below(len), random.below(8));
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
        let found = sound(&place).expect_err("a bit of the memory");
        assert!(
            found.contains("checksum: ") || found.contains("zeros: ") || found.contains("id: "),
            "{found}"
        );
        file.write_all_at(&byte, at).unwrap();
    }
    sound(&place).unwrap();
    for cut in (4096..=len).step_by(4096) {
        file.set_len(len - cut).unwrap();
        let found = Image::open(&directory).expect_err("memory that is too short").to_string();
        assert!(found.contains("length: "), "{found}");
    }
    drop(file);
    // The memory of another one, and none.
    fs::copy(other["mem_file_path"].as_str().unwrap(), &memory).unwrap();
    let said = verify(&place).wait().refused(7);
    assert!(said.contains("id: it belongs to snapshot"), "{said}");
    fs::remove_file(&memory).unwrap();
    let said = verify(&place).wait().refused(7);
    assert!(said.contains("the snapshot is incomplete"), "{said}");
}

/// A limit on the size of files, for every one at which some of a snapshot is there: SIGXFSZ must end nobody.
#[test]
fn a_limit_on_files_leaves_the_old_and_the_guest() {
    let scratch = Scratch::new();
    let vm = warm().listening().start();
    vm.expect("tick=");
    let pid = rustix::process::Pid::from_raw(vm.pid().cast_signed());
    let limit = |current| {
        let limit = rustix::process::Rlimit { current, maximum: None };
        rustix::process::prlimit(pid, rustix::process::Resource::Fsize, limit).unwrap();
    };
    for place in forms(&scratch) {
        for compression in ["none", "lz4", "zstd"] {
            let mut body = place.clone();
            body["compression"] = compression.into();
            vm.api().put("/snapshot/create", &body).done();
            let old = sound(&place).unwrap();
            let directory = place["directory"].as_str().map_or(scratch.as_ref(), Path::new);
            let before = names(directory);
            let (mut refused, mut kib) = (0, 0);
            loop {
                limit(Some(kib << 10));
                let reply = vm.api().put("/snapshot/create", &body);
                limit(None);
                if reply.status == 204 {
                    break;
                }
                let fault = reply.fault();
                assert!(fault.contains("File too large"), "{compression}, {kib} KiB: {fault}");
                assert_eq!(sound(&place).as_ref(), Ok(&old), "{compression}, {kib} KiB");
                assert_eq!(vm.api().state(), "Running");
                assert_eq!(names(directory), before, "{compression}, {kib} KiB");
                (refused, kib) = (refused + 1, kib + 1 + kib / 4);
            }
            assert!(refused > 2, "{compression}: {refused} refused, then {kib} KiB are enough");
            assert_ne!(sound(&place).unwrap(), old);
        }
        restore(&place);
    }
    assert_goes_on(&vm);
}

/// The process that copies dies of somebody else: whoever asked is told, and nothing else is different.
#[test]
fn a_copier_that_is_killed_leaves_the_old_and_the_guest() {
    let scratch = Scratch::new();
    let vm = warm().listening().start();
    vm.expect("tick=");
    for (place, signal) in forms(&scratch).into_iter().zip([Signal::KILL, Signal::BUS]) {
        vm.api().put("/snapshot/create", &place).done();
        let old = sound(&place).unwrap();
        let directory = place["directory"].as_str().map_or(scratch.as_ref(), Path::new);
        let before = names(directory);
        // Each of its writes takes long enough to be found at it.
        let strace = Strace::attach(&vm, &scratch, "pwrite64", "delay_enter=100000");
        let asked = std::thread::spawn({
            let (api, place) = (vm.api(), place.clone());
            move || api.put("/snapshot/create", place)
        });
        let copier = loop {
            let copier = vm.copier();
            assert!(!asked.is_finished(), "the snapshot is there, and nobody copied");
            if let Some(copier) = copier {
                break copier;
            }
            std::thread::yield_now();
        };
        rustix::process::kill_process(copier, signal).unwrap();
        let fault = asked.join().unwrap().fault();
        assert!(fault.contains("the process that copies memory ended"), "{fault}");
        strace.detach();
        assert_eq!(sound(&place), Ok(old));
        assert_eq!(vm.api().state(), "Running");
        let left = names(directory).into_iter().filter(|name| name != "strace");
        assert!(left.eq(before.into_iter().filter(|name| name != "strace")), "{directory:?}");
        restore(&place);
    }
    assert_goes_on(&vm);
    vm.api().act("Kill").done();
    let end = vm.wait().code(0);
    assert!(!end.errors.contains("crashed"), "{}", end.errors);
}
