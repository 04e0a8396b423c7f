//! M1, M6, M7 for what is no virtio device: serial port, keyboard controller, clock, ACPI registers.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use devices::backend::console::Console;
use devices::bus::{BusDevice, BusDeviceMut};
use devices::legacy::acpi::Acpi;
use devices::legacy::boot_timer::BootTimer;
use devices::legacy::generation::Generation;
use devices::legacy::i8042::I8042;
use devices::legacy::rtc::Rtc;
use devices::legacy::serial::Serial;
use devices::legacy::{Line, Power, i8042, serial};

use crate::allocator;
use crate::bench::alone;

/// What a device may have taken in the end, whatever was done to it.
const GROWTH_MAX: usize = 256 << 10;
const WIDTHS: [usize; 4] = [1, 2, 4, 8];
const VALUES: [[u8; 8]; 4] =
    [[0; 8], [1, 0, 0, 0, 0, 0, 0, 0], [0xff; 8], [0x5a, 0xc3, 0x17, 0x88, 0x6d, 0xf1, 0x2e, 0x94]];

/// Counts what the guest did to the machine.
#[derive(Debug, Default)]
struct Counted {
    off: AtomicUsize,
    reset: AtomicUsize,
}

impl Power for Counted {
    fn off(&self) {
        self.off.fetch_add(1, Ordering::Relaxed);
    }
    fn reset(&self) {
        self.reset.fetch_add(1, Ordering::Relaxed);
    }
}

fn line() -> Box<dyn Line> {
    Box::new(Arc::<AtomicUsize>::default())
}

/// A port whose other end is a pipe that nobody reads.
fn stuck_serial() -> Arc<Mutex<Serial>> {
    let (port, input) = Serial::new(line(), Console::pty().unwrap()).unwrap();
    // The worker keeps the port's other side.
    std::mem::forget(input);
    port
}

/// Every device, and how many bytes of address space it has.
fn all(power: &Arc<Counted>) -> Vec<(&'static str, u64, Box<dyn BusDevice>)> {
    fn shared(device: impl BusDeviceMut + 'static) -> Box<dyn BusDevice> {
        Box::new(Mutex::new(device))
    }
    let keyboard = I8042::new(line(), power.clone(), Arc::default());
    let serial = stuck_serial();
    struct Shared(Arc<Mutex<Serial>>);
    impl BusDevice for Shared {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.read(offset, data);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.write(offset, data);
        }
    }
    vec![
        ("serial", serial::LEN, Box::new(Shared(serial))),
        ("i8042", i8042::LEN, shared(keyboard)),
        ("rtc", 2, shared(Rtc::new(|| 1_700_000_000))),
        ("acpi", 0x10, shared(Acpi::new(line(), power.clone()))),
        ("boot_timer", 1, shared(BootTimer::start())),
        ("generation", 0x1000, shared(Generation::new([7; 16], false))),
    ]
}

/// M1 of the others: every offset in and just behind, every width, reads and writes.
#[test]
fn m1_every_offset_and_width_of_ports() {
    let _alone = alone();
    let power = Arc::<Counted>::default();
    for (name, len, device) in all(&power) {
        let before = allocator::live();
        for offset in 0..len.min(0x200) + 8 {
            for width in WIDTHS {
                let mut data = vec![0xaa; width];
                device.read(offset, &mut data);
                for value in VALUES {
                    device.write(offset, &value[..width]);
                }
            }
        }
        let grown = allocator::live().saturating_sub(before);
        assert!(grown < GROWTH_MAX, "{name}: {grown}");
        println!("m1_every_offset_and_width/{name}: Rejected");
    }
    assert_eq!(power.off.load(Ordering::Relaxed), 0, "none of these values powers off");
}

/// M6: every register and value, in each mode that a register puts the port in.
#[test]
fn m6_every_register_and_value_of_the_serial_port() {
    let _alone = alone();
    let port = stuck_serial();
    // Loopback, divisor latch, FIFO resets, all interrupts: (register, value) before the walk.
    for (mode, setup) in [
        ("plain", &[][..]),
        ("loopback", &[(4, 0x10)]),
        ("divisor_latch", &[(3, 0x80)]),
        ("fifo_reset", &[(2, 0x07)]),
        ("all_interrupts", &[(1, 0x0f)]),
        ("loopback_and_interrupts", &[(1, 0x0f), (4, 0x1f)]),
    ] {
        let before = allocator::live();
        for register in 0..serial::LEN {
            for value in 0..=255 {
                for (register, value) in setup {
                    port.write(*register, &[*value]);
                }
                port.write(register, &[value]);
                let mut data = [0];
                (0..serial::LEN).for_each(|register| port.read(register, &mut data));
            }
        }
        let grown = allocator::live().saturating_sub(before);
        assert!(grown < GROWTH_MAX, "{mode}: {grown}");
        println!("m6_every_register_and_value/serial/{mode}: Rejected");
    }
}

/// M6: loopback brings back no more than the FIFO holds, and interrupts are one for each byte at most.
#[test]
fn m6_loopback_flood_stays_in_the_fifo() {
    let _alone = alone();
    let raised = Arc::new(AtomicUsize::new(0));
    let (port, _input) = Serial::new(Box::new(raised.clone()), Console::none().unwrap()).unwrap();
    port.write(1, &[0x0f]);
    port.write(4, &[0x10]);
    let before = allocator::live();
    for _ in 0..100_000 {
        port.write(0, b"x");
    }
    assert!(allocator::live().saturating_sub(before) < 4096);
    let mut data = [0];
    let mut count = 0;
    loop {
        port.read(5, &mut data);
        if data[0] & 1 == 0 {
            break;
        }
        port.read(0, &mut data);
        count += 1;
        assert!(count <= serial::FIFO_LEN, "more came back than the FIFO holds");
    }
    assert!(raised.load(Ordering::Relaxed) <= 200_001);
    println!("m6_loopback_flood/serial: Rejected");
}

/// M7: every command, with every argument. The one that resets does so once each time, no other does.
#[test]
fn m7_every_command_of_the_keyboard_controller() {
    let _alone = alone();
    let power = Arc::<Counted>::default();
    let device = Mutex::new(I8042::new(line(), power.clone(), Arc::default()));
    let before = allocator::live();
    let mut data = [0];
    for command in 0..=255u8 {
        let resets = power.reset.load(Ordering::Relaxed);
        device.write(4, &[command]);
        let has_reset = power.reset.load(Ordering::Relaxed) - resets;
        // Virtio is not the only thing with pulses: 0xf0 to 0xff pulse lines of the output port, and line
        // 0 is the reset.
        let expected = usize::from(command >= 0xf0 && command & 1 == 0);
        assert_eq!(has_reset, expected, "{command:#x}");
        if command == 0xd1 {
            // Its argument is the output port itself.
            device.write(0, &[0xff]);
            continue;
        }
        for argument in 0..=255u8 {
            device.write(4, &[command]);
            device.write(0, &[argument]);
            device.read(0, &mut data);
            device.read(4, &mut data);
        }
        println!("m7_command_{command:#x}/i8042: Rejected");
    }
    assert!(allocator::live().saturating_sub(before) < GROWTH_MAX);
    assert_eq!(power.off.load(Ordering::Relaxed), 0);
}

/// M7: a million reads cost nothing and change nothing.
#[test]
fn m7_a_million_reads_of_the_keyboard_controller() {
    let _alone = alone();
    let device = Mutex::new(I8042::new(line(), Arc::<Counted>::default(), Arc::default()));
    let before = allocator::live();
    let mut data = [0];
    for port in (0..i8042::LEN).cycle().take(1_000_000) {
        device.read(port, &mut data);
    }
    assert!(allocator::live().saturating_sub(before) < 4096);
    println!("m7_a_million_reads/i8042: Rejected");
}
