//! Identity: what every VM that goes on from a snapshot has for itself alone.
use std::fs;
use std::path::Path;

use serde_json::json;

use crate::fork::{Child, fork};
use crate::util::*;

/// Where a payload is in the guest's memory.
const PAYLOAD: std::ops::Range<usize> = 0xd_0000..0xe_0000;

/// What the guest `steps` says of itself.
#[derive(Debug, PartialEq, Eq)]
struct Who {
    id: String,
    /// VMClock's.
    counter: String,
    /// The payload's.
    generation: String,
    payload: String,
}

#[track_caller]
fn who(vm: &TestVm) -> Who {
    vm.type_in("i");
    read(vm.expect("identity=").trim_end().split_once('=').unwrap().1)
}

#[track_caller]
fn who_is(child: &mut Child) -> Who {
    read(&child.tell("i", "identity"))
}

fn read(identity: &str) -> Who {
    let mut words = identity.splitn(4, ' ').map(str::to_owned);
    let mut next = || words.next().unwrap_or_default();
    Who { id: next(), counter: next(), generation: next(), payload: next() }
}

fn restore(snapshot: &Path) -> Husk {
    Husk::new(["restore"]).arg(snapshot).listening().typing()
}

#[track_caller]
fn end(vm: TestVm) {
    vm.type_in("q");
    vm.wait().ok();
}

#[test]
fn clones_are_told_apart_and_given_their_own() {
    let scratch = Scratch::new();
    let payload = |name: &str| scratch.file(name, json!({ "name": name }).to_string());
    let parent = Husk::guest("steps", "")
        .memory(16)
        .option("--payload", payload("parent"))
        .listening()
        .typing()
        .start();
    parent.expect("ready=1");
    let before = who(&parent);
    assert_eq!((&*before.counter, &*before.generation), ("0", "0"));
    assert_eq!(before.payload, r#"{"name":"parent"}"#);
    assert_eq!(parent.api().get("/vm/config").json()["payload"], json!(null));
    let directory = scratch.path("snapshot");
    parent.api().put("/snapshot/create", json!({ "directory": directory })).done();
    assert_eq!(who(&parent), before, "a snapshot changes nothing for the VM that it is of");
    // A reset is no other VM.
    parent.type_in("x");
    parent.expect("ready=1");
    assert_eq!(who(&parent), before);
    end(parent);
    let files = fs::read_dir(&directory).unwrap().map(|file| file.unwrap().path());
    let (state, memory): (Vec<_>, Vec<_>) = files.partition(|path| path.ends_with("state"));
    let state = fs::read(&state[0]).unwrap();
    assert!(!state.windows(8).any(|bytes| bytes == br#""parent""#), "a payload is in the state");
    let memory = fs::read(&memory[0]).unwrap();
    assert!(memory[PAYLOAD].iter().all(|byte| *byte == 0), "a payload is in the snapshot");

    let one = restore(&directory).option("--payload", payload("one")).start();
    let other = restore(&directory).start();
    let (first, second) = (who(&one), who(&other));
    assert_eq!(first.payload, r#"{"name":"one"}"#);
    assert_eq!(second.payload, "");
    for clone in [&first, &second] {
        assert_eq!((&*clone.counter, &*clone.generation), ("1", "1"));
        assert_ne!(clone.id, before.id);
    }
    assert_ne!(first.id, second.id);
    one.type_in("x");
    one.expect("ready=1");
    assert_eq!(who(&one), first, "a clone stays who it is over a reset");

    // One that goes back is another VM again, and stays that one, too.
    other.api().put("/snapshot/rewind", json!({})).done();
    let back = who(&other);
    assert_eq!((&*back.counter, back.id == second.id), ("2", false));
    other.type_in("x");
    other.expect("ready=1");
    assert_eq!(who(&other), back, "a rewind is not undone by a reset");

    // The clone of a clone.
    let again = scratch.path("again");
    one.api().put("/snapshot/create", json!({ "directory": again })).done();
    let third = restore(&again).start();
    let of_third = who(&third);
    assert_eq!((&*of_third.counter, &*of_third.payload), ("2", ""));
    assert!(![&before.id, &first.id, &second.id].contains(&&of_third.id));
    for vm in [one, other, third] {
        end(vm);
    }
}

/// Children, their children, and what goes back: each is another one, and whom it comes from is who it was.
#[test]
fn children_and_what_goes_back_are_told_apart() {
    let steps = || {
        let payload = "{\"name\":\"parent\"}";
        let scratch = Scratch::new();
        let payload = scratch.file("payload", payload);
        let vm = Husk::guest("steps", "").memory(16).option("--payload", payload);
        (scratch, vm.listening().typing())
    };
    for is_forkable in [false, true] {
        let (scratch, husk) = steps();
        let vm = if is_forkable { husk.arg("--forkable") } else { husk }.start();
        vm.expect("ready=1");
        let mut all = vec![who(&vm)];
        assert_eq!((&*all[0].counter, &*all[0].generation), ("0", "0"));
        let mut children = fork(&vm.api(), &scratch, &["a", "b"]);
        assert_eq!(who(&vm), all[0], "a fork changes nothing for the parent");
        let both: Vec<_> = children.iter_mut().map(who_is).collect();
        let mut grand = fork(&children[0].api.clone(), &scratch, &["c"]);
        assert_eq!(who_is(&mut children[0]), both[0], "a fork changes nothing for the parent");
        let third = who_is(&mut grand[0]);
        for (is, counter) in [(&both[0], "1"), (&both[1], "1"), (&third, "2")] {
            assert_eq!((&*is.counter, &*is.generation), (counter, counter));
            assert_eq!(is.payload, "", "a payload is for one VM");
        }
        all.extend(both);
        all.push(third);

        let directory = scratch.path("snapshot");
        vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
        assert_eq!(who(&vm), all[0], "a snapshot changes nothing for the VM that it is of");
        for counter in ["1", "2"] {
            vm.api().put("/snapshot/rewind", json!({})).done();
            let is = who(&vm);
            assert_eq!((&*is.counter, &*is.generation), (counter, counter));
            assert_eq!(is.payload, all[0].payload, "it is still the payload of this VM");
            all.push(is);
        }
        // As a child of what has gone back.
        let mut late = fork(&vm.api(), &scratch, &["d"]);
        let is = who_is(&mut late[0]);
        assert_eq!((&*is.counter, &*is.generation), ("3", "3"));
        all.push(is);
        let ids: std::collections::BTreeSet<_> = all.iter().map(|who| &who.id).collect();
        assert_eq!(ids.len(), all.len(), "{all:?}");
        children.into_iter().chain(grand).chain(late).for_each(|mut child| child.quit());
        end(vm);
    }
}

#[test]
fn a_payload_goes_in_by_the_api_and_never_comes_out() {
    let scratch = Scratch::new();
    let log = scratch.path("log");
    let api = || {
        let vm = Husk::api().typing().start();
        vm.api().put("/logger", json!({ "log_path": log, "level": "Trace" })).done();
        vm
    };
    let vm = api();
    vm.api().put("/payload", json!({ "secret": "s3cret-one" })).done();
    vm.api().put("/payload", json!("x".repeat(49_000))).done();
    vm.api().put("/payload", json!(null)).done();
    vm.api().put("/payload", json!({ "secret": "s3cret-two" })).done();
    let source = json!({ "kernel_image_path": guest("steps"), "boot_args": "" });
    vm.api().put("/boot-source", source).done();
    vm.api().put("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 16 })).done();
    vm.api().put("/actions", json!({ "action_type": "InstanceStart" })).done();
    vm.expect("ready=1");
    assert_eq!(who(&vm).payload, r#"{"secret":"s3cret-two"}"#);
    let directory = scratch.path("snapshot");
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
    end(vm);

    let clone = api();
    let load = json!({ "directory": directory, "resume_vm": true,
                       "overrides": { "payload": { "secret": "s3cret-three" } } });
    clone.api().put("/snapshot/load", load).done();
    assert_eq!(who(&clone).payload, r#"{"secret":"s3cret-three"}"#);
    assert!(!clone.api().get("/vm/config").json().to_string().contains("s3cret"));
    end(clone);
    let said = fs::read_to_string(&log).unwrap();
    assert!(said.contains("/payload") && said.contains("/snapshot/load"), "{said}");
    assert!(!said.contains("s3cret"), "{said}");
}
