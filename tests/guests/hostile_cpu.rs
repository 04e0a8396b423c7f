//! Attacks what is no virtio device, as `how=` says. Prints `ready=1` before what goes on for ever, or
//! `case=NAME verdict=WORD want=WORD` for each case and RESULT.
//!
//! ports: every port, in and out, 1, 2 and 4 bytes. serial: every register and value. keyboard: every command but
//! resets. lapic, msr: garbage in all registers. flood: `bytes=N` to the serial port. ap-crash: the second CPU triple
//! faults while this one runs. init-storm: INIT and SIPI to the second CPU for ever.
#![no_std]
#![no_main]

use core::arch::{global_asm, naked_asm};

use rt::memory::*;
use rt::{BootInfo, Outcome, clock, fail, options, println, ring0};

rt::entry!(run);

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    match options::value(boot.cmdline, "how").unwrap_or("ports") {
        "ports" => ports(),
        "serial" => serial(),
        "keyboard" => keyboard(),
        "lapic" => lapic(),
        "msr" => msrs(),
        "flood" => flood(options::number(boot.cmdline, "bytes", 1 << 20)),
        "ap-crash" => start_other(ap_crash as *const () as u64),
        "init-storm" => storm(),
        how => fail!("how={how} is unknown"),
    }
}

fn report(row: &str, what: core::fmt::Arguments, is_good: bool) {
    let verdict = if is_good { "rejected" } else { "answered" };
    println!("case={row}_{what} verdict={verdict} want=rejected");
}

/// M3, all of it in ring 0. What a PC has answers; the serial port is put in order again.
fn ports() -> Outcome {
    /// Reads and writes ports from `edi` to `esi` at all widths; counts those that read other than ones.
    #[unsafe(naked)]
    unsafe extern "C" fn scan() {
        naked_asm!(
            "xor r8d, r8d",
            "mov edx, edi",
            "2:",
            "mov eax, 0x5a5a5a5a",
            "out dx, al",
            "out dx, ax",
            "out dx, eax",
            "in al, dx",
            "cmp al, -1",
            "je 3f",
            "inc r8d",
            "3:",
            "in ax, dx",
            "in eax, dx",
            "inc edx",
            "cmp edx, esi",
            "jb 2b",
            "mov eax, r8d",
            "ret",
        )
    }
    let mut answers = 0;
    for from in (0..0x1_0000).step_by(0x1000) {
        // SAFETY: touches no memory. 0x5a resets nothing: neither the keyboard controller nor ACPI take it so.
        let found = unsafe { ring0::call(scan, from, from + 0x1000, 0) }.unwrap_or(u64::MAX);
        restore_serial();
        // What the scan has sent to the serial port.
        println!();
        let may_answer = from == 0;
        report("m3", format_args!("ports_from_{from:#x}"), may_answer || found == 0);
        answers += found;
    }
    println!("answers={answers}");
    for port in [0x1000_u16, 0xf000, 0x601, 0x3f9] {
        let page = allocate(4096);
        ring0::in_bytes(port, page);
        if port != 0x3f9 {
            ring0::out_bytes(port, page);
        }
        report("m3", format_args!("strings_at_{port:#x}"), true);
    }
    Ok(())
}

fn restore_serial() {
    for (register, value) in [(3, 3), (4, 0), (1, 0)] {
        ring0::out8(0x3f8 + register, value);
    }
}

/// M6. What is sent meanwhile is noise on the console.
fn serial() -> Outcome {
    for (mode, register, setup) in
        [("plain", 7, 0), ("loopback", 4, 0x10), ("divisor", 3, 0x80), ("interrupts", 1, 0x0f)]
    {
        for at in 0..8 {
            for value in 0..=255 {
                // Neither of these ends the line that is being said.
                if at == 0 && (value == 10 || value == 13) {
                    continue;
                }
                ring0::out8(0x3f8 + register, setup);
                ring0::out8(0x3f8 + at, value);
                ring0::in8(0x3f8 + at);
            }
            restore_serial();
        }
        restore_serial();
        println!();
        report("m6", format_args!("serial_{mode}"), ring0::in8(0x3fd) & 0x60 == 0x60);
    }
    Ok(())
}

/// M7.
fn keyboard() -> Outcome {
    for command in 0..0xf0_u8 {
        ring0::out8(0x64, command);
        // The argument of "write the output port" must not pull the reset line.
        for argument in [0xff, 0x01, 0x5b] {
            ring0::out8(0x60, argument);
            ring0::in8(0x60);
        }
    }
    report("m7", format_args!("every_command"), true);
    for command in (0xf1..=0xff_u8).step_by(2) {
        ring0::out8(0x64, command);
    }
    report("m7", format_args!("pulses_of_other_lines"), true);
    for _ in 0..20_000 {
        ring0::in8(0x64);
    }
    report("m7", format_args!("20000_reads"), true);
    // Until nothing is left to be read.
    let is_empty = (0..100).any(|_| {
        ring0::in8(0x60);
        ring0::in8(0x64) & 1 == 0
    });
    report("m7", format_args!("queue_ends"), is_empty);
    Ok(())
}

/// X3: garbage in the local APIC, whose timer and interrupts nobody waits for.
fn lapic() -> Outcome {
    for offset in (0x20..0x400).step_by(0x10) {
        for value in [0, 1, u32::MAX, 0x5a5a_5a5a] {
            // An INIT to itself, or to all, would be the end of it.
            if offset != 0x300 {
                mmio_write32(0xfee0_0000 + offset, value);
                mmio_read32(0xfee0_0000 + offset);
            }
        }
    }
    for offset in 0xff0..0x1000 {
        mmio_write8(0xfee0_0000 + offset, 0xff);
        mmio_read16(0xfee0_0000 + offset);
    }
    println!("ready=1");
    spin()
}

/// X3: garbage in MSRs; those that Rust code depends on aside.
fn msrs() -> Outcome {
    let (mut taken, mut refused) = (0, 0);
    let all = (0x10..0x12)
        .chain(0x174..0x180)
        .chain(0x200..0x210)
        .chain(0x250..0x280)
        .chain(0x2ff..0x300)
        .chain(0x400..0x410)
        .chain(0x6e0..0x6e1)
        .chain(0x800..0x840)
        .chain(0x4000_0000..0x4000_0010)
        .chain(0x4b56_4d00..0x4b56_4d08)
        .chain(0xc000_0081..0xc000_0085)
        .chain(0xc000_0103..0xc000_0104)
        .chain(0xc001_0000..0xc001_0010)
        .chain([0, 1, 0x8b, 0xce, 0x1a0, 0x1d9, 0x277, 0x345, 0xffff_ffff]);
    for index in all {
        for value in [0, 1, u64::MAX, 0x5a5a_5a5a_5a5a_5a5a, 1 << 63 | 1] {
            // SAFETY: none of these is one that Rust code depends on; system call entries are not used.
            match unsafe { ring0::wrmsr(index, value) } {
                Ok(()) => taken += 1,
                Err(_) => refused += 1,
            }
        }
        let _ = ring0::rdmsr(index);
    }
    println!("taken={taken} refused={refused}");
    println!("ready=1");
    spin()
}

fn spin() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// M5.
fn flood(bytes: u64) -> Outcome {
    println!("ready=1");
    let line = [b'x'; 1024];
    for _ in 0..bytes / 1024 {
        ring0::out_bytes(0x3f8, &line);
    }
    println!();
    println!("flooded=1");
    Ok(())
}

/// The page APs start in.
const TRAMPOLINE: u64 = 0x8000;
const LAPIC_ICR_LOW: usize = 0xfee0_0300;
const LAPIC_ICR_HIGH: usize = 0xfee0_0310;

// Real mode straight to long mode, where a page fault finds no table of vectors; and one that does nothing for ever.
global_asm!(
    r#"
    .section .text.ap, "ax"
    .balign 16
    .globl ap_crash
    .code16
ap_crash:
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl (3f - ap_crash)
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
3:  .word 0x37
    .long gdt
    .globl ap_loop
    .balign 16
ap_loop:
    cli
4:  jmp 4b
    .globl ap_end
ap_end:
    .code64
ap_long:
    lidt 5f(%rip)
    mov $-4096, %rax
    mov (%rax), %eax
5:  .quad 0, 0
    "#,
    options(att_syntax)
);

unsafe extern "C" {
    fn ap_crash();
    fn ap_loop();
    fn ap_end();
}

fn place(code: u64) {
    let len = ap_end as *const () as usize - code as usize;
    // SAFETY: a page of low RAM that holds no boot information.
    unsafe { (TRAMPOLINE as *mut u8).copy_from_nonoverlapping(code as *const u8, len) };
    mmio_write32(0xfee0_00f0, 0x12f);
}

fn send(command: u32) {
    mmio_write32(LAPIC_ICR_HIGH, 1 << 24);
    mmio_write32(LAPIC_ICR_LOW, command);
}

fn start_other(code: u64) -> Outcome {
    place(code);
    println!("ready=1");
    for command in [0x4500, 0x4600 | (TRAMPOLINE >> 12) as u32] {
        send(command);
        clock::delay_us(300);
    }
    spin()
}

fn storm() -> Outcome {
    place(ap_loop as *const () as u64);
    println!("ready=1");
    loop {
        for command in [0x4500, 0x4600 | (TRAMPOLINE >> 12) as u32, 0x4500] {
            send(command);
        }
    }
}
