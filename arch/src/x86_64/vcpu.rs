//! Giving a vCPU its identity and its first registers.
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::kernel::Entry;
use super::{cpuid, regs};

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Enabled, write-back: what firmware leaves behind, without which Linux disables caching.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTINT: u32 = 7 << 8;

/// How many vCPUs, and which of them share a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    pub(crate) vcpus: u8,
    pub(crate) threads_per_core: u8,
}

impl Topology {
    /// `vcpus` of them (1-32), two to a core with `is_smt`.
    pub fn new(vcpus: u8, is_smt: bool) -> Self {
        Self { vcpus: vcpus.max(1), threads_per_core: if is_smt && vcpus > 1 { 2 } else { 1 } }
    }

    /// The APIC id of each vCPU: its index.
    pub fn apic_ids(&self) -> Vec<u8> {
        (0..self.vcpus).collect()
    }

    /// Bits of an APIC id that tell the threads of a core apart.
    pub(crate) fn thread_bits(self) -> u32 {
        self.threads_per_core.next_power_of_two().trailing_zeros()
    }

    /// Bits of an APIC id that tell the vCPUs apart.
    pub(crate) fn apic_id_bits(self) -> u32 {
        self.vcpus_rounded().trailing_zeros()
    }

    pub(crate) fn vcpus_rounded(self) -> u8 {
        self.vcpus.next_power_of_two()
    }

    pub(crate) fn cores_rounded(self) -> u8 {
        (self.vcpus / self.threads_per_core).max(1).next_power_of_two()
    }
}

/// A vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// KVM refused a call.
    #[error("{what}: {source}")]
    Kvm {
        /// The call.
        what: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// More CPUID leaves than KVM takes.
    #[error("the host has more CPUID leaves than KVM takes")]
    TooManyLeaves,
    /// KVM took only some of the MSRs.
    #[error("KVM refused MSR {0:#x}")]
    Msr(u32),
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> SetupError {
    move |source| SetupError::Kvm { what, source }
}

/// What the host's KVM offers to vCPUs: asked once, used for each.
#[derive(Clone, Debug)]
pub struct HostCpu {
    supported: CpuId,
    has_tsc_deadline: bool,
}

impl HostCpu {
    /// Asks KVM.
    pub fn new(kvm_fd: &Kvm) -> Result<Self, SetupError> {
        let supported = kvm_fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
        let has_tsc_deadline = kvm_fd.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { supported, has_tsc_deadline })
    }

    /// Sets up the vCPU with `apic_id`. The boot processor gets `entry`; the others wait for it.
    pub fn configure(
        &self,
        vcpu: &VcpuFd,
        apic_id: u8,
        topology: Topology,
        entry: Option<&Entry>,
    ) -> Result<(), SetupError> {
        let mut cpuid = self.supported.clone();
        cpuid::adapt(&mut cpuid, topology, apic_id, self.has_tsc_deadline)?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
        set_msrs(vcpu)?;
        let mut lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
        set_local_vector(&mut lapic, APIC_LVT0, DELIVER_EXTINT);
        set_local_vector(&mut lapic, APIC_LVT1, DELIVER_NMI);
        vcpu.set_lapic(&lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        if let Some(entry) = entry {
            let mut sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
            regs::enter(&mut sregs, entry.protocol);
            vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
            vcpu.set_regs(&regs::regs(entry)).map_err(kvm("KVM_SET_REGS"))?;
        }
        Ok(())
    }
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), SetupError> {
    let entries = [
        kvm_msr_entry {
            index: MSR_MISC_ENABLE,
            data: MISC_ENABLE_FAST_STRING,
            ..kvm_msr_entry::default()
        },
        kvm_msr_entry {
            index: MSR_MTRR_DEF_TYPE,
            data: MTRR_WRITE_BACK,
            ..kvm_msr_entry::default()
        },
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| SetupError::Msr(0))?;
    let set = vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))?;
    match entries.get(set) {
        Some(refused) => Err(SetupError::Msr(refused.index)),
        None => Ok(()),
    }
}

/// Sets the delivery mode of a local vector, unmasked.
fn set_local_vector(lapic: &mut kvm_lapic_state, register: usize, delivery: u32) {
    for (to, from) in lapic.regs[register..register + 4].iter_mut().zip(delivery.to_le_bytes()) {
        *to = from.cast_signed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topology_counts_threads_cores_and_bits() {
        let t = Topology::new(6, true);
        assert_eq!((t.threads_per_core, t.thread_bits(), t.apic_id_bits()), (2, 1, 3));
        assert_eq!(t.cores_rounded(), 4);
        let t = Topology::new(1, true);
        assert_eq!((t.threads_per_core, t.thread_bits(), t.apic_id_bits()), (1, 0, 0));
        assert_eq!(Topology::new(32, false).apic_id_bits(), 5);
    }
}
