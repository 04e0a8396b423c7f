//! What a machine is made of on the host's side, opened once.
//!
//! Everything that is opened by path is opened here, before the guest runs, and outlives a reboot:
//! the machine is taken apart into its parts and put together again.
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use arch::{BootError, CpuChoice, FileError, HostCpu, Initrd, Kernel, SetupError, Topology};
use devices::backend::console::Console;
use devices::backend::file::{self, Access};
use devices::backend::unix::SocketName;
use devices::io::IoThread;
use devices::legacy::boot_timer::BootTimer;
use devices::legacy::serial::{Serial, SerialError, SerialState};
use devices::mmds::{Config as MmdsConfig, Mmds, Service};
use devices::sync::Mutex;
use devices::sys::again;
use devices::sys::errand::Errands;
use devices::virtio::model::{Env, VirtioDevice};
use devices::virtio::notifier;
use kvm_ioctls::Kvm;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::retry_on_intr;
use vmm_sys_util::eventfd::EventFd;

use crate::config::{DEMO_GUEST, SerialTo, VmConfig};
use crate::error::{Refusal, chain};
use crate::events::{Hub, Watch};
use crate::identity::Current;
use crate::metrics::MachineCounters;
use crate::sandbox::{self, Role};
use crate::snapshot::SnapshotError;
use crate::takeover::{Port, Taken};

/// The guest that needs no files: an ELF image made from resources/guest/demo.rs.
const DEMO_IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/demo.elf"));

/// KVM's only API version since 2007.
const KVM_API_VERSION: i32 = 12;

/// What the serial port is called.
pub(crate) const SERIAL: &str = "serial";

/// A device with what names it.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) model: &'static str,
    pub(crate) id: String,
    pub(crate) device: Box<dyn VirtioDevice>,
    /// What its transports count.
    pub(crate) counters: Arc<notifier::Counters>,
    /// Tells of it, if anybody wants to know.
    pub(crate) watch: Option<Arc<Watch>>,
}

/// Everything opened.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) kvm: Kvm,
    pub(crate) cpu: HostCpu,
    /// `None` if the VM was restored, and what it was booted from is not here.
    pub(crate) kernel: Option<Kernel>,
    pub(crate) initrd: Option<Initrd>,
    pub(crate) devices: Vec<Part>,
    /// Dropped before what its thread uses.
    pub(crate) io: Arc<IoThread>,
    /// The socket that the serial port is, if it is one. Its file is removed with this: the I/O thread may not do that, and
    /// may be the last that has the port.
    pub(crate) serial_name: Option<Arc<SocketName>>,
    pub(crate) serial: Arc<Mutex<Serial>>,
    pub(crate) serial_irq: EventFd,
    /// What leads to the serial port, if it is a pseudo-terminal or a socket.
    pub(crate) serial_path: Option<PathBuf>,
    pub(crate) boot_timer: Option<Arc<Mutex<BootTimer>>>,
    /// What the devices share.
    pub(crate) env: Env,
    /// That of the machine that was reset, for the next one.
    pub(crate) identity: Option<Current>,
    pub(crate) counters: MachineCounters,
}

impl Parts {
    /// Opens all that `config` names. `quit` is called when the user leaves the console. Of a VM that is
    /// restored, `saved` is the state of its serial port; its kernel is for its next reset, if it is
    /// there. What is `taken` over from another VM is not opened.
    pub(crate) fn open(
        config: &VmConfig,
        io_thread: &str,
        quit: Arc<dyn Fn() + Send + Sync>,
        mmds: &Arc<Mmds>,
        saved: Option<&SerialState>,
        mut taken: Taken,
    ) -> Result<Self, Refusal> {
        let boot_timer = config.defaults.has_boot_timer.then(|| Mutex::new(BootTimer::start()));
        let (kernel, initrd) = match (open_boot(config), saved) {
            (Ok((kernel, initrd)), _) => (Some(kernel), initrd),
            (Err(e), None) => return Err(e),
            (Err(e), Some(_)) => {
                log::info!("the guest's own reset will end the VM: {}", chain(&e));
                config.check_values()?;
                (None, None)
            }
        };
        let mut env = Env::default();
        env.rate_limit_groups =
            taken.rate_limit_groups.take().unwrap_or_else(|| config.limit_pools());
        env.pages = config.machine.huge_pages.into();
        env.mmds = match (taken.mmds.take(), config.mmds.clone()) {
            (Some(service), _) => Some(service),
            (None, config) => config.map(|config| open_mmds(mmds, config)).transpose()?,
        };
        env.connector = sandbox::is_on().then_some(start_connector);
        let devices = config
            .devices()
            .map(|recipe| {
                let (model, id) = (recipe.model(), recipe.id().to_owned());
                if let Some(part) = taken.device(model, &id) {
                    return Ok(part);
                }
                match recipe.open(&env) {
                    Ok(device) => {
                        Ok(Part { model, id, device, counters: Arc::default(), watch: None })
                    }
                    Err(source) => Err(Refusal::Device { section: model, id, source }),
                }
            })
            .collect::<Result<_, _>>()?;
        let kvm = open_kvm()?;
        let cpu = HostCpu::new(&kvm, config.cpu()).map_err(|e| setup(e, config.cpu()))?;
        let serial_irq = eventfd()?;
        let Port { serial, io, path: serial_path, name: serial_name } = match taken.port.take() {
            Some(port) => port,
            None => open_port(config, io_thread, quit, &serial_irq, saved)?,
        };
        let boot_timer = boot_timer.map(Arc::new);
        let counters = MachineCounters::new(config.machine.vcpu_count);
        Ok(Self {
            kvm,
            cpu,
            kernel,
            initrd,
            devices,
            serial,
            serial_irq,
            serial_path,
            serial_name,
            io,
            boot_timer,
            env,
            identity: None,
            counters,
        })
    }

    /// Tells `hub` from now on what happens to devices, and to the serial port, if that `is_new`.
    pub(crate) fn observe(&mut self, hub: &mut Hub, has_new_port: bool) -> Result<(), Refusal> {
        let mut watch =
            |model, id: &str| hub.watch(model, id).map_err(Refusal::host("cannot make an eventfd"));
        for part in &mut self.devices {
            part.watch = Some(watch(part.model, &part.id)?);
        }
        if has_new_port {
            let serial = watch(SERIAL, SERIAL)?;
            self.serial.lock().unwrap_or_else(PoisonError::into_inner).observe(serial);
        }
        Ok(())
    }
}

/// Starts a thread that connects to the host's sockets.
fn start_connector() -> std::io::Result<Errands> {
    Errands::spawn("husk_connect", || sandbox::enter(Role::Connect))
}

/// Opens the serial port, and starts the thread that feeds it and runs devices.
fn open_port(
    config: &VmConfig,
    io_thread: &str,
    quit: Arc<dyn Fn() + Send + Sync>,
    irq: &EventFd,
    saved: Option<&SerialState>,
) -> Result<Port, Refusal> {
    let mut console = open_console(&config.serial_to(), quit)?;
    console.limit(config.serial.rate_limiter.as_ref());
    let (path, name) = (console.path().map(Path::to_owned), console.take_name().map(Arc::new));
    let line = Box::new(irq.try_clone().map_err(Refusal::host("cannot copy an eventfd"))?);
    let serial = match saved {
        None => Serial::new(line, console),
        Some(saved) => Serial::from_state(saved.clone(), line, console),
    };
    let (serial, input) = serial.map_err(serial_failed)?;
    let io = IoThread::spawn_with(io_thread, vec![Box::new(input)], sandbox::enter_io);
    let io = io.map_err(io_failed)?;
    Ok(Port { serial, io: Arc::new(io), path, name })
}

/// Makes a refusal of a serial port that cannot be.
pub(crate) fn serial_failed(e: SerialError) -> Refusal {
    match e {
        SerialError::Fifo(_) => SnapshotError::Inconsistent(e.to_string()).into(),
        SerialError::EventFd(e) => Refusal::host("serial port")(e),
        SerialError::Console(e) => Refusal::Console(e),
    }
}

/// Opens what boots, and judges it.
pub(crate) fn open_boot(config: &VmConfig) -> Result<(Kernel, Option<Initrd>), Refusal> {
    let source = config.boot_source()?;
    let kernel = open_kernel(&source.kernel_image_path)?;
    config.check_values()?;
    let initrd = source.open_initrd()?;
    config.check_boot(&kernel, initrd.as_ref())?;
    Ok((kernel, initrd))
}

fn open_mmds(mmds: &Arc<Mmds>, config: MmdsConfig) -> Result<Arc<Service>, Refusal> {
    let service = Service::new(mmds.clone(), config);
    service.map(Arc::new).map_err(Refusal::host("metadata service"))
}

/// An eventfd as this crate uses them.
pub(crate) fn eventfd() -> Result<EventFd, Refusal> {
    again::eventfd().map_err(Refusal::host("cannot make an eventfd"))
}

/// Refuses a CPU that cannot be had on this host. It is tried on a VM that is gone again afterwards.
pub(crate) fn check_cpu(choice: CpuChoice<'_>) -> Result<(), Refusal> {
    if matches!(choice, CpuChoice::Host) {
        return Ok(());
    }
    let kvm = open_kvm()?;
    let cpu = HostCpu::new(&kvm, choice).map_err(|e| setup(e, choice))?;
    let vm = arch::again(|| kvm.create_vm()).map_err(Refusal::kvm("KVM_CREATE_VM"))?;
    arch::again(|| vm.create_irq_chip()).map_err(Refusal::kvm("KVM_CREATE_IRQCHIP"))?;
    let vcpu = arch::again(|| vm.create_vcpu(0)).map_err(Refusal::kvm("KVM_CREATE_VCPU"))?;
    cpu.configure(&vcpu, 0, Topology::new(1, false), None).map_err(|e| setup(e, choice))
}

/// Makes a refusal of a vCPU that cannot be set up as was chosen.
pub(crate) fn setup(e: SetupError, choice: CpuChoice<'_>) -> Refusal {
    let SetupError::Cpu(e) = e else {
        return Refusal::Host { what: "KVM".into(), source: std::io::Error::other(e) };
    };
    let why = e.to_string();
    match (choice, e.field()) {
        (CpuChoice::Config(_), Some(field)) => Refusal::Field { section: "cpu-config", field, why },
        _ => Refusal::Field { section: "machine-config", field: "cpu_template", why },
    }
}

fn io_failed(e: devices::io::IoError) -> Refusal {
    Refusal::Host { what: "I/O thread".into(), source: std::io::Error::other(e) }
}

/// Opens and judges a kernel.
pub(crate) fn open_kernel(path: &Path) -> Result<Kernel, Refusal> {
    let file = if path == Path::new(DEMO_GUEST) {
        demo_file().map_err(Refusal::host("cannot make a memory file for the demo guest"))?
    } else {
        open_boot_file("kernel", path)?
    };
    Ok(Kernel::read(path, file)?)
}

/// Opens an initrd.
pub(crate) fn open_initrd(path: &Path) -> Result<Initrd, Refusal> {
    let file = open_boot_file("initrd", path)?;
    let len = file.metadata().map_err(|e| boot_file("initrd", path, FileError::Read(e)))?.len();
    if len == 0 {
        return Err(boot_file("initrd", path, FileError::Empty));
    }
    Ok(Initrd { path: path.into(), file })
}

fn boot_file(what: &'static str, path: &Path, why: FileError) -> Refusal {
    Refusal::Boot(BootError::File { what, path: path.into(), why })
}

fn open_boot_file(what: &'static str, path: &Path) -> Result<File, Refusal> {
    file::open(path, Access::Read, file::Kind::Regular)
        .map_err(|e| Refusal::Open { what, source: e })
}

/// The demo guest as a file, because that is what a kernel is read from.
fn demo_file() -> std::io::Result<File> {
    let fd = retry_on_intr(|| memfd_create("husk-demo-guest", MemfdFlags::CLOEXEC))?;
    let mut file = File::from(fd);
    file.write_all(DEMO_IMAGE)?;
    Ok(file)
}

fn open_kvm() -> Result<Kvm, Refusal> {
    let kvm = arch::again(Kvm::new).map_err(|e| {
        let advice = match e.errno() {
            libc::ENOENT => {
                ": load the kvm_intel or kvm_amd module, or enable virtualization in \
                             the firmware"
            }
            libc::EACCES => ": add yourself to the group that owns it, often 'kvm'",
            libc::EBUSY => ": another hypervisor uses the processor",
            _ => "",
        };
        Refusal::Host { what: format!("cannot open /dev/kvm{advice}"), source: e.into() }
    })?;
    // What fails is no version.
    let version = arch::again(|| match kvm.get_api_version() {
        failed if failed < 0 => Err(kvm_ioctls::Error::last()),
        version => Ok(version),
    });
    match version.map_err(Refusal::host("/dev/kvm: KVM_GET_API_VERSION"))? {
        KVM_API_VERSION => Ok(kvm),
        other => Err(Refusal::Host {
            what: "/dev/kvm".into(),
            source: std::io::Error::other(format!("API version {other}, want {KVM_API_VERSION}")),
        }),
    }
}

fn open_console(to: &SerialTo, quit: Arc<dyn Fn() + Send + Sync>) -> Result<Console, Refusal> {
    match to {
        SerialTo::Stdio => Console::stdio(Box::new(move || quit())),
        SerialTo::Pty => Console::pty(),
        SerialTo::None => Console::none(),
        SerialTo::File(path) => Console::file(path),
        SerialTo::Socket(path) => Console::socket(path),
    }
    .map_err(Refusal::Console)
}
