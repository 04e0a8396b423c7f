//! Resets a block device with reads in flight and checks that none of them touches memory once the reset is done; then
//! `resets=1000` resets back to back, bringing it up `ups=10` times, ordinary I/O. Options: `nth=0`, `rounds=20`.
#![no_std]
#![no_main]

use rt::block::{self, Block};
use rt::virtio::Buffer;
use rt::{BootInfo, Outcome, clock, ensure, memory, options, println};

rt::entry!(run);

const LEN: usize = 128 << 10;
const IN_FLIGHT: usize = 16;
const CANARY: u8 = 0xc5;
/// How long a completion would have to come late.
const QUIET_US: u64 = 10_000;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let number = |key, default| options::number(boot.cmdline, key, default);
    let mut disk = Block::open(boot.cmdline, number("nth", 0) as usize)?;
    let sectors = (LEN as u64) / block::SECTOR;
    ensure!(disk.sectors >= sectors * IN_FLIGHT as u64, "the disk is too small");
    let data = memory::allocate(LEN * IN_FLIGHT);

    let rounds = number("rounds", 20);
    for round in 0..rounds {
        for (slot, part) in (0..disk.slots()).zip(data.chunks_mut(LEN)) {
            let sector = u64::from(slot) * sectors;
            disk.submit(slot, block::READ, sector, Some(Buffer::writable(part)));
        }
        disk.queue.notify();
        // From at once to somewhere in the middle.
        clock::delay_us(round % 10 * 20);
        disk.device.reset()?;
        data.fill(CANARY);
        let used = disk.queue.used;
        // SAFETY: the used ring's index.
        let before = unsafe { used.add(1).read_volatile() };
        clock::delay_us(QUIET_US);
        // SAFETY: as above.
        let after = unsafe { used.add(1).read_volatile() };
        ensure!(
            before == after,
            "round {round}: used index {before} became {after} after the reset"
        );
        let touched = data.iter().position(|&b| b != CANARY);
        ensure!(touched.is_none(), "round {round}: byte {touched:?} written after the reset");
        disk.reopen()?;
    }
    println!("rounds={rounds}");

    let resets = number("resets", 1000);
    let begin = clock::now_us();
    for _ in 0..resets {
        disk.device.set_status(0);
    }
    println!("resets={resets} us={}", clock::now_us() - begin);
    for _ in 0..number("ups", 10) {
        disk.reopen()?;
        disk.device.reset()?;
    }
    disk.reopen()?;
    for sector in [0, disk.sectors - 1] {
        disk.read(sector, &mut data[..block::SECTOR as usize])?;
    }
    println!("read=ok");
    Ok(())
}
