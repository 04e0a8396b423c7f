//! `husk restore`: from arguments to a request to restore a snapshot.
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use clap::Args;
use devices::virtio::model::Model;
use serde_json::{Map, Value, json};

use super::device_args::{descriptor, named, options, overlay};
use super::flags::{number, path};
use super::limits::LimitArgs;
use super::run::{ProcessArgs, huge_pages};
use crate::config::{BOOT_SOURCE, HugePages, OnReboot, Payload, SerialConfig, SerialTo, VmConfig};
use crate::error::Refusal;
use crate::exit::ExitCode;
use crate::request::Request;
use crate::snapshot::{
    LoadPages, LoadParams, MemoryBackend, MemoryBackendType, Overrides, SnapshotError,
};
use crate::{block, net, pmem, rng, vsock};

/// Restore a guest from a snapshot and stay until it ends.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct RestoreArgs {
    #[command(flatten)]
    guest: GuestArgs,
    #[command(flatten)]
    process: ProcessArgs,
}

/// What is restored, and how.
#[derive(Args, Debug)]
struct GuestArgs {
    /// The snapshot: its directory, or its state file (then --memory says where the memory is)
    #[arg(value_name = "SNAPSHOT", value_parser = path())]
    snapshot: PathBuf,
    /// Read all of the memory first, and compare it with the sums in the state file
    #[arg(long)]
    verify: bool,
    /// The memory file, of a snapshot that is two files
    #[arg(long, value_name = "FILE", value_parser = path())]
    memory: Option<PathBuf>,
    /// The socket of a process that serves the memory page by page (userfaultfd, Firecracker's protocol), in place of
    /// the memory file
    #[arg(long, value_name = "SOCKET", conflicts_with = "memory", value_parser = path())]
    uffd: Option<PathBuf>,
    /// Another file for a disk: ID=PATH with, if they are to be others, [,io=sync|async][,overlay[=FILE|=memory]][,bw=N]
    /// [,ops=N][,group=ID]
    #[arg(long, value_name = "DISK")]
    disk: Vec<Other<block::Block>>,
    /// Another file for a pmem device: ID=PATH[,bw=N][,ops=N][,group=ID]
    #[arg(long, value_name = "PMEM")]
    pmem: Vec<Other<pmem::Pmem>>,
    /// Another tap or address for a network interface: ID=tap=NAME[,mac=MAC], and limits as in husk run; ID=fd=N takes
    /// the descriptor N, of a tap or a packet socket, that husk is started with; the guest goes on with the address it
    /// knows until it asks again
    #[arg(long, value_name = "NET")]
    net: Vec<Other<net::Net>>,
    /// Another socket or address for the vsock device: [uds=PATH][,cid=N]
    #[arg(long, value_name = "VSOCK")]
    vsock: Option<Other<vsock::Vsock>>,
    /// Other limits for the source of entropy: [bw=N][,ops=N][,group=ID]
    #[arg(long, value_name = "LIMITS")]
    rng: Option<Other<rng::Rng>>,
    /// Where the kernel is by now, for the guest's own reset
    #[arg(long, value_name = "FILE", value_parser = path())]
    kernel: Option<PathBuf>,
    /// Where the initrd is by now
    #[arg(long, value_name = "FILE", value_parser = path())]
    initrd: Option<PathBuf>,
    /// Where the serial port leads: stdio, file=PATH, pty, socket=PATH or none; if this is not given, where the
    /// snapshot's configuration says, or stdio
    #[arg(long, value_name = "WHERE")]
    serial: Option<SerialTo>,
    /// Restore it paused, to go on when the API says so
    #[arg(long, requires = "api_sock")]
    paused: bool,
    /// Remember which pages the guest writes, so that Diff snapshots are small
    #[arg(long)]
    track_dirty: bool,
    /// The guest's clock shows the time that has passed since the snapshot; else it goes on where it was
    #[arg(long)]
    clock_realtime: bool,
    /// After so many milliseconds, note beside the snapshot which pages the guest has touched: later restores have
    /// them there before the guest asks
    #[arg(long, value_name = "MS", allow_negative_numbers = true, value_parser = number::<u64>)]
    record: Option<u64>,
    /// Let the guest take every page itself, though it was noted which it needs first
    #[arg(long)]
    no_prefault: bool,
    /// Pages for guest RAM, if not those of the snapshot: none, transparent or 2M
    #[arg(long, value_name = "PAGES", value_parser = huge_pages)]
    huge_pages: Option<HugePages>,
    /// What a guest's own reset does; it ends the VM if the kernel is not where it was
    #[arg(long, value_name = "ACTION", value_enum, default_value_t)]
    on_reboot: OnReboot,
}

const EXAMPLES: &str = "\
Examples:
  husk restore snapshots/warm
  husk restore snapshots/warm --disk root=clone.ext4 --net eth0=tap=tap7 --vsock uds=clone.sock,cid=7
  husk restore vm.state --memory vm.mem --api-sock husk.sock --paused

Exit codes: those of husk run, and 7: the snapshot is damaged, or not for this host or husk.";

impl RestoreArgs {
    pub(super) fn carry_out(self, started: Instant) -> ExitCode {
        let Self { process, guest } = self;
        process.carry_out(started, |payload| {
            let mut config = VmConfig::default();
            config.defaults.on_reboot = guest.on_reboot;
            Ok((config, Request::Load(Box::new(guest.params(payload)?))))
        })
    }
}

impl GuestArgs {
    fn params(&self, payload: Option<Payload>) -> Result<LoadParams, Refusal> {
        let mut overrides = Overrides {
            serial: self
                .serial
                .clone()
                .map(|to| SerialConfig { to: Some(to), ..SerialConfig::default() }),
            payload,
            ..Overrides::default()
        };
        self.disk.iter().for_each(|disk| disk.add_to(&mut overrides));
        self.pmem.iter().for_each(|pmem| pmem.add_to(&mut overrides));
        self.net.iter().for_each(|net| net.add_to(&mut overrides));
        self.vsock.iter().for_each(|vsock| vsock.add_to(&mut overrides));
        self.rng.iter().for_each(|rng| rng.add_to(&mut overrides));
        let files = [("kernel_image_path", &self.kernel), ("initrd_path", &self.initrd)];
        let files = files.into_iter().filter_map(|(field, path)| Some((field, path.as_ref()?)));
        let files: Map<_, _> = files.map(|(field, path)| (field.into(), json!(path))).collect();
        if !files.is_empty() {
            overrides.add(BOOT_SOURCE, Value::Object(files));
        }
        let mut params = LoadParams {
            resume_vm: !self.paused,
            verify: self.verify,
            track_dirty_pages: self.track_dirty,
            clock_realtime: self.clock_realtime,
            record_ms: self.record,
            ignore_working_set: self.no_prefault,
            huge_pages: self.huge_pages.map_or(LoadPages::Snapshot, Into::into),
            overrides,
            ..LoadParams::default()
        };
        let backend = |backend_type| {
            move |path: &Path| MemoryBackend { backend_type, backend_path: path.into() }
        };
        let file = self.memory.as_deref().map(backend(MemoryBackendType::File));
        let served = self.uffd.as_deref().map(backend(MemoryBackendType::Uffd));
        params.mem_backend = file.or(served);
        let snapshot = self.snapshot.display();
        let wrong = |why| Err(SnapshotError::Field { field: "--memory", why }.into());
        match self.snapshot.is_file() {
            true if params.mem_backend.is_none() => {
                return wrong(format!(
                    "{snapshot} is a file: if it is a state file, say where its memory is; if it is in a snapshot's \
                     directory, name that"
                ));
            }
            false if self.memory.is_none() => {
                params.directory = Some(self.snapshot.clone());
            }
            false if self.snapshot.is_dir() => {
                return wrong(format!("{snapshot} is a directory, and has the memory in it"));
            }
            _ => params.snapshot_path = Some(self.snapshot.as_path().into()),
        }
        Ok(params)
    }
}

/// What is to be different of a device: the fields of its configuration.
#[derive(Debug)]
struct Other<M> {
    fields: Map<String, Value>,
    model: std::marker::PhantomData<fn() -> M>,
}

impl<M> Clone for Other<M> {
    fn clone(&self) -> Self {
        Self { fields: self.fields.clone(), model: self.model }
    }
}

impl<M: Model> Other<M> {
    fn new() -> Self {
        Self { fields: Map::new(), model: std::marker::PhantomData }
    }

    fn set(&mut self, field: &str, value: impl Into<Value>) {
        self.fields.insert(field.into(), value.into());
    }

    fn set_limits(&mut self, prefix: &str, limits: &LimitArgs) {
        if let Some(limiter) = limits.limiter() {
            self.set(&format!("{prefix}rate_limiter"), json!(limiter));
        }
        if let Some(group) = &limits.group {
            self.set(&format!("{prefix}rate_limit_group"), group.as_str());
        }
    }

    fn add_to(&self, overrides: &mut Overrides) {
        overrides.add(M::NAME, Value::Object(self.fields.clone()));
    }

    /// Begins with `ID=`; the words after it.
    fn named<'a>(&mut self, s: &'a str, want: &str) -> Result<std::str::Split<'a, char>, String> {
        let (id, rest) = s.split_once('=').ok_or_else(|| format!("want {want}"))?;
        self.set(M::ID_FIELD, id);
        Ok(rest.split(','))
    }
}

impl FromStr for Other<block::Block> {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (mut disk, mut limits) = (Self::new(), LimitArgs::default());
        let mut words = disk.named(s, "ID=PATH, the ID as in the snapshot")?;
        let path = words.next().filter(|path| !path.is_empty()).ok_or("want a path after ID=")?;
        disk.set("path_on_host", path);
        for word in options(words)? {
            if let Some(place) = overlay(word) {
                disk.set("overlay", json!(place));
                continue;
            }
            match word.split_once('=') {
                Some(("io", "sync")) => disk.set("io_engine", "Sync"),
                Some(("io", "async")) => disk.set("io_engine", "Async"),
                Some((key, value)) if limits.take(key, value)? => {}
                _ => {
                    return Err(format!(
                        "'{word}' is not one of io=sync, io=async, overlay, overlay=FILE, overlay=memory, bw=N, \
                         ops=N, group=ID"
                    ));
                }
            }
        }
        disk.set_limits("", &limits);
        Ok(disk)
    }
}

impl FromStr for Other<pmem::Pmem> {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (mut pmem, mut limits) = (Self::new(), LimitArgs::default());
        let mut words = pmem.named(s, "ID=PATH, the ID as in the snapshot")?;
        let path = words.next().filter(|path| !path.is_empty()).ok_or("want a path after ID=")?;
        pmem.set("path_on_host", path);
        for word in options(words)? {
            match word.split_once('=') {
                Some((key, value)) if limits.take(key, value)? => {}
                _ => return Err(format!("'{word}' is not one of bw=N, ops=N, group=ID")),
            }
        }
        pmem.set_limits("", &limits);
        Ok(pmem)
    }
}

impl FromStr for Other<net::Net> {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut net = Self::new();
        let (mut rx, mut tx) = (LimitArgs::default(), LimitArgs::default());
        let words = net.named(s, "ID=tap=NAME[,mac=MAC] or ID=fd=N, the ID as in the snapshot")?;
        for word in options(words)? {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let is_limit = match key.split_once('-') {
                Some(("rx", key)) => rx.take(key, value)?,
                Some(("tx", key)) => tx.take(key, value)?,
                _ => false,
            };
            match key {
                "tap" if !value.is_empty() => net.set("host_dev_name", value),
                "fd" => net.set("host_dev_name", descriptor(value)?),
                "mac" if !value.is_empty() => net.set("guest_mac", value),
                _ if is_limit => {}
                _ => {
                    return Err(format!(
                        "'{word}' is not one of tap=, fd=, mac=, rx-bw=, rx-ops=, rx-group=, tx-bw=, \
                         tx-ops=, tx-group="
                    ));
                }
            }
        }
        net.set_limits("rx_", &rx);
        net.set_limits("tx_", &tx);
        Ok(net)
    }
}

impl FromStr for Other<vsock::Vsock> {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut vsock = Self::new();
        for word in options(s.split(','))? {
            match word.split_once('=') {
                Some(("cid", n)) => {
                    vsock.set("guest_cid", named::<u32>("cid", n)?);
                }
                Some(("uds", path)) if !path.is_empty() => vsock.set("uds_path", path),
                _ => return Err(format!("'{word}' is not one of cid=N, uds=PATH")),
            }
        }
        Ok(vsock)
    }
}

impl FromStr for Other<rng::Rng> {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut rng = Self::new();
        rng.set_limits("", &s.parse()?);
        Ok(rng)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields<M: Model>(words: &str) -> Result<Value, String>
    where
        Other<M>: FromStr<Err = String>,
    {
        Ok(Value::Object(words.parse::<Other<M>>()?.fields))
    }

    #[test]
    fn words_are_the_fields_of_the_configuration() {
        let disk = json!({ "drive_id": "root", "path_on_host": "a=b.img", "io_engine": "Async",
                           "rate_limit_group": "g" });
        assert_eq!(fields::<block::Block>("root=a=b.img,io=async,group=g"), Ok(disk));
        for (word, overlay) in [
            ("overlay", json!("Temporary")),
            ("overlay=memory", json!("Memory")),
            ("overlay=top", json!({ "File": "top" })),
        ] {
            let disk = json!({ "drive_id": "root", "path_on_host": "a", "overlay": overlay });
            assert_eq!(fields::<block::Block>(&format!("root=a,{word}")), Ok(disk));
        }
        let rng = json!({ "rate_limit_group": "g" });
        assert_eq!(fields::<rng::Rng>("group=g"), Ok(rng));
        let net = json!({ "iface_id": "eth0", "host_dev_name": "tap1", "guest_mac": "06:00:00:00:00:01",
            "tx_rate_limiter": { "bandwidth": { "size": 1, "one_time_burst": null, "refill_time": 100 },
                                 "ops": null } });
        assert_eq!(fields::<net::Net>("eth0=tap=tap1,mac=06:00:00:00:00:01,tx-bw=10"), Ok(net));
        let net = json!({ "iface_id": "eth0", "host_dev_name": "fd:5" });
        assert_eq!(fields::<net::Net>("eth0=fd=5"), Ok(net));
        assert_eq!(fields::<pmem::Pmem>("p=x"), Ok(json!({ "id": "p", "path_on_host": "x" })));
        let vsock = json!({ "guest_cid": 7, "uds_path": "v" });
        assert_eq!(fields::<vsock::Vsock>("uds=v,cid=7"), Ok(vsock));
    }

    #[test]
    fn other_words_are_refused() {
        for (said, words) in [
            (fields::<block::Block>("a.img"), "want ID=PATH"),
            (fields::<block::Block>("root="), "want a path after ID="),
            (fields::<block::Block>("root=a,ro"), "'ro' is not one of io=sync"),
            (fields::<block::Block>("root=a,overlay="), "'overlay=' is not one of"),
            (fields::<rng::Rng>("ro"), "'ro' is not one of bw=N"),
            (fields::<pmem::Pmem>("p=a,io=sync"), "'io=sync' is not one of bw=N"),
            (fields::<net::Net>("tap7"), "want ID=tap=NAME"),
            (fields::<net::Net>("eth0=tap="), "'tap=' is not one of"),
            (fields::<net::Net>("eth0=fd=tap0"), "fd 'tap0': want the number of a descriptor"),
            (fields::<net::Net>("eth0=mtu=9"), "'mtu=9' is not one of"),
            (fields::<vsock::Vsock>("cid=x"), "cid 'x': "),
            (fields::<vsock::Vsock>(""), "'' is not one of"),
        ] {
            let said = said.unwrap_err();
            assert!(said.starts_with(words), "{said}");
        }
    }
}
