//! The command line: help that is true, a configuration judged without being touched, the API from a shell.
use std::fs::{self, File};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::util::*;

const COMMANDS: [&str; 6] = ["run", "api", "ctl", "check", "completions", "man"];

#[test]
fn help_is_there_for_every_command() {
    let end = Husk::new(["--help"]).wait().quickly().code(0);
    for command in COMMANDS {
        assert!(end.output.contains(&format!("\n  {command} ")), "{end}");
        let help = Husk::new([command, "--help"]).wait().quickly().code(0);
        assert!(help.output.contains(&format!("Usage: husk {command}")), "{help}");
        assert_eq!(help.errors, "");
    }
    assert!(end.output.contains("Exit codes: 0"), "{end}");
}

/// The lines of a help text's examples that start with `start`.
fn examples(args: &[&str], start: &str) -> Vec<String> {
    let end = Husk::new(args).wait().code(0);
    let (_, examples) = end.output.split_once("Examples:\n").expect("examples");
    let lines = examples.lines().map(str::trim).filter(|line| line.starts_with(start));
    // What stands far to the right explains.
    lines.map(|line| line.split("  ").next().unwrap().trim().to_owned()).collect()
}

/// Everything that the examples name.
fn set(scratch: &Scratch) {
    fs::copy(guest("hello"), scratch.path("vmlinux")).unwrap();
    scratch.file("initrd.cpio", "0707010");
    scratch.sparse("root.ext4", 1 << 20);
    scratch.sparse("data.img", 1 << 20);
    scratch.file("vm.json", json!({"boot-source": {"kernel_image_path": "vmlinux"}}).to_string());
}

#[test]
fn examples_in_the_help_run() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    set(&scratch);
    let mut lines = examples(&["--help"], "husk run");
    lines.extend(examples(&["run", "--help"], "husk run"));
    assert!(lines.len() >= 5, "{lines:?}");
    for line in lines {
        // The shell takes the quotes off.
        let script = line.replacen("husk", "exec \"$HUSK\"", 1);
        let mut command = Command::new("sh");
        command.arg("-c").arg(&script).env("HUSK", env!("CARGO_BIN_EXE_husk"));
        network.enter(command.current_dir(&scratch).stdin(Stdio::null()));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
    }
}

#[test]
fn examples_of_the_api_run() {
    let scratch = Scratch::new();
    let husk = Husk::new(["api", "--api-sock", "husk.sock", "--log-level", "info"]);
    let vm = husk.in_directory(&scratch).start();
    vm.expect_error("API server started");
    let end = Husk::new(["api", "--help"]).wait().code(0);
    let (_, curl) = end.output.split_once("  curl ").expect("an example with curl");
    let script = format!("curl --fail-with-body -s {curl}");
    let output = Command::new("sh").arg("-c").arg(script).current_dir(&scratch).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let end = vm.wait().code(0);
    assert!(end.output.contains("Hello from a bare-metal guest"), "{end}");
}

#[test]
fn version_is_told() {
    let end = Husk::new(["--version"]).wait().quickly().code(0);
    assert_eq!(end.output, concat!("husk ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn completions_are_made_for_every_shell() {
    let scratch = Scratch::new();
    for (shell, word) in [
        ("bash", "complete "),
        ("zsh", "#compdef husk"),
        ("fish", "complete -c husk"),
        ("elvish", "edit:completion"),
        ("powershell", "Register-ArgumentCompleter"),
    ] {
        let script = Husk::new(["completions", shell]).wait().code(0).output;
        assert!(script.contains(word) && script.contains("api-sock"), "{script}");
        if shell == "bash" {
            let file = scratch.file("husk.bash", script);
            assert!(Command::new("bash").arg("-n").arg(file).status().unwrap().success());
        }
    }
}

#[test]
fn manual_pages_are_made() {
    let scratch = Scratch::new();
    let directory = scratch.path("man/man1");
    Husk::new(["man"]).arg(&directory).wait().code(0);
    for command in ["", "-run", "-api", "-ctl", "-check", "-ctl-status", "-ctl-drive-set"] {
        let page = fs::read_to_string(directory.join(format!("husk{command}.1"))).unwrap();
        assert!(page.contains(".TH "), "{page}");
    }
    let file = scratch.file("file", "");
    let line = Husk::new(["man"]).arg(&file).wait().refused(4);
    assert!(line.contains(file.to_str().unwrap()), "{line}");
}

#[test]
fn output_that_nobody_takes_is_no_crash() {
    let (reader, broken) = rustix::pipe::pipe().unwrap();
    drop(reader);
    let full = File::options().write(true).open("/dev/full").unwrap();
    for (output, code) in [(broken.into(), 0), (full, 4)] {
        for args in [&["--help"][..], &["completions", "bash"]] {
            let input = File::open("/dev/null").unwrap();
            Husk::new(args).streams(input, output.try_clone().unwrap()).wait().code(code);
        }
    }
}

#[test]
fn events_that_cannot_be_printed_are_told_by_the_code() {
    let vm = Husk::api().start();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let husk = Husk::new(["ctl", "--api-sock"]).arg(vm.socket()).arg("events");
    husk.streams(File::open("/dev/null").unwrap(), full).wait().code(4);
}

#[test]
fn the_name_of_a_release_of_firecracker_is_its_name() {
    for (name, says) in [
        ("firecracker-v1.15.0-x86_64", "Firecracker v"),
        ("jailer-v1.15.0-x86_64", "Jailer v"),
        ("firecrackers", "husk "),
    ] {
        let end = Husk::named(name, ["--version"]).wait().code(0);
        assert!(end.output.starts_with(says), "{name}: {}", end.output);
    }
}

#[test]
fn check_judges_and_touches_nothing() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let disk = scratch.sparse("disk.img", 1 << 20);
    let serial = scratch.path("serial.log");
    let husk = || {
        let husk = Husk::check(guest("hello")).disk(&disk).network(&network, "").cpus(2);
        husk.serial(&format!("file={}", serial.display()))
    };
    let end = husk().wait().quickly().code(0);
    assert_eq!((end.output.as_str(), end.errors.as_str()), ("the configuration is good\n", ""));
    assert!(!serial.exists());
    let user = Husk::guest("hello", "how=hang").disk(&disk).start();
    user.expect("how=hang");
    let line = husk().wait().quickly().refused(3);
    assert!(line.contains("in use"), "{line}");
    assert!(user.is_running());
}

#[test]
fn check_needs_no_kvm() {
    Husk::check(guest("hello")).after("mount --bind /dev/null /dev/kvm").wait().code(0);
}

#[test]
fn check_refuses_what_run_refuses() {
    let scratch = Scratch::new();
    let beyond = Elf::new(0x800_0000, &[Segment::new(0x800_0000, PLUS_AND_POWEROFF)]);
    let beyond = scratch.file("beyond.elf", beyond.bytes);
    let empty = scratch.file("initrd", "");
    let disk = scratch.sparse("disk.img", 1 << 20);
    for husk in [
        Husk::check(scratch.path("missing")),
        Husk::check(beyond),
        Husk::check(guest("hello")).initrd(empty),
        Husk::check(guest("hello")).initrd(scratch.sparse("large", 128 << 20)),
        Husk::check(guest("hello")).cmdline(&"x".repeat(2048)),
        Husk::check(guest("hello")).disk(&disk).disk(&disk),
        Husk::check(guest("hello")).serial("file=/nonexistent/file"),
        Husk::check(guest("hello")).serial("socket=/tmp"),
        Husk::check(guest("hello")).memory(0),
        Husk::check(guest("hello")).disk("/dev/zero"),
    ] {
        husk.wait().quickly().refused(3);
    }
    let more = rustix::system::sysinfo().totalram / (1 << 20) + 1024;
    Husk::check(guest("hello")).memory(more).wait().quickly().refused(4);
}

#[test]
fn two_with_one_id_are_refused() {
    let scratch = Scratch::new();
    let [one, two] = ["one", "two"].map(|name| scratch.sparse(name, 1 << 20));
    let with_id = |path: &std::path::Path| format!("{},id=a", path.display());
    for (option, section) in [("--disk", "drives"), ("--pmem", "pmem")] {
        let husk = Husk::guest("hello", "").option(option, with_id(&one));
        let line = husk.option(option, with_id(&two)).wait().quickly().refused(3);
        assert!(line.contains(&format!("{section}: two have the id 'a'")), "{line}");
    }
    let husk = Husk::guest("hello", "").option("--rate-limit-group", "id=a,bw=1");
    let line = husk.option("--rate-limit-group", "id=a,bw=2").wait().quickly().refused(3);
    assert!(line.contains("rate-limit-groups: two have the id 'a'"), "{line}");
}

#[test]
fn metadata_that_do_not_fit_are_refused_by_the_file() {
    let scratch = Scratch::new();
    let file = scratch.file("metadata.json", r#"{"a": 1}"#);
    let husk = Husk::guest("hello", "").option("--metadata", &file);
    let line = husk.option("--mmds-size-limit", "3").wait().quickly().refused(3);
    let path = file.to_str().unwrap();
    assert!(line.contains(&format!("{path}: The MMDS patch request doesn't fit.")), "{line}");
}

#[test]
fn config_file_says_it_all() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", 1 << 20);
    let config = json!({
        "boot-source": {"kernel_image_path": guest("info"), "boot_args": "mine"},
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 64},
        "drives": [{"drive_id": "a", "path_on_host": disk, "is_root_device": true, "is_read_only": true}],
        "logger": null,
    });
    let file = scratch.file("vm.json", config.to_string());
    let end = Husk::new(["run", "--config-file"]).arg(file).wait().ok();
    assert_eq!(end.value("cpus"), "2");
    assert!(end.value("cmdline").starts_with("mine root=/dev/vda ro "), "{end}");
}

/// `husk ctl` with the socket of a VM.
#[track_caller]
fn ctl(vm: &TestVm, verb: &[&str]) -> String {
    let end = Husk::new(["ctl", "--api-sock"]).arg(vm.socket());
    let end = verb.iter().fold(end, |husk, word| husk.arg(word)).wait().code(0);
    assert_eq!(end.errors, "");
    end.output
}

#[test]
fn ctl_is_the_api_from_a_shell() {
    let vm = Husk::api().option("--id", "vm-1").start();
    let status = |state: &str| {
        let table = ctl(&vm, &["status"]);
        let line = table.lines().find(|line| line.starts_with("state")).unwrap().to_owned();
        assert!(line.ends_with(&format!("  {state}")), "{table}");
    };
    status("Not started");
    let source = json!({"kernel_image_path": guest("hello"), "boot_args": "how=hang"});
    vm.api().put("/boot-source", source).done();
    assert_eq!(ctl(&vm, &["start"]), "");
    status("Running");
    ctl(&vm, &["pause"]);
    status("Paused");
    ctl(&vm, &["resume"]);
    status("Running");
    ctl(&vm, &["shutdown"]);
    ctl(&vm, &["ctrl-alt-del"]);
    status("Running");
    let json: Value = serde_json::from_str(&ctl(&vm, &["--json", "status"])).unwrap();
    assert_eq!(json["id"], "vm-1");
    let config: Value = serde_json::from_str(&ctl(&vm, &["--json", "config"])).unwrap();
    assert_eq!(config["boot-source"]["boot_args"], "how=hang");

    let wait = Husk::new(["ctl", "--api-sock"]).arg(vm.socket()).arg("wait").start();
    let events = Husk::new(["ctl", "--api-sock"]).arg(vm.socket()).arg("events").start();
    events.expect("state=Running");
    ctl(&vm, &["kill"]);
    vm.wait().code(0);
    let end = events.wait().code(0);
    assert!(end.output.contains("ended  reason=killed"), "{end}");
    // It may have come just too late to ask.
    let end = wait.wait();
    assert!(end.output.contains("killed") || end.status.code() == Some(4), "{end}");
}

#[test]
fn ctl_sets_what_can_be_set() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let disk = scratch.sparse("disk.img", 1 << 20);
    ctl(&vm, &["machine", "set", "vcpu_count=1", "mem_size_mib=64"]);
    ctl(&vm, &["machine-config", "update", "vcpu_count=2"]);
    let table = ctl(&vm, &["machine", "get"]);
    assert!(table.contains("vcpu_count         2\n"), "{table}");
    let path = format!("path_on_host={}", disk.display());
    ctl(&vm, &["drive", "set", "root", &path, "is_root_device=true"]);
    let other =
        json!({"drive_id": "b", "path_on_host": scratch.sparse("b", 512), "is_root_device": false});
    ctl(&vm, &["put", "drives/b", &other.to_string()]);
    let source = scratch.file("boot", boot("how=hang").to_string());
    ctl(&vm, &["boot", "set", &format!("@{}", source.display())]);
    ctl(&vm, &["entropy", "set"]);
    ctl(&vm, &["mmds", "set", "a=1"]);
    for verb in [&["mmds", "set"][..], &["put", "mmds"], &["patch", "mmds"], &["payload", "set"]] {
        let husk = Husk::new(["ctl", "--api-sock"]).arg(vm.socket());
        let line = verb.iter().fold(husk, |husk, word| husk.arg(word)).wait().quickly().refused(3);
        assert!(line.contains("Empty P"), "{verb:?}: {line}");
    }
    assert_eq!(ctl_json(&vm, &["mmds", "get"]), json!({"a": 1}));
    let table = ctl(&vm, &["config"]);
    let rows: Vec<&str> = table.lines().skip_while(|line| *line != "drives").skip(2).collect();
    assert!(rows[0].starts_with("  root  ") && rows[1].starts_with("  b     "), "{table}");
    let config: Value = serde_json::from_str(&ctl(&vm, &["get", "/vm/config", "--json"])).unwrap();
    assert_eq!(config["drives"][1], ctl_json(&vm, &["config"])["drives"][1]);
    assert_eq!(config["machine-config"]["vcpu_count"], 2);
    ctl(&vm, &["put", "/actions", "action_type=InstanceStart"]);
    ctl(&vm, &["drive", "update", "root", &path]);
    ctl(&vm, &["patch", "/vm", r#"{"state": "Paused"}"#]);
    assert_eq!(vm.api().state(), "Paused");
    let endpoints = ctl(&vm, &["openapi"]);
    let mut rows =
        endpoints.lines().map(|line| line.split_whitespace().take(2).collect::<Vec<_>>());
    assert!(rows.any(|row| row == ["PATCH", "/drives/{id}"]), "{endpoints}");
}

fn boot(cmdline: &str) -> Value {
    json!({"kernel_image_path": guest("hello"), "boot_args": cmdline})
}

fn ctl_json(vm: &TestVm, verb: &[&str]) -> Value {
    serde_json::from_str(&ctl(vm, &[&["--json"], verb].concat())).unwrap()
}

#[test]
fn ctl_passes_what_it_opens() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let (disk, base) = (scratch.sparse("disk.img", 1 << 20), scratch.sparse("base.img", 1 << 20));
    let set = |id: &str, field: &str, more: &[&str]| {
        let path = format!("path_on_host={field}");
        let words = ["drive", "set", id, &path, "is_root_device=false"];
        let husk = Husk::new(["ctl", "--api-sock"]).arg(vm.socket());
        words.iter().chain(more).fold(husk, |husk, word| husk.arg(word)).wait()
    };
    set("a", "passed:0", &["--pass", disk.to_str().unwrap()]).code(0);
    let read_only = format!("{},ro", base.display());
    set("b", "passed:0", &["is_read_only=true", "--pass", &read_only]).code(0);
    // For reading only, and wanted for more; one that is not named; one that is not there.
    let why = set("c", "passed:0", &["--pass", &read_only]).refused(3);
    assert!(why.contains("passed:0 is open for reading only"), "{why}");
    let why = set("c", "passed:0", &["--pass", &read_only, "--pass", &read_only]).refused(3);
    assert!(why.contains("nothing in it names: passed:1"), "{why}");
    let why = set("c", "passed:0", &["--pass", "/nonexistent"]).refused(2);
    assert!(why.contains("cannot open /nonexistent for reading and writing"), "{why}");
    let network = Network::with_tap();
    let husk = Husk::new(["ctl", "--api-sock"]).arg(vm.socket()).within(&network);
    let words = ["net", "set", "eth0", "host_dev_name=passed:0", "--pass", "tap=tap0"];
    words.iter().fold(husk, |husk, word| husk.arg(word)).wait().code(0);
    let config = ctl_json(&vm, &["config"]);
    for name in [
        &config["drives"][0]["path_on_host"],
        &config["drives"][1]["path_on_host"],
        &config["network-interfaces"][0]["host_dev_name"],
    ] {
        assert!(name.as_str().unwrap().starts_with("held:"), "{config}");
    }
    vm.api().put("/boot-source", boot("how=hang")).done();
    ctl(&vm, &["start"]);
    vm.expect("how=hang");
}

#[test]
fn ctl_takes_a_body_from_standard_input() {
    let vm = Husk::api().start();
    let mut launch =
        Husk::new(["ctl", "--api-sock"]).arg(vm.socket()).arg("launch").arg("-").typing().start();
    launch.type_in(json!({"boot-source": boot("how=hang")}).to_string());
    launch.end_input();
    launch.wait().code(0);
    assert_eq!(vm.api().state(), "Running");
}

#[test]
fn ctl_refuses_wrong_arguments() {
    let vm = Husk::api().start();
    for words in [
        &["machine", "set", "vcpu_count"][..],
        &["machine", "set", "@/nonexistent/body"],
        &["machine", "set", "a=1", "a.b=2"],
        &["drive", "set", "a/b"],
        &["get", "/a b"],
        &["drive", "set"],
        &["drive"],
        &["nonsense"],
    ] {
        let husk = Husk::new(["ctl", "--api-sock"]).arg(vm.socket());
        words.iter().fold(husk, |husk, word| husk.arg(word)).wait().quickly().code(2);
    }
    let husk = |words: &[&str]| {
        let husk = Husk::new(["ctl", "--api-sock"]).arg(vm.socket());
        words.iter().fold(husk, |husk, word| husk.arg(word)).wait().refused(3)
    };
    assert!(
        husk(&["delete", "/nope"]).contains("Invalid request method and/or path: DELETE nope.")
    );
    assert!(husk(&["machine", "set"]).contains("missing field `vcpu_count`"));
}

#[test]
fn ctl_says_what_is_wrong() {
    let vm = Husk::api().start();
    let husk = |socket, verb| Husk::new(["ctl", "--api-sock"]).arg(socket).arg(verb);
    let line = husk(vm.socket().to_owned(), "pause").wait().refused(3);
    assert!(line.contains("not supported before starting the microVM"), "{line}");
    let scratch = Scratch::new();
    let nobody = scratch.path("none.sock");
    let line = husk(nobody.clone(), "status").wait().quickly().refused(4);
    assert!(line.contains(nobody.to_str().unwrap()), "{line}");
    let file = scratch.file("file", "");
    for (path, what) in [(file, "a regular file"), (scratch.as_ref().to_owned(), "a directory")] {
        let line = husk(path.clone(), "status").wait().quickly().refused(4);
        assert!(line.contains(path.to_str().unwrap()), "{line}");
        assert!(line.contains(&format!("is {what}, not a socket")), "{line}");
    }
}

#[test]
fn log_goes_where_it_should() {
    let scratch = Scratch::new();
    let log = scratch.path("husk.log");
    let end = Husk::guest("hello", "").option("--log-level", "debug").option("--log-file", &log);
    assert_eq!(end.wait().ok().errors, "");
    assert!(fs::read_to_string(&log).unwrap().contains("assembled: PVH kernel at 0x100"));
    // A FIFO without a reader stops nobody.
    let fifo = scratch.fifo("fifo");
    Husk::guest("hello", "").option("--log-level", "trace").option("--log-file", fifo).wait().ok();
    let line = Husk::guest("hello", "").option("--log-file", scratch.as_ref()).wait().refused(3);
    assert!(
        line.contains("log_path") && line.contains(scratch.as_ref().to_str().unwrap()),
        "{line}"
    );
    let quiet = Husk::guest("hello", "").option("--log-level", "off").wait().ok();
    assert_eq!(quiet.errors, "");
}
