//! Prints a greeting and ends the VM in the way `how=` says:
//! poweroff (default), reboot-acpi, reboot-i8042, triple, ud-no-idt, no-cr3, hang, hlt, unclaimed, internal-error,
//! wild-jump.
#![no_std]
#![no_main]

use core::arch::naked_asm;

use rt::{BootInfo, Outcome, fail, memory, options, power, println, ring0};

rt::entry!(run);

/// In the hole between RAM and devices on a machine that puts its devices at 0xc0000000 or above 0xf0000000.
const UNCLAIMED: usize = 0xd000_0000;

fn run(boot: &'static BootInfo) -> Outcome {
    let how = options::value(boot.cmdline, "how").unwrap_or("poweroff");
    println!("hello=world");
    println!("protocol={}", boot.protocol);
    println!("how={how}");
    if how == "unclaimed" {
        memory::mmio_write32(UNCLAIMED, 1);
        println!("mmio={:#x}", memory::mmio_read32(UNCLAIMED));
        println!("port={:#x}", ring0::in8(0x1234));
        return Ok(());
    }
    let in_ring_0: ring0::Function = match how {
        "poweroff" => return Ok(()),
        "reboot-acpi" => {
            println!("RESULT ok");
            power::reset_acpi();
            fail!("no reset register, or it did nothing");
        }
        "reboot-i8042" => {
            println!("RESULT ok");
            power::reset_i8042()
        }
        "hang" => loop {
            core::hint::spin_loop();
        },
        "hlt" => ring0::halt(),
        "triple" => page_fault_without_idt,
        "ud-no-idt" => ud2_without_idt,
        "no-cr3" => no_page_tables,
        "internal-error" => unknown_to_the_emulator,
        "wild-jump" => jump_outside_ram,
        _ => fail!("how={how} is unknown"),
    };
    // SAFETY: none of them returns, which is their purpose.
    let returned = unsafe { ring0::call(in_ring_0, 0, 0, 0) };
    fail!("survived {how}: {returned:x?}")
}

#[unsafe(naked)]
unsafe extern "C" fn page_fault_without_idt() {
    naked_asm!("push 0", "push 0", "lidt [rsp]", "mov rax, -4096", "mov eax, [rax]", "ret")
}

#[unsafe(naked)]
unsafe extern "C" fn ud2_without_idt() {
    naked_asm!("push 0", "push 0", "lidt [rsp]", "ud2")
}

#[unsafe(naked)]
unsafe extern "C" fn no_page_tables() {
    naked_asm!("mov eax, 0xd0000000", "mov cr3, rax", "2: jmp 2b")
}

/// An SSE instruction whose operand is MMIO has to be emulated, which KVM cannot do; at ring 0 it says so to the
/// monitor, at ring 3 it would raise #UD.
#[unsafe(naked)]
unsafe extern "C" fn unknown_to_the_emulator() {
    naked_asm!("mov eax, 0xd0000000", "paddd xmm0, [rax]", "ret")
}

#[unsafe(naked)]
unsafe extern "C" fn jump_outside_ram() {
    naked_asm!("mov eax, 0xd0000000", "jmp rax")
}
