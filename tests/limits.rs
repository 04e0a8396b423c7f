//! Rate limits of a VM that runs: what they hold back, and what lets it go.
use std::time::Instant;

use serde_json::{Value, json};

use crate::util::*;

const MIB: u64 = 1 << 20;

/// Twenty an hour.
fn twenty() -> Value {
    json!({"ops": {"size": 20, "refill_time": 3_600_000}})
}

/// Waits until drives have refused more than `before` requests; how many.
fn wait_for_throttling(vm: &TestVm, before: u64) -> u64 {
    let start = Instant::now();
    loop {
        let page = vm.api().get("/metrics").body;
        let prefix = "husk_block_rate_limiter_throttled_events_total{";
        let counts =
            page.lines().filter_map(|line| line.strip_prefix(prefix)?.split(' ').next_back());
        let counts: Vec<u64> = counts.map(|count| count.parse().unwrap()).collect();
        assert!(!counts.is_empty(), "no {prefix} in {page}");
        let count = counts.into_iter().sum();
        if count > before {
            return count;
        }
        assert!(start.elapsed() < PATIENCE, "{count} requests were held back");
    }
}

#[test]
fn a_change_frees_a_guest_that_waits_for_its_disk() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", MIB);
    let vm = Husk::api().start();
    let api = vm.api();
    let source = json!({"kernel_image_path": guest("bench_limits"), "boot_args": "warm_ms=1 ms=1 least=100"});
    api.put("/boot-source", source).done();
    let drive = json!({"drive_id": "d", "path_on_host": disk, "is_root_device": false,
                       "rate_limiter": twenty()});
    api.put("/drives/d", drive).done();
    api.act("InstanceStart").done();
    vm.expect("begin");
    let count = wait_for_throttling(&vm, 0);
    // Neither a pause nor a change of the other bucket lets it go on.
    api.patch("/vm", json!({"state": "Paused"})).done();
    api.patch("/vm", json!({"state": "Resumed"})).done();
    let count = wait_for_throttling(&vm, count);
    let bandwidth = json!({"bandwidth": {"size": 1 << 30, "refill_time": 1000}});
    api.patch("/drives/d", json!({"drive_id": "d", "rate_limiter": bandwidth})).done();
    wait_for_throttling(&vm, count);
    let shown = &api.get("/vm/config").json()["drives"][0]["rate_limiter"];
    assert_eq!((&shown["ops"]["size"], &shown["bandwidth"]["size"]), (&json!(20), &json!(1 << 30)));
    let lifted = json!({"ops": {"size": 0, "refill_time": 0}});
    api.patch("/drives/d", json!({"drive_id": "d", "rate_limiter": lifted})).done();
    let end = vm.wait().ok();
    assert!(end.value("name").starts_with("read ops="), "{}", end.value("name"));
}

#[test]
fn a_group_holds_two_disks_back_and_lets_both_go() {
    let scratch = Scratch::new();
    let disk = |name| format!("{},group=slow", scratch.sparse(name, MIB).display());
    let vm = Husk::guest("bench_limits", "nth=1 warm_ms=1 ms=1 least=100")
        .option("--disk", disk("a.img"))
        .option("--disk", disk("b.img"))
        .option("--rate-limit-group", "id=slow,ops=1")
        .listening()
        .start();
    vm.expect("begin");
    let group = |limiter: Value| json!({"id": "slow", "rate_limiter": limiter});
    let api = vm.api();
    api.patch("/rate-limit-groups/slow", group(twenty())).done();
    wait_for_throttling(&vm, 0);
    let fault = api.patch("/rate-limit-groups/fast", json!({"id": "fast"})).fault();
    assert!(fault.contains("fast"), "{fault}");
    let fault = api.patch("/rate-limit-groups/fast", group(twenty())).fault();
    assert!(fault.contains("id"), "{fault}");
    let shown = api.get("/vm/config").json();
    assert_eq!(shown["rate-limit-groups"][0]["rate_limiter"]["ops"]["size"], 20);
    assert_eq!(shown["drives"][1]["rate_limit_group"], "slow");
    let lifted = json!({"ops": {"size": 0, "refill_time": 0}});
    api.patch("/rate-limit-groups/slow", group(lifted)).done();
    vm.wait().ok();
}

#[test]
fn what_the_guest_says_too_fast_is_lost_and_counted() {
    let scratch = Scratch::new();
    let output = scratch.path("console.log");
    let vm = Husk::api().start();
    let api = vm.api();
    api.put("/boot-source", json!({"kernel_image_path": guest("hello"), "boot_args": "how=hang"}))
        .done();
    let serial = json!({"serial_out_path": output,
                        "rate_limiter": {"size": 12, "refill_time": 3_600_000}});
    api.put("/serial", serial).done();
    api.act("InstanceStart").done();
    let start = Instant::now();
    let lost = loop {
        let page = api.get("/metrics").body;
        let value = |name: &str| -> u64 {
            let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("no {name} in {page}")).parse().unwrap()
        };
        let lost = value("husk_uart_rate_limiter_dropped_bytes_total");
        if lost > 0 && value("husk_uart_write_total") == lost + 12 {
            break lost;
        }
        assert!(start.elapsed() < PATIENCE, "{lost} bytes were lost");
    };
    assert!(lost > 0);
    assert_eq!(std::fs::read(&output).unwrap().len(), 12);
}
