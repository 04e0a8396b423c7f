//! Waits until the size of a block device changes, checks that the device said so, and reads the new last sector.
//! Options: `nth=0` device, `timeout_ms=60000`.
#![no_std]
#![no_main]

use rt::block::{Block, SECTOR};
use rt::virtio::reg;
use rt::{BootInfo, Outcome, clock, ensure, memory, options, println};

rt::entry!(run);

/// Interrupt status: the configuration changed (virtio 1.2, 4.2.2).
const CONFIGURATION: u32 = 2;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let number = |key, default| options::number(boot.cmdline, key, default);
    let mut disk = Block::open(boot.cmdline, number("nth", 0) as usize)?;
    let sector = memory::allocate(SECTOR as usize);
    disk.read(0, sector)?;
    println!("sectors={}", disk.sectors);
    println!("first={}", sector[0]);
    println!("ready=1");

    let before = disk.sectors;
    let timeout_us = number("timeout_ms", 60_000) * 1000;
    let changed = clock::wait_until(timeout_us, || disk.device.config64(0) != before);
    ensure!(changed, "the size has not changed");
    disk.sectors = disk.device.config64(0);
    println!("sectors={}", disk.sectors);
    let status = disk.device.read(reg::INTERRUPT_STATUS);
    ensure!(status & CONFIGURATION != 0, "interrupt status {status:#x}");
    disk.device.write(reg::INTERRUPT_ACK, status);
    disk.read(0, sector)?;
    println!("first={}", sector[0]);
    disk.read(disk.sectors - 1, sector)?;
    println!("last={}", sector[0]);
    Ok(())
}
