//! Exercises the first serial port, a 16550: scratch, divisor and line registers, loopback. With `input=polled` or
//! `input=irq` it then prints `ready=1` and echoes what comes in, as `input=XX` in hexadecimal, until `q`.
//! `flood=N` first prints N lines of 64 characters.
#![no_std]
#![no_main]

use rt::console::Text;
use rt::{
    BootInfo, Failure, Outcome, acpi, clock, ensure, fail, interrupts, options, println, ring0,
};

rt::entry!(run);

const PORT: u16 = 0x3f8;
const DATA: u16 = PORT;
const INTERRUPT_ENABLE: u16 = PORT + 1;
const FIFO_CONTROL: u16 = PORT + 2;
const LINE_CONTROL: u16 = PORT + 3;
const MODEM_CONTROL: u16 = PORT + 4;
const LINE_STATUS: u16 = PORT + 5;
const MODEM_STATUS: u16 = PORT + 6;
const SCRATCH: u16 = PORT + 7;

const LINE_DIVISOR_LATCH: u8 = 0x80;
const LINE_8N1: u8 = 3;
const MODEM_LOOPBACK: u8 = 0x10;
const STATUS_DATA_READY: u8 = 1;
const STATUS_CAN_SEND: u8 = 0x60;
/// ISA IRQ 4, which is the I/O APIC's input 4.
const IRQ: u32 = 4;
const TIMEOUT_US: u64 = 60_000_000;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    for i in 0..options::number(boot.cmdline, "flood", 0) {
        println!("{i:064}");
    }
    registers()?;
    loopback()?;
    match options::value(boot.cmdline, "input") {
        None => Ok(()),
        Some("polled") => echo(poll),
        Some("irq") => {
            let Some(io_apic) = acpi::io_apic(boot) else { fail!("no I/O APIC") };
            interrupts::enable(io_apic, IRQ, 0);
            ring0::out8(MODEM_CONTROL, 0x0b);
            ring0::out8(INTERRUPT_ENABLE, 1);
            echo(wait_for_interrupt)
        }
        Some(how) => fail!("input={how} is unknown"),
    }
}

fn registers() -> Outcome {
    let status = ring0::in8(LINE_STATUS);
    ensure!(status & STATUS_CAN_SEND == STATUS_CAN_SEND, "line status {status:#x}");
    for value in [0x00, 0xff, 0xa5] {
        round_trip(SCRATCH, value)?;
    }
    let line = ring0::in8(LINE_CONTROL);
    ring0::out8(LINE_CONTROL, LINE_DIVISOR_LATCH | LINE_8N1);
    let latched = [(DATA, 0x0c), (INTERRUPT_ENABLE, 0x12), (DATA, 1), (INTERRUPT_ENABLE, 0)];
    let stored = latched.into_iter().try_for_each(|(port, value)| round_trip(port, value));
    // Back first, or the failure could not be printed.
    ring0::out8(LINE_CONTROL, LINE_8N1);
    stored?;
    round_trip(LINE_CONTROL, line & !LINE_DIVISOR_LATCH)?;
    println!("line_status={status:#x}");
    println!("modem_status={:#x}", ring0::in8(MODEM_STATUS));
    println!("registers=ok");
    Ok(())
}

fn round_trip(port: u16, value: u8) -> Outcome {
    ring0::out8(port, value);
    let read = ring0::in8(port);
    ensure!(read == value, "port {port:#x}: wrote {value:#x}, read {read:#x}");
    Ok(())
}

fn loopback() -> Outcome {
    ring0::out8(FIFO_CONTROL, 7);
    ring0::out8(MODEM_CONTROL, MODEM_LOOPBACK);
    let mut looped = [(0, 0); 4];
    for (i, pair) in looped.iter_mut().enumerate() {
        let sent = 0x41 + i as u8;
        ring0::out8(DATA, sent);
        let has_data = clock::wait_until(100_000, has_input);
        *pair = (sent, if has_data { ring0::in8(DATA) } else { 0 });
    }
    let is_drained = !has_input();
    ring0::out8(MODEM_CONTROL, 0);
    for (sent, read) in looped {
        ensure!(sent == read, "loopback: sent {sent:#x}, read {read:#x}");
    }
    ensure!(is_drained, "loopback leaves data ready");
    println!("loopback=ok");
    Ok(())
}

/// Echoes bytes, each batch in one line, until `q`.
fn echo(next: fn() -> Result<u8, Failure>) -> Outcome {
    println!("ready=1");
    let mut bytes = 0;
    loop {
        let mut line = Text::<256>::new();
        let mut byte = next()?;
        loop {
            bytes += 1;
            line.push(format_args!("{byte:02x}"));
            if byte == b'q' || !has_input() || line.as_bytes().len() >= 64 {
                break;
            }
            byte = ring0::in8(DATA);
        }
        println!("input={}", line.as_str());
        if byte == b'q' {
            break;
        }
    }
    println!("bytes={bytes}");
    println!("interrupts={}", interrupts::count(0));
    Ok(())
}

fn has_input() -> bool {
    ring0::in8(LINE_STATUS) & STATUS_DATA_READY != 0
}

fn poll() -> Result<u8, Failure> {
    ensure!(clock::wait_until(TIMEOUT_US, has_input), "no input");
    Ok(ring0::in8(DATA))
}

/// Looks at the port only after an interrupt. Spins rather than halts, so that a lost interrupt is a failure and not
/// a guest that sleeps for ever. The interrupt of a byte read already may come late, hence the loop.
fn wait_for_interrupt() -> Result<u8, Failure> {
    loop {
        let seen = interrupts::count(0);
        if has_input() {
            return Ok(ring0::in8(DATA));
        }
        let came = clock::wait_until(TIMEOUT_US, || interrupts::count(0) != seen);
        ensure!(came, "no interrupt");
    }
}
