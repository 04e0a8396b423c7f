//! `husk run`, `husk api`, `husk check`: from arguments to a configuration.
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use clap::Args;

use super::launch::{Launch, Style, Timing};
use super::limits::{GroupArg, LimitArgs};
use super::{fail, launch};
use crate::config::{
    BootSource, DEMO_GUEST, Defaults, HugePages, LogLevel, MetricsConfig, OnReboot,
    RATE_LIMIT_GROUPS, SerialTo, VCPUS_MAX, VmConfig,
};
use crate::error::Refusal;
use crate::exit::ExitCode;
use crate::{MmdsVersion, balloon, block, mem, net, pmem, rng, vsock};

/// The command line of a kernel for which none was given: a console on the serial port, reset by
/// the keyboard controller, a reboot at once after a panic.
const DEFAULT_CMDLINE: &str =
    "console=ttyS0 reboot=k panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd";

/// What `run` and `check` both take.
#[derive(Args, Debug)]
struct GuestArgs {
    /// A kernel: ELF (vmlinux, a unikernel) or bzImage. Without one, the guest that is built in
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// An initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel command line; devices are appended
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_CMDLINE)]
    cmdline: String,
    /// vCPUs, 1-32
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(VCPUS_MAX)))]
    cpus: u8,
    /// RAM in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    memory: u64,
    /// A disk: PATH[,ro][,root][,id=ID][,cache=writeback|unsafe][,io=sync|async][,vhost-user] with limits
    /// [,bw=N][,ops=N][,group=ID]; with vhost-user, PATH is the socket of a process that serves it; the first
    /// is the root disk unless another says so or the command line has root=; bw (bytes, like 10M) and ops
    /// are what it may do a second
    #[arg(long, value_name = "DISK")]
    disk: Vec<DiskArg>,
    /// A file in the guest's memory (virtio-pmem): PATH[,ro][,root][,id=ID][,bw=N][,ops=N][,group=ID]
    #[arg(long, value_name = "PMEM")]
    pmem: Vec<PmemArg>,
    /// Room for memory that is plugged while the guest runs, in MiB: TOTAL[,slot=MIB][,block=MIB]
    #[arg(long, value_name = "MEMORY")]
    hotplug_memory: Option<HotplugArg>,
    /// A network interface: tap=NAME[,mac=MAC][,mtu=N][,id=ID][,mmds[=V1|V2]] with limits
    /// [,rx-bw=N][,rx-ops=N][,rx-group=ID][,tx-bw=N][,tx-ops=N][,tx-group=ID]; the tap must exist; mmds leads to the guest's
    /// --metadata at 169.254.169.254, for guests with a token (V2) or any; rx is to the guest, tx from it
    #[arg(long, value_name = "NET")]
    net: Vec<NetArg>,
    /// Limits that devices share: id=ID[,bw=N][,ops=N]
    #[arg(long, value_name = "GROUP")]
    rate_limit_group: Vec<GroupArg>,
    /// Give the guest a source of entropy (virtio-rng)
    #[arg(long)]
    rng: bool,
    /// Streams between host and guest (virtio-vsock): cid=N,uds=PATH; the guest's address is N, 3 or more, and
    /// the host reaches it through a Unix socket at PATH
    #[arg(long, value_name = "VSOCK")]
    vsock: Option<VsockArg>,
    /// Give the guest a balloon: MIB[,deflate-on-oom][,stats=SECONDS][,hinting][,reporting]
    #[arg(long, value_name = "BALLOON", value_parser = parse_balloon)]
    balloon: Option<balloon::Config>,
    /// Where the serial port leads: stdio, file=PATH, pty, socket=PATH or none
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: SerialTo,
    /// Two vCPUs share a core
    #[arg(long)]
    smt: bool,
    /// How the guest's CPU differs from the host's: a file with masks for CPUID and MSRs (docs/cpu.md)
    #[arg(long, value_name = "FILE")]
    cpu_config: Option<PathBuf>,
    /// Pages for guest RAM: none, transparent or 2M
    #[arg(long, value_name = "PAGES", default_value = "none", value_parser = huge_pages)]
    huge_pages: HugePages,
    /// Give the guest a PIT (i8254), for kernels that do not know kvm-clock
    #[arg(long)]
    pit: bool,
    /// Give the guest Firecracker's boot timer, a page at 0xc0000000: when it writes 123 to the first byte,
    /// the log says how long it took to boot (at level info)
    #[arg(long)]
    boot_timer: bool,
    /// What a guest's own reset does
    #[arg(long, value_name = "ACTION", value_enum, default_value_t)]
    on_reboot: OnReboot,
    /// Take all of this from a file in Firecracker's format instead
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "kernel", "initrd", "cmdline", "cpus", "memory", "disk", "pmem", "net", "rng", "vsock", "balloon",
        "smt", "cpu_config", "huge_pages", "hotplug_memory", "pit", "rate_limit_group",
    ])]
    config_file: Option<PathBuf>,
}

/// How much is said, and where.
#[derive(Args, Debug)]
pub(super) struct LogArgs {
    /// How much to log: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LogLevel,
    /// Log to this file or FIFO rather than to standard error
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

/// Where the metrics go.
#[derive(Args, Debug)]
pub(super) struct MetricsArgs {
    /// Write metrics to this file or FIFO, one JSON object a line
    #[arg(long, value_name = "FILE")]
    metrics_path: Option<PathBuf>,
}

impl MetricsArgs {
    /// Puts it where the configuration has it, which may say so itself, but not both.
    pub(super) fn apply(self, config: &mut VmConfig) -> Result<(), Refusal> {
        match (self.metrics_path, &config.metrics) {
            (Some(_), Some(_)) => Err(Refusal::MetricsAgain),
            (Some(path), None) => {
                config.metrics = Some(MetricsConfig::new(path));
                Ok(())
            }
            (None, _) => Ok(()),
        }
    }
}

/// What the guest may know.
#[derive(Args, Debug)]
pub(super) struct MmdsArgs {
    /// Metadata for the guest, a file with JSON; how it reaches them is configured by mmds-config
    #[arg(long, value_name = "FILE")]
    metadata: Option<PathBuf>,
    /// Largest size of the guest's metadata as JSON; that of a request's body by default
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<usize>,
}

impl MmdsArgs {
    /// Puts the limit where the configuration has it; gives the file.
    pub(super) fn apply(self, config: &mut VmConfig, body_limit: usize) -> Option<PathBuf> {
        config.defaults.mmds_size_limit = self.mmds_size_limit.unwrap_or(body_limit);
        self.metadata
    }
}

impl LogArgs {
    fn start(&self) -> Result<(), Refusal> {
        crate::logger::init(self.log_level, crate::logger::Stream::Error, None);
        crate::logger::configure(&crate::config::LoggerConfig {
            log_path: self.log_file.clone(),
            ..Default::default()
        })
    }
}

/// Boot a guest and stay until it ends.
#[derive(Args, Debug)]
#[command(after_help = RUN_EXAMPLES)]
pub(super) struct RunArgs {
    #[command(flatten)]
    guest: GuestArgs,
    /// Also listen on this Unix socket
    #[arg(long, value_name = "SOCKET")]
    api_sock: Option<PathBuf>,
    /// A name for the VM, shown by the API
    #[arg(long, default_value = "anonymous-instance", value_parser = launch::id)]
    id: String,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    mmds: MmdsArgs,
    #[command(flatten)]
    log: LogArgs,
}

const RUN_EXAMPLES: &str = "\
Examples:
  husk run
  husk run --kernel vmlinux --initrd initrd.cpio --cmdline 'console=ttyS0' --cpus 2 --memory 256
  husk run --kernel vmlinux --disk root.ext4 --disk data.img,ro --net tap=tap0
  husk run --config-file vm.json --api-sock husk.sock

On a terminal, Ctrl-A x ends husk, and Ctrl-A ? shows the other keys.";

/// Start empty and wait to be configured over a socket.
#[derive(Args, Debug)]
#[command(after_help = API_EXAMPLES)]
pub(super) struct ApiArgs {
    /// The Unix socket to listen on
    #[arg(long, value_name = "SOCKET")]
    api_sock: PathBuf,
    /// Where the serial port leads: stdio, file=PATH, pty, socket=PATH or none
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: SerialTo,
    /// Give the guest Firecracker's boot timer; see husk run --help
    #[arg(long)]
    boot_timer: bool,
    /// Largest body of a request, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = launch::BODY_LIMIT)]
    max_payload: usize,
    /// A name for the VM, shown by the API
    #[arg(long, default_value = "anonymous-instance", value_parser = launch::id)]
    id: String,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    mmds: MmdsArgs,
    #[command(flatten)]
    log: LogArgs,
}

const API_EXAMPLES: &str = "\
Examples:
  husk api --api-sock husk.sock &
  curl --unix-socket husk.sock -X PUT http://localhost/vm \\
       -d '{\"boot-source\": {\"kernel_image_path\": \"builtin:demo\"}}'";

/// Judge a configuration, touch nothing.
#[derive(Args, Debug)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    guest: GuestArgs,
}

impl RunArgs {
    pub(super) fn carry_out(self, started: Instant) -> ExitCode {
        let launched = self.log.start().and_then(|()| {
            let mut config = self.guest.config()?;
            self.metrics.apply(&mut config)?;
            let metadata = self.mmds.apply(&mut config, launch::BODY_LIMIT);
            let api =
                self.api_sock.map(|path| launch::Api { path, body_limit: launch::BODY_LIMIT });
            let timing = Timing::default();
            let launch = Launch {
                config,
                starts: true,
                api,
                id: self.id,
                style: Style::Husk,
                timing,
                metadata,
            };
            launch.carry_out(started)
        });
        launched.unwrap_or_else(|e| fail(e.exit_code(), &e))
    }
}

impl ApiArgs {
    pub(super) fn carry_out(self, started: Instant) -> ExitCode {
        let launched = self.log.start().and_then(|()| {
            let mut config = VmConfig::default();
            config.defaults.serial = self.serial;
            config.defaults.has_boot_timer = self.boot_timer;
            self.metrics.apply(&mut config)?;
            let metadata = self.mmds.apply(&mut config, self.max_payload);
            let api = Some(launch::Api { path: self.api_sock, body_limit: self.max_payload });
            let timing = Timing::default();
            let launch = Launch {
                config,
                starts: false,
                api,
                id: self.id,
                style: Style::Husk,
                timing,
                metadata,
            };
            launch.carry_out(started)
        });
        launched.unwrap_or_else(|e| fail(e.exit_code(), &e))
    }
}

impl CheckArgs {
    pub(super) fn carry_out(self) -> ExitCode {
        match self.guest.config().and_then(|config| config.check()) {
            Ok(()) => super::print(b"the configuration is good\n"),
            Err(e) => fail(e.exit_code(), &e),
        }
    }
}

impl GuestArgs {
    fn config(self) -> Result<VmConfig, Refusal> {
        let defaults = Defaults {
            serial: self.serial,
            on_reboot: self.on_reboot,
            has_boot_timer: self.boot_timer,
            ..Defaults::default()
        };
        if let Some(path) = &self.config_file {
            let mut config = VmConfig::from_file(path)?;
            config.defaults = defaults;
            return Ok(config);
        }
        let mut config = VmConfig::default();
        config.defaults = defaults;
        let is_demo = self.kernel.is_none();
        config.machine.vcpu_count = self.cpus;
        config.machine.mem_size_mib = self.memory;
        config.machine.smt = self.smt;
        config.machine.huge_pages = self.huge_pages;
        config.machine.pit = self.pit;
        if let Some(path) = &self.cpu_config {
            config.read_cpu_config(path)?;
        }
        let has_root = self.cmdline.split_whitespace().any(|word| word.starts_with("root="))
            || self.disk.iter().any(|disk| disk.is_root)
            || self.pmem.iter().any(|pmem| pmem.is_root);
        config.boot_source = Some(BootSource {
            kernel_image_path: self.kernel.unwrap_or_else(|| DEMO_GUEST.into()),
            initrd_path: self.initrd,
            boot_args: Some(self.cmdline),
        });
        for GroupArg(group) in self.rate_limit_group {
            if config.has_rate_limit_group(&group.id) {
                return Err(Refusal::SameId { section: RATE_LIMIT_GROUPS, id: group.id });
            }
            config.add_rate_limit_group(group)?;
        }
        for (i, disk) in self.disk.into_iter().enumerate() {
            let is_root = disk.is_root || (i == 0 && !has_root && !is_demo);
            config.add_another::<block::Block>(disk.config(i, is_root))?;
        }
        for (i, pmem) in self.pmem.into_iter().enumerate() {
            config.add_another::<pmem::Pmem>(pmem.config(i))?;
        }
        if let Some(HotplugArg(hotplug)) = self.hotplug_memory {
            config.add::<mem::Mem>(hotplug)?;
        }
        for (i, net) in self.net.into_iter().enumerate() {
            let mmds = net.mmds;
            let net = net.config(i);
            if let Some(version) = mmds {
                config.add_to_mmds(&net.iface_id, version)?;
            }
            config.add_another::<net::Net>(net)?;
        }
        if self.rng {
            config.add::<rng::Rng>(rng::Config::default())?;
        }
        if let Some(VsockArg { cid, uds }) = self.vsock {
            config.add::<vsock::Vsock>(vsock::Config::new(cid, uds))?;
        }
        if let Some(balloon) = self.balloon {
            config.add::<balloon::Balloon>(balloon)?;
        }
        Ok(config)
    }
}

fn huge_pages(s: &str) -> Result<HugePages, String> {
    match s {
        "none" => Ok(HugePages::None),
        "transparent" => Ok(HugePages::Transparent),
        "2M" | "2m" => Ok(HugePages::Hugetlb2M),
        _ => Err("want none, transparent or 2M".into()),
    }
}

/// `MIB[,deflate-on-oom][,stats=SECONDS][,hinting][,reporting]`
fn parse_balloon(s: &str) -> Result<balloon::Config, String> {
    let mut words = s.split(',');
    let amount = words.next().unwrap_or_default();
    let amount_mib = amount.parse().map_err(|e| format!("MiB '{amount}': {e}"))?;
    let mut config = balloon::Config { amount_mib, ..balloon::Config::default() };
    for word in words {
        match word.split_once('=') {
            None if word == "deflate-on-oom" => config.deflate_on_oom = true,
            None if word == "hinting" => config.free_page_hinting = true,
            None if word == "reporting" => config.free_page_reporting = true,
            Some(("stats", interval)) => {
                let seconds = interval.parse().map_err(|e| format!("stats '{interval}': {e}"))?;
                config.stats_polling_interval_s = seconds;
            }
            _ => {
                return Err(format!(
                    "'{word}' is not one of deflate-on-oom, stats=SECONDS, hinting, reporting"
                ));
            }
        }
    }
    Ok(config)
}

/// `PATH[,ro][,root][,id=ID][,cache=writeback|unsafe][,io=sync|async][,vhost-user][,bw=N][,ops=N][,group=ID]`
#[derive(Clone, Debug)]
struct DiskArg {
    path: PathBuf,
    is_read_only: bool,
    is_root: bool,
    is_unsafe: bool,
    is_vhost_user: bool,
    io_engine: block::IoEngine,
    id: Option<String>,
    limits: LimitArgs,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut words = s.split(',');
        let path = words.next().filter(|path| !path.is_empty()).ok_or("want a path first")?;
        let mut disk = Self {
            path: path.into(),
            is_read_only: false,
            is_root: false,
            is_unsafe: false,
            is_vhost_user: false,
            io_engine: block::IoEngine::Sync,
            id: None,
            limits: LimitArgs::default(),
        };
        for word in words {
            match word.split_once('=') {
                None if word == "ro" => disk.is_read_only = true,
                None if word == "rw" => disk.is_read_only = false,
                None if word == "root" => disk.is_root = true,
                None if word == "vhost-user" => disk.is_vhost_user = true,
                Some(("id", id)) => disk.id = Some(id.into()),
                Some(("cache", "writeback")) => disk.is_unsafe = false,
                Some(("cache", "unsafe")) => disk.is_unsafe = true,
                Some(("io", "sync")) => disk.io_engine = block::IoEngine::Sync,
                Some(("io", "async")) => disk.io_engine = block::IoEngine::Async,
                Some((key, value)) if disk.limits.take(key, value)? => {}
                _ => {
                    return Err(format!(
                        "'{word}' is not one of ro, rw, root, id=ID, cache=writeback, cache=unsafe, \
                         io=sync, io=async, vhost-user, bw=N, ops=N, group=ID"
                    ));
                }
            }
        }
        Ok(disk)
    }
}

impl DiskArg {
    fn config(self, index: usize, is_root_device: bool) -> block::Config {
        let id = self.id.unwrap_or_else(|| format!("disk{index}"));
        let cache_type = match self.is_unsafe {
            true => block::CacheType::Unsafe,
            false => block::CacheType::Writeback,
        };
        let is_read_only = self.is_read_only;
        let mut config = block::Config {
            is_root_device,
            is_read_only,
            cache_type,
            rate_limiter: self.limits.limiter(),
            rate_limit_group: self.limits.group,
            io_engine: self.io_engine,
            ..block::Config::new(id, self.path)
        };
        if self.is_vhost_user {
            config.socket = config.path_on_host.take();
        }
        config
    }
}

/// `PATH[,ro][,root][,id=ID][,bw=N][,ops=N][,group=ID]`
#[derive(Clone, Debug)]
struct PmemArg {
    path: PathBuf,
    is_read_only: bool,
    is_root: bool,
    id: Option<String>,
    limits: LimitArgs,
}

impl FromStr for PmemArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut words = s.split(',');
        let path = words.next().filter(|path| !path.is_empty()).ok_or("want a path first")?;
        let mut pmem = Self {
            path: path.into(),
            is_read_only: false,
            is_root: false,
            id: None,
            limits: LimitArgs::default(),
        };
        for word in words {
            match word.split_once('=') {
                None if word == "ro" => pmem.is_read_only = true,
                None if word == "rw" => pmem.is_read_only = false,
                None if word == "root" => pmem.is_root = true,
                Some(("id", id)) => pmem.id = Some(id.into()),
                Some((key, value)) if pmem.limits.take(key, value)? => {}
                _ => {
                    return Err(format!(
                        "'{word}' is not one of ro, rw, root, id=ID, bw=N, ops=N, group=ID"
                    ));
                }
            }
        }
        Ok(pmem)
    }
}

impl PmemArg {
    fn config(self, index: usize) -> pmem::Config {
        let id = self.id.unwrap_or_else(|| format!("pmem{index}"));
        pmem::Config {
            root_device: self.is_root,
            read_only: self.is_read_only,
            rate_limiter: self.limits.limiter(),
            rate_limit_group: self.limits.group,
            ..pmem::Config::new(id, self.path)
        }
    }
}

/// `TOTAL[,slot=MIB][,block=MIB]`
#[derive(Clone, Debug)]
struct HotplugArg(mem::Config);

impl FromStr for HotplugArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mib = |word: &str| word.parse().map_err(|e| format!("'{word}': {e}"));
        let mut words = s.split(',');
        let mut config = mem::Config::new(mib(words.next().unwrap_or_default())?);
        for word in words {
            match word.split_once('=') {
                Some(("slot", slot)) => config.slot_size_mib = mem::SlotSize(mib(slot)?),
                Some(("block", block)) => config.block_size_mib = mem::BlockSize(mib(block)?),
                _ => return Err(format!("'{word}' is not one of slot=MIB, block=MIB")),
            }
        }
        Ok(Self(config))
    }
}

/// `tap=NAME[,mac=MAC][,mtu=N][,id=ID][,mmds[=V1|V2]]`, and limits with `rx-` or `tx-` before them
#[derive(Clone, Debug)]
struct NetArg {
    tap: String,
    mac: Option<String>,
    mtu: Option<u16>,
    id: Option<String>,
    mmds: Option<MmdsVersion>,
    rx: LimitArgs,
    tx: LimitArgs,
}

impl FromStr for NetArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let mut net = Self {
            tap: String::new(),
            mac: None,
            mtu: None,
            id: None,
            mmds: None,
            rx: LimitArgs::default(),
            tx: LimitArgs::default(),
        };
        for word in s.split(',') {
            match word.split_once('=') {
                Some(("tap", tap)) => net.tap = tap.into(),
                Some(("mac", mac)) => net.mac = Some(mac.into()),
                Some(("mtu", mtu)) => {
                    net.mtu = Some(mtu.parse().map_err(|e| format!("mtu '{mtu}': {e}"))?);
                }
                Some(("id", id)) => net.id = Some(id.into()),
                None if word == "mmds" => net.mmds = Some(MmdsVersion::V2),
                Some(("mmds", "V1")) => net.mmds = Some(MmdsVersion::V1),
                Some(("mmds", "V2")) => net.mmds = Some(MmdsVersion::V2),
                Some((key, value)) if net.take_limit(key, value)? => {}
                _ => {
                    return Err(format!(
                        "'{word}' is not one of tap=, mac=, mtu=, id=, mmds=, rx-bw=, rx-ops=, rx-group=, \
                         tx-bw=, tx-ops=, tx-group="
                    ));
                }
            }
        }
        if net.tap.is_empty() {
            return Err("want tap=NAME".into());
        }
        Ok(net)
    }
}

impl NetArg {
    fn take_limit(&mut self, key: &str, value: &str) -> Result<bool, String> {
        match key.split_once('-') {
            Some(("rx", key)) => self.rx.take(key, value),
            Some(("tx", key)) => self.tx.take(key, value),
            _ => Ok(false),
        }
    }

    fn config(self, index: usize) -> net::Config {
        let id = self.id.unwrap_or_else(|| format!("eth{index}"));
        net::Config {
            guest_mac: self.mac,
            mtu: self.mtu,
            rx_rate_limiter: self.rx.limiter(),
            tx_rate_limiter: self.tx.limiter(),
            rx_rate_limit_group: self.rx.group,
            tx_rate_limit_group: self.tx.group,
            ..net::Config::new(id, self.tap)
        }
    }
}

/// `cid=N,uds=PATH`
#[derive(Clone, Debug)]
struct VsockArg {
    cid: u32,
    uds: PathBuf,
}

impl FromStr for VsockArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (mut cid, mut uds) = (None, None);
        for word in s.split(',') {
            match word.split_once('=') {
                Some(("cid", n)) => cid = Some(n.parse().map_err(|e| format!("cid '{n}': {e}"))?),
                Some(("uds", path)) if !path.is_empty() => uds = Some(path.into()),
                _ => return Err(format!("'{word}' is not one of cid=N, uds=PATH")),
            }
        }
        let (Some(cid), Some(uds)) = (cid, uds) else { return Err("want cid=N,uds=PATH".into()) };
        Ok(Self { cid, uds })
    }
}
