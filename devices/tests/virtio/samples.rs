//! One working device of each model, so that the conformance suite can run every row of the table.
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use devices::limiter::Pool;
use devices::mmds::{Mmds, Service};
use devices::virtio::model::{Env, VirtioDevice};
use devices::virtio::{MODELS, model, net};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::json;

/// A device, and what must outlive it.
pub(crate) struct Sample {
    pub(crate) device: Box<dyn VirtioDevice>,
    pub(crate) host: Host,
}

/// The host's side of a sample.
#[derive(Default)]
pub(crate) struct Host {
    _file: Option<TempFile>,
    _directory: Option<TempDir>,
    pub(crate) peer: Option<OwnedFd>,
}

/// Every kind of device there is: each model, and what is quite different inside.
pub(crate) fn kinds() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|row| row.name).chain([ASYNC_DRIVE, LIMITED_DRIVE, LAYERED_DRIVE, METADATA])
}

pub(crate) const ASYNC_DRIVE: &str = "drives, Async";
pub(crate) const LIMITED_DRIVE: &str =
    "drives, Async, which wait for a rate limit and for a group's";
pub(crate) const LAYERED_DRIVE: &str = "drives, Async, with a layer over the file";
pub(crate) const METADATA: &str = "network-interfaces, limited, to the metadata service";

/// What makes a device wait often, but not for long.
fn limit() -> serde_json::Value {
    json!({"ops": {"size": 3, "refill_time": 1}})
}

/// A working device of the kind called `name`.
pub(crate) fn sample(name: &str) -> Sample {
    match name {
        "drives" | ASYNC_DRIVE | LAYERED_DRIVE => {
            let file = TempFile::new(&[7; 1 << 16]);
            let mut json = serde_json::json!({
                "drive_id": "disk", "is_root_device": false, "path_on_host": file.path,
                "io_engine": if name == "drives" { "Sync" } else { "Async" },
                "cache_type": "Writeback",
            });
            if name == LAYERED_DRIVE {
                json["overlay"] = "Memory".into();
            }
            let host = Host { _file: Some(file), ..Host::default() };
            Sample { device: open("drives", &json), host }
        }
        LIMITED_DRIVE => {
            let file = TempFile::new(&[7; 1 << 16]);
            let json = json!({
                "drive_id": "disk", "is_root_device": false, "path_on_host": file.path,
                "io_engine": "Async", "cache_type": "Writeback", "rate_limiter": limit(), "rate_limit_group": "slow",
            });
            let limit = serde_json::from_value(limit()).unwrap();
            let mut env = Env::default();
            env.rate_limit_groups.insert("slow".into(), Arc::new(Pool::new(Some(&limit))));
            let recipe = (model("drives").unwrap().parse)(json.to_string().as_bytes()).unwrap();
            let host = Host { _file: Some(file), ..Host::default() };
            Sample { device: recipe.open(&env).unwrap(), host }
        }
        "network-interfaces" | METADATA => {
            let (ours, peer) = packet_pair();
            let mut config = net::Config::new("eth0", "unused");
            let mut env = Env::default();
            if name == METADATA {
                config.rx_rate_limiter = serde_json::from_value(limit()).unwrap();
                config.tx_rate_limiter = config.rx_rate_limiter.clone();
                let mmds = json!({"network_interfaces": ["eth0"]});
                let mmds = serde_json::from_value(mmds).unwrap();
                let service = Service::new(Arc::new(Mmds::new(1000)), mmds).unwrap();
                env.mmds = Some(Arc::new(service));
            }
            let device = Box::new(net::Net::from_fd(&config, &env, ours).unwrap());
            Sample { device, host: Host { peer: Some(peer), ..Host::default() } }
        }
        "memory-hotplug" => {
            let json = serde_json::json!({ "total_size_mib": 256 });
            Sample { device: open(name, &json), host: Host::default() }
        }
        "pmem" => {
            let file = TempFile::new(&[7; 1 << 16]);
            let json = serde_json::json!({ "id": "p", "path_on_host": file.path });
            let host = Host { _file: Some(file), ..Host::default() };
            Sample { device: open(name, &json), host }
        }
        "vsock" => {
            let directory = TempDir::new();
            let device = open(name, &json!({"guest_cid": 3, "uds_path": directory.path("v.sock")}));
            let host = Host { _directory: Some(directory), ..Host::default() };
            Sample { device, host }
        }
        "entropy" => Sample { device: open(name, &serde_json::json!({})), host: Host::default() },
        "balloon" => {
            let json = serde_json::json!({
                "amount_mib": 1, "deflate_on_oom": true, "stats_polling_interval_s": 1,
                "free_page_hinting": true, "free_page_reporting": true,
            });
            Sample { device: open(name, &json), host: Host::default() }
        }
        _ => panic!("no sample of {name}: add one here"),
    }
}

/// Which of its `queues` queues the device with this ID serves without anybody on the host.
pub(crate) fn served(device_id: u32, queues: usize) -> usize {
    match device_id {
        // Vsock: transmit. The last one is for events, which are rare.
        19 => 1,
        _ => queues - 1,
    }
}

pub(crate) fn open(name: &str, json: &serde_json::Value) -> Box<dyn VirtioDevice> {
    let recipe = (model(name).unwrap().parse)(json.to_string().as_bytes()).unwrap();
    recipe.check().unwrap();
    recipe.open(&Env::default()).unwrap()
}

/// Why a configuration is refused by `check`.
pub(crate) fn refusal(name: &str, json: &serde_json::Value) -> String {
    let recipe = (model(name).unwrap().parse)(json.to_string().as_bytes()).unwrap();
    let e = recipe.check().unwrap_err();
    assert!(recipe.open(&Env::default()).is_err());
    e.to_string()
}

/// Two ends of a wire that keeps frames apart.
pub(crate) fn packet_pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

/// A file that goes when the test ends.
pub(crate) struct TempFile {
    pub(crate) path: PathBuf,
}

impl TempFile {
    pub(crate) fn new(content: &[u8]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("husk-devices-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, content).unwrap();
        Self { path }
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    pub(crate) fn set_len(&self, len: u64) {
        let file = std::fs::File::options().write(true).open(&self.path).unwrap();
        file.set_len(len).unwrap();
    }
}

/// A directory that goes when the test ends, with what is in it.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("husk-devices-{}-dir{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
