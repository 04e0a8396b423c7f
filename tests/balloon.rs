//! The balloon: what the guest gives back, the host has.
use std::fs;

use serde_json::{Value, json};

use crate::util::*;

/// MiB that the guest fills.
const MIB: u64 = 48;
/// MiB that something else may need meanwhile, in husk or in the guest.
const SLACK: u64 = 4;

/// MiB of the host's memory that a process uses.
fn rss_mib(vm: &TestVm) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", vm.pid())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

/// A guest that fills memory and has a balloon that can do everything; its RAM is as `more` says.
fn filled(by: &str, more: &[(&str, &str)]) -> TestVm {
    let husk = Husk::guest("balloon", &format!("mib={MIB} by={by}")).memory(128);
    let husk = husk.option("--balloon", "0,stats=60,hinting,reporting").listening();
    let vm = more.iter().fold(husk, |husk, (flag, value)| husk.option(flag, value)).start();
    vm.expect("touched=48");
    vm
}

/// Has a guest give back what it filled, and use it again. The size of the balloon is what tells it
/// when.
fn give_and_take(vm: TestVm, by: &str) -> End {
    let api = vm.api();
    let target = |mib: u64| api.patch("/balloon", json!({ "amount_mib": mib })).done();
    let full = rss_mib(&vm);
    assert!(full >= MIB, "{full} MiB in use");
    target(MIB);
    if by == "hint" {
        api.patch("/balloon/hinting/start", "").done();
    }
    vm.expect("given=48");
    let given = rss_mib(&vm);
    assert!(given + MIB <= full + SLACK, "{full} MiB, then {given}");
    let statistics = api.get("/balloon/statistics").json();
    let actual = if by == "inflate" { MIB } else { 0 };
    assert_eq!(
        (&statistics["target_mib"], &statistics["actual_mib"]),
        (&json!(MIB), &json!(actual))
    );
    target(1);
    // That it reads zero there is the guest's to say.
    vm.expect("taken=48");
    let taken = rss_mib(&vm);
    assert!(taken + SLACK >= given + MIB, "{given} MiB, then {taken}");
    target(2);
    vm.wait().ok()
}

#[test]
fn memory_goes_into_the_balloon_and_comes_back() {
    give_and_take(filled("inflate", &[]), "inflate");
}

#[test]
fn memory_that_is_reported_free_goes_and_comes_back() {
    give_and_take(filled("report", &[]), "report");
    give_and_take(filled("report", &[("--huge-pages", "transparent")]), "report");
}

#[test]
fn memory_that_is_hinted_at_goes_and_comes_back() {
    give_and_take(filled("hint", &[]), "hint");
}

#[test]
fn a_run_of_hints_is_stopped_by_hand() {
    let vm = filled("hint", &[]);
    let api = vm.api();
    let status = || api.get("/balloon/hinting/status").json();
    assert_eq!(status(), json!({"host_cmd": 0, "guest_cmd": null}));
    api.patch("/balloon", json!({"amount_mib": MIB})).done();
    api.patch("/balloon/hinting/start", json!({"acknowledge_on_stop": false})).done();
    // The guest says so when it is through, and nobody else does.
    let deadline = std::time::Instant::now() + PATIENCE;
    while status() != json!({"host_cmd": 2, "guest_cmd": 0}) {
        assert!(std::time::Instant::now() < deadline, "{}", status());
    }
    api.patch("/balloon/hinting/stop", "").done();
    assert_eq!(status(), json!({"host_cmd": 1, "guest_cmd": 0}));
    vm.expect("given=48");
    api.patch("/balloon/hinting/start", "{}").done();
    assert_eq!(status(), json!({"host_cmd": 3, "guest_cmd": 0}));
}

#[test]
fn a_balloon_survives_a_pause() {
    let vm = filled("inflate", &[]);
    let api = vm.api();
    api.patch("/vm", json!({"state": "Paused"})).done();
    api.patch("/balloon", json!({"amount_mib": MIB})).done();
    assert_eq!(api.get("/balloon").json()["amount_mib"], MIB);
    let full = rss_mib(&vm);
    api.patch("/vm", json!({"state": "Resumed"})).done();
    vm.expect("given=48");
    assert!(rss_mib(&vm) + MIB <= full + SLACK);
}

fn configured() -> Value {
    json!({
        "amount_mib": 16, "deflate_on_oom": true, "stats_polling_interval_s": 5,
        "free_page_hinting": false, "free_page_reporting": true,
    })
}

#[test]
fn the_api_shows_and_changes_the_balloon() {
    let vm = Husk::api().start();
    let api = vm.api();
    let guest = guest("hello");
    let none = "balloon: this microVM has none; it is configured before the start";
    assert_eq!(api.get("/balloon").fault(), none);
    api.put("/balloon", json!({"amount_mib": 1, "deflate_on_oom": false})).done();
    let defaults = json!({
        "amount_mib": 1, "deflate_on_oom": false, "stats_polling_interval_s": 0,
        "free_page_hinting": false, "free_page_reporting": false,
    });
    assert_eq!(api.get("/balloon").json(), defaults);
    api.put("/balloon", configured()).done();
    assert_eq!(api.get("/balloon").json(), configured());

    let too_early = "The requested operation is not supported before starting the microVM.";
    for (path, body) in [
        ("/balloon", r#"{"amount_mib": 1}"#),
        ("/balloon/statistics", r#"{"stats_polling_interval_s": 1}"#),
        ("/balloon/hinting/start", ""),
        ("/balloon/hinting/stop", ""),
    ] {
        assert_eq!(api.patch(path, body).fault(), too_early, "{path}");
    }
    for path in ["/balloon/statistics", "/balloon/hinting/status"] {
        assert_eq!(api.get(path).fault(), too_early, "{path}");
    }

    // Neither may the balloon outgrow the machine nor the machine shrink below the balloon.
    let too_large = "Amount of pages requested is too large.";
    let large = json!({"amount_mib": 129, "deflate_on_oom": false});
    assert!(api.put("/balloon", large).fault().contains(too_large));
    assert!(api.patch("/machine-config", json!({"mem_size_mib": 15})).fault().contains(too_large));
    let small = json!({"vcpu_count": 1, "mem_size_mib": 15});
    assert!(api.put("/machine-config", small).fault().contains(too_large));
    assert_eq!(api.get("/machine-config").json()["mem_size_mib"], 128);
    assert_eq!(api.get("/balloon").json(), configured());
    api.patch("/machine-config", json!({"mem_size_mib": 64})).done();

    let source = json!({"kernel_image_path": guest, "boot_args": "how=hang"});
    api.put("/boot-source", source).done();
    api.act("InstanceStart").done();
    vm.expect("how=hang");
    let too_late = "The requested operation is not supported after starting the microVM.";
    assert_eq!(api.put("/balloon", configured()).fault(), too_late);

    api.patch("/balloon", json!({"amount_mib": 64})).done();
    api.patch("/balloon/statistics", json!({"stats_polling_interval_s": 2})).done();
    let mut now = configured();
    now["amount_mib"] = json!(64);
    now["stats_polling_interval_s"] = json!(2);
    assert_eq!(api.get("/balloon").json(), now);
    assert_eq!(api.get("/vm/config").json()["balloon"], now);
    let larger = api.patch("/balloon", json!({"amount_mib": 65})).fault();
    assert!(larger.starts_with("balloon: ") && larger.contains(too_large), "{larger}");
    assert_eq!(
        api.patch("/balloon/statistics", json!({"stats_polling_interval_s": 0})).fault(),
        "balloon: Statistics cannot be enabled/disabled after activation."
    );
    let statistics = json!({
        "target_pages": 16384, "actual_pages": 0, "target_mib": 64, "actual_mib": 0,
    });
    assert_eq!(api.get("/balloon/statistics").json(), statistics);
    let disabled = "balloon: Attempting to use hinting when not enabled.";
    assert_eq!(api.patch("/balloon/hinting/start", "").fault(), disabled);
    assert_eq!(api.patch("/balloon/hinting/stop", "{}").fault(), disabled);
    assert_eq!(api.get("/balloon/hinting/status").fault(), disabled);
    assert_eq!(api.get("/balloon").json(), now, "refusals change nothing");
}

#[test]
fn requests_to_the_balloon_are_read_strictly() {
    let vm = Husk::api().start();
    let api = vm.api();
    api.put("/boot-source", json!({"kernel_image_path": guest("hello"), "boot_args": "how=hang"}))
        .done();
    let all = json!({"amount_mib": 1, "deflate_on_oom": true, "free_page_hinting": true});
    api.put("/balloon", all).done();
    for (body, words) in [
        ("{}", "missing field `amount_mib`"),
        (r#"{"amount_mib": 1}"#, "missing field `deflate_on_oom`"),
        (r#"{"amount_mib": "1", "deflate_on_oom": true}"#, "invalid type"),
        (r#"{"amount_mib": 1, "deflate_on_oom": true, "more": 1}"#, "unknown field `more`"),
        (r#"{"amount_mib": 1, "deflate_on_oom": true, "stats_polling_interval_s": 65536}"#, "u16"),
        ("", "Empty PUT request."),
    ] {
        let fault = api.put("/balloon", body).fault();
        assert!(fault.contains(words), "{body}: {fault}");
    }
    api.act("InstanceStart").done();
    vm.expect("how=hang");
    for (path, body, words) in [
        ("/balloon", "", "Empty PATCH request."),
        ("/balloon", "{}", "missing field `amount_mib`"),
        ("/balloon", r#"{"amount_mib": -1}"#, "invalid value"),
        ("/balloon", r#"{"amount_mib": 1, "deflate_on_oom": true}"#, "unknown field"),
        ("/balloon/statistics", "", "Empty PATCH request."),
        ("/balloon/statistics", "{}", "missing field `stats_polling_interval_s`"),
        ("/balloon/hinting/start", r#"{"acknowledge_on_stop": 1}"#, "invalid type"),
        ("/balloon/hinting/start", r#"{"acknowledge": true}"#, "unknown field `acknowledge`"),
        ("/balloon/hinting/start", "{}", "Device not activated yet."),
        ("/balloon/hinting/start", "", "Device not activated yet."),
        ("/balloon/hinting/stop", "", "Device not activated yet."),
        ("/balloon/hinting/stop", "[", "EOF"),
        ("/balloon/hinting", "{}", "Invalid request method and/or path"),
        ("/balloon/hinting/status", "{}", "Invalid request method and/or path"),
    ] {
        let fault = api.patch(path, body).fault();
        assert!(fault.contains(words), "{path} {body}: {fault}");
    }
    let stats = api.get("/balloon/statistics").fault();
    assert_eq!(stats, "balloon: Received stats query when stats are disabled.");
}

#[test]
fn a_configuration_may_have_its_sections_in_any_order() {
    let scratch = Scratch::new();
    let boot = json!({"kernel_image_path": guest("hello")});
    for (mib, is_good) in [(300, true), (600, false)] {
        let text = format!(
            r#"{{"balloon": {{"amount_mib": {mib}, "deflate_on_oom": true}},
                 "machine-config": {{"vcpu_count": 1, "mem_size_mib": 512}}, "boot-source": {boot}}}"#
        );
        let file = scratch.file("vm.json", text);
        let end = Husk::new(["run", "--config-file"]).arg(file).wait();
        if is_good {
            end.ok();
        } else {
            let line = end.refused(3);
            assert!(
                line.contains("The microVM has 512 MiB, the balloon is to hold 600 MiB"),
                "{line}"
            );
        }
    }
}

#[test]
fn the_command_line_gives_a_balloon() {
    let vm = Husk::guest("hello", "how=hang")
        .option("--balloon", "7,deflate-on-oom,stats=3,hinting,reporting")
        .listening()
        .start();
    let expected = json!({
        "amount_mib": 7, "deflate_on_oom": true, "stats_polling_interval_s": 3,
        "free_page_hinting": true, "free_page_reporting": true,
    });
    assert_eq!(vm.api().get("/balloon").json(), expected);
    for (words, why) in [
        ("", "MiB ''"),
        ("x", "MiB 'x'"),
        ("1,stats=x", "stats 'x'"),
        ("1,more", "'more' is not one of deflate-on-oom, stats=SECONDS, hinting, reporting"),
    ] {
        let end = Husk::guest("hello", "").option("--balloon", words).wait().code(2);
        assert!(end.errors.contains(why), "{end}");
    }
    let end = Husk::guest("hello", "").option("--balloon", "129").wait().refused(3);
    assert!(end.contains("The microVM has 128 MiB, the balloon is to hold 129 MiB."), "{end}");
}
