//! The PS/2 controller of a PC with a keyboard and no mouse: ports 0x60 (data) and 0x64 (status,
//! command). It is there for two things, reset and Ctrl-Alt-Del, and answers just enough for a
//! driver to find the keyboard at once. Nothing here waits: the input buffer is never full.
//!
//! ```text
//! command port ─► controller ─┐                         ┌─ data port, one byte a read
//! data port ────► keyboard ───┴► queue, 16 bytes at most┴─ IRQ 1 for each byte, if enabled
//! ```
use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Line, Power, read_bytes, write_bytes};
use crate::bus::BusDeviceMut;
use crate::counters;

/// Ports from 0x60 on. Those between data and status read as ones, as if nobody had them: Linux
/// looks at 0x61 to calibrate against a PIT, and must find at once that there is none.
pub const LEN: u64 = 5;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_LAST_WAS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;

const CTR_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const CTR_SYSTEM: u8 = 1 << 2;
const CTR_KEYBOARD_DISABLED: u8 = 1 << 4;
const CTR_AUX_DISABLED: u8 = 1 << 5;
const CTR_TRANSLATE: u8 = 1 << 6;

const OUTPUT_PORT_NOT_RESET: u8 = 1 << 0;
const OUTPUT_PORT_A20: u8 = 1 << 1;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;

/// Linux takes a controller that holds more for broken (`I8042_BUFFER_SIZE`).
const QUEUE_LEN: usize = 16;

/// Ctrl, Alt and Del pressed, then released, in scan code set 2.
const CTRL_ALT_DEL_SET_2: &[u8] =
    &[0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];
/// The same as the controller translates it, in set 1.
const CTRL_ALT_DEL_SET_1: &[u8] = &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];

/// Whose argument the next byte on the data port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Expect {
    /// Nobody's: it is a keyboard command.
    Keyboard,
    /// Of a keyboard command that only wants to be acknowledged.
    KeyboardArgument,
    /// The new control byte.
    ControlByte,
    /// The new output port.
    OutputPort,
    /// A byte to be sent back.
    Loop,
    /// A byte for the mouse that is not there.
    Aux,
}

/// All there is to save: the control byte, what the next data byte means, what is to be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I8042State {
    control: u8,
    expect: Expect,
    last_was_command: bool,
    queue: VecDeque<u8>,
}

impl Default for I8042State {
    fn default() -> Self {
        Self {
            control: CTR_KEYBOARD_INTERRUPT | CTR_SYSTEM | CTR_AUX_DISABLED,
            expect: Expect::Keyboard,
            last_was_command: false,
            queue: VecDeque::with_capacity(QUEUE_LEN),
        }
    }
}

counters! {
    /// What is counted.
    pub struct Counters as "i8042" {
        /// Bytes that the guest read.
        read_count: Counter,
        /// Bytes that the guest wrote.
        write_count: Counter,
        /// Reads of ports that lead nowhere.
        missed_read_count: Counter,
        /// Writes to ports that lead nowhere.
        missed_write_count: Counter,
        /// Times the guest reset the machine.
        reset_count: Counter,
        /// Answers and keys that were lost because the guest did not read.
        error_count: Counter,
    }
}

/// The controller and its keyboard.
pub struct I8042 {
    line: Box<dyn Line>,
    power: Arc<dyn Power>,
    counters: Arc<Counters>,
    state: I8042State,
}

impl std::fmt::Debug for I8042 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("I8042").field("state", &self.state).finish_non_exhaustive()
    }
}

impl I8042 {
    /// A controller whose IRQ 1 is `line`. `counters` go on when the machine is made anew.
    pub fn new(line: Box<dyn Line>, power: Arc<dyn Power>, counters: Arc<Counters>) -> Self {
        Self { line, power, counters, state: I8042State::default() }
    }

    /// The state to be saved.
    pub fn state(&self) -> I8042State {
        self.state.clone()
    }

    /// Goes on as saved; the guest is told again of what it has not read.
    pub fn set_state(&mut self, state: I8042State) {
        self.state = state;
        self.state.queue.truncate(QUEUE_LEN);
        if !self.state.queue.is_empty() {
            self.interrupt();
        }
    }

    /// Presses and releases Ctrl-Alt-Del; false if the guest has switched the keyboard off or has
    /// not read what was typed before.
    pub fn ctrl_alt_del(&mut self) -> bool {
        let keys = match self.state.control & CTR_TRANSLATE {
            0 => CTRL_ALT_DEL_SET_2,
            _ => CTRL_ALT_DEL_SET_1,
        };
        let room = QUEUE_LEN.saturating_sub(self.state.queue.len());
        if self.state.control & CTR_KEYBOARD_DISABLED != 0 || keys.len() > room {
            return false;
        }
        self.keyboard_sends(keys);
        true
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.state.queue.pop_front().unwrap_or(0);
        if !self.state.queue.is_empty() {
            self.interrupt();
        }
        byte
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED;
        if !self.state.queue.is_empty() {
            status |= STATUS_OUTPUT_FULL;
        }
        if self.state.control & CTR_SYSTEM != 0 {
            status |= STATUS_SYSTEM;
        }
        if self.state.last_was_command {
            status |= STATUS_LAST_WAS_COMMAND;
        }
        status
    }

    fn command(&mut self, command: u8) {
        self.state.last_was_command = true;
        self.state.expect = Expect::Keyboard;
        match command {
            0x20 => self.send(self.state.control),
            0x60 => self.state.expect = Expect::ControlByte,
            0xa7 => self.state.control |= CTR_AUX_DISABLED,
            0xa8 => self.state.control &= !CTR_AUX_DISABLED,
            // Test the mouse port: its clock line is stuck low, so there is no mouse. To answer at
            // once spares Linux half a second of waiting for nothing.
            0xa9 => self.send(0x01),
            0xaa => self.send(0x55),
            0xab => self.send(0x00),
            0xad => self.state.control |= CTR_KEYBOARD_DISABLED,
            0xae => self.state.control &= !CTR_KEYBOARD_DISABLED,
            0xd0 => self.send(OUTPUT_PORT_NOT_RESET | OUTPUT_PORT_A20),
            0xd1 => self.state.expect = Expect::OutputPort,
            // Loop a byte as if the keyboard or the mouse had sent it. It never bears the mouse's
            // mark, which tells Linux, again at once, that there is no mouse.
            0xd2 | 0xd3 => self.state.expect = Expect::Loop,
            0xd4 => self.state.expect = Expect::Aux,
            // Pulse the output lines whose bits are clear; line 0 is reset.
            0xf0..=0xff if command & OUTPUT_PORT_NOT_RESET == 0 => self.reset(),
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        self.state.last_was_command = false;
        match std::mem::replace(&mut self.state.expect, Expect::Keyboard) {
            Expect::Keyboard => self.keyboard(byte),
            Expect::KeyboardArgument => self.keyboard_sends(&[ACK]),
            Expect::ControlByte => {
                self.state.control = byte;
                if !self.state.queue.is_empty() {
                    self.interrupt();
                }
            }
            Expect::OutputPort if byte & OUTPUT_PORT_NOT_RESET == 0 => self.reset(),
            Expect::OutputPort | Expect::Aux => {}
            Expect::Loop => self.send(byte),
        }
    }

    fn keyboard(&mut self, command: u8) {
        match command {
            // LEDs, scan code set, repeat rate: each with an argument.
            0xed | 0xf0 | 0xf3 => {
                self.state.expect = Expect::KeyboardArgument;
                self.keyboard_sends(&[ACK]);
            }
            0xee => self.keyboard_sends(&[0xee]),
            0xf2 => self.keyboard_sends(&[ACK, 0xab, 0x83]),
            // Enable, disable, defaults.
            0xf4..=0xf6 => self.keyboard_sends(&[ACK]),
            0xff => self.keyboard_sends(&[ACK, 0xaa]),
            _ => self.keyboard_sends(&[RESEND]),
        }
    }

    /// Queues what the keyboard sends, all of it or nothing, and interrupts if the guest has
    /// nothing else to read first.
    fn keyboard_sends(&mut self, bytes: &[u8]) {
        let was_empty = self.state.queue.is_empty();
        if bytes.len() > QUEUE_LEN.saturating_sub(self.state.queue.len()) {
            return self.counters.error_count().inc();
        }
        self.state.queue.extend(bytes);
        if was_empty {
            self.interrupt();
        }
    }

    /// Queues what the controller itself answers: drivers poll for that.
    fn send(&mut self, byte: u8) {
        if self.state.queue.len() < QUEUE_LEN {
            self.state.queue.push_back(byte);
        } else {
            self.counters.error_count().inc();
        }
    }

    fn reset(&self) {
        self.counters.reset_count().inc();
        self.power.reset();
    }

    fn interrupt(&self) {
        if self.state.control & CTR_KEYBOARD_INTERRUPT != 0 {
            self.line.raise();
        }
    }
}

impl BusDeviceMut for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |register| match register {
            DATA | COMMAND => {
                self.counters.read_count().inc();
                if register == DATA { self.read_data() } else { self.status() }
            }
            _ => {
                self.counters.missed_read_count().inc();
                0xff
            }
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |register, value| match register {
            DATA | COMMAND => {
                self.counters.write_count().inc();
                if register == DATA { self.data(value) } else { self.command(value) }
            }
            _ => self.counters.missed_write_count().inc(),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::testing::Counted;
    use super::*;

    struct Rig {
        i8042: I8042,
        line: Arc<AtomicUsize>,
        power: Arc<Counted>,
    }

    impl Rig {
        fn new() -> Self {
            let (line, power) = (Arc::new(AtomicUsize::new(0)), Arc::new(Counted::default()));
            let i8042 = I8042::new(Box::new(line.clone()), power.clone(), Arc::default());
            Self { i8042, line, power }
        }

        fn inb(&mut self, port: u64) -> u8 {
            let mut data = [0];
            self.i8042.read(port - 0x60, &mut data);
            data[0]
        }

        fn outb(&mut self, port: u64, value: u8) {
            self.i8042.write(port - 0x60, &[value]);
        }

        /// What is to be read, and how often IRQ 1 was raised until all of it was.
        fn drain(&mut self) -> (Vec<u8>, usize) {
            let mut bytes = Vec::new();
            while self.inb(0x64) & STATUS_OUTPUT_FULL != 0 {
                bytes.push(self.inb(0x60));
            }
            (bytes, self.line.swap(0, Ordering::Relaxed))
        }

        fn ask(&mut self, command: u8) -> Vec<u8> {
            self.outb(0x64, command);
            self.drain().0
        }

        fn ask_keyboard(&mut self, command: u8) -> (Vec<u8>, usize) {
            self.outb(0x60, command);
            self.drain()
        }

        fn set_control(&mut self, control: u8) {
            self.outb(0x64, 0x60);
            self.outb(0x60, control);
        }
    }

    /// What `drivers/input/serio/i8042.c` does to find the controller and no mouse, and then
    /// `atkbd.c` to find the keyboard.
    #[test]
    fn linux_finds_the_keyboard() {
        let mut rig = Rig::new();
        assert_eq!(rig.inb(0x64) & STATUS_OUTPUT_FULL, 0, "i8042_flush");
        assert_ne!(rig.inb(0x64) & STATUS_UNLOCKED, 0, "not locked");
        let control = rig.ask(0x20);
        assert_eq!(control, [0x25]);
        rig.set_control((control[0] | CTR_KEYBOARD_DISABLED) & !CTR_KEYBOARD_INTERRUPT);
        assert_eq!(rig.ask(0x20), [0x34]);
        assert_eq!(rig.ask(0xaa), [0x55], "i8042_controller_selftest");

        rig.outb(0x64, 0xd3);
        rig.outb(0x60, 0x5a);
        assert_eq!(rig.inb(0x64) & 0x20, 0, "not from the mouse: no mouse");
        assert_eq!(rig.drain().0, [0x5a]);
        let test = rig.ask(0xa9);
        assert!(![0, 0xfa, 0xff].contains(&test[0]), "no mouse");

        rig.set_control((0x34 & !CTR_KEYBOARD_DISABLED) | CTR_KEYBOARD_INTERRUPT);
        assert_eq!(rig.ask_keyboard(0xf2), (vec![ACK, 0xab, 0x83], 3));
        assert_eq!(rig.ask_keyboard(0xf5), (vec![ACK], 1));
        for (command, argument) in [(0xed, 0), (0xf3, 0x0b), (0xf0, 2)] {
            assert_eq!(rig.ask_keyboard(command), (vec![ACK], 1));
            assert_eq!(rig.ask_keyboard(argument), (vec![ACK], 1));
        }
        assert_eq!(rig.ask_keyboard(0xf4), (vec![ACK], 1));
        assert_eq!(rig.ask_keyboard(0xff), (vec![ACK, 0xaa], 2));
        assert_eq!(rig.ask_keyboard(0xee), (vec![0xee], 1));
        assert_eq!(rig.power.get(), (0, 0));
    }

    #[test]
    fn ctrl_alt_del_comes_byte_by_byte() {
        let mut rig = Rig::new();
        assert!(rig.i8042.ctrl_alt_del());
        assert_eq!(rig.line.load(Ordering::Relaxed), 1, "one interrupt, then one a byte read");
        let expected = CTRL_ALT_DEL_SET_2.to_vec();
        assert_eq!(rig.drain(), (expected.clone(), expected.len()));

        rig.set_control(CTR_KEYBOARD_INTERRUPT | CTR_TRANSLATE);
        assert!(rig.i8042.ctrl_alt_del());
        assert_eq!(rig.drain(), (CTRL_ALT_DEL_SET_1.to_vec(), CTRL_ALT_DEL_SET_1.len()));
    }

    #[test]
    fn ctrl_alt_del_does_not_interrupt_who_does_not_want_it() {
        let mut rig = Rig::new();
        rig.set_control(0);
        assert!(rig.i8042.ctrl_alt_del());
        assert_eq!(rig.line.load(Ordering::Relaxed), 0);
        assert!(!rig.i8042.ctrl_alt_del(), "not read yet");
        rig.set_control(CTR_KEYBOARD_INTERRUPT);
        assert_eq!(rig.line.load(Ordering::Relaxed), 1, "waiting bytes interrupt when enabled");
        assert_eq!(rig.drain().0, CTRL_ALT_DEL_SET_2);

        rig.outb(0x64, 0xad);
        assert!(!rig.i8042.ctrl_alt_del());
        rig.outb(0x64, 0xae);
        assert!(rig.i8042.ctrl_alt_del());
    }

    #[test]
    fn only_pulses_of_line_0_reset() {
        for command in 0..=255 {
            let mut rig = Rig::new();
            rig.outb(0x64, command);
            let resets = usize::from(command >= 0xf0 && command & 1 == 0);
            assert_eq!(rig.power.get(), (0, resets), "{command:#x}");
        }
        for value in 0..=255 {
            let mut rig = Rig::new();
            rig.outb(0x64, 0xd1);
            rig.outb(0x60, value);
            assert_eq!(rig.power.get(), (0, usize::from(value & 1 == 0)), "{value:#x}");
        }
    }

    #[test]
    fn every_command_and_argument_leaves_it_bounded_and_working() {
        for command in 0..=255 {
            for argument in 0..=255 {
                let mut rig = Rig::new();
                for port in [0x60, 0x64] {
                    rig.outb(port, command);
                    rig.outb(0x60, argument);
                }
                let (bytes, _) = rig.drain();
                assert!(bytes.len() <= QUEUE_LEN);
                assert_eq!(rig.ask(0xaa), [0x55]);
            }
        }
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut rig = Rig::new();
        for _ in 0..1000 {
            rig.outb(0x60, 0xf2);
            rig.outb(0x64, 0xaa);
        }
        assert_eq!(rig.drain().0.len(), QUEUE_LEN);
    }

    #[test]
    fn a_million_reads_are_harmless() {
        let mut rig = Rig::new();
        for _ in 0..1_000_000 {
            assert_eq!(rig.inb(0x60), 0);
            assert_eq!(rig.inb(0x64), STATUS_UNLOCKED | STATUS_SYSTEM);
        }
        assert_eq!(rig.line.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_ports_between_read_as_ones() {
        let mut rig = Rig::new();
        for port in [0x61, 0x62, 0x63] {
            rig.outb(port, 0xfe);
            assert_eq!(rig.inb(port), 0xff);
        }
        let mut wide = [0; 4];
        rig.i8042.read(0, &mut wide);
        assert_eq!(wide, [0, 0xff, 0xff, 0xff]);
        assert_eq!(rig.power.get(), (0, 0));
    }

    #[test]
    fn goes_on_as_saved() {
        let mut rig = Rig::new();
        rig.set_control(CTR_KEYBOARD_INTERRUPT | CTR_TRANSLATE);
        assert!(rig.i8042.ctrl_alt_del());
        rig.outb(0x64, 0xd2);
        let json = serde_json::to_string(&rig.i8042.state()).unwrap();

        let mut restored = Rig::new();
        restored.i8042.set_state(serde_json::from_str(&json).unwrap());

        assert_eq!(restored.i8042.state(), rig.i8042.state());
        restored.outb(0x60, 7);
        let (bytes, interrupts) = restored.drain();
        assert_eq!(bytes, [CTRL_ALT_DEL_SET_1, &[7]].concat());
        assert_eq!(interrupts, bytes.len());
    }

    #[test]
    fn a_saved_queue_too_long_is_cut() {
        let mut state = I8042State::default();
        state.queue.extend([1; 1000]);
        let mut rig = Rig::new();
        rig.i8042.set_state(state);
        assert_eq!(rig.drain().0, [1; QUEUE_LEN]);
    }
}
