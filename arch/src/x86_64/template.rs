//! CPU configurations with names: Firecracker's static templates, which make processors of several
//! generations look alike to a guest. Their bits are in resources/cpu-templates.
use kvm_bindings::CpuId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cpu_config::{CpuConfig, CpuError};
use super::cpuid::{self, leaf, vendor};

/// What CPU a guest gets.
#[derive(Clone, Copy, Debug)]
pub enum CpuChoice<'a> {
    /// The host's, as far as it is fit for a guest.
    Host,
    /// That, changed by name.
    Template(CpuTemplate),
    /// That, changed bit by bit.
    Config(&'a CpuConfig),
}

/// Named sets of CPU features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CpuTemplate {
    /// None of them.
    None,
    /// Intel processors as in EC2's C3 instances.
    C3,
    /// Intel processors as in EC2's T2 instances.
    T2,
    /// The same, with the mitigations that all of them have, for snapshots that move.
    T2S,
    /// Intel Cascade Lake and later, with the instructions of T2A.
    T2CL,
    /// AMD Milan, with the instructions of T2CL.
    T2A,
    /// ARM Neoverse V1: never for an x86 host.
    V1N1,
}

/// What a template needs and does.
struct Facts {
    makers: &'static str,
    /// As CPUID has it; none for those who make no processor of this architecture.
    vendor: Option<[u32; 3]>,
    json: &'static str,
}

/// A processor's generation, from leaf 1, compared as Firecracker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Generation {
    extended_family: u32,
    extended_model: u32,
    family: u32,
    model: u32,
    stepping: u32,
}

impl CpuChoice<'_> {
    /// What it changes on a host with `cpuid`.
    pub(crate) fn resolve(self, cpuid: &CpuId) -> Result<CpuConfig, CpuError> {
        match self {
            Self::Host => Ok(CpuConfig::default()),
            Self::Template(template) => template.resolve(cpuid),
            Self::Config(config) => Ok(config.clone()),
        }
    }
}

impl CpuTemplate {
    fn facts(self) -> Option<Facts> {
        let intel = |json| Facts { makers: "Intel", vendor: Some(cpuid::INTEL), json };
        let amd = |json| Facts { makers: "AMD", vendor: Some(cpuid::AMD), json };
        match self {
            Self::None => None,
            Self::C3 => Some(intel(include_str!("../../../resources/cpu-templates/C3.json"))),
            Self::T2 => Some(intel(include_str!("../../../resources/cpu-templates/T2.json"))),
            Self::T2S => Some(intel(include_str!("../../../resources/cpu-templates/T2S.json"))),
            Self::T2CL => Some(intel(include_str!("../../../resources/cpu-templates/T2CL.json"))),
            Self::T2A => Some(amd(include_str!("../../../resources/cpu-templates/T2A.json"))),
            Self::V1N1 => Some(Facts { makers: "ARM", vendor: None, json: "{}" }),
        }
    }

    fn resolve(self, cpuid: &CpuId) -> Result<CpuConfig, CpuError> {
        let Some(Facts { makers, vendor: of, json }) = self.facts() else {
            return Ok(CpuConfig::default());
        };
        if of.is_none() || of != vendor(cpuid.as_slice()) {
            return Err(CpuError::Vendor { template: self, makers });
        }
        let is_recent = Generation::of(cpuid).is_some_and(|host| host >= CASCADE_LAKE);
        match self {
            Self::T2CL if !is_recent => {
                return Err(CpuError::Model { template: self, models: "Cascade Lake" });
            }
            Self::C3 if !is_recent => log::warn!(
                "On processors that do not enumerate FBSDP_NO, PSDP_NO and SBDR_SSDP_NO on \
                 IA32_ARCH_CAPABILITIES MSR, the guest kernel does not apply the mitigation \
                 against MMIO stale data vulnerability."
            ),
            _ => {}
        }
        Ok(serde_json::from_str(json).expect("a test reads every template"))
    }
}

const CASCADE_LAKE: Generation =
    Generation { extended_family: 0, extended_model: 5, family: 6, model: 5, stepping: 7 };

impl Generation {
    fn of(cpuid: &CpuId) -> Option<Self> {
        let eax = leaf(cpuid, 1)?.eax;
        Some(Self {
            extended_family: eax >> 20 & 0xff,
            extended_model: eax >> 16 & 0xf,
            family: eax >> 8 & 0xf,
            model: eax >> 4 & 0xf,
            stepping: eax & 0xf,
        })
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    const CASCADE_LAKE_7: u32 = 0x5_0657;
    const SKYLAKE: u32 = 0x5_0654;
    const SAPPHIRE_RAPIDS: u32 = 0x8_06f8;

    /// A host with every leaf that templates change, and all bits in them.
    fn host(vendor: [u32; 3], signature: u32) -> CpuId {
        let all = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..kvm_cpuid_entry2::default()
        };
        let [ebx, edx, ecx] = vendor;
        CpuId::from_entries(&[
            kvm_cpuid_entry2 { ebx, ecx, edx, ..all(0, 0) },
            kvm_cpuid_entry2 { eax: signature, ..all(1, 0) },
            all(7, 0),
            all(0xd, 0),
            all(0xd, 1),
            all(0x8000_0001, 0),
            all(0x8000_0008, 0),
        ])
        .unwrap()
    }

    /// (leaf, subleaf, EAX, EBX, ECX, EDX) after `template`.
    fn applied(template: CpuTemplate, mut host: CpuId) -> Vec<(u32, u32, [u32; 4])> {
        let config = CpuChoice::Template(template).resolve(&host).unwrap();
        config.apply_to(&mut host).unwrap();
        let after = host.as_slice().iter().skip(1);
        after.map(|e| (e.function, e.index, [e.eax, e.ebx, e.ecx, e.edx])).collect()
    }

    const ALL: u32 = u32::MAX;

    #[test]
    fn templates_hide_what_their_processors_lack() {
        let intel = || host(cpuid::INTEL, SAPPHIRE_RAPIDS);
        assert_eq!(
            applied(CpuTemplate::C3, intel()),
            [
                (1, 0, [0x0003_06e4, ALL, !0x0040_dd3c, !0xa864_0000]),
                (7, 0, [ALL, !0xffaf_dd3c, !0x4041_481e, !0xc]),
                (0xd, 0, [!0x2f8, ALL, ALL, ALL]),
                (0xd, 1, [!0xe, ALL, ALL, ALL]),
                (0x8000_0001, 0, [ALL, ALL, !0x120, !0x0400_0000]),
                (0x8000_0008, 0, [ALL, ALL, ALL, ALL]),
            ]
        );
        let t2 = [
            (1, 0, [0x0003_06f2, ALL, !0x0004_cdfc, !0xe864_0000]),
            (7, 0, [ALL, !0xffef_d814, !0x4041_5f5e, !0x11c]),
            (0xd, 0, [!0x2f8, ALL, ALL, ALL]),
            (0xd, 1, [!0xe, ALL, ALL, ALL]),
            (0x8000_0001, 0, [ALL, ALL, !0x2000_0100, !0x0400_0000]),
            (0x8000_0008, 0, [ALL, !0x200, ALL, ALL]),
        ];
        assert_eq!(applied(CpuTemplate::T2, intel()), t2);
        assert_eq!(applied(CpuTemplate::T2S, intel()), t2);
        let t2cl = applied(CpuTemplate::T2CL, intel());
        assert_eq!(t2cl[..4], t2[..4]);
        assert_eq!(t2cl[4], (0x8000_0001, 0, [ALL, ALL, !0x2000_01c0, !0x07c0_0000]));
        let t2a = applied(CpuTemplate::T2A, host(cpuid::AMD, 0x00a0_0f11));
        assert_eq!(t2a[..4], t2[..4]);
        assert_eq!(t2a[4], (0x8000_0001, 0, [ALL, ALL, !0x2000_01c4, !0x0640_0000]));
        assert_eq!(t2a[5], (0x8000_0008, 0, [ALL, !0x201, ALL, ALL]));
    }

    #[test]
    fn templates_choose_mitigations_that_their_processors_share() {
        let host = host(cpuid::INTEL, SAPPHIRE_RAPIDS);
        let changed = |template, before| {
            let config = CpuChoice::Template(template).resolve(&host).unwrap();
            let [msr] = config.msr_modifiers[..] else { panic!("{config:?}") };
            assert_eq!(msr.addr.0, 0x10a);
            msr.bitmap.apply_to(before)
        };
        assert_eq!(changed(CpuTemplate::T2S, 0), 0x0408_0c4c);
        assert_eq!(changed(CpuTemplate::T2S, u64::MAX), 0x0408_0c4c);
        assert_eq!(changed(CpuTemplate::T2CL, 0), 0);
        assert_eq!(changed(CpuTemplate::T2CL, u64::MAX), 0x1d0a_e1ff);
        for template in [CpuTemplate::C3, CpuTemplate::T2] {
            let config = CpuChoice::Template(template).resolve(&host).unwrap();
            assert_eq!(config.msr_modifiers, []);
        }
    }

    #[test]
    fn refuses_other_processors() {
        let refusal = |template, vendor, signature| {
            let host = host(vendor, signature);
            CpuChoice::Template(template).resolve(&host).unwrap_err().to_string()
        };
        let said = refusal(CpuTemplate::T2, cpuid::AMD, 0x00a0_0f11);
        assert_eq!(
            said,
            "T2 is for Intel processors: CPU vendor mismatched between actual CPU and CPU template"
        );
        let said = refusal(CpuTemplate::T2A, cpuid::INTEL, SAPPHIRE_RAPIDS);
        assert!(said.starts_with("T2A is for AMD processors: "), "{said}");
        let said = refusal(CpuTemplate::V1N1, cpuid::INTEL, SAPPHIRE_RAPIDS);
        assert!(said.starts_with("V1N1 is for ARM processors: "), "{said}");
        let said = refusal(CpuTemplate::T2CL, cpuid::INTEL, SKYLAKE);
        assert!(said.starts_with("T2CL is for Cascade Lake and later: The current"), "{said}");
        let cascade_lake = host(cpuid::INTEL, CASCADE_LAKE_7);
        CpuChoice::Template(CpuTemplate::T2CL).resolve(&cascade_lake).unwrap();
        let none = CpuChoice::Template(CpuTemplate::None).resolve(&cascade_lake).unwrap();
        assert_eq!(none, CpuConfig::default());
    }
}
