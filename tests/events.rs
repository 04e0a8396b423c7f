//! What `GET /events` tells of a VM and its devices.
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::util::*;

const MIB: u64 = 1 << 20;

/// Kind of event, device and what happened to it, of each line after the first.
fn told(events: &[Value]) -> Vec<String> {
    let times: Vec<u64> = events[1..].iter().map(|e| e["time_us"].as_u64().unwrap()).collect();
    assert!(times.is_sorted(), "{times:?}");
    let word = |event: &Value, key: &str| event[key].as_str().unwrap_or_default().to_owned();
    let line = |e: &Value| ["event", "model", "id", "what"].map(|key| word(e, key)).join(" ");
    events[1..].iter().map(|e| line(e).trim_end().to_owned()).collect()
}

#[test]
fn a_guest_that_uses_its_devices_is_told_of() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 16 * MIB);
    let husk = Husk::api().option("--serial", "pty");
    let vm = husk.start();
    let api = vm.api();
    let events = api.follow("/events");
    let drive = |id: &str| json!({"drive_id": id, "path_on_host": disk, "is_root_device": false, "is_read_only": true});
    api.put("/drives/used", drive("used")).done();
    api.put("/drives/unused", drive("unused")).done();
    let boot = json!({"kernel_image_path": guest("block"), "boot_args": "tests=read"});
    api.put("/boot-source", boot).done();
    api.act("InstanceStart").done();
    vm.wait().code(0);
    let events: Vec<Value> = events.collect();
    assert!(events[1]["path"].as_str().unwrap().starts_with("/dev/pts/"), "{events:?}");
    let expected = ["serial_path", "started", "device drives used activated", "ended"];
    assert_eq!(told(&events), expected);
}

/// What the user and the host do to devices.
#[test]
fn changes_from_outside_are_told() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let (disk, socket) = (scratch.sparse("disk.img", 16 * MIB), scratch.path("serial"));
    let husk = Husk::guest("net", "timeout_ms=300000").disk(&disk).network(&network, "");
    let vm = husk.serial(&format!("socket={}", socket.display())).listening().start();
    let api = vm.api();
    let mut events = api.follow("/events");
    events.next().unwrap();
    let mut expect = |wanted: &str| {
        let found = events.any(|event| told(&[json!({}), event])[0] == wanted);
        assert!(found, "no {wanted}");
    };
    let client = UnixStream::connect(&socket).unwrap();
    expect("device serial serial connected");
    drop(client);
    expect("device serial serial disconnected");
    api.patch("/drives/disk0", json!({"drive_id": "disk0", "path_on_host": disk})).done();
    expect("device drives disk0 config_changed");
    expect("device drives disk0 updated");
    api.delete("/drives/disk0").done();
    expect("device drives disk0 removed");
    api.patch("/vm", json!({"state": "Paused"})).done();
    expect("paused");
    api.act("Kill").done();
    expect("ended");
}

/// Resets without end neither hold up who asks nor drown who listens; what was not told is counted.
#[test]
fn a_guest_that_resets_its_devices_is_not_heard_louder_for_it() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 16 * MIB);
    let husk = Husk::guest("reset", "rounds=0 resets=0 ups=150").disk(&disk).listening();
    let vm = husk.start();
    let api = vm.api();
    let events = api.follow("/events");
    let watch = Stopwatch::start();
    for _ in 0..50 {
        assert_eq!(api.get("/").status, 200);
    }
    watch.within(Duration::ZERO, Duration::from_secs(20));
    let (code, events): (_, Vec<Value>) = (vm.wait(), events.collect());
    code.code(0);
    let missed = events.iter().filter(|e| e["event"] == "device_events_missed");
    let missed: Vec<&Value> = missed.collect();
    let count: u64 = missed.iter().map(|e| e["count"].as_u64().unwrap()).sum();
    let seconds = events.last().unwrap()["time_us"].as_u64().unwrap() / 1_000_000 + 2;
    let told = events.iter().filter(|e| e["event"] == "device").count() as u64;
    assert!(told <= 32 * seconds, "{told} in {seconds} s");
    // Up and down so often, and before and after it, down in between.
    assert_eq!(told + count, 2 * 150 + 3, "{told} told, {count} missed");
    assert!(count > 0 && missed.iter().all(|e| e["model"] == "drives"), "{missed:?}");
    assert!(["activated", "reset"].contains(&missed.last().unwrap()["last"].as_str().unwrap()));
}
