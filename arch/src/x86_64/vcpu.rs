//! Giving a vCPU its identity and its first registers.
use std::ffi::c_ulong;
use std::time::Duration;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::cpu_config::{Capability, CpuConfig, CpuError, MsrModifier};
use super::kernel::Entry;
use super::state::{StateError, VcpuState};
use super::template::CpuChoice;
use super::{cpuid, regs, state};
use crate::kvm::{again, extension};

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
    /// KVM does not say whether it can do something.
    #[error("KVM_CHECK_EXTENSION of {name}: {source}")]
    Unanswered {
        /// What it was asked for.
        name: String,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// KVM cannot do what husk is built on.
    #[error("KVM lacks {0}")]
    Lacks(&'static str),
    /// The CPU that was asked for cannot be had here.
    #[error("{0}")]
    Cpu(#[from] CpuError),
    /// What a vCPU had cannot be had here.
    #[error("{0}")]
    State(#[from] StateError),
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> SetupError {
    move |source| SetupError::Kvm { what, source }
}

fn unanswered(name: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> SetupError {
    move |source| SetupError::Unanswered { name: name.into(), source }
}

/// What KVM must be able to do, unless the user waives it.
const CAPABILITIES: [(Cap, &str); 6] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
];

/// What the host's KVM offers to vCPUs, as the user wants it changed: asked once, used for each.
#[derive(Clone, Debug)]
pub struct HostCpu {
    cpuid: CpuId,
    /// Whether the user had a say in it.
    is_cpuid_changed: bool,
    msrs: Vec<MsrModifier>,
    has_tsc_deadline: bool,
}

impl HostCpu {
    /// Asks KVM, and judges `choice` by what it says.
    pub fn new(kvm_fd: &Kvm, choice: CpuChoice<'_>) -> Result<Self, SetupError> {
        let supported = again(|| kvm_fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))
            .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
        let config = choice.resolve(&supported)?;
        let has = |cap| extension(|| kvm_fd.check_extension_raw(cap)).map(|found| found > 0);
        check_capabilities(&config.kvm_capabilities, has)?;
        let name = "KVM_CAP_TSC_DEADLINE_TIMER";
        let has_tsc_deadline = has(Cap::TscDeadlineTimer as c_ulong).map_err(unanswered(name))?;
        Ok(Self::of(supported, &config, has_tsc_deadline)?)
    }

    /// What is `supported`, changed. What tells a vCPU its own place, and what husk itself hides, is
    /// written over that, as in Firecracker.
    fn of(
        mut supported: CpuId,
        config: &CpuConfig,
        has_tsc_deadline: bool,
    ) -> Result<Self, CpuError> {
        config.apply_to(&mut supported)?;
        Ok(Self {
            cpuid: supported,
            is_cpuid_changed: !config.cpuid_modifiers.is_empty(),
            msrs: config.msr_modifiers.clone(),
            has_tsc_deadline,
        })
    }

    fn cpuid_for(&self, apic_id: u8, topology: Topology) -> Result<CpuId, SetupError> {
        let mut cpuid = self.cpuid.clone();
        cpuid::adapt(&mut cpuid, topology, apic_id, self.has_tsc_deadline)?;
        Ok(cpuid)
    }

    /// The MSRs that are part of a vCPU's state ([`super::state::VcpuState::read`]).
    pub fn msr_indices(kvm_fd: &Kvm) -> Result<Vec<u32>, StateError> {
        state::msr_indices(kvm_fd)
    }

    /// Bits of a guest-physical address.
    pub fn address_bits(&self) -> u32 {
        cpuid::address_bits(&self.cpuid)
    }

    /// Sets up the vCPU with `apic_id`. The boot processor gets `entry`; the others wait for it.
    pub fn configure(
        &self,
        vcpu: &VcpuFd,
        apic_id: u8,
        topology: Topology,
        entry: Option<&Entry>,
    ) -> Result<(), SetupError> {
        let cpuid = self.cpuid_for(apic_id, topology)?;
        again(|| vcpu.set_cpuid2(&cpuid)).map_err(|e| match self.is_cpuid_changed {
            true => CpuError::CpuidRefused(e).into(),
            false => kvm("KVM_SET_CPUID2")(e),
        })?;
        self.write_msrs(vcpu)?;
        let mut lapic = again(|| vcpu.get_lapic()).map_err(kvm("KVM_GET_LAPIC"))?;
        set_local_vector(&mut lapic, APIC_LVT0, DELIVER_EXTINT);
        set_local_vector(&mut lapic, APIC_LVT1, DELIVER_NMI);
        again(|| vcpu.set_lapic(&lapic)).map_err(kvm("KVM_SET_LAPIC"))?;
        if let Some(entry) = entry {
            let mut sregs = again(|| vcpu.get_sregs()).map_err(kvm("KVM_GET_SREGS"))?;
            regs::enter(&mut sregs, entry.protocol);
            again(|| vcpu.set_sregs(&sregs)).map_err(kvm("KVM_SET_SREGS"))?;
            again(|| vcpu.set_regs(&regs::regs(entry))).map_err(kvm("KVM_SET_REGS"))?;
        }
        Ok(())
    }

    /// Has the vCPU with `apic_id`, which has not run, go on where another stood, for whose guest time
    /// has `passed`.
    pub fn restore(
        &self,
        vm: &VmFd,
        vcpu: &VcpuFd,
        apic_id: u8,
        topology: Topology,
        saved: &VcpuState,
        passed: Duration,
    ) -> Result<(), SetupError> {
        let here = self.cpuid_for(apic_id, topology)?;
        if saved.check(&here).is_err() {
            // KVM may give a vCPU more than it says it supports.
            again(|| vcpu.set_cpuid2(&here)).map_err(kvm("KVM_SET_CPUID2"))?;
            let here =
                again(|| vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)).map_err(kvm("KVM_GET_CPUID2"))?;
            saved.check(&here)?;
        }
        // Some of them may not be part of what is saved.
        self.write_msrs(vcpu)?;
        Ok(saved.write(vm, vcpu, passed)?)
    }

    fn write_msrs(&self, vcpu: &VcpuFd) -> Result<(), SetupError> {
        set_msrs(vcpu)?;
        self.msrs.iter().try_for_each(|modifier| change_msr(vcpu, modifier))
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
    let set = again(|| vcpu.set_msrs(&msrs)).map_err(kvm("KVM_SET_MSRS"))?;
    match entries.get(set) {
        Some(refused) => Err(SetupError::Msr(refused.index)),
        None => Ok(()),
    }
}

/// Finds what is missing of what husk needs and of what the user asks for.
fn check_capabilities(
    asked: &[Capability],
    has: impl Fn(c_ulong) -> Result<bool, kvm_ioctls::Error>,
) -> Result<(), SetupError> {
    for (cap, name) in CAPABILITIES {
        let is_waived = asked.iter().any(|asked| match asked {
            Capability::Waived(number) => *number == cap as u32,
            Capability::Needed(_) => false,
        });
        if !is_waived && !has(cap as c_ulong).map_err(unanswered(name))? {
            return Err(SetupError::Lacks(name));
        }
    }
    for capability in asked {
        if let Capability::Needed(number) = capability
            && !has((*number).into()).map_err(unanswered(number.to_string()))?
        {
            return Err(CpuError::NoCapability(*number).into());
        }
    }
    Ok(())
}

/// Changes one MSR from what KVM, or husk, has given it.
fn change_msr(vcpu: &VcpuFd, modifier: &MsrModifier) -> Result<(), SetupError> {
    let index = modifier.addr.0;
    let single = |data| {
        Msrs::from_entries(&[kvm_msr_entry { index, data, ..kvm_msr_entry::default() }])
            .map_err(|_| SetupError::Msr(index))
    };
    let mut msr = single(0)?;
    if again(|| vcpu.get_msrs(&mut msr)).map_err(kvm("KVM_GET_MSRS"))? == 0 {
        return Err(CpuError::NoMsr(index).into());
    }
    let before = msr.as_slice().first().map_or(0, |entry| entry.data);
    let after = modifier.bitmap.apply_to(before);
    let changed = single(after)?;
    if again(|| vcpu.set_msrs(&changed)).map_err(kvm("KVM_SET_MSRS"))? == 0 {
        return Err(CpuError::MsrRefused { index, before, after }.into());
    }
    Ok(())
}

/// Sets the delivery mode of a local vector, unmasked.
fn set_local_vector(lapic: &mut kvm_lapic_state, register: usize, delivery: u32) {
    for (to, from) in lapic.regs[register..register + 4].iter_mut().zip(delivery.to_le_bytes()) {
        *to = from.cast_signed();
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn capabilities_are_asked_for_unless_waived() {
        let lacking = |asked: &[Capability], missing: c_ulong| {
            check_capabilities(asked, |cap| Ok(cap != missing)).map_err(|e| e.to_string())
        };
        let irqfd = Cap::Irqfd as u32;
        assert_eq!(lacking(&[], 999), Ok(()));
        assert_eq!(lacking(&[], irqfd.into()), Err("KVM lacks KVM_CAP_IRQFD".into()));
        assert_eq!(lacking(&[Capability::Waived(irqfd)], irqfd.into()), Ok(()));
        let asked = [Capability::Needed(1), Capability::Needed(171)];
        assert_eq!(lacking(&asked, 999), Ok(()));
        assert_eq!(lacking(&asked, 171), Err("Missing KVM capabilities: 171".into()));
    }

    #[test]
    fn a_capability_of_which_kvm_does_not_answer_is_not_taken_for_lacking() {
        let silent = |_| Err(kvm_ioctls::Error::new(libc::ENOMEM));
        let e = check_capabilities(&[], silent).unwrap_err();
        assert!(matches!(&e, SetupError::Unanswered { name, .. } if name == "KVM_CAP_IRQCHIP"));
        assert!(e.to_string().contains("Cannot allocate memory"), "{e}");
    }

    #[test]
    fn a_vcpu_gets_what_was_chosen_and_its_own_place() {
        let leaf = |function, flags| kvm_cpuid_entry2 {
            function,
            flags,
            ebx: 0xff,
            ..kvm_cpuid_entry2::default()
        };
        let supported = CpuId::from_entries(&[leaf(1, 0), leaf(7, 1)]).unwrap();
        let json = r#"{"cpuid_modifiers": [
            {"leaf": "0x7", "subleaf": "0x0", "flags": 1, "modifiers": [
                {"register": "ebx", "bitmap": "0b0xxxx0xx"}, {"register": "edx", "bitmap": "0b1"}]},
            {"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [
                {"register": "ebx", "bitmap": "0b1010_1010_xxxx_xxxx_xxxx_xxxx_0000_0000"}]}]}"#;
        let config: CpuConfig = serde_json::from_str(json).unwrap();
        let host = HostCpu::of(supported, &config, true).unwrap();
        let cpuid = host.cpuid_for(3, Topology::new(4, false)).unwrap();
        let ebx = |function| cpuid::leaf(&cpuid, function).unwrap().ebx;
        assert_eq!(ebx(7), 0x7b);
        assert_eq!(cpuid::leaf(&cpuid, 7).unwrap().edx, 1);
        assert_eq!(ebx(1), 0x0304_0000);
    }

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
