//! The monitor under attack, driven by nothing but Firecracker's API: husk under the name `firecracker`, or
//! whatever program `HUSK_HOSTILE_BINARY` names.
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::util::*;

/// Names another program than husk.
const OTHER: &str = "HUSK_HOSTILE_BINARY";

/// The program that is attacked, if it is not husk.
pub(crate) fn other() -> Option<OsString> {
    std::env::var_os(OTHER)
}

/// A guest to be started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) guest: &'a str,
    pub(crate) cmdline: &'a str,
    pub(crate) cpus: u32,
    /// Whether it has one device of each model.
    pub(crate) has_devices: bool,
}

/// A running monitor with its guest.
pub(crate) struct Vmm {
    pub(crate) vm: TestVm,
    api: Api,
    serial: Output,
    /// What the guest's devices are on the host, gone with it.
    _host: (Scratch, Option<Network>),
}

/// How a monitor ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum How {
    Exited(i32),
    Killed(i32),
}

impl Vmm {
    /// Starts one, with its guest. `None` if the guest cannot be had in a program that is not husk.
    pub(crate) fn start(machine: Machine<'_>) -> Option<Self> {
        Self::start_with(machine, |_| {})
    }

    /// The same; `prepare` may make more requests before the guest starts.
    pub(crate) fn start_with(machine: Machine<'_>, prepare: impl Fn(&Api)) -> Option<Self> {
        let scratch = Scratch::new();
        let socket = scratch.path("api.sock");
        let network = machine.has_devices.then(Network::with_tap);
        let husk = match other() {
            None => Husk::firecracker(["--api-sock"]).arg(&socket),
            Some(program) => Husk::of(&program, ["--api-sock"]).arg(&socket),
        };
        let husk = network.iter().fold(husk, |husk, network| husk.within(network));
        let vm = husk.start_unheard();
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < deadline && vm.is_running(), "{socket:?} does not answer");
            std::thread::yield_now();
        }
        let api = Api::new(&socket);
        // Opened for both directions, it needs no writer yet.
        let path = scratch.fifo("serial");
        let fifo = File::options().read(true).write(true).open(&path).unwrap();
        // A guest's lines are not to be mixed with those of a log, where that can be had.
        let has_serial = api.put("/serial", json!({ "serial_out_path": path })).status == 204;
        let serial = if has_serial { Output::capture("serial", fifo) } else { vm.serial.clone() };
        let mut requests = vec![
            ("/boot-source".into(), boot_source(machine)),
            ("/machine-config".into(), json!({"vcpu_count": machine.cpus, "mem_size_mib": 256})),
        ];
        if machine.has_devices {
            requests.extend(devices(&scratch));
        }
        for (path, body) in &requests {
            let reply = api.put(path, body);
            let is_needed = other().is_none() || path == "/boot-source";
            assert!(reply.status == 204 || !is_needed, "{path}: {}", reply.body);
            if reply.status != 204 {
                println!("{path} is not to be had: {}", reply.body.trim());
            }
        }
        prepare(&api);
        let reply = api.act("InstanceStart");
        if reply.status != 204 {
            assert!(other().is_some(), "{}", reply.body);
            println!("the guest does not start: {}", reply.body.trim());
            return None;
        }
        Some(Self { vm, api, serial, _host: (scratch, network) })
    }

    pub(crate) fn api(&self) -> &Api {
        &self.api
    }

    /// The next line of the guest with `pattern` in it, or how the monitor ended before there was one.
    pub(crate) fn line(&self, pattern: &str, patience: Duration) -> Result<String, String> {
        let deadline = Instant::now() + patience;
        loop {
            // Looked at once more after the end, which may have come behind the line.
            let is_over = !self.vm.is_running();
            let slice = (Instant::now() + Duration::from_millis(200)).min(deadline);
            match self.serial.line(pattern, slice) {
                Ok(line) => return Ok(line),
                Err(_) if is_over => return Err("the monitor has ended".into()),
                Err(e) if Instant::now() >= deadline => return Err(e),
                Err(_) => {}
            }
        }
    }

    /// Everything that the guest has said.
    pub(crate) fn said(&self) -> String {
        self.serial.so_far()
    }

    /// Waits for the end.
    pub(crate) fn end(self, patience: Duration) -> Option<(How, String)> {
        use std::os::unix::process::ExitStatusExt;
        if !self.vm.ends_within(patience) {
            return None;
        }
        let end = self.vm.wait();
        let how = match (end.status.code(), end.status.signal()) {
            (Some(code), _) => How::Exited(code),
            (None, signal) => How::Killed(signal.unwrap_or(0)),
        };
        Some((how, end.errors + &end.output))
    }
}

fn boot_source(machine: Machine<'_>) -> Value {
    json!({"kernel_image_path": guest(machine.guest), "boot_args": machine.cmdline})
}

/// One device of each model.
fn devices(scratch: &Scratch) -> Vec<(String, Value)> {
    let disk = scratch.sparse("disk", 1 << 20);
    let pmem = scratch.sparse("pmem", 2 << 20);
    let json = [
        (
            "/drives/disk",
            json!({"drive_id": "disk", "path_on_host": disk, "is_root_device": false,
                   "is_read_only": false}),
        ),
        ("/network-interfaces/eth0", json!({"iface_id": "eth0", "host_dev_name": "tap0"})),
        ("/vsock", json!({"guest_cid": 3, "uds_path": scratch.path("v.sock")})),
        ("/entropy", json!({})),
        (
            "/balloon",
            json!({"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1}),
        ),
        (
            "/pmem/pmem0",
            json!({"id": "pmem0", "path_on_host": pmem, "root_device": false, "read_only": false}),
        ),
        ("/hotplug/memory", json!({"total_size_mib": 256})),
    ];
    json.map(|(path, body)| (path.to_owned(), body)).into()
}
