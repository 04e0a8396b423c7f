//! What `GET /events` tells of a VM and its devices.
use std::os::unix::net::UnixStream;
use std::path::Path;
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

/// What its user does to a VM as a whole, and how long that took.
#[test]
fn snapshots_and_restores_are_told_and_measured() {
    let scratch = Scratch::new();
    let directory = scratch.path("snapshot");
    let latencies = |api: &Api, metrics: &Path| {
        api.act("FlushMetrics").done();
        let text = std::fs::read_to_string(metrics).unwrap();
        let line: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        move |key: &str| line["latencies_us"][key].as_u64().unwrap()
    };
    let metrics = scratch.file("metrics", "");
    let husk = Husk::guest("hello", "how=hang").option("--metrics-path", &metrics).listening();
    let vm = husk.start();
    vm.expect("hello");
    let api = vm.api();
    let mut events = api.follow("/events").skip(1);
    let mut create = || -> Value {
        api.put("/snapshot/create", json!({"directory": directory})).done();
        events.find(|event| event["event"] == "snapshot_created").unwrap()
    };
    let first = create();
    let number =
        |event: &Value, key: &str| event[key].as_u64().unwrap_or_else(|| panic!("{event}"));
    assert_eq!((first["kind"].as_str(), first["id"].as_str().unwrap().len()), (Some("Full"), 32));
    let (took, paused) = (number(&first, "took_us"), number(&first, "paused_us"));
    assert!(0 < paused && paused < took, "{first}");
    let of = latencies(&api, &metrics);
    assert_eq!(of("vmm_full_create_snapshot"), took);
    assert!(of("full_create_snapshot") >= took);
    assert_eq!((of("load_snapshot"), of("diff_create_snapshot")), (0, 0));
    api.patch("/vm", json!({"state": "Paused"})).done();
    let second = create();
    assert_eq!(number(&second, "paused_us"), 0, "it stood still anyway");
    assert_ne!(first["id"], second["id"]);
    let state = std::fs::metadata(directory.join("state")).unwrap().len();
    assert!(number(&second, "bytes") > state, "{second}: the state has {state}");
    drop(vm);

    let other = Husk::api().option("--metrics-path", &metrics).start();
    let api = other.api();
    let mut events = api.follow("/events").skip(1);
    api.put("/snapshot/load", json!({"directory": directory})).done();
    let restored = events.next().unwrap();
    assert_eq!(restored["event"], "restored");
    assert_eq!((&restored["id"], &restored["paused"]), (&second["id"], &json!(true)));
    let of = latencies(&api, &metrics);
    assert_eq!(of("vmm_load_snapshot"), number(&restored, "took_us"));
    assert!(of("load_snapshot") >= of("vmm_load_snapshot"));
    let boot = &api.get("/").json()["boot"];
    assert!(boot["image_us"].as_u64() > Some(0) && boot["vcpus_us"].as_u64() > Some(0), "{boot}");
    api.patch("/vm", json!({"state": "Resumed"})).done();
    assert_eq!(events.next().unwrap()["event"], "resumed");
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
