//! CPUID: what KVM supports here, made true for one vCPU of one VM (Intel SDM vol. 2, CPUID; AMD
//! APM vol. 3, appendix E).
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::vcpu::{SetupError, Topology};

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const ECX_PDCM: u32 = 1 << 15;
/// Nested virtualization: more of the host's kernel within a guest's reach than it needs.
const ECX_VMX: u32 = 1 << 5;
/// Leaf 0x8000_0001, AMD: the same.
const ECX_SVM: u32 = 1 << 2;
/// Leaf 0x8000_0001, AMD: performance counters of the core, the northbridge and the cache.
const ECX_PERFCTR: u32 = 1 << 23 | 1 << 24 | 1 << 28;
const EDX_HTT: u32 = 1 << 28;
/// Leaf 6: the APIC timer always runs; the only thermal or power bit a guest may rely on.
const EAX_ARAT: u32 = 1 << 2;
/// Leaf 0x8000_0001, AMD: cores are counted by 0x8000_0008.
const ECX_CMP_LEGACY: u32 = 1 << 1;
/// "AuthenticAMD", as EBX, EDX and ECX have it.
pub(crate) const AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];
/// "GenuineIntel".
pub(crate) const INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];

/// Makes `cpuid`, as KVM supports it, true for the vCPU with `apic_id`.
pub(crate) fn adapt(
    cpuid: &mut CpuId,
    topology: Topology,
    apic_id: u8,
    has_tsc_deadline: bool,
) -> Result<(), SetupError> {
    let is_amd = vendor(cpuid.as_slice()) == Some(AMD);
    // The vCPU's place is told by leaf 0xb, made below; 0x1f would tell of the host's dies.
    cpuid.retain(|e| e.function != 0xb && e.function != 0x1f);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => leaf_1(entry, topology, apic_id, has_tsc_deadline),
            0x4 => {
                let cores = u32::from(topology.cores_rounded()) - 1;
                entry.eax = entry.eax & 0x03ff_ffff | cores << 26;
                share_cache(entry, topology);
            }
            0x6 => *entry = kvm_cpuid_entry2 { eax: EAX_ARAT, ebx: 0, ecx: 0, edx: 0, ..*entry },
            // No performance monitoring: counters would be shared with the host. And no SVM.
            0xa | 0x8000_000a | 0x8000_0022 => {
                *entry = kvm_cpuid_entry2 { eax: 0, ebx: 0, ecx: 0, edx: 0, ..*entry }
            }
            0x8000_0001 if is_amd => {
                entry.ecx &= !(ECX_SVM | ECX_PERFCTR | ECX_CMP_LEGACY);
                if topology.vcpus > 1 {
                    entry.ecx |= ECX_CMP_LEGACY;
                }
            }
            0x8000_0008 if is_amd => {
                entry.ecx = (u32::from(topology.vcpus) - 1) | (topology.apic_id_bits() << 12);
            }
            0x8000_001d if is_amd => share_cache(entry, topology),
            0x8000_001e if is_amd => {
                entry.eax = apic_id.into();
                entry.ebx = u32::from(apic_id >> topology.thread_bits())
                    | (u32::from(topology.threads_per_core) - 1) << 8;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    leaf_b(cpuid, topology, apic_id)
}

/// Bits of a physical address; 36 where nothing is said (Intel SDM, CPUID 80000008H).
pub(crate) fn address_bits(cpuid: &CpuId) -> u32 {
    let leaf = leaf(cpuid, 0x8000_0008);
    leaf.map(|leaf| leaf.eax & 0xff).filter(|bits| (32..=52).contains(bits)).unwrap_or(36)
}

/// Who made the processor: [`AMD`] or [`INTEL`].
pub(crate) fn vendor(cpuid: &[kvm_cpuid_entry2]) -> Option<[u32; 3]> {
    let leaf = cpuid.iter().find(|e| e.function == 0)?;
    Some([leaf.ebx, leaf.edx, leaf.ecx])
}

/// The first entry of a leaf.
pub(crate) fn leaf(cpuid: &CpuId, function: u32) -> Option<&kvm_cpuid_entry2> {
    cpuid.as_slice().iter().find(|e| e.function == function)
}

fn leaf_1(entry: &mut kvm_cpuid_entry2, topology: Topology, apic_id: u8, has_deadline: bool) {
    let vcpus = u32::from(topology.vcpus);
    entry.ebx = entry.ebx & 0x0000_ffff | vcpus << 16 | u32::from(apic_id) << 24;
    entry.ecx |= ECX_HYPERVISOR;
    entry.ecx &= !(ECX_PDCM | ECX_VMX | ECX_TSC_DEADLINE);
    if has_deadline {
        entry.ecx |= ECX_TSC_DEADLINE;
    }
    entry.edx &= !EDX_HTT;
    if vcpus > 1 {
        entry.edx |= EDX_HTT;
    }
}

/// Levels 1 and 2 belong to a core, level 3 to the package.
fn share_cache(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    let level = entry.eax >> 5 & 7;
    let sharing = if level < 3 { topology.threads_per_core } else { topology.vcpus_rounded() };
    entry.eax = entry.eax & !(0xfff << 14) | (u32::from(sharing) - 1) << 14;
}

/// Extended topology: threads in a core, then cores in the package.
fn leaf_b(cpuid: &mut CpuId, topology: Topology, apic_id: u8) -> Result<(), SetupError> {
    let threads = u32::from(topology.threads_per_core);
    for (index, eax, ebx, kind) in [
        (0, topology.thread_bits(), threads, 1),
        (1, topology.apic_id_bits(), u32::from(topology.vcpus), 2),
        (2, 0, 0, 0),
    ] {
        cpuid
            .push(kvm_cpuid_entry2 {
                function: 0xb,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx: kind << 8 | index,
                edx: apic_id.into(),
                ..kvm_cpuid_entry2::default()
            })
            .map_err(|_| SetupError::TooManyLeaves)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> CpuId {
        let leaf = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        };
        CpuId::from_entries(&[
            leaf(0, 0, 0x1f, AMD[0], AMD[2], AMD[1]),
            leaf(1, 0, 0, 0xff10_0800, ECX_PDCM | ECX_VMX | 1, EDX_HTT),
            leaf(4, 0, 1 << 5 | 0xffff_c000, 0, 0, 0),
            leaf(4, 3, 3 << 5 | 0xffff_c000, 0, 0, 0),
            leaf(0xb, 0, 9, 9, 9, 9),
            leaf(0x1f, 0, 9, 9, 9, 9),
            leaf(0xa, 0, 7, 7, 7, 7),
            leaf(0x8000_0001, 0, 0, 0, ECX_SVM | ECX_PERFCTR | 1, 0),
            leaf(0x8000_0008, 0, 0, 0, 0xffff, 0),
            leaf(0x8000_000a, 0, 1, 8, 0, 0xff),
        ])
        .unwrap()
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn a_vcpu_is_told_its_own_place() {
        let topology = Topology::new(6, true);
        let mut cpuid = host();
        adapt(&mut cpuid, topology, 5, true).unwrap();
        let one = find(&cpuid, 1, 0);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (5, 6));
        assert_eq!(one.ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE | 1);
        assert_ne!(one.edx & EDX_HTT, 0);
        let (threads, cores) = (find(&cpuid, 0xb, 0), find(&cpuid, 0xb, 1));
        assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (1, 2, 0x100, 5));
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 5));
        assert_eq!(find(&cpuid, 4, 0).eax >> 14 & 0xfff, 1);
        assert_eq!(find(&cpuid, 4, 3).eax >> 14 & 0xfff, 7);
        assert_eq!(find(&cpuid, 4, 3).eax >> 26, 3);
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 3 << 12 | 5);
    }

    #[test]
    fn addresses_have_as_many_bits_as_the_processor_says() {
        let mut cpuid = host();
        assert_eq!(address_bits(&cpuid), 36);
        let leaf = cpuid.as_mut_slice().iter_mut().find(|e| e.function == 0x8000_0008);
        leaf.unwrap().eax = 0x3030;
        assert_eq!(address_bits(&cpuid), 48);
    }

    #[test]
    fn the_host_does_not_show() {
        let mut cpuid = host();
        adapt(&mut cpuid, Topology::new(1, false), 0, false).unwrap();
        assert!(cpuid.as_slice().iter().all(|e| e.function != 0x1f));
        assert_eq!(find(&cpuid, 0xa, 0).eax, 0);
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx, 1);
        assert_eq!(find(&cpuid, 0x8000_000a, 0).ebx, 0);
        let one = find(&cpuid, 1, 0);
        assert_eq!((one.ecx & ECX_TSC_DEADLINE, one.edx & EDX_HTT), (0, 0));
        assert_eq!(find(&cpuid, 0xb, 0).eax, 0);
    }
}
