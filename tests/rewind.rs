//! Going back to a snapshot in place.
use std::path::Path;

use serde_json::{Value, json};

use crate::util::*;

/// The guest `pages`, which does what is typed.
fn pages(cmdline: &str) -> Husk {
    Husk::guest("pages", cmdline).listening().typing()
}

fn snapshot(vm: &TestVm, directory: &Path) {
    vm.api().put("/snapshot/create", json!({"directory": directory})).done();
}

fn rewind(vm: &TestVm, params: Value) {
    vm.api().put("/snapshot/rewind", params).done();
}

/// Types a command, and waits for what the guest says.
#[track_caller]
fn tell(vm: &TestVm, command: &str, answer: &str) {
    vm.type_in(command);
    let line = vm.expect("=");
    assert_eq!(line, answer, "{command}");
}

#[test]
fn memory_and_registers_go_back_again_and_again() {
    let scratch = Scratch::new();
    let directory = scratch.path("snapshot");
    let vm = pages("count=1000").start();
    vm.expect("ready=1");
    let refused = vm.api().put("/snapshot/rewind", json!({})).fault();
    assert!(refused.contains("neither restored nor saved"), "{refused}");
    tell(&vm, "w", "round=1");
    snapshot(&vm, &directory);
    for round in 0..20 {
        // The first time memory is mapped anew, later only what was written goes.
        tell(&vm, "w", "round=2");
        tell(&vm, "w", "round=3");
        tell(&vm, "c", "pages=1..3");
        tell(&vm, "s", "window=B");
        rewind(&vm, json!({}));
        tell(&vm, "v", "window=A");
        tell(&vm, "c", "pages=1..1");
        if round % 5 == 4 {
            // A later moment takes the place of the one before.
            snapshot(&vm, &directory);
        }
    }
    vm.type_in("q");
    vm.wait().ok();
}

#[test]
fn a_restored_vm_goes_back_to_what_it_was_restored_from() {
    let scratch = Scratch::new();
    let directory = scratch.path("snapshot");
    let first = pages("count=1000").start();
    first.expect("ready=1");
    tell(&first, "w", "round=1");
    snapshot(&first, &directory);
    first.api().act("Kill").done();

    let vm = Husk::api().typing().start();
    vm.api().put("/snapshot/load", json!({"directory": directory, "resume_vm": true})).done();
    for _ in 0..5 {
        tell(&vm, "w", "round=2");
        tell(&vm, "s", "window=B");
        assert_eq!(vm.api().state(), "Running");
        rewind(&vm, json!({"resume_vm": false}));
        assert_eq!(vm.api().state(), "Paused");
        rewind(&vm, json!({"directory": directory, "resume_vm": true}));
        tell(&vm, "v", "window=A");
        tell(&vm, "c", "pages=1..1");
    }
    vm.type_in("q");
    vm.wait().ok();
}
