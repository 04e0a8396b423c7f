//! Bad input: refused at once, with one line that names what is wrong and its value, on the command line and over the API.
//! What is wrong with kernels, initrds, command lines, machines and disks is in tests/rows.
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use serde_json::{Value, json};

use crate::rows::no_files;
use crate::util::*;

const MIB: u64 = 1 << 20;

/// Refuses a configuration on both ways in: `husk` must end with `code`, an API must go on. Returns what they say.
#[track_caller]
fn refused(husk: Husk, api: &Api, config: Value, code: i32, words: &[&str]) {
    let line = husk.wait().quickly().refused(code);
    let fault = api.put("/vm", config).fault();
    for text in [&line, &fault] {
        for word in words {
            assert!(text.contains(word), "want {word:?} in: {text}");
        }
    }
    assert!(line.starts_with("husk: "), "{line}");
    assert_eq!(api.state(), "Not started");
}

#[test]
fn two_root_disks() {
    let scratch = Scratch::new();
    let [a, b] = ["a.img", "b.img"].map(|name| scratch.sparse(name, MIB));
    let root = |path: &Path| format!("{},root", path.display());
    let husk = Husk::guest("hello", "").option("--disk", root(&a)).option("--disk", root(&b));
    assert_eq!(husk.wait().refused(3), "husk: A root block device already exists!");
}

#[test]
fn more_devices_than_interrupts() {
    let scratch = Scratch::new();
    let mut husk = Husk::guest("hello", "");
    for i in 0..18 {
        husk = husk.disk(scratch.sparse(&format!("{i}.img"), MIB));
    }
    let line = husk.wait().refused(3);
    assert!(line.contains("17 virtio devices"), "{line}");
}

/// Refuses an interface for what the host lacks.
#[track_caller]
fn bad_net(network: &Network, tap: &str, code: i32, word: &str) {
    let vm = Husk::api().within(network).start();
    let config = json!({
        "boot-source": {"kernel_image_path": guest("hello")},
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": tap}],
    });
    let husk = Husk::guest("hello", "").within(network).option("--net", format!("tap={tap}"));
    let words = ["network-interfaces", "eth0", "host_dev_name", tap, word];
    refused(husk, &vm.api(), config, code, &words);
}

#[test]
fn taps_that_cannot_be_had() {
    let network = Network::with_tap();
    bad_net(&network, "none0", 4, "does not exist");
    bad_net(&network, "lo", 3, "is not a tap");
    let user = Husk::guest("hello", "how=hang").network(&network, "").start();
    user.expect("how=hang");
    bad_net(&network, "tap0", 4, "is in use");
    bad_net(&network, "a-name-that-is-too-long", 3, "is no interface name");
    bad_net(&network, "tap%d", 3, "is no interface name");
}

#[test]
fn bad_addresses_and_mtus() {
    let network = Network::with_tap();
    for (more, field, value) in [
        (",mac=02:00:00:00:00", "guest_mac", "02:00:00:00:00"),
        (",mac=02:00:00:00:00:0g", "guest_mac", "02:00:00:00:00:0g"),
        (",mac=02:00:00:00:00:01:02", "guest_mac", "02:00:00:00:00:01:02"),
        (",mac=01:00:00:00:00:01", "guest_mac", "multicast"),
        (",mac=00:00:00:00:00:00", "guest_mac", "zero"),
        (",mtu=67", "mtu", "67"),
    ] {
        let line = Husk::guest("hello", "").network(&network, more).wait().quickly().refused(3);
        assert!(line.contains(field) && line.contains(value), "{line}");
    }
    for more in [",mtu=65536", ",mtu=many", ",mac", ",speed=9", ""] {
        let net = if more.is_empty() {
            "mac=02:00:00:00:00:01".into()
        } else {
            format!("tap=tap0{more}")
        };
        Husk::guest("hello", "").within(&network).option("--net", net).wait().quickly().code(2);
    }
}

#[test]
fn huge_pages_that_the_host_does_not_have() {
    // None are reserved on a machine that was not told to.
    let line =
        Husk::guest("hello", "").memory(1 << 14).option("--huge-pages", "2M").wait().refused(4);
    assert!(line.contains("16384 MiB"), "{line}");
    let line = Husk::guest("hello", "").memory(3).option("--huge-pages", "2M").wait().refused(3);
    assert!(line.contains("mem_size_mib"), "{line}");
}

#[test]
fn config_files_that_are_no_files() {
    let scratch = Scratch::new();
    let mut files = no_files(&scratch);
    files.push((scratch.file("empty", ""), "EOF"));
    files.push((scratch.sparse("huge", 1 << 40), "larger than 1048576 bytes"));
    for (path, word) in files {
        let line = Husk::new(["run", "--config-file"]).arg(&path).wait().quickly().refused(3);
        assert!(line.contains(path.to_str().unwrap()) && line.contains(word), "{line}");
    }
}

#[test]
fn config_files_that_are_no_configurations() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let kernel = guest("hello");
    let kernel = kernel.to_str().unwrap();
    let boot = format!(r#""boot-source": {{"kernel_image_path": "{kernel}"}}"#);
    let deep = format!(r#"{{"drives": {}"#, "[".repeat(40_000));
    for (text, word) in [
        ("", "EOF while parsing"),
        ("{", "EOF while parsing"),
        ("[]", "invalid type: sequence"),
        ("null", "invalid type: null"),
        ("hello", "expected value at line 1 column 1"),
        ("\u{feff}{}", "expected value at line 1 column 1"),
        ("{} {}", "trailing characters at line 1 column 4"),
        (r#"{"boot-source": {}}"#, "missing field `kernel_image_path`"),
        (r#"{"boot-source": {"kernel_image_path": 5}}"#, "invalid type: integer `5`"),
        (r#"{"boot-source": {"kernel_image_path": "k", "x": 1}}"#, "unknown field `x`"),
        (
            r#"{"boot-source": {"kernel_image_path": "a", "kernel_image_path": "b"}}"#,
            "duplicate field",
        ),
        (r#"{"boot-sauce": {}}"#, "unknown field `boot-sauce`"),
        (&format!("{{{boot}, {boot}}}"), "duplicate field `boot-source`"),
        (&format!(r#"{{{boot}, "drives": {{}}}}"#), "drives: "),
        (
            &format!(r#"{{{boot}, "drives": [{{"drive_id": "a"}}]}}"#),
            "missing field `is_root_device`",
        ),
        (
            &format!(r#"{{{boot}, "machine-config": {{"vcpu_count": 1}}}}"#),
            "missing field `mem_size_mib`",
        ),
        (
            &format!(r#"{{{boot}, "machine-config": {{"vcpu_count": "1", "mem_size_mib": 1}}}}"#),
            "invalid type: string",
        ),
        (
            &format!(r#"{{{boot}, "machine-config": {{"vcpu_count": -1, "mem_size_mib": 1}}}}"#),
            "invalid value: integer `-1`",
        ),
        (
            &format!(r#"{{{boot}, "machine-config": {{"vcpu_count": 1e99, "mem_size_mib": 1}}}}"#),
            "invalid type: floating point",
        ),
        (&format!(r#"{{{boot}, "machine-config": {{"vcpu_count": NaN}}}}"#), "expected value"),
        (&format!(r#"{{{boot}, "balloon": {{}}}}"#), "balloon: missing field `amount_mib`"),
        (&deep, "at line 1 column"),
    ] {
        let file = scratch.file("vm.json", text);
        let line = Husk::new(["run", "--config-file"]).arg(&file).wait().quickly().refused(3);
        assert!(line.contains(file.to_str().unwrap()) && line.contains(word), "{text}: {line}");
        if !text.is_empty() {
            let fault = vm.api().put("/vm", text).fault();
            assert!(fault.contains(word), "{text}: {fault}");
            assert_eq!(vm.api().state(), "Not started");
        }
    }
    let latin = scratch.file("latin.json", b"{\"boot-source\": \"caf\xe9\"}");
    let line = Husk::new(["run", "--config-file"]).arg(&latin).wait().refused(3);
    assert!(line.contains("invalid unicode") || line.contains("UTF-8"), "{line}");
}

#[test]
fn config_files_say_where_they_are_wrong() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", MIB);
    let drive = json!({"drive_id": "a", "path_on_host": disk, "is_root_device": false});
    let text = format!(
        "{{\n  \"boot-source\": {{\"kernel_image_path\": \"builtin:demo\"}},\n  \"drives\": [\n    \
         {drive},\n    {{\n      \"drive_id\": \"b\",\n      \"x\": 1\n    }}\n  ]\n}}\n"
    );
    let file = scratch.file("vm.json", &text);
    let line = Husk::new(["run", "--config-file"]).arg(&file).wait().quickly().refused(3);
    let start = format!("husk: {}: drives[1]: unknown field `x`, expected ", file.display());
    assert!(line.starts_with(&start), "{line}");
    assert!(line.ends_with(" at line 7 column 9"), "{line}");
    // What the host lacks is no fault of the file's.
    let config = json!({
        "boot-source": {"kernel_image_path": "builtin:demo"},
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "none0"}],
    });
    let file = scratch.file("vm.json", config.to_string());
    let line = Husk::new(["run", "--config-file"]).arg(&file).wait().quickly().refused(4);
    assert!(line.contains("eth0") && line.contains("does not exist"), "{line}");
}

#[test]
fn one_call_replaces_what_was_configured() {
    let vm = Husk::api().start();
    let api = vm.api();
    api.put("/entropy", json!({})).done();
    api.put("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 64})).done();
    let source = json!({"kernel_image_path": guest("hello"), "boot_args": "how=hang"});
    api.put("/vm", json!({"boot-source": source})).done();
    let config = api.get("/vm/config").json();
    assert_eq!(
        (&config["entropy"], &config["machine-config"]["vcpu_count"]),
        (&Value::Null, &json!(1))
    );
    api.act("Kill").done();
    vm.wait().code(0);
}

#[test]
fn refused_configuration_leaves_no_log() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let log = scratch.path("husk.log");
    let config = json!({
        "logger": {"log_path": log},
        "boot-source": {"kernel_image_path": guest("hello")},
        "serial": {"to": {"File": scratch.path("missing/file")}},
    });
    vm.api().put("/vm", &config).fault();
    let file = scratch.file("vm.json", config.to_string());
    Husk::new(["run", "--config-file"]).arg(&file).wait().refused(3);
    let good = json!({
        "logger": {"log_path": log},
        "boot-source": {"kernel_image_path": guest("hello")},
    });
    let file = scratch.file("vm.json", good.to_string());
    Husk::new(["check", "--config-file"]).arg(&file).wait().code(0);
    assert!(!log.exists());
    Husk::new(["run", "--config-file"]).arg(&file).wait().ok();
    assert!(log.exists());
}

#[test]
fn settings_are_judged_where_they_are_made() {
    let (scratch, network) = (Scratch::new(), Network::with_tap());
    let vm = Husk::api().within(&network).start();
    let api = vm.api();
    assert_eq!(api.patch("/machine-config", json!({})).fault(), "Empty PATCH request.");
    for (text, word) in
        [("x".repeat(3000), "3000"), ("a\0b".into(), "0x00"), ("a\nb".into(), "0x0a")]
    {
        let source = json!({"kernel_image_path": guest("hello"), "boot_args": text});
        let fault = api.put("/boot-source", source).fault();
        assert!(fault.contains("command line") && fault.contains(word), "{fault}");
    }
    let fault = api.put("/serial", json!({"serial_out_path": scratch.path("no/file")})).fault();
    assert!(fault.contains("No such file"), "{fault}");
    let fault = api.put("/logger", json!({"log_path": scratch.path("no/file")})).fault();
    assert!(fault.contains("No such file"), "{fault}");
    // Firecracker's own clients say null and mean the default, and send limiters without limits.
    let disk = scratch.sparse("disk.img", MIB);
    let drive = json!({
        "drive_id": "a", "path_on_host": disk, "is_root_device": false, "is_read_only": null,
        "cache_type": null, "io_engine": null, "rate_limiter": {"bandwidth": null, "ops": null},
    });
    api.put("/drives/a", drive).done();
    let limit = json!({"rate_limiter": {"ops": {"size": -1, "refill_time": 1}}});
    let fault = api.put("/entropy", limit).fault();
    assert!(fault.contains("invalid value: integer `-1`, expected u64"), "{fault}");
    let interface = |id: &str, tap: &str, mac: &str| {
        let path = format!("/network-interfaces/{id}");
        api.put(&path, json!({"iface_id": id, "host_dev_name": tap, "guest_mac": mac}))
    };
    network.run("ip", "tuntap add tap1 mode tap");
    interface("eth0", "tap0", "06:00:AC:10:00:02").done();
    let fault = interface("eth1", "tap1", "06:00:ac:10:00:02").fault();
    assert!(
        fault.contains("The guest MAC address 06:00:ac:10:00:02 is already in use."),
        "{fault}"
    );
    let fault = interface("eth1", "tap0", "06:00:ac:10:00:03").fault();
    assert!(fault.contains("is in use"), "{fault}");
    interface("eth0", "tap0", "06:00:AC:10:00:02").done();
    api.put("/drives/a", json!({"drive_id": "a", "path_on_host": disk, "is_root_device": false}))
        .done();
    let fault = api
        .put("/drives/b", json!({"drive_id": "b", "path_on_host": disk, "is_root_device": false}));
    assert!(fault.fault().contains("in use"), "the same disk");
    for i in 2..17 {
        let disk = scratch.sparse(&format!("{i}.img"), MIB);
        let id = format!("d{i}");
        let drive = json!({"drive_id": id, "path_on_host": disk, "is_root_device": false});
        api.put(&format!("/drives/{id}"), drive).done();
    }
    let fault = api.put("/entropy", json!({})).fault();
    assert!(fault.contains("17 virtio devices"), "{fault}");
}

#[test]
fn refused_configuration_changes_nothing() {
    let (scratch, vm) = (Scratch::new(), Husk::api().start());
    let disk = scratch.sparse("disk.img", MIB);
    let api = vm.api();
    let drive = json!({"drive_id": "a", "path_on_host": disk, "is_root_device": false});
    api.put("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 64})).done();
    api.put("/drives/a", &drive).done();
    let before = api.get("/vm/config").json();
    api.put("/machine-config", json!({"vcpu_count": 99, "mem_size_mib": 64})).fault();
    api.put("/drives/a", json!({"drive_id": "a", "path_on_host": "/", "is_root_device": false}))
        .fault();
    api.put("/drives/b", json!({"drive_id": "b", "path_on_host": "/", "is_root_device": false}))
        .fault();
    api.put("/boot-source", json!({"kernel_image_path": "/"})).fault();
    api.act("InstanceStart").fault();
    let config = json!({"boot-source": {"kernel_image_path": guest("hello")},
                        "machine-config": {"vcpu_count": 1, "mem_size_mib": 1_u64 << 60}});
    api.put("/vm", config).fault();
    assert_eq!(api.get("/vm/config").json(), before);
    // And it is still of use.
    api.put("/boot-source", json!({"kernel_image_path": guest("hello")})).done();
    api.act("InstanceStart").done();
    vm.wait().ok();
}

#[test]
fn serial_ports_that_lead_to_no_place() {
    let scratch = Scratch::new();
    let directory = scratch.as_ref().display();
    let long = "x".repeat(200);
    for to in [
        format!("file={directory}"),
        format!("file={directory}/none/file"),
        format!("socket={directory}"),
        format!("socket={directory}/{long}"),
        format!("socket={}", scratch.file("file", "precious").display()),
    ] {
        let line = Husk::guest("hello", "").serial(&to).wait().quickly().refused(3);
        assert!(line.contains("serial") && line.contains(&*directory.to_string()), "{line}");
        let checked = Husk::check(guest("hello")).serial(&to).wait().quickly().refused(3);
        assert_eq!(checked, line);
    }
    let taken = scratch.path("taken");
    let _listener = UnixListener::bind(&taken).unwrap();
    let to = format!("socket={}", taken.display());
    let line = Husk::guest("hello", "").serial(&to).wait().quickly().refused(3);
    assert!(line.ends_with("another process is listening on it"), "{line}");
    assert_eq!(fs::read_to_string(scratch.path("file")).unwrap(), "precious");
    for to in ["", "file", "file=", "socket=", "telephone"] {
        Husk::guest("hello", "").serial(to).wait().quickly().code(2);
    }
}

#[test]
fn arguments_that_make_no_sense() {
    for args in [
        &[][..],
        &["fly"],
        &["run", "--kernal", "vmlinux"],
        &["run", "vmlinux"],
        &["run", "--kernel"],
        &["run", "--on-reboot", "party"],
        &["run", "--disk", ""],
        &["run", "--disk", ",ro"],
        &["run", "--disk", "disk.img,rw,fast"],
        &["run", "--config-file", "vm.json", "--kernel", "vmlinux"],
        &["run", "--id", "a/b"],
        &["run", "--log-level", "loud"],
        &["api"],
        &["ctl", "status"],
        &["completions", "csh"],
    ] {
        let end = Husk::new(args).wait().quickly().code(2);
        assert_eq!(end.output, "", "{end}");
        assert!(!end.errors.is_empty(), "{end}");
    }
}

#[test]
fn options_that_contradict_each_other() {
    for (flag, value, words) in [
        ("--disk", "a,ro,rw", ["'ro'", "'rw'"]),
        ("--disk", "a,overlay=b,overlay=memory", ["'overlay=b'", "'overlay=memory'"]),
        ("--disk", "a,bw=1,bw=2", ["'bw=1'", "'bw=2'"]),
        ("--pmem", "a,id=b,id=c", ["'id=b'", "'id=c'"]),
        ("--net", "tap=a,fd=3", ["'tap=a'", "'fd=3'"]),
        ("--net", "tap=a,mmds,mmds=V1", ["'mmds'", "'mmds=V1'"]),
        ("--vsock", "cid=3,cid=4,uds=a", ["'cid=3'", "'cid=4'"]),
        ("--balloon", "5,stats=1,stats=2", ["'stats=1'", "'stats=2'"]),
        ("--hotplug-memory", "1024,slot=128,slot=256", ["'slot=128'", "'slot=256'"]),
        ("--rate-limit-group", "id=a,id=b", ["'id=a'", "'id=b'"]),
    ] {
        let end = Husk::new(["run", flag, value]).wait().quickly().code(2);
        for word in words.iter().chain([&flag, &"which of them?"]) {
            assert!(end.errors.contains(word), "{flag} {value}: {end}");
        }
    }
}

#[test]
fn numbers_that_are_none_and_names_that_cannot_be_told() {
    for (flag, value, why) in [
        ("--cpus", "-1", "want a number from 1 to 32"),
        ("--cpus", "many", "want a number from 1 to 32"),
        ("--memory", "-5", "want a number of MiB"),
        ("--memory", "99999999999999999999", "so many MiB there are not"),
        ("--balloon", "x", "MiB 'x': want a number"),
        ("--balloon", "-5", "want a number"),
        ("--balloon", "5,stats=99999", "stats '99999': the number is too large"),
        ("--hotplug-memory", "x", "want a number"),
        ("--vsock", "cid=x,uds=a", "cid 'x': want a number"),
        ("--net", "tap=a,mmds=V3", "mmds=V1, mmds=V2"),
        ("--kernel", "", "the path is empty"),
        ("--metrics-path", "", "the path is empty"),
    ] {
        let end = Husk::new(["run", flag, value]).wait().quickly().code(2);
        assert!(end.errors.contains(flag) && end.errors.contains(why), "{flag} {value}: {end}");
    }
    let name = OsStr::from_bytes(b"k\xff");
    for args in [&["run", "--kernel"][..], &["run", "--log-file"], &["restore"]] {
        let end = Husk::new(args).arg(name).wait().quickly().code(2);
        assert!(end.errors.contains("a name that is not UTF-8"), "{args:?}: {end}");
    }
}

#[test]
fn a_umask_takes_nothing_from_the_owner() {
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    let husk = Husk::guest("hello", "how=hang").after("umask 0777").listening_at(&socket);
    let vm = husk.start();
    assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
    assert_eq!(vm.api().state(), "Running");
}

#[test]
fn host_without_kvm() {
    for (prepare, word) in [
        ("mount -t tmpfs none /dev", "cannot open /dev/kvm: load the kvm_intel or kvm_amd module"),
        ("mount --bind /dev/null /dev/kvm", "/dev/kvm"),
    ] {
        let line = Husk::guest("hello", "").after(prepare).wait().quickly().refused(4);
        assert!(line.contains(word), "{line}");
    }
}

#[test]
fn host_without_descriptors() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("disk.img", MIB);
    let mut started = 0;
    for limit in 4..64 {
        let husk = Husk::guest("hello", "").cpus(2).disk(&disk).arg("--rng").listening();
        let vm = husk.after(&format!("ulimit -n {limit}")).start_unheard();
        let end = vm.wait();
        match end.status.code() {
            Some(0) => started += 1,
            // The dynamic loader was already at its wits' end.
            Some(127) => assert!(limit < 10, "{limit} {end}"),
            Some(4) => {
                let says_so = ["Too many open files", "Error(24)"].map(|s| end.errors.contains(s));
                assert!(says_so.contains(&true), "{limit} {end}");
            }
            _ => panic!("{limit} {end}"),
        }
    }
    assert!((1..50).contains(&started), "{started}");
}

#[test]
fn host_without_memory() {
    // Not even husk's own needs are met, or those of the guest are not: never a crash. With less than the lowest the
    // kernel cannot have it there at all, and ends what is to become of it by a signal.
    let loader = "error while loading shared libraries: ";
    for kib in [24_000, 26_000, 30_000, 60_000, 100_000, 140_000] {
        let end = Husk::guest("hello", "").after(&format!("ulimit -v {kib}")).wait();
        match end.status.code() {
            Some(0 | 4) => assert!(!end.errors.contains("panicked"), "{kib} {end}"),
            // There is no husk yet that could say anything.
            Some(127) if kib < 30_000 => assert!(end.errors.contains(loader), "{kib} {end}"),
            _ => panic!("{kib} {end}"),
        }
    }
}
