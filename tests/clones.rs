//! Many VMs that go on from one Linux: their random numbers, their names, their disks.
use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::json;

use crate::util::*;

const RESTORED: usize = 50;
const FORKED: usize = 10;
/// Clones that run at the same time: each keeps two processors busy.
const AT_ONCE: usize = 2;

/// What a clone has said of itself.
struct Clone {
    name: String,
    said: String,
}

impl Clone {
    fn values(&self, key: &str) -> Vec<&str> {
        let lines = self.said.lines().map(str::trim_end);
        lines.filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
    }
}

/// Restores as many, some at a time.
fn restored(directory: &Path, scratch: &Scratch) -> Vec<Clone> {
    let mut clones = Vec::new();
    let names: Vec<_> = (0..RESTORED).map(|number| format!("restored-{number}")).collect();
    for names in names.chunks(AT_ONCE) {
        let start = |name: &String| {
            let payload = scratch.file(name, json!({ "hostname": name }).to_string());
            Husk::new(["restore"]).arg(directory).option("--payload", payload).start()
        };
        let running: Vec<_> = names.iter().map(|name| (name, start(name))).collect();
        for (name, vm) in running {
            vm.expect_within("DONE", BOOT);
            clones.push(Clone { name: name.clone(), said: vm.serial.so_far() });
        }
    }
    clones
}

/// Forks as many, some at a time.
fn forked(parent: &TestVm, scratch: &Scratch) -> Vec<Clone> {
    let mut clones = Vec::new();
    let names: Vec<_> = (0..FORKED).map(|number| format!("forked-{number}")).collect();
    for names in names.chunks(AT_ONCE) {
        let said = |name: &str| scratch.path(&format!("{name}.out"));
        let overrides: Vec<_> = names
            .iter()
            .map(|name| {
                json!({
                    "payload": { "hostname": name }, "serial": { "serial_out_path": said(name) },
                })
            })
            .collect();
        let body = json!({ "overrides": overrides, "end_with_parent": true }).to_string();
        let told = parent.api().request("POST", "/fork", &body).json();
        // All at once: one that has ended does not answer any more.
        let waiting = told["children"].as_array().unwrap().iter().map(|child| {
            let child = Api::new(Path::new(child["api_sock"].as_str().unwrap()));
            // As long as it takes a guest, which shares two processors with many.
            std::thread::spawn(move || {
                child.try_request(("GET", "/wait", ""), BOOT).unwrap().json()
            })
        });
        let waiting: Vec<_> = waiting.collect();
        for (name, waiting) in names.iter().zip(waiting) {
            let ended = waiting.join().unwrap();
            assert_eq!(ended["reason"], "powered_off", "{ended}");
            let said = fs::read_to_string(said(name)).unwrap();
            clones.push(Clone { name: name.clone(), said });
        }
    }
    clones
}

#[test]
fn sixty_linux_clones_have_names_and_random_numbers_of_their_own() {
    let scratch = Scratch::new();
    let vm = from_initrd(&scratch, linux_program("clone"), "").cpus(2).typing().listening().start();
    vm.expect_within("husk-guest: waiting", BOOT);
    vm.type_in("\n");
    vm.expect_within("DRAWING on 2", BOOT);
    let directory = scratch.path("snapshot");
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
    let mut clones = restored(&directory, &scratch);
    clones.extend(forked(&vm, &scratch));

    let mut seen = HashMap::new();
    for clone in &clones {
        assert_eq!(clone.values("hostname"), [&*clone.name], "{}", clone.said);
        assert_eq!(clone.values("generation"), ["1"]);
        let drawn = clone.values("drawn");
        // Of each of two processors.
        assert!(drawn.len() >= 2 * 8, "{}", clone.said);
        for number in drawn.into_iter().chain(clone.values("seed")) {
            if let Some(other) = seen.insert(number.to_owned(), &clone.name) {
                panic!("{other} and {} have both drawn {number}", clone.name);
            }
        }
    }
    assert_eq!(clones.len(), RESTORED + FORKED);
    println!("{} numbers of {} clones, none twice", seen.len(), clones.len());
}

/// The guest's disk is a layer over a root that others share: what is written before the snapshot is in each clone,
/// and what one writes is in no other.
#[test]
fn linux_clones_write_to_layers_over_one_root() {
    const SCRIPT: &str = "\
fresh() { echo 3 >/proc/sys/vm/drop_caches; }
stty -echo
head -c 100000 /dev/urandom >/common
sync
echo common=$(sha256sum </common)
while read -r word name; do
    fresh
    case $word in
    write) echo $name >/mine; sync; echo wrote=$name ;;
    show) echo shown=$(cat /mine 2>/dev/null || echo nothing) $(sha256sum </common) ;;
    end) break ;;
    esac
done
";
    let scratch = Scratch::new();
    let base = root_disk(&scratch);
    let before = sha256(&fs::read(&base).unwrap());
    let vm = Husk::run(product("vmlinux"))
        .option("--disk", format!("{},overlay", base.display()))
        .read_only_disk(script_disk(&scratch, SCRIPT))
        .memory(256)
        .cmdline(&cmdline("root=/dev/vda rw husk.run=/dev/vdb"))
        .typing()
        .listening()
        .start();
    vm.expect_within("husk-guest: waiting", BOOT);
    vm.type_in("\n");
    let line = vm.expect_within("common=", BOOT);
    let common = line.trim().strip_prefix("common=").unwrap().to_owned();
    let directory = scratch.path("snapshot");
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
    let show = |vm: &TestVm, mine: &str| {
        vm.type_in("show\n");
        let line = vm.expect_within("shown=", BOOT);
        assert_eq!(line.trim(), format!("shown={mine} {common}"));
    };
    let write = |vm: &TestVm, name: &str| {
        vm.type_in(format!("write {name}\n"));
        vm.expect_within(&format!("wrote={name}"), BOOT);
    };
    write(&vm, "parent");
    let clone = || Husk::new(["restore"]).arg(&directory).typing().listening().start();
    let (one, other) = (clone(), clone());
    show(&one, "nothing");
    write(&one, "one");
    show(&other, "nothing");
    write(&other, "other");
    show(&one, "one");
    show(&vm, "parent");
    // Back to what was saved, in the same process.
    one.api().put("/snapshot/rewind", json!({ "resume_vm": true })).done();
    show(&one, "nothing");
    for vm in [vm, one, other] {
        vm.type_in("end\n");
        vm.wait_within(BOOT).code(0);
    }
    assert_eq!(sha256(&fs::read(&base).unwrap()), before, "somebody has written to what all share");
}
