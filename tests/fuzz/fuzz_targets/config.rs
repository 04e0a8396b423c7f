#![no_main]
//! JSON of the configuration: documents, and each section's PUT and PATCH. What is taken is shown, and what is shown is
//! taken again.

use devices::virtio::{MODELS, model, view};
use fuzz::bytes::Bytes;
use fuzz::json::spoil;
use husk::VmConfig;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

const STEPS_MAX: usize = 16;
const SECTIONS: [&str; 10] = [
    "boot-source",
    "cpu-config",
    "logger",
    "machine-config",
    "metrics",
    "mmds-config",
    "payload",
    "rate-limit-groups",
    "serial",
    "no-such",
];

fuzz_target!(init: fuzz::begin(), |input: &[u8]| {
    if let Some((b'{', _)) = input.split_first() {
        let mut config = VmConfig::default();
        return put_all(&mut config, input);
    }
    let mut input = Bytes::new(input);
    let mut config = VmConfig::default();
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            return;
        }
        step(&mut config, &mut input);
    }
});

fn step(config: &mut VmConfig, input: &mut Bytes<'_>) {
    let which = usize::from(input.below(18));
    let models = MODELS.iter().map(|row| row.name);
    let name = SECTIONS.into_iter().chain(models).nth(which).unwrap_or("drives");
    let how = input.u8();
    let id = (how & 1 != 0).then_some("a");
    let body = body(name, how, input);
    let before = config.to_json();
    match how >> 1 & 3 {
        0 | 1 => {
            if config.put(name, id, &body).is_err() {
                assert_eq!(config.to_json(), before, "{name}: it was refused, and changed");
            } else {
                shown_again(config);
            }
        }
        2 => {
            if config.patch(name, &body).is_err() {
                assert_eq!(config.to_json(), before, "{name}: it was refused, and changed");
            }
            // While the guest runs.
            let patch = model(name).and_then(|row| row.patch);
            let _ = patch.map(|patch| (patch.parse)(&body));
            for view in MODELS.iter().flat_map(|row| row.views) {
                let _ = view.patch.map(|patch| (patch.parse)(&body));
            }
        }
        _ => {
            let mut document = document();
            spoil(&mut document, input);
            put_all(config, document.to_string().as_bytes());
        }
    }
    let _ = config.show(name);
    let _ = view(name).map(|_| config.show(name));
}

/// A body of a request: a good one that is spoilt, or anything.
fn body(name: &str, how: u8, input: &mut Bytes<'_>) -> Vec<u8> {
    let good = &document()[name];
    let mut good = if good.is_array() { good[0].clone() } else { good.clone() };
    if how & 8 != 0 || good.is_null() {
        return input.piece().to_vec();
    }
    if how & 0x10 != 0 {
        spoil(&mut good, input);
    }
    good.to_string().into_bytes()
}

fn put_all(config: &mut VmConfig, json: &[u8]) {
    let before = config.to_json();
    if config.put_all(json).is_err() {
        assert_eq!(config.to_json(), before, "a document was refused, and changed something");
        return;
    }
    shown_again(config);
    let _ = config.check();
}

/// What is shown can be put, and is the same then.
fn shown_again(config: &VmConfig) {
    let shown = config.to_json();
    let mut again = VmConfig::default();
    again.defaults = config.defaults.clone();
    if again.put_all(shown.to_string().as_bytes()).is_ok() {
        assert_eq!(again.to_json(), shown);
    }
}

/// Something of everything.
fn document() -> Value {
    let limiter = json!({"bandwidth": {"size": 10, "one_time_burst": 5, "refill_time": 100},
                         "ops": {"size": 1, "refill_time": 1}});
    json!({
        "boot-source": {"kernel_image_path": "builtin:demo", "boot_args": "a b", "initrd_path": null},
        "machine-config": {"vcpu_count": 4, "mem_size_mib": 64, "smt": true, "pit": true,
                           "huge_pages": "None", "cpu_template": "None", "track_dirty_pages": true,
                           "on_reboot": "Exit", "forkable": false},
        "cpu-config": {"kvm_capabilities": ["!56"], "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0",
            "flags": 0, "modifiers": [{"register": "eax", "bitmap": "0bx00100xxx1xxxxxx1xxxxxx0xxxxxxx0"}]}],
            "msr_modifiers": [{"addr": "0x10", "bitmap": "0b1x"}]},
        "serial": {"to": "Pty", "rate_limiter": {"size": 1, "refill_time": 1}},
        "logger": {"level": "trace", "show_level": true, "show_log_origin": false, "module": "husk"},
        "metrics": {"metrics_path": "metrics", "properties": {"a": "b"}},
        "mmds-config": {"version": "V2", "network_interfaces": ["eth0"], "ipv4_address": "169.254.1.1"},
        "payload": {"any": ["thing"]},
        "rate-limit-groups": [{"id": "g", "rate_limiter": limiter}],
        "drives": [{"drive_id": "a", "path_on_host": "Cargo.toml", "is_root_device": true,
                    "is_read_only": true, "io_engine": "Sync", "rate_limiter": limiter,
                    "rate_limit_group": "g", "cache_type": "Writeback", "partuuid": "0eaa91a0-01"}],
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:01",
                                "rx_rate_limiter": limiter, "tx_rate_limiter": limiter}],
        "pmem": [{"id": "p", "path_on_host": "Cargo.toml", "root_device": false, "read_only": true}],
        "vsock": {"guest_cid": 3, "uds_path": "v.sock"},
        "balloon": {"amount_mib": 1, "deflate_on_oom": true, "stats_polling_interval_s": 1},
        "memory-hotplug": {"total_size_mib": 256},
        "entropy": {"rate_limiter": limiter},
    })
}
