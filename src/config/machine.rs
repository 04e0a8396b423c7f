//! The machine: vCPUs, memory, what its reset does.
use arch::{CpuTemplate, layout};
use devices::sys::map::Pages;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Refusal;

/// Most vCPUs a VM can have.
pub const VCPUS_MAX: u8 = 32;

/// Which pages back guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HugePages {
    /// As the host is set up.
    #[default]
    None,
    /// Transparent huge pages are asked for.
    Transparent,
    /// Pages of 2 MiB from the host's pool (hugetlbfs).
    #[serde(rename = "2M")]
    Hugetlb2M,
}

impl From<HugePages> for Pages {
    fn from(pages: HugePages) -> Self {
        match pages {
            HugePages::None => Self::Normal,
            HugePages::Transparent => Self::Transparent,
            HugePages::Hugetlb2M => Self::Huge2M,
        }
    }
}

/// What a guest's own reset does.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
pub enum OnReboot {
    /// The VM boots again, in the same process.
    #[default]
    Restart,
    /// The VM ends.
    Exit,
}

/// The machine: `PUT /machine-config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// How many vCPUs, 1-32.
    #[schemars(range(min = 1, max = 32))]
    pub vcpu_count: u8,
    /// RAM in MiB, from 1.
    #[schemars(range(min = 1))]
    pub mem_size_mib: u64,
    /// Whether two vCPUs share a core.
    #[serde(default)]
    pub smt: bool,
    /// Whether KVM remembers the pages that the guest writes.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Which pages back guest RAM.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// A named set of CPU features. Deprecated: `cpu-config` is its successor, and the later of the
    /// two that is set holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether there is a PIT (i8254), for kernels that do not know kvm-clock. husk only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pit: bool,
    /// Whether children of the VM can be made at once: RAM is in a file in memory, which the first fork
    /// freezes. husk only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forkable: bool,
    /// What a guest's own reset does, if not what [`crate::Defaults`] say. husk only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_reboot: Option<OnReboot>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            cpu_template: None,
            pit: false,
            forkable: false,
            on_reboot: None,
        }
    }
}

/// `PATCH /machine-config`: what is given replaces what was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MachinePatch {
    vcpu_count: Option<u8>,
    mem_size_mib: Option<u64>,
    smt: Option<bool>,
    track_dirty_pages: Option<bool>,
    huge_pages: Option<HugePages>,
    pub(super) cpu_template: Option<CpuTemplate>,
    pit: Option<bool>,
    forkable: Option<bool>,
    on_reboot: Option<OnReboot>,
}

impl MachineConfig {
    /// RAM in bytes. The size has been checked.
    pub fn mem_size_bytes(&self) -> u64 {
        self.mem_size_mib << 20
    }

    pub(super) fn check(&self) -> Result<(), Refusal> {
        let refuse = |field, why| Err(Refusal::Field { section: "machine-config", field, why });
        let vcpus = self.vcpu_count;
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return refuse("vcpu_count", format!("{vcpus} is not between 1 and {VCPUS_MAX}"));
        }
        if self.smt && vcpus > 1 && vcpus % 2 == 1 {
            return refuse("vcpu_count", format!("{vcpus} is odd, with smt it must be 1 or even"));
        }
        let (min, max) = (layout::RAM_MIN >> 20, layout::RAM_MAX >> 20);
        if !(min..=max).contains(&self.mem_size_mib) {
            let why = format!("{} is not between {min} and {max}", self.mem_size_mib);
            return refuse("mem_size_mib", why);
        }
        if self.huge_pages == HugePages::Hugetlb2M && self.mem_size_mib % 2 == 1 {
            let why = format!("{} is odd, with huge_pages 2M it must be even", self.mem_size_mib);
            return refuse("mem_size_mib", why);
        }
        if self.huge_pages == HugePages::Hugetlb2M && self.forkable {
            let why = "a VM whose RAM is huge pages of the host's pool cannot be forked";
            return refuse("forkable", why.into());
        }
        if self.cpu_template == Some(CpuTemplate::V1N1) {
            return refuse("cpu_template", "V1N1 is for ARM processors".into());
        }
        crate::memory::check(self)
    }

    /// A template that is not given leaves what there is, also in a `PUT`, as in Firecracker.
    pub(super) fn set_cpu_template(&mut self, given: Option<CpuTemplate>) {
        match given {
            None => {}
            Some(CpuTemplate::None) => self.cpu_template = None,
            Some(_) => self.cpu_template = given,
        }
    }

    pub(super) fn merge(&mut self, patch: MachinePatch) {
        fn set<T>(to: &mut T, from: Option<T>) {
            if let Some(value) = from {
                *to = value;
            }
        }
        set(&mut self.vcpu_count, patch.vcpu_count);
        set(&mut self.mem_size_mib, patch.mem_size_mib);
        set(&mut self.smt, patch.smt);
        set(&mut self.track_dirty_pages, patch.track_dirty_pages);
        set(&mut self.huge_pages, patch.huge_pages);
        set(&mut self.pit, patch.pit);
        set(&mut self.forkable, patch.forkable);
        self.on_reboot = patch.on_reboot.or(self.on_reboot);
        self.set_cpu_template(patch.cpu_template);
    }
}
