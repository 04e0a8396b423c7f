//! RAM above the hole below 4 GiB, which in an image of memory follows what is below it: saved, restored, put back and
//! forked with all of its pages written.
use std::path::Path;

use serde_json::{Value, json};

use crate::fork::fork;
use crate::util::*;

/// 3 GiB below the hole, and 1,024 pages above it.
const MIB: u64 = (3 << 10) + 4;

/// The guest `pages`, with those above 4 GiB.
fn pages() -> Husk {
    Husk::guest("pages", "high").memory(MIB).listening().typing()
}

#[track_caller]
fn create(vm: &TestVm, directory: &Path, more: Value) {
    let mut params = more;
    params["directory"] = json!(directory);
    vm.api().put("/snapshot/create", params).done();
}

#[test]
fn each_moment_of_it_comes_back() {
    let scratch = Scratch::new();
    let path = |name: &str| scratch.path(name);
    for is_tracked in [true, false] {
        let vm = Husk::api().typing().start();
        let source = json!({ "kernel_image_path": guest("pages"), "boot_args": "high" });
        vm.api().put("/boot-source", source).done();
        let machine =
            json!({ "vcpu_count": 1, "mem_size_mib": MIB, "track_dirty_pages": is_tracked });
        vm.api().put("/machine-config", machine).done();
        vm.api().act("InstanceStart").done();
        vm.expect("ready=1");
        let mut moments = Vec::new();
        for (commands, name, more) in [
            ("wh", "full", json!({})),
            ("wh", "diff", json!({ "snapshot_type": "Diff" })),
            ("zh", "packed", json!({ "snapshot_type": "Diff", "compression": "lz4" })),
            ("wwh", "alone", json!({ "compression": "lz4" })),
        ] {
            let sum = tell(&vm, commands);
            create(&vm, &path(name), more);
            moments.push((path(name), sum));
        }
        assert_eq!(tell(&vm, "c"), "pages=0..4");
        // In place, and in another process.
        for (directory, sum) in &moments {
            let back = json!({ "directory": directory });
            vm.api().put("/snapshot/rewind", back).done();
            assert_eq!(tell(&vm, "h"), *sum, "{}", directory.display());
            assert_ne!(tell(&vm, "wh"), *sum);
            vm.api().put("/snapshot/rewind", json!({})).done();
            assert_eq!(tell(&vm, "h"), *sum, "{}, again", directory.display());
        }
        drop(vm);
        let merged = path("merged");
        Husk::new(["snapshot", "merge"]).arg(path("packed")).option("-o", &merged).wait().code(0);
        Husk::new(["snapshot", "verify"]).arg(&merged).wait().code(0);
        moments.push((merged.clone(), moments[2].1.clone()));
        for (directory, sum) in &moments {
            let vm = Husk::new(["restore"]).arg(directory).typing().start();
            assert_eq!(tell(&vm, "h"), *sum, "{}", directory.display());
            assert_ne!(tell(&vm, "wh"), *sum);
            vm.type_in("q");
            vm.wait().ok();
        }
        std::fs::remove_dir_all(&merged).unwrap();
    }
}

#[test]
fn parent_and_children_each_have_their_own_of_it() {
    for husk in [pages(), pages().arg("--forkable")] {
        let (scratch, vm) = (Scratch::new(), husk.start());
        vm.expect("ready=1");
        let first = tell(&vm, "wh");
        let first = first.strip_prefix("sum=").unwrap();
        let mut children = fork(&vm.api(), &scratch, &["a", "b"]);
        assert_ne!(tell(&vm, "wh"), format!("sum={first}"));
        assert_eq!(children[0].tell("h", "sum"), first);
        assert_eq!(children[0].tell("z", "zero"), "1");
        let second = children[0].tell("h", "sum");
        assert_ne!(second, first);
        let mut grand = fork(&children[0].api.clone(), &scratch, &["c"]);
        assert_eq!(children[0].tell("w", "round"), "2");
        assert_eq!(grand[0].tell("h", "sum"), second);
        assert_eq!(children[1].tell("h", "sum"), first);
        assert_eq!(tell(&vm, "c"), "pages=1..2");
        children.iter_mut().chain(&mut grand).for_each(|child| child.quit());
        vm.type_in("q");
        vm.wait().ok();
    }
}
