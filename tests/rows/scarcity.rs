//! P6-P9: a host on which there is no standard output, no descriptor, no memory, no KVM. Whatever is lacking, husk says so
//! and ends, or goes on; it does not crash, and does not wait.
use std::fs;
use std::path::Path;

use serde_json::json;

use super::subject::{Subject, differs, hello, is_husks_alone};
use crate::util::*;

/// Standard streams that are not there are not taken for a disk by whoever writes to them.
#[test]
fn p06_standard_streams_that_are_closed() {
    if is_husks_alone("P6") {
        return;
    }
    let scratch = Scratch::new();
    for closed in ["0<&-", "1>&-", "2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"] {
        let disk = scratch.file("disk.img", vec![7; 1 << 20]);
        let husk = Husk::guest("block", "tests=read").disk(&disk).option("--log-level", "trace");
        let end = husk.after(&format!("exec {closed}")).start_unheard().wait().code(0);
        assert!(fs::read(&disk).unwrap().iter().all(|byte| *byte == 7), "{closed}: {end}");
        let husk = Husk::run("/nope").after(&format!("exec {closed}")).start_unheard();
        husk.wait().code(3);
    }
}

#[test]
fn p06_standard_streams_that_are_full() {
    if is_husks_alone("P6") {
        return;
    }
    for full in ["1>/dev/full", "2>/dev/full", "1>/dev/full 2>/dev/full"] {
        let husk = Husk::guest("hello", "").option("--log-level", "trace");
        husk.after(&format!("exec {full}")).start_unheard().wait().code(0);
        let vm = Husk::guest("hello", "how=triple").after(&format!("exec {full}")).start_unheard();
        vm.wait().code(5);
    }
}

/// What is read is not read any more: the guest and the API go on.
#[test]
fn p06_standard_streams_whose_reader_is_gone() {
    if is_husks_alone("P6") {
        return;
    }
    let scratch = Scratch::new();
    let (socket, fifo) = (scratch.path("api.sock"), scratch.fifo("fifo"));
    // The shell reads it, until it becomes husk.
    let pipe = format!("exec 3<>{0}; exec 1>{0} 2>{0}; exec 3<&-", fifo.display());
    let husk = Husk::guest("hello", "how=hang").option("--api-sock", &socket);
    let vm = husk.option("--log-level", "trace").after(&pipe).start_unheard();
    crate::fork::wait_until(|| std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let api = Api::new(&socket);
    crate::fork::wait_until(|| api.state() == "Running");
    for _ in 0..50 {
        api.put("/nope", "{}").fault();
    }
    assert_eq!(api.state(), "Running");
    api.act("Kill").done();
    vm.wait().code(0);
}

/// A start that fails for want of descriptors leaves those that it had opened, and the next may do.
#[test]
fn p07_descriptors_come_back_when_a_start_fails() {
    let scratch = Scratch::new();
    let drives = |count: usize| {
        let drive = |n: usize| {
            let path = scratch.sparse(&format!("{n}.img"), 1 << 20);
            json!({"drive_id": n.to_string(), "path_on_host": path, "is_root_device": false})
        };
        hello(json!({ "drives": (0..count).map(drive).collect::<Vec<_>>() }))
    };
    let (mut refused, mut started) = (0, 0);
    for limit in (20..96).step_by(3) {
        let mut subject =
            Subject::start_with("P7", |husk| husk.after(&format!("ulimit -n {limit}")));
        subject.settle();
        // Many, then fewer: with those it may start, in the same process.
        for (nth, count) in [12, 12, 6, 3, 0].into_iter().enumerate() {
            if !is_refused(&subject, &drives(count)) {
                started += 1;
                subject.ends(0);
                break;
            }
            refused += 1;
            // The first start makes the thread that uses paths, which stays.
            match nth {
                0 => subject.settle(),
                _ => subject.has_no_more(),
            }
        }
    }
    println!("P7: {refused} refused, {started} started");
    assert!(refused > 5 && started > 5 || differs("P7"), "{refused} refused, {started} started");
}

/// Whether it is, where descriptors are few; if so, for that.
fn is_refused(subject: &Subject, config: &serde_json::Value) -> bool {
    let (status, said) = match crate::hostile::other() {
        None => subject.ask("PUT", "/vm", &config.to_string()),
        Some(_) => subject.refusal(config).unwrap_or((204, String::new())),
    };
    let is_named = status == 204 || status == 400 && said.contains("Too many open files");
    assert!(is_named || differs("P7"), "{status} {said}");
    status != 204
}

/// Calls to the host that a start makes, and what they say when there is no more to be had.
const CALLS: [(&str, &str); 10] = [
    ("mmap", "ENOMEM"),
    ("eventfd2", "EMFILE"),
    ("epoll_create1", "EMFILE"),
    ("clone3", "EAGAIN"),
    ("clone", "EAGAIN"),
    ("openat", "EMFILE"),
    ("open", "EMFILE"),
    ("socket", "ENFILE"),
    ("fcntl", "EMFILE"),
    ("ioctl", "ENOMEM"),
];

/// Each such call fails in its turn. What husk can do without, it does without.
#[test]
fn p08_each_call_of_a_start_fails() {
    if is_husks_alone("P8") {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 1 << 20);
    let mut wrong = Vec::new();
    for (call, error) in CALLS {
        let (mut refused, mut survived) = (0, 0);
        for when in 1.. {
            match fails(&scratch, &disk, call, error, when) {
                None => break,
                Some(Ok(true)) => refused += 1,
                Some(Ok(false)) => survived += 1,
                Some(Err(end)) => wrong.push(format!("{call} number {when}: {error}: {end}")),
            }
        }
        println!("P8 {call}: {error}: {refused} times refused, {survived} times survived");
        assert!(refused > 0, "{call}: nothing depends on it");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Whether it was refused, as it should be; or how else it ended. `None` if there were not so many calls.
fn fails(
    scratch: &Scratch,
    disk: &Path,
    call: &str,
    error: &str,
    when: u32,
) -> Option<Result<bool, String>> {
    let log = scratch.path("strace");
    let trace = format!("trace={call},sigaltstack");
    let inject = format!("inject={call}:error={error}:when={when}");
    // What cargo sets makes the loader look for libraries in many places.
    let quiet = ["env", "-u", "LD_LIBRARY_PATH"];
    let strace = ["strace", "-f", "--seccomp-bpf", "-o", log.to_str().unwrap()];
    let strace = quiet.into_iter().chain(strace);
    let husk = Husk::guest("hello", "").memory(8).disk(disk).arg("--rng");
    let husk = husk.option("--api-sock", scratch.path("api.sock"));
    let husk = husk.after("ulimit -c 0");
    let end = husk.by(strace.chain(["-e", &trace, "-e", &inject])).wait();
    let log = fs::read_to_string(log).unwrap();
    if !log.contains("INJECTED") {
        assert_eq!(end.status.code(), Some(0), "{call} number {when}: {end}");
        return None;
    }
    // The loader's and those of Rust's runtime, which asks for its stack and then sets it, are before that.
    let begins = log.match_indices("sigaltstack(").nth(1);
    let is_husks = begins.is_some_and(|(begins, _)| log.find("INJECTED") > Some(begins));
    let is_said = end.errors.starts_with("husk: ") && end.errors.lines().count() == 1;
    Some(match end.status.code() {
        Some(0) => Ok(false),
        Some(4) if is_said => Ok(true),
        // What KVM_RUN says is the guest's end.
        Some(6) if is_said && call == "ioctl" && end.errors.contains("KVM_RUN") => Ok(true),
        _ if !is_husks => Ok(false),
        _ => Err(format!("{}: {}", end.status, end.errors)),
    })
}

/// A KVM that is there and cannot be had: not ours, busy, gone, of another kind.
#[test]
fn p09_kvm_that_cannot_be_had() {
    if is_husks_alone("P9") {
        return;
    }
    for (error, words) in [
        ("EACCES", "Permission denied"),
        ("EBUSY", "busy"),
        ("ENODEV", "No such device"),
        ("ENXIO", "No such device or address"),
        ("EMFILE", "Too many open files"),
    ] {
        let scratch = Scratch::new();
        let log = scratch.path("strace");
        let inject = format!("inject=openat,open:error={error}");
        let strace = ["strace", "-f", "-o", log.to_str().unwrap(), "-P", "/dev/kvm", "-e", &inject];
        let line = Husk::guest("hello", "").by(strace).wait().refused(4);
        println!("P9 {error}: {line}");
        assert!(line.contains("/dev/kvm") && line.contains(words), "{error}: {line}");
    }
    // For real: a user who is nobody.
    let nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let line = Husk::run("builtin:demo").by(nobody).wait().refused(4);
    println!("P9: {line}");
    assert!(line.contains("/dev/kvm") && line.contains("Permission denied"), "{line}");
    assert!(line.contains("group"), "what to do: {line}");
}
