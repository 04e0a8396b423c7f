//! Snapshots of what has changed, and of memory that changes shape: plugged while the guest runs, or given back by a
//! balloon.
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, seek};
use serde_json::{Value, json};

use crate::fork::wait_until;
use crate::never_torn::Strace;
use crate::util::*;

const MIB: u64 = 1 << 20;

fn load(directory: &Path) -> TestVm {
    load_with(json!({"directory": directory}))
}

fn load_with(mut params: Value) -> TestVm {
    let vm = Husk::api().typing().start();
    params["resume_vm"] = true.into();
    vm.api().put("/snapshot/load", params).done();
    vm
}

/// Why a snapshot is not loaded.
fn refusal(params: Value) -> String {
    Husk::api().start().api().put("/snapshot/load", params).fault()
}

/// The guest `pages` with 1,000 of them, and whether KVM remembers what it writes.
fn pages(is_tracked: bool) -> TestVm {
    let vm = Husk::api().typing().start();
    boot_pages(&vm, is_tracked);
    vm
}

fn boot_pages(vm: &TestVm, is_tracked: bool) {
    let (api, kernel) = (vm.api(), guest("pages"));
    let args = "count=1000";
    api.put("/boot-source", json!({"kernel_image_path": kernel, "boot_args": args})).done();
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 64, "track_dirty_pages": is_tracked});
    api.put("/machine-config", machine).done();
    api.act("InstanceStart").done();
    vm.expect("ready=1");
}

fn create(vm: &TestVm, directory: &Path, kind: &str) {
    let params = json!({"directory": directory, "snapshot_type": kind});
    vm.api().put("/snapshot/create", params).done();
}

/// The memory file in a directory.
fn memory_of(directory: &Path) -> PathBuf {
    let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    files.max_by_key(|path| path.metadata().unwrap().len()).unwrap()
}

/// KiB that a file takes.
fn held_kib(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() / 2
}

/// Copies what is in a file over another one, as the tools for Firecracker's snapshots do.
fn copy_data(from: &Path, to: &Path) {
    let (from, to) = (File::open(from).unwrap(), File::options().write(true).open(to).unwrap());
    let mut at = 0;
    while let Ok(start) = seek(&from, SeekFrom::Data(at)) {
        at = seek(&from, SeekFrom::Hole(start)).unwrap();
        let mut bytes = vec![0; (at - start) as usize];
        from.read_exact_at(&mut bytes, start).unwrap();
        to.write_all_at(&bytes, start).unwrap();
    }
}

fn merge(directory: &Path, output: &Path) {
    let args = ["snapshot", "merge", directory.to_str().unwrap(), "-o", output.to_str().unwrap()];
    Husk::new(args).wait().code(0);
}

#[test]
fn each_moment_of_a_chain_comes_back() {
    for is_tracked in [true, false] {
        let scratch = Scratch::new();
        let vm = pages(is_tracked);
        let mut sums = Vec::new();
        let moments = [("w", "Full"), ("w", "Diff"), ("z", "Diff"), ("ww", "Diff"), ("c", "Diff")];
        for (n, (commands, kind)) in moments.into_iter().enumerate() {
            tell(&vm, commands);
            let sum = tell(&vm, "h");
            let directory = scratch.path(&format!("moment{n}"));
            create(&vm, &directory, kind);
            sums.push((directory, sum));
        }
        // 500 pages, then what the guest does besides; without a record all that is there.
        let held: Vec<_> = sums.iter().map(|(path, _)| held_kib(&memory_of(path))).collect();
        if is_tracked {
            assert!((2000..2400).contains(&held[1]) && held[2] < 400 && held[4] < 400, "{held:?}");
        }
        vm.api().patch("/vm", json!({"state": "Paused"})).done();
        let [last, all, merged] = ["last", "all", "merged"].map(|name| scratch.path(name));
        create(&vm, &last, "Diff");
        create(&vm, &all, "Full");
        drop(vm);
        for (directory, sum) in &sums {
            let vm = load(directory);
            assert_eq!(tell(&vm, "h"), *sum, "{}", directory.display());
        }
        merge(&last, &merged);
        let [is, want] = [&merged, &all].map(|path| std::fs::read(memory_of(path)).unwrap());
        let differs = |page: &(usize, (&[u8], &[u8]))| page.1.0 != page.1.1;
        let pages = is.chunks(4096).zip(want.chunks(4096)).enumerate();
        let differ: Vec<_> = pages.filter(differs).map(|(n, _)| n).collect();
        // That with the id.
        assert!(is.len() == want.len() && differ.len() == 1, "pages {differ:?}");
        let verified = Husk::new(["snapshot", "verify", merged.to_str().unwrap()]).wait();
        verified.code(0);
        Husk::new(["snapshot", "verify", last.to_str().unwrap()]).wait().code(0);
    }
}

#[test]
fn a_restored_vm_goes_on_with_the_chain() {
    for is_tracked in [true, false] {
        let scratch = Scratch::new();
        let [first, second, third, fourth] =
            ["first", "second", "third", "fourth"].map(|name| scratch.path(name));
        let vm = pages(true);
        tell(&vm, "w");
        create(&vm, &first, "Full");
        tell(&vm, "w");
        create(&vm, &second, "Diff");
        drop(vm);
        let vm = load_with(json!({"directory": second, "track_dirty_pages": is_tracked}));
        let before = tell(&vm, "h");
        tell(&vm, "z");
        create(&vm, &third, "Diff");
        // Not more than what has changed twice: small pieces of a chain are copied when it is loaded.
        assert!(held_kib(&memory_of(&third)) < 1600, "{}", held_kib(&memory_of(&third)));
        tell(&vm, "w");
        let sum = tell(&vm, "h");
        create(&vm, &fourth, "Diff");
        drop(vm);
        let vm = load(&fourth);
        assert_eq!(tell(&vm, "h"), sum);
        // Back to an earlier one, and on from there.
        vm.api().put("/snapshot/rewind", json!({"directory": second})).done();
        assert_eq!(tell(&vm, "h"), before);
        tell(&vm, "z");
        let sum = tell(&vm, "h");
        create(&vm, &fourth, "Diff");
        drop(vm);
        assert_eq!(tell(&load(&fourth), "h"), sum);

        // Nothing goes without what it goes over, and it says so.
        let aside = scratch.path("aside");
        std::fs::rename(&first, &aside).unwrap();
        let refused = refusal(json!({"directory": fourth}));
        assert!(refused.contains("is not to be had at") && refused.contains("first"), "{refused}");
        std::fs::rename(&third, &first).unwrap();
        let refused = refusal(json!({"directory": fourth}));
        assert!(refused.contains("by now"), "{refused}");
    }
}

#[test]
fn what_others_merge_is_loaded() {
    let scratch = Scratch::new();
    let vm = pages(true);
    let names = ["base.state", "base.mem", "diff.state", "diff.mem", "more.mem"];
    let [base_state, base, state, diff, more] = names.map(|name| scratch.path(name));
    let create = |kind: &str, state: &Path, memory: &Path| {
        let files = json!({"snapshot_path": state, "mem_file_path": memory, "snapshot_type": kind});
        vm.api().put("/snapshot/create", files).done();
    };
    let files =
        |state: &Path, memory: &Path| json!({"snapshot_path": state, "mem_file_path": memory});
    tell(&vm, "w");
    create("Full", &base_state, &base);
    tell(&vm, "wz");
    let sum = tell(&vm, "h");
    create("Diff", &state, &diff);
    assert_eq!(tell(&load_with(files(&state, &diff)), "h"), sum);
    copy_data(&diff, &base);
    assert_eq!(tell(&load_with(files(&state, &base)), "h"), sum);
    // The base is another by now, and nothing but the state's own file goes with it.
    let refused = refusal(files(&state, &diff));
    assert!(refused.contains("base.mem"), "{refused}");
    // The next one, onto the same file; its state in the place of the last.
    tell(&vm, "w");
    let sum = tell(&vm, "h");
    create("Diff", &state, &more);
    drop(vm);
    copy_data(&more, &base);
    let vm = load_with(files(&state, &base));
    assert_eq!(tell(&vm, "h"), sum);
    // In the place of what it goes over it is complete.
    tell(&vm, "z");
    let sum = tell(&vm, "h");
    vm.api()
        .put(
            "/snapshot/create",
            json!({"snapshot_path": state, "mem_file_path": base,
            "snapshot_type": "Diff"}),
        )
        .done();
    drop(vm);
    [&base_state, &diff, &more].iter().for_each(|path| std::fs::remove_file(path).unwrap());
    assert_eq!(tell(&load_with(files(&state, &base)), "h"), sum);
}

/// What has changed is known until there is a snapshot of it.
#[test]
fn a_diff_that_fails_loses_nothing() {
    let scratch = Scratch::new();
    let small = scratch.path("small");
    std::fs::create_dir(&small).unwrap();
    let mount = format!("mount -t tmpfs -o size=1m tmpfs {}", small.display());
    let start = || Husk::api().typing().after(&mount).start();
    let [base, first, second] = ["base", "first", "second"].map(|name| scratch.path(name));
    // Half of 1,000 pages do not fit there.
    let does_not_fit = |vm: &TestVm, name: &str| {
        let params = json!({"directory": small.join(name), "snapshot_type": "Diff"});
        let fault = vm.api().put("/snapshot/create", params).fault();
        assert!(fault.contains("No space left on device"), "{fault}");
    };
    let vm = start();
    boot_pages(&vm, true);
    tell(&vm, "w");
    create(&vm, &base, "Full");
    tell(&vm, "w");
    does_not_fit(&vm, "one");
    tell(&vm, "z");
    // The process that copies is killed at its first page.
    let strace = Strace::attach(&vm, &scratch, "pwrite64", "signal=KILL:when=1");
    let params = json!({"directory": scratch.path("killed"), "snapshot_type": "Diff"});
    let fault = vm.api().put("/snapshot/create", params).fault();
    assert!(strace.detach() && fault.contains("ended before it was done"), "{fault}");
    let sum = tell(&vm, "h");
    create(&vm, &first, "Diff");
    drop(vm);

    for is_tracked in [true, false] {
        let vm = start();
        let params =
            json!({"directory": first, "resume_vm": true, "track_dirty_pages": is_tracked});
        vm.api().put("/snapshot/load", params).done();
        assert_eq!(tell(&vm, "h"), sum);
        tell(&vm, "w");
        does_not_fit(&vm, "two");
        tell(&vm, "z");
        let sum = tell(&vm, "h");
        create(&vm, &second, "Diff");
        drop(vm);
        assert_eq!(tell(&load(&second), "h"), sum, "{is_tracked}");
    }
}

/// A snapshot is being written when the VM goes back to another: it is not the parent of what comes then.
#[test]
fn what_is_written_meanwhile_is_no_parent_after_going_back() {
    let scratch = Scratch::new();
    let [base, meanwhile, after] = ["base", "meanwhile", "after"].map(|name| scratch.path(name));
    let vm = pages(true);
    tell(&vm, "w");
    let sum = tell(&vm, "h");
    create(&vm, &base, "Full");
    tell(&vm, "w");
    let later = tell(&vm, "h");
    // In the process that copies.
    let strace = Strace::attach(&vm, &scratch, "pwrite64", "delay_enter=1000000:when=1");
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| create(&vm, &meanwhile, "Full"));
        wait_until(|| vm.copier().is_some());
        vm.api().put("/snapshot/rewind", json!({"directory": base})).done();
        assert!(!writing.is_finished());
        writing.join().unwrap();
    });
    assert!(strace.detach());
    assert_eq!(tell(&vm, "h"), sum);
    create(&vm, &after, "Diff");
    drop(vm);
    assert_eq!(tell(&load(&after), "h"), sum);
    assert_eq!(tell(&load(&meanwhile), "h"), later);
}

/// A chain has an end, and each of its links can be loaded.
#[test]
fn a_long_chain_begins_anew() {
    let scratch = Scratch::new();
    let vm = pages(true);
    tell(&vm, "w");
    let links: Vec<_> = (0..66).map(|n| scratch.path(&format!("link{n}"))).collect();
    for link in &links {
        create(&vm, link, "Diff");
    }
    let sum = tell(&vm, "h");
    drop(vm);
    let held: Vec<_> = links.iter().map(|link| held_kib(&memory_of(link))).collect();
    assert!(held[0] > 4000 && held[64] > 4000 && held[63] < 200 && held[65] < 200, "{held:?}");
    for link in &links[63..] {
        assert_eq!(tell(&load(link), "h"), sum);
    }
}

/// The id of the snapshot in a directory.
fn id_of(directory: &Path) -> Value {
    let args = ["snapshot", "inspect", "--json", directory.to_str().unwrap()];
    let found: Value = serde_json::from_str(&Husk::new(args).wait().code(0).output).unwrap();
    found["id"].clone()
}

/// What a Diff of `vm`, which another VM knows nothing of, is like: by itself, and as the VM is.
#[track_caller]
fn is_complete(vm: &TestVm, directory: &Path) {
    tell(vm, "w");
    let sum = tell(vm, "h");
    create(vm, directory, "Diff");
    vm.expect_error("is complete: snapshot");
    Husk::new(["snapshot", "verify", directory.to_str().unwrap()]).wait().code(0);
    assert_eq!(tell(&load(directory), "h"), sum, "{}", directory.display());
}

/// Others have taken away what a Diff would go over, or have put something else in its place.
#[test]
fn a_diff_of_what_is_gone_is_complete() {
    let scratch = Scratch::new();
    let [base, first, second, third] =
        ["base", "first", "second", "third"].map(|name| scratch.path(name));
    let vm = pages(true);
    tell(&vm, "w");
    create(&vm, &base, "Full");
    drop(vm);
    let (one, other) = (load(&base), load(&base));
    create(&other, &base, "Full");
    is_complete(&one, &first);
    // The next one goes over that.
    tell(&one, "z");
    create(&one, &second, "Diff");
    assert!(held_kib(&memory_of(&second)) < 2000, "{}", held_kib(&memory_of(&second)));
    // And not over it without what it goes over itself.
    std::fs::remove_dir_all(&first).unwrap();
    is_complete(&one, &third);
    std::fs::remove_dir_all(&base).unwrap();
    is_complete(&other, &first);
    // Its state is there, and not its memory.
    std::fs::remove_file(memory_of(&first)).unwrap();
    is_complete(&other, &second);
}

/// A snapshot is refused when it has its place already: it is there, and husk does not count on it.
#[test]
fn a_diff_after_a_snapshot_that_may_not_be_safe_is_complete() {
    let scratch = Scratch::new();
    let [base, diff] = ["base", "diff"].map(|name| scratch.path(name));
    let vm = pages(true);
    tell(&vm, "w");
    create(&vm, &base, "Full");
    let before = id_of(&base);
    // Memory, state, the directory before and after.
    let strace = Strace::attach(&vm, &scratch, "fsync", "error=EIO:when=4");
    let fault = vm.api().put("/snapshot/create", json!({"directory": base})).fault();
    assert!(strace.detach() && fault.contains("cannot sync the directory"), "{fault}");
    assert_ne!(id_of(&base), before);
    is_complete(&vm, &diff);
}

/// Two files are for others to merge, who see what is in them only: what has become zero is, too.
#[test]
fn a_complete_diff_can_be_merged_all_the_same() {
    let scratch = Scratch::new();
    let vm = pages(true);
    let names = ["base.state", "base.mem", "diff.state", "diff.mem"];
    let [base_state, base, state, diff] = names.map(|name| scratch.path(name));
    let files =
        |state: &Path, memory: &Path| json!({"snapshot_path": state, "mem_file_path": memory});
    tell(&vm, "w");
    vm.api().put("/snapshot/create", files(&base_state, &base)).done();
    tell(&vm, "z");
    let sum = tell(&vm, "h");
    std::fs::remove_file(&base_state).unwrap();
    let mut body = files(&state, &diff);
    body["snapshot_type"] = "Diff".into();
    vm.api().put("/snapshot/create", body).done();
    vm.expect_error("is complete: snapshot");
    assert_eq!(tell(&load_with(files(&state, &diff)), "h"), sum);
    copy_data(&diff, &base);
    assert_eq!(tell(&load_with(files(&state, &base)), "h"), sum);
}

/// Memory is copied while the guest writes all of it: a page of another moment would not fit.
#[test]
fn a_busy_guest_is_saved_as_it_was() {
    let scratch = Scratch::new();
    let vm = pages(true);
    tell(&vm, "b");
    let moments: Vec<_> = (0..4).map(|n| scratch.path(&format!("moment{n}"))).collect();
    for (n, directory) in moments.iter().enumerate() {
        create(&vm, directory, if n == 0 { "Full" } else { "Diff" });
    }
    drop(vm);
    for directory in &moments {
        let vm = load(directory);
        vm.type_in("x");
        vm.expect("busy=ok");
    }
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
    let memory = memory_of(&second);
    let (len, held) = (memory.metadata().unwrap().len(), held_kib(&memory) << 10);
    assert!(len >= 256 * MIB && (128 * MIB..160 * MIB).contains(&held), "{len}, {held}");
}

/// Blocks come, go and come again between the snapshots of a chain: none shows what it held before.
#[test]
fn memory_that_is_plugged_between_snapshots_is_as_it_was() {
    for is_tracked in [true, false] {
        let scratch = Scratch::new();
        let [none, more, less, again] =
            ["none", "more", "less", "again"].map(|name| scratch.path(name));
        let vm = Husk::api().start();
        let (api, kernel) = (vm.api(), guest("mem"));
        let source = json!({"kernel_image_path": kernel, "boot_args": "steps=5"});
        api.put("/boot-source", source).done();
        let machine = json!({"vcpu_count": 1, "mem_size_mib": 16, "track_dirty_pages": is_tracked});
        api.put("/machine-config", machine).done();
        api.put("/hotplug/memory", json!({"total_size_mib": 256})).done();
        api.act("InstanceStart").done();
        vm.expect("ready=1");
        // The guest looks at every page of what it has, and that what is new is zero.
        let plug = |vm: &TestVm, mib: u64| {
            let params = json!({"requested_size_mib": mib});
            vm.api().patch("/hotplug/memory", params).done();
            vm.expect(&format!("plugged={mib}"));
        };
        create(&vm, &none, "Full");
        plug(&vm, 16);
        create(&vm, &more, "Diff");
        plug(&vm, 4);
        create(&vm, &less, "Diff");
        plug(&vm, 132);
        create(&vm, &again, "Diff");
        drop(vm);
        for (directory, had, steps) in [
            (&none, 0, &[4, 16, 0, 20, 2][..]),
            (&more, 16, &[20, 4, 16, 2]),
            (&less, 4, &[16, 2, 20]),
            (&again, 132, &[4, 20]),
        ] {
            let vm = load_with(json!({"directory": directory, "track_dirty_pages": is_tracked}));
            let status = vm.api().get("/hotplug/memory").json();
            assert_eq!(status["plugged_size_mib"], had, "{}", directory.display());
            let (last, before) = steps.split_last().unwrap();
            before.iter().for_each(|mib| plug(&vm, *mib));
            // And on from there: what was given back must not shine through from further down.
            let next = scratch.path("next");
            create(&vm, &next, "Diff");
            vm.api().put("/snapshot/rewind", json!({"directory": directory})).done();
            let status = vm.api().get("/hotplug/memory").json();
            assert_eq!(status["plugged_size_mib"], had, "{}", directory.display());
            before.iter().for_each(|mib| plug(&vm, *mib));
            drop(vm);
            let vm = load(&next);
            plug(&vm, *last);
            vm.wait().ok();
            std::fs::remove_dir_all(&next).unwrap();
        }
        let merged = scratch.path("merged");
        merge(&again, &merged);
        let vm = load(&merged);
        plug(&vm, 4);
        plug(&vm, 20);
        vm.wait().ok();
    }
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
