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

use super::{Line, Power, read_bytes, write_bytes};
use crate::bus::BusDeviceMut;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// The controller and its keyboard.
pub struct I8042 {
    line: Box<dyn Line>,
    power: Arc<dyn Power>,
    control: u8,
    expect: Expect,
    last_was_command: bool,
    queue: VecDeque<u8>,
}

impl std::fmt::Debug for I8042 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("I8042")
            .field("control", &self.control)
            .field("expect", &self.expect)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

impl I8042 {
    /// A controller whose IRQ 1 is `line`.
    pub fn new(line: Box<dyn Line>, power: Arc<dyn Power>) -> Self {
        Self {
            line,
            power,
            control: CTR_KEYBOARD_INTERRUPT | CTR_SYSTEM | CTR_AUX_DISABLED,
            expect: Expect::Keyboard,
            last_was_command: false,
            queue: VecDeque::with_capacity(QUEUE_LEN),
        }
    }

    /// Presses and releases Ctrl-Alt-Del; false if the guest has switched the keyboard off or has
    /// not read what was typed before.
    pub fn ctrl_alt_del(&mut self) -> bool {
        let keys = match self.control & CTR_TRANSLATE {
            0 => CTRL_ALT_DEL_SET_2,
            _ => CTRL_ALT_DEL_SET_1,
        };
        let room = QUEUE_LEN.saturating_sub(self.queue.len());
        if self.control & CTR_KEYBOARD_DISABLED != 0 || keys.len() > room {
            return false;
        }
        self.keyboard_sends(keys);
        true
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.queue.pop_front().unwrap_or(0);
        if !self.queue.is_empty() {
            self.interrupt();
        }
        byte
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED;
        if !self.queue.is_empty() {
            status |= STATUS_OUTPUT_FULL;
        }
        if self.control & CTR_SYSTEM != 0 {
            status |= STATUS_SYSTEM;
        }
        if self.last_was_command {
            status |= STATUS_LAST_WAS_COMMAND;
        }
        status
    }

    fn command(&mut self, command: u8) {
        self.last_was_command = true;
        self.expect = Expect::Keyboard;
        match command {
            0x20 => self.send(self.control),
            0x60 => self.expect = Expect::ControlByte,
            0xa7 => self.control |= CTR_AUX_DISABLED,
            0xa8 => self.control &= !CTR_AUX_DISABLED,
            // Test the mouse port: its clock line is stuck low, so there is no mouse. To answer at
            // once spares Linux half a second of waiting for nothing.
            0xa9 => self.send(0x01),
            0xaa => self.send(0x55),
            0xab => self.send(0x00),
            0xad => self.control |= CTR_KEYBOARD_DISABLED,
            0xae => self.control &= !CTR_KEYBOARD_DISABLED,
            0xd0 => self.send(OUTPUT_PORT_NOT_RESET | OUTPUT_PORT_A20),
            0xd1 => self.expect = Expect::OutputPort,
            // Loop a byte as if the keyboard or the mouse had sent it. It never bears the mouse's
            // mark, which tells Linux, again at once, that there is no mouse.
            0xd2 | 0xd3 => self.expect = Expect::Loop,
            0xd4 => self.expect = Expect::Aux,
            // Pulse the output lines whose bits are clear; line 0 is reset.
            0xf0..=0xff if command & OUTPUT_PORT_NOT_RESET == 0 => self.power.reset(),
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        self.last_was_command = false;
        match std::mem::replace(&mut self.expect, Expect::Keyboard) {
            Expect::Keyboard => self.keyboard(byte),
            Expect::KeyboardArgument => self.keyboard_sends(&[ACK]),
            Expect::ControlByte => {
                self.control = byte;
                if !self.queue.is_empty() {
                    self.interrupt();
                }
            }
            Expect::OutputPort if byte & OUTPUT_PORT_NOT_RESET == 0 => self.power.reset(),
            Expect::OutputPort | Expect::Aux => {}
            Expect::Loop => self.send(byte),
        }
    }

    fn keyboard(&mut self, command: u8) {
        match command {
            // LEDs, scan code set, repeat rate: each with an argument.
            0xed | 0xf0 | 0xf3 => {
                self.expect = Expect::KeyboardArgument;
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
        let was_empty = self.queue.is_empty();
        if bytes.len() > QUEUE_LEN.saturating_sub(self.queue.len()) {
            return;
        }
        self.queue.extend(bytes);
        if was_empty {
            self.interrupt();
        }
    }

    /// Queues what the controller itself answers: drivers poll for that.
    fn send(&mut self, byte: u8) {
        if self.queue.len() < QUEUE_LEN {
            self.queue.push_back(byte);
        }
    }

    fn interrupt(&self) {
        if self.control & CTR_KEYBOARD_INTERRUPT != 0 {
            self.line.raise();
        }
    }
}

impl BusDeviceMut for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |register| match register {
            DATA => self.read_data(),
            COMMAND => self.status(),
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |register, value| match register {
            DATA => self.data(value),
            COMMAND => self.command(value),
            _ => {}
        });
    }
}
