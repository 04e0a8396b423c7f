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
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use event_manager::EventSet;
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::EventFd;

use super::{Line, read_bytes, write_bytes};
use crate::backend::console::{self, Console, ConsoleError, Input, Readiness};
use crate::bus::BusDeviceMut;
use crate::counters;
use crate::io::{Watch, Worker};
use crate::limiter::TokenBucket;
use crate::observer::{Happening, Observer};
use crate::sync::{Mutex, MutexGuard};
use crate::sys::again::eventfd;

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
/// Room to send, or something to read.
const INTERRUPT_ID_PENDING: u8 = 0x06;
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
    /// The host has no descriptors for us.
    #[error(transparent)]
    Console(#[from] ConsoleError),
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

counters! {
    /// What is counted, bytes unless it says otherwise.
    pub struct Counters as "uart" {
        /// Bytes that the guest read.
        read_count: Counter,
        /// Bytes that the guest wrote.
        write_count: Counter,
        /// Bytes for the guest that were lost because it did not read.
        missed_read_count: Counter,
        /// Bytes of the guest that the host did not take.
        missed_write_count: Counter,
        /// Bytes of the guest that were lost to a rate limit.
        rate_limiter_dropped_bytes: Counter,
        /// Times output was handed to the host.
        flush_count: Counter,
        /// Accesses that the port refused.
        error_count: Counter,
    }
}

/// Counts what vm-superio tells of.
struct Tally(Arc<Counters>);

impl SerialEvents for Tally {
    fn buffer_read(&self) {
        self.0.read_count().inc();
    }
    fn out_byte(&self) {
        self.0.write_count().inc();
    }
    fn tx_lost_byte(&self) {
        self.0.missed_write_count().inc();
    }
    fn in_buffer_empty(&self) {}
}

/// The serial port.
pub struct Serial {
    uart: vm_superio::Serial<Edge, Tally, Console>,
    counters: Arc<Counters>,
    /// What the console had told when it was counted last.
    counted: console::Counters,
    observer: Option<Arc<dyn Observer>>,
    had_client: bool,
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

    /// Goes on as saved. Output is with the console already, and input that waits there stays.
    pub fn set_state(&mut self, state: SerialState) -> Result<(), SerialError> {
        let line = self.uart.interrupt_evt().0.clone();
        self.go_on(state, line)
    }

    /// Raises the interrupt again if the guest has not seen to it, once the interrupt controllers have
    /// their state: see [`MmioTransport::tell_again`](crate::virtio::mmio::MmioTransport::tell_again).
    pub fn tell_again(&self) {
        if self.uart.state().interrupt_identification & INTERRUPT_ID_PENDING != 0 {
            self.uart.interrupt_evt().0.raise();
        }
    }

    /// The same in another machine, interrupting through `line`. If it is refused, nothing has changed.
    pub fn move_to(&mut self, state: SerialState, line: Box<dyn Line>) -> Result<(), SerialError> {
        self.go_on(state, line.into())
    }

    /// Limits what the guest may write from now on.
    pub fn limit(&mut self, bucket: Option<&TokenBucket>) {
        self.uart.writer_mut().limit(bucket);
    }

    fn go_on(&mut self, state: SerialState, line: Arc<dyn Line>) -> Result<(), SerialError> {
        let state = vm_superio::SerialState::from(state);
        if state.in_buffer.len() > FIFO_LEN {
            return Err(SerialError::Fifo(state.in_buffer.len()));
        }
        let edge = || Edge(line.clone());
        let tally = || Tally(self.counters.clone());
        // vm-superio takes a state only with the console, and gives a console only at its end.
        let idle = self.uart.writer().stand_in();
        let idle = vm_superio::Serial::with_events(edge(), tally(), idle);
        let (edge, tally, len) = (edge(), tally(), state.in_buffer.len());
        let console = std::mem::replace(&mut self.uart, idle).into_writer();
        self.uart = vm_superio::Serial::from_state(&state, edge, tally, console)
            .map_err(|_| SerialError::Fifo(len))?;
        self.is_stalled = false;
        self.tell_room();
        Ok(())
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
    pub fn output(&self) -> console::Counters {
        self.uart.writer().counters()
    }

    /// Tells `observer` from now on of clients that come and go.
    pub fn observe(&mut self, observer: Arc<dyn Observer>) {
        self.observer = Some(observer);
    }

    /// What is counted.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Waits up to `deadline` until all output is with the host: for the end of a VM.
    pub fn finish(&mut self, deadline: Duration) {
        self.uart.writer_mut().finish(deadline);
        self.note_output();
    }

    fn restore(
        state: vm_superio::SerialState,
        line: Box<dyn Line>,
        console: Console,
    ) -> Result<(Arc<Mutex<Self>>, SerialInput), SerialError> {
        let host = console.events();
        let counters = Arc::<Counters>::default();
        let tally = Tally(counters.clone());
        let uart = vm_superio::Serial::from_state(&state, Edge(line.into()), tally, console)
            .map_err(|_| SerialError::Fifo(state.in_buffer.len()))?;
        let room = eventfd().map_err(SerialError::EventFd)?;
        let room = Arc::new(room);
        // Input that cannot be waited for, a file, is read when there is room: now.
        let serial = Self {
            uart,
            counters,
            counted: console::Counters::default(),
            observer: None,
            had_client: false,
            is_stalled: false,
            room: room.clone(),
        };
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
            self.counters.error_count().inc();
            log::debug!("serial port: {e}");
        }
    }

    /// Hands what the guest wrote to the host.
    fn flush(&mut self) {
        self.counters.flush_count().inc();
        self.uart.writer_mut().flush();
        self.note_output();
    }

    /// Counts what was lost, and tells of a client that has come or gone.
    fn note_output(&mut self) {
        let (now, before) = (self.output(), self.counted);
        self.counters.missed_write_count().add(now.dropped.saturating_sub(before.dropped));
        let limited = now.limited.saturating_sub(before.limited);
        self.counters.rate_limiter_dropped_bytes().add(limited);
        self.counted = now;
        let has_client = self.uart.writer().has_client();
        if has_client != std::mem::replace(&mut self.had_client, has_client)
            && let Some(observer) = &self.observer
        {
            observer.notice(if has_client {
                Happening::Connected
            } else {
                Happening::Disconnected
            });
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
            if self.uart.fifo_capacity() == 0 || self.is_looped() {
                self.is_stalled = true;
                if self.uart.writer_mut().read_ahead() {
                    continue;
                }
                return;
            }
            let mut buf = [0; FIFO_LEN];
            let Some(buf) = buf.get_mut(..self.uart.fifo_capacity()) else { return };
            let Input::Bytes(read) = self.uart.writer_mut().read(buf) else { return };
            let bytes = buf.get(..read).unwrap_or_default();
            if let Err(e) = self.uart.enqueue_raw_bytes(bytes) {
                self.counters.missed_read_count().add(bytes.len() as u64);
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
            self.flush();
        }
        self.resume_input();
    }

    fn write_burst(&mut self, offset: u64, width: usize, data: &[u8]) {
        for item in data.chunks(width) {
            write_bytes(offset, item, |register, value| self.write_register(register, value));
        }
        // One write to the host for all of them.
        self.flush();
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
        serial.note_output();
        serial.feed();
        // The end of a client's input is the end of the client.
        serial.note_output();
        Watch::Keep
    }
}

/// A line as vm-superio wants it.
struct Edge(Arc<dyn Line>);

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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::io::IoThread;

    const IER: u64 = INTERRUPT_ENABLE;
    const IIR: u64 = INTERRUPT_ID;
    const FCR: u64 = 2;
    const LCR: u64 = LINE_CONTROL;
    const MCR: u64 = 4;
    const LSR: u64 = LINE_STATUS;

    /// A port that leads to a socket with a client.
    struct Rig {
        serial: Arc<Mutex<Serial>>,
        input: SerialInput,
        line: Arc<AtomicUsize>,
        user: UnixStream,
    }

    impl Rig {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("husk-serial-{name}-{}", std::process::id()));
            let console = Console::socket(&path).unwrap();
            let user = UnixStream::connect(&path).unwrap();
            let line = Arc::new(AtomicUsize::new(0));
            let (serial, input) = Serial::new(Box::new(line.clone()), console).unwrap();
            let mut rig = Self { serial, input, line, user };
            rig.run();
            rig
        }

        /// Does what the I/O thread would, until there is nothing more to do.
        fn run(&mut self) -> usize {
            let mut runs = 0;
            loop {
                let sources = self.input.sources();
                let ready = sources.iter().position(|(fd, _)| is_readable(fd.as_raw_fd()));
                let Some(ready) = ready else { return runs };
                assert_eq!(self.input.ready(ready), Watch::Keep);
                runs += 1;
                assert!(runs < 1000, "spins");
            }
        }

        fn inb(&self, register: u64) -> u8 {
            inb(&self.serial, register)
        }

        fn outb(&self, register: u64, value: u8) {
            self.serial.lock().unwrap().write(register, &[value]);
        }

        fn received(&self) -> Vec<u8> {
            received(&self.serial)
        }

        fn interrupts(&self) -> usize {
            self.line.swap(0, Ordering::Relaxed)
        }
    }

    fn is_readable(fd: i32) -> bool {
        let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
        let mut event = vmm_sys_util::epoll::EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(vmm_sys_util::epoll::ControlOperation::Add, fd, event).unwrap();
        epoll.wait(0, std::slice::from_mut(&mut event)).unwrap() == 1
    }

    fn inb(serial: &Mutex<Serial>, register: u64) -> u8 {
        let mut data = [0];
        serial.lock().unwrap().read(register, &mut data);
        data[0]
    }

    fn received(serial: &Mutex<Serial>) -> Vec<u8> {
        let mut bytes = Vec::new();
        while inb(serial, LSR) & LINE_STATUS_DATA_READY != 0 {
            bytes.push(inb(serial, DATA));
        }
        bytes
    }

    #[test]
    fn carries_bytes_both_ways() {
        let mut rig = Rig::new("both");
        rig.outb(IER, 1);
        for byte in b"out" {
            rig.outb(DATA, *byte);
        }
        rig.serial.lock().unwrap().write_burst(DATA, 1, b"put");
        let mut buf = [0; 6];
        rig.user.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"output");
        assert_eq!(rig.serial.lock().unwrap().output().written, 6);

        rig.user.write_all(b"in").unwrap();
        rig.run();
        assert_eq!(rig.interrupts(), 1);
        assert_eq!(rig.inb(IIR) & 0x0f, 4, "received data");
        assert_eq!(rig.received(), b"in");
    }

    #[test]
    fn a_full_fifo_leaves_the_rest_with_the_host() {
        let mut rig = Rig::new("full");
        let sent: Vec<u8> = (0..=255).collect();
        rig.user.write_all(&sent).unwrap();
        assert!(rig.run() < 10, "does not spin while it is full");
        assert_eq!(rig.serial.lock().unwrap().state().in_buffer, sent[..FIFO_LEN]);
        assert_eq!(rig.run(), 0);

        let mut got = Vec::new();
        for _ in 0..4 {
            got.extend(rig.received());
            rig.run();
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn loopback_keeps_input_waiting_and_loses_none() {
        let mut rig = Rig::new("loop");
        rig.outb(MCR, 0x10);
        rig.user.write_all(b"typed").unwrap();
        assert!(rig.run() < 10, "does not spin");
        for _ in 0..1000 {
            rig.outb(DATA, b'L');
        }
        assert_eq!(rig.run(), 0);
        assert_eq!(rig.received(), [b'L'; FIFO_LEN]);
        rig.outb(MCR, 0);
        rig.run();
        assert_eq!(rig.received(), b"typed");
        assert_eq!(rig.serial.lock().unwrap().output(), console::Counters::default());
    }

    #[test]
    fn every_register_takes_every_value_in_every_width() {
        let mut rig = Rig::new("registers");
        rig.user.write_all(&[b'i'; 1000]).unwrap();
        for register in 0..LEN {
            for value in 0..=255 {
                for width in [1, 2, 4, 8] {
                    if register + width > LEN {
                        continue;
                    }
                    let width = usize::try_from(width).unwrap();
                    let mut data = vec![value; width];
                    let mut serial = rig.serial.lock().unwrap();
                    serial.write(register, &data);
                    serial.read(register, &mut data);
                    assert!(serial.state().in_buffer.len() <= FIFO_LEN);
                    drop(serial);
                    rig.run();
                }
            }
        }
        rig.outb(LCR, 3);
        rig.outb(MCR, 0);
        assert_eq!(rig.inb(LSR) & LINE_STATUS_IDLE, LINE_STATUS_IDLE);
    }

    #[test]
    fn a_storm_of_fifo_resets_and_interrupt_enables_is_bounded() {
        let rig = Rig::new("storm");
        for i in 0..100_000u32 {
            rig.outb(FCR, 0xc7);
            rig.outb(IER, i.to_le_bytes()[0]);
        }
        assert!(rig.interrupts() <= 100_000, "an edge for each time it is enabled at most");
    }

    #[test]
    fn nobody_at_the_other_end_costs_only_bytes() {
        let console = Console::pty().unwrap();
        let (serial, _input) =
            Serial::new(Box::new(Arc::new(AtomicUsize::new(0))), console).unwrap();
        for _ in 0..100 {
            serial.lock().unwrap().write_burst(DATA, 1, &[b'x'; 4096]);
        }
        let counters = serial.lock().unwrap().output();
        assert_eq!(
            counters.written + counters.dropped + Console::KEPT as u64,
            100 * 4096,
            "{counters:?}"
        );
    }

    #[test]
    fn reset_forgets_input_and_lets_more_in() {
        let mut rig = Rig::new("reset");
        rig.outb(IER, 1);
        rig.user.write_all(&[b'a'; FIFO_LEN]).unwrap();
        rig.run();
        rig.outb(LCR, 0x80);
        rig.user.write_all(b"next").unwrap();
        rig.run();

        rig.serial.lock().unwrap().reset();
        rig.run();

        assert_eq!((rig.inb(IER), rig.inb(LCR)), (0, 0));
        assert_eq!(rig.received(), b"next");
    }

    #[test]
    fn is_as_it_was_saved() {
        let mut rig = Rig::new("saved");
        rig.outb(IER, 1);
        rig.outb(7, 0x5a);
        rig.user.write_all(b"waiting").unwrap();
        rig.run();
        let state = rig.serial.lock().unwrap().state();
        let json = serde_json::to_string(&state).unwrap();
        let read: SerialState = serde_json::from_str(&json).unwrap();

        let line = Arc::new(AtomicUsize::new(0));
        let (serial, _) =
            Serial::from_state(read, Box::new(line.clone()), Console::none().unwrap()).unwrap();

        assert_eq!(serial.lock().unwrap().state(), state);
        let told = line.load(Ordering::Relaxed);
        serial.lock().unwrap().tell_again();
        assert_eq!(line.load(Ordering::Relaxed), told + 1, "the guest is told again");
        assert_eq!(received(&serial), b"waiting");
        serial.lock().unwrap().tell_again();
        assert_eq!(line.load(Ordering::Relaxed), told + 1, "there is nothing any more");
        assert_eq!(inb(&serial, 7), 0x5a);
    }

    #[test]
    fn goes_back_to_what_was_saved_with_its_console() {
        let mut rig = Rig::new("rewind");
        rig.outb(IER, 1);
        rig.outb(7, 0x5a);
        rig.user.write_all(b"waiting").unwrap();
        rig.run();
        let saved = rig.serial.lock().unwrap().state();
        assert_eq!(rig.received(), b"waiting");
        rig.outb(IER, 0);
        rig.outb(7, 0);
        rig.interrupts();
        rig.serial.lock().unwrap().set_state(saved.clone()).unwrap();
        assert_eq!(rig.serial.lock().unwrap().state(), saved);
        assert_eq!(rig.interrupts(), 1, "the guest is told again");
        assert_eq!((rig.received(), rig.inb(7)), (b"waiting".to_vec(), 0x5a));
        rig.user.write_all(b"more").unwrap();
        rig.run();
        assert_eq!(rig.received(), b"more");
        rig.outb(DATA, b'!');
        let mut byte = [0];
        rig.user.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"!");
        let absurd = SerialState { in_buffer: vec![0; FIFO_LEN + 1], ..saved };
        let refusal = rig.serial.lock().unwrap().set_state(absurd).unwrap_err();
        assert!(matches!(refusal, SerialError::Fifo(65)), "{refusal}");
    }

    #[test]
    fn saved_nonsense_is_refused_or_made_sense_of() {
        let mut state = SerialState {
            baud_divisor_low: 0xff,
            baud_divisor_high: 0xff,
            interrupt_enable: 0xff,
            interrupt_identification: 0xff,
            line_control: 0xff,
            line_status: 0xff,
            modem_control: 0xff,
            modem_status: 0xff,
            scratch: 0xff,
            in_buffer: Vec::new(),
        };
        let restore = |state: &SerialState| {
            let line = Box::new(Arc::new(AtomicUsize::new(0)));
            Serial::from_state(state.clone(), line, Console::none().unwrap())
        };
        let (serial, _) = restore(&state).unwrap();
        assert_eq!(received(&serial), b"", "no data is ready when there is none");
        state.in_buffer = vec![0; FIFO_LEN + 1];
        assert!(matches!(restore(&state), Err(SerialError::Fifo(65))));
    }

    /// A paste far larger than any buffer arrives whole, with a guest that reads at its leisure.
    #[test]
    fn a_flood_of_input_is_bounded_and_complete() {
        let total: usize = std::env::var("HUSK_FLOOD").map_or(1 << 20, |n| n.parse().unwrap());
        let Rig { serial, input, line: _, user } = Rig::new("flood");
        let io = IoThread::spawn("serial").unwrap();
        io.add(Box::new(input), None).unwrap();
        let writer = std::thread::spawn(move || {
            let mut user = user;
            let chunk: Vec<u8> = (0..251).collect();
            let mut left = total;
            while left > 0 {
                let n = left.min(chunk.len());
                user.write_all(&chunk[..n]).unwrap();
                left -= n;
            }
        });
        let mut got = 0;
        while got < total {
            for byte in received(&serial) {
                assert_eq!(usize::from(byte), got % 251);
                got += 1;
            }
            std::thread::yield_now();
        }
        writer.join().unwrap();
    }

    /// Runs as a process of its own, with a terminal: the other half of the test below.
    #[test]
    #[ignore = "wants a terminal; run by a_terminal_is_raw_for_the_guest_and_restored"]
    fn echoes_on_a_terminal() {
        if std::env::var_os("HUSK_TEST").is_none() {
            return;
        }
        let (quit, has_quit) = std::sync::mpsc::channel();
        let console = Console::stdio(Box::new(move || quit.send(()).unwrap())).unwrap();
        let (serial, input) =
            Serial::new(Box::new(Arc::new(AtomicUsize::new(0))), console).unwrap();
        serial.lock().unwrap().write_burst(DATA, 1, b"<ready>");
        let io = IoThread::spawn("serial").unwrap();
        io.add(Box::new(input), None).unwrap();
        while has_quit.try_recv().is_err() {
            if std::env::var_os("HUSK_TEST_HANGS").is_some() {
                continue;
            }
            for byte in received(&serial) {
                serial.lock().unwrap().write_burst(DATA, 1, format!("[{byte}]").as_bytes());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        console::restore_terminal();
        print!("<quit>");
        std::process::exit(0);
    }

    struct Terminal {
        screen: std::fs::File,
        slave: std::os::fd::OwnedFd,
        child: std::process::Child,
    }

    impl Terminal {
        /// Runs the test above with a new controlling terminal.
        fn run(shell: &str) -> Self {
            use rustix::pty::OpenptFlags;
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let master = rustix::pty::openpt(flags).unwrap();
            rustix::pty::unlockpt(&master).unwrap();
            let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
            let stdio = || slave.try_clone().unwrap();
            let child = std::process::Command::new("setsid")
                .args(["--ctty", "--wait", "sh", "-mc", shell])
                .env("HUSK_TEST", std::env::current_exe().unwrap())
                .stdin(stdio())
                .stdout(stdio())
                .stderr(stdio())
                .spawn()
                .unwrap();
            Self { screen: std::fs::File::from(master), slave, child }
        }

        fn type_in(&mut self, bytes: &[u8]) {
            self.screen.write_all(bytes).unwrap();
        }

        /// Reads the screen until `text` is on it.
        fn wait_for(&mut self, text: &str) {
            let mut seen = Vec::new();
            while !String::from_utf8_lossy(&seen).contains(text) {
                let mut fds =
                    [rustix::event::PollFd::new(&self.screen, rustix::event::PollFlags::IN)];
                let patience = rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 };
                rustix::event::poll(&mut fds, Some(&patience)).unwrap();
                assert!(!fds[0].revents().is_empty(), "{}", String::from_utf8_lossy(&seen));
                let mut buf = [0; 256];
                let read = self.screen.read(&mut buf).unwrap();
                seen.extend(&buf[..read]);
            }
        }

        fn is_raw(&self) -> bool {
            let modes = rustix::termios::tcgetattr(&self.slave).unwrap().local_modes;
            !modes.contains(rustix::termios::LocalModes::ICANON)
        }
    }

    const CHILD: &str = "\"$HUSK_TEST\" --exact legacy::serial::tests::echoes_on_a_terminal \
                         --ignored --nocapture";

    #[test]
    fn a_terminal_is_raw_for_the_guest_and_restored() {
        let mut terminal = Terminal::run(CHILD);
        terminal.wait_for("<ready>");
        assert!(terminal.is_raw());
        // Ctrl-C, Ctrl-Z, Ctrl-D and Enter are the guest's; so is Ctrl-A before what is not ours.
        terminal.type_in(b"a\x03\x1a\x04\r");
        terminal.wait_for("[97][3][26][4][13]");
        terminal.type_in(b"\x01h");
        terminal.wait_for("Ctrl-A x: quit");
        terminal.type_in(b"\x01\x01\x01e");
        terminal.wait_for("[1][1][101]");
        terminal.type_in(b"\x01x");
        terminal.wait_for("<quit>");
        assert!(terminal.child.wait().unwrap().success());
        assert!(!terminal.is_raw());
    }

    #[test]
    fn the_escape_works_when_the_guest_hangs() {
        let mut terminal = Terminal::run(&format!("HUSK_TEST_HANGS=1 {CHILD}"));
        terminal.wait_for("<ready>");
        for _ in 0..10 {
            terminal.type_in(&[b'?'; 100]);
        }
        terminal.type_in(b"\x01h");
        terminal.wait_for("Ctrl-A x: quit");
        terminal.type_in(b"\x01x");
        terminal.wait_for("<quit>");
        assert!(terminal.child.wait().unwrap().success());
    }

    #[test]
    fn a_terminal_in_the_background_is_left_alone() {
        let mut terminal =
            Terminal::run(&format!("{CHILD} & echo shell $!; read line; echo got $line; kill %1"));
        terminal.wait_for("<ready>");
        assert!(!terminal.is_raw());
        terminal.type_in(b"for the shell\n");
        terminal.wait_for("got for the shell");
        assert!(terminal.child.wait().unwrap().success());
    }
}
