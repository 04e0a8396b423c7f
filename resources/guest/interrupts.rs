//! The IDT and external interrupts: vectors 32-47 count themselves (see `entry.s`), the I/O APIC routes to them.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::memory::{mmio_read32, mmio_write32};
use crate::ring0;

/// First of the 16 vectors for external interrupts.
pub const FIRST_VECTOR: u8 = 32;
/// Vector for spurious interrupts, the last of ours.
const SPURIOUS_VECTOR: u32 = 47;
/// Mask registers of the two 8259s.
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];
const LAPIC: usize = 0xfee0_0000;
const LAPIC_ID: usize = LAPIC + 0x20;
const LAPIC_SPURIOUS: usize = LAPIC + 0xf0;

#[repr(C, align(16))]
struct Idt([[u64; 2]; 48]);

#[unsafe(no_mangle)]
static mut IDT: Idt = Idt([[0; 2]; 48]);

#[unsafe(export_name = "interrupt_counts")]
static COUNTS: [AtomicU32; 16] = [const { AtomicU32::new(0) }; 16];

unsafe extern "C" {
    fn vector_stubs();
    fn service_gate();
}

/// Points every vector at its stub, and #UD at the service gate. Ring 0 has loaded IDTR already; the entries are
/// ordinary memory, so filling them costs no ring-0 instruction.
pub(crate) fn fill_idt() {
    for vector in 0..48 {
        let handler = match vector {
            6 => service_gate as *const () as u64,
            _ => vector_stubs as *const () as u64 + vector as u64 * 16,
        };
        // Present, interrupt gate; DPL 3 so that nothing in ring 3 is refused it.
        let low = handler & 0xffff | 8 << 16 | 0xee00 << 32 | (handler >> 16 & 0xffff) << 48;
        // SAFETY: only this function, once, before anything can fault, writes the table.
        unsafe { (&raw mut IDT.0[vector]).write([low, handler >> 32]) };
    }
}

/// Routes I/O APIC input `pin` to vector `FIRST_VECTOR + slot`, edge triggered, to this CPU, and turns interrupts on.
///
/// The 8259s see the same lines and come out of reset unmasked, with vectors from 0: exceptions.
pub fn enable(io_apic: usize, pin: u32, slot: u8) {
    PIC_MASKS.map(|port| ring0::out8(port, 0xff));
    let id = mmio_read32(LAPIC_ID) >> 24;
    mmio_write32(LAPIC_SPURIOUS, 0x100 | SPURIOUS_VECTOR);
    let entry = 0x10 + pin * 2;
    for (register, value) in [(entry + 1, id << 24), (entry, u32::from(FIRST_VECTOR + slot))] {
        mmio_write32(io_apic, register);
        mmio_write32(io_apic + 0x10, value);
    }
    ring0::enable_interrupts();
}

/// How often vector `FIRST_VECTOR + slot` has fired.
pub fn count(slot: u8) -> u32 {
    COUNTS[usize::from(slot)].load(Ordering::SeqCst)
}
