//! husk under the name `firecracker`: whoever spawns that program can spawn this one.
use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::util::*;

/// A process that listens, as its log on standard output tells.
fn listening(socket: &Path, more: &[&str]) -> TestVm {
    let vm = Husk::firecracker(["--api-sock"]).arg(socket);
    let vm = more.iter().fold(vm, |vm, arg| vm.arg(arg)).start();
    vm.expect("Listening on API socket");
    vm.expect("API server started.");
    vm
}

/// A guest whose console is the file `serial` of `scratch`: on standard output it would get between
/// the characters of log lines.
fn config(scratch: &Scratch, cmdline: &str) -> Value {
    json!({
        "boot-source": {"kernel_image_path": guest("hello"), "boot_args": cmdline},
        "serial": {"serial_out_path": scratch.path("serial")},
    })
}

/// How often the guest greeted.
fn greetings(scratch: &Scratch) -> usize {
    fs::read_to_string(scratch.path("serial")).unwrap().matches("hello=world").count()
}

#[test]
fn version_is_firecrackers() {
    let end = Husk::firecracker(["--version"]).wait().code(0);
    let words: Vec<&str> = end.output.trim().split(' ').collect();
    assert_eq!(words[0], "Firecracker", "{end}");
    let numbers: Vec<u32> =
        words[1].strip_prefix('v').unwrap().split('.').map(|n| n.parse().unwrap()).collect();
    assert_eq!(numbers.len(), 3);
    let end = Husk::new(["--version"]).wait().code(0);
    assert!(end.output.starts_with("husk "), "{end}");
}

#[test]
fn process_and_threads_have_firecrackers_names() {
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    // Opened for both directions, it needs no writer yet.
    let serial = File::options().read(true).write(true).open(scratch.fifo("serial")).unwrap();
    let serial = Output::capture("the serial port", serial);
    let vm = listening(&socket, &["--id", "vm-1"]);
    Api::new(&socket).put("/vm", config(&scratch, "how=hang")).done();
    // Every thread has its name when the guest has spoken.
    serial.line("hello=world", Instant::now() + PATIENCE).unwrap();
    let process = format!("/proc/{}", vm.pid());
    assert_eq!(fs::read_to_string(format!("{process}/comm")).unwrap(), "firecracker\n");
    assert!(fs::read_to_string(format!("{process}/cmdline")).unwrap().contains("\0--api-sock\0"));
    let mut names: Vec<String> = fs::read_dir(format!("{process}/task"))
        .unwrap()
        .map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap())
        .filter(|name| !name.starts_with("kvm-"))
        .collect();
    names.sort();
    assert_eq!(names.concat(), "fc_api\nfc_files\nfc_io\nfc_vcpu 0\nfirecracker\n");
    assert_eq!(Api::new(&socket).get("/").json()["id"], "vm-1");
}

#[test]
fn log_has_the_lines_that_tools_look_for() {
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    let vm = listening(&socket, &["--id", "vm-1"]);
    let api = Api::new(&socket);
    api.put("/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64}"#).done();
    api.get("/nope").fault();
    api.put("/vm", config(&scratch, "how=reboot-i8042")).done();
    let end = vm.wait().code(0);
    assert_eq!(end.errors, "");
    for text in [
        "Running Firecracker v",
        &format!("Listening on API socket ({socket:?})."),
        "API server started.",
        r#"The API server received a Put request on "/machine-config" with body "{\"vcpu_count\": 1, \"mem_size_mib\": 64}"."#,
        "The request was executed successfully. Status code: 204 No Content.",
        r#"The API server received a Get request on "/nope"."#,
        "Received Error. Status code: 400 Bad Request.",
        "Total previous API call duration: ",
        "Vmm is stopping.",
        "Firecracker exiting successfully. exit_code=0",
    ] {
        let line = end.output.lines().find(|line| line.contains(text));
        check_log_line(line.unwrap_or_else(|| panic!("no {text:?}\n{end}")));
    }
    assert_eq!(greetings(&scratch), 1);
}

#[test]
fn deprecated_fields_are_told_by_a_header_and_in_the_log() {
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    let vm = listening(&socket, &["--id", "vm-1", "--show-level"]);
    let api = Api::new(&socket);
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 64});
    let vsock = json!({"guest_cid": 3, "uds_path": scratch.path("vsock")});
    let with = |body: &Value, field: &str, value: &str| {
        let mut body = body.clone();
        body[field] = json!(value);
        body
    };
    for (reply, is_deprecated) in [
        (api.put("/machine-config", &machine), false),
        (api.put("/machine-config", with(&machine, "cpu_template", "None")), true),
        (api.patch("/machine-config", json!({"cpu_template": "None"})), true),
        (api.patch("/machine-config", json!({"vcpu_count": 2})), false),
        (api.put("/vsock", &vsock), false),
        (api.put("/vsock/vsock0", with(&vsock, "vsock_id", "vsock0")), true),
    ] {
        reply.done();
        assert_eq!(
            reply.head.contains("\r\nDeprecation: true\r\n"),
            is_deprecated,
            "{}",
            reply.head
        );
    }
    // What is refused is not told of.
    let refused = api.patch("/machine-config", json!({"cpu_template": "T9"}));
    assert!(refused.status == 400 && !refused.head.contains("Deprecation"), "{}", refused.head);
    vm.signal(Signal::TERM);
    let end = vm.wait().code(143);
    let told: Vec<&str> = end
        .output
        .lines()
        .filter_map(|line| line.split_once("[vm-1:fc_api:WARN] "))
        .map(|l| l.1)
        .collect();
    let expected = [
        "PUT /machine-config: cpu_template field is deprecated.",
        "PATCH /machine-config: cpu_template field is deprecated.",
        "PUT /vsock: vsock_id field is deprecated.",
    ];
    assert_eq!(told, expected, "{end}");
}

/// `2026-01-31T23:59:59.123456789 [vm-1:main] text`
#[track_caller]
fn check_log_line(line: &str) {
    let (time, rest) = line.split_once(' ').unwrap();
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000000000", "{line}");
    let thread = rest.strip_prefix("[vm-1:").and_then(|rest| rest.split_once("] ")).unwrap().0;
    assert!(["main", "fc_api"].contains(&thread), "{line}");
}

#[test]
fn log_goes_to_a_file_with_level_and_origin() {
    let scratch = Scratch::new();
    let mut config = config(&scratch, "");
    config["serial"] = Value::Null;
    let (config_file, log) = (scratch.file("vm.json", config.to_string()), scratch.path("log"));
    let husk =
        Husk::firecracker(["--no-api", "--level", "Debug", "--show-level", "--show-log-origin"]);
    let husk = husk.option("--config-file", config_file).option("--log-path", &log);
    let end = husk.wait().ok();
    assert!(!end.output.contains("Firecracker"), "{end}");
    let log = fs::read_to_string(log).unwrap();
    let line = log.lines().find(|line| line.contains("Running Firecracker")).unwrap();
    assert!(line.contains("[anonymous-instance:main:INFO:src/"), "{line}");
}

#[test]
fn boot_timer_tells_when_the_guest_has_booted() {
    let scratch = Scratch::new();
    let start = |cmdline: &str, flag: &[&str]| {
        let config = json!({
            "boot-source": {"kernel_image_path": guest("boot_timer"), "boot_args": cmdline},
            "serial": {"serial_out_path": scratch.path("serial")},
        });
        let file = scratch.file("vm.json", config.to_string());
        let husk = Husk::firecracker(["--no-api", "--id", "vm-1", "--config-file"]).arg(file);
        flag.iter().fold(husk, |husk, flag| husk.arg(flag)).wait().code(0)
    };
    let told = |end: &End| {
        let lines = end.output.lines().filter(|line| line.contains("Guest-boot-time"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(told(&start("", &[])), [""; 0]);
    assert_eq!(told(&start("quiet", &["--boot-timer"])), [""; 0]);
    let end = start("", &["--boot-timer"]);
    let [line] = &told(&end)[..] else { panic!("{end}") };
    let (_, said) = line.split_once("[vm-1:fc_vcpu 0] Guest-boot-time = ").expect(line);
    let words: Vec<&str> = said.split_whitespace().collect();
    let [us, "us", ms, "ms,", cpu_us, "CPU", "us", cpu_ms, "CPU", "ms"] = words[..] else {
        panic!("{line}")
    };
    let [us, ms, cpu_us, cpu_ms] = [us, ms, cpu_us, cpu_ms].map(|n| n.parse::<u64>().unwrap());
    assert!(us > 0 && us / 1000 == ms && cpu_us > 0 && cpu_us / 1000 == cpu_ms, "{line}");
    let serial = fs::read_to_string(scratch.path("serial")).unwrap();
    // All ones where there is none.
    assert_eq!(serial.matches("reads=0xff").count(), 1, "{serial}");
    assert_eq!(serial.matches("reads=0x0").count(), 2, "{serial}");
}

#[test]
fn config_file_boots_without_an_api() {
    let scratch = Scratch::new();
    let file = scratch.file("vm.json", config(&scratch, "").to_string());
    let husk = || Husk::firecracker(["--config-file"]).arg(&file);
    let end = husk().arg("--no-api").wait().code(0);
    assert!(!end.output.contains("Listening"), "{end}");
    let socket = scratch.path("api.sock");
    let end = husk().option("--api-sock", &socket).wait().code(0);
    assert!(end.output.contains("Listening"), "{end}");
    let text = "Successfully started microvm that was configured from one single json";
    assert!(end.output.contains(text), "{end}");
    assert_eq!(greetings(&scratch), 2);
    assert!(!socket.exists());
}

#[test]
fn reset_ends_the_vm() {
    let scratch = Scratch::new();
    for (how, boots) in [("reboot-i8042", 1), ("reboot-acpi", 2)] {
        let file = scratch.file("vm.json", config(&scratch, &format!("how={how}")).to_string());
        Husk::firecracker(["--no-api", "--config-file"]).arg(&file).wait().code(0);
        // The file is appended to.
        assert_eq!(greetings(&scratch), boots);
    }
}

#[test]
fn crash_is_told_by_the_exit_code() {
    let scratch = Scratch::new();
    let file = scratch.file("vm.json", config(&scratch, "how=triple").to_string());
    let end = Husk::firecracker(["--no-api", "--config-file"]).arg(&file).wait().code(5);
    assert!(end.output.contains("exit_code=5"), "{end}");
    assert!(end.errors.contains("triple fault"), "{end}");
}

#[test]
fn bad_config_file_is_logged() {
    let scratch = Scratch::new();
    let file = scratch.file("vm.json", r#"{"boot-source": {"kernel_image_path": "/nowhere"}}"#);
    let end = Husk::firecracker(["--no-api", "--config-file"]).arg(&file).wait().quickly().code(3);
    let line = end.output.lines().find(|line| line.contains("from one single json failed: "));
    assert!(line.expect(&end.output).contains("/nowhere"), "{end}");
    assert!(end.errors.contains("/nowhere"), "{end}");
    // Readable, but more than the machine has room for.
    let mut config = config(&scratch, "");
    config["boot-source"]["initrd_path"] = json!(scratch.sparse("initrd", 1 << 30));
    let file = scratch.file("vm.json", config.to_string());
    let end = Husk::firecracker(["--no-api", "--config-file"]).arg(&file).wait().quickly().code(3);
    let text = "Building VMM configured from cmdline json failed: ";
    assert!(end.output.contains(text), "{end}");
}

#[test]
fn stale_socket_is_an_error() {
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    drop(UnixListener::bind(&socket).unwrap());
    let end = Husk::firecracker(["--api-sock"]).arg(&socket).wait().quickly().code(3);
    let text = format!(
        "Failed to open the API socket at: {}. Check that it is not already used.",
        socket.display()
    );
    assert!(end.errors.contains(&text) && end.output.contains(&text), "{end}");
    assert!(socket.exists());
}

#[test]
fn flags_of_the_jailer_are_accepted() {
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    let more = "--id vm_2 --start-time-us 1 --start-time-cpu-us 2 --parent-cpu-time-us 3 --no-seccomp \
                --mmds-size-limit 1000 --http-api-max-payload-size 100 --level Info --module husk";
    let more: Vec<&str> = more.split_whitespace().collect();
    let vm = listening(&socket, &more);
    let api = Api::new(&socket);
    assert_eq!(api.get("/").json()["id"], "vm_2");
    let fault = api.put("/entropy", " ".repeat(101)).fault();
    assert!(fault.contains("the limit of 100 "), "{fault}");
    vm.signal(Signal::TERM);
    vm.wait().code(143);
    assert!(!socket.exists());
}

#[test]
fn flags_that_mean_nothing_yet_are_refused() {
    for args in [&["--enable-pci"][..], &["--seccomp-filter", "filter"]] {
        let line = Husk::firecracker(args).wait().quickly().refused(2);
        let start = format!("firecracker: {} is not supported", args[0]);
        assert!(line.starts_with(&start), "{line}");
    }
    for args in [&["run"][..], &["--no-api"], &["--id", "a/b"], &["--level", "loud"]] {
        Husk::firecracker(args).wait().quickly().code(2);
    }
}

#[test]
fn errors_are_told_in_its_name() {
    let scratch = Scratch::new();
    let missing = scratch.path("missing.json");
    let end = Husk::firecracker(["--no-api", "--config-file"]).arg(missing).wait().code(3);
    assert!(end.errors.starts_with("firecracker: "), "{end}");
    assert_eq!(end.errors.lines().count(), 1, "{end}");
    let config = scratch.file("vm.json", config(&scratch, "how=triple").to_string());
    let end = Husk::firecracker(["--no-api", "--config-file"]).arg(config).wait().code(5);
    assert!(end.errors.starts_with("firecracker: the guest crashed"), "{end}");
}
