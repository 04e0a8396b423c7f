//! The API drives a VM through its life, says what it does, and stays of use whoever else calls.
use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;

use serde_json::{Value, json};

use crate::fork::wait_until;
use crate::util::*;

const MIB: u64 = 1 << 20;

pub(crate) fn boot_source(name: &str, cmdline: &str) -> Value {
    json!({"kernel_image_path": guest(name), "boot_args": cmdline})
}

#[test]
fn five_calls_boot_a_guest() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let disk = scratch.sparse("disk.img", 2 * MIB);
    let vm = Husk::api().within(&network).start();
    let api = vm.api();
    api.put("/boot-source", boot_source("info", "mine")).done();
    api.put("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 64})).done();
    let drive = json!({"drive_id": "root", "path_on_host": disk, "is_root_device": true});
    api.put("/drives/root", drive).done();
    let interface =
        json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:AC:10:00:02"});
    api.put("/network-interfaces/eth0", interface).done();
    api.act("InstanceStart").done();
    let end = vm.wait().ok();
    assert_eq!((end.value("cpus"), end.values("virtio").len()), ("2", 2));
    assert!(end.value("cmdline").starts_with("mine root=/dev/vda rw "), "{end}");
    assert!(end.value("memory").len() > 1);
}

#[test]
fn one_call_boots_a_guest() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let (disk, log) = (scratch.sparse("disk.img", 2 * MIB), scratch.path("serial.log"));
    let config = json!({
        "boot-source": boot_source("info", "mine"),
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 64, "smt": true},
        "drives": [{"drive_id": "data", "path_on_host": disk, "is_root_device": false}],
        "network-interfaces": [],
        "entropy": {},
        "serial": {"serial_out_path": log},
        "balloon": null,
        "vsock": null,
    });
    vm.api().put("/vm", config).done();
    let end = vm.wait().code(0);
    assert_eq!(end.output, "");
    let said = fs::read_to_string(log).unwrap();
    assert!(said.contains("cpus=2\r\n") && said.contains("RESULT ok"), "{said}");
    assert_eq!(said.matches("virtio=").count(), 2);
}

#[test]
fn serial_path_is_shown_while_the_vm_runs() {
    for (serial, has_path) in [("pty", true), ("none", false)] {
        let vm = Husk::api().serial(serial).start();
        assert_eq!(vm.api().get("/").json().get("serial_path"), None);
        vm.api().put("/vm", json!({"boot-source": boot_source("hello", "how=reboot-acpi")})).done();
        let path = vm.api().get("/").json().get("serial_path").cloned();
        assert_eq!(path.is_some(), has_path);
        if let Some(path) = path {
            let path = path.as_str().unwrap();
            let line = vm.expect_error("serial console");
            assert_eq!(line, format!("husk: serial console: {path}"));
            File::open(path).unwrap();
        }
        vm.api().act("Kill").done();
        vm.wait().code(0);
    }
}

#[test]
fn state_follows_the_vm() {
    let vm = Husk::api().option("--id", "vm-1").start();
    let api = vm.api();
    let description = api.get("/").json();
    assert_eq!(description["id"], "vm-1");
    assert_eq!(description["app_name"], "Firecracker");
    assert_eq!(description["state"], "Not started");
    assert_eq!(description["vmm_version"], api.get("/version").json()["firecracker_version"]);
    api.put("/vm", json!({"boot-source": boot_source("hello", "how=hang")})).done();
    assert_eq!(api.state(), "Running");
    // Twice is once.
    for (to, state) in
        [("Paused", "Paused"), ("Paused", "Paused"), ("Resumed", "Running"), ("Resumed", "Running")]
    {
        api.patch("/vm", json!({"state": to})).done();
        assert_eq!(api.state(), state);
    }
    api.act("Kill").done();
    vm.wait().code(0);
}

#[test]
fn paused_guest_stands_still() {
    let vm = Husk::guest("serial", "flood=1000000").listening().start();
    for i in [1_u32, 10] {
        vm.expect(&format!("{i:064}"));
        vm.api().patch("/vm", json!({"state": "Paused"})).done();
        // What it said before may still be on its way here.
        let mut said = vm.serial.len();
        for calm in 0..50 {
            vm.api().get("/version").json();
            if vm.serial.len() != said {
                assert!(calm < 25, "still talking");
                said = vm.serial.len();
            }
        }
        vm.api().patch("/vm", json!({"state": "Resumed"})).done();
    }
    vm.expect(&format!("{:064}", 100));
    vm.api().act("Kill").done();
    vm.wait().code(0);
}

#[test]
fn paused_devices_go_on_where_they_were() {
    let network = Network::with_tap();
    let vm = Husk::guest("net", "echoes=4").network(&network, "").listening().start();
    vm.expect("ready=");
    network.run("ping", "-c 2 -i 0.2 -W 30 172.16.0.2");
    vm.api().patch("/vm", json!({"state": "Paused"})).done();
    thread::scope(|scope| {
        // Sent to a paused guest, answered by a resumed one.
        let ping = scope.spawn(|| network.run("ping", "-c 1 -W 60 172.16.0.2"));
        vm.api().get("/").json();
        vm.api().patch("/vm", json!({"state": "Resumed"})).done();
        ping.join().unwrap();
    });
    network.run("ping", "-c 1 -W 60 172.16.0.2");
    vm.wait().ok();
}

#[test]
fn wait_is_answered_with_the_reason() {
    for (how, reason, code) in [
        ("poweroff", json!({"reason": "powered_off"}), 0),
        ("triple", json!({"reason": "triple_fault", "vcpu": 0}), 5),
        ("internal-error", json!({"reason": "kvm_error", "vcpu": 0}), 6),
    ] {
        let vm = Husk::api().start();
        vm.api().put("/boot-source", boot_source("hello", &format!("how={how}"))).done();
        let answer = thread::scope(|scope| {
            let waits =
                [scope.spawn(|| vm.api().get("/wait")), scope.spawn(|| vm.api().get("/wait"))];
            vm.api().get("/").json();
            vm.api().act("InstanceStart").done();
            let [first, second] = waits.map(|wait| wait.join().unwrap().json());
            assert_eq!(first, second);
            first
        });
        for (key, value) in reason.as_object().unwrap() {
            assert_eq!(&answer[key], value, "{answer}");
        }
        assert_eq!(answer.get("rip").is_some(), code != 0, "{answer}");
        vm.wait().code(code);
    }
    let vm = Husk::guest("hello", "how=hang").listening().start();
    let mut events = vm.api().follow("/events");
    events.next();
    vm.signal(Signal::TERM);
    let last = events.last().unwrap();
    assert_eq!((&last["reason"], &last["signal"]), (&json!("signalled"), &json!(15)));
    vm.wait().code(143);
}

#[test]
fn clients_that_hang_up_while_they_wait_are_forgotten() {
    let vm = Husk::guest("hello", "how=hang").listening().start();
    vm.expect("how=hang");
    // Some have begun the next request, some have said already that they will send none.
    for (request, is_half_closed) in [
        ("GET /events HTTP/1.1\r\nHost: husk\r\n\r\n", false),
        ("GET /events HTTP/1.1\r\nHost: husk\r\n\r\nGET", false),
        ("GET /events HTTP/1.1\r\nHost: husk\r\n\r\n", true),
        ("GET /wait HTTP/1.1\r\nHost: husk\r\n\r\nGET / HTTP/1.1\r\n", false),
        ("GET /wait HTTP/1.1\r\nHost: husk\r\n\r\n", true),
    ] {
        let open = || files_in(&format!("/proc/{}/fd", vm.pid()));
        let mut waiting = Vec::new();
        for _ in 0..20 {
            let mut stream = vm.api().connect();
            stream.write_all(request.as_bytes()).unwrap();
            if is_half_closed {
                stream.shutdown(std::net::Shutdown::Write).unwrap();
            }
            if request.contains("/events") {
                stream.read_exact(&mut [0; 100]).unwrap();
            }
            waiting.push(stream);
        }
        assert_eq!(vm.api().state(), "Running");
        let with = open();
        drop(waiting);
        wait_until(|| open() <= with - 20);
    }
}

#[test]
fn events_come_in_order() {
    let vm = Husk::api().start();
    let api = vm.api();
    let events = api.follow("/events");
    api.put("/boot-source", boot_source("hello", "how=hang")).done();
    api.act("InstanceStart").done();
    api.patch("/vm", json!({"state": "Paused"})).done();
    api.patch("/vm", json!({"state": "Resumed"})).done();
    api.act("Shutdown").done();
    assert_eq!(api.state(), "Running");
    let late = api.follow("/events");
    api.act("Kill").done();
    let events: Vec<Value> = events.collect();
    let names: Vec<&str> = events.iter().map(|e| e["event"].as_str().unwrap()).collect();
    let expected = ["state", "started", "paused", "resumed", "shutdown_requested", "ended"];
    assert_eq!(names, expected);
    assert_eq!(events[0]["state"], "Not started");
    assert_eq!(events.last().unwrap()["reason"], "killed");
    assert!(events[1..].is_sorted_by_key(|e| e["time_us"].as_u64().unwrap()), "{events:?}");
    let late: Vec<Value> = late.collect();
    assert_eq!((&late[0]["state"], late.len()), (&json!("Running"), 2));
    vm.wait().code(0);
}

#[test]
fn refusals_have_firecrackers_words() {
    let vm = Husk::api().start();
    let api = vm.api();
    let before = "The requested operation is not supported before starting the microVM.";
    let after = "The requested operation is not supported after starting the microVM.";
    let body = "An error occurred when deserializing the json body of a request: ";
    let pause = json!({"state": "Paused"});
    assert_eq!(api.patch("/vm", &pause).fault(), before);
    assert_eq!(api.act("SendCtrlAltDel").fault(), before);
    assert_eq!(api.act("Shutdown").fault(), before);
    assert_eq!(api.get("/nope").fault(), "Invalid request method and/or path: GET nope.");
    assert_eq!(api.put("/boot-source", "").fault(), "Empty PUT request.");
    let fault = api.put("/machine-config", r#"{"mem_size_mib": 1}"#).fault();
    assert_eq!(fault, format!("{body}missing field `vcpu_count` at line 1 column 19."));
    let fault = api.put("/actions", r#"{"action_type": "Dance"}"#).fault();
    assert!(
        fault.starts_with(&format!("{body}unknown variant `Dance`, expected one of ")),
        "{fault}"
    );
    let fault = api.put("/entropy", r#"{"x": 1}"#).fault();
    assert!(fault.starts_with(&format!("{body}unknown field `x`")), "{fault}");
    let drive = json!({"drive_id": "a", "path_on_host": "/etc/hostname", "is_root_device": true});
    let fault = api.put("/drives/b", drive).fault();
    assert_eq!(fault, "The id from the path does not match the id from the body!");

    api.put("/vm", json!({"boot-source": boot_source("hello", "how=hang")})).done();
    assert_eq!(api.act("InstanceStart").fault(), after);
    assert_eq!(api.put("/boot-source", boot_source("hello", "")).fault(), after);
    assert_eq!(api.put("/vm", json!({})).fault(), after);
    assert_eq!(
        api.put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 1})).fault(),
        after
    );
    assert_eq!(api.patch("/machine-config", json!({"vcpu_count": 1})).fault(), after);
    assert_eq!(api.put("/entropy", json!({})).fault(), after);
    let fault = api.patch("/drives/a", json!({"drive_id": "a", "path_on_host": "/"})).fault();
    assert!(fault.contains("drives") && fault.contains("'a'"), "{fault}");
    assert_eq!(api.state(), "Running");
}

#[test]
fn root_drive_is_one() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let disk = scratch.sparse("disk.img", MIB);
    let root = |id: &str| json!({"drive_id": id, "path_on_host": disk, "is_root_device": true});
    vm.api().put("/drives/a", root("a")).done();
    assert_eq!(vm.api().put("/drives/b", root("b")).fault(), "A root block device already exists!");
    // The same one may be set again.
    vm.api().put("/drives/a", root("a")).done();
}

#[test]
fn configuration_is_shown() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let (api, disk) = (vm.api(), scratch.sparse("disk.img", MIB));
    api.put("/boot-source", boot_source("hello", "how=hang")).done();
    api.put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 64})).done();
    api.patch("/machine-config", json!({"vcpu_count": 2})).done();
    let drive = json!({"drive_id": "a", "path_on_host": disk, "is_root_device": false});
    api.put("/drives/a", drive).done();
    api.put("/entropy", json!({})).done();
    let vsock = json!({"guest_cid": 3, "uds_path": scratch.path("v.sock")});
    api.put("/vsock/vsock0", &vsock).done();
    let machine = api.get("/machine-config").json();
    assert_eq!((&machine["vcpu_count"], &machine["mem_size_mib"]), (&json!(2), &json!(64)));
    let check = |config: Value| {
        for key in ["balloon", "cpu-config", "logger", "metrics", "mmds-config"] {
            assert_eq!(config.get(key), Some(&Value::Null), "{key}");
        }
        assert_eq!(config["machine-config"], machine);
        assert_eq!(config["boot-source"]["boot_args"], "how=hang");
        assert_eq!(config["drives"][0]["path_on_host"], json!(disk));
        assert!(config["entropy"].is_object());
        assert_eq!(config["vsock"], vsock);
        assert_eq!(config["network-interfaces"], json!([]));
    };
    check(api.get("/vm/config").json());
    api.act("InstanceStart").done();
    check(api.get("/vm/config").json());
    // What is shown can be used again.
    let mut config = api.get("/vm/config").json();
    config["serial"] = Value::Null;
    api.act("Kill").done();
    vm.wait().code(0);
    let file = scratch.file("vm.json", config.to_string());
    let again = Husk::new(["run", "--config-file"]).arg(file).start();
    again.expect("how=hang");
}

#[test]
fn drive_goes_on_with_another_file() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let (one, two) =
        (scratch.file("1.img", vec![1; 1 << 20]), scratch.file("2.img", vec![2; 3 << 20]));
    let api = vm.api();
    let config = json!({
        "boot-source": boot_source("resize", ""),
        "drives": [{"drive_id": "data", "path_on_host": one, "is_root_device": false}],
    });
    api.put("/vm", config).done();
    vm.expect("ready=1");
    let patch = |path| api.patch("/drives/data", json!({"drive_id": "data", "path_on_host": path}));
    // What is refused changes nothing.
    patch(scratch.path("none")).fault();
    patch(scratch.sparse("odd", 1000)).fault();
    patch(two).done();
    let end = vm.wait().ok();
    assert_eq!(end.values("sectors"), ["2048", "6144"]);
    assert_eq!((end.values("first"), end.value("last")), (vec!["1", "2"], "2"));
}

#[test]
fn drive_grows() {
    let scratch = Scratch::new();
    let disk = scratch.file("disk.img", vec![1; 1 << 20]);
    let vm = Husk::guest("resize", "").disk(&disk).listening().start();
    vm.expect("ready=1");
    fs::write(&disk, vec![9; 5 << 20]).unwrap();
    let patch = json!({"drive_id": "disk0", "path_on_host": disk});
    vm.api().patch("/drives/disk0", patch).done();
    let end = vm.wait().ok();
    assert_eq!((end.values("sectors"), end.value("last")), (vec!["2048", "10240"], "9"));
}

#[test]
fn drive_is_let_go_of_when_another_file_comes() {
    let scratch = Scratch::new();
    let [one, two] = ["1.img", "2.img"].map(|name| scratch.sparse(name, MIB));
    let vm = Husk::guest("hello", "how=hang").disk(&one).listening().start();
    vm.expect("how=hang");
    vm.api().patch("/drives/disk0", json!({"drive_id": "disk0", "path_on_host": two})).done();
    assert_eq!(vm.api().get("/vm/config").json()["drives"][0]["path_on_host"], json!(two));
    Husk::guest("block", "tests=write").disk(&one).wait().ok();
    Husk::guest("block", "tests=write").disk(&two).wait().refused(3);
}

#[test]
fn document_describes_every_endpoint() {
    let vm = Husk::api().start();
    let document = vm.api().get("/openapi.json").json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    for (path, methods) in [
        ("/", &["get"][..]),
        ("/version", &["get"]),
        ("/vm", &["put", "patch"]),
        ("/vm/config", &["get"]),
        ("/actions", &["put"]),
        ("/boot-source", &["put"]),
        ("/machine-config", &["get", "put", "patch"]),
        ("/drives/{id}", &["put", "patch"]),
        ("/network-interfaces/{id}", &["put", "patch"]),
        ("/entropy", &["put"]),
        ("/serial", &["put"]),
        ("/logger", &["put"]),
        ("/events", &["get"]),
        ("/wait", &["get"]),
    ] {
        for method in methods {
            assert!(document["paths"][path][method].is_object(), "{method} {path}");
        }
    }
}

#[test]
fn replies_look_like_firecrackers() {
    let vm = Husk::api().start();
    let done = vm.api().put("/entropy", "{}\n");
    done.done();
    let head = done.head.to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 204 "), "{head}");
    assert!(head.contains("\r\nserver: firecracker api\r\n"), "{head}");
    assert!(head.contains("\r\nconnection: keep-alive\r\n"), "{head}");
    assert!(!head.contains("content-length"), "{head}");
}

#[test]
fn connection_serves_many_requests() {
    let vm = Husk::api().start();
    let mut stream = vm.api().connect();
    stream.write_all("GET / HTTP/1.1\r\nHost: a\r\n\r\n".repeat(100).as_bytes()).unwrap();
    let mut reader = BufReader::new(stream);
    for _ in 0..100 {
        assert_eq!(Reply::read(&mut reader).json()["state"], "Not started");
    }
}

#[test]
fn crowd_of_idle_clients_locks_nobody_out() {
    let vm = Husk::guest("hello", "how=hang").listening().start();
    vm.expect("how=hang");
    let api = vm.api();
    let before = files_in(&format!("/proc/{}/fd", vm.pid()));
    let crowd: Vec<_> = (0..200)
        .map(|i| {
            let mut stream = api.connect();
            if i % 2 == 0 {
                stream.write_all(b"PUT /vm HTTP/1.1\r\nContent-Le").unwrap();
            }
            assert_eq!(api.state(), "Running");
            stream
        })
        .collect();
    assert!(files_in(&format!("/proc/{}/fd", vm.pid())) < before + 70);
    drop(crowd);
    api.act("Kill").done();
    vm.wait().code(0);
}

#[test]
fn body_that_is_too_large_is_refused() {
    let vm = Husk::api().start();
    let fault = vm.api().put("/vm", "x".repeat(51201)).fault();
    assert_eq!(
        fault,
        "Request payload with size 51201 is larger than the limit of 51200 allowed by server."
    );
    assert_eq!(vm.api().state(), "Not started");
}

#[test]
fn nonsense_is_answered_and_hung_up_on() {
    let vm = Husk::api().start();
    for nonsense in [
        &b"\0\0\0\0\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        &[b'x'; 64 << 10],
    ] {
        let mut stream = vm.api().connect();
        // It may hang up before it has heard everything.
        let _ = stream.write_all(nonsense);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
        assert_eq!(vm.api().state(), "Not started");
    }
}

#[test]
fn one_of_several_starts_wins() {
    let vm = Husk::api().start();
    vm.api().put("/boot-source", boot_source("hello", "how=hang")).done();
    let statuses = thread::scope(|scope| {
        let starts: Vec<_> =
            (0..8).map(|_| scope.spawn(|| vm.api().act("InstanceStart").status)).collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(statuses.iter().filter(|&&status| status == 204).count(), 1, "{statuses:?}");
    assert_eq!(vm.api().state(), "Running");
}

#[test]
fn socket_is_its_users() {
    let vm = Husk::api().start();
    let mode = fs::metadata(vm.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn live_socket_is_left_alone() {
    let vm = Husk::api().start();
    let socket = vm.socket().to_str().unwrap();
    for command in ["api", "run"] {
        let line = Husk::new([command, "--api-sock", socket]).wait().quickly().refused(3);
        assert_eq!(line, format!("husk: API socket {socket}: another process is listening on it"));
    }
    assert_eq!(vm.api().state(), "Not started");
}

#[test]
fn stale_socket_is_replaced() {
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    drop(UnixListener::bind(&socket).unwrap());
    let vm = Husk::new(["api"]).listening_at(&socket).start();
    assert_eq!(vm.api().state(), "Not started");
    vm.signal(Signal::TERM);
    vm.wait().code(143);
    assert!(!socket.exists());
}

#[test]
fn descriptors_are_not_inherited() {
    const O_CLOEXEC: u32 = 0o2000000;
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 1 << 20);
    let serial = format!("socket={}", scratch.path("serial").display());
    let vm = Husk::guest("hello", "how=hang").disk(disk).serial(&serial).listening().start();
    assert_eq!(vm.api().state(), "Running");
    let process = format!("/proc/{}", vm.pid());
    // What whoever runs the tests has left open.
    let inherited: Vec<_> = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| !target.starts_with("anon_inode:[eventfd]"))
        .collect();
    let mut kept = Vec::new();
    for entry in fs::read_dir(format!("{process}/fdinfo")).unwrap() {
        let number = entry.unwrap().file_name().into_string().unwrap();
        // What is gone by now was a connection's end.
        let Ok(info) = fs::read_to_string(format!("{process}/fdinfo/{number}")) else { continue };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let is_kept = u32::from_str_radix(flags, 8).unwrap() & O_CLOEXEC == 0;
        let Ok(target) = fs::read_link(format!("{process}/fd/{number}")) else { continue };
        if is_kept && !["0", "1", "2"].contains(&&*number) && !inherited.contains(&target) {
            kept.push(target);
        }
    }
    // event-manager's, one for each of its `RemoteEndpoint`s: out of reach. A thread that has just begun has no name yet.
    let names = || {
        let threads = fs::read_dir(format!("{process}/task")).unwrap();
        threads.map(|t| fs::read_to_string(t.unwrap().path().join("comm")).unwrap())
    };
    wait_until(|| names().any(|name| name.trim() == "husk_io0"));
    let names = names();
    let known =
        vec![Path::new("anon_inode:[eventfd]"); names.filter(|n| n.starts_with("husk_io")).count()];
    assert_eq!(kept, known);
}

#[test]
fn foreign_file_is_left_alone() {
    let scratch = Scratch::new();
    let file = scratch.file("file", "precious");
    std::os::unix::fs::symlink(&file, scratch.path("link")).unwrap();
    fs::create_dir(scratch.path("directory")).unwrap();
    scratch.fifo("fifo");
    for (name, what) in
        [("file", "file"), ("link", "symbolic link"), ("directory", "directory"), ("fifo", "FIFO")]
    {
        let path = scratch.path(name);
        let line = Husk::new(["api", "--api-sock"]).arg(&path).wait().quickly().refused(3);
        assert!(line.contains(path.to_str().unwrap()) && line.contains(what), "{line}");
        assert!(fs::symlink_metadata(&path).is_ok());
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn socket_paths_that_cannot_be() {
    let scratch = Scratch::new();
    for (path, word) in [
        (scratch.path(&"x".repeat(120)), "the limit is 107"),
        (scratch.path("no/directory"), "No such file"),
        (scratch.fifo("fifo").join("s"), "Not a directory"),
    ] {
        let line = Husk::new(["api", "--api-sock"]).arg(&path).wait().quickly().refused(3);
        assert!(line.contains(path.to_str().unwrap()) && line.contains(word), "{line}");
    }
    // The way out for a long path.
    let vm = Husk::new(["api", "--api-sock", "api.sock", "--log-level", "info"]);
    let vm = vm.in_directory(&scratch).start();
    vm.expect_error("API server started");
    assert_eq!(Api::new(&scratch.path("api.sock")).state(), "Not started");
}

#[test]
fn a_drive_is_taken_out_of_a_running_vm() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let api = vm.api();
    let disk = scratch.sparse("disk.img", MIB);
    let drive = json!({"drive_id": "a", "path_on_host": disk, "is_root_device": false});
    let is_open = || {
        let fds = fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap();
        fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok()).any(|to| to == disk)
    };
    let before = "The requested operation is not supported before starting the microVM.";
    assert_eq!(api.delete("/drives/a").fault(), before);
    let boot = boot_source("hello", "how=hang");
    api.put("/vm", json!({"boot-source": boot, "drives": [drive]})).done();
    assert!(is_open());
    assert!(api.delete("/drives/b").fault().contains("'b'"));
    assert_eq!(
        api.delete("/entropy").fault(),
        "Invalid request method and/or path: DELETE entropy."
    );
    api.delete("/drives/a").done();
    assert!(!is_open());
    assert_eq!(api.get("/vm/config").json()["drives"], json!([]));
    assert!(api.delete("/drives/a").fault().contains("'a'"));
    api.patch("/vm", json!({"state": "Paused"})).done();
    api.patch("/vm", json!({"state": "Resumed"})).done();
    assert_eq!(api.state(), "Running");
}

#[test]
fn a_guest_whose_writes_are_logged_runs_as_ever() {
    let vm = Husk::api().start();
    let api = vm.api();
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 128, "track_dirty_pages": true});
    api.put("/machine-config", machine).done();
    assert_eq!(api.get("/machine-config").json()["track_dirty_pages"], true);
    api.put("/boot-source", boot_source("hello", "")).done();
    api.act("InstanceStart").done();
    vm.wait().ok();
}
