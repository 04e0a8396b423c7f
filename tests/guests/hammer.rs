//! Floods the devices for `ms=1000`. `mode=kick` (default): notifications of queue 0 of the first device; `mode=random`:
//! accesses of random offset, width and value to all devices, repeatable by `seed=1`, with queue addresses kept inside
//! a scratch area so that the guest survives what it asks for; `mode=hole`: unaligned and page-crossing accesses next
//! to the devices.
#![no_std]
#![no_main]

use rt::memory::*;
use rt::virtio::{self, Device, reg};
use rt::{BootInfo, Failure, Outcome, clock, ensure, fail, options, println};

rt::entry!(run);

const MAX_DEVICES: usize = 32;
const SCRATCH: usize = 1 << 20;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let mut devices = [Device { base: 0, size: 0, irq: 0 }; MAX_DEVICES];
    let mut count = 0;
    for device in virtio::devices(boot.cmdline).filter(|d| d.is_present()).take(MAX_DEVICES) {
        devices[count] = device;
        count += 1;
    }
    let devices = &devices[..count];
    ensure!(count > 0, "no devices");
    let flood: fn(&[Device], &mut Random) -> u64 =
        match options::value(boot.cmdline, "mode").unwrap_or("kick") {
            "kick" => {
                devices[0].negotiate(0)?;
                devices[0].queue(0, 64)?;
                devices[0].start()?;
                kick
            }
            "random" => random,
            "hole" => hole,
            mode => fail!("mode={mode} is unknown"),
        };
    let mut state = Random::new(options::number(boot.cmdline, "seed", 1));
    let begin = clock::now_us();
    let end = begin + options::number(boot.cmdline, "ms", 1000) * 1000;
    let mut accesses = 0;
    while clock::now_us() < end {
        accesses += flood(devices, &mut state);
    }
    let us = clock::now_us() - begin;
    println!("accesses={accesses} us={us} per_second={}", accesses * 1_000_000 / us);
    devices.iter().try_for_each(survives)
}

fn survives(device: &Device) -> Result<(), Failure> {
    device.reset()?;
    ensure!(device.is_present(), "the device at {:#x} is gone", device.base);
    device.negotiate(0)?;
    device.reset()
}

fn kick(devices: &[Device], _: &mut Random) -> u64 {
    for _ in 0..100 {
        devices[0].write(reg::QUEUE_NOTIFY, 0);
    }
    100
}

fn random(devices: &[Device], random: &mut Random) -> u64 {
    let device = devices[random.below(devices.len())];
    let offset = random.below(0x200.min(device.size));
    let at = device.base + offset;
    let value = random.value();
    if (0x74..reg::CONFIG_GENERATION).contains(&offset) {
        // Whatever the device takes for a ring has to be ours to lose.
        let register = [reg::QUEUE_DESC, reg::QUEUE_DRIVER, reg::QUEUE_DEVICE][random.below(3)];
        device.write(register, (random.scratch + random.below(SCRATCH / 2)) as u32);
        device.write(register + 4, 0);
        return 2;
    }
    match random.below(8) {
        0 => mmio_write8(at, value as u8),
        1 => mmio_write16(at, value as u16),
        2 => mmio_write32(at, value as u32),
        // Small numbers mean something to more registers.
        3 => mmio_write32(at & !3, value as u32 & 15),
        4 => drop(mmio_read8(at)),
        5 => drop(mmio_read16(at)),
        6 => drop(mmio_read32(at)),
        _ => drop(mmio_read64(at)),
    }
    1
}

fn hole(devices: &[Device], random: &mut Random) -> u64 {
    let device = devices[random.below(devices.len())];
    let edge = [device.base, device.base + device.size][random.below(2)];
    let at = edge.wrapping_add(random.below(16)).wrapping_sub(8);
    let _ = (mmio_read16(at), mmio_read32(at), mmio_read64(at));
    3
}

/// Xorshift, and the area given away.
struct Random {
    state: u64,
    scratch: usize,
}

impl Random {
    fn new(seed: u64) -> Self {
        let scratch = allocate(SCRATCH).as_ptr() as usize;
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, scratch }
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn value(&mut self) -> u64 {
        match self.below(4) {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            _ => self.next(),
        }
    }
}
