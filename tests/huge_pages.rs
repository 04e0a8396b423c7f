//! Guests in huge pages of the host's pool (`2M`): saved while the pool is empty, restored into all kinds of pages,
//! forked.
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::fork::fork;
use crate::util::*;

/// The host's pool of pages of 2 MiB.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// Of guest RAM, and how many huge pages that is.
const MIB: u64 = 16;
const PAGES: u64 = MIB / 2;

/// More pages in the host's pool, as long as it lives. The tests that need them wait for each other.
struct Pool {
    before: u64,
    _lock: File,
}

impl Pool {
    /// None if the kernel knows no huge pages.
    fn new() -> Option<Self> {
        if !Path::new(POOL).exists() {
            return None;
        }
        let lock = File::create(std::env::temp_dir().join("husk-test-huge-pages")).unwrap();
        lock.lock().unwrap();
        Some(Self { before: number("nr_hugepages"), _lock: lock })
    }

    /// So many that nobody has.
    fn set_free(&self, count: u64) {
        let taken = number("nr_hugepages") - number("free_hugepages") + number("resv_hugepages");
        self.set(taken + count);
        let free = number("free_hugepages") - number("resv_hugepages");
        assert_eq!(free, count, "the host's memory is too scattered for {count} huge pages");
    }

    fn set(&self, count: u64) {
        let path = PathBuf::from(POOL).join("nr_hugepages");
        fs::write(&path, count.to_string()).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.set(self.before);
    }
}

fn number(name: &str) -> u64 {
    let text = fs::read_to_string(PathBuf::from(POOL).join(name)).unwrap();
    text.trim().parse().unwrap()
}

/// The guest `pages` in huge pages.
fn pages() -> Husk {
    let husk = Husk::guest("pages", "count=2000").memory(MIB).option("--huge-pages", "2M");
    husk.listening().typing()
}

/// A kernel without them is told from a pool that is too small.
fn assert_refused() {
    let line = pages().wait().refused(4);
    assert!(line.contains("nr_hugepages"), "{line}");
}

fn restore(directory: &Path, pages: Option<&str>) -> Husk {
    let husk = Husk::new(["restore"]).arg(directory).listening().typing();
    match pages {
        Some(pages) => husk.option("--huge-pages", pages),
        None => husk,
    }
}

/// KiB that a process has of the pool.
fn of_the_pool(pid: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let lines = smaps.lines().filter_map(|line| {
        line.strip_prefix("Private_Hugetlb:").or(line.strip_prefix("Shared_Hugetlb:"))
    });
    lines.map(|kib| kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap()).sum()
}

#[test]
fn a_guest_in_huge_pages_is_saved_and_goes_on_in_any() {
    let Some(pool) = Pool::new() else { return assert_refused() };
    let scratch = Scratch::new();
    let [full, diff, again] = ["full", "diff", "again"].map(|name| scratch.path(name));
    // There is none left for what is copied while the guest goes on.
    pool.set_free(PAGES);
    let vm = Husk::api().typing().start();
    let source = json!({ "kernel_image_path": guest("pages"), "boot_args": "count=2000" });
    vm.api().put("/boot-source", source).done();
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": MIB, "huge_pages": "2M",
                          "track_dirty_pages": true });
    vm.api().put("/machine-config", machine).done();
    vm.api().act("InstanceStart").done();
    vm.expect("ready=1");
    let first = tell(&vm, "wh");
    assert!(of_the_pool(vm.pid()) >= MIB << 9, "{} KiB", of_the_pool(vm.pid()));
    vm.api().put("/snapshot/create", json!({ "directory": full })).done();
    let second = tell(&vm, "wh");
    let params = json!({ "directory": diff, "snapshot_type": "Diff" });
    vm.api().put("/snapshot/create", params).done();
    assert_ne!(tell(&vm, "zh"), second);
    let line = restore(&full, None).wait().code(4).errors;
    assert!(line.contains("free pages of /sys/kernel/mm/hugepages"), "{line}");
    let fault = vm.api().put("/snapshot/rewind", json!({})).fault();
    assert!(fault.contains("it is in huge pages"), "{fault}");
    tell(&vm, "c");
    vm.type_in("q");
    vm.wait().ok();

    for (kind, is_of_pool) in
        [(None, true), (Some("2M"), true), (Some("none"), false), (Some("transparent"), false)]
    {
        for (directory, sum) in [(&full, &first), (&diff, &second)] {
            let vm = restore(directory, kind).start();
            assert_eq!(tell(&vm, "h"), *sum, "{kind:?}");
            assert_eq!(of_the_pool(vm.pid()) > 0, is_of_pool, "{kind:?}");
            let sum = tell(&vm, "zwh");
            vm.api().put("/snapshot/create", json!({ "directory": again })).done();
            vm.type_in("q");
            vm.wait().ok();
            let vm = restore(&again, Some("none")).start();
            assert_eq!(tell(&vm, "h"), sum, "{kind:?}");
        }
    }
}

#[test]
fn a_guest_in_huge_pages_has_children() {
    let Some(pool) = Pool::new() else { return assert_refused() };
    let scratch = Scratch::new();
    pool.set_free(4 * PAGES);
    let vm = pages().start();
    vm.expect("ready=1");
    let first = tell(&vm, "wh");
    let first = first.strip_prefix("sum=").unwrap();
    let mut children = fork(&vm.api(), &scratch, &["a", "b"]);
    assert_ne!(tell(&vm, "zh"), format!("sum={first}"));
    assert_eq!(children[0].tell("h", "sum"), first);
    assert_eq!(children[0].tell("w", "round"), "2");
    let second = children[0].tell("h", "sum");
    let mut grand = fork(&children[0].api.clone(), &scratch, &["c"]);
    assert_eq!(children[0].tell("z", "zero"), "1");
    assert_eq!(grand[0].tell("h", "sum"), second);
    assert_eq!(children[1].tell("h", "sum"), first);
    children.iter_mut().chain(&mut grand).for_each(|child| child.quit());
    vm.type_in("q");
    vm.wait().ok();
}
