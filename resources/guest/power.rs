//! Ends the VM: off or reset by the ACPI registers FADT names (ACPI 6.5, 4.8.3.7), reset by the keyboard controller.

use crate::acpi::{self, Register};
use crate::{boot, memory, ring0};

/// SLP_TYP of `\_S5`; `info` checks it against the DSDT.
pub const S5_SLEEP_TYPE: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;
const I8042_COMMAND: u16 = 0x64;
const I8042_PULSE_RESET: u8 = 0xfe;

/// Turns the machine off. Where no ACPI says how, a reset is the next best end.
pub fn poweroff() -> ! {
    if let Some(register) = boot::current().and_then(acpi::fadt).and_then(|fadt| fadt.sleep_control)
    {
        write(register, S5_SLEEP_TYPE << 2 | SLEEP_ENABLE);
    }
    reset_i8042()
}

/// Resets the machine.
pub fn reboot() -> ! {
    reset_acpi();
    reset_i8042()
}

/// Resets by FADT's register; returns if there is none or it did nothing.
pub fn reset_acpi() {
    if let Some((register, value)) =
        boot::current().and_then(acpi::fadt).and_then(|fadt| fadt.reset)
    {
        write(register, value);
    }
}

/// Resets by the keyboard controller, and halts if that did nothing.
pub fn reset_i8042() -> ! {
    ring0::out8(I8042_COMMAND, I8042_PULSE_RESET);
    ring0::halt()
}

fn write(register: Register, value: u8) {
    match register {
        Register::Port(port) => ring0::out8(port, value),
        Register::Memory(address) => memory::mmio_write8(address as usize, value),
    }
}
