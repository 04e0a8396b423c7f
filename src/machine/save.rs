//! The state of a machine, as a snapshot has it: read, and put back.
use arch::{Clock, HostCpu, SetupError, Topology, VcpuState, VmState, again};
use kvm_ioctls::{VcpuFd, VmFd};

use super::{Legacy, Machine, Name, Rest, lock};
use crate::config::VmConfig;
use crate::error::Refusal;
use crate::fork::Freezing;
use crate::parts::setup;
use crate::snapshot::{DeviceState, LegacyState, MachineState, SnapshotError};

impl Machine {
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
}

impl Legacy {
    /// Puts the devices into the state in which they were saved.
    pub(super) fn restore(&self, saved: &LegacyState) {
        // The serial port was made with its state.
        let LegacyState { serial: _, i8042, rtc, acpi } = saved.clone();
        lock(&self.i8042).set_state(i8042);
        lock(&self.rtc).set_state(rtc);
        lock(&self.acpi).set_state(acpi);
    }
}

impl MachineState {
    /// Gives KVM its part of it: `vcpus`, which are new, go on where those of the snapshot stood.
    pub(super) fn write(
        &self,
        vm: &VmFd,
        vcpus: &[VcpuFd],
        cpu: &HostCpu,
        config: &VmConfig,
        clock: Clock,
    ) -> Result<(), Refusal> {
        if vcpus.len() != self.vcpus.len() {
            let (is, want) = (self.vcpus.len(), vcpus.len());
            let why = format!("it has the state of {is} vCPUs, of which it should have {want}");
            return Err(SnapshotError::Inconsistent(why).into());
        }
        let topology = Topology::new(config.machine.vcpu_count, config.machine.smt);
        let passed = self.vm.passed(clock);
        if let (Some(state), Some(vcpu)) = (self.vcpus.first(), vcpus.first()) {
            state.forget_tsc(vcpu).map_err(SnapshotError::from)?;
        }
        for ((state, vcpu), id) in self.vcpus.iter().zip(vcpus).zip(topology.apic_ids()) {
            cpu.restore(vm, vcpu, id, topology, state, passed).map_err(|e| match e {
                SetupError::State(e) => SnapshotError::from(e).into(),
                e => setup(e, config.cpu()),
            })?;
            // Tells the guest's watchdogs that the time until now was not its own. Refused where the
            // guest does not use kvm-clock.
            let _ = again(|| vcpu.kvmclock_ctrl());
        }
        Ok(self.vm.write(vm, passed).map_err(SnapshotError::from)?)
    }

    /// Where the guest saw the memory that a device brought along.
    pub(crate) fn memory_at(&self, model: &str, id: &str) -> Option<u64> {
        self.device(model, id).ok()?.memory_at
    }

    pub(crate) fn device(&self, model: &str, id: &str) -> Result<&DeviceState, SnapshotError> {
        let found = self.devices.iter().find(|d| d.model == model && d.id == id);
        found.ok_or_else(|| SnapshotError::Inconsistent(format!("it has no state of {model} {id}")))
    }
}
