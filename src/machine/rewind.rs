//! Back to a snapshot, in place: no VM is made, nothing is opened, and only what has changed since is
//! put back.
use std::collections::BTreeSet;

use arch::{Clock, again};
use devices::virtio::model::Left;
use serde_json::Value;

use super::{Machine, Name, Rest, lock};
use crate::config::VmConfig;
use crate::error::Refusal;
use crate::memory::{self, RewindTools};
use crate::outcome::Outcome;
use crate::snapshot::{Image, Noted, SnapshotError};

impl Machine {
    /// Refuses an image that is not of this machine. Changes nothing that a guest could see.
    pub(crate) fn check_rewind(&self, config: &VmConfig, image: &Image) -> Result<(), Refusal> {
        let document = &image.document;
        let saved = &document.machine;
        let differs = |what: &str, was: &dyn std::fmt::Display, is: &dyn std::fmt::Display| {
            let why = format!("{what}: {was} in the snapshot, {is} in the microVM");
            Err(Refusal::from(SnapshotError::NotOfThisVm(why)))
        };
        image.check_memory(&self.ram).map_err(|e| SnapshotError::NotOfThisVm(e.to_string()))?;
        if let Some(why) = self.ram.cannot_rewind(config.sharing()) {
            return Err(SnapshotError::NotOfThisVm(why.into()).into());
        }
        let count = config.machine.vcpu_count;
        if saved.vcpus.len() != usize::from(count) {
            return differs("vCPUs", &saved.vcpus.len(), &count);
        }
        let was: BTreeSet<_> =
            saved.devices.iter().map(|d| (d.model.as_str(), d.id.as_str(), d.place)).collect();
        let is: BTreeSet<_> =
            self.devices.iter().map(|d| (d.model, d.id.as_str(), d.index)).collect();
        if let Some((model, id, _)) = was.symmetric_difference(&is).next() {
            let why = match was.iter().any(|d| (d.0, d.1) == (*model, *id)) {
                true if is.iter().any(|d| (d.0, d.1) == (*model, *id)) => "is in another place now",
                true => "is not in the microVM any more",
                false => "is not in the snapshot",
            };
            return Err(SnapshotError::NotOfThisVm(format!("{model} {id} {why}")).into());
        }
        for device in &self.devices {
            let name = Name { model: device.model, id: &device.id };
            let state = &saved.device(device.model, &device.id)?.state;
            lock(&device.transport).check(state).map_err(|e| name.refused(e))?;
        }
        Ok(())
    }

    /// Puts a machine that is paused back to `image`, which [`Self::check_rewind`] has let pass. The
    /// bytes of memory that had been written. If this fails, the machine is of no more use.
    pub(crate) fn rewind(
        &mut self,
        config: &VmConfig,
        image: &Image,
        clock: Clock,
        tools: &RewindTools,
    ) -> Result<u64, Refusal> {
        let saved = &image.document.machine;
        // First, because it can be refused without harm: the vCPUs are of another kind.
        self.vcpus
            .each(|n, vcpu| saved.vcpus.get(n).map_or(Ok(()), |state| state.write_cpuid(vcpu)))
            .map_err(SnapshotError::State)?;
        let Rest(parts) = &self.rest;
        let failed = Refusal::host("guest memory");
        let written = self.ram.rewind(&image.memory, tools).map_err(failed)?;
        self.ram.begin_tracking(image.parent.clone());
        memory::forget_page_tables(&parts.kvm, &self.vm, &self.ram)
            .map_err(Refusal::host("the guest's page tables"))?;
        let passed = saved.vm.passed(clock);
        self.vcpus
            .each(|n, vcpu| {
                let Some(state) = saved.vcpus.get(n) else { return Ok(()) };
                if n == 0 {
                    state.forget_tsc(vcpu)?;
                }
                state.write(&self.vm, vcpu, passed)?;
                // As in a restore.
                let _ = again(|| vcpu.kvmclock_ctrl());
                Ok(())
            })
            .map_err(SnapshotError::State)?;
        saved.vm.write(&self.vm, passed).map_err(SnapshotError::State)?;
        self.legacy.restore(&saved.legacy);
        self.identity.go_back(saved.identity);
        self.identity.renew(&self.ram.guest, &self.legacy.acpi, config.payload.as_ref())?;
        self.vcpus.begin_with(saved.identity.first);
        let serial = lock(&parts.serial).set_state(saved.legacy.serial.clone());
        serial.map_err(|e| SnapshotError::Inconsistent(e.to_string()))?;
        for device in &self.devices {
            let name = Name { model: device.model, id: &device.id };
            let state = &saved.device(device.model, &device.id)?.state;
            let mut transport = lock(&device.transport);
            if transport.rewind(state).map_err(|e| name.refused(e))? == Left::File {
                log::warn!(
                    "{} {}: its file stays as it is, with what the guest wrote since the snapshot",
                    name.model,
                    name.id
                );
            }
            // What the user has changed since stays, and is news to this driver.
            if is_changed(config, &image.document.config, name) {
                transport.tell_config_change();
            }
        }
        // What was plugged then is plugged again.
        self.ram.fill().map_err(Refusal::host("guest memory"))?;
        Ok(written)
    }

    /// Begins to take the pages that the guest was seen to touch first after another restore of `image`.
    pub(crate) fn prefault(&mut self, noted: Noted) {
        self.ram.prefault(move || noted.read());
    }

    /// How the run ended, if it has: then nothing brings the vCPUs back.
    pub(crate) fn ended(&self) -> Option<&crate::Ending> {
        Outcome::get(&self.outcome)
    }
}

/// Whether a device is not configured as it was.
fn is_changed(config: &VmConfig, saved: &Value, Name { model, id }: Name<'_>) -> bool {
    let now = config.devices().find(|recipe| recipe.model() == model && recipe.id() == id);
    let now = now.map(|recipe| recipe.to_json());
    let was = match &saved[model] {
        Value::Array(all) => all.iter().find(|was| Some(*was) == now.as_ref()),
        one => Some(one),
    };
    was != now.as_ref()
}
