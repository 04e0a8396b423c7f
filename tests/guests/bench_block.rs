//! Measures a block device with polled rings, as lines `name=… reqs=… us=… iops=… mb_s=…`. Options: `nth=0`, `scale=1`
//! divides the numbers of requests, `write` adds writes, which destroy what is on the disk.
#![no_std]
#![no_main]

use rt::block::{self, Block};
use rt::virtio::Buffer;
use rt::{BootInfo, Outcome, clock, ensure, memory, options, println};

rt::entry!(run);

const MAX_DEPTH: u16 = 32;
const MAX_LEN: usize = 128 << 10;
/// Some ten seconds without a completion.
const MAX_IDLE_TURNS: u64 = 300_000_000;

/// One measurement.
struct Load {
    name: &'static str,
    kind: u32,
    depth: u16,
    len: usize,
    requests: u64,
    is_random: bool,
}

const READS: [Load; 4] = [
    load("rand4k-qd1", block::READ, 1, 4096, 10_000),
    load("rand4k-qd32", block::READ, 32, 4096, 100_000),
    load("seq128k-qd1", block::READ, 1, MAX_LEN, 4_000),
    load("seq128k-qd8", block::READ, 8, MAX_LEN, 8_000),
];
const WRITES: [Load; 2] = [
    load("write-rand4k-qd32", block::WRITE, 32, 4096, 50_000),
    load("write-seq128k-qd8", block::WRITE, 8, MAX_LEN, 4_000),
];

const fn load(name: &'static str, kind: u32, depth: u16, len: usize, requests: u64) -> Load {
    Load { name, kind, depth, len, requests, is_random: len == 4096 }
}

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let number = |key, default| options::number(boot.cmdline, key, default);
    let mut disk = Block::open(boot.cmdline, number("nth", 0) as usize)?;
    println!("sectors={}", disk.sectors);
    ensure!(disk.slots() >= MAX_DEPTH, "a queue of {} is too short", disk.queue.size);
    ensure!(disk.sectors * block::SECTOR >= MAX_LEN as u64, "the disk is too small");
    let data = memory::allocate(MAX_LEN * usize::from(MAX_DEPTH));
    let scale = number("scale", 1).max(1);

    let blocks = disk.sectors * block::SECTOR / MAX_LEN as u64;
    let warm_up =
        Load { is_random: false, ..load("warm-up", block::READ, 8, MAX_LEN, blocks.min(8192)) };
    measure(&mut disk, &warm_up, 1, data)?;
    let writes = if options::has(boot.cmdline, "write") { &WRITES[..] } else { &[] };
    for load in READS.iter().chain(writes) {
        measure(&mut disk, load, scale, data)?;
    }
    Ok(())
}

fn measure(disk: &mut Block, load: &Load, scale: u64, data: &mut [u8]) -> Outcome {
    let requests = (load.requests / scale).max(1);
    let sectors = load.len as u64 / block::SECTOR;
    let blocks = disk.sectors / sectors;
    let (mut sent, mut done) = (0, 0);
    let mut random = 88_172_645_463_325_252_u64;
    let mut submit = |disk: &mut Block, slot: u16| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let block = if load.is_random { random % blocks } else { sent % blocks };
        let part = &mut data[usize::from(slot) * MAX_LEN..][..load.len];
        let buffer = match load.kind {
            block::WRITE => Buffer::readable(part),
            _ => Buffer::writable(part),
        };
        disk.submit(slot, load.kind, block * sectors, Some(buffer));
        sent += 1;
        sent == requests
    };

    let begin = clock::now_ns();
    let mut is_all_sent = false;
    for slot in 0..load.depth {
        is_all_sent = is_all_sent || submit(disk, slot);
    }
    disk.queue.kick();
    let mut idle_turns = 0_u64;
    while done < requests {
        let mut has_new = false;
        while let Some((slot, status, _)) = disk.poll() {
            ensure!(status == block::OK, "{}: status {status}", load.name);
            done += 1;
            idle_turns = 0;
            if !is_all_sent {
                is_all_sent = submit(disk, slot);
                has_new = true;
            }
        }
        if has_new {
            disk.queue.kick();
        }
        core::hint::spin_loop();
        idle_turns += 1;
        // Turns, not time: reading the clock here would show in the figures.
        ensure!(idle_turns < MAX_IDLE_TURNS, "{}: stuck at {done} of {requests}", load.name);
    }
    let us = ((clock::now_ns() - begin) / 1000).max(1);
    let (iops, mb_s) = (requests * 1_000_000 / us, requests * load.len as u64 / us);
    println!("name={} reqs={requests} us={us} iops={iops} mb_s={mb_s}", load.name);
    Ok(())
}
