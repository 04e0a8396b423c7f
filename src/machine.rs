//! A virtual machine, put together, saved, taken apart. Boot, reboot and restore are one path:
//! [`Machine::assemble`].
//!
//! Order matters: memory slots come before the interrupt controllers, because KVM waits for a grace
//! period of several milliseconds when a slot is set after them.
mod rewind;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arch::{Clock, Entry, HostCpu, Platform, Topology, VcpuState, VmState, layout};
use devices::GuestRam;
use devices::bus::Bus;
use devices::legacy::acpi::Acpi;
use devices::legacy::boot_timer::{self, BootTimer};
use devices::legacy::generation;
use devices::legacy::i8042::I8042;
use devices::legacy::rtc::Rtc;
use devices::legacy::serial::SerialState;
use devices::limiter::{RateLimiter, TokenBucket};
use devices::observer::Happening;
use devices::virtio::model::{DeviceError, Env};
use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, kvm_enable_cap,
    kvm_pit_config,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde_json::Value;

use crate::attach::{Attached, Slots, insert, places, register_irq};
use crate::boot::Stopwatch;
use crate::config::{RATE_LIMIT_GROUPS, VmConfig};
use crate::error::{Refusal, chain};
use crate::fork::Freezing;
use crate::identity::Identity;
use crate::memory::{self, Ram};
use crate::metrics::Source;
use crate::outcome::Outcome;
use crate::parts::{Part, Parts, serial_failed, setup};
use crate::request::Reply;
use crate::snapshot::{DeviceState, LegacyState, MachineState, Restore, SnapshotError};
use crate::takeover::Port;
use crate::vcpu::{Unclaimed, Vcpus, World};

/// Appended to the command line of the demo guest only: it prints the time since then.
const DEMO_TIME: &str = "husk.boot_us";
/// How long the last output may take to reach its reader when a machine ends.
const SERIAL_DEADLINE: Duration = Duration::from_millis(250);
/// How long a guest may take to look at the generation id when it is told to.
const LOOK_MAX: Duration = Duration::from_millis(500);

/// How long a machine may take to stop or to end whose memory another process serves.
const SERVED_DEADLINE: Duration = Duration::from_secs(2);

/// A machine. Dropping it stops it: vCPUs first, then KVM's VM, so that nothing needs to be hidden
/// from the guest any more, then devices, then memory.
#[derive(Debug)]
pub(crate) struct Machine {
    vcpus: Vcpus,
    vm: Arc<VmFd>,
    outcome: Arc<Outcome>,
    legacy: Legacy,
    identity: Identity,
    devices: Vec<Attached>,
    has_pit: bool,
    rest: Rest,
    ram: Ram,
    _memory: GuestRam,
}

/// The devices of a PC that are made with the machine.
#[derive(Debug)]
struct Legacy {
    acpi: Arc<Mutex<Acpi>>,
    i8042: Arc<Mutex<I8042>>,
    rtc: Arc<Mutex<Rtc>>,
}

/// The parts that are not built into the machine, kept to build it again.
#[derive(Debug)]
struct Rest(Parts);

/// What names a device in its VM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name<'a> {
    pub(crate) model: &'static str,
    /// The model's name where there can be only one.
    pub(crate) id: &'a str,
}

impl Name<'_> {
    fn refused(self, source: DeviceError) -> Refusal {
        Refusal::Device { section: self.model, id: self.id.into(), source }
    }
}

/// Names of threads, which tools look for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadNames {
    /// The thread that runs devices.
    pub(crate) io: &'static str,
    /// The thread of a vCPU, without its number.
    pub(crate) vcpu: &'static str,
    /// The API's thread.
    pub(crate) api: &'static str,
}

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
        let image = restore.map(|restore| &restore.image);
        let saved = image.map(|image| &image.document.machine);
        let vm = parts.kvm.create_vm().map_err(Refusal::kvm("KVM_CREATE_VM"))?;
        let vm = Arc::new(vm);
        let boot_us = watch.since_start();
        vm.set_tss_address(usize_of(layout::KVM_TSS)).map_err(Refusal::kvm("KVM_SET_TSS_ADDR"))?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(Refusal::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        watch.phases.vm_us = watch.lap();
        let handler = restore.and_then(|restore| restore.handler.as_deref());
        let contents = image.filter(|_| handler.is_none()).map(|image| &image.memory);
        let mut ram = memory::map(&config.machine, config.sharing(), contents)?;
        if let Some(socket) = handler {
            ram.serve(&config.machine, socket, config.gives_memory_back())
                .map_err(SnapshotError::Served)?;
        }
        memory::register(&vm, &ram.guest, &config.machine)?;
        let host = memory::Host { kvm: &parts.kvm, cpu: &parts.cpu };
        let memory = memory::place(&vm, host, &mut ram, &mut parts.devices, saved)?;
        if let Some(image) = image {
            image.check_memory(&ram)?;
            ram.tracker.begin(image.parent.clone());
        }
        watch.phases.memory_us = watch.lap();
        vm.create_irq_chip().map_err(Refusal::kvm("KVM_CREATE_IRQCHIP"))?;
        if config.machine.pit {
            // With the speaker port, whose gate kernels calibrate their clocks by.
            let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            vm.create_pit2(pit).map_err(Refusal::kvm("KVM_CREATE_PIT2"))?;
        }
        disable_pmu(&vm);
        let kernel = match (saved, &parts.kernel) {
            (Some(_), _) => None,
            (None, Some(kernel)) => Some(kernel.load(&ram.guest)?),
            (None, None) => return Err(Refusal::NoKernel),
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
        let io_name = names.io;
        let interrupts = &parts.counters.interrupts;
        let mut slots =
            Slots { vm: &vm, memory: &memory, mmio: &mut mmio, io: &parts.io, io_name, interrupts };
        let devices = std::mem::take(&mut parts.devices)
            .into_iter()
            .enumerate()
            .map(|(index, part)| match saved {
                None => slots.attach(index, part, None),
                Some(saved) => {
                    let saved = saved.device(part.model, &part.id)?;
                    slots.attach(saved.place, part, Some(&saved.state))
                }
            })
            .collect::<Result<Vec<_>, _>>()?;

        ram.fill().map_err(Refusal::host("cannot bring plugged memory back"))?;
        watch.phases.devices_us = watch.lap();
        let topology = Topology::new(config.machine.vcpu_count, config.machine.smt);
        if let Some(kernel) = &kernel {
            let places: Vec<_> = devices.iter().map(|d| d.place).collect();
            let mut cmdline = command_line(config);
            if config.is_demo() {
                cmdline.push_str(&format!(" {DEMO_TIME}={boot_us}"));
            }
            let apic_ids = topology.apic_ids();
            let initrd = parts.initrd.as_ref();
            Platform { cmdline: cmdline.trim(), initrd, apic_ids: &apic_ids, devices: &places }
                .write(&ram.guest, kernel)?;
            identity.write(&ram.guest, config.payload.as_ref())?;
            let Entry { protocol, addr, .. } = kernel;
            log::info!("assembled: {protocol} kernel at {addr:#x}, command line: {cmdline}");
        }
        let fds = create_vcpus(&vm, &parts, config, topology, kernel.as_ref())?;
        if let Some(restore) = restore {
            let saved = &restore.image.document.machine;
            saved.write(&vm, &fds, restore.clock())?;
            legacy.restore(&saved.legacy);
            identity.renew(&ram.guest, &legacy.acpi, config.payload.as_ref())?;
        }
        parts.identity = Some(identity.current());
        let counters = parts.counters.vcpus.clone();
        let unclaimed = Unclaimed::default();
        let world = World { pio, mmio, outcome: outcome.clone(), unclaimed, counters };
        let first = saved.and_then(|saved| saved.identity.first);
        let vcpus = Vcpus::spawn(fds, &Arc::new(world), names.vcpu, first)?;
        watch.phases.vcpus_us = watch.lap();
        if ram.is_lost() {
            let gone = std::io::Error::other("it has ended");
            return Err(Refusal::host("the process that serves guest memory")(gone));
        }
        let (rest, has_pit) = (Rest(parts), config.machine.pit);
        Ok(Self {
            vcpus,
            vm,
            outcome,
            legacy,
            identity,
            devices,
            has_pit,
            rest,
            ram,
            _memory: memory,
        })
    }

    /// Takes the machine apart, so that it can be put together again: devices stop, and give back
    /// what they opened.
    pub(crate) fn dismantle(self) -> Result<Parts, Refusal> {
        let Self { vcpus, devices, rest: Rest(mut parts), .. } = self;
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

    /// Stands for a device in a machine that is to take it over, if it can be.
    pub(crate) fn stand_in(&self, model: &'static str, id: &str) -> Option<Part> {
        let device = &self.devices[self.position(Name { model, id }).ok()?];
        let stand_in = Box::new(lock(&device.transport).stand_in()?);
        let counters = device.counters.clone();
        Some(Part { model, id: id.into(), device: stand_in, counters, watch: None })
    }

    /// Its serial port, for a machine that takes it over.
    pub(crate) fn port(&self) -> Port {
        let Rest(parts) = &self.rest;
        let (serial, io) = (parts.serial.clone(), parts.io.clone());
        Port { serial, io, path: parts.serial_path.clone() }
    }

    /// What its devices share.
    pub(crate) fn env(&self) -> &Env {
        &self.rest.0.env
    }

    /// Takes from `old` what this has stand-ins for, the devices `names`; the serial port, if it is the same,
    /// goes on as `serial` and `limit` say. Both are paused. If it is refused, nothing has changed.
    pub(crate) fn take_over(
        &self,
        old: &Self,
        names: &[(&'static str, String)],
        serial: &SerialState,
        limit: Option<&TokenBucket>,
    ) -> Result<(), Refusal> {
        let Rest(parts) = &self.rest;
        let (ours, theirs) = names
            .iter()
            .map(|(model, id)| {
                let name = Name { model, id };
                Ok((&self.devices[self.position(name)?], &old.devices[old.position(name)?]))
            })
            .collect::<Result<(Vec<_>, Vec<_>), Refusal>>()?;
        if Arc::ptr_eq(&parts.serial, &old.rest.0.serial) {
            let line = parts.serial_irq.try_clone();
            let line = line.map_err(Refusal::host("cannot copy an eventfd"))?;
            let moved = lock(&parts.serial).move_to(serial.clone(), Box::new(line));
            moved.map_err(serial_failed)?;
            lock(&parts.serial).limit(limit);
        }
        for (ours, theirs) in ours.iter().zip(theirs) {
            lock(&ours.transport).take_over(&mut lock(&theirs.transport));
        }
        Ok(())
    }

    /// Whether the serial port is another's as well.
    pub(crate) fn shares_port_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.rest.0.serial, &other.rest.0.serial)
    }

    /// Lets the guest run. A device whose host side is lost stays behind, and its driver is told.
    pub(crate) fn run(&self) {
        self.ram.touch();
        self.ram.run();
        for Attached { model, id, transport, .. } in &self.devices {
            if let Err(e) = lock(transport).resume() {
                log::error!("{model} {id}: cannot go on: {}", chain(&e));
            }
        }
        self.vcpus.run();
    }

    /// Stops the guest where it is: vCPUs first, so that nothing new is asked of the devices. If a
    /// device does not stop, because its host side does not answer, the guest goes on.
    pub(crate) fn pause(&self) -> Result<(), Refusal> {
        // Memory that another process serves may never come.
        let deadline = self.ram.is_served().then(|| Instant::now() + SERVED_DEADLINE);
        if !self.vcpus.park(deadline) {
            self.vcpus.run();
            let why = "a vCPU waits for memory that another process serves";
            let source = std::io::Error::new(std::io::ErrorKind::TimedOut, why);
            return Err(Refusal::host("the guest does not stop")(source));
        }
        let paused =
            self.devices.iter().try_for_each(|Attached { model, id, transport, .. }| {
                lock(transport).pause().map_err(|e| Name { model, id }.refused(e))
            });
        paused.inspect_err(|_| self.run())
    }

    /// Stops the guest, to be copied: if it can be, where a copy of it looks at the generation id
    /// before it does anything else.
    pub(crate) fn pause_to_copy(&self) -> Result<(), Refusal> {
        if self.identity.has_driver() {
            let tell = || lock(&self.legacy.acpi).announce_generation();
            let start = Instant::now();
            let looks = self.vcpus.await_look(tell, LOOK_MAX);
            let took = start.elapsed();
            if looks {
                log::debug!("the guest looks at the generation id after {took:?}");
            } else {
                log::info!(
                    "the guest has not looked at the generation id in {took:?}: its copies will, \
                     a moment after they go on"
                );
            }
        }
        self.pause()
    }

    /// The state of a machine that is paused.
    pub(crate) fn save(&self) -> Result<MachineState, Refusal> {
        let Rest(parts) = &self.rest;
        let msr_indices = HostCpu::msr_indices(&parts.kvm).map_err(SnapshotError::State)?;
        let mut vcpus = Vec::new();
        self.vcpus
            .each(|_, vcpu| {
                vcpus.push(VcpuState::read(&self.vm, vcpu, &msr_indices)?);
                Ok(())
            })
            .map_err(SnapshotError::State)?;
        let vm = VmState::read(&self.vm, self.has_pit).map_err(SnapshotError::State)?;
        let devices = self.devices.iter().map(|device| {
            let mut transport = lock(&device.transport);
            let mut state = transport.save();
            let name = Name { model: device.model, id: &device.id };
            transport.save_files(&mut state).map_err(|e| name.refused(e))?;
            Ok(DeviceState {
                model: device.model.into(),
                id: device.id.clone(),
                place: device.index,
                memory_at: self.ram.place_of(device.model, &device.id),
                state,
                layer: None,
            })
        });
        let Legacy { acpi, i8042, rtc } = &self.legacy;
        let legacy = LegacyState {
            serial: lock(&parts.serial).state(),
            i8042: lock(i8042).state(),
            rtc: lock(rtc).state(),
            acpi: lock(acpi).state(),
        };
        let devices = devices.collect::<Result<_, Refusal>>()?;
        let first = self.vcpus.first();
        if let Some((vcpu, Some(registers))) = first
            && let Some(state) = vcpus.get_mut(usize::from(vcpu))
        {
            state.set_registers(registers);
        }
        let identity = self.identity.state(first.map(|(vcpu, _)| vcpu));
        Ok(MachineState { vm, vcpus, legacy, identity, devices })
    }

    /// Whether what it was booted from is here.
    pub(crate) fn can_reboot(&self) -> bool {
        self.rest.0.kernel.is_some()
    }

    /// Makes RAM what a process that copies it has a copy of. The machine is paused.
    pub(crate) fn settle(&mut self, config: &VmConfig) -> Result<(), Refusal> {
        let frozen = self.ram.freeze(config.machine.huge_pages).map_err(SnapshotError::Copy);
        Ok(frozen?)
    }

    /// The beginning of an image in memory of a machine that is paused.
    pub(crate) fn freeze(&mut self, config: &VmConfig) -> Result<Freezing, Refusal> {
        let state = self.save()?;
        let pages = config.machine.huge_pages;
        Ok(Freezing::begin(config.to_json(), state, &mut self.ram, pages)?)
    }

    /// Its RAM.
    pub(crate) fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Applies a run-time change to a device, or to a view of it.
    pub(crate) fn update(
        &self,
        name: Name<'_>,
        view: Option<&str>,
        patch: &Value,
    ) -> Result<(), Refusal> {
        let device = &self.devices[self.position(name)?];
        lock(&device.transport).update(view, patch).map_err(|e| name.refused(e))?;
        device.notice(Happening::Updated);
        Ok(())
    }

    /// Changes the limits of a group, whichever device waits for them.
    pub(crate) fn update_group(&self, id: &str, limiter: &RateLimiter) -> Result<(), Refusal> {
        let group = self.rest.0.env.rate_limit_groups.get(id);
        let missing = || Refusal::NoSuchDevice { section: RATE_LIMIT_GROUPS, id: id.into() };
        group.ok_or_else(missing)?.update(limiter);
        Ok(())
    }

    /// What `GET` shows of a device, or of a view of it.
    pub(crate) fn show(&self, name: Name<'_>, view: Option<&str>) -> Reply {
        let device = &self.devices[self.position(name)?];
        lock(&device.transport).show(view).map_err(|e| name.refused(e))
    }

    /// Takes a device out of the running machine, and closes what it has open; what counted in it.
    pub(crate) fn remove(&mut self, name: Name<'_>) -> Result<Vec<Source>, Refusal> {
        let position = self.position(name)?;
        let removed = lock(&self.devices[position].transport).remove();
        removed.map_err(|e| name.refused(e))?;
        let device = self.devices.remove(position);
        device.notice(Happening::Removed);
        Ok(device.sources().collect())
    }

    fn position(&self, Name { model, id }: Name<'_>) -> Result<usize, Refusal> {
        let position = self.devices.iter().position(|d| d.model == model && d.id == id);
        position.ok_or_else(|| Refusal::NoSuchDevice { section: model, id: id.into() })
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self) {
        lock(&self.legacy.acpi).press_power_button();
    }

    /// Presses Ctrl-Alt-Del. False if the guest does not read its keyboard.
    pub(crate) fn ctrl_alt_del(&self) -> bool {
        lock(&self.legacy.i8042).ctrl_alt_del()
    }

    /// How the run ended, and the descriptor that says so.
    pub(crate) fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// All that counts in it.
    pub(crate) fn sources(&self) -> Vec<Source> {
        let uart = Source::only(lock(&self.rest.0.serial).counters().clone());
        let devices = self.devices.iter().flat_map(Attached::sources);
        devices.chain([uart]).chain(self.rest.0.counters.sources()).collect()
    }

    /// Stops the machine for good, and sees its last output off.
    pub(crate) fn finish(self) {
        self.end(|Self { vcpus, rest: Rest(parts), .. }| {
            drop(vcpus);
            lock(&parts.serial).finish(SERIAL_DEADLINE);
        });
    }

    /// Stops the machine for good, whose serial port goes on.
    pub(crate) fn leave(self) {
        self.end(drop);
    }

    /// Does `what` ends it. If another process serves its memory, threads may wait for pages that never
    /// come; nobody waits for them then.
    fn end(self, what: fn(Self)) {
        if !self.ram.is_served() {
            return what(self);
        }
        let patience = if self.ram.is_lost() { SERIAL_DEADLINE } else { SERVED_DEADLINE };
        let (sender, receiver) = std::sync::mpsc::channel();
        let end = move || {
            what(self);
            // Nobody waits for it any more if it took too long.
            let _ = sender.send(());
        };
        match std::thread::Builder::new().name("husk_end".into()).spawn(end) {
            Ok(_) if receiver.recv_timeout(patience).is_ok() => {}
            Ok(_) => log::warn!("threads of the microVM still wait for memory that nobody serves"),
            Err(e) => log::error!("cannot start a thread to end the microVM: {e}"),
        }
    }
}

/// A device's lock. A panic is fatal in the binary; in a library the device may still be stopped.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An address of the layout, all of which are below 4 GiB.
fn usize_of(addr: u64) -> usize {
    usize::try_from(addr).expect("the layout's addresses fit into 32 bits")
}

/// Takes performance counters away from the guest: CPUID hides them, this refuses their MSRs too.
fn disable_pmu(vm: &VmFd) {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    cap.args[0] = KVM_PMU_CAP_DISABLE.into();
    if let Err(e) = vm.enable_cap(&cap) {
        // Kernels before 5.18: there the counters are hidden only.
        log::debug!("KVM cannot disable performance monitoring: {e}");
    }
}

impl Legacy {
    /// Puts the devices into the state in which they were saved.
    fn restore(&self, saved: &LegacyState) {
        // The serial port was made with its state.
        let LegacyState { serial: _, i8042, rtc, acpi } = saved.clone();
        lock(&self.i8042).set_state(i8042);
        lock(&self.rtc).set_state(rtc);
        lock(&self.acpi).set_state(acpi);
    }
}

impl MachineState {
    /// Gives KVM its part of it.
    fn write(&self, vm: &VmFd, vcpus: &[VcpuFd], clock: Clock) -> Result<(), SnapshotError> {
        if vcpus.len() != self.vcpus.len() {
            let (is, want) = (self.vcpus.len(), vcpus.len());
            let why = format!("it has the state of {is} vCPUs, of which it should have {want}");
            return Err(SnapshotError::Inconsistent(why));
        }
        for (state, vcpu) in self.vcpus.iter().zip(vcpus) {
            state.write(vm, vcpu)?;
            // Tells the guest's watchdogs that the time until now was not its own. Refused where the
            // guest does not use kvm-clock.
            let _ = vcpu.kvmclock_ctrl();
        }
        Ok(self.vm.write(vm, clock)?)
    }

    /// Where the guest saw the memory that a device brought along.
    pub(crate) fn memory_at(&self, model: &str, id: &str) -> Option<u64> {
        self.device(model, id).ok()?.memory_at
    }

    fn device(&self, model: &str, id: &str) -> Result<&DeviceState, SnapshotError> {
        let found = self.devices.iter().find(|d| d.model == model && d.id == id);
        found.ok_or_else(|| SnapshotError::Inconsistent(format!("it has no state of {model} {id}")))
    }
}

/// Puts the devices of a PC in their places.
fn legacy(
    vm: &VmFd,
    parts: &Parts,
    outcome: &Arc<Outcome>,
    pio: &mut Bus,
) -> Result<Legacy, Refusal> {
    vm.register_irqfd(&parts.serial_irq, layout::SERIAL_IRQ).map_err(Refusal::kvm("KVM_IRQFD"))?;
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

fn create_vcpus(
    vm: &VmFd,
    parts: &Parts,
    config: &VmConfig,
    topology: Topology,
    kernel: Option<&Entry>,
) -> Result<Vec<VcpuFd>, Refusal> {
    topology
        .apic_ids()
        .into_iter()
        .map(|id| {
            let vcpu = vm.create_vcpu(id.into()).map_err(Refusal::kvm("KVM_CREATE_VCPU"))?;
            let entry = kernel.filter(|_| id == 0);
            parts.cpu.configure(&vcpu, id, topology, entry).map_err(|e| setup(e, config.cpu()))?;
            Ok(vcpu)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use arch::power_ports as told;
    use devices::legacy::acpi;

    /// The tables and the device are in crates that do not know each other.
    #[test]
    fn acpi_device_is_what_the_tables_tell() {
        assert_eq!(acpi::SLEEP_CONTROL, told::SLEEP_CONTROL);
        assert_eq!(acpi::SLEEP_STATUS, told::SLEEP_STATUS);
        assert_eq!(acpi::RESET, told::RESET);
        assert_eq!(acpi::EVENTS, told::EVENTS);
        assert_eq!(acpi::SLEEP_TYPE_S5, told::SLEEP_TYPE_S5);
        assert_eq!(acpi::RESET_VALUE, told::RESET_VALUE);
        assert_eq!(acpi::EVENT_POWER_BUTTON, told::EVENT_POWER_BUTTON);
        assert_eq!(acpi::EVENT_GENERATION, told::EVENT_GENERATION);
    }
}
