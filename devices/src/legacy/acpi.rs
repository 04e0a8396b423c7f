//! The register block of a hardware-reduced ACPI machine: power off, reset, power button.
//!
//! | offset | register                       | read                     | write                      |
//! |--------|--------------------------------|--------------------------|----------------------------|
//! | 0      | sleep control (ACPI 6.5, 4.8.3.7) | 0                     | SLP_EN with SLP_TYP 5: off |
//! | 1      | sleep status                   | 0: never woken           | ignored                    |
//! | 2      | reset                          | 0                        | [`RESET_VALUE`]: reset     |
//! | 3      | events                         | pending bits, then clear | ignored                    |
//!
//! Knows nothing of the tables that tell a guest where this block is.
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Line, Power, read_bytes, write_bytes};
use crate::bus::BusDeviceMut;

/// Ports in the block.
pub const LEN: u64 = 4;
/// Offset of the sleep control register; FADT `SLEEP_CONTROL_REG`.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register; FADT `SLEEP_STATUS_REG`.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register; FADT `RESET_REG`.
pub const RESET: u64 = 2;
/// Offset of the event register, read by the handler of the event interrupt.
pub const EVENTS: u64 = 3;
/// What resets the machine when written to [`RESET`]; FADT `RESET_VALUE`.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of S5; `\_S5` package.
pub const SLEEP_TYPE_S5: u8 = 5;
/// The power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1 << 0;
/// The VM has become another one.
pub const EVENT_GENERATION: u8 = 1 << 1;

const SLP_TYP_SHIFT: u32 = 2;
const SLP_TYP_MASK: u8 = 0b111;
const SLP_EN: u8 = 1 << 5;

/// All there is to save: the events the guest has not read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcpiState {
    pending: u8,
}

/// The register block.
pub struct Acpi {
    line: Box<dyn Line>,
    power: Arc<dyn Power>,
    state: AcpiState,
}

impl std::fmt::Debug for Acpi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acpi").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Acpi {
    /// A block whose event interrupt is `line`.
    pub fn new(line: Box<dyn Line>, power: Arc<dyn Power>) -> Self {
        Self { line, power, state: AcpiState::default() }
    }

    /// The state to be saved.
    pub fn state(&self) -> AcpiState {
        self.state
    }

    /// Goes on as saved; the guest is told again of what it has not read.
    pub fn set_state(&mut self, state: AcpiState) {
        self.state.pending = state.pending & (EVENT_POWER_BUTTON | EVENT_GENERATION);
        if self.state.pending != 0 {
            self.line.raise();
        }
    }

    /// Presses the power button: the guest is told, and decides.
    pub fn press_power_button(&mut self) {
        self.happen(EVENT_POWER_BUTTON);
    }

    /// Tells the guest to look at the generation id.
    pub fn announce_generation(&mut self) {
        self.happen(EVENT_GENERATION);
    }

    fn happen(&mut self, event: u8) {
        self.state.pending |= event;
        self.line.raise();
    }

    fn read_register(&mut self, register: u64) -> u8 {
        match register {
            EVENTS => std::mem::take(&mut self.state.pending),
            _ => 0,
        }
    }

    fn write_register(&self, register: u64, value: u8) {
        let sleep_type = (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK;
        match register {
            SLEEP_CONTROL if value & SLP_EN != 0 && sleep_type == SLEEP_TYPE_S5 => self.power.off(),
            RESET if value == RESET_VALUE => self.power.reset(),
            _ => {}
        }
    }
}

impl BusDeviceMut for Acpi {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |register| self.read_register(register));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |register, value| self.write_register(register, value));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::testing::Counted;
    use super::*;

    fn acpi() -> (Acpi, Arc<AtomicUsize>, Arc<Counted>) {
        let (line, power) = (Arc::new(AtomicUsize::new(0)), Arc::new(Counted::default()));
        (Acpi::new(Box::new(line.clone()), power.clone()), line, power)
    }

    #[test]
    fn only_s5_with_enable_powers_off_and_only_the_reset_value_resets() {
        for register in 0..LEN {
            for value in 0..=255 {
                let (mut acpi, line, power) = acpi();
                acpi.write(register, &[value]);
                let off = register == SLEEP_CONTROL && value & 0b0011_1100 == 0b0011_0100;
                let reset = register == RESET && value == RESET_VALUE;
                assert_eq!(power.get(), (off.into(), reset.into()), "{register} {value:#x}");
                assert_eq!(line.load(Ordering::Relaxed), 0);
                for register in 0..LEN {
                    let mut data = [0xff];
                    acpi.read(register, &mut data);
                    assert_eq!(data, [0]);
                }
            }
        }
    }

    #[test]
    fn power_button_raises_and_reads_once() {
        let (mut acpi, line, power) = acpi();
        acpi.press_power_button();
        acpi.press_power_button();
        let mut data = [0; 4];
        acpi.read(0, &mut data);
        assert_eq!(data, [0, 0, 0, EVENT_POWER_BUTTON]);
        acpi.read(EVENTS, &mut data[..1]);
        assert_eq!(data[0], 0);
        assert_eq!(line.load(Ordering::Relaxed), 2);
        assert_eq!(power.get(), (0, 0));
    }

    #[test]
    fn events_are_told_together() {
        let (mut acpi, line, _) = acpi();
        acpi.announce_generation();
        acpi.press_power_button();
        let mut data = [0];
        acpi.read(EVENTS, &mut data);
        assert_eq!(data, [EVENT_GENERATION | EVENT_POWER_BUTTON]);
        assert_eq!(line.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn wide_writes_reach_each_register() {
        let (mut acpi, _line, power) = acpi();
        acpi.write(0, &[0x34, 0, RESET_VALUE, 0xff]);
        assert_eq!(power.get(), (1, 1));
    }

    #[test]
    fn goes_on_as_saved() {
        let (mut saved, ..) = acpi();
        saved.press_power_button();
        let json = serde_json::to_string(&saved.state()).unwrap();
        let (mut restored, line, _) = acpi();
        restored.set_state(serde_json::from_str(&json).unwrap());
        assert_eq!(line.load(Ordering::Relaxed), 1);
        let mut data = [0];
        restored.read(EVENTS, &mut data);
        assert_eq!(data, [EVENT_POWER_BUTTON]);
    }
}
