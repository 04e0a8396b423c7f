//! Firecracker's API as it is on the wire, request by request: what it says before the start and after
//! it, and what it says of requests that are wrong.
use std::io::{BufReader, Write};

use serde_json::{Value, json};

use crate::util::*;

/// Method, path and body, and what comes back: nothing (204), or a part of the `fault_message`.
type Row = (&'static str, &'static str, &'static str, &'static str);

const DONE: &str = "";
const BEFORE: &str = "The requested operation is not supported before starting the microVM.";
const AFTER: &str = "The requested operation is not supported after starting the microVM.";
const BODY: &str = "An error occurred when deserializing the json body of a request: ";
const MISMATCH: &str = "The id from the path does not match the id from the body!";

/// The same before the start and after it.
const ALWAYS: &[Row] = &[
    ("GET", "/nope", "", "Invalid request method and/or path: GET nope."),
    ("PUT", "/nope", "{}", "Invalid request method and/or path: PUT nope."),
    ("DELETE", "/machine-config", "", "Invalid request method and/or path: DELETE machine-config."),
    ("GET", "/boot-source", "", "Invalid request method and/or path: GET boot-source."),
    ("GET", "/actions", "", "Invalid request method and/or path: GET actions."),
    ("PATCH", "/boot-source", "{}", "Invalid request method and/or path: PATCH boot-source."),
    // What is wrong with the body comes before what is wrong with the path.
    ("GET", "/machine-config", "{}", "GET request cannot have a body."),
    ("GET", "/nope", "{}", "GET request cannot have a body."),
    ("PUT", "/machine-config", "", "Empty PUT request."),
    ("PUT", "/nope", "", "Empty PUT request."),
    ("PATCH", "/vm", "", "Empty PATCH request."),
    ("PATCH", "/nope", "", "Empty PATCH request."),
    ("PUT", "/drives", "{}", "The ID cannot be empty."),
    ("PUT", "/drives/", "{}", "The ID cannot be empty."),
    ("PUT", "/drives/a.b", "{}", "API Resource IDs can only contain alphanumeric characters"),
    ("PUT", "/actions", "{", "EOF while parsing an object at line 1 column 1."),
    ("PUT", "/actions", "{}", "missing field `action_type` at line 1 column 2."),
    ("PUT", "/actions", r#"{"action_type": "foo"}"#, "unknown variant `foo`, expected one of `"),
    (
        "PUT",
        "/actions",
        r#"{"action_type": "InstanceStart", "payload": 1}"#,
        "unknown field `payload`",
    ),
    (
        "PATCH",
        "/vm",
        r#"{"state": "foo"}"#,
        "unknown variant `foo`, expected `Paused` or `Resumed`",
    ),
];

/// Nothing is there yet but what other rows have set.
const BEFORE_THE_START: &[Row] = &[
    (
        "PUT",
        "/machine-config",
        r#"{"mem_size_mib": 128}"#,
        "missing field `vcpu_count` at line 1 column 21.",
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count": "1", "mem_size_mib": 1}"#,
        "invalid type: string \"1\", expected u8",
    ),
    ("PUT", "/machine-config", r#"{"vcpu_count": 33, "mem_size_mib": 1}"#, "vcpu_count"),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count": 1, "mem_size_mib": 1, "ht_enabled": true}"#,
        "unknown field `ht_enabled`, expected one of `vcpu_count`",
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count": 1, "mem_size_mib": 1, "huge_pages": "1G"}"#,
        "unknown variant `1G`, expected one of `None`",
    ),
    ("PATCH", "/machine-config", "{}", "Empty PATCH request."),
    ("PUT", "/machine-config/", "{\"vcpu_count\": 2, \"mem_size_mib\": 256}\n", DONE),
    ("PATCH", "/machine-config", r#"{"mem_size_mib": 64}"#, DONE),
    ("PUT", "/boot-source", "{}", "missing field `kernel_image_path` at line 1 column 2."),
    (
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path": "/nope"}"#,
        "cannot open /nope for reading: No such file or directory",
    ),
    (
        "PUT",
        "/drives/a",
        r#"{"drive_id": "a", "path_on_host": "disk.img"}"#,
        "missing field `is_root_device`",
    ),
    (
        "PUT",
        "/drives/a",
        r#"{"drive_id": "b", "path_on_host": "disk.img", "is_root_device": true}"#,
        MISMATCH,
    ),
    (
        "PUT",
        "/drives/a",
        r#"{"drive_id": "a", "path_on_host": "/nope", "is_root_device": true}"#,
        "No such file",
    ),
    (
        "PUT",
        "/drives/a",
        r#"{"drive_id": "a", "path_on_host": "disk.img", "is_root_device": true}"#,
        DONE,
    ),
    (
        "PUT",
        "/drives/b",
        r#"{"drive_id": "b", "path_on_host": "disk.img", "is_root_device": true}"#,
        "A root block device already exists",
    ),
    ("PATCH", "/drives/a", r#"{"drive_id": "a", "path_on_host": "disk.img"}"#, BEFORE),
    ("PUT", "/network-interfaces/eth0", r#"{"iface_id": "eth0"}"#, "missing field `host_dev_name`"),
    (
        "PUT",
        "/network-interfaces/eth0",
        r#"{"iface_id": "eth1", "host_dev_name": "tap0"}"#,
        MISMATCH,
    ),
    ("PUT", "/network-interfaces/eth0", r#"{"iface_id": "eth0", "host_dev_name": "tap0"}"#, DONE),
    ("PATCH", "/network-interfaces/eth0", r#"{"iface_id": "eth0"}"#, BEFORE),
    ("PUT", "/vsock/vsock0", r#"{"guest_cid": 3, "uds_path": "v.sock"}"#, DONE),
    ("PUT", "/vsock", r#"{"guest_cid": 3, "uds_path": "v.sock"}"#, DONE),
    ("PUT", "/entropy", "{}", DONE),
    ("PUT", "/entropy", r#"{"x": 1}"#, "unknown field `x`, expected `rate_limiter`"),
    ("PUT", "/serial", r#"{"serial_out_path": "serial.log"}"#, DONE),
    ("PUT", "/cpu-config", "{}", DONE),
    ("PUT", "/mmds/config", "{}", "missing field `network_interfaces`"),
    (
        "PUT",
        "/mmds/config",
        r#"{"network_interfaces": ["nope"]}"#,
        "does not correspond to any existing network interface.",
    ),
    (
        "PUT",
        "/mmds/config",
        r#"{"network_interfaces": ["eth0"], "version": "V3"}"#,
        "unknown variant `V3`, expected `V1` or `V2`",
    ),
    ("PUT", "/mmds/config", r#"{"network_interfaces": ["eth0"], "version": "V2"}"#, DONE),
    ("PUT", "/mmds", r#"{"a": 1}"#, DONE),
    ("PATCH", "/mmds", r#"{"b": 2}"#, DONE),
    ("PUT", "/hotplug/memory", r#"{"total_size_mib": 1024}"#, DONE),
    ("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 128}"#, BEFORE),
    ("PUT", "/balloon", r#"{"amount_mib": 0}"#, "missing field `deflate_on_oom`"),
    ("PUT", "/balloon", r#"{"amount_mib": 0, "deflate_on_oom": false}"#, DONE),
    ("PATCH", "/balloon", r#"{"amount_mib": 1}"#, BEFORE),
    ("PUT", "/metrics", r#"{"metrics_path": "metrics"}"#, DONE),
    (
        "PUT",
        "/metrics",
        r#"{"metrics_path": "metrics"}"#,
        "Reinitialization of metrics not allowed.",
    ),
    ("PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#, BEFORE),
    ("PUT", "/actions", r#"{"action_type": "SendCtrlAltDel"}"#, BEFORE),
    ("PATCH", "/vm", r#"{"state": "Paused"}"#, BEFORE),
    ("PATCH", "/vm", r#"{"state": "Resumed"}"#, BEFORE),
];

const AFTER_THE_START: &[Row] = &[
    ("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128}"#, AFTER),
    ("PATCH", "/machine-config", r#"{"vcpu_count": 1}"#, AFTER),
    ("PUT", "/boot-source", r#"{"kernel_image_path": "vmlinux"}"#, AFTER),
    (
        "PUT",
        "/drives/b",
        r#"{"drive_id": "b", "path_on_host": "disk.img", "is_root_device": false}"#,
        AFTER,
    ),
    ("PUT", "/network-interfaces/eth1", r#"{"iface_id": "eth1", "host_dev_name": "tap1"}"#, AFTER),
    ("PUT", "/vsock", r#"{"guest_cid": 4, "uds_path": "w.sock"}"#, AFTER),
    ("PUT", "/entropy", "{}", AFTER),
    ("PUT", "/serial", "{}", AFTER),
    ("PUT", "/cpu-config", "{}", AFTER),
    ("PUT", "/mmds/config", r#"{"network_interfaces": ["eth0"]}"#, AFTER),
    ("PUT", "/mmds", r#"{"a": 2}"#, DONE),
    ("PUT", "/hotplug/memory", r#"{"total_size_mib": 1024}"#, AFTER),
    ("PUT", "/balloon", r#"{"amount_mib": 0, "deflate_on_oom": false}"#, AFTER),
    ("PATCH", "/balloon", r#"{"amount_mib": 1}"#, DONE),
    ("PATCH", "/balloon", r#"{"amount_mib": 1000000}"#, "too large"),
    ("PUT", "/logger", r#"{"level": "Info"}"#, AFTER),
    ("PUT", "/metrics", r#"{"metrics_path": "again"}"#, AFTER),
    ("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#, AFTER),
    ("PATCH", "/drives/a", r#"{"drive_id": "b", "path_on_host": "disk.img"}"#, MISMATCH),
    (
        "PATCH",
        "/drives/a",
        r#"{"drive_id": "a", "is_read_only": true}"#,
        "unknown field `is_read_only`",
    ),
    ("PATCH", "/drives/nope", r#"{"drive_id": "nope", "path_on_host": "disk.img"}"#, "nope"),
    ("PATCH", "/drives/a", r#"{"drive_id": "a", "path_on_host": "disk.img"}"#, DONE),
    ("PATCH", "/network-interfaces/eth0", r#"{"iface_id": "eth9"}"#, MISMATCH),
    ("PATCH", "/network-interfaces/eth0", r#"{"iface_id": "eth0"}"#, DONE),
    ("PATCH", "/vm", r#"{"state": "Paused"}"#, DONE),
    ("PATCH", "/vm", r#"{"state": "Paused"}"#, DONE),
    ("PATCH", "/vm", r#"{"state": "Resumed"}"#, DONE),
    ("PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#, DONE),
    ("PUT", "/actions", r#"{"action_type": "SendCtrlAltDel"}"#, DONE),
];

/// Makes the requests; each is answered as its row says.
fn try_all(api: &Api, rows: &[Row]) {
    for (method, path, body, expected) in rows {
        let reply = api.request(method, path, body);
        if expected.is_empty() {
            assert_eq!((reply.status, &*reply.body), (204, ""), "{method} {path} {body}");
            assert!(!reply.head.to_lowercase().contains("content-length"), "{}", reply.head);
            continue;
        }
        let fault = reply.fault();
        assert!(fault.contains(expected), "{method} {path} {body}: {fault}");
        if ["missing field", "unknown ", "invalid type"].iter().any(|w| expected.starts_with(w)) {
            assert!(fault.starts_with(BODY) && fault.ends_with('.'), "{fault}");
        }
    }
}

#[test]
fn requests_are_answered_as_firecracker_answers_them() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    scratch.sparse("disk.img", 1 << 20);
    let vm = Husk::new(["api"]).in_directory(&scratch).within(&network);
    let vm = vm.listening_at(&scratch.path("api.sock")).start();
    let api = vm.api();
    let defaults = json!({"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false,
                          "huge_pages": "None"});
    assert_eq!(api.get("/machine-config").json(), defaults);
    try_all(&api, ALWAYS);
    try_all(&api, BEFORE_THE_START);
    // Put, then changed in part.
    let machine = api.get("//machine-config/").json();
    assert_eq!((&machine["vcpu_count"], &machine["mem_size_mib"]), (&json!(2), &json!(64)));
    let config = api.get("/vm/config").json();
    for key in [
        "balloon",
        "boot-source",
        "cpu-config",
        "drives",
        "entropy",
        "logger",
        "machine-config",
        "memory-hotplug",
        "metrics",
        "mmds-config",
        "network-interfaces",
        "pmem",
        "vsock",
    ] {
        assert!(config.get(key).is_some(), "{key} is not shown");
    }
    assert_eq!(config["logger"], Value::Null);
    let source = json!({"kernel_image_path": guest("hello"), "boot_args": "how=hang"});
    api.put("/boot-source", source).done();
    api.act("InstanceStart").done();
    try_all(&api, ALWAYS);
    try_all(&api, AFTER_THE_START);
    assert_eq!(api.state(), "Running");
}

#[test]
fn deprecated_fields_are_told_of() {
    let vm = Husk::api().start();
    let put = |id: &str| {
        let body = format!(r#"{{{id}"guest_cid": 3, "uds_path": "v.sock"}}"#);
        let reply = vm.api().put("/vsock", body);
        reply.done();
        reply.head.to_ascii_lowercase().contains("\r\ndeprecation: true\r\n")
    };
    assert!(put(r#""vsock_id": "vsock0", "#));
    assert!(!put(""));
}

#[test]
fn nested_json_is_refused_by_every_endpoint() {
    let vm = Husk::api().start();
    let document = vm.api().get("/openapi.json").json();
    for (method, path) in
        operations(&document).filter(|(method, _)| ["PUT", "PATCH"].contains(&&**method))
    {
        for nest in [r#"{"a":"#, "[", r#"{"drives":["#] {
            // As deep as a body may be large.
            let body = nest.repeat(50_000 / nest.len());
            vm.api().request(&method, &path.replace("{id}", "a"), &body).fault();
        }
    }
    // As deep as serde reads.
    let deep = r#"{"a":"#.repeat(126) + "1" + &"}".repeat(126);
    vm.api().put("/mmds", &deep).done();
    vm.api().patch("/mmds", &deep).done();
    assert_eq!(vm.api().get("/mmds").body, deep);
}

#[test]
fn client_that_waits_to_be_told_to_go_on_is_told() {
    let vm = Husk::api().start();
    let mut stream = vm.api().connect();
    let head = "PUT /entropy HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let reply = Reply::read(&mut reader);
    assert_eq!(reply.status, 100);
    stream.write_all(b"{}").unwrap();
    Reply::read(&mut reader).done();
}

#[test]
fn what_is_no_request_is_told_so_and_hung_up_on() {
    let vm = Husk::api().start();
    for nonsense in
        ["nonsense\r\n\r\n", "GET\r\n\r\n", "PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
    {
        let mut stream = vm.api().connect();
        stream.write_all(nonsense.as_bytes()).unwrap();
        let reply = Reply::read(&mut BufReader::new(stream));
        assert_eq!(reply.status, 400, "{nonsense}");
        let body: Value = serde_json::from_str(&reply.body).unwrap();
        let text = body["error"].as_str().unwrap();
        assert!(text.ends_with("\nAll previous unanswered requests will be dropped."), "{text}");
    }
}
