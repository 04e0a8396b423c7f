//! Snapshots of memory that changes shape: plugged while the guest runs, or given back by a balloon.
use serde_json::json;

use crate::util::*;

const MIB: u64 = 1 << 20;

fn load(directory: &std::path::Path) -> TestVm {
    let vm = Husk::api().start();
    vm.api().put("/snapshot/load", json!({"directory": directory, "resume_vm": true})).done();
    vm
}

#[test]
fn plugged_memory_is_in_a_snapshot() {
    let scratch = Scratch::new();
    let husk = Husk::guest("mem", "steps=4").option("--hotplug-memory", "256").listening();
    let vm = husk.start();
    vm.expect("ready=1");
    let request =
        |vm: &TestVm, mib| vm.api().patch("/hotplug/memory", json!({"requested_size_mib": mib}));
    request(&vm, 64).done();
    vm.expect("plugged=64");
    let first = scratch.path("first");
    vm.api().put("/snapshot/create", json!({"directory": first})).done();
    drop(vm);

    // It checks every page of what it has at each step, and that new memory is zero.
    let vm = load(&first);
    assert_eq!(vm.api().get("/hotplug/memory").json()["plugged_size_mib"], 64);
    request(&vm, 32).done();
    vm.expect("plugged=32");
    request(&vm, 128).done();
    vm.expect("plugged=128");
    // Of memory that is a snapshot's in part, in part new.
    let second = scratch.path("second");
    vm.api().put("/snapshot/create", json!({"directory": second})).done();
    drop(vm);

    let vm = load(&second);
    request(&vm, 130).done();
    vm.expect("plugged=130");
    vm.wait().ok();
    let held = |directory: &std::path::Path| {
        let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
        let memory = files.map(|f| f.metadata().unwrap()).max_by_key(|meta| meta.len()).unwrap();
        (memory.len(), std::os::unix::fs::MetadataExt::blocks(&memory) * 512)
    };
    let (len, held) = held(&second);
    assert!(len >= 256 * MIB && (128 * MIB..160 * MIB).contains(&held), "{len}, {held}");
}

/// What a restored guest gives back is a private mapping's of a file, which must not shine through.
#[test]
fn memory_that_a_restored_guest_gives_back_is_zero() {
    for by in ["inflate", "report"] {
        let scratch = Scratch::new();
        let husk = Husk::guest("balloon", &format!("mib=48 by={by}")).memory(128);
        let vm = husk.option("--balloon", "0,stats=60,hinting,reporting").listening().start();
        let target =
            |vm: &TestVm, mib| vm.api().patch("/balloon", json!({"amount_mib": mib})).done();
        vm.expect("touched=48");
        let [touched, given] = ["touched", "given"].map(|name| scratch.path(name));
        vm.api().put("/snapshot/create", json!({"directory": touched})).done();
        drop(vm);

        let vm = load(&touched);
        target(&vm, 48);
        vm.expect("given=48");
        vm.api().put("/snapshot/create", json!({"directory": given})).done();
        let before = resident_kib(vm.pid()).unwrap();
        target(&vm, 1);
        // That it reads zero there is the guest's to say.
        vm.expect("taken=48");
        let after = resident_kib(vm.pid()).unwrap();
        assert!(after >= before + (44 << 10), "{before} KiB, then {after}");
        drop(vm);

        let vm = load(&given);
        target(&vm, 1);
        vm.expect("taken=48");
        target(&vm, 2);
        vm.wait().ok();
    }
}
