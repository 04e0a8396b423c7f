//! Everything KVM knows of a vCPU, and of what the vCPUs share: read when a VM is saved, written when
//! it is restored.
//!
//! The order of writing matters: CPUID decides what the other registers may hold; the local APIC
//! comes before its timer's deadline, which is an MSR; pending events come last.
#![expect(unsafe_code, reason = "KVM writes as much of a vCPU's XSAVE area as it says it has")]

use std::mem::size_of;
use std::ops::RangeInclusive;
use std::time::{Duration, SystemTime};

use kvm_bindings::{
    CpuId, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::{compat, raw};
use crate::kvm::{again, extension};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The variable ranges, those of fixed size (Intel SDM vol. 4, table 2-2), the default.
const MTRRS: [RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];
/// By how many parts in a million the TSC may tick faster or slower than it did: what clocks differ
/// by anyway.
const TSC_TOLERANCE_PPM: u64 = 250;
/// What a TSC is set to first differs in this bit from what it is then: that is decades.
const TSC_FAR: u64 = 1 << 62;

/// Why a state could not be read, or does not fit here.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused a call.
    #[error("{what}: {source}")]
    Kvm {
        /// The call.
        what: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// This KVM does not know an MSR, or not the value it had.
    #[error("KVM refuses {value:#x} for MSR {index:#x}")]
    Msr {
        /// The MSR.
        index: u32,
        /// The value that it had.
        value: u64,
    },
    /// The TSC ticks at another rate, and cannot be made to tick at the old one.
    #[error("the TSC ran at {was} kHz, here it runs at {is} kHz and cannot be scaled")]
    Tsc {
        /// The rate when it was saved.
        was: u32,
        /// The rate here.
        is: u32,
    },
    /// The guest may use something that this host does not have.
    #[error("the guest was given the CPU feature {0}, which it cannot have here")]
    Feature(String),
    /// The processor is of another make.
    #[error("the guest was given a processor by {was}, this one is by {is}")]
    Vendor {
        /// Who made the one it had.
        was: String,
        /// Who made this one.
        is: String,
    },
    /// More than the kernel's structures hold.
    #[error("it has more {0} than KVM takes")]
    TooMany(&'static str),
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { what, source }
}

/// One vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    #[serde(with = "raw::list")]
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    #[serde(with = "raw")]
    mp_state: kvm_mp_state,
    #[serde(with = "raw")]
    regs: kvm_regs,
    #[serde(with = "raw")]
    sregs: kvm_sregs,
    /// In words, as the kernel has it.
    #[serde(with = "raw::list")]
    xsave: Vec<[u32; XSAVE_ROW]>,
    #[serde(with = "raw")]
    xcrs: kvm_xcrs,
    #[serde(with = "raw")]
    debugregs: kvm_debugregs,
    #[serde(with = "raw")]
    lapic: kvm_lapic_state,
    /// Index and value.
    msrs: Vec<(u32, u64)>,
    #[serde(with = "raw")]
    events: kvm_vcpu_events,
}

/// Words to a line of text: areas are a multiple of 64 bytes, most of which are zero.
const XSAVE_ROW: usize = 16;

impl VcpuState {
    /// Reads the state of a vCPU that is not running, with the MSRs of `HostCpu::msr_indices`.
    pub fn read(vm: &VmFd, vcpu: &VcpuFd, msr_indices: &[u32]) -> Result<Self, StateError> {
        let mp_state = again(|| vcpu.get_mp_state()).map_err(kvm("KVM_GET_MP_STATE"))?;
        let cpuid =
            again(|| vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)).map_err(kvm("KVM_GET_CPUID2"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: again(|| vcpu.get_tsc_khz()).map_err(kvm("KVM_GET_TSC_KHZ"))?,
            mp_state,
            regs: again(|| vcpu.get_regs()).map_err(kvm("KVM_GET_REGS"))?,
            sregs: again(|| vcpu.get_sregs()).map_err(kvm("KVM_GET_SREGS"))?,
            xsave: read_xsave(vm, vcpu)?,
            xcrs: again(|| vcpu.get_xcrs()).map_err(kvm("KVM_GET_XCRS"))?,
            debugregs: again(|| vcpu.get_debug_regs()).map_err(kvm("KVM_GET_DEBUGREGS"))?,
            lapic: again(|| vcpu.get_lapic()).map_err(kvm("KVM_GET_LAPIC"))?,
            msrs: read_msrs(vcpu, msr_indices)?,
            events: again(|| vcpu.get_vcpu_events()).map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Whether the guest can go on where `here` is what a vCPU can have.
    pub(crate) fn check(&self, here: &CpuId) -> Result<(), StateError> {
        compat::check(&self.cpuid, here)
    }

    /// Gives it to a vCPU that is not running, and of the same kind, for whose guest time has `passed`.
    /// For a new one there is [`HostCpu::restore`](super::vcpu::HostCpu::restore). The first of a VM has
    /// [forgotten its TSC](Self::forget_tsc).
    pub fn write(&self, vm: &VmFd, vcpu: &VcpuFd, passed: Duration) -> Result<(), StateError> {
        self.write_cpuid(vcpu)?;
        self.set_tsc_rate(vm, vcpu)?;
        again(|| vcpu.set_mp_state(self.mp_state)).map_err(kvm("KVM_SET_MP_STATE"))?;
        again(|| vcpu.set_regs(&self.regs)).map_err(kvm("KVM_SET_REGS"))?;
        again(|| vcpu.set_sregs(&self.sregs)).map_err(kvm("KVM_SET_SREGS"))?;
        write_xsave(vm, vcpu, &self.xsave)?;
        again(|| vcpu.set_xcrs(&self.xcrs)).map_err(kvm("KVM_SET_XCRS"))?;
        again(|| vcpu.set_debug_regs(&self.debugregs)).map_err(kvm("KVM_SET_DEBUGREGS"))?;
        again(|| vcpu.set_lapic(&self.lapic)).map_err(kvm("KVM_SET_LAPIC"))?;
        write_msrs(vcpu, &self.msrs_after(passed))?;
        again(|| vcpu.set_vcpu_events(&self.events)).map_err(kvm("KVM_SET_VCPU_EVENTS"))
    }

    /// Has the TSC of the `first` vCPU of a VM be what it is set to next, by the state that this is.
    ///
    /// KVM takes a value that is within a second of what it expects for an attempt to synchronize vCPUs,
    /// and keeps what it has (kvm_synchronize_tsc() in arch/x86/kvm/x86.c). So the other vCPUs follow the
    /// first one, which is what we want of it; the first must not follow what the VM had until now: a
    /// guest that goes back again at once would keep a TSC that has gone on.
    pub fn forget_tsc(&self, first: &VcpuFd) -> Result<(), StateError> {
        let tsc = self.msrs.iter().find(|(index, _)| *index == MSR_TSC);
        tsc.map_or(Ok(()), |(index, value)| write_msrs(first, &[(*index, value ^ TSC_FAR)]))
    }

    /// The MSRs, with a TSC that has ticked for as long as time has `passed`.
    fn msrs_after(&self, passed: Duration) -> Vec<(u32, u64)> {
        let ticks = passed.as_nanos() * u128::from(self.tsc_khz) / 1_000_000;
        // More than the counter holds are centuries.
        let ticks = u64::try_from(ticks).unwrap_or(u64::MAX);
        let after = |&(index, value): &(u32, u64)| match index {
            MSR_TSC => (index, value.wrapping_add(ticks)),
            _ => (index, value),
        };
        self.msrs.iter().map(after).collect()
    }

    /// Gives a vCPU what the guest sees of the processor. One that has run takes only what it has.
    pub fn write_cpuid(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let cpuid =
            CpuId::from_entries(&self.cpuid).map_err(|_| StateError::TooMany("CPUID leaves"))?;
        again(|| vcpu.set_cpuid2(&cpuid)).map_err(kvm("KVM_SET_CPUID2"))
    }

    /// Puts other general registers in their place: those of some instructions ago.
    pub fn set_registers(&mut self, regs: kvm_regs) {
        self.regs = regs;
    }

    /// What the guest sees of the processor.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    fn set_tsc_rate(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<(), StateError> {
        let (was, is) =
            (self.tsc_khz, again(|| vcpu.get_tsc_khz()).map_err(kvm("KVM_GET_TSC_KHZ"))?);
        if u64::from(was.abs_diff(is)) * 1_000_000 <= u64::from(was) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        let can_scale = extension(|| vm.check_extension_int(Cap::TscControl))
            .map_err(kvm("KVM_CHECK_EXTENSION of KVM_CAP_TSC_CONTROL"))?;
        if can_scale == 0 {
            return Err(StateError::Tsc { was, is });
        }
        again(|| vcpu.set_tsc_khz(was)).map_err(kvm("KVM_SET_TSC_KHZ"))
    }
}

/// The MSRs that are part of a vCPU's state: those that KVM lists, and the MTRRs, which it does not.
pub(crate) fn msr_indices(kvm_fd: &Kvm) -> Result<Vec<u32>, StateError> {
    let list = again(|| kvm_fd.get_msr_index_list()).map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?;
    let mut indices = list.as_slice().to_vec();
    let mtrrs = MTRRS.into_iter().flatten();
    indices.extend(mtrrs.filter(|index| !list.as_slice().contains(index)));
    // The deadline is one of the TSC, and lost if that is written later.
    indices.sort_by_key(|index| match *index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(indices)
}

/// KVM reads up to the first MSR that this vCPU does not have: those are left out.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> =
            rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| StateError::TooMany("MSRs"))?;
        let read = again(|| vcpu.get_msrs(&mut msrs)).map_err(kvm("KVM_GET_MSRS"))?;
        found.extend(msrs.as_slice().iter().take(read).map(|msr| (msr.index, msr.data)));
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(found)
}

/// KVM writes up to the first MSR that it refuses. That is no loss where it has the value anyway.
fn write_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), StateError> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
            .collect();
        let entries = Msrs::from_entries(&entries).map_err(|_| StateError::TooMany("MSRs"))?;
        let written = again(|| vcpu.set_msrs(&entries)).map_err(kvm("KVM_SET_MSRS"))?;
        if let Some(&(index, value)) = rest.get(written)
            && read_msrs(vcpu, &[index])? != [(index, value)]
        {
            return Err(StateError::Msr { index, value });
        }
        rest = rest.get(written + 1..).unwrap_or_default();
    }
    Ok(())
}

/// An area that is large enough for all that this VM's vCPUs may have in theirs.
fn xsave_area(vm: &VmFd) -> Result<Xsave, StateError> {
    // Taken for a small one, it would be written beyond its end.
    let size = extension(|| vm.check_extension_int(Cap::Xsave2))
        .map_err(kvm("KVM_CHECK_EXTENSION of KVM_CAP_XSAVE2"))?;
    let size = usize::try_from(size).map_err(|_| StateError::TooMany("XSAVE state"))?;
    let more = size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    Xsave::new(more).map_err(|_| StateError::TooMany("XSAVE state"))
}

fn read_xsave(vm: &VmFd, vcpu: &VcpuFd) -> Result<Vec<[u32; XSAVE_ROW]>, StateError> {
    let mut area = xsave_area(vm)?;
    // SAFETY: the area has the size that KVM says it needs, or that of KVM_GET_XSAVE where it does
    // not know the other call, which then fails.
    match again(|| unsafe { vcpu.get_xsave2(&mut area) }) {
        Ok(()) => {}
        Err(e) if e.errno() == libc::ENOTTY => {
            let small = again(|| vcpu.get_xsave()).map_err(kvm("KVM_GET_XSAVE"))?;
            // SAFETY: only the words that follow are counted in it, of which there are none.
            unsafe { area.as_mut_fam_struct() }.xsave = small;
        }
        Err(e) => return Err(kvm("KVM_GET_XSAVE2")(e)),
    }
    let head = area.as_fam_struct_ref().xsave.region;
    let words: Vec<u32> = head.iter().chain(area.as_slice()).copied().collect();
    let rows = words.chunks(XSAVE_ROW).map(|words| {
        let mut row = [0; XSAVE_ROW];
        row[..words.len()].copy_from_slice(words);
        row
    });
    Ok(rows.collect())
}

fn write_xsave(vm: &VmFd, vcpu: &VcpuFd, rows: &[[u32; XSAVE_ROW]]) -> Result<(), StateError> {
    let words = rows.as_flattened();
    let mut area = xsave_area(vm)?;
    let head_len = size_of::<kvm_xsave>() / size_of::<u32>();
    let (head, tail) = words.split_at_checked(head_len).unwrap_or((words, &[]));
    if tail.iter().skip(area.as_slice().len()).any(|word| *word != 0) {
        return Err(StateError::TooMany("XSAVE state"));
    }
    let rest = area.as_mut_slice();
    rest.iter_mut().zip(tail).for_each(|(to, from)| *to = *from);
    // SAFETY: the number of words that follow does not change.
    let region = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    region.iter_mut().zip(head).for_each(|(to, from)| *to = *from);
    // SAFETY: the area has the size that KVM reads.
    again(|| unsafe { vcpu.set_xsave2(&area) }).map_err(kvm("KVM_SET_XSAVE"))
}

/// What the vCPUs share: interrupt controllers and clocks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    #[serde(with = "raw")]
    pic_master: kvm_irqchip,
    #[serde(with = "raw")]
    pic_slave: kvm_irqchip,
    #[serde(with = "raw")]
    io_apic: kvm_irqchip,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pit: Option<Pit>,
    #[serde(with = "raw")]
    clock: kvm_clock_data,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct Pit(#[serde(with = "raw")] kvm_pit_state2);

/// What the guest's clocks show when a saved VM goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// What they showed when it was saved: no time has passed.
    #[default]
    GoesOn,
    /// That, and the time that has passed since.
    CatchesUp,
}

impl VmState {
    /// Reads the state of a VM none of whose vCPUs run.
    pub fn read(vm: &VmFd, has_pit: bool) -> Result<Self, StateError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            again(|| vm.get_irqchip(&mut chip)).map_err(kvm("KVM_GET_IRQCHIP"))?;
            Ok::<_, StateError>(chip)
        };
        let pit = has_pit.then(|| again(|| vm.get_pit2()).map(Pit).map_err(kvm("KVM_GET_PIT2")));
        let mut clock = again(|| vm.get_clock()).map_err(kvm("KVM_GET_CLOCK"))?;
        // KVM tells only where its clock is the host's TSC, and since Linux 5.16.
        if clock.flags & KVM_CLOCK_REALTIME == 0 {
            clock.realtime = realtime_ns();
        }
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            io_apic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: pit.transpose()?,
            clock,
        })
    }

    /// How much time has passed for a guest whose clocks are to be like `clock`.
    pub fn passed(&self, clock: Clock) -> Duration {
        match (clock, self.clock.realtime) {
            (Clock::GoesOn, _) => Duration::ZERO,
            (Clock::CatchesUp, 0) => {
                log::warn!("the guest's clocks go on: the snapshot does not say when it was made");
                Duration::ZERO
            }
            // A host's clock may have been set back: the guest's are not.
            (Clock::CatchesUp, saved) => Duration::from_nanos(realtime_ns().saturating_sub(saved)),
        }
    }

    /// Gives it to a VM none of whose vCPUs run, for whose guest time has `passed`.
    pub fn write(&self, vm: &VmFd, passed: Duration) -> Result<(), StateError> {
        for (chip_id, chip) in [
            (KVM_IRQCHIP_PIC_MASTER, self.pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, self.pic_slave),
            (KVM_IRQCHIP_IOAPIC, self.io_apic),
        ] {
            again(|| vm.set_irqchip(&kvm_irqchip { chip_id, ..chip }))
                .map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        if let Some(Pit(pit)) = &self.pit {
            again(|| vm.set_pit2(pit)).map_err(kvm("KVM_SET_PIT2"))?;
        }
        // KVM would add the time itself, but from Linux 5.16 on only, and not to the TSCs.
        let passed = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX);
        let clock = self.clock.clock.saturating_add(passed);
        again(|| vm.set_clock(&kvm_clock_data { clock, ..Default::default() }))
            .map_err(kvm("KVM_SET_CLOCK"))
    }
}

/// Nanoseconds since 1970.
fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vcpu(tsc_khz: u32, msrs: &[(u32, u64)]) -> VcpuState {
        VcpuState {
            cpuid: Vec::new(),
            tsc_khz,
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: Vec::new(),
            xcrs: kvm_xcrs::default(),
            debugregs: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            msrs: msrs.to_vec(),
            events: kvm_vcpu_events::default(),
        }
    }

    #[test]
    fn only_the_tsc_ticks_while_time_passes() {
        let state = vcpu(2_000_000, &[(MSR_TSC, 7), (0x277, 8), (MSR_TSC_DEADLINE, 9)]);
        let tsc_after = |passed| {
            let msrs = state.msrs_after(passed);
            assert_eq!(msrs[1..], [(0x277, 8), (MSR_TSC_DEADLINE, 9)]);
            msrs[0].1
        };
        assert_eq!(tsc_after(Duration::ZERO), 7);
        assert_eq!(tsc_after(Duration::from_micros(3)), 6007);
        assert_eq!(tsc_after(Duration::from_hours(24 * 365)), 7 + 63_072_000_000_000_000);
        assert_eq!(tsc_after(Duration::MAX), 6);
    }

    #[test]
    fn time_passes_since_it_was_saved_if_that_is_known() {
        let saved = |realtime| VmState {
            pic_master: kvm_irqchip::default(),
            pic_slave: kvm_irqchip::default(),
            io_apic: kvm_irqchip::default(),
            pit: None,
            clock: kvm_clock_data { realtime, ..Default::default() },
        };
        let hour = Duration::from_hours(1);
        let ago = saved(realtime_ns() - 3_600_000_000_000);
        assert!((hour..2 * hour).contains(&ago.passed(Clock::CatchesUp)));
        assert_eq!(ago.passed(Clock::GoesOn), Duration::ZERO);
        for unknown in [0, realtime_ns() + 3_600_000_000_000] {
            assert_eq!(saved(unknown).passed(Clock::CatchesUp), Duration::ZERO);
        }
    }
}
