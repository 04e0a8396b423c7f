//! What of the outside a restored VM has: a tap that somebody else has opened, a file that another VM writes, and how
//! what cannot be had is refused.
use std::fs;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use devices::sys::tun;
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::json;

use crate::util::*;

fn restore(snapshot: &Path) -> Husk {
    Husk::new(["restore"]).arg(snapshot)
}

/// Saves a VM, and gives it and where.
fn saved(scratch: &Scratch, husk: Husk) -> (TestVm, PathBuf) {
    let vm = husk.listening().start();
    vm.expect("ready=1");
    let directory = scratch.path("saved");
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
    (vm, directory)
}

/// An open tap, which is passed on to processes that are started.
pub(crate) fn open_tap(network: &Network, name: &str) -> File {
    let file = network.within(|| {
        let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        tun::attach(&file, name).unwrap();
        file
    });
    fcntl_setfd(&file, FdFlags::empty()).unwrap();
    file
}

#[test]
fn a_tap_may_be_a_descriptor() {
    let scratch = Scratch::new();
    let network = Network::with_tap();
    let husk = Husk::guest("net", "echoes=3").memory(16).network(&network, "");
    let (vm, directory) = saved(&scratch, husk);
    drop(vm);
    // In another network, which husk is not in.
    let other = Network::with_tap();
    let tap = open_tap(&other, "tap0");
    let number = tap.as_raw_fd();
    let by_number = format!("eth0=fd={number}");
    let vm = restore(&directory).option("--net", &by_number).listening().start();
    drop(tap);
    let config = vm.api().get("/vm/config").json();
    let name = format!("fd:{number}");
    assert_eq!(config["network-interfaces"][0]["host_dev_name"], json!(name));
    other.run("ping", "-c 1 -W 30 172.16.0.2");
    // Its number is nothing to who goes on from this one.
    let again = scratch.path("again");
    vm.api().put("/snapshot/create", json!({ "directory": again })).done();
    other.run("ping", "-c 2 -i 0.2 -W 30 172.16.0.2");
    vm.wait().ok();
    let line = restore(&again).wait().quickly().refused(3);
    assert!(line.contains("eth0: host_dev_name: 'fd:' is no descriptor of this process"), "{line}");
    assert!(line.contains("name another in an override"), "{line}");

    // In a program.
    let tap = open_tap(&other, "tap0");
    let image = husk::Image::open(&again).unwrap();
    let mut overrides = husk::Overrides::default();
    let name = format!("fd:{}", tap.as_raw_fd());
    overrides.add("network-interfaces", json!({"iface_id": "eth0", "host_dev_name": name}));
    let vm = husk::Vm::restore(&image, overrides).unwrap();
    drop(tap);
    other.run("ping", "-c 2 -i 0.2 -W 30 172.16.0.2");
    assert_eq!(vm.wait().unwrap().to_string(), husk::Ending::PoweredOff.to_string());

    let null = File::open("/dev/null").unwrap();
    fcntl_setfd(&null, FdFlags::empty()).unwrap();
    for (number, code, words) in [
        (null.as_raw_fd().to_string(), 3, "is neither a tap with IFF_NO_PI"),
        ("1000000".into(), 4, "'fd:1000000': no such descriptor is open"),
    ] {
        let line = restore(&again).option("--net", format!("eth0=fd={number}")).wait();
        let line = line.quickly().refused(code);
        assert!(line.contains(words) && !line.contains("override"), "{line}");
    }
}

/// Two VMs that write to one file destroy it.
#[test]
fn what_is_written_is_one_vms() {
    let scratch = Scratch::new();
    let pmem = scratch.file("pmem", vec![1; 2 << 20]);
    let husk = Husk::guest("steps", "").memory(16).option("--pmem", &pmem);
    let (original, directory) = saved(&scratch, husk);
    let line = restore(&directory).wait().quickly().refused(3);
    let words = "pmem is in use by another drive or process; this is what the snapshot says";
    assert!(line.contains("pmem pmem0: path_on_host: ") && line.contains(words), "{line}");
    let load = |vm: &TestVm, path: Option<&Path>| {
        let pmem = path.map(|path| json!([{"id": "pmem0", "path_on_host": path}]));
        let overrides = pmem.map_or(json!({}), |pmem| json!({ "pmem": pmem }));
        let body = json!({"directory": directory, "resume_vm": true, "overrides": overrides});
        vm.api().put("/snapshot/load", body)
    };
    // Nor is it in a process that has another VM, by a path of its own, nor in the process that has it.
    let used = Husk::guest("steps", "").memory(16).listening().start();
    used.expect("ready=1");
    let link = scratch.path("link");
    fs::hard_link(&pmem, &link).unwrap();
    let fault = load(&used, Some(&link)).fault();
    assert!(fault.contains("link is in use by another drive or process"), "{fault}");
    let fault = load(&original, None).fault();
    assert!(fault.contains(words), "{fault}");
    for (vm, name) in [(&used, "one"), (&original, "two")] {
        assert_eq!(vm.api().state(), "Running");
        let copy = scratch.path(name);
        fs::copy(&pmem, &copy).unwrap();
        load(vm, Some(&copy)).done();
        assert_eq!(vm.api().state(), "Running");
    }
    // Nobody has it any more.
    load(&used, None).done();
}
