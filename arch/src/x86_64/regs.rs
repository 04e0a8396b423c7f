//! What a vCPU starts with: descriptor table, page tables, registers (boot.rst, 64-bit boot
//! protocol; pvh.pandoc).
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::error::BootError;
use super::kernel::{Entry, Protocol};
use super::layout;
use crate::GuestRam;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Selectors that the 64-bit boot protocol asks for: __BOOT_CS, __BOOT_DS, and a task behind them.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA_32: u64 = 0x00cf_9300_0000_ffff;
const TASK_32: u64 = 0x0000_8b00_0000_0067;

const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;

fn gdt(protocol: Protocol) -> [u64; 5] {
    let code = match protocol {
        Protocol::Linux64 => CODE_64,
        Protocol::Pvh => CODE_32,
    };
    [0, 0, code, DATA_32, TASK_32]
}

/// Writes the descriptors that the segment registers were loaded from.
pub(crate) fn write_gdt(mem: &GuestRam, protocol: Protocol) -> Result<(), BootError> {
    let table: Vec<u8> = gdt(protocol).into_iter().flat_map(u64::to_le_bytes).collect();
    mem.write_slice(&table, GuestAddress(layout::GDT)).map_err(|_| BootError::Memory("the GDT"))
}

/// Maps the first GiB, or as many as the kernel reaches into, one to one.
pub(crate) fn write_page_tables(mem: &GuestRam, kernel_end: u64) -> Result<(), BootError> {
    let gibs = kernel_end.div_ceil(GIB).clamp(1, 4);
    let directories = (0..gibs).map(|i| (layout::PAGE_DIRECTORIES + i * 0x1000) | PRESENT_WRITABLE);
    let pages = (0..gibs * GIB / LARGE_PAGE).map(|i| (i * LARGE_PAGE) | LARGE | PRESENT_WRITABLE);
    for (at, entries) in [
        (layout::PML4, vec![layout::PDPT | PRESENT_WRITABLE]),
        (layout::PDPT, directories.collect()),
        (layout::PAGE_DIRECTORIES, pages.collect()),
    ] {
        let bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
        mem.write_slice(&bytes, GuestAddress(at))
            .map_err(|_| BootError::Memory("the page tables"))?;
    }
    Ok(())
}

/// General registers at the first instruction.
pub(crate) fn regs(entry: &Entry) -> kvm_regs {
    let regs = kvm_regs { rip: entry.addr, rflags: 2, ..kvm_regs::default() };
    match entry.protocol {
        Protocol::Linux64 => kvm_regs {
            rsp: layout::BOOT_STACK,
            rbp: layout::BOOT_STACK,
            rsi: layout::ZERO_PAGE,
            ..regs
        },
        Protocol::Pvh => kvm_regs { rbx: layout::PVH_START_INFO, ..regs },
    }
}

/// Changes the system registers that a processor has after reset into those at the first
/// instruction.
pub(crate) fn enter(sregs: &mut kvm_sregs, protocol: Protocol) {
    let gdt = gdt(protocol);
    let segment = |selector: u16| segment(selector, gdt[usize::from(selector / 8)]);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 39;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(CODE);
    for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *data = segment(DATA);
    }
    sregs.tr = segment(TASK);
    match protocol {
        Protocol::Linux64 => {
            sregs.cr3 = layout::PML4;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        Protocol::Pvh => {
            sregs.cr4 = 0;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.efer = 0;
        }
    }
}

/// What a segment register holds after it was loaded from descriptor `d` (SDM vol. 3, 3.4.5).
fn segment(selector: u16, d: u64) -> kvm_segment {
    let bits = |at: u32, len: u32| (d >> at) & ((1 << len) - 1);
    let flag = |at: u32| u8::from(bits(at, 1) != 0);
    let limit = bits(0, 16) | bits(48, 4) << 16;
    let is_in_pages = bits(55, 1) != 0;
    kvm_segment {
        base: bits(16, 24) | bits(56, 8) << 24,
        limit: u32::try_from(if is_in_pages { limit << 12 | 0xfff } else { limit }).unwrap_or(0),
        selector,
        type_: u8::try_from(bits(40, 4)).unwrap_or(0),
        present: flag(47),
        dpl: u8::try_from(bits(45, 2)).unwrap_or(0),
        db: flag(54),
        s: flag(44),
        l: flag(53),
        g: flag(55),
        avl: flag(52),
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_follow_their_descriptors() {
        let code = segment(CODE, CODE_64);
        assert_eq!(
            (code.type_, code.l, code.db, code.g, code.s, code.present),
            (11, 1, 0, 1, 1, 1)
        );
        assert_eq!((code.base, code.limit), (0, 0xffff_ffff));
        let task = segment(TASK, TASK_32);
        assert_eq!((task.type_, task.s, task.limit, task.g), (11, 0, 0x67, 0));
    }

    #[test]
    fn page_tables_reach_as_far_as_the_kernel() {
        let mem = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&mem, (2 << 30) + 1).unwrap();
        let entry = |at: u64| mem.read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!(entry(layout::PML4), layout::PDPT | 3);
        assert_eq!(entry(layout::PDPT + 16), (layout::PAGE_DIRECTORIES + 0x2000) | 3);
        assert_eq!(entry(layout::PDPT + 24), 0);
        assert_eq!(entry(layout::PAGE_DIRECTORIES + 0x2ff8), ((3 << 30) - LARGE_PAGE) | 0x83);
    }
}
