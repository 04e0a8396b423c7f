//! Reads and writes where no device is: ports and MMIO, every width; reads must give all ones and writes do nothing.
//! Options: `from=0x1000`, `to=0x10000`, `step=0xfb` ports; `mmio=0xd0000000` page; `any` only counts answers that are
//! not all ones (for a scan across devices) instead of failing.
#![no_std]
#![no_main]

use core::arch::asm;

use rt::acpi::{self, Register};
use rt::memory::*;
use rt::{BootInfo, Outcome, clock, ensure, options, println, ring0};

rt::entry!(run);

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let number = |key, default| options::number(boot.cmdline, key, default);
    let (from, to) = (number("from", 0x1000), number("to", 0x1_0000).min(0x1_0000));
    let step = number("step", 0xfb).max(1) as usize;
    let claimed = power_ports(boot);
    let (mut ports, mut mismatches) = (0, 0);
    for port in (from..to).step_by(step).map(|p| p as u16) {
        // An access of 4 bytes reaches three ports further.
        if claimed.iter().flatten().any(|&c| (port..port.saturating_add(4)).contains(&c)) {
            continue;
        }
        let before = mismatches;
        mismatches += u32::from(ring0::in8(port) != u8::MAX);
        mismatches += u32::from(ring0::in16(port) != u16::MAX);
        mismatches += u32::from(ring0::in32(port) != u32::MAX);
        ring0::out8(port, 0x5a);
        ring0::out16(port, 0x5a5a);
        ring0::out32(port, 0x5a5a_5a5a);
        if mismatches != before && mismatches <= 10 {
            println!("port={port:#x} in8={:#x}", ring0::in8(port));
        }
        ports += 1;
    }
    println!("ports={ports}");
    println!("mismatches={mismatches}");
    let may_answer = options::has(boot.cmdline, "any");
    ensure!(may_answer || mismatches == 0, "{mismatches} port reads are not all ones");
    strings(from as u16)?;
    mmio(number("mmio", 0xd000_0000) as usize)
}

/// The ports that would turn this machine off.
fn power_ports(boot: &BootInfo) -> [Option<u16>; 4] {
    let port = |register| match register {
        Some(Register::Port(port)) => Some(port),
        _ => None,
    };
    let fadt = acpi::fadt(boot);
    let reset = port(fadt.and_then(|f| f.reset).map(|(register, _)| register));
    let control = port(fadt.and_then(|f| f.sleep_control));
    [Some(0x64), reset, control, port(fadt.and_then(|f| f.sleep_status))]
}

/// `rep insb` and `rep outsb`, a page each.
fn strings(port: u16) -> Outcome {
    let page = allocate(4096);
    ring0::in_bytes(port, page);
    ensure!(page.iter().all(|&b| b == 0xff), "rep insb at {port:#x} is not all ones");
    ring0::out_bytes(port, page);
    println!("strings=ok");
    Ok(())
}

fn mmio(page: usize) -> Outcome {
    let mut accesses = 0;
    for offset in [0, 1, 2, 4, 0x7fc, 0xff8, 0xffd] {
        let at = page + offset;
        mmio_write8(at, 0);
        mmio_write16(at, 0);
        mmio_write32(at, 0);
        mmio_write64(at, 0);
        ensure!(mmio_read8(at) == u8::MAX, "1 byte at {at:#x}: {:#x}", mmio_read8(at));
        ensure!(mmio_read16(at) == u16::MAX, "2 bytes at {at:#x}: {:#x}", mmio_read16(at));
        ensure!(mmio_read32(at) == u32::MAX, "4 bytes at {at:#x}: {:#x}", mmio_read32(at));
        ensure!(mmio_read64(at) == u64::MAX, "8 bytes at {at:#x}: {:#x}", mmio_read64(at));
        accesses += 8;
    }
    let (before, wide): (u32, [u64; 2]);
    let mut lanes = [0; 2];
    // SAFETY: a hole in the address space; what a locked read-modify-write and a 16-byte load make of it is the test.
    unsafe {
        let mut value = 1_u32;
        asm!("lock xadd [{}], {:e}", in(reg) page, inout(reg) value);
        before = value;
        asm!(
            "movdqu xmm0, [{at}]",
            "movdqu [{lanes}], xmm0",
            at = in(reg) page,
            lanes = in(reg) &raw mut lanes,
            out("xmm0") _,
        );
        wide = lanes;
    }
    ensure!(before == u32::MAX, "lock xadd at {page:#x} read {before:#x}");
    ensure!(wide == [u64::MAX; 2], "16 bytes at {page:#x}: {wide:x?}");
    println!("mmio={}", accesses + 2);
    Ok(())
}
