//! A VM that ends while something is going on: whoever asked is answered, nothing half done stays, and a signal ends
//! husk in time whatever it is doing.
use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, kill_process};
use serde_json::{Value, json};

use crate::util::*;

/// 2 s are promised; the machine may be busy with other tests.
const PROMISED: Duration = Duration::from_secs(4);

/// A guest with 8 MiB that it has written.
fn steps() -> Husk {
    let guest = Husk::guest("steps", "pages=2048").memory(64).listening().typing();
    guest.exit_on_reboot()
}

fn ready(husk: Husk) -> TestVm {
    let vm = husk.start();
    vm.expect("ready=1");
    vm
}

/// How a VM ends, and the exit code of that.
type Ending = (&'static str, fn(&TestVm), i32);

const ENDINGS: &[Ending] = &[
    ("the guest powers off", |vm| vm.type_in("q"), 0),
    ("the guest resets itself", |vm| vm.type_in("x"), 0),
    ("Kill", |vm| vm.api().act("Kill").done(), 0),
    ("SIGTERM, twice", twice, 143),
];

fn twice(vm: &TestVm) {
    vm.signal(Signal::TERM);
    vm.expect_error("asking the guest to power off");
    vm.signal(Signal::TERM);
}

/// Asks on a connection that the server has seen, and does not wait for the answer.
fn ask(vm: &TestVm, what: &str, body: &Value) -> UnixStream {
    let mut stream = vm.api().connect();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    assert_eq!(Reply::read(&mut BufReader::new(&stream)).status, 200);
    let body = body.to_string();
    let head = format!("{what} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}", body.len());
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
    stream
}

/// Asks, waits `delay`, ends the VM; the reply.
fn ask_and_end(vm: &TestVm, path: &str, body: &Value, delay: Duration, ending: &Ending) -> Reply {
    let (name, end, _) = ending;
    let mut reader = BufReader::new(ask(vm, path, body));
    // Any instant will do: what is tested is that none matters.
    std::thread::sleep(delay);
    end(vm);
    let since = Instant::now();
    let reply = Reply::read(&mut reader);
    assert!(since.elapsed() < PROMISED, "{name} after {delay:?}: {:?}", since.elapsed());
    reply
}

/// The snapshot in a directory is sound, and nothing else is there.
#[track_caller]
fn assert_whole(directory: &Path, names: &[String]) {
    assert_eq!(names.len(), 2, "{names:?}");
    Husk::new(["snapshot", "verify"]).arg(directory).wait().code(0);
}

fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_snapshot_is_there_or_not_whenever_the_vm_ends() {
    let scratch = Scratch::new();
    let vm = ready(steps());
    let start = Instant::now();
    vm.api().put("/snapshot/create", json!({ "directory": scratch.path("first") })).done();
    let takes = start.elapsed();
    drop(vm);
    let (mut there, mut refused) = (0, 0);
    for ending in ENDINGS {
        for step in 0..6 {
            let directory = scratch.path(&format!("{}-{step}", ending.0));
            let body = json!({ "directory": directory });
            let delay = takes * step / 4;
            let vm = ready(steps());
            let reply = ask_and_end(&vm, "PUT /snapshot/create", &body, delay, ending);
            vm.wait().code(ending.2);
            let names = names(&directory);
            match reply.status {
                204 => {
                    assert_whole(&directory, &names);
                    there += 1;
                }
                _ => {
                    let said = reply.fault();
                    assert!(said.contains("ended") || said.contains("killed"), "{said}");
                    assert!(names.is_empty(), "{said}: {names:?}");
                    refused += 1;
                }
            }
        }
    }
    assert!(there > 0, "no snapshot was in time; {refused} were refused");
}

#[test]
fn children_are_there_or_not_whenever_the_vm_ends() {
    let scratch = Scratch::new();
    let (mut there, mut refused) = (0, 0);
    for (number, ending) in ENDINGS.iter().enumerate() {
        for step in 0..5 {
            let place = scratch.path(&format!("{number}-{step}"));
            fs::create_dir(&place).unwrap();
            let guest = Husk::guest("steps", "pages=64").memory(16).typing().arg("--forkable");
            let vm = ready(guest.exit_on_reboot().listening_at(&place.join("s")));
            let delay = Duration::from_millis(4 * step * step);
            let reply =
                ask_and_end(&vm, "POST /fork", &json!({ "n": 3, "paused": true }), delay, ending);
            if reply.status == 200 {
                for child in reply.json()["children"].as_array().unwrap() {
                    end_child(child, ending.2 == 143);
                }
                there += 1;
            } else {
                let said = reply.fault();
                assert!(said.contains("ended") || said.contains("killed"), "{said}");
                refused += 1;
            }
            vm.wait().code(ending.2);
            let deadline = Instant::now() + PATIENCE;
            while !names(&place).is_empty() {
                assert!(Instant::now() < deadline, "{:?}", names(&place));
                std::thread::yield_now();
            }
        }
    }
    assert!(there > 0, "no fork was in time; {refused} were refused");
}

/// Ends a child. What its parent's guest was told to do it may have been told too.
fn end_child(child: &Value, is_there: bool) {
    let pid = child["pid"].as_i64().unwrap() as i32;
    let socket = child["api_sock"].as_str().unwrap();
    let connected = UnixStream::connect(socket);
    assert!(!is_there || connected.is_ok(), "{socket} does not answer");
    // A second signal does not wait; it may have ended by the first.
    for _ in 0..2 {
        let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM);
    }
}

/// SIGTERM ends `vm` in time, with its exit code, and without its socket.
#[track_caller]
fn ends_in_time(what: &str, vm: TestVm) {
    let socket = vm.socket().to_owned();
    let start = Instant::now();
    vm.signal(Signal::TERM);
    vm.wait().code(143);
    assert!(start.elapsed() < PROMISED, "{what}: {:?}", start.elapsed());
    assert!(!socket.exists(), "{what}: {} is left", socket.display());
}

/// Listening at a path that outlives it.
fn at(scratch: &Scratch, name: &str, husk: Husk) -> TestVm {
    husk.listening_at(&scratch.path(name)).start()
}

#[test]
fn a_signal_ends_husk_in_time_whatever_it_waits_for() {
    let scratch = Scratch::new();
    // Serves no memory: whoever touches it waits.
    let nobody = scratch.path("nobody");
    let listener = UnixListener::bind(&nobody).unwrap();
    let directory = scratch.path("snapshot");
    let vm = ready(steps());
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
    drop(vm);
    let load = json!({
        "directory": directory,
        "mem_backend": { "backend_type": "Uffd", "backend_path": nobody },
    });
    // The VMM thread waits, for memory.
    let vm = at(&scratch, "a", Husk::new(["api"]));
    let _asked = ask(&vm, "PUT /snapshot/load", &load);
    let _connection = listener.accept().unwrap();
    ends_in_time("a load", vm);
    // It waits for a vCPU, which does not get out of the guest.
    let hang = || Husk::guest("hello", "how=hang").memory(64);
    let vm = at(&scratch, "b", hang());
    vm.expect("how=hang");
    let body = json!({ "directory": scratch.path("late") });
    let _asked = ask(&vm, "PUT /snapshot/create", &body);
    ends_in_time("a snapshot of a guest that hangs", vm);
    let idle = || Husk::guest("hello", "how=hlt").memory(64).arg("--forkable");
    let vm = at(&scratch, "c", idle());
    vm.expect("how=hlt");
    let _asked = ask(&vm, "POST /fork", &json!({ "n": 20, "end_with_parent": true }));
    ends_in_time("a fork", vm);
    // What makes children does not end by itself.
    let vm = at(&scratch, "d", idle());
    vm.expect("how=hlt");
    let children = format!("/proc/{0}/task/{0}/children", vm.pid());
    let zygote = fs::read_to_string(children).unwrap().trim().parse().unwrap();
    let zygote = Pid::from_raw(zygote).unwrap();
    kill_process(zygote, Signal::STOP).unwrap();
    ends_in_time("what makes children", vm);
    assert!(!is_there(zygote), "what makes children is left");
}

/// Whether there is such a process, though it may have ended.
fn is_there(process: Pid) -> bool {
    fs::exists(format!("/proc/{process}")).unwrap()
}

/// The thread that waits for children has what makes them, too.
#[test]
fn what_makes_children_ends_though_somebody_waits_for_some() {
    let scratch = Scratch::new();
    let vm = at(&scratch, "a", Husk::guest("hello", "how=hlt").memory(64).arg("--forkable"));
    vm.expect("how=hlt");
    let zygote = crate::fork::zygote(vm.pid()).unwrap();
    kill_process(zygote, Signal::STOP).unwrap();
    let _asked = ask(&vm, "POST /fork", &json!({ "n": 2 }));
    let tasks = format!("/proc/{}/task", vm.pid());
    let name =
        |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    crate::fork::wait_until(|| {
        fs::read_dir(&tasks).unwrap().any(|task| name(task.unwrap()).starts_with("husk_fork"))
    });
    ends_in_time("a fork", vm);
    assert!(!is_there(zygote), "what makes children is left");
}
