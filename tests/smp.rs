//! Several CPUs that all run: after a restore, a rewind and a fork each goes on from where it was, as who it was, and
//! their clocks agree.
use serde_json::json;

use crate::fork::{Child, fork};
use crate::util::*;

/// By how many ticks a TSC may seem to be behind that of another CPU: a processor reads it some instructions early.
/// Where KVM shows the host's TSC as it is, none can be.
const BACK_MAX: u64 = 10_000;

/// The guest `busy` after its first mark, all of whose CPUs run.
fn parent(husk: Husk, cpus: u32) -> TestVm {
    let vm = husk.start();
    vm.expect("ready=1");
    assert_all_go_on(&tell(&vm, "c", "going"), cpus);
    assert_eq!(tell(&vm, "m", "mark"), "1");
    vm
}

fn busy(cpus: u32) -> Husk {
    Husk::guest("busy", "").cpus(cpus).memory(16).listening().typing()
}

/// Tells the guest `what`; what it says of `key`.
#[track_caller]
fn tell(vm: &TestVm, what: &str, key: &str) -> String {
    vm.type_in(what);
    let line = vm.expect(&format!("{key}="));
    line.trim_end().split_once('=').unwrap().1.to_owned()
}

/// The guest has seen to the rest before it says so.
#[track_caller]
fn assert_all_go_on(said: &str, cpus: u32) {
    let (going, back) = said.split_once(" back=").unwrap_or_else(|| panic!("{said}"));
    assert_eq!(going, cpus.to_string());
    assert!(back.parse::<u64>().unwrap() < BACK_MAX, "a TSC is {back} ticks behind another");
}

/// It goes on from its first mark.
#[track_caller]
fn assert_goes_on_from_the_mark(vm: &TestVm, cpus: u32) {
    assert_all_go_on(&tell(vm, "c", "going"), cpus);
    assert_eq!(tell(vm, "m", "mark"), "2");
    assert_all_go_on(&tell(vm, "c", "going"), cpus);
}

#[test]
fn every_cpu_goes_on_in_a_clone() {
    for cpus in [2, 4] {
        let scratch = Scratch::new();
        let [first, again] = ["first", "again"].map(|name| scratch.path(name));
        let vm = parent(busy(cpus), cpus);
        vm.api().put("/snapshot/create", json!({ "directory": first })).done();
        assert_goes_on_from_the_mark(&vm, cpus);
        drop(vm);
        let restore =
            |directory| Husk::new(["restore"]).arg(directory).listening().typing().start();
        // Two at once, and the clone of a clone that stands still.
        let [one, other] = [restore(&first), restore(&first)];
        assert_all_go_on(&tell(&one, "c", "going"), cpus);
        one.api().patch("/vm", json!({ "state": "Paused" })).done();
        one.api().put("/snapshot/create", json!({ "directory": again })).done();
        one.api().patch("/vm", json!({ "state": "Resumed" })).done();
        for vm in [one, other, restore(&again)] {
            assert_goes_on_from_the_mark(&vm, cpus);
            vm.type_in("q");
            vm.wait().ok();
        }
    }
}

#[test]
fn every_cpu_goes_back_again_and_again() {
    for cpus in [2, 4] {
        let scratch = Scratch::new();
        let directory = scratch.path("snapshot");
        let vm = parent(busy(cpus), cpus);
        vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
        let restored = Husk::new(["restore"]).arg(&directory).listening().typing().start();
        for vm in [vm, restored] {
            for round in 0..6 {
                assert_goes_on_from_the_mark(&vm, cpus);
                if round % 2 == 1 {
                    vm.api().patch("/vm", json!({ "state": "Paused" })).done();
                }
                vm.api().put("/snapshot/rewind", json!({ "resume_vm": true })).done();
            }
            assert_goes_on_from_the_mark(&vm, cpus);
            vm.type_in("q");
            vm.wait().ok();
        }
    }
}

#[test]
fn every_cpu_goes_on_in_parent_and_children() {
    for cpus in [2, 4] {
        for husk in [busy(cpus), busy(cpus).arg("--forkable")] {
            let scratch = Scratch::new();
            let vm = parent(husk, cpus);
            let mut children = fork(&vm.api(), &scratch, &["a", "b"]);
            let api = children[0].api.clone();
            children.extend(fork(&api, &scratch, &["c"]));
            let check = |child: &mut Child| {
                assert_all_go_on(&child.tell("c", "going"), cpus);
                assert_eq!(child.tell("m", "mark"), "2");
                assert_all_go_on(&child.tell("c", "going"), cpus);
            };
            children.iter_mut().for_each(check);
            assert_goes_on_from_the_mark(&vm, cpus);
            // Those of a child before it: they end with it.
            children.iter_mut().rev().for_each(Child::quit);
            vm.type_in("q");
            vm.wait().ok();
        }
    }
}
