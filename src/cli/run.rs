//! `husk run`, `husk api`, `husk check`: from arguments to a configuration.
use std::num::IntErrorKind;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use devices::backend::passed::Name;

use super::device_args::{DiskArg, HotplugArg, NetArg, PmemArg, VsockArg, parse_balloon};
use super::flags::{number, path};
use super::launch::{Launch, Sandbox, Style, Timing};
use super::limits::{GroupArg, LimitArgs};
use super::sandbox::SandboxArgs;
use super::{fail, launch};
use crate::config::{
    BootSource, DEMO_GUEST, Defaults, HugePages, LogLevel, MetricsConfig, OnReboot, Payload,
    RATE_LIMIT_GROUPS, SerialTo, VCPUS_MAX, VmConfig,
};
use crate::error::Refusal;
use crate::exit::ExitCode;
use crate::request::Request;
use crate::{balloon, block, mem, net, pmem, rng, vsock};

/// The command line of a kernel for which none was given: a console on the serial port, reset by
/// the keyboard controller, a reboot at once after a panic.
const DEFAULT_CMDLINE: &str =
    "console=ttyS0 reboot=k panic=-1 i8042.noaux i8042.nomux i8042.dumbkbd";

/// What `run` and `check` both take.
#[derive(Args, Debug)]
struct GuestArgs {
    /// A kernel: ELF (vmlinux, a unikernel) or bzImage. Without one, the guest that is built in
    #[arg(long, value_name = "FILE", value_parser = path())]
    kernel: Option<PathBuf>,
    /// An initial RAM disk
    #[arg(long, value_name = "FILE", value_parser = path())]
    initrd: Option<PathBuf>,
    /// The kernel command line; devices are appended
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_CMDLINE)]
    cmdline: String,
    /// vCPUs, 1-32
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true, value_parser = cpus)]
    cpus: u8,
    /// RAM in MiB; 512M and 2G are understood too
    #[arg(long, value_name = "MIB", default_value = "128", allow_negative_numbers = true, value_parser = mib)]
    memory: u64,
    /// A disk: PATH[,ro][,root][,id=ID][,cache=writeback|unsafe][,io=sync|async][,overlay[=FILE|=memory]][,vhost-user]
    /// (cache is writeback if it is not said) with limits [,bw=N][,ops=N][,group=ID]; with overlay, PATH is only read
    /// and may be shared, and what the guest writes goes to a file that is gone when husk ends, to FILE or to memory;
    /// with vhost-user, PATH is the socket of a process that serves it; the first is the root disk unless another says
    /// so or the command line has root=; bw (bytes, like 10M) and ops are what it may do a second
    #[arg(long, value_name = "DISK")]
    disk: Vec<DiskArg>,
    /// A file in the guest's memory (virtio-pmem): PATH[,ro][,root][,id=ID][,bw=N][,ops=N][,group=ID]
    #[arg(long, value_name = "PMEM")]
    pmem: Vec<PmemArg>,
    /// Room for memory that is plugged while the guest runs, in MiB: TOTAL[,slot=MIB][,block=MIB]
    #[arg(long, value_name = "MEMORY", allow_negative_numbers = true)]
    hotplug_memory: Option<HotplugArg>,
    /// A network interface: tap=NAME or fd=N[,mac=MAC][,mtu=N][,id=ID][,mmds[=V1|V2]] with limits
    /// [,rx-bw=N][,rx-ops=N][,rx-group=ID][,tx-bw=N][,tx-ops=N][,tx-group=ID]; the tap must exist; mmds leads to the guest's
    /// --metadata at 169.254.169.254, for guests with a token (V2) or any; rx is to the guest, tx from it
    #[arg(long, value_name = "NET")]
    net: Vec<NetArg>,
    /// Limits that devices share: id=ID[,bw=N][,ops=N]
    #[arg(long, value_name = "GROUP")]
    rate_limit_group: Vec<GroupArg>,
    /// Give the guest a source of entropy (virtio-rng), with limits if they are said: bw=N,ops=N,group=ID
    #[arg(long, value_name = "LIMITS", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    rng: Option<LimitArgs>,
    /// Streams between host and guest (virtio-vsock): cid=N,uds=PATH; the guest's address is N, 3 or more, and
    /// the host reaches it through a Unix socket at PATH
    #[arg(long, value_name = "VSOCK")]
    vsock: Option<VsockArg>,
    /// Give the guest a balloon: MIB[,deflate-on-oom][,stats=SECONDS][,hinting][,reporting]
    #[arg(long, value_name = "BALLOON", allow_negative_numbers = true, value_parser = parse_balloon)]
    balloon: Option<balloon::Config>,
    /// Where the serial port leads: stdio, file=PATH, pty, socket=PATH or none
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: SerialTo,
    /// Two vCPUs share a core
    #[arg(long)]
    smt: bool,
    /// How the guest's CPU differs from the host's: a file with masks for CPUID and MSRs (docs/cpu.md)
    #[arg(long, value_name = "FILE", value_parser = path())]
    cpu_config: Option<PathBuf>,
    /// Pages for guest RAM: none, transparent or 2M
    #[arg(long, value_name = "PAGES", default_value = "none", value_parser = huge_pages)]
    huge_pages: HugePages,
    /// Give the guest a PIT (i8254), for kernels that do not know kvm-clock
    #[arg(long)]
    pit: bool,
    /// Keep RAM where children can be made of it at once (husk ctl fork)
    #[arg(long)]
    forkable: bool,
    /// Give the guest Firecracker's boot timer, a page at 0xc0000000: when it writes 123 to the first byte,
    /// the log says how long it took to boot (at level info)
    #[arg(long)]
    boot_timer: bool,
    /// What a guest's own reset does
    #[arg(long, value_name = "ACTION", value_enum, default_value_t)]
    on_reboot: OnReboot,
    /// Take all of this from a file in Firecracker's format instead
    #[arg(long, value_name = "FILE", value_parser = path(), conflicts_with_all = [
        "kernel", "initrd", "cmdline", "cpus", "memory", "disk", "pmem", "net", "rng", "vsock", "balloon",
        "smt", "cpu_config", "huge_pages", "hotplug_memory", "pit", "forkable", "rate_limit_group",
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
    #[arg(long, value_name = "FILE", value_parser = path())]
    log_file: Option<PathBuf>,
}

/// Where the metrics go.
#[derive(Args, Debug)]
pub(super) struct MetricsArgs {
    /// Write metrics to this file or FIFO, one JSON object a line
    #[arg(long, value_name = "FILE", value_parser = path())]
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
    #[arg(long, value_name = "FILE", value_parser = path())]
    metadata: Option<PathBuf>,
    /// Largest size of the guest's metadata as JSON; that of a request's body by default
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, value_parser = number::<usize>)]
    mmds_size_limit: Option<usize>,
}

impl MmdsArgs {
    /// Puts the limit where the configuration has it; gives the file.
    pub(super) fn apply(self, config: &mut VmConfig, body_limit: usize) -> Option<PathBuf> {
        config.defaults.mmds_size_limit = self.mmds_size_limit.unwrap_or(body_limit);
        self.metadata
    }
}

/// What this VM is given and no clone of it.
#[derive(Args, Debug)]
pub(super) struct PayloadArgs {
    /// What this VM alone is given, in its memory: a file with JSON, or - for standard input
    #[arg(long, value_name = "FILE", value_parser = path())]
    payload: Option<PathBuf>,
}

impl PayloadArgs {
    /// Reads it.
    pub(super) fn read(&self) -> Result<Option<Payload>, Refusal> {
        self.payload.as_deref().map(VmConfig::read_payload).transpose()
    }
}

impl LogArgs {
    pub(super) fn start(&self) -> Result<(), Refusal> {
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
    #[command(flatten)]
    process: ProcessArgs,
}

/// What `run` and `restore` both take: what is of the process rather than of the guest.
#[derive(Args, Debug)]
pub(super) struct ProcessArgs {
    /// Also listen on this Unix socket
    #[arg(long, value_name = "SOCKET", value_parser = path())]
    api_sock: Option<PathBuf>,
    /// A name for the VM, shown by the API
    #[arg(long, default_value = "anonymous-instance", value_parser = launch::id)]
    id: String,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    payload: PayloadArgs,
    #[command(flatten)]
    mmds: MmdsArgs,
    #[command(flatten)]
    log: LogArgs,
    #[command(flatten)]
    sandbox: SandboxArgs,
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
    #[arg(long, value_name = "SOCKET", value_parser = path())]
    api_sock: PathBuf,
    /// Where the serial port leads: stdio, file=PATH, pty, socket=PATH or none
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: SerialTo,
    /// Give the guest Firecracker's boot timer; see husk run --help
    #[arg(long)]
    boot_timer: bool,
    /// Largest body of a request, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = launch::BODY_LIMIT,
          allow_negative_numbers = true, value_parser = number::<usize>)]
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
    #[command(flatten)]
    sandbox: SandboxArgs,
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
        self.process.carry_out(started, |payload| {
            let mut config = self.guest.config()?;
            config.payload = payload.or(config.payload);
            Ok((config, Request::Start))
        })
    }
}

impl ProcessArgs {
    /// Runs the VM that `prepare` makes of the payload, and the request that it begins with.
    pub(super) fn carry_out(
        self,
        started: Instant,
        prepare: impl FnOnce(Option<Payload>) -> Result<(VmConfig, Request), Refusal>,
    ) -> ExitCode {
        let launched = self.log.start().and_then(|()| {
            let (mut config, first) = prepare(self.payload.read()?)?;
            self.metrics.apply(&mut config)?;
            let metadata = self.mmds.apply(&mut config, launch::BODY_LIMIT);
            let api =
                self.api_sock.map(|path| launch::Api { path, body_limit: launch::BODY_LIMIT });
            let launch = Launch {
                config,
                first: Some(first),
                api,
                id: self.id,
                style: Style::Husk,
                timing: Timing::default(),
                metadata,
                sandbox: Sandbox::Wanted(self.sandbox.wanted()),
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
                first: None,
                api,
                id: self.id,
                style: Style::Husk,
                timing,
                metadata,
                sandbox: Sandbox::Wanted(self.sandbox.wanted()),
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
        config.machine.forkable = self.forkable;
        if let Some(path) = &self.cpu_config {
            config.read_cpu_config(path)?;
        }
        let has_root = self.cmdline.split_whitespace().any(|word| word.starts_with("root="))
            || self.disk.iter().any(|disk| disk.is_root)
            || self.pmem.iter().any(|pmem| pmem.is_root);
        config.boot_source = Some(BootSource {
            kernel_image_path: self.kernel.map_or_else(|| DEMO_GUEST.into(), Name::from),
            initrd_path: self.initrd.map(Name::from),
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
        if let Some(limits) = self.rng {
            let rate_limiter = limits.limiter();
            config.add::<rng::Rng>(rng::Config { rate_limiter, rate_limit_group: limits.group })?;
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

/// So many vCPUs.
fn cpus(s: &str) -> Result<u8, String> {
    let count = s.parse().ok().filter(|count| (1..=VCPUS_MAX).contains(count));
    count.ok_or_else(|| format!("want a number from 1 to {VCPUS_MAX}"))
}

/// So many MiB: a number by itself, or one of MiB or GiB that says so.
fn mib(s: &str) -> Result<u64, String> {
    let digits = s.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match s[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "m" | "mib" => Some(1),
        "g" | "gib" => Some(1024),
        _ => None,
    };
    let number = unit.and_then(|unit| match digits.parse::<u64>() {
        Ok(number) => Some(number.checked_mul(unit)),
        Err(e) => (*e.kind() == IntErrorKind::PosOverflow).then_some(None),
    });
    let number = number.ok_or("want a number of MiB, or one with M or G after it")?;
    number.ok_or_else(|| "so many MiB there are not".into())
}

pub(super) fn huge_pages(s: &str) -> Result<HugePages, String> {
    match s {
        "none" => Ok(HugePages::None),
        "transparent" => Ok(HugePages::Transparent),
        "2M" | "2m" => Ok(HugePages::Hugetlb2M),
        _ => Err("want none, transparent or 2M".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_in_any_unit() {
        let understood =
            [("128", 128), ("512M", 512), ("512MiB", 512), ("2g", 2048), ("2GiB", 2048)];
        for (text, amount) in understood {
            assert_eq!(mib(text), Ok(amount), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "1T", "1 G", "18446744073709551615G"] {
            assert!(mib(text).unwrap_err().contains("MiB"), "{text}");
        }
    }
}
