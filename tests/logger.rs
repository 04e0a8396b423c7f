//! The log goes where `PUT /logger` says, as much of it as that says, and holds nothing up there.
use std::fs::{self, File};
use std::io::Read;

use serde_json::{Value, json};

use crate::util::*;

/// Has a request logged that can be told from others by `mark`.
fn mark(api: &Api, mark: &str) {
    let fault = api.get(&format!("/{mark}")).fault();
    assert!(fault.contains(mark), "{fault}");
}

/// Whether the log has the requests of `mark`s, and no others.
#[track_caller]
fn check_marks(log: &str, marks: &[&str]) {
    let found: Vec<&str> = log
        .lines()
        .filter_map(|l| l.split_once("request on \"/mark-")?.1.split('"').next())
        .collect();
    assert_eq!(found, marks, "{log}");
}

#[test]
fn fifo_that_nobody_reads_loses_lines_and_nothing_else() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let api = vm.api();
    let fifo = scratch.fifo("fifo");
    api.put("/logger", json!({"log_path": fifo, "level": "Trace"})).done();
    api.put("/boot-source", json!({"kernel_image_path": guest("hello"), "boot_args": "how=hang"}))
        .done();
    api.act("InstanceStart").done();
    // More than a pipe holds.
    for _ in 0..60 {
        api.put(&format!("/{}", "x".repeat(1500)), "{}").fault();
    }
    assert_eq!(api.state(), "Running");
    let mut reader = File::options().read(true).write(true).open(&fifo).unwrap();
    let mut bytes = vec![0; 1 << 20];
    let held = reader.read(&mut bytes).unwrap();
    assert!(held > 32 << 10, "{held}");
    mark(&api, "mark-heard");
    let count = reader.read(&mut bytes).unwrap();
    let said = String::from_utf8_lossy(&bytes[..count]);
    let lost =
        said.lines().find_map(|line| line.strip_suffix(" log lines were lost")).expect(&said);
    assert!(lost.strip_prefix("husk: ").unwrap().parse::<u32>().unwrap() > 10, "{said}");
    check_marks(&said, &["heard"]);
    // Its reader goes again: no SIGPIPE.
    drop(reader);
    mark(&api, "mark-unheard");
    api.act("Kill").done();
    vm.wait().code(0);
}

#[test]
fn disk_that_is_full_loses_lines_and_nothing_else() {
    let vm = Husk::api().start();
    let api = vm.api();
    api.put("/logger", json!({"log_path": "/dev/full", "level": "Trace"})).done();
    for _ in 0..10 {
        mark(&api, "mark-lost");
    }
    assert_eq!(api.state(), "Not started");
    vm.signal(Signal::TERM);
    vm.wait().code(143);
}

#[test]
fn second_put_changes_what_it_names() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let api = vm.api();
    let (first, second) = (scratch.path("first"), scratch.path("second"));
    api.put("/logger", json!({"log_path": first, "level": "Info", "show_level": true})).done();
    mark(&api, "mark-1");
    api.put("/logger", json!({"level": "WARN"})).done();
    mark(&api, "mark-2");
    api.put("/logger", json!({"level": "info", "show_log_origin": true})).done();
    mark(&api, "mark-3");
    // It is the file that is written to, not its name.
    let moved = scratch.path("moved");
    fs::rename(&first, &moved).unwrap();
    api.put("/logger", json!({"show_level": false, "module": "husk::api::http"})).done();
    mark(&api, "mark-4");
    api.put("/logger", json!({"module": "husk::machine"})).done();
    mark(&api, "mark-5");
    api.put("/logger", json!({"module": "", "log_path": second})).done();
    mark(&api, "mark-6");
    assert!(!first.exists());
    let shown = api.get("/vm/config").json()["logger"].clone();
    let expected = json!({"level": "Info", "log_path": second, "show_level": false,
                          "show_log_origin": true, "module": ""});
    assert_eq!(shown, expected);
    vm.signal(Signal::TERM);
    let end = vm.wait().code(143);
    check_marks(&end.errors, &[]);
    let moved = fs::read_to_string(moved).unwrap();
    check_marks(&moved, &["1", "3", "4"]);
    let line = |log: &str, mark| log.lines().find(|l| l.contains(mark)).unwrap().to_owned();
    assert!(line(&moved, "mark-1").starts_with("husk: info: The API server"), "{moved}");
    assert!(line(&moved, "mark-3").starts_with("husk: info: src/api/http.rs:"), "{moved}");
    assert!(line(&moved, "mark-4").starts_with("husk: src/api/http.rs:"), "{moved}");
    check_marks(&fs::read_to_string(second).unwrap(), &["6"]);
}

#[test]
fn nothing_is_logged_when_it_is_off() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let api = vm.api();
    let log = scratch.path("log");
    api.put("/logger", json!({"log_path": log, "level": "Off"})).done();
    mark(&api, "mark-1");
    let said = fs::read_to_string(&log).unwrap();
    check_marks(&said, &[]);
    let fault = api.put("/logger", json!({"level": "loud"})).fault();
    assert!(fault.contains("unknown variant `loud`, expected one of `Off`, "), "{fault}");
    assert_eq!(api.get("/vm/config").json()["logger"]["level"], Value::from("Off"));
}
