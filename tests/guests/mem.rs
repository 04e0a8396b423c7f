//! A virtio-mem driver. It says `ready=1`, then follows what is requested, `steps=1` times: when the requested size
//! changes, it plugs or unplugs blocks until it fits, from the start, and writes and checks every page of what it has.
//! Each step ends with `plugged=MIB`. `tests=` picks and orders some of: steps, over, again, unplugged, poke, reset,
//! flood. `over` plugs more than is requested, `again` a block twice; `unplugged` reads two blocks that are not plugged,
//! `poke` writes to one; `flood` waits for something to be requested, then plugs and unplugs a block while a drive reads
//! into it, `rounds=100` times.
#![no_std]
#![no_main]

use rt::block::{self, Block, SECTOR};
use rt::virtio::{self, Buffer, Device, Queue};
use rt::{BootInfo, Failure, Outcome, clock, ensure, fail, memory, options, println};

rt::entry!(run);

const TIMEOUT_US: u64 = 60_000_000;
const MIB: u64 = 1 << 20;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;

const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

/// The device and what is plugged: the first `blocks` of it.
struct Job {
    device: Device,
    queue: Queue,
    block: u64,
    start: u64,
    blocks: u64,
}

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let number = |key, default| options::number(boot.cmdline, key, default);
    let device = virtio::find(boot.cmdline, virtio::ID_MEM, 0)?;
    device.negotiate(2)?;
    let queue = device.queue(0, 64)?;
    device.start()?;
    let (block, start, size) = (device.config64(0), device.config64(16), device.config64(24));
    println!("start={start:#x}");
    println!("size={}", size / MIB);
    for gib in (start..start + size).step_by(1 << 30) {
        memory::map_gib(gib);
    }
    let mut job = Job { device, queue, block, start, blocks: 0 };
    println!("ready=1");
    for test in options::value(boot.cmdline, "tests").unwrap_or("steps").split(',') {
        match test {
            "steps" => {
                for _ in 0..number("steps", 1) {
                    job.step()?;
                }
            }
            "over" => job.expect(PLUG, job.blocks, NACK)?,
            "again" => job.expect(PLUG, 0, ERROR)?,
            "unplugged" => job.read_unplugged()?,
            "poke" => job.poke(job.blocks),
            "reset" => rt::power::reboot(),
            "flood" => job.flood(boot, number("rounds", 100))?,
            _ => fail!("test {test} is unknown"),
        }
    }
    Ok(())
}

impl Job {
    fn ask(&mut self, kind: u16, first: u64, count: u16) -> Result<u16, Failure> {
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        let addr = self.start + first * self.block;
        request[8..16].copy_from_slice(&addr.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        let mut answer = [0xee; 10];
        let buffers = [Buffer::readable(&request), Buffer::writable(&mut answer)];
        let used = self.queue.round_trip(&buffers, TIMEOUT_US)?;
        ensure!(used == 10, "an answer of {used} bytes");
        // SAFETY: the device has written it behind the compiler's back.
        let answer = unsafe { (&raw const answer).read_volatile() };
        Ok(u16::from_le_bytes([answer[0], answer[1]]))
    }

    fn expect(&mut self, kind: u16, first: u64, want: u16) -> Outcome {
        let answer = self.ask(kind, first, 1)?;
        ensure!(answer == want, "request {kind} of block {first}: {answer}, not {want}");
        println!("answer={answer}");
        Ok(())
    }

    /// Waits for another size to be requested, and makes it so.
    fn step(&mut self) -> Outcome {
        let wanted = |job: &Self| job.device.config64(48) / job.block;
        let changed = clock::wait_until(TIMEOUT_US, || wanted(self) != self.blocks);
        ensure!(changed, "nothing else is requested");
        let wanted = wanted(self);
        if wanted > self.blocks {
            let count = (wanted - self.blocks) as u16;
            let answer = self.ask(PLUG, self.blocks, count)?;
            ensure!(answer == ACK, "plugging {count} blocks: {answer}");
            self.fill(self.blocks, wanted)?;
        } else {
            let answer = self.ask(UNPLUG, wanted, (self.blocks - wanted) as u16)?;
            ensure!(answer == ACK, "unplugging: {answer}");
        }
        self.blocks = wanted;
        self.check(0, wanted)?;
        let plugged = self.device.config64(40);
        ensure!(plugged == wanted * self.block, "plugged {plugged}");
        println!("plugged={}", plugged / MIB);
        Ok(())
    }

    fn word(&self, page: u64) -> *mut u64 {
        (self.start + page * 4096) as *mut u64
    }

    fn pages(&self, from: u64, to: u64) -> core::ops::Range<u64> {
        from * self.block / 4096..to * self.block / 4096
    }

    /// New memory is zero. Writes to each page of it.
    fn fill(&self, from: u64, to: u64) -> Outcome {
        for page in self.pages(from, to) {
            // SAFETY: plugged memory, mapped; no Rust object lies there.
            let before = unsafe { self.word(page).replace(page + 1) };
            ensure!(before == 0, "page {page} began with {before:#x}");
        }
        Ok(())
    }

    fn check(&self, from: u64, to: u64) -> Outcome {
        for page in self.pages(from, to) {
            // SAFETY: as above.
            let word = unsafe { self.word(page).read_volatile() };
            ensure!(word == page + 1, "page {page} holds {word:#x}");
        }
        Ok(())
    }

    fn read_unplugged(&self) -> Outcome {
        let last = self.device.config64(24) / self.block - 1;
        for block in [self.blocks, last] {
            println!("unplugged={:#x}", self.read(block));
        }
        Ok(())
    }

    fn read(&self, block: u64) -> u32 {
        memory::mmio_read32((self.start + block * self.block) as usize)
    }

    fn poke(&self, block: u64) {
        println!("poking=1");
        memory::mmio_write32((self.start + block * self.block) as usize, 7);
        println!("poked=1");
    }

    /// A block that comes and goes while a drive uses it: whatever the drive says, nothing breaks.
    fn flood(&mut self, boot: &BootInfo, rounds: u64) -> Outcome {
        let mut disk = Block::open(boot.cmdline, 0)?;
        let first = self.blocks;
        let enough = |job: &Self| job.device.config64(48) > first * job.block;
        ensure!(clock::wait_until(TIMEOUT_US, || enough(self)), "nothing is requested");
        let address = self.start + first * self.block;
        let (mut read, mut failed, mut busy) = (0, 0, 0);
        for round in 0..rounds {
            ensure!(self.ask(PLUG, first, 1)? == ACK, "plugging in round {round}");
            for slot in 0..disk.slots().min(16) {
                let len = 64 * SECTOR as u32;
                let buffer = Buffer { address, len, is_device_written: true };
                disk.submit(slot, block::READ, 0, Some(buffer));
            }
            disk.queue.kick();
            while self.ask(UNPLUG, first, 1)? != ACK {
                busy += 1;
            }
            let mut left = disk.slots().min(16);
            let done = clock::wait_until(TIMEOUT_US, || {
                while let Some((_, status, _)) = disk.poll() {
                    left -= 1;
                    if status == block::OK { read += 1 } else { failed += 1 }
                }
                left == 0
            });
            ensure!(done, "the drive hangs in round {round}");
        }
        println!("flood read={read} failed={failed} busy={busy}");
        println!("flood=ok");
        Ok(())
    }
}
