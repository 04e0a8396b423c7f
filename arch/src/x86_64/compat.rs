//! Whether a guest that was given one processor can go on with another: it keeps using what it has found there.
//!
//! Only what a guest may use counts. What tells a vCPU its place, sizes of caches and the like may differ, as the guest
//! gets what it had; and so may bits that follow from its own registers. What a vCPU here has is asked of one that was
//! made here, because KVM may give it more than it says it supports.
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::cpuid::vendor;
use super::state::StateError;

/// One register of one leaf whose bits are features each.
struct Features {
    leaf: u32,
    subleaf: u32,
    register: Register,
    /// Bits that say something else.
    ignored: u32,
    /// From bit 0 on; "-" has no name, nor have bits behind the last.
    names: &'static str,
}

#[derive(Clone, Copy, Debug)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

const fn features(
    leaf: u32,
    subleaf: u32,
    register: Register,
    ignored: u32,
    names: &'static str,
) -> Features {
    Features { leaf, subleaf, register, ignored, names }
}

/// MONITOR (follows MISC_ENABLE) and OSXSAVE (follows CR4).
const OF_1_ECX: u32 = 1 << 3 | 1 << 27;
/// APIC (follows APIC_BASE) and HTT (says how many there are).
const OF_1_EDX: u32 = 1 << 9 | 1 << 28;
/// OSPKE (follows CR4).
const OF_7_ECX: u32 = 1 << 4;
/// CMP_LEGACY (says how many there are).
const OF_8000_0001_ECX: u32 = 1 << 1;
/// FDP_EXCPTN_ONLY and ZERO_FCS_FDS: what the processor no longer does.
const OF_7_EBX: u32 = 1 << 6 | 1 << 13;

/// Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst.
const FEATURES: &[Features] = &[
    features(
        0x1,
        0,
        Register::Ecx,
        OF_1_ECX,
        "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cnxt_id sdbg fma cx16 xtpr pdcm - pcid dca \
         sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    features(
        0x1,
        0,
        Register::Edx,
        OF_1_EDX,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 psn clflush - ds acpi mmx fxsr \
         sse sse2 ss htt tm - pbe",
    ),
    features(0x6, 0, Register::Eax, 0, "dtherm ida arat"),
    features(
        0x7,
        0,
        Register::Ebx,
        OF_7_EBX,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq \
         rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    features(
        0x7,
        0,
        Register::Ecx,
        OF_7_ECX,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
         avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b \
         enqcmd",
    ),
    features(
        0x7,
        0,
        Register::Edx,
        0,
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect - md_clear - - - serialize - tsxldtrk \
         - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl stibp flush_l1d \
         arch_capabilities core_capabilities ssbd",
    ),
    features(
        0x7,
        1,
        Register::Eax,
        0,
        "- - - - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - amx_fp16 hreset \
         avx_ifma - - lam",
    ),
    features(0x7, 1, Register::Edx, 0, "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex"),
    features(0x7, 2, Register::Edx, 0, "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    features(
        0xd,
        0,
        Register::Eax,
        0,
        "x87_state sse_state avx_state bndregs_state bndcsr_state opmask_state zmm_hi256_state hi16_zmm_state \
         pt_state pkru_state - cet_u_state cet_s_state - - - - amx_tilecfg_state amx_tiledata_state",
    ),
    features(0xd, 0, Register::Edx, 0, ""),
    features(0xd, 1, Register::Eax, 0, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    features(0xd, 1, Register::Ecx, 0, ""),
    features(
        0x4000_0001,
        0,
        Register::Eax,
        0,
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi \
         kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield \
         kvm_async_pf_int kvm_msi_ext_dest_id",
    ),
    features(
        0x8000_0001,
        0,
        Register::Ecx,
        OF_8000_0001_ECX,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - \
         lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    features(
        0x8000_0001,
        0,
        Register::Edx,
        OF_1_EDX,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr \
         fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    features(0x8000_0007, 0, Register::Edx, 0, "- - - - - - - - constant_tsc"),
    features(
        0x8000_0008,
        0,
        Register::Ebx,
        0,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - amd_stibp_always_on \
         - - - - - - amd_ssbd virt_ssbd amd_ssb_no - amd_psfd",
    ),
    features(
        0x8000_0021,
        0,
        Register::Eax,
        0,
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr",
    ),
];

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }
}

impl Features {
    fn of(&self, cpuid: &[kvm_cpuid_entry2]) -> u32 {
        let entry = cpuid.iter().find(|e| (e.function, e.index) == (self.leaf, self.subleaf));
        entry.map_or(0, |entry| self.register.of(entry)) & !self.ignored
    }

    /// What a bit is called, and where it is.
    fn describe(&self, bit: u32) -> String {
        let name = self.names.split_whitespace().nth(bit as usize).filter(|name| *name != "-");
        let subleaf = if self.subleaf == 0 { String::new() } else { format!(".{}", self.subleaf) };
        let register = format!("{:?}", self.register).to_uppercase();
        let place = format!("leaf {:#x}{subleaf} {register} bit {bit}", self.leaf);
        name.map_or(place.clone(), |name| format!("{name} ({place})"))
    }
}

/// Refuses a guest that has been given `saved`, if it lacks something on a host that gives `here`.
pub(super) fn check(saved: &[kvm_cpuid_entry2], here: &CpuId) -> Result<(), StateError> {
    let maker = |cpuid: &[kvm_cpuid_entry2]| {
        let bytes = vendor(cpuid).unwrap_or_default().map(u32::to_le_bytes);
        String::from_utf8_lossy(bytes.as_flattened()).into_owned()
    };
    let (was, is) = (maker(saved), maker(here.as_slice()));
    if was != is {
        return Err(StateError::Vendor { was, is });
    }
    for features in FEATURES {
        let missing = features.of(saved) & !features.of(here.as_slice());
        if missing != 0 {
            return Err(StateError::Feature(features.describe(missing.trailing_zeros())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::cpuid::{AMD, INTEL};
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
    }

    fn made_by([ebx, edx, ecx]: [u32; 3], more: &[kvm_cpuid_entry2]) -> CpuId {
        let all = [&[leaf(0, 0, [0xd, ebx, ecx, edx])], more].concat();
        CpuId::from_entries(&all).unwrap()
    }

    fn refusal(saved: &CpuId, here: &CpuId) -> Option<String> {
        check(saved.as_slice(), here).err().map(|e| e.to_string())
    }

    #[test]
    fn a_feature_that_is_missing_is_named() {
        for (function, index, registers, what) in [
            (7, 0, [0, 1 << 16, 0, 0], "avx512f (leaf 0x7 EBX bit 16)"),
            (1, 0, [0, 0, 1 << 28, 0], "avx (leaf 0x1 ECX bit 28)"),
            (1, 0, [0, 0, 1 << 31, 0], "hypervisor (leaf 0x1 ECX bit 31)"),
            (1, 0, [0, 0, 0, 1 << 26], "sse2 (leaf 0x1 EDX bit 26)"),
            (7, 0, [0, 1 << 31, 0, 0], "avx512vl (leaf 0x7 EBX bit 31)"),
            (7, 0, [0, 0, 1 << 22, 0], "rdpid (leaf 0x7 ECX bit 22)"),
            (7, 0, [0, 0, 0, 1 << 31], "ssbd (leaf 0x7 EDX bit 31)"),
            (7, 1, [1 << 5, 0, 0, 0], "avx512_bf16 (leaf 0x7.1 EAX bit 5)"),
            (7, 1, [0, 0, 0, 1 << 31], "leaf 0x7.1 EDX bit 31"),
            (0xd, 1, [1 << 3, 0, 0, 0], "xsaves (leaf 0xd.1 EAX bit 3)"),
            (0x8000_0001, 0, [0, 0, 0, 1 << 27], "rdtscp (leaf 0x80000001 EDX bit 27)"),
            (0x8000_0008, 0, [0, 1 << 24, 0, 0], "amd_ssbd (leaf 0x80000008 EBX bit 24)"),
            (0x4000_0001, 0, [1 << 3, 0, 0, 0], "kvm_clocksource2 (leaf 0x40000001 EAX bit 3)"),
        ] {
            let with = made_by(INTEL, &[leaf(function, index, registers)]);
            let without = made_by(INTEL, &[leaf(function, index, [0; 4])]);
            for here in [&without, &made_by(INTEL, &[])] {
                let said = refusal(&with, here).unwrap_or_default();
                assert!(said.contains(&format!("CPU feature {what},")), "{said}, want {what}");
            }
            assert_eq!(refusal(&without, &with), None, "{what} too many");
            assert_eq!(refusal(&with, &with), None);
        }
    }

    #[test]
    fn another_maker_is_refused() {
        let said = refusal(&made_by(AMD, &[]), &made_by(INTEL, &[])).unwrap();
        assert!(said.contains("AuthenticAMD") && said.contains("GenuineIntel"), "{said}");
    }

    #[test]
    fn what_follows_from_registers_does_not_count() {
        let flags = |ecx, edx| made_by(AMD, &[leaf(1, 0, [0, 0xff00_0800, ecx, edx])]);
        assert_eq!(refusal(&flags(OF_1_ECX | 1, OF_1_EDX), &flags(1, 0)), None);
    }

    #[test]
    fn no_list_of_names_is_too_long() {
        for features in FEATURES {
            assert!(features.names.split_whitespace().count() <= 32, "{:#x}", features.leaf);
        }
    }
}
