//! Forks: children that go on from where their parent is, each with memory of its own; what they are refused; who
//! outlives whom.
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use husk::{
    Compression, Image, Overrides, Payload, Refusal, SerialConfig, SerialTo, SnapshotParams, Vm,
    VmConfig,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, pidfd_open, pidfd_send_signal, prlimit,
};
use rustix::time::Timespec;
use serde_json::{Value, json};

use crate::never_torn::Strace;
use crate::util::*;

/// 16 MiB for the guest `steps`, which does what it is told.
fn steps() -> Husk {
    Husk::guest("steps", "pages=64").memory(16).listening().typing()
}

/// The same, whose children are made at once.
fn forkable() -> Husk {
    steps().arg("--forkable")
}

/// Tells the guest of the parent `what`; what it says of `key`.
#[track_caller]
fn tell(vm: &TestVm, what: &str, key: &str) -> String {
    vm.type_in(what);
    let line = vm.expect(&format!("{key}="));
    line.trim_end().split_once('=').unwrap().1.to_owned()
}

/// One whose guest waits, and does nothing.
fn idle() -> TestVm {
    let vm = Husk::guest("hello", "how=hlt").memory(16).listening().arg("--forkable").start();
    vm.expect("how=hlt");
    vm
}

/// A parent that has counted to 2.
fn parent(husk: Husk) -> TestVm {
    let vm = husk.start();
    vm.expect("ready=1");
    vm.type_in("cc");
    vm.expect("count=2");
    vm
}

/// A child, ended with the test.
pub(crate) struct Child {
    pid: u32,
    pidfd: std::os::fd::OwnedFd,
    pub(crate) api: Api,
    socket: PathBuf,
    serial: Option<BufReader<UnixStream>>,
}

impl Child {
    fn new(told: &Value) -> Self {
        let pid = told["pid"].as_u64().unwrap() as u32;
        let pidfd =
            pidfd_open(Pid::from_raw(pid.cast_signed()).unwrap(), PidfdFlags::empty()).unwrap();
        let socket = PathBuf::from(told["api_sock"].as_str().unwrap());
        let serial = told["serial_path"].as_str().map(|path| {
            let stream = UnixStream::connect(path).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            BufReader::new(stream)
        });
        Self { pid, pidfd, api: Api::new(&socket), socket, serial }
    }

    /// Tells its guest `what`; what it says of `key`.
    #[track_caller]
    pub(crate) fn tell(&mut self, what: &str, key: &str) -> String {
        let serial = self.serial.as_mut().expect("a child with a serial port");
        serial.get_mut().write_all(what.as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            assert_ne!(serial.read_line(&mut line).unwrap(), 0, "the end rather than {key}=");
            if let Some((found, value)) = line.trim_end().split_once('=')
                && found == key
            {
                return value.to_owned();
            }
        }
    }

    /// Has its guest power off, content.
    #[track_caller]
    pub(crate) fn quit(&mut self) {
        let serial = self.serial.as_mut().expect("a child with a serial port");
        serial.get_mut().write_all(b"q").unwrap();
        let said: Vec<_> = serial.lines().map(Result::unwrap).collect();
        assert_eq!(said.last().map(String::as_str), Some("RESULT ok"), "{said:?}");
        assert!(self.ends_within(PATIENCE));
    }

    fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.pidfd, signal).unwrap();
    }

    /// Ends it.
    #[track_caller]
    fn kill(self) {
        self.api.act("Kill").done();
        assert!(self.ends_within(PATIENCE));
        assert!(!self.socket.exists(), "{} is left behind", self.socket.display());
    }

    fn ends_within(&self, patience: Duration) -> bool {
        let timeout = Timespec::try_from(patience).unwrap();
        poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

/// Overrides of a child that can be talked to at the socket `NAME`.
fn talking(scratch: &Scratch, name: &str) -> Value {
    json!({ "serial": { "to": { "Socket": scratch.path(name) } } })
}

/// Makes children that can be talked to, and end with their parent: a test that is killed leaves none.
#[track_caller]
pub(crate) fn fork(api: &Api, scratch: &Scratch, names: &[&str]) -> Vec<Child> {
    let overrides: Vec<_> = names.iter().map(|name| talking(scratch, name)).collect();
    let reply = post(api, json!({ "overrides": overrides, "end_with_parent": true }));
    let made = children(&reply);
    assert_eq!(made.len(), names.len(), "{}", reply.body);
    made
}

/// Makes children that can be talked to, and outlive their parent.
#[track_caller]
fn fork_for_good(api: &Api, scratch: &Scratch, names: &[&str]) -> Vec<Child> {
    let overrides: Vec<_> = names.iter().map(|name| talking(scratch, name)).collect();
    children(&post(api, json!({ "overrides": overrides })))
}

/// Parent and children have what was, and none of what another does from then on.
#[track_caller]
fn part_ways(vm: &TestVm, scratch: &Scratch) {
    let mut first = fork(&vm.api(), scratch, &["a", "b"]);
    assert_eq!(tell(vm, "c", "count"), "3");
    assert_eq!(tell(vm, "cc", "count"), "4");
    vm.expect("count=5");
    // `c` looks at all of memory, too: it would find what the parent has written since.
    assert_eq!(first[0].tell("c", "count"), "3");
    assert_eq!(first[0].tell("c", "count"), "4");
    assert_eq!(first[1].tell("c", "count"), "3");
    // Of a parent that has gone on since, and of a child.
    let mut second = fork(&vm.api(), scratch, &["c"]);
    let mut grand = fork(&first[0].api.clone(), scratch, &["d", "e"]);
    assert_eq!(tell(vm, "c", "count"), "6");
    assert_eq!(second[0].tell("c", "count"), "6");
    assert_eq!(grand[1].tell("c", "count"), "5");
    assert_eq!(first[0].tell("c", "count"), "5");
    assert_eq!(grand[0].tell("c", "count"), "5");
    assert_eq!(grand[0].tell("c", "count"), "6");
    assert_eq!(grand[1].tell("c", "count"), "6");
    assert_eq!(first[1].tell("c", "count"), "4");
    for child in [first, second, grand].into_iter().flatten() {
        child.kill();
    }
}

#[test]
fn children_and_parents_part_ways() {
    for husk in [forkable(), steps()] {
        let (scratch, vm) = (Scratch::new(), parent(husk));
        part_ways(&vm, &scratch);
        vm.type_in("q");
        vm.wait().ok();
    }
}

/// Each is the child of the one before it. The kernel takes 16 sets of Landlock's rules one upon the other.
#[track_caller]
fn generations_go_on(husk: Husk) {
    let vm = husk.start();
    vm.expect("ready=1");
    let scratch = Scratch::new();
    let mut line: Vec<Child> = Vec::new();
    for number in 1..=20 {
        let parent = line.last().map_or_else(|| vm.api(), |child| child.api.clone());
        let mut child = fork(&parent, &scratch, &[&format!("serial.{number}")]).remove(0);
        assert_eq!(child.tell("c", "count"), number.to_string());
        line.push(child);
    }
    for child in line.into_iter().rev() {
        child.kill();
    }
}

#[test]
fn generations_go_on_where_files_may_be_used_anywhere() {
    generations_go_on(forkable());
}

#[test]
fn generations_go_on_where_files_may_be_used_in_one_place() {
    let place = std::env::temp_dir();
    generations_go_on(
        forkable().arg("--require-sandbox").arg("--allow").arg(place.to_str().unwrap()),
    );
}

/// `POST /fork`.
fn post(api: &Api, body: Value) -> Reply {
    api.request("POST", "/fork", &body.to_string())
}

#[test]
fn each_child_is_given_a_payload_of_its_own() {
    let (scratch, vm) = (Scratch::new(), parent(forkable()));
    let names = ["a", "b"];
    let overrides = names.map(|name| {
        let mut overrides = talking(&scratch, name);
        overrides["payload"] = json!({ "name": name });
        overrides
    });
    let reply = post(&vm.api(), json!({ "overrides": overrides })).json();
    let children = reply["children"].as_array().unwrap().iter().map(Child::new);
    for (mut child, name) in children.zip(names) {
        let identity = child.tell("i", "identity");
        let own = json!({ "name": name }).to_string();
        assert!(identity.ends_with(&own), "{identity}");
        child.kill();
    }
}

#[test]
fn a_child_has_no_file_to_note_its_pages_beside() {
    let vm = idle();
    let child = children(&post(&vm.api(), json!({ "end_with_parent": true }))).remove(0);
    let threads = fs::read_dir(format!("/proc/{}/task", child.pid)).unwrap();
    let mut names = threads.map(|t| fs::read_to_string(t.unwrap().path().join("comm")).unwrap());
    assert!(!names.any(|name| name.contains("prefault")), "it looks for one");
    let refused = child.api.put("/snapshot/working-set", json!({})).fault();
    assert!(refused.contains("was not restored from a memory file"), "{refused}");
}

#[test]
fn no_child_can_write_to_what_children_share() {
    for (husk, memory) in [(forkable(), "husk-guest-ram"), (steps(), "husk-image")] {
        let scratch = Scratch::new();
        let disk = scratch.sparse("disk", 1 << 20);
        let vm = parent(husk.option("--disk", format!("{},overlay", disk.display())));
        assert_eq!(tell(&vm, "w", "wrote"), "2");
        let child = fork(&vm.api(), &scratch, &["a"]).remove(0);
        let fds = fs::read_dir(format!("/proc/{}/fd", child.pid)).unwrap();
        let mut shared = BTreeSet::new();
        for fd in fds.map(|fd| fd.unwrap().path()) {
            let leads = fs::read_link(&fd).unwrap().display().to_string();
            for name in [memory, "husk-layer"].into_iter().filter(|name| leads.contains(name)) {
                let mut file = fs::File::options().write(true).open(&fd).unwrap();
                let refused = file.write(b"x").map_err(|e| e.kind());
                assert_eq!(refused, Err(std::io::ErrorKind::PermissionDenied), "{leads}");
                shared.insert(name);
            }
        }
        assert_eq!(shared.len(), 2, "{shared:?}");
    }
}

/// Whether `what` is anywhere in the memory of a process that it may write to, its guest's aside.
fn is_in_memory(pid: u32, what: &[u8]) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let of = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-').filter(|_| rest.starts_with("rw"))?;
        if rest.contains("/memfd:") {
            return None;
        }
        let [start, end] = [start, end].map(|n| u64::from_str_radix(n, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        // Of a device's mapping nothing can be read so.
        memory.read_exact_at(&mut bytes, start).ok()?;
        Some(bytes)
    };
    maps.lines().filter_map(of).any(|bytes| memmem(&bytes, what))
}

fn memmem(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window[0] == what[0] && window == what)
}

#[test]
fn what_a_child_is_given_no_other_process_has() {
    let vm = idle();
    let secrets = ["9f3a-first-child", "9f3a-second-child", "9f3a-third-child"];
    let overrides = secrets.map(
        |secret| json!({ "payload": { "key": secret }, "mmds": { "key": secret }, "id": secret }),
    );
    let all =
        children(&post(&vm.api(), json!({ "overrides": overrides, "end_with_parent": true })));
    let zygote = zygote(vm.pid()).unwrap().as_raw_nonzero().get().cast_unsigned();
    for (child, own) in all.iter().zip(secrets) {
        assert!(is_in_memory(child.pid, own.as_bytes()), "memory is not searched");
        for other in secrets.iter().filter(|other| **other != own) {
            assert!(!is_in_memory(child.pid, other.as_bytes()), "{own} has {other}");
        }
        assert!(!is_in_memory(zygote, own.as_bytes()), "the zygote has {own}");
        let fds = fs::read_dir(format!("/proc/{}/fd", child.pid)).unwrap();
        for leads in fds.map(|fd| fs::read_link(fd.unwrap().path()).unwrap()) {
            assert!(!leads.display().to_string().contains("husk-children"), "{own} can read it");
        }
    }
}

#[test]
fn what_a_parent_was_started_with_is_not_its_childrens() {
    let scratch = Scratch::new();
    let file = scratch.sparse("inherited", 4096);
    let shell = format!("exec 9<{}", file.display());
    let vm = parent(forkable().after(&shell));
    let child = children(&post(&vm.api(), json!({ "end_with_parent": true }))).remove(0);
    let zygote = zygote(vm.pid()).unwrap().as_raw_nonzero().get().cast_unsigned();
    let has = |pid: u32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        fds.map(|fd| fs::read_link(fd.unwrap().path())).any(|leads| leads.is_ok_and(|l| l == file))
    };
    assert_eq!([vm.pid(), zygote, child.pid].map(has), [false, false, false]);
}

/// The children of a reply.
fn children(reply: &Reply) -> Vec<Child> {
    reply.json()["children"].as_array().unwrap().iter().map(Child::new).collect()
}

/// RAM is a file in memory until it is frozen, and what is written to it must not go elsewhere if that fails.
#[test]
fn a_fork_that_the_host_refuses_half_way_loses_nothing() {
    let (scratch, vm) = (Scratch::new(), parent(forkable()));
    let strace = Strace::attach(&vm, &scratch, "madvise", "error=ENOMEM");
    post(&vm.api(), json!({})).fault();
    assert!(strace.detach());
    assert_eq!(tell(&vm, "c", "count"), "3");
    let mut child = fork(&vm.api(), &scratch, &["a"]).remove(0);
    assert_eq!(child.tell("c", "count"), "4");
    assert_eq!(tell(&vm, "c", "count"), "4");
}

#[test]
fn a_paused_parent_is_a_template() {
    for husk in [forkable(), steps()] {
        let (scratch, vm) = (Scratch::new(), parent(husk));
        vm.api().patch("/vm", json!({ "state": "Paused" })).done();
        for name in ["a", "b", "c"] {
            let mut child = fork(&vm.api(), &scratch, &[name]).remove(0);
            assert_eq!(child.tell("c", "count"), "3");
        }
        let reply =
            post(&vm.api(), json!({ "paused": true, "overrides": [talking(&scratch, "d")] }));
        assert_eq!(reply.json()["paused_us"], 0);
        let mut child = children(&reply).remove(0);
        assert_eq!((vm.api().state(), child.api.state()), ("Paused".into(), "Paused".into()));
        child.api.patch("/vm", json!({ "state": "Resumed" })).done();
        assert_eq!(child.tell("c", "count"), "3");
        vm.api().patch("/vm", json!({ "state": "Resumed" })).done();
        assert_eq!(tell(&vm, "c", "count"), "3");
    }
}

#[test]
fn a_snapshot_of_a_forkable_vm_is_of_one_moment() {
    let (scratch, vm) = (Scratch::new(), parent(forkable()));
    let directory = scratch.path("snapshot");
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
    assert_eq!(tell(&vm, "c", "count"), "3");
    let mut child = fork(&vm.api(), &scratch, &["a"]).remove(0);
    assert_eq!(child.tell("c", "count"), "4");
    let again = scratch.path("again");
    child.api.put("/snapshot/create", json!({ "directory": again })).done();
    for (directory, count) in [(&directory, "3"), (&again, "5")] {
        let restored = Husk::new(["restore"]).arg(directory).serial("stdio").typing().start();
        assert_eq!(tell(&restored, "c", "count"), count);
    }
    assert_eq!(tell(&vm, "c", "count"), "4");
}

#[test]
fn a_guest_that_never_stands_still_is_forked_whole() {
    let churn = || Husk::guest("churn", "").memory(16).listening().typing().arg("--rng");
    for husk in [churn(), churn().arg("--forkable")] {
        let (scratch, vm) = (Scratch::new(), husk.start());
        vm.expect("ready=1");
        let mut passes = Vec::new();
        for round in 0..5 {
            let names = [format!("a{round}"), format!("b{round}")];
            let mut two = fork(&vm.api(), &scratch, &[&names[0], &names[1]]);
            let of = |child: &mut Child| child.tell("c", "pass").parse::<u64>().unwrap();
            let first: Vec<_> = two.iter_mut().map(of).collect();
            let second: Vec<_> = two.iter_mut().map(of).collect();
            assert!(first[0] < second[0] && first[1] < second[1], "{first:?} {second:?}");
            for child in &mut two {
                child.quit();
            }
            passes.push(tell(&vm, "c", "pass").parse::<u64>().unwrap());
        }
        assert!(passes.is_sorted_by(|a, b| a < b), "{passes:?}");
        vm.type_in("q");
        vm.wait().ok();
    }
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let scratch = Scratch::new();
    let network = Network::with_tap();
    let disk = scratch.sparse("disk", 4096);
    let vsock = scratch.path("v.sock");
    let husk = steps().disk(&disk).network(&network, "").vsock(3, &vsock);
    let vm = parent(husk);
    let refused = |body: Value| post(&vm.api(), body).fault();
    let tap = json!([{ "iface_id": "eth0", "host_dev_name": "tap7" }]);
    let other = scratch.sparse("other", 4096);
    let drives = json!([{ "drive_id": "disk0", "path_on_host": other }]);
    for (body, words) in [
        (json!({ "n": 0 }), "fork: n: 0 is not between 1 and 1000"),
        (json!({ "n": 1001 }), "fork: n: 1001 is not between 1 and 1000"),
        (json!({ "n": 3, "overrides": [{}, {}] }), "fork: overrides: there are 2 for 3 children"),
        (json!({ "n": 1 }), "fork: child 1: drives disk0: path_on_host:"),
        (json!({ "overrides": [{ "drives": drives }] }), "fork: child 1: network-interfaces eth0:"),
        (
            json!({ "n": 2, "overrides": [{ "drives": drives, "network-interfaces": tap }] }),
            "fork: child 2: drives disk0: path_on_host:",
        ),
        (
            json!({ "overrides": [{ "drives": [{ "drive_id": "none" }] }] }),
            "fork: child 1: overrides: drives: the snapshot has none",
        ),
        (json!({ "overrides": [{ "id": "a b" }] }), "fork: child 1: overrides: id:"),
        (json!({ "overrides": [{ "nothing": 1 }] }), "fork: child 1: overrides: unknown field"),
        (json!({ "many": 1 }), "An error occurred when deserializing"),
        // There is no such tap: known only when the child opens it.
        (
            json!({ "overrides": [{ "drives": drives, "network-interfaces": tap }] }),
            "fork: child 1: network-interfaces eth0:",
        ),
    ] {
        let said = refused(body);
        assert!(said.starts_with(words), "{said}");
    }
    network.ip("tuntap add tap7 mode tap vnet_hdr");
    let good = json!({ "drives": drives, "network-interfaces": tap });
    let mut talks = talking(&scratch, "serial");
    talks.as_object_mut().unwrap().extend(good.as_object().unwrap().clone());
    let mut child = children(&post(&vm.api(), json!({ "overrides": [talks] }))).remove(0);
    assert_eq!(child.tell("w", "wrote"), "2");
    let config = child.api.get("/vm/config").json();
    let uds_path = config["vsock"]["uds_path"].as_str().unwrap();
    assert!(uds_path.starts_with(&format!("{}.", vsock.display())), "{uds_path}");
    assert!(fs::metadata(uds_path).is_ok());
    assert_eq!(fs::read(&disk).unwrap(), [0; 4096]);
    assert_ne!(fs::read(&other).unwrap(), [0; 4096]);
    assert_eq!(tell(&vm, "c", "count"), "3");
}

#[test]
fn no_two_children_have_one_id() {
    let vm = idle();
    let same = json!([{ "id": "same" }, { "id": "same" }]);
    let said = post(&vm.api(), json!({ "overrides": same })).fault();
    assert!(said.starts_with("fork: child 2: id: 'same' is that of another child"), "{said}");
    let child = children(&post(&vm.api(), json!({ "overrides": [{ "id": "same" }] }))).remove(0);
    assert_eq!(child.api.get("/").json()["id"], "same");
}

#[test]
fn one_that_fails_ends_all() {
    let (scratch, vm) = (Scratch::new(), parent(forkable()));
    let bad = json!({ "serial": { "to": { "Socket": scratch.path("none").join("s") } } });
    let body = json!({ "overrides": [talking(&scratch, "a"), bad, talking(&scratch, "b")] });
    let said = post(&vm.api(), body).fault();
    assert!(said.starts_with("fork: child 2: serial: "), "{said}");
    for name in ["a", "b"] {
        let connected = UnixStream::connect(scratch.path(name));
        assert!(connected.is_err(), "{name} has a reader");
    }
    let left = siblings(&vm);
    assert!(!left.iter().any(|name| name.contains(".sock.")), "{left:?}");
    let mut child = fork(&vm.api(), &scratch, &["c"]).remove(0);
    assert_eq!(child.tell("c", "count"), "3");
}

/// By the host, which is out of memory, or by anybody: it cannot say so itself.
#[test]
fn one_that_is_killed_ends_all() {
    let vm = idle();
    let zygote = zygote(vm.pid()).unwrap();
    let made = || fs::read_to_string(format!("/proc/{zygote}/task/{zygote}/children")).unwrap();
    let first = || Pid::from_raw(made().split_whitespace().next()?.parse().ok()?);
    for _ in 0..5 {
        let start = Instant::now();
        let said = std::thread::scope(|scope| {
            let asked = scope.spawn(|| post(&vm.api(), json!({ "n": 5 })).fault());
            wait_until(|| first().is_some());
            rustix::process::kill_process(first().unwrap(), Signal::KILL).unwrap();
            asked.join().unwrap()
        });
        assert_eq!(said, "fork: 1 of 5 children ended before they were there");
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        assert_eq!(made(), "", "there are children");
    }
    children(&post(&vm.api(), json!({}))).remove(0).kill();
    wait_until(|| made().is_empty());
}

#[test]
fn a_fork_that_cannot_begin_is_refused() {
    let vm = idle();
    vm.api().patch("/vm", json!({ "state": "Paused" })).done();
    let pid = Pid::from_raw(vm.pid().cast_signed());
    let statm = fs::read_to_string(format!("/proc/{}/statm", vm.pid())).unwrap();
    let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    // Less than the stack of a thread takes.
    let limit = |current| Rlimit { current, maximum: None };
    let before = prlimit(pid, Resource::As, limit(Some(pages * 4096 + (1 << 20)))).unwrap();
    let said = post(&vm.api(), json!({})).fault();
    assert!(said.contains("cannot start a thread to fork the microVM"), "{said}");
    prlimit(pid, Resource::As, before).unwrap();
    children(&post(&vm.api(), json!({}))).remove(0).kill();
}

#[test]
fn memory_that_can_be_plugged_makes_forkable_void() {
    let husk = Husk::guest("hello", "how=hlt").memory(16).listening().arg("--forkable");
    let vm = husk.option("--hotplug-memory", "128").start();
    vm.expect_error("forkable is of no use with memory hotplug");
    vm.expect("how=hlt");
    children(&post(&vm.api(), json!({}))).remove(0).kill();
}

/// What is beside its API socket.
fn siblings(vm: &TestVm) -> Vec<String> {
    let entries = fs::read_dir(vm.socket().parent().unwrap()).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The process from which the children of `pid` come, if there is one.
pub(crate) fn zygote(pid: u32) -> Option<Pid> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let mut pids = children.split_whitespace();
    let pid = pids.find(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| name.trim_end() == "husk_zygote")
    })?;
    Pid::from_raw(pid.parse().unwrap())
}

#[test]
fn whoever_is_killed_takes_nobody_along() {
    let (scratch, vm) = (Scratch::new(), parent(forkable()));
    let mut first = fork_for_good(&vm.api(), &scratch, &["a", "b"]);
    // A child: nobody is left of it, and the others go on.
    let killed = first.remove(0);
    killed.signal(Signal::KILL);
    assert!(killed.ends_within(PATIENCE));
    wait_until(|| !fs::exists(format!("/proc/{}", killed.pid)).unwrap());
    assert_eq!(first[0].tell("c", "count"), "3");
    assert_eq!(tell(&vm, "c", "count"), "3");
    // The parent: what forks goes with it, children go on, and have children.
    let forks = zygote(vm.pid()).expect("a process that forks");
    let pidfd = pidfd_open(forks, PidfdFlags::empty()).unwrap();
    vm.signal(Signal::KILL);
    assert!(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).unwrap() > 0);
    assert_eq!(first[0].tell("c", "count"), "4");
    let mut grand = fork_for_good(&first[0].api.clone(), &scratch, &["d"]);
    assert_eq!(grand[0].tell("c", "count"), "5");
    // What forks: there can be no more children, and nothing else is lost.
    let forks = zygote(first[0].pid).expect("a process that forks");
    let pidfd = pidfd_open(forks, PidfdFlags::empty()).unwrap();
    pidfd_send_signal(&pidfd, Signal::KILL).unwrap();
    assert!(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).unwrap() > 0);
    let refused = post(&first[0].api, json!({ "n": 1 })).fault();
    assert!(refused.contains("the process that makes children has been ended"), "{refused}");
    assert_eq!(first[0].tell("c", "count"), "5");
    assert_eq!(grand[0].tell("c", "count"), "6");
    for child in [first, grand].into_iter().flatten() {
        child.signal(Signal::TERM);
        child.signal(Signal::TERM);
        assert!(child.ends_within(PATIENCE));
    }
}

#[test]
fn children_end_with_their_parent_if_they_are_to() {
    for kills in [true, false] {
        let (scratch, vm) = (Scratch::new(), parent(forkable()));
        let mut free = fork_for_good(&vm.api(), &scratch, &["a"]);
        let bound = fork(&vm.api(), &scratch, &["b", "c"]);
        let grand = fork(&bound[0].api.clone(), &scratch, &["d"]);
        match kills {
            true => vm.signal(Signal::KILL),
            false => vm.api().act("Kill").done(),
        }
        for child in bound.iter().chain(&grand) {
            assert!(child.ends_within(PATIENCE), "{} goes on", child.pid);
            assert!(!child.socket.exists(), "{} is left behind", child.socket.display());
        }
        assert_eq!(free[0].tell("c", "count"), "3");
    }
}

/// Waits for what is about to be.
#[track_caller]
pub(crate) fn wait_until(is_so: impl Fn() -> bool) {
    let patience = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < patience, "it never was so");
        std::thread::yield_now();
    }
}

#[test]
fn a_hundred_children_at_once_and_one_by_one() {
    let vm = idle();
    let all = children(&post(&vm.api(), json!({ "n": 100, "end_with_parent": true })));
    let ids: BTreeSet<_> =
        all.iter().map(|c| c.api.get("/").json()["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(ids.len(), 100);
    assert!(all.iter().all(|child| child.api.state() == "Running"));
    drop(all);
    let count = |what: &str| fs::read_dir(format!("/proc/{}/{what}", vm.pid())).unwrap().count();
    vm.api().patch("/vm", json!({ "state": "Paused" })).done();
    let before = (count("fd"), count("task"));
    for _ in 0..20 {
        children(&post(&vm.api(), json!({}))).remove(0).kill();
    }
    // The thread that answered may be on its way out.
    wait_until(|| count("fd") <= before.0 && count("task") <= before.1);
}

#[test]
fn two_clients_fork_at_once() {
    let vm = parent(forkable());
    let api = vm.api();
    let fork = || (0..5).flat_map(|_| children(&post(&api, json!({ "n": 2 })))).collect::<Vec<_>>();
    let (one, other) = std::thread::scope(|scope| {
        let other = scope.spawn(fork);
        (fork(), other.join().unwrap())
    });
    let sockets: BTreeSet<_> = one.iter().chain(&other).map(|child| &child.socket).collect();
    assert_eq!(sockets.len(), 20);
    assert_eq!(tell(&vm, "c", "count"), "3");
}

#[test]
fn a_child_has_nothing_of_its_parents_terminal() {
    let vm = Husk::guest("steps", "").memory(16).listening().on_terminal().start();
    vm.expect("ready=1");
    let child = children(&post(&vm.api(), json!({}))).remove(0);
    let session = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let rest = stat.rsplit_once(") ").unwrap().1.to_owned();
        rest.split(' ').nth(3).unwrap().parse::<u32>().unwrap()
    };
    assert_eq!(session(child.pid), child.pid);
    for fd in [0, 1] {
        let leads = fs::read_link(format!("/proc/{}/fd/{fd}", child.pid)).unwrap();
        assert_eq!(leads.to_str(), Some("/dev/null"), "{fd}");
    }
    vm.type_in("c");
    vm.expect("count=1");
    child.kill();
    vm.type_in("c");
    vm.expect("count=2");
}

#[test]
fn a_program_forks_in_its_own_process() {
    require_host();
    let scratch = Scratch::new();
    let socket = |name: &str| {
        let path = scratch.path(name);
        SerialConfig { to: Some(SerialTo::Socket(path)), ..SerialConfig::default() }
    };
    let mut config = VmConfig::new(guest("steps"));
    config.machine.mem_size_mib = 16;
    config.machine.forkable = true;
    config.serial = socket("parent");
    let vm = Vm::start(config).unwrap();
    let talk = |name: &str| {
        let stream = UnixStream::connect(scratch.path(name)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        BufReader::new(stream)
    };
    let count = |serial: &mut BufReader<UnixStream>| {
        serial.get_mut().write_all(b"c").unwrap();
        let mut line = String::new();
        while !line.starts_with("count=") {
            line.clear();
            assert_ne!(serial.read_line(&mut line).unwrap(), 0);
        }
        line.trim_end().to_owned()
    };
    let mut parent = talk("parent");
    assert_eq!(count(&mut parent), "count=1");
    let overrides = ["a", "b"].map(|name| {
        let serial = Some(socket(name));
        Overrides { serial, ..Overrides::default() }
    });
    let vms = vm.fork(2, overrides.into()).unwrap();
    let mut children = ["a", "b"].map(talk);
    assert_eq!(count(&mut parent), "count=2");
    assert_eq!(children.each_mut().map(count), ["count=2", "count=2"]);
    assert_eq!(count(&mut parent), "count=3");
    // An image is there for as long as somebody has it, whatever becomes of the VM.
    let image = vm.freeze().unwrap();
    vm.kill().unwrap();
    let overrides = Overrides { serial: Some(socket("c")), ..Overrides::default() };
    let late = Vm::restore(&image, overrides).unwrap();
    assert_eq!(count(&mut talk("c")), "count=4");
    let refusal = vms[0].fork(0, Vec::new()).unwrap_err();
    assert!(matches!(refusal, Refusal::Fork(_)), "{refusal}");
    drop((vms, late));
}

#[test]
fn an_image_in_memory_is_written_as_a_snapshot() {
    require_host();
    for (is_forkable, compression) in
        [(true, Compression::None), (true, Compression::Lz4), (false, Compression::None)]
    {
        let scratch = Scratch::new();
        let mut config = VmConfig::new(guest("hello"));
        config.machine.mem_size_mib = 16;
        config.machine.forkable = is_forkable;
        config.boot_source.as_mut().unwrap().boot_args = Some("how=hlt".into());
        config.serial.to = Some(SerialTo::None);
        let secret = "b77c-for-the-parent-alone";
        config.payload = Some(Payload::new(&json!(secret)).unwrap());
        let vm = Vm::start(config).unwrap();
        let directory = scratch.path("snapshot");
        let place = SnapshotParams { compression, ..SnapshotParams::to_directory(&directory) };
        vm.freeze().unwrap().merge(&place).unwrap();
        let image = Image::open(&directory).unwrap();
        image.verify().unwrap();
        Vm::restore(&image, Overrides::default()).unwrap().kill().unwrap();
        let memory = fs::read(directory.join(format!("memory-{}", image.id()))).unwrap();
        assert!(!memmem(&memory, secret.as_bytes()), "the payload is in the snapshot");
    }
}

#[test]
fn the_example_gives_every_request_a_vm_of_its_own() {
    require_host();
    let mut command = std::process::Command::new(env!("CARGO"));
    command.args(["run", "--quiet", "--example", "function_runner", "--"]).arg(guest("steps"));
    let output = command.args(["ready=1", "c", "c", "r"]).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "c: count=1\nc: count=1\nr: missing=rng\n");
}

#[test]
fn what_a_drive_holds_over_its_base_is_each_childs_own() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk", 1 << 20);
    let husk = forkable().option("--disk", format!("{},overlay", disk.display()));
    let vm = parent(husk);
    assert_eq!(tell(&vm, "w", "wrote"), "2");
    let mut two = fork(&vm.api(), &scratch, &["a", "b"]);
    assert_eq!(tell(&vm, "c", "count"), "3");
    assert_eq!(tell(&vm, "w", "wrote"), "3");
    assert_eq!(two[0].tell("s", "second"), "2");
    assert_eq!(two[0].tell("c", "count"), "3");
    assert_eq!(two[0].tell("c", "count"), "4");
    assert_eq!(two[0].tell("w", "wrote"), "4");
    assert_eq!(two[1].tell("s", "second"), "2");
    let mut grand = fork(&two[0].api.clone(), &scratch, &["c"]);
    assert_eq!(grand[0].tell("s", "second"), "4");
    assert_eq!(tell(&vm, "s", "second"), "3");
    assert!(fs::read(&disk).unwrap().iter().all(|byte| *byte == 0), "the base has changed");
}
