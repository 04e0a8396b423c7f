//! A machine, put together and taken apart. Boot, reboot and restore are one path: [`Machine::assemble`].
//!
//! Order matters: memory slots come before the interrupt controllers, because KVM waits for a grace
//! period of several milliseconds when a slot is set after them.
use std::sync::{Arc, PoisonError};

use arch::{Entry, Platform, Topology, again, layout};
use devices::GuestRam;
use devices::bus::Bus;
use devices::legacy::acpi::Acpi;
use devices::legacy::boot_timer::{self, BootTimer};
use devices::legacy::generation;
use devices::legacy::i8042::I8042;
use devices::legacy::rtc::Rtc;
use devices::sync::Mutex;
use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, kvm_enable_cap,
    kvm_pit_config,
};
use kvm_ioctls::{VcpuFd, VmFd};

use super::{Legacy, Machine, Rest, ThreadNames, lock};
use crate::attach::{Attached, Slots, insert, places, register_irq};
use crate::boot::Stopwatch;
use crate::config::VmConfig;
use crate::error::Refusal;
use crate::identity::Identity;
use crate::memory::{self, Ram};
use crate::outcome::Outcome;
use crate::parts::{Part, Parts, setup};
use crate::snapshot::{MachineState, Restore, SnapshotError};
use crate::vcpu::{Unclaimed, Vcpus, World};

/// Appended to the command line of the demo guest only: it prints the time since then.
const DEMO_TIME: &str = "husk.boot_us";

impl Machine {
    /// Puts a machine together; its vCPUs are parked at the first instruction, or where they were when
    /// the snapshot to `restore` was made.
    pub(crate) fn assemble(
        config: &VmConfig,
        mut parts: Parts,
        names: ThreadNames,
        watch: &mut Stopwatch,
        restore: Option<&Restore>,
    ) -> Result<Self, Refusal> {
        let saved = restore.map(|restore| &restore.image.document.machine);
        let vm = Arc::new(create_vm(&parts)?);
        let boot_us = watch.since_start();
        watch.phases.vm_us = watch.lap();
        let (mut ram, memory) = place_memory(&vm, config, &mut parts, restore)?;
        watch.phases.memory_us = watch.lap();
        create_interrupt_controllers(&vm, config)?;
        let kernel = match saved {
            Some(_) => None,
            None => Some(parts.kernel.as_ref().ok_or(Refusal::NoKernel)?.load(&ram.guest)?),
        };
        watch.phases.kernel_us = watch.lap();

        let outcome = Outcome::new().map_err(Refusal::host("cannot make an eventfd"))?;
        ram.watch(&outcome).map_err(Refusal::host("cannot watch over served memory"))?;
        let (mut pio, mut mmio) = (Bus::default(), Bus::default());
        let legacy = legacy(&vm, &parts, &outcome, &mut pio)?;
        let mut identity = Identity::new(parts.identity, saved.map(|saved| saved.identity))?;
        insert(&mut mmio, layout::GENERATION_ID, generation::LEN, identity.page());
        if let Some(timer) = &parts.boot_timer {
            insert(&mut mmio, layout::BOOT_TIMER, boot_timer::LEN, timer.clone());
        }
        let unattached = std::mem::take(&mut parts.devices);
        let (io, io_name, interrupts) = (&parts.io, names.io, &parts.counters.interrupts);
        let slots = Slots { vm: &vm, memory: &memory, mmio: &mut mmio, io, io_name, interrupts };
        let devices = attach(slots, unattached, saved)?;
        ram.fill().map_err(Refusal::host("cannot bring plugged memory back"))?;
        watch.phases.devices_us = watch.lap();
        let topology = Topology::new(config.machine.vcpu_count, config.machine.smt);
        if let Some(kernel) = &kernel {
            let cmdline = command_line_at(config, boot_us);
            let places: Vec<_> = devices.iter().map(|d| d.place).collect();
            let (initrd, apic_ids) = (parts.initrd.as_ref(), topology.apic_ids());
            Platform { cmdline: cmdline.trim(), initrd, apic_ids: &apic_ids, devices: &places }
                .write(&ram.guest, kernel)?;
            let Entry { protocol, addr, .. } = kernel;
            log::info!("assembled: {protocol} kernel at {addr:#x}, command line: {cmdline}");
            identity.write(&ram.guest, config.payload.as_ref())?;
        }
        let fds = create_vcpus(&vm, topology)?;
        if let Some(kernel) = &kernel {
            set_up_vcpus(&fds, &parts, config, topology, kernel)?;
        }
        if let Some(restore) = restore {
            let saved = &restore.image.document.machine;
            saved.write(&vm, &fds, &parts.cpu, config, restore.clock())?;
            legacy.restore(&saved.legacy);
            // What devices raised before the interrupt controllers had their state is gone.
            devices.iter().for_each(|device| lock(&device.transport).tell_again());
            lock(&parts.serial).tell_again();
            identity.renew(&ram.guest, &legacy.acpi, config.payload.as_ref())?;
        }
        let counters = parts.counters.vcpus.clone();
        let unclaimed = Unclaimed::default();
        let world = World { pio, mmio, outcome: outcome.clone(), unclaimed, counters };
        let first = saved.and_then(|saved| saved.identity.first);
        let vcpus = Vcpus::spawn(fds, &Arc::new(world), names.vcpu, first)?;
        watch.phases.vcpus_us = watch.lap();
        check_served(&ram)?;
        let (rest, has_pit, _memory) = (Rest(parts), config.machine.pit, memory);
        Ok(Self { vcpus, vm, outcome, legacy, identity, devices, has_pit, rest, ram, _memory })
    }

    /// Takes the machine apart, so that it can be put together again: devices stop, and give back
    /// what they opened.
    pub(crate) fn dismantle(self) -> Result<Parts, Refusal> {
        let Self { vcpus, devices, identity, rest: Rest(mut parts), .. } = self;
        parts.identity = Some(identity.current());
        // The vCPUs own the buses, and with them the other references to the transports.
        drop(vcpus);
        for Attached { model, id, transport, counters, watch, .. } in devices {
            let transport = Arc::into_inner(transport).ok_or(Refusal::Gone)?;
            let transport = transport.into_inner().unwrap_or_else(PoisonError::into_inner);
            match transport.into_device() {
                Ok(device) => parts.devices.push(Part { model, id, device, counters, watch }),
                Err(source) => return Err(Refusal::Device { section: model, id, source }),
            }
        }
        lock(&parts.serial).reset();
        if let Some(timer) = &parts.boot_timer {
            *lock(timer) = BootTimer::start();
        }
        Ok(parts)
    }
}

/// KVM's VM, before it has anything.
fn create_vm(parts: &Parts) -> Result<VmFd, Refusal> {
    let vm = again(|| parts.kvm.create_vm()).map_err(Refusal::kvm("KVM_CREATE_VM"))?;
    again(|| vm.set_tss_address(usize_of(layout::KVM_TSS)))
        .map_err(Refusal::kvm("KVM_SET_TSS_ADDR"))?;
    again(|| vm.set_identity_map_address(layout::KVM_IDENTITY_MAP))
        .map_err(Refusal::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
    Ok(vm)
}

/// RAM with what is to be in it, and memory that devices bring along, in the guest's address space.
fn place_memory(
    vm: &Arc<VmFd>,
    config: &VmConfig,
    parts: &mut Parts,
    restore: Option<&Restore>,
) -> Result<(Ram, GuestRam), Refusal> {
    let image = restore.map(|restore| &restore.image);
    let handler = restore.and_then(|restore| restore.handler.as_deref());
    let contents = image.filter(|_| handler.is_none()).map(|image| &image.memory);
    let mut ram = memory::map(&config.machine, config.sharing(), contents)?;
    if let Some(socket) = handler {
        ram.serve(&config.machine, socket, config.gives_memory_back())
            .map_err(SnapshotError::Served)?;
    }
    memory::register(vm, &ram.guest, &config.machine)?;
    let host = memory::Host { kvm: &parts.kvm, cpu: &parts.cpu };
    let saved = image.map(|image| &image.document.machine);
    let memory = memory::place(vm, host, &mut ram, &mut parts.devices, saved)?;
    if let Some(image) = image {
        image.check_memory(&ram)?;
        ram.begin_tracking(image.parent.clone());
    }
    Ok((ram, memory))
}

/// Refuses memory whose server has gone.
fn check_served(ram: &Ram) -> Result<(), Refusal> {
    if ram.is_lost() {
        let gone = std::io::Error::other("it has ended");
        return Err(Refusal::host("the process that serves guest memory")(gone));
    }
    Ok(())
}

fn create_interrupt_controllers(vm: &VmFd, config: &VmConfig) -> Result<(), Refusal> {
    again(|| vm.create_irq_chip()).map_err(Refusal::kvm("KVM_CREATE_IRQCHIP"))?;
    if config.machine.pit {
        // With the speaker port, whose gate kernels calibrate their clocks by.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        again(|| vm.create_pit2(pit)).map_err(Refusal::kvm("KVM_CREATE_PIT2"))?;
    }
    disable_pmu(vm);
    Ok(())
}

/// Puts virtio devices in their places: those of the configuration's order, or those they had when they
/// were `saved`.
fn attach(
    mut slots: Slots<'_>,
    devices: Vec<Part>,
    saved: Option<&MachineState>,
) -> Result<Vec<Attached>, Refusal> {
    devices
        .into_iter()
        .enumerate()
        .map(|(index, part)| match saved {
            None => slots.attach(index, part, None),
            Some(saved) => {
                let saved = saved.device(part.model, &part.id)?;
                slots.attach(saved.place, part, Some(&saved.state))
            }
        })
        .collect()
}

/// Puts the devices of a PC in their places.
fn legacy(
    vm: &VmFd,
    parts: &Parts,
    outcome: &Arc<Outcome>,
    pio: &mut Bus,
) -> Result<Legacy, Refusal> {
    again(|| vm.register_irqfd(&parts.serial_irq, layout::SERIAL_IRQ))
        .map_err(Refusal::kvm("KVM_IRQFD"))?;
    insert(pio, layout::SERIAL, 8, parts.serial.clone());
    let acpi = Acpi::new(Box::new(register_irq(vm, layout::ACPI_IRQ)?), outcome.clone());
    let acpi = Arc::new(Mutex::new(acpi));
    insert(pio, layout::ACPI_POWER, 4, acpi.clone());
    let i8042 = I8042::new(
        Box::new(register_irq(vm, layout::I8042_IRQ)?),
        outcome.clone(),
        parts.counters.i8042.clone(),
    );
    let i8042 = Arc::new(Mutex::new(i8042));
    insert(pio, layout::I8042_DATA, 5, i8042.clone());
    let rtc = Arc::new(Mutex::new(Rtc::default()));
    insert(pio, layout::RTC, 2, rtc.clone());
    Ok(Legacy { acpi, i8042, rtc })
}

/// The kernel's command line: what the user gave, what devices add, and where devices are.
pub(crate) fn command_line(config: &VmConfig) -> String {
    let given = config.boot_source.as_ref().and_then(|s| s.boot_args.as_deref());
    let mut words = vec![given.unwrap_or(crate::config::DEFAULT_BOOT_ARGS).to_owned()];
    words.extend(config.devices().filter_map(|recipe| recipe.kernel_args()));
    words.extend(places().zip(config.devices()).map(|(place, _)| place.kernel_arg()));
    words.join(" ")
}

/// The same, for the VM that is made `boot_us` after husk did.
fn command_line_at(config: &VmConfig, boot_us: u64) -> String {
    let mut cmdline = command_line(config);
    if config.is_demo() {
        cmdline.push_str(&format!(" {DEMO_TIME}={boot_us}"));
    }
    cmdline
}

/// One for each place in `topology`, in its order.
fn create_vcpus(vm: &VmFd, topology: Topology) -> Result<Vec<VcpuFd>, Refusal> {
    let ids = topology.apic_ids().into_iter();
    ids.map(|id| again(|| vm.create_vcpu(id.into())).map_err(Refusal::kvm("KVM_CREATE_VCPU")))
        .collect()
}

fn set_up_vcpus(
    vcpus: &[VcpuFd],
    parts: &Parts,
    config: &VmConfig,
    topology: Topology,
    kernel: &Entry,
) -> Result<(), Refusal> {
    for (vcpu, id) in vcpus.iter().zip(topology.apic_ids()) {
        let entry = (id == 0).then_some(kernel);
        parts.cpu.configure(vcpu, id, topology, entry).map_err(|e| setup(e, config.cpu()))?;
    }
    Ok(())
}

/// An address of the layout, all of which are below 4 GiB.
fn usize_of(addr: u64) -> usize {
    usize::try_from(addr).expect("the layout's addresses fit into 32 bits")
}

/// Takes performance counters away from the guest: CPUID hides them, this refuses their MSRs too.
fn disable_pmu(vm: &VmFd) {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    cap.args[0] = KVM_PMU_CAP_DISABLE.into();
    if let Err(e) = again(|| vm.enable_cap(&cap)) {
        // Kernels before 5.18: there the counters are hidden only.
        log::debug!("KVM cannot disable performance monitoring: {e}");
    }
}
