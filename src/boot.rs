//! How long each phase of a start takes, from husk's first instruction to the guest's.
use std::time::Instant;

use schemars::JsonSchema;
use serde::Serialize;

/// Microseconds of each phase of the last start, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BootPhases {
    /// From husk's start (or that of the library's VM) until the guest was to start; after a reboot,
    /// until the guest reset itself.
    pub configured_us: u64,
    /// Of a restore, reading the snapshot's state and checking it.
    pub image_us: u64,
    /// Opening kernel, disks, taps, `/dev/kvm`; of a reboot, taking the machine apart.
    pub opened_us: u64,
    /// Making KVM's VM.
    pub vm_us: u64,
    /// Mapping RAM and telling KVM of it.
    pub memory_us: u64,
    /// Making the interrupt controllers and, of a boot, loading the kernel.
    pub kernel_us: u64,
    /// Putting devices in their places.
    pub devices_us: u64,
    /// Making the vCPUs and their threads; of a boot, writing tables and initrd, of a restore, giving
    /// KVM the state.
    pub vcpus_us: u64,
    /// Letting devices and vCPUs run.
    pub running_us: u64,
}

impl BootPhases {
    /// The start itself: all phases but the first.
    pub(crate) fn total_us(&self) -> u64 {
        self.named()[1..].iter().map(|(_, us)| us).sum()
    }

    /// The phases with their names: all but the first are the start itself.
    pub(crate) fn named(&self) -> [(&'static str, u64); 9] {
        [
            ("configured", self.configured_us),
            ("image", self.image_us),
            ("opened", self.opened_us),
            ("vm", self.vm_us),
            ("memory", self.memory_us),
            ("kernel", self.kernel_us),
            ("devices", self.devices_us),
            ("vcpus", self.vcpus_us),
            ("running", self.running_us),
        ]
    }
}

impl std::fmt::Display for BootPhases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [(_, configured), start @ ..] = self.named();
        let total = self.total_us();
        write!(f, "started in {total} us, {configured} us after husk:")?;
        start.iter().try_for_each(|(name, us)| write!(f, " {name} {us}"))
    }
}

/// Measures one start.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    started: Instant,
    last: Instant,
    pub(crate) phases: BootPhases,
}

impl Stopwatch {
    /// A start that begins now, of a husk that `started` then.
    pub(crate) fn start(started: Instant) -> Self {
        let mut watch = Self { started, last: started, phases: BootPhases::default() };
        watch.phases.configured_us = watch.lap();
        watch
    }

    /// Microseconds since the last lap.
    pub(crate) fn lap(&mut self) -> u64 {
        let before = std::mem::replace(&mut self.last, Instant::now());
        micros(self.last.saturating_duration_since(before))
    }

    /// Microseconds since husk started.
    pub(crate) fn since_start(&self) -> u64 {
        micros(self.started.elapsed())
    }
}

fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
