//! Walks the registers of every virtio-mmio device: identity, status rules, queue selection, the configuration's end, and
//! every offset of the first 512 bytes at every width, reads and writes. Option `light` leaves that walk out.
#![no_std]
#![no_main]

use rt::memory::*;
use rt::virtio::{self, Device, reg, status};
use rt::{BootInfo, Outcome, clock, ensure, options, println};

rt::entry!(run);

/// A feature bit that virtio 1.2 has not given to anything, among those for the transport.
const UNKNOWN_FEATURE: u64 = 1 << 50;
const BEFORE_FEATURES: u32 = status::ACKNOWLEDGE | status::DRIVER;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let mut count = 0;
    for device in virtio::devices(boot.cmdline) {
        if device.id() == 0 {
            continue;
        }
        println!("device={:#x} id={}", device.base, device.id());
        identity(&device)?;
        features(&device)?;
        queues(&device)?;
        configuration_end(&device)?;
        if !options::has(boot.cmdline, "light") {
            walk(&device)?;
        }
        reset(&device)?;
        device.negotiate(0)?;
        device.reset()?;
        count += 1;
    }
    println!("devices={count}");
    ensure!(count > 0, "no devices");
    Ok(())
}

fn identity(device: &Device) -> Outcome {
    let magic = device.read(reg::MAGIC);
    ensure!(magic == virtio::MAGIC, "magic {magic:#x}");
    let version = device.read(reg::VERSION);
    ensure!(version == 2, "version {version}");
    println!("vendor={:#x}", device.read(reg::VENDOR_ID));
    for register in [reg::MAGIC, reg::VERSION, reg::DEVICE_ID, reg::VENDOR_ID] {
        let before = device.read(register);
        device.write(register, !before);
        ensure!(device.read(register) == before, "register {register:#x} can be written");
    }
    Ok(())
}

/// Virtio 1.2, 2.1 and 3.1.1: FEATURES_OK stays clear where the driver took what was not offered.
fn features(device: &Device) -> Outcome {
    device.reset()?;
    let offered = device.features();
    println!("features={offered:#x}");
    ensure!(offered & virtio::F_VERSION_1 != 0, "VERSION_1 is not offered");
    ensure!(offered & UNKNOWN_FEATURE == 0, "feature bit 50 is offered");
    device.write(reg::DEVICE_FEATURES_SEL, 2);
    let beyond = device.read(reg::DEVICE_FEATURES);
    ensure!(beyond == 0, "features 64-95 are {beyond:#x}");

    device.set_status(status::ACKNOWLEDGE);
    device.set_status(BEFORE_FEATURES);
    device.set_features(virtio::F_VERSION_1 | UNKNOWN_FEATURE);
    device.set_status(BEFORE_FEATURES | status::FEATURES_OK);
    let after = device.status();
    ensure!(after & status::FEATURES_OK == 0, "FEATURES_OK for a bit not offered: {after:#x}");

    device.reset()?;
    device.set_status(BEFORE_FEATURES);
    device.set_features(0);
    device.set_status(BEFORE_FEATURES | status::FEATURES_OK);
    println!("features_ok_without_version_1={}", device.status() & status::FEATURES_OK != 0);

    device.negotiate(0)?;
    device.set_features(virtio::F_VERSION_1 | UNKNOWN_FEATURE);
    let after = device.status();
    ensure!(after & status::FEATURES_OK != 0, "features changed after FEATURES_OK: {after:#x}");
    device.reset()
}

fn queues(device: &Device) -> Outcome {
    device.negotiate(0)?;
    let mut count = 0;
    for index in 0..64 {
        device.write(reg::QUEUE_SEL, index);
        let max = device.read(reg::QUEUE_NUM_MAX);
        if max == 0 {
            break;
        }
        ensure!(max <= 32768, "queue {index} has {max} entries");
        ensure!(device.read(reg::QUEUE_READY) == 0, "queue {index} is ready after a reset");
        count += 1;
    }
    println!("queues={count}");
    for index in [count, 0xff, 0xffff, 0x1_0000, u32::MAX] {
        device.write(reg::QUEUE_SEL, index);
        let (max, ready) = (device.read(reg::QUEUE_NUM_MAX), device.read(reg::QUEUE_READY));
        ensure!(max == 0 && ready == 0, "queue {index:#x}: max {max}, ready {ready}");
        device.write(reg::QUEUE_NUM, 16);
        device.write(reg::QUEUE_READY, 1);
        device.write(reg::QUEUE_NOTIFY, index);
    }
    device.reset()
}

/// Beyond the device's configuration structure there is nothing to read.
fn configuration_end(device: &Device) -> Outcome {
    for offset in (0x80..device.size - reg::CONFIG).step_by(0x40) {
        let value = device.config32(offset);
        ensure!(value == 0, "configuration at {offset:#x} is {value:#x}");
    }
    for at in [device.base + device.size - 4, device.base + device.size - 1] {
        ensure!(mmio_read8(at) == 0, "byte at {at:#x} is {:#x}", mmio_read8(at));
    }
    Ok(())
}

/// All offsets, widths and a few values; what matters is that the device still is what it was.
fn walk(device: &Device) -> Outcome {
    let begin = clock::now_us();
    let mut accesses = 0;
    for offset in 0..0x200.min(device.size) {
        let at = device.base + offset;
        let _ = (mmio_read8(at), mmio_read16(at), mmio_read32(at), mmio_read64(at));
        for value in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
            mmio_write8(at, value as u8);
            mmio_write16(at, value as u16);
            mmio_write32(at, value as u32);
            mmio_write64(at, value);
            accesses += 4;
        }
        accesses += 4;
        // DRIVER_OK may have come by one of the writes: no queue was ever ready, and it does not stay.
        if offset & 15 == 15 {
            device.reset()?;
        }
    }
    println!("walked={accesses} us={}", clock::now_us() - begin);
    identity(device)
}

fn reset(device: &Device) -> Outcome {
    device.reset()?;
    ensure!(device.read(reg::INTERRUPT_STATUS) == 0, "interrupts pending after a reset");
    device.write(reg::QUEUE_SEL, 0);
    ensure!(device.read(reg::QUEUE_READY) == 0, "queue 0 ready after a reset");
    println!("reset=ok");
    Ok(())
}
