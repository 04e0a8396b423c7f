//! Time since the VM was created, from kvm-clock; where there is none, TSC ticks since the start of the guest.

use core::arch::x86_64::{_mm_lfence, _rdtsc};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::ring0;

const KVM_CPUID_FEATURES: u32 = 0x4000_0001;
const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

/// The page KVM writes: `struct pvclock_vcpu_time_info`.
#[repr(C, align(32))]
struct TimeInfo {
    version: u32,
    _pad: u32,
    tsc_timestamp: u64,
    system_time_ns: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    _pad2: [u8; 2],
}

static mut TIME: TimeInfo = TimeInfo {
    version: 0,
    _pad: 0,
    tsc_timestamp: 0,
    system_time_ns: 0,
    tsc_to_system_mul: 0,
    tsc_shift: 0,
    flags: 0,
    _pad2: [0; 2],
};
static HAS_KVM_CLOCK: AtomicBool = AtomicBool::new(false);
static TSC_KHZ: AtomicU64 = AtomicU64::new(0);
static TSC_START: AtomicU64 = AtomicU64::new(0);

/// Where [`now_ns`] comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    KvmClock,
    Tsc,
}

/// Turns kvm-clock on if there is one. Call once, before [`now_ns`].
pub fn start() -> Source {
    if cpu_has_kvm_clock() {
        let address = &raw const TIME as u64;
        // SAFETY: the MSR makes KVM write `TIME`, which is read with volatile loads only.
        let enabled = unsafe { ring0::wrmsr(MSR_KVM_SYSTEM_TIME_NEW, address | 1) };
        // SAFETY: see above.
        let version = unsafe { (&raw const TIME.version).read_volatile() };
        if enabled.is_ok() && version != 0 {
            HAS_KVM_CLOCK.store(true, Ordering::Relaxed);
            return Source::KvmClock;
        }
    }
    TSC_START.store(tsc(), Ordering::Relaxed);
    TSC_KHZ.store(tsc_khz(), Ordering::Relaxed);
    Source::Tsc
}

/// Nanoseconds: since the creation of the VM (kvm-clock) or since [`start`] (TSC).
pub fn now_ns() -> u64 {
    if !HAS_KVM_CLOCK.load(Ordering::Relaxed) {
        return ticks_to_ns(tsc() - TSC_START.load(Ordering::Relaxed));
    }
    let (time, tsc) = read();
    time.system_time_ns + time.scale(tsc.wrapping_sub(time.tsc_timestamp))
}

/// How long the TSC takes for so many ticks.
pub fn ticks_to_ns(ticks: u64) -> u64 {
    match HAS_KVM_CLOCK.load(Ordering::Relaxed) {
        true => read().0.scale(ticks),
        false => scale(ticks, 1_000_000, TSC_KHZ.load(Ordering::Relaxed).max(1)),
    }
}

/// The page, and the TSC while that was so.
fn read() -> (TimeInfo, u64) {
    loop {
        // SAFETY: KVM changes the fields between two changes of `version`, odd meanwhile; all loads are volatile.
        let (before, time, now, after) = unsafe {
            let before = (&raw const TIME.version).read_volatile();
            let time = (&raw const TIME).read_volatile();
            (before, time, tsc(), (&raw const TIME.version).read_volatile())
        };
        if before == after && before & 1 == 0 {
            return (time, now);
        }
    }
}

impl TimeInfo {
    fn scale(&self, ticks: u64) -> u64 {
        let ticks = match self.tsc_shift {
            shift @ 0.. => ticks << shift,
            shift => ticks >> -shift,
        };
        scale(ticks, self.tsc_to_system_mul.into(), 1 << 32)
    }
}

pub fn now_us() -> u64 {
    now_ns() / 1000
}

/// Spins until `done` says so; false after `timeout_us`.
pub fn wait_until(timeout_us: u64, mut done: impl FnMut() -> bool) -> bool {
    let end = now_ns() + timeout_us * 1000;
    loop {
        if done() {
            return true;
        }
        if now_ns() > end {
            return false;
        }
        core::hint::spin_loop();
    }
}

/// Spins.
pub fn delay_us(us: u64) {
    wait_until(us, || false);
}

pub fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has both; CR4.TSD is clear.
    unsafe {
        _mm_lfence();
        _rdtsc()
    }
}

fn cpu_has_kvm_clock() -> bool {
    let [max, b, c, d] = ring0::cpuid(0x4000_0000, 0);
    let is_kvm = [b, c, d] == [0x4b4d_564b, 0x564b_4d56, 0x4d];
    let has_leaf = is_kvm && (max == 0 || max >= KVM_CPUID_FEATURES);
    has_leaf && ring0::cpuid(KVM_CPUID_FEATURES, 0)[0] & KVM_FEATURE_CLOCKSOURCE2 != 0
}

/// From CPUID 0x15 or 0x16; 1 GHz if the CPU does not say.
fn tsc_khz() -> u64 {
    let max = ring0::cpuid(0, 0)[0];
    if max >= 0x15 {
        let [denominator, numerator, hz, _] = ring0::cpuid(0x15, 0);
        if denominator != 0 && numerator != 0 && hz != 0 {
            return u64::from(hz) * u64::from(numerator) / u64::from(denominator) / 1000;
        }
    }
    let mhz = if max >= 0x16 { ring0::cpuid(0x16, 0)[0] & 0xffff } else { 0 };
    if mhz == 0 { 1_000_000 } else { u64::from(mhz) * 1000 }
}

/// `value * numerator / denominator` without overflow on the way.
fn scale(value: u64, numerator: u64, denominator: u64) -> u64 {
    (u128::from(value) * u128::from(numerator) / u128::from(denominator)) as u64
}
