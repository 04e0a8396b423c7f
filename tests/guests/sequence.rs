//! Writes sectors with numbers that grow, and flushes after every few: then says `flushed=N` on the serial port, N the last
//! number that the device has said is safe. Sector `N % sectors` holds number N in each of its words. Goes on for ever.
#![no_std]
#![no_main]

use rt::block::{self, Block, SECTOR};
use rt::{BootInfo, Outcome, clock, ensure, memory, println};

rt::entry!(run);

/// Sectors between two flushes.
const BATCH: u64 = 4;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let mut disk = Block::open(boot.cmdline, 0)?;
    ensure!(disk.features & block::F_FLUSH != 0, "the device has no flush");
    let sector = memory::allocate(SECTOR as usize);
    println!("ready=1");
    let mut number = 0_u64;
    loop {
        for _ in 0..BATCH {
            number += 1;
            for word in sector.chunks_exact_mut(8) {
                word.copy_from_slice(&number.to_le_bytes());
            }
            disk.write(number % disk.sectors, sector)?;
        }
        let (status, _) = disk.request(block::FLUSH, 0, None)?;
        ensure!(status == block::OK, "flush: status {status}");
        println!("flushed={number}");
    }
}
