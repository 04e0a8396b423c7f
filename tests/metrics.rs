//! Metrics: Firecracker's lines to a file or FIFO, and Prometheus's page.
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::util::*;

const MIB: u64 = 1 << 20;

/// The lines of a file of metrics.
fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "half a line: {text}");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What Prometheus makes of a page: name, labels and value of each sample.
fn exposition(page: &str) -> Vec<Value> {
    let mut parser = Command::new(python("python"))
        .arg(clients().join("python/exposition.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    parser.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = parser.wait_with_output().unwrap();
    assert!(output.status.success(), "of\n{page}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The value of the only sample with these labels.
fn sample(samples: &[Value], name: &str, labels: &Value) -> f64 {
    let is_meant = |sample: &&Value| sample["name"] == name && sample["labels"] == *labels;
    let mut found = samples.iter().filter(is_meant);
    let value = found.next().unwrap_or_else(|| panic!("no {name} {labels}"))["value"].as_f64();
    assert!(found.next().is_none(), "two {name} {labels}");
    value.unwrap()
}

fn of<'a>(line: &'a Value, path: &str) -> &'a Value {
    line.pointer(path).unwrap_or_else(|| panic!("no {path} in {line}"))
}

/// A guest that works on a disk, metrics to a file from the first call on, flushed twice and at the end.
#[test]
fn lines_say_what_came_since_the_last() {
    let scratch = Scratch::new();
    let (disk, file) = (scratch.sparse("disk.img", 16 * MIB), scratch.path("metrics"));
    let vm = Husk::api().option("--id", "vm-7").start();
    let api = vm.api();
    let metrics = json!({
        "metrics_path": file, "emit_id": true, "properties": {"customer": "a\nb"},
    });
    api.put("/metrics", &metrics).done();
    assert_eq!(api.get("/vm/config").json()["metrics"], metrics);
    let again = "Cannot initialize the metrics system due to bad user input: \
                 Reinitialization of metrics not allowed.";
    assert_eq!(api.put("/metrics", &metrics).fault(), again);
    assert_eq!(api.put("/vm", json!({"metrics": metrics})).fault(), again);
    // Nothing before there is a microVM.
    let early = "The requested operation is not supported before starting the microVM.";
    assert_eq!(api.act("FlushMetrics").fault(), early);
    assert_eq!(lines(&file), Vec::<Value>::new());

    let drive = json!({"drive_id": "disk", "path_on_host": disk, "is_root_device": false});
    api.put("/drives/disk", drive).done();
    let boot = json!({
        "kernel_image_path": guest("block"), "boot_args": "tests=write,verify,read irq",
    });
    api.put("/boot-source", &boot).done();
    api.put("/boot-source", "{").fault();
    api.act("InstanceStart").done();
    assert_eq!(lines(&file).len(), 1, "the first is written at the start");
    vm.wait().code(0);
    let [first, last] = &lines(&file)[..] else { panic!("{:?}", lines(&file)) };
    for line in [first, last] {
        assert_eq!(
            (&line["id"], &line["properties"]),
            (&json!("vm-7"), &json!({"customer": "a\nb"}))
        );
        assert!(line["utc_timestamp_ms"].as_u64().unwrap() > 1_600_000_000_000);
    }
    // Requests are in the first line, and are not told again.
    assert_eq!(of(first, "/put_api_requests/boot_source_count"), 2);
    assert_eq!(of(first, "/put_api_requests/boot_source_fails"), 1);
    assert_eq!(of(first, "/put_api_requests/metrics_fails"), 1);
    assert_eq!(of(last, "/put_api_requests/boot_source_count"), 0);
    assert!(of(first, "/api_server/process_startup_time_us").as_u64().unwrap() > 0);
    // One drive: the sum is what it did. On a busy host it may have done something before the first line is written.
    assert_eq!(of(last, "/block_disk"), of(last, "/block"));
    let sum =
        |name: &str| [first, last].iter().map(|line| of(line, name).as_u64().unwrap()).sum::<u64>();
    let count = |name: &str| sum(&format!("/block/{name}"));
    assert!(count("write_bytes") >= 64 << 10 && count("read_bytes") >= 64 << 10);
    assert!(count("write_count") > 0 && count("read_count") > 1 && count("queue_event_count") > 0);
    assert!(count("activate_count") == 1 && count("used_buffer_interrupt_count") > 0);
    assert!([first, last].iter().any(|line| {
        let took = of(line, "/block/read_agg");
        let (sum, max) = (took["sum_us"].as_u64().unwrap(), took["max_us"].as_u64().unwrap());
        assert!(sum >= max);
        max > 0
    }));
    assert!(sum("/vcpu/exit_io_out") > 0);
    assert!(sum("/vcpu/exit_io_out_agg/sum_us") > 0);
    assert!(sum("/uart/write_count") > 50);
    assert!(sum("/interrupts/triggers") > 0);
}

/// What is flushed is not flushed again; Prometheus sees it all the time, and after a reboot.
#[test]
fn prometheus_reads_what_counts_for_the_whole_life() {
    let scratch = Scratch::new();
    let file = scratch.path("metrics");
    let husk = Husk::guest("hello", "how=reboot-i8042").cpus(2).arg("--rng");
    let vm = husk.option("--metrics-path", &file).listening().start();
    for _ in 0..3 {
        vm.expect("RESULT ok");
    }
    let api = vm.api();
    api.patch("/vm", r#"{"state": "Paused"}"#).done();
    let (before, page) = (lines(&file).len(), api.get("/metrics"));
    assert!(
        page.head.contains("Content-Type: text/plain; version=0.0.4; charset=utf-8"),
        "{}",
        page.head
    );
    let samples = exposition(&page.body);
    let none = json!({});
    assert!(sample(&samples, "husk_i8042_reset_total", &none) >= 2.0);
    assert!(sample(&samples, "husk_uart_write_total", &none) > 100.0);
    let exits = |vcpu| sample(&samples, "husk_vcpu_exit_io_out_total", &json!({"vcpu": vcpu}));
    assert!(exits("0") > 0.0);
    assert_eq!(exits("1"), 0.0, "the guest starts one of its processors");
    let rng = json!({"model": "entropy", "id": "entropy"});
    assert_eq!(sample(&samples, "husk_entropy_entropy_bytes_total", &rng), 0.0);
    assert_eq!(sample(&samples, "husk_virtio_activate_total", &rng), 0.0);
    let pause = json!({"method": "PATCH", "path": "/vm"});
    assert_eq!(sample(&samples, "husk_api_requests_total", &pause), 1.0);
    assert!(sample(&samples, "husk_latencies_us_vmm_pause_vm", &none) > 0.0);
    assert!(sample(&samples, "husk_latencies_us_pause_vm", &none) > 0.0);
    assert!(sample(&samples, "husk_vcpu_exit_io_out_seconds_sum", &json!({"vcpu": "0"})) > 0.0);
    let info = json!({"id": "anonymous-instance", "version": env!("CARGO_PKG_VERSION")});
    assert_eq!(sample(&samples, "husk_info", &info), 1.0);

    // The phases of the last boot, of which there were three.
    let boot = api.get("/").json()["boot"].clone();
    let phases = boot.as_object().unwrap();
    assert_eq!(phases.len(), 9);
    let since_husk = phases["configured_us"].as_u64().unwrap();
    assert!(since_husk > phases["kernel_us"].as_u64().unwrap(), "{boot}");
    assert!(phases["vcpus_us"].as_u64() > Some(0) && phases["memory_us"].as_u64() > Some(0));
    let memory = sample(&samples, "husk_boot_seconds", &json!({"phase": "memory"}));
    assert!((memory * 1e6 - phases["memory_us"].as_f64().unwrap()).abs() < 1.0);
    vm.expect_error("started in ");

    // To look changes nothing; each line tells its part, and all of them the whole.
    api.act("FlushMetrics").done();
    api.act("FlushMetrics").done();
    let lines = lines(&file);
    assert_eq!(lines.len(), before + 2);
    let resets = |line: &Value| of(line, "/i8042/reset_count").as_u64().unwrap();
    assert_eq!(resets(lines.last().unwrap()), 0);
    let all = exposition(&api.get("/metrics").body);
    let total = sample(&all, "husk_i8042_reset_total", &none);
    assert_eq!(lines.iter().map(resets).sum::<u64>() as f64, total);
}

/// A FIFO without a reader holds some lines and loses the rest; nobody waits.
#[test]
fn a_fifo_that_nobody_reads_stops_nobody() {
    let scratch = Scratch::new();
    let fifo = scratch.path("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).unwrap();
    let vm = Husk::guest("hello", "how=hang").option("--metrics-path", &fifo).listening().start();
    let api = vm.api();
    let watch = Stopwatch::start();
    let refused = (0..60).filter(|_| api.act("FlushMetrics").status == 400).count();
    watch.within(Duration::ZERO, Duration::from_secs(20));
    assert!((1..60).contains(&refused), "{refused}");
    assert!(api.act("FlushMetrics").fault().starts_with("Failed to write metrics: "));
    let samples = exposition(&api.get("/metrics").body);
    let lost = sample(&samples, "husk_logger_metrics_fails_total", &json!({}));
    assert_eq!(lost, refused as f64 + 1.0);
    assert_eq!(sample(&samples, "husk_logger_missed_metrics_total", &json!({})), lost);
    api.act("Kill").done();
    vm.wait().code(0);
}

#[test]
fn firecracker_writes_them_too() {
    let scratch = Scratch::new();
    let (config, file) = (scratch.path("config.json"), scratch.path("metrics"));
    let boot = json!({"kernel_image_path": guest("hello"), "boot_args": "how=poweroff"});
    fs::write(&config, json!({"boot-source": boot}).to_string()).unwrap();
    let args = [
        "--no-api",
        "--config-file",
        config.to_str().unwrap(),
        "--metrics-path",
        file.to_str().unwrap(),
    ];
    Husk::firecracker(args).wait().code(0);
    let lines = lines(&file);
    assert_eq!(lines.len(), 2, "one at the start, one at the end");
    assert!(lines[0].get("id").is_none() && lines[0].get("properties").is_none());
    // The guest runs while the first is written.
    let written = |line| of(line, "/uart/write_count").as_u64().unwrap();
    assert!(written(&lines[0]) + written(&lines[1]) > 10);
    // Twice is once too often, and a place that cannot be is refused by its name.
    let metrics = json!({"metrics_path": file});
    fs::write(&config, json!({"boot-source": boot, "metrics": metrics}).to_string()).unwrap();
    let refusal = Husk::firecracker(args).wait().quickly().refused(3);
    assert!(refusal.ends_with("Reinitialization of metrics not allowed."), "{refusal}");
    let refusal =
        Husk::firecracker(["--metrics-path", "/nowhere/metrics"]).wait().quickly().refused(3);
    assert!(refusal.contains("/nowhere/metrics"), "{refusal}");
}

#[test]
fn what_no_line_could_have_is_refused() {
    let vm = Husk::api().start();
    let api = vm.api();
    let put = |properties: Value| {
        let body = json!({"metrics_path": "/dev/null", "properties": properties});
        api.put("/metrics", body).fault()
    };
    let many: serde_json::Map<_, _> = (0..11).map(|i| (i.to_string(), json!("x"))).collect();
    assert!(put(many.into()).contains("Too many metrics properties: 11 (maximum is 10)"));
    assert!(put(json!({"k".repeat(65): "v"})).contains("key exceeds the maximum length of 64"));
    assert!(put(json!({"k": "v".repeat(513)})).contains("value exceeds the maximum length of 512"));
    assert!(put(json!({"k": 1})).contains("expected a string"));
    assert!(api.put("/metrics", "{}").fault().contains("missing field `metrics_path`"));
    let fault = api.put("/metrics", json!({"metrics_path": "/"})).fault();
    assert!(
        fault.starts_with("Cannot initialize the metrics system due to bad user input: / is not")
    );
    // Nothing of this has made a file: there can still be one.
    api.put("/metrics", json!({"metrics_path": "/dev/null"})).done();
}
