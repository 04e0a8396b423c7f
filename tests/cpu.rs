//! The guest's CPU is what the user asked for, or the VM does not start. What is looked at is what every KVM shows to a
//! guest, one that emulates the guest's kernel included: the signature, leaf 0x8000_0008 and an emulated MSR.
use std::fs;

use serde_json::{Value, json};

use crate::util::*;

/// The signature of a Haswell, and some more.
fn changes() -> Value {
    json!({
        "kvm_capabilities": ["3", "!14"],
        "cpuid_modifiers": [
            {"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [
                {"register": "eax", "bitmap": "0bxxxx_0000_0000_0011_xx00_0110_1111_0010"},
            ]},
            {"leaf": "0x80000008", "subleaf": "0x0", "flags": 0, "modifiers": [
                {"register": "ebx", "bitmap": "0b1x11"},
            ]},
        ],
        "msr_modifiers": [{"addr": "0x1a0", "bitmap": "0b1xx_xxxx_xxxx_xxxx_xxxx_xxx0"}],
    })
}

fn boot_source() -> Value {
    json!({"kernel_image_path": guest("info")})
}

/// EAX, EBX, ECX and EDX of a leaf, as the guest saw them.
fn cpuid(end: &End, leaf: &str) -> [u32; 4] {
    let line = end.value(&format!("cpuid.{leaf}"));
    let registers: Vec<u32> =
        line.split(' ').map(|word| u32::from_str_radix(word, 16).unwrap()).collect();
    registers.try_into().unwrap()
}

/// Whether the guest saw [`changes`].
#[track_caller]
fn check_changes(end: &End) {
    assert_eq!(cpuid(end, "1.0")[0] & 0x0fff_3fff, 0x0003_06f2, "{end}");
    assert_eq!(cpuid(end, "80000008.0")[1] & 0b1011, 0b1011, "{end}");
    // husk's own setting is bit 0.
    assert_eq!(end.value("misc_enable"), "0x400000", "{end}");
}

#[test]
fn cpu_config_is_what_the_guest_sees() {
    let vm = Husk::api().start();
    let api = vm.api();
    assert_eq!(api.get("/vm/config").json()["cpu-config"], Value::Null);
    api.put("/boot-source", boot_source()).done();
    api.put("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 64})).done();
    api.put("/cpu-config", changes()).done();
    let shown = api.get("/vm/config").json()["cpu-config"].clone();
    assert_eq!(shown["kvm_capabilities"], changes()["kvm_capabilities"]);
    assert_eq!(shown["cpuid_modifiers"][1]["leaf"], "0x80000008");
    let bitmap = shown["cpuid_modifiers"][1]["modifiers"][0]["bitmap"].as_str().unwrap();
    assert!(bitmap.starts_with("0bxxxx") && bitmap.ends_with("x1x11"), "{bitmap}");
    api.act("InstanceStart").done();
    check_changes(&vm.wait().ok());
}

#[test]
fn without_one_the_guest_sees_the_host() {
    let end = Husk::guest("info", "").wait().ok();
    let host = fs::read_to_string("/proc/cpuinfo").unwrap();
    let stepping = host.lines().find_map(|line| line.strip_prefix("stepping\t: ")).unwrap();
    assert_eq!((cpuid(&end, "1.0")[0] & 0xf).to_string(), stepping);
    assert_eq!(end.value("misc_enable"), "0x1");
}

#[test]
fn configuration_files_hold_it_or_name_its_file() {
    let scratch = Scratch::new();
    let file = scratch.file("cpu.json", changes().to_string());
    for given in [changes(), json!(file)] {
        let config = json!({
            "boot-source": boot_source(),
            "cpu-config": given,
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "V1N1"},
        });
        let refused = scratch.file("vm.json", config.to_string());
        let line = Husk::new(["run", "--config-file"]).arg(refused).wait().refused(3);
        assert!(line.contains("cpu_template: V1N1 is for ARM processors"), "{line}");
        let mut config = config;
        // The other maker's: it does not count.
        config["machine-config"]["cpu_template"] = json!(host().1);
        let config = scratch.file("vm.json", config.to_string());
        check_changes(&Husk::new(["run", "--config-file"]).arg(config).wait().ok());
    }
    check_changes(&Husk::guest("info", "").option("--cpu-config", &file).wait().ok());
    let bad = scratch.file("bad.json", r#"{"cpuid_modifiers": [], "x": 1}"#);
    let config = scratch.file("vm.json", json!({"cpu-config": bad}).to_string());
    let line = Husk::new(["run", "--config-file"]).arg(config).wait().refused(3);
    assert!(line.contains("bad.json: unknown field `x`, expected one of"), "{line}");
}

/// A template for processors like this host's, and one for others.
fn host() -> (&'static str, &'static str) {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    match cpuinfo.contains("GenuineIntel") {
        true => ("T2", "T2A"),
        false => ("T2A", "T2"),
    }
}

#[test]
fn templates_are_for_the_processors_of_one_maker() {
    let (ours, theirs) = host();
    let vm = Husk::api().start();
    let api = vm.api();
    api.put("/boot-source", boot_source()).done();
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": theirs});
    let reply = api.put("/machine-config", machine);
    reply.done();
    assert!(reply.head.contains("Deprecation: true"), "{}", reply.head);
    let fault = api.act("InstanceStart").fault();
    assert!(fault.starts_with("machine-config: cpu_template: "), "{fault}");
    assert!(fault.contains("CPU vendor mismatched between actual CPU and CPU template"), "{fault}");
    let reply = api.patch("/machine-config", json!({"cpu_template": ours}));
    reply.done();
    assert!(reply.head.contains("Deprecation: true"), "{}", reply.head);
    assert_eq!(api.get("/machine-config").json()["cpu_template"], ours);
    api.act("InstanceStart").done();
    let end = vm.wait().ok();
    assert_eq!(cpuid(&end, "1.0")[0] & 0x0fff_3fff, 0x0003_06f2, "{end}");
}

#[test]
fn what_kvm_does_not_have_is_refused_at_the_start() {
    let vm = Husk::api().start();
    let api = vm.api();
    api.put("/boot-source", boot_source()).done();
    // Linear addresses of 33 bits, which no processor has.
    let addresses = json!({"register": "eax", "bitmap": "0b0010_0001_xxxx_xxxx"});
    for (config, refusal) in [
        (
            json!({"cpuid_modifiers": [
                {"leaf": "0x80000008", "subleaf": "0x0", "flags": 0, "modifiers": [addresses]}]}),
            "cpu-config: cpuid_modifiers: KVM refuses the CPUID that the changes make: Invalid \
             argument (os error 22)",
        ),
        (
            json!({"kvm_capabilities": ["3", "4242"]}),
            "cpu-config: kvm_capabilities: Missing KVM capabilities: 4242",
        ),
        (
            json!({"cpuid_modifiers": [{"leaf": "0x12345", "subleaf": "0x1", "flags": 1, "modifiers": []}]}),
            "cpu-config: cpuid_modifiers: Template changes a CPUID entry not supported by KVM: \
             Leaf: 0x12345, Subleaf: 0x1",
        ),
        (
            json!({"msr_modifiers": [{"addr": "0xdead0000", "bitmap": "0b1"}]}),
            "cpu-config: msr_modifiers: Template changes an MSR entry not supported by KVM: \
             Register Address: 0xdead0000",
        ),
        (
            // The base of the local APIC, with a bit that is reserved.
            json!({"msr_modifiers": [{"addr": "0x1b", "bitmap": "0b1"}]}),
            "cpu-config: msr_modifiers: KVM refuses to change MSR 0x1b from 0xfee00900 to \
             0xfee00901",
        ),
    ] {
        api.put("/cpu-config", config).done();
        assert_eq!(api.act("InstanceStart").fault(), refusal);
        assert_eq!(api.state(), "Not started");
    }
    api.put("/cpu-config", json!({})).done();
    api.act("InstanceStart").done();
    vm.wait().ok();
}

#[test]
fn check_judges_it_as_a_start_does() {
    let scratch = Scratch::new();
    let file = scratch.file("cpu.json", changes().to_string());
    Husk::check(guest("info")).option("--cpu-config", file).wait().code(0);
    let msr = json!({"msr_modifiers": [{"addr": "0xdead0000", "bitmap": "0b1"}]});
    let file = scratch.file("cpu.json", msr.to_string());
    let line = Husk::check(guest("info")).option("--cpu-config", file).wait().refused(3);
    assert!(line.contains("cpu-config: msr_modifiers: Template changes an MSR entry"), "{line}");
    let config = json!({
        "boot-source": boot_source(),
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": host().1},
    });
    let config = scratch.file("vm.json", config.to_string());
    let line = Husk::new(["check", "--config-file"]).arg(config).wait().refused(3);
    assert!(line.contains("machine-config: cpu_template: "), "{line}");
}

#[test]
fn the_log_shows_it_at_debug_only() {
    let scratch = Scratch::new();
    for (level, is_shown) in [("info", false), ("debug", true)] {
        let log = scratch.path(level);
        let vm = Husk::api().start();
        vm.api().put("/logger", json!({"level": level, "log_path": log})).done();
        vm.api().put("/cpu-config", changes()).done();
        vm.signal(Signal::TERM);
        vm.wait().code(143);
        let log = fs::read_to_string(log).unwrap();
        assert_eq!(log.contains(r#"on "/cpu-config" with body "{"#), is_shown, "{log}");
        let hint = "Put request on \"/cpu-config\". To view the CPU template received by the API, \
                    configure log-level to DEBUG.";
        assert_eq!(log.contains(hint), !is_shown, "{log}");
    }
}
