//! Reads entropy in several sizes and checks that it is not constant. Options: `nth=0`, `rounds=1`.
#![no_std]
#![no_main]

use rt::virtio::{self, Buffer};
use rt::{BootInfo, Outcome, clock, ensure, memory, options, println};

rt::entry!(run);

const TIMEOUT_US: u64 = 5_000_000;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let nth = options::number(boot.cmdline, "nth", 0) as usize;
    let device = virtio::find(boot.cmdline, virtio::ID_RNG, nth)?;
    device.negotiate(0)?;
    let mut queue = device.queue(0, 64)?;
    device.start()?;

    let data = memory::allocate(1 << 16);
    let mut total = 0_u64;
    for _ in 0..options::number(boot.cmdline, "rounds", 1) {
        for size in [1, 7, 64, 512, 4096, 1 << 16] {
            data.fill(0);
            let wanted = Buffer::writable(&mut data[..size]);
            let len = queue.round_trip(&[wanted], TIMEOUT_US)? as usize;
            ensure!((1..=size).contains(&len), "{len} bytes for {size}");
            ensure!(data[len..].iter().all(|&b| b == 0), "bytes beyond {len} were written");
            // 64 equal random bytes do not happen.
            let is_constant = data[..len].iter().all(|&b| b == data[0]);
            ensure!(len < 64 || !is_constant, "all {len} bytes are {:#x}", data[0]);
            println!("read={size} got={len}");
            total += len as u64;
        }
    }
    println!("bytes={total}");
    Ok(())
}
