//! Starts every CPU the MADT lists by INIT and SIPI; each counts itself and leaves its APIC id. Fails unless every one
//! came, and exactly once. Options: `expect=N` CPUs in all, `timeout_ms=5000`, `x2apic`.
#![no_std]
#![no_main]

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, Ordering};

use rt::memory::{mmio_read32, mmio_write32};
use rt::{BootInfo, Outcome, acpi, clock, ensure, options, println, ring0};

rt::entry!(run);

const MAX_CPUS: usize = 1024;
/// The page APs start in; SIPI's vector is its number.
const TRAMPOLINE: u64 = 0x8000;

const LAPIC_ID: usize = 0xfee0_0020;
const LAPIC_ICR_LOW: usize = 0xfee0_0300;
const LAPIC_ICR_HIGH: usize = 0xfee0_0310;
const MSR_APIC_BASE: u32 = 0x1b;
const LAPIC_SPURIOUS: usize = 0xfee0_00f0;
const MSR_X2APIC_ID: u32 = 0x802;
const MSR_X2APIC_SPURIOUS: u32 = 0x80f;
const MSR_X2APIC_ICR: u32 = 0x830;
const INIT: u32 = 0x4500;
/// The software enable bit and a vector. A CPU may send IPIs without it, but KVM then may not know its last vCPU yet.
const SPURIOUS: u32 = 0x12f;
const STARTUP: u32 = 0x4600 | (TRAMPOLINE >> 12) as u32;

#[unsafe(no_mangle)]
static AP_SLOTS: AtomicU32 = AtomicU32::new(0);
#[unsafe(no_mangle)]
static AP_DONE: AtomicU32 = AtomicU32::new(0);
#[unsafe(no_mangle)]
static AP_IDS: [AtomicU32; MAX_CPUS] = [const { AtomicU32::new(0) }; MAX_CPUS];

// Real mode straight to long mode, on the runtime's page tables and GDT; then two counters and no stack.
global_asm!(
    r#"
    .section .text.ap, "ax"
    .balign 16
    .globl ap_trampoline
    .code16
ap_trampoline:
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl (ap_gdtr - ap_trampoline)
    mov $0x20, %eax
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $0x80000033, %eax
    mov %eax, %cr0
    ljmpl $8, $ap_long
ap_gdtr:
    .word 0x37
    .long gdt
    .globl ap_trampoline_end
ap_trampoline_end:
    .code64
ap_long:
    mov $0xb, %eax
    xor %ecx, %ecx
    cpuid
    test %ebx, %ebx
    jnz 1f
    mov $1, %eax
    cpuid
    mov %ebx, %edx
    shr $24, %edx
1:  mov $1, %eax
    lock xadd %eax, AP_SLOTS(%rip)
    and $1023, %eax
    mov %edx, AP_IDS(, %rax, 4)
    lock incl AP_DONE(%rip)
2:  cli
    hlt
    jmp 2b
    "#,
    options(att_syntax)
);

unsafe extern "C" {
    fn ap_trampoline();
    fn ap_trampoline_end();
}

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let wants_x2apic = options::has(boot.cmdline, "x2apic") || acpi::cpus(boot).any(|id| id > 254);
    let apic = Apic::enable(wants_x2apic);
    let own = apic.id();
    let cpus = acpi::cpus(boot).count();
    println!("bsp={own}");
    println!("cpus={cpus}");
    let expected = options::number(boot.cmdline, "expect", cpus as u64);
    ensure!(cpus as u64 == expected, "MADT has {cpus} CPUs, not {expected}");

    let start = ap_trampoline as *const u8;
    let len = ap_trampoline_end as *const () as usize - start as usize;
    // SAFETY: a page of low RAM that holds no boot information; see the memory layout of the monitors this runs under.
    unsafe { (TRAMPOLINE as *mut u8).copy_from_nonoverlapping(start, len) };

    let timeout_us = options::number(boot.cmdline, "timeout_ms", 5000) * 1000;
    let begin = clock::now_us();
    let others = || acpi::cpus(boot).filter(|&id| id != own);
    others().for_each(|id| apic.send(id, INIT));
    clock::delay_us(200);
    // Twice, as the MP specification's algorithm has it; the second does nothing to a CPU that runs.
    for _ in 0..2 {
        others().for_each(|id| apic.send(id, STARTUP));
        clock::delay_us(200);
    }
    let all = cpus as u32 - 1;
    let came = clock::wait_until(timeout_us, || AP_DONE.load(Ordering::SeqCst) >= all);
    println!("started_us={}", clock::now_us() - begin);

    let done = AP_DONE.load(Ordering::SeqCst);
    let ids = &AP_IDS[..(done as usize).min(MAX_CPUS)];
    for id in ids {
        println!("ap={}", id.load(Ordering::Relaxed));
    }
    println!("online={}", done + 1);
    ensure!(came, "{done} of {all} APs came");
    for id in others() {
        let times = ids.iter().filter(|ap| ap.load(Ordering::Relaxed) == id).count();
        ensure!(times == 1, "CPU {id} came {times} times");
    }
    Ok(())
}

/// How the local APIC is spoken to.
#[derive(Clone, Copy)]
enum Apic {
    Mmio,
    Msr,
}

impl Apic {
    fn enable(wants_x2apic: bool) -> Self {
        let base = ring0::rdmsr(MSR_APIC_BASE).unwrap_or(0);
        let has_x2apic = ring0::cpuid(1, 0)[2] >> 21 & 1 == 1;
        // SAFETY: the mode bit only; the address stays.
        let set = || unsafe { ring0::wrmsr(MSR_APIC_BASE, base | 1 << 10) };
        if wants_x2apic && has_x2apic && set().is_ok() {
            // SAFETY: a register of the local APIC.
            let _ = unsafe { ring0::wrmsr(MSR_X2APIC_SPURIOUS, SPURIOUS.into()) };
            Self::Msr
        } else {
            mmio_write32(LAPIC_SPURIOUS, SPURIOUS);
            Self::Mmio
        }
    }

    fn id(self) -> u32 {
        match self {
            Self::Mmio => mmio_read32(LAPIC_ID) >> 24,
            Self::Msr => ring0::rdmsr(MSR_X2APIC_ID).unwrap_or(0) as u32,
        }
    }

    fn send(self, id: u32, command: u32) {
        match self {
            Self::Mmio => {
                mmio_write32(LAPIC_ICR_HIGH, id << 24);
                mmio_write32(LAPIC_ICR_LOW, command);
            }
            Self::Msr => {
                // SAFETY: an interrupt to another CPU.
                let _ = unsafe {
                    ring0::wrmsr(MSR_X2APIC_ICR, u64::from(id) << 32 | u64::from(command))
                };
            }
        }
    }
}
