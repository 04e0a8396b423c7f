//! V14: a second CPU rewrites what a device is reading.
use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rt::memory::mmio_write32;
use rt::{BootInfo, Outcome, clock, ensure, options};

use crate::target::{
    F_INDIRECT, HOLE, INDIRECT, LIVE, NEXT, PATIENCE_US, SIZE, Target, Verdict, WRITE,
};

/// The page APs start in.
const TRAMPOLINE: u64 = 0x8000;
/// Times it must have written everything while a device was at work.
const TURNS: u32 = 20;
const LONG_US: u64 = 30_000_000;
/// What the other CPU writes: address, one value, another. An address of 0 is the end.
const WRITES: usize = 12;

#[unsafe(no_mangle)]
static AP_WRITES: [AtomicU64; 3 * WRITES + 1] = [const { AtomicU64::new(0) }; 3 * WRITES + 1];
#[unsafe(no_mangle)]
static AP_TURNS: AtomicU32 = AtomicU32::new(0);

// Real mode straight to long mode, on the runtime's page tables and GDT; then writes for ever.
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
    mov $AP_WRITES, %esi
1:  mov (%rsi), %rdi
    test %rdi, %rdi
    jz 2f
    mov 8(%rsi), %rax
    mov %rax, (%rdi)
    mov 16(%rsi), %rax
    mov %rax, (%rdi)
    add $24, %esi
    jmp 1b
2:  incl AP_TURNS(%rip)
    jmp ap_long
    "#,
    options(att_syntax)
);

unsafe extern "C" {
    fn ap_trampoline();
    fn ap_trampoline_end();
}

const LAPIC_ICR_LOW: usize = 0xfee0_0300;
const LAPIC_ICR_HIGH: usize = 0xfee0_0310;

/// Starts the CPU with APIC id 1, once.
fn start_other() -> Outcome {
    static IS_UP: AtomicU32 = AtomicU32::new(0);
    if IS_UP.swap(1, Ordering::SeqCst) == 1 {
        return Ok(());
    }
    let start = ap_trampoline as *const u8;
    let len = ap_trampoline_end as *const () as usize - start as usize;
    // SAFETY: a page of low RAM that holds no boot information.
    unsafe { (TRAMPOLINE as *mut u8).copy_from_nonoverlapping(start, len) };
    mmio_write32(0xfee0_00f0, 0x12f);
    for command in [0x4500, 0x4600 | (TRAMPOLINE >> 12) as u32] {
        mmio_write32(LAPIC_ICR_HIGH, 1 << 24);
        mmio_write32(LAPIC_ICR_LOW, command);
        clock::delay_us(300);
    }
    let is_up = clock::wait_until(PATIENCE_US, || AP_TURNS.load(Ordering::SeqCst) > 0);
    ensure!(is_up, "the other CPU does not come up");
    Ok(())
}

/// V14: the other CPU rewrites descriptors, headers and indices while they are read.
pub(crate) fn race(boot: &'static BootInfo, t: &Target) -> Outcome {
    let rounds = options::number(boot.cmdline, "rounds", 200);
    for number in 0..t.queues {
        for what in ["descriptors", "headers", "available_ring"] {
            t.device.negotiate(F_INDIRECT)?;
            let mut queue = t.device.queue(number as u16, SIZE)?;
            let desc = queue.desc as u64;
            let good = |len: u64, flags: u16, next: u16| {
                len | u64::from(flags) << 32 | u64::from(next) << 48
            };
            let writes: [(u64, u64, u64); 4] = match what {
                "descriptors" => [
                    (desc, t.data, HOLE),
                    (desc + 8, good(64, NEXT, 1), good(0xffff_ffff, INDIRECT, 0)),
                    (desc + 16, t.data + 4096, u64::MAX - 1),
                    (desc + 24, good(64, WRITE, 0), good(0x7fff_ffff, WRITE | NEXT, 0)),
                ],
                "headers" => [
                    (t.data, 0, u64::MAX),
                    (t.data + 8, 1, 1 << 55),
                    (t.data + 16, 1 << 32, u64::MAX),
                    (t.data + 24, 0, 0xffff_0001_ffff_ffff),
                ],
                _ => {
                    // Flags, index and the first slots, in one word and the next.
                    let avail = queue.avail as u64 & !7;
                    [
                        (avail, 1 | 1 << 16, 1 | 0xffff << 32 | 2 << 16),
                        (0, 0, 0),
                        (0, 0, 0),
                        (0, 0, 0),
                    ]
                }
            };
            for (at, value) in AP_WRITES.iter().zip(writes.iter().flat_map(|w| [w.0, w.1, w.2])) {
                at.store(value, Ordering::SeqCst);
            }
            start_other()?;
            // What it finds may latch it at once.
            t.device.set_status(LIVE);
            let before = AP_TURNS.load(Ordering::SeqCst);
            let turns = || AP_TURNS.load(Ordering::SeqCst).wrapping_sub(before);
            let begin = clock::now_us();
            let mut round = 0;
            // The other CPU may have to wait for a processor of the host.
            while round < rounds || (turns() < TURNS && clock::now_us() - begin < LONG_US) {
                round += 1;
                if t.device.status() != LIVE {
                    t.device.negotiate(F_INDIRECT)?;
                    queue.clear();
                    t.device.place(&queue);
                    t.device.set_status(LIVE);
                }
                queue.chain(0, &t.parts());
                queue.offer(0);
                queue.notify();
                clock::delay_us(20);
                let _ = queue.poll();
            }
            AP_WRITES[0].store(0, Ordering::SeqCst);
            let enough = turns();
            // It may be in the middle of a turn.
            clock::wait_until(PATIENCE_US, || turns() > enough + 1);
            ensure!(enough >= TURNS, "the other CPU made {enough} turns");
            t.report("v14", what, Some(number), Verdict::Rejected, "rejected");
        }
    }
    Ok(())
}
