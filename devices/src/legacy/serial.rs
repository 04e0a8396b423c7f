//! The 16550 serial port, 8 ports from 0x3f8 on, and the worker that feeds it.
//!
//! ```text
//! guest ─► vm_superio::Serial ─► Console ─► host          (vCPU thread, one write a burst)
//! guest ◄─ FIFO, 64 bytes ◄─ SerialInput ◄─ Console ◄─ host (I/O thread)
//!             └── drained: the `room` eventfd ──┘
//! ```
//!
//! When the FIFO is full, the worker stops reading: what the host has more stays in the host's pipe
//! or terminal, however much it is, until the guest has read what it has.
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use event_manager::EventSet;
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Line, read_bytes, write_bytes};
use crate::backend::console::{Console, Counters, Input, Readiness};
use crate::bus::BusDeviceMut;
use crate::io::{Watch, Worker};

/// Ports in the block.
pub const LEN: u64 = 8;
/// Bytes the guest may have waiting to be read.
pub const FIFO_LEN: usize = 64;

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_ID: u64 = 2;
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u64 = 5;
const MODEM_CONTROL_LOOP: u8 = 1 << 4;
const INTERRUPT_ENABLE_VALID: u8 = 0x0f;
const INTERRUPT_ID_VALID: u8 = 0x07;
const LINE_STATUS_DATA_READY: u8 = 1 << 0;
const LINE_STATUS_IDLE: u8 = 0x60;

/// Why a serial port could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The saved state holds more input than the FIFO.
    #[error("saved serial port has {0} bytes of input, more than its FIFO of {FIFO_LEN}")]
    Fifo(usize),
    /// The host has no eventfd for us.
    #[error("cannot make an eventfd for the serial port")]
    EventFd(#[source] std::io::Error),
}

/// The registers, and the input the guest has not read. Bytes on their way out belong to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the registers of a 16550 by name")]
pub struct SerialState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub in_buffer: Vec<u8>,
}

/// The serial port.
pub struct Serial {
    uart: vm_superio::Serial<Edge, NoEvents, Console>,
    /// Input waits at the host because the guest has no room for it.
    is_stalled: bool,
    /// Tells the worker that there is room again.
    room: Arc<EventFd>,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial")
            .field("console", self.uart.writer())
            .field("is_stalled", &self.is_stalled)
            .finish_non_exhaustive()
    }
}

impl Serial {
    /// A port as it is after power-on, interrupting through `line`, and the worker that feeds it.
    pub fn new(
        line: Box<dyn Line>,
        console: Console,
    ) -> Result<(Arc<Mutex<Self>>, SerialInput), SerialError> {
        Self::restore(vm_superio::SerialState::default(), line, console)
    }

    /// A port as it was saved.
    pub fn from_state(
        state: SerialState,
        line: Box<dyn Line>,
        console: Console,
    ) -> Result<(Arc<Mutex<Self>>, SerialInput), SerialError> {
        Self::restore(state.into(), line, console)
    }

    /// The state to be saved.
    pub fn state(&self) -> SerialState {
        self.uart.state().into()
    }

    /// Puts the registers back to what they are after power-on. Input that the guest has not read
    /// is lost, as it would be on a real port; output is with the console already.
    pub fn reset(&mut self) {
        for register in [LINE_CONTROL, INTERRUPT_ENABLE, MODEM_CONTROL.into()] {
            self.write_register(register, 0);
        }
        while self.read_register(LINE_STATUS) & LINE_STATUS_DATA_READY != 0 {
            self.read_register(0);
        }
        self.read_register(INTERRUPT_ID);
        self.resume_input();
    }

    /// What became of the guest's output so far.
    pub fn counters(&self) -> Counters {
        self.uart.writer().counters()
    }

    /// Waits up to `deadline` until all output is with the host: for the end of a VM.
    pub fn finish(&mut self, deadline: Duration) {
        self.uart.writer_mut().finish(deadline);
    }

    fn restore(
        state: vm_superio::SerialState,
        line: Box<dyn Line>,
        console: Console,
    ) -> Result<(Arc<Mutex<Self>>, SerialInput), SerialError> {
        let host = console.events();
        let uart = vm_superio::Serial::from_state(&state, Edge(line), NoEvents, console)
            .map_err(|_| SerialError::Fifo(state.in_buffer.len()))?;
        let room = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(SerialError::EventFd)?;
        let room = Arc::new(room);
        // Input that cannot be waited for, a file, is read when there is room: now.
        let serial = Self { uart, is_stalled: false, room: room.clone() };
        serial.tell_room();
        let serial = Arc::new(Mutex::new(serial));
        let input = SerialInput { serial: serial.clone(), host, room };
        Ok((serial, input))
    }

    fn read_register(&mut self, register: u64) -> u8 {
        u8::try_from(register).map_or(0xff, |register| self.uart.read(register))
    }

    fn write_register(&mut self, register: u64, value: u8) {
        let Ok(register) = u8::try_from(register) else { return };
        if let Err(e) = self.uart.write(register, value) {
            log::debug!("serial port: {e}");
        }
    }

    /// Lets the worker go on if it waits and the guest now has room.
    fn resume_input(&mut self) {
        if self.is_stalled && self.uart.fifo_capacity() == FIFO_LEN && !self.is_looped() {
            self.is_stalled = false;
            self.tell_room();
        }
    }

    /// Moves input from the host to the FIFO until one is empty or the other full.
    fn feed(&mut self) {
        // A user who only speaks to husk fills no FIFO, but must not hold the guest up either.
        for _ in 0..Self::READS_AT_ONCE {
            // In loopback the FIFO belongs to the guest's own bytes.
            if self.uart.fifo_capacity() < 2 || self.is_looped() {
                self.is_stalled = true;
                return;
            }
            let mut buf = [0; FIFO_LEN];
            let Some(buf) = buf.get_mut(..self.uart.fifo_capacity()) else { return };
            let Input::Bytes(read) = self.uart.writer_mut().read(buf) else { return };
            let bytes = buf.get(..read).unwrap_or_default();
            if let Err(e) = self.uart.enqueue_raw_bytes(bytes) {
                log::debug!("serial input: {e}");
            }
        }
        self.tell_room();
    }

    /// Reads of the host in one go, before others have their turn.
    const READS_AT_ONCE: u32 = 16;

    fn is_looped(&mut self) -> bool {
        self.uart.read(MODEM_CONTROL) & MODEM_CONTROL_LOOP != 0
    }

    fn tell_room(&self) {
        if let Err(e) = self.room.write(1) {
            log::warn!("serial input stops: {e}");
        }
    }
}

impl BusDeviceMut for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |register| self.read_register(register));
        self.resume_input();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |register, value| self.write_register(register, value));
        if offset == DATA {
            self.uart.writer_mut().flush();
        }
        self.resume_input();
    }

    fn write_burst(&mut self, offset: u64, width: usize, data: &[u8]) {
        for item in data.chunks(width) {
            write_bytes(offset, item, |register, value| self.write_register(register, value));
        }
        // One write to the host for all of them.
        self.uart.writer_mut().flush();
        self.resume_input();
    }
}

/// The data half: carries input to the port, and output on when the host is ready again.
#[derive(Debug)]
pub struct SerialInput {
    serial: Arc<Mutex<Serial>>,
    host: Arc<Readiness>,
    room: Arc<EventFd>,
}

impl SerialInput {
    const ROOM: usize = 1;

    fn serial(&self) -> MutexGuard<'_, Serial> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Worker for SerialInput {
    fn sources(&self) -> Vec<(&dyn std::os::fd::AsRawFd, EventSet)> {
        vec![(&*self.host, EventSet::IN), (&*self.room, EventSet::IN)]
    }

    fn ready(&mut self, source: usize) -> Watch {
        if source == Self::ROOM
            && let Err(e) = self.room.read()
        {
            log::debug!("serial port has no room after all: {e}");
        }
        let mut serial = self.serial();
        serial.uart.writer_mut().ready();
        serial.feed();
        Watch::Keep
    }
}

/// A line as vm-superio wants it.
struct Edge(Box<dyn Line>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.raise();
        Ok(())
    }
}

impl From<vm_superio::SerialState> for SerialState {
    fn from(state: vm_superio::SerialState) -> Self {
        Self {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }
}

/// Saved state is not to be trusted: bits that follow from others are made, not read.
impl From<SerialState> for vm_superio::SerialState {
    fn from(state: SerialState) -> Self {
        let data_ready = if state.in_buffer.is_empty() { 0 } else { LINE_STATUS_DATA_READY };
        Self {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable & INTERRUPT_ENABLE_VALID,
            interrupt_identification: state.interrupt_identification & INTERRUPT_ID_VALID,
            line_control: state.line_control,
            line_status: LINE_STATUS_IDLE | data_ready,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }
}
