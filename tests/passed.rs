//! Descriptors that come with requests (SCM_RIGHTS) in place of paths.
use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

use crate::api::boot_source;
use crate::outside::open_tap;
use crate::util::*;

const PUT: (&str, &str) = ("PUT", "/drives/data");
const PATCH: (&str, &str) = ("PATCH", "/drives/data");
/// Most descriptors that may come with a request.
const EACH_MAX: usize = 16;

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn null() -> File {
    File::open("/dev/null").unwrap()
}

fn drive(place: &str) -> Value {
    json!({"drive_id": "data", "path_on_host": place, "is_root_device": false})
}

fn change(place: &str) -> Value {
    json!({"drive_id": "data", "path_on_host": place})
}

/// A file of one sector or more that begins with a text.
fn image(scratch: &Scratch, name: &str, text: &str, len: usize) -> std::path::PathBuf {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(len, 0);
    scratch.file(name, bytes)
}

/// A process comes to have exactly this open: connections are closed a moment after their clients.
#[track_caller]
fn assert_open(pid: u32, expected: &[String]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = descriptors(pid);
        if found == expected {
            return;
        }
        assert!(Instant::now() < deadline, "{found:#?}, want {expected:#?}");
        std::thread::yield_now();
    }
}

/// What a process has open that no client is connected to: of sockets the one that listens, and the one that leads to
/// the process that makes children.
#[track_caller]
fn settled(pid: u32) -> Vec<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = descriptors(pid);
        if found.iter().filter(|open| open.starts_with("socket:")).count() == 2 {
            return found;
        }
        assert!(Instant::now() < deadline, "{found:#?}");
        std::thread::yield_now();
    }
}

fn has_open(pid: u32, path: &Path) -> usize {
    let path = path.display().to_string();
    descriptors(pid).iter().filter(|open| **open == path).count()
}

#[test]
fn a_drive_that_was_passed_is_read_and_goes_on_with_another() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let one = scratch.file("1.img", vec![1; 1 << 20]);
    let two = scratch.file("2.img", vec![2; 3 << 20]);
    let api = vm.api();
    api.put("/boot-source", boot_source("resize", "")).done();
    api.pass(PUT, drive("passed:0"), &[open(&one)]).done();
    // Nothing but the descriptor leads to it any more.
    fs::remove_file(&one).unwrap();
    api.act("InstanceStart").done();
    vm.expect("ready=1");
    api.pass(PATCH, change("passed:0"), &[open(&two)]).done();
    let end = vm.wait().ok();
    assert_eq!(end.values("sectors"), ["2048", "6144"]);
    assert_eq!((end.values("first"), end.value("last")), (vec!["1", "2"], "2"));
}

#[test]
fn all_that_is_opened_can_be_passed() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let kernel = scratch.path("kernel");
    fs::copy(guest("steps"), &kernel).unwrap();
    let initrd = scratch.file("initrd", [7; 4096]);
    let disk = image(&scratch, "disk.img", "passed-d", 4096);
    let pmem = image(&scratch, "pmem.img", "passed-p", 2 << 20);
    let mut kernel_file = File::open(&kernel).unwrap();
    // Where its offset is is nobody's business.
    kernel_file.read_exact(&mut [0; 100]).unwrap();
    let fds: Vec<OwnedFd> = vec![
        open_tap(&network, "tap0").into(),
        File::open(&initrd).unwrap().into(),
        kernel_file.into(),
        File::open(&disk).unwrap().into(),
        open(&pmem).into(),
    ];
    for path in [&kernel, &initrd, &disk, &pmem] {
        fs::remove_file(path).unwrap();
    }
    let vm = Husk::api().typing().start();
    let api = vm.api();
    let body = json!({
        "boot-source": {"kernel_image_path": "passed:2", "initrd_path": "passed:1", "boot_args": ""},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "drives": [{"drive_id": "a", "path_on_host": "passed:3", "is_root_device": false, "is_read_only": true}],
        "pmem": [{"id": "p", "path_on_host": "passed:4"}],
        "network-interfaces": [
            {"iface_id": "e", "host_dev_name": "passed:0", "guest_mac": "06:00:00:00:00:09"},
        ],
        // What these say is the user's.
        "payload": {"note": "passed:9"},
    });
    api.pass(("PUT", "/vm"), body, &fds).done();
    drop(fds);
    vm.expect("ready=1");
    assert!(tell(&vm, "b").contains("disk=passed-d"));
    assert!(tell(&vm, "p").contains("pmem=passed-p"));
    assert!(tell(&vm, "n").contains("09"));
    // What is shown is what is kept.
    let config = api.get("/vm/config").json();
    for name in [
        &config["boot-source"]["kernel_image_path"],
        &config["boot-source"]["initrd_path"],
        &config["drives"][0]["path_on_host"],
        &config["pmem"][0]["path_on_host"],
        &config["network-interfaces"][0]["host_dev_name"],
    ] {
        assert!(name.as_str().unwrap().starts_with("held:"), "{config}");
    }
    // A reset needs none of it again.
    vm.type_in("x");
    vm.expect("ready=1");
    assert!(tell(&vm, "bp").contains("pmem=passed-p"));
    vm.type_in("q");
    vm.wait().ok();
}

#[test]
fn what_was_put_is_kept_until_it_is_replaced() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let [one, two] = ["1.img", "2.img"].map(|name| scratch.sparse(name, 1 << 20));
    let (api, pid) = (vm.api(), vm.pid());
    api.put("/boot-source", boot_source("hello", "how=hang")).done();
    api.pass(PUT, drive("passed:0"), &[open(&one)]).done();
    assert_eq!(has_open(pid, &one), 1);
    // As it is shown it can be put again.
    let config = api.get("/vm/config").json();
    let name = config["drives"][0]["path_on_host"].as_str().unwrap();
    api.put("/drives/data", drive(name)).done();
    assert_eq!(has_open(pid, &one), 1);
    // Refused: what was there stays.
    api.pass(PUT, drive("passed:0"), &[null()]).fault();
    assert_eq!(has_open(pid, &one), 1);
    api.pass(PUT, drive("passed:0"), &[open(&two)]).done();
    // The request has been answered; what it left is closed before the next is looked at.
    api.get("/");
    assert_eq!((has_open(pid, &one), has_open(pid, &two)), (0, 1));
    let fault = api.put("/drives/data", drive(name)).fault();
    assert!(fault.contains(&format!("{name}: no such descriptor is kept")), "{fault}");
    api.act("InstanceStart").done();
    vm.expect("how=hang");
    let other = scratch.sparse("3.img", 1 << 20);
    api.pass(PATCH, change("passed:0"), &[open(&other)]).done();
    api.get("/");
    assert_eq!(has_open(pid, &two), 0);
    assert!(has_open(pid, &other) > 0);
    // Limits change, the file does not.
    let limit = json!({"drive_id": "data", "rate_limiter": {"ops": {"size": 9, "refill_time": 9}}});
    api.patch("/drives/data", limit).done();
    let config = api.get("/vm/config").json();
    assert_eq!(config["drives"][0]["rate_limiter"]["ops"]["size"], 9);
    assert!(config["drives"][0]["path_on_host"].as_str().unwrap().starts_with("held:"));
    assert!(has_open(pid, &other) > 0);
    // And an ordinary path again.
    api.patch("/drives/data", json!({"drive_id": "data", "path_on_host": two})).done();
    api.get("/");
    assert_eq!(has_open(pid, &other), 0);
}

#[test]
fn what_does_not_fit_is_refused_and_closed() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let disk = scratch.sparse("disk.img", 1 << 20);
    let (api, pid) = (vm.api(), vm.pid());
    let config = json!({
        "boot-source": boot_source("hello", "how=hang"),
        "drives": [{"drive_id": "data", "path_on_host": disk, "is_root_device": false}],
    });
    api.put("/vm", config).done();
    vm.expect("how=hang");
    api.get("/");
    let before = settled(pid);
    let flags = |flags| rustix::fs::open(scratch.path("other"), flags, Mode::empty()).unwrap();
    scratch.sparse("other", 1 << 20);
    let fifo = open(&scratch.fifo("fifo"));
    let (socket, _peer) = UnixStream::pair().unwrap();
    let odd = open(&scratch.sparse("odd", 1000));
    let taken = open(&disk);
    let cases: Vec<(OwnedFd, &str)> = vec![
        (File::open(&scratch).unwrap().into(), "passed:0 is a directory, want a regular file or"),
        (fifo.into(), "passed:0 is a FIFO"),
        (socket.into(), "passed:0 is a socket"),
        (null().into(), "passed:0 is a character device"),
        (odd.into(), "passed:0 has 1000 bytes"),
        (flags(OFlags::WRONLY), "passed:0 is open for writing only, want reading and writing"),
        (flags(OFlags::RDONLY), "passed:0 is open for reading only, want reading and writing"),
        (flags(OFlags::PATH), "passed:0 names a file and does not open it (O_PATH)"),
        (flags(OFlags::RDWR | OFlags::APPEND), "passed:0 is open for appending"),
        (flags(OFlags::RDWR | OFlags::DIRECT), "passed:0 is open past the page cache"),
    ];
    for (fd, words) in cases {
        let fault = api.pass(PATCH, change("passed:0"), &[fd]).fault();
        assert!(fault.contains("path_on_host: ") && fault.contains(words), "{fault}, want {words}");
    }
    // The file that is there may be gone on with: it is its own lock.
    api.pass(PATCH, change("passed:0"), &[taken]).done();
    api.patch("/drives/data", json!({"drive_id": "data", "path_on_host": disk})).done();
    api.get("/");
    assert_open(pid, &before);
    assert_eq!(api.state(), "Running");
}

#[test]
fn what_is_named_has_to_come_and_what_comes_to_be_named() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let (api, pid) = (vm.api(), vm.pid());
    api.get("/");
    let before = settled(pid);
    let nulls = |count| (0..count).map(|_| null()).collect::<Vec<_>>();
    for (request, body, count, words) in [
        (PUT, drive("passed:0"), EACH_MAX + 1, "More than 16 descriptors came with the request"),
        (PUT, drive("passed:0"), 200, "More than 16 descriptors came with the request"),
        (PUT, drive("passed:0"), 2, "nothing in it names: passed:1."),
        (PUT, drive("/nonexistent"), 1, "nothing in it names: passed:0."),
        (PUT, drive("passed:1"), 1, "nothing in it names: passed:0."),
        (PUT, drive("passed:0"), 0, "passed:0: no such descriptor was passed: none came"),
        (PUT, drive("passed:x"), 0, "passed:x: no such descriptor was passed"),
        (PUT, drive("passed:"), 0, "passed:: a descriptor that another process had"),
        (PUT, drive("held:1"), 0, "held:1: no such descriptor is kept"),
        (
            ("PUT", "/entropy"),
            json!({}),
            1,
            "1 descriptors came with the request, and PUT /entropy takes none.",
        ),
        (("PUT", "/mmds"), json!({"a": "passed:0"}), 1, "PUT /mmds takes none"),
        (("GET", "/"), json!(""), 0, "GET request cannot have a body"),
        (
            ("PUT", "/serial"),
            json!({"serial_out_path": "passed:0"}),
            0,
            "serial_out_path: only a path will do, no descriptor",
        ),
        (("PUT", "/logger"), json!({"log_path": "passed:0"}), 1, "takes none"),
        (
            ("PUT", "/drives/data"),
            json!({"drive_id": "data", "socket": "passed:0", "is_root_device": false}),
            1,
            "socket: only a path will do, no descriptor; passed:N can be the value of: path_on_host.",
        ),
        (
            ("PUT", "/drives/data"),
            json!({"drive_id": "data", "path_on_host": "passed:0", "is_root_device": false,
                   "overlay": {"File": "passed:1"}}),
            2,
            "File: only a path will do",
        ),
        (
            ("PUT", "/snapshot/load"),
            json!({"directory": "passed:0"}),
            1,
            "directory: only a path will do",
        ),
        (("PUT", "/snapshot/create"), json!({"directory": "passed:0"}), 1, "takes none"),
    ] {
        let fault = api.pass(request, &body, &nulls(count)).fault();
        assert!(fault.contains(words), "{body}: {fault}, want {words}");
    }
    // A path that looks like one.
    let odd = scratch.sparse("passed:0", 4096);
    api.put(
        "/drives/data",
        json!({"drive_id": "data", "path_on_host": odd, "is_root_device": false}),
    )
    .done();
    // Metadata are the user's.
    api.put("/mmds", json!({"a": "passed:0"})).done();
    api.get("/");
    assert_open(pid, &before);
}

#[test]
fn descriptors_may_come_with_any_part_of_a_request() {
    let (scratch, vm) = (Scratch::new(), Husk::api().typing().start());
    let api = vm.api();
    let images = ["a", "b", "c"].map(|name| image(&scratch, name, &format!("disk-{name}"), 4096));
    let drive = |id: &str, place: usize| json!({"drive_id": id, "path_on_host": format!("passed:{place}"), "is_root_device": id == "c"});
    let body = json!({
        "boot-source": boot_source("steps", ""),
        "drives": [drive("a", 0), drive("b", 1), drive("c", 2)],
    });
    let bytes = request("PUT", "/vm", &body.to_string());
    let stream = api.connect();
    let head = bytes.windows(4).position(|end| end == b"\r\n\r\n").unwrap();
    // In the request's line, with the head's last byte, and with the body's last.
    let cuts = [3, head + 4, bytes.len() - 1];
    send_with(&stream, &bytes[..cuts[0]], &[open(&images[0])]);
    send_with(&stream, &bytes[cuts[0]..cuts[1]], &[open(&images[1])]);
    (&stream).write_all(&bytes[cuts[1]..cuts[2]]).unwrap();
    send_with(&stream, &bytes[cuts[2]..], &[open(&images[2])]);
    let mut reader = BufReader::new(&stream);
    Reply::read(&mut reader).done();
    vm.expect("ready=1");
    assert!(tell(&vm, "b").contains("disk-c"), "the root drive comes first");
    // The same connection goes on, with other descriptors.
    let patch = json!({"drive_id": "c", "path_on_host": "passed:0"});
    let bytes = request("PATCH", "/drives/c", &patch.to_string());
    let other = image(&scratch, "d", "disk-d", 4096);
    send_with(&stream, &bytes, &[open(&other)]);
    Reply::read(&mut reader).done();
    assert!(tell(&vm, "b").contains("disk-d"));
    vm.type_in("q");
    vm.wait().ok();
}

#[test]
fn a_flood_of_descriptors_takes_none_of_husks() {
    let vm = Husk::api().after("ulimit -n 256").start();
    let (api, pid) = (vm.api(), vm.pid());
    api.get("/");
    let before = settled(pid);
    let many: Vec<_> = (0..EACH_MAX).map(|_| null()).collect();
    // Requests that never end, each with as many as may come; and what comes with no request at all, while one is
    // answered, and after it.
    let half = &request("PUT", "/drives/data", &drive("passed:0").to_string())[..40];
    let mut clients: Vec<_> = (0..40).map(|_| api.connect()).collect();
    for client in &clients {
        send_with(client, half, &many);
        send_with(client, b"\r", &many);
    }
    let waiting = api.connect();
    (&waiting).write_all(&request("GET", "/wait", "")).unwrap();
    let idle = api.connect();
    for _ in 0..20 {
        send_with(&waiting, b"\r\n", &many);
        send_with(&idle, b"\r\n", &many);
    }
    clients.extend([waiting, idle]);
    // Others are served, and what was passed too soon is not taken for theirs.
    let fault = api.pass(PUT, drive("passed:0"), &[null()]).fault();
    let is_known = ["is a character device", "There is no room for the descriptors"];
    assert!(is_known.iter().any(|words| fault.contains(words)), "{fault}");
    assert_eq!(api.state(), "Not started");
    let nulls = descriptors(pid).iter().filter(|open| *open == "/dev/null").count();
    let inherited = before.iter().filter(|open| *open == "/dev/null").count();
    // An eighth of what it may have.
    assert!(nulls <= inherited + 256 / 8, "{nulls}");
    drop(clients);
    assert_open(pid, &before);
    let fault = api.pass(PUT, drive("passed:0"), &[null()]).fault();
    assert!(fault.contains("is a character device"), "{fault}");
}

#[test]
fn what_comes_out_of_turn_is_refused_with_the_next_request() {
    let vm = Husk::api().start();
    let api = vm.api();
    let stream = api.connect();
    send_with(&stream, b"\r\n", &[null()]);
    (&stream).write_all(&request("GET", "/", "")).unwrap();
    let mut reader = BufReader::new(&stream);
    let fault = Reply::read(&mut reader).fault();
    assert!(fault.starts_with("Descriptors came at a time when there was no request"), "{fault}");
    // It is told once.
    (&stream).write_all(&request("GET", "/", "")).unwrap();
    Reply::read(&mut reader).json();
}

#[test]
fn an_open_file_is_one_vms_whoever_else_has_it() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 1 << 20);
    let (one, two) = (Husk::api().start(), Husk::api().start());
    let file = open(&disk);
    let same = || file.try_clone().unwrap();
    let launch = |read_only: bool| {
        let mut drive = drive("passed:0");
        drive["is_read_only"] = json!(read_only);
        json!({"boot-source": boot_source("hello", "how=hang"), "drives": [drive]})
    };
    let vm = ("PUT", "/vm");
    one.api().pass(vm, launch(false), &[same()]).done();
    let in_use = "passed:0 is in use by another drive or process";
    for read_only in [true, false] {
        let fault = two.api().pass(vm, launch(read_only), &[same()]).fault();
        assert!(fault.contains(in_use), "{fault}");
    }
    // By a path as well.
    Husk::guest("block", "tests=write").disk(&disk).wait().refused(3);
    one.api().act("Kill").done();
    one.wait().code(0);
    // Who passed it still has it open, and with it the lock.
    drop(file);
    two.api().pass(vm, launch(false), &[open(&disk)]).done();
    let mut twice = launch(false);
    twice["drives"] = json!([drive("passed:0"), {"drive_id": "b", "path_on_host": "passed:1", "is_root_device": false}]);
    let three = Husk::api().start();
    let file = open(&scratch.sparse("other.img", 1 << 20));
    let fault = three.api().pass(vm, twice, &[file.try_clone().unwrap(), file]).fault();
    assert!(fault.contains("in use by another drive"), "{fault}");
}

#[test]
fn a_snapshot_is_restored_from_descriptors() {
    let scratch = Scratch::new();
    let vm = Husk::api().typing().start();
    let disk = image(&scratch, "disk.img", "disk-one", 4096);
    let body = json!({
        "boot-source": boot_source("steps", ""),
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 16, "track_dirty_pages": true},
        "drives": [drive("passed:0")],
    });
    vm.api().pass(("PUT", "/vm"), body, &[open(&disk)]).done();
    vm.expect("ready=1");
    assert!(tell(&vm, "cc").contains("count=2"));
    let (state, memory) = (scratch.path("state"), scratch.path("memory"));
    let place = json!({"snapshot_path": state, "mem_file_path": memory});
    vm.api().put("/snapshot/create", place.clone()).done();
    // One of what has changed only is more than two files.
    let diff = json!({"directory": scratch.path("diff"), "snapshot_type": "Diff"});
    vm.api().put("/snapshot/create", diff).done();
    vm.api().act("Kill").done();
    vm.wait().code(0);

    let vm = Husk::api().typing().start();
    let api = vm.api();
    let load = ("PUT", "/snapshot/load");
    let mut body = json!({
        "snapshot_path": "passed:1", "resume_vm": true, "verify": true,
        "mem_backend": {"backend_type": "File", "backend_path": "passed:0"},
    });
    let files = || vec![File::open(&memory).unwrap(), File::open(&state).unwrap()];
    // The drive that was passed to the VM that was saved is not here.
    let fault = api.pass(load, &body, &files()).fault();
    for words in [
        "drives data: path_on_host: passed:: a descriptor that another process had",
        "name another in an override",
    ] {
        assert!(fault.contains(words), "{fault}");
    }
    body["overrides"] = json!({"drives": [{"drive_id": "data", "path_on_host": "passed:2"}]});
    let mut uffd = body.clone();
    uffd["mem_backend"]["backend_type"] = json!("Uffd");
    uffd["verify"] = json!(false);
    let with_disk = || files().into_iter().chain([open(&disk)]).collect::<Vec<_>>();
    let fault = api.pass(load, &uffd, &with_disk()).fault();
    assert!(fault.contains("Uffd serves memory by a socket that is named by its path"), "{fault}");
    let mut parts = fs::read_dir(scratch.path("diff")).unwrap().flatten().map(|entry| entry.path());
    let diff_memory = parts.find(|path| path.to_str().unwrap().contains("memory-")).unwrap();
    let mut diff = with_disk();
    diff[0] = File::open(diff_memory).unwrap();
    diff[1] = File::open(scratch.path("diff/state")).unwrap();
    let fault = api.pass(load, &body, &diff).fault();
    assert!(fault.contains("snapshot_path: it goes over another snapshot"), "{fault}");
    let mut record = body.clone();
    record["record_ms"] = json!(1);
    let fault = api.pass(load, &record, &with_disk()).fault();
    assert!(fault.contains("record_ms: "), "{fault}");
    // The state file's offset is where the last one left it.
    let fds = with_disk();
    for file in &fds[..2] {
        (&*file).read_exact(&mut [0; 64]).unwrap();
    }
    api.pass(load, &body, &fds).done();
    drop(fds);
    assert!(tell(&vm, "c").contains("count=3"));
    assert!(tell(&vm, "b").contains("disk-one"));
    // Back to it, from what is open.
    api.put("/snapshot/rewind", json!({})).done();
    assert!(tell(&vm, "c").contains("count=3"));
    // The next snapshot stands by itself: nobody could find what it would go over.
    let next = json!({"directory": scratch.path("next"), "snapshot_type": "Diff"});
    api.put("/snapshot/create", next).done();
    for path in [&state, &memory] {
        fs::remove_file(path).unwrap();
    }
    vm.type_in("q");
    vm.wait().ok();
    let vm = Husk::new(["restore"])
        .arg(scratch.path("next"))
        .option("--disk", format!("data={}", disk.display()));
    let vm = vm.typing().start();
    assert!(tell(&vm, "c").contains("count=4"));
}

#[test]
fn children_have_no_descriptors_of_their_parents() {
    let scratch = Scratch::new();
    let vm = Husk::api().typing().start();
    let api = vm.api();
    let disk = image(&scratch, "disk.img", "disk-one", 4096);
    let mut drive = drive("passed:1");
    drive["is_read_only"] = json!(true);
    let body = json!({
        "boot-source": {"kernel_image_path": "passed:0", "boot_args": ""}, "drives": [drive],
    });
    let fds = [File::open(guest("steps")).unwrap(), File::open(&disk).unwrap()];
    api.pass(("PUT", "/vm"), body, &fds).done();
    vm.expect("ready=1");
    let fork = |body: Value| api.request("POST", "/fork", &body.to_string());
    let fault = fork(json!({"overrides": [{"api_sock": scratch.path("x")}]})).fault();
    assert!(fault.contains("drives data: path_on_host: passed:: a descriptor that another process had, or another VM"), "{fault}");
    let child = scratch.path("child");
    let overrides =
        json!([{"api_sock": child, "drives": [{"drive_id": "data", "path_on_host": disk}]}]);
    fork(json!({"overrides": overrides, "end_with_parent": true})).json();
    let child = Api::new(&child);
    assert_eq!(child.state(), "Running");
    let config = child.get("/vm/config").json();
    assert_eq!(config["boot-source"]["kernel_image_path"], "passed:");
    // A descriptor that is passed to it is not taken for its parent's.
    let other = image(&scratch, "other.img", "disk-two", 4096);
    child.pass(PATCH, change("passed:0"), &[File::open(other).unwrap()]).done();
    assert_eq!(child.get("/vm/config").json()["boot-source"]["kernel_image_path"], "passed:");
    let fault = api.pass(("POST", "/fork"), json!({"n": 1}), &[null()]).fault();
    assert!(fault.contains("POST /fork takes none"), "{fault}");
}

#[test]
fn what_drives_have_written_is_found_by_a_path() {
    let scratch = Scratch::new();
    let disk = image(&scratch, "disk.img", "disk-one", 4096);
    let vm =
        Husk::guest("steps", "").memory(16).option("--disk", format!("{},overlay", disk.display()));
    let vm = vm.listening().typing().start();
    vm.expect("ready=1");
    tell(&vm, "cw");
    let (state, memory) = (scratch.path("state"), scratch.path("memory"));
    let place = json!({"snapshot_path": state, "mem_file_path": memory});
    vm.api().put("/snapshot/create", place).done();
    vm.api().act("Kill").done();
    let body = json!({"snapshot_path": "passed:0", "mem_file_path": "passed:1"});
    let fds = [&state, &memory].map(|path| File::open(path).unwrap());
    let fault = Husk::api().start().api().pass(("PUT", "/snapshot/load"), body, &fds).fault();
    let words = "snapshot_path: what drives disk0 has written is beside the state file";
    assert!(fault.contains(words), "{fault}");
}
