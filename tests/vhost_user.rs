//! Drives that another process serves: QEMU's storage daemon is that process.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::util::*;

const MIB: u64 = 1 << 20;

/// A storage daemon that serves a disk image at a socket.
struct Daemon {
    socket: PathBuf,
    pid: rustix::process::Pid,
}

impl Daemon {
    /// Serves `image`; when this returns, it listens.
    fn start(scratch: &Scratch, image: &Path) -> Self {
        let (socket, pid_file) = (scratch.path("vhost.sock"), scratch.path("daemon.pid"));
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        );
        let made = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={}", image.display()))
            .arg("--export")
            .arg(export)
            .arg("--pidfile")
            .arg(&pid_file)
            .arg("--daemonize")
            .output()
            .expect("qemu-storage-daemon, of the package qemu-system-common");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let pid = fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
        Self { socket, pid: rustix::process::Pid::from_raw(pid).unwrap() }
    }

    /// The option that gives husk a drive served by it.
    fn disk(&self, husk: Husk) -> Husk {
        husk.option("--disk", format!("{},vhost-user", self.socket.display()))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // A test may have killed it.
        let _ = rustix::process::kill_process(self.pid, Signal::KILL);
    }
}

#[test]
fn a_drive_of_another_process_does_all_a_driver_can_ask() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 16 * MIB);
    let daemon = Daemon::start(&scratch, &disk);
    let tests = "tests=read,write,verify,flush at=1000 len=256K seed=3 irq";
    let end = daemon.disk(Husk::guest("block", tests)).wait().ok();
    assert_eq!(end.value("sectors"), "32768");
    for done in ["read", "write", "verify", "flush"] {
        assert_eq!(end.value(done), "ok", "{done}\n{end}");
    }
    // The driver's pattern, as in `block_writes_are_in_the_file`.
    let bytes = fs::read(&disk).unwrap();
    let written = &bytes[1000 * 512..][..256 << 10];
    assert!(written.iter().enumerate().all(|(i, &b)| b == (i * 7 + i / 512 + 3) as u8));
}

#[test]
fn pause_keeps_what_is_in_flight_at_another_process() {
    let scratch = Scratch::new();
    let daemon = Daemon::start(&scratch, &scratch.sparse("disk.img", 16 * MIB));
    let vm = daemon.disk(Husk::guest("bench_block", "write scale=10")).listening().start();
    let api = vm.api();
    vm.expect("name=rand4k-qd1");
    for _ in 0..20 {
        api.patch("/vm", json!({"state": "Paused"})).done();
        api.patch("/vm", json!({"state": "Resumed"})).done();
    }
    vm.wait().ok();
}

#[test]
fn a_reset_takes_the_queue_back_from_another_process() {
    let scratch = Scratch::new();
    let daemon = Daemon::start(&scratch, &scratch.sparse("disk.img", 16 * MIB));
    daemon.disk(Husk::guest("reset", "rounds=5 resets=50")).wait().ok();
}

#[test]
fn a_back_end_that_goes_leaves_the_guest_alone() {
    let scratch = Scratch::new();
    let daemon = Daemon::start(&scratch, &scratch.sparse("disk.img", 16 * MIB));
    let vm = daemon.disk(Husk::guest("resize", "timeout_ms=600000")).listening().start();
    vm.expect("ready=1");
    drop(daemon);
    vm.expect_error("back end is gone");
    let api = vm.api();
    api.patch("/vm", json!({"state": "Paused"})).done();
    api.patch("/vm", json!({"state": "Resumed"})).done();
    assert_eq!(api.state(), "Running");
}

#[test]
fn what_belongs_to_the_back_end_is_refused() {
    let scratch = Scratch::new();
    let image = scratch.sparse("disk.img", 16 * MIB);
    let daemon = Daemon::start(&scratch, &image);
    let vm = Husk::api().start();
    let api = vm.api();
    let drive = |more: serde_json::Value| {
        let mut drive = json!({"drive_id": "a", "is_root_device": false, "socket": daemon.socket});
        drive.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        drive
    };
    for more in [
        json!({"path_on_host": image}),
        json!({"is_read_only": true}),
        json!({"io_engine": "Async"}),
        json!({"rate_limiter": {"ops": {"size": 1, "refill_time": 1000}}}),
    ] {
        let field = more.as_object().unwrap().keys().next().unwrap().clone();
        let fault = api.put("/drives/a", drive(more)).fault();
        assert!(fault.contains(&field) && fault.contains("back end"), "{fault}");
    }
    let fault = api.put("/drives/a", drive(json!({"socket": image}))).fault();
    assert!(fault.contains("is no socket"), "{fault}");
    let fault = api.put("/drives/a", drive(json!({"socket": "/nowhere"}))).fault();
    assert!(fault.contains("/nowhere"), "{fault}");

    let boot = json!({"kernel_image_path": guest("hello"), "boot_args": "how=hang"});
    api.put("/boot-source", boot).done();
    api.put("/drives/a", drive(json!({}))).done();
    api.act("InstanceStart").done();
    // Nothing to change means: look again at what the back end has.
    api.patch("/drives/a", json!({"drive_id": "a"})).done();
    let patch = json!({"drive_id": "a", "path_on_host": image});
    assert!(api.patch("/drives/a", patch).fault().contains("back end"));
}

/// Its state is in the other process, which has the guest's memory besides.
#[test]
fn a_vm_with_a_drive_of_another_process_is_not_copied() {
    let scratch = Scratch::new();
    let daemon = Daemon::start(&scratch, &scratch.sparse("disk.img", 16 * MIB));
    let saved = scratch.path("saved");
    let plain = Husk::guest("hello", "how=hang").listening().start();
    plain.api().put("/snapshot/create", json!({"directory": saved})).done();
    drop(plain);
    let vm = daemon.disk(Husk::guest("hello", "how=hang")).listening().start();
    let api = vm.api();
    let directory = scratch.path("refused");
    for state in ["Resumed", "Paused"] {
        api.patch("/vm", json!({"state": state})).done();
        for reply in [
            api.put("/snapshot/create", json!({"directory": directory})),
            api.put("/snapshot/create", json!({"directory": directory, "snapshot_type": "Diff"})),
            api.request("POST", "/fork", r#"{"n": 1}"#),
        ] {
            let fault = reply.fault();
            assert!(fault.contains("drives disk0") && fault.contains("another process"), "{fault}");
        }
        let fault = api.put("/snapshot/rewind", json!({"directory": saved})).fault();
        assert!(fault.contains("another process"), "{fault}");
        assert_eq!(api.state(), if state == "Paused" { state } else { "Running" });
    }
    assert!(!directory.exists());
}

#[test]
fn a_silent_back_end_is_not_waited_for() {
    let scratch = Scratch::new();
    let socket = scratch.path("silent.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let end = Husk::guest("hello", "")
        .option("--disk", format!("{},vhost-user", socket.display()))
        .wait()
        .quickly();
    let text = end.refused(4);
    assert!(text.contains("silent.sock") && text.contains("back end"), "{text}");
    drop(listener);
}
