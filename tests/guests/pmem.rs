//! Uses a virtio-pmem device. `tests=` picks and orders some of: read, write, verify, flush, refused, bad, wait, dma,
//! watch.
//! Other options: `nth=0` device, `at=4096` byte, `len=64K` bytes and `seed=1` of the pattern, byte i of which is
//! (i * 7 + i / 512 + seed) mod 256. `dma` lets the first block device read its first sector into the device's memory,
//! and write it from there to its second. `wait` says `waiting=1` and waits until the first byte is not 0. `watch` says `watching=1` and reads the last page for ever.
#![no_std]
#![no_main]

use rt::block::{self, Block, SECTOR};
use rt::virtio::{self, Buffer, Device, Queue};
use rt::{BootInfo, Outcome, clock, ensure, fail, memory, options, println};

rt::entry!(run);

const TIMEOUT_US: u64 = 10_000_000;
const FLUSH: u32 = 0;

/// The device and what the tests work on.
struct Job {
    device: Device,
    queue: Queue,
    start: u64,
    size: u64,
    at: u64,
    len: u64,
    seed: u64,
}

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let number = |key, default| options::number(boot.cmdline, key, default);
    let device = virtio::find(boot.cmdline, virtio::ID_PMEM, number("nth", 0) as usize)?;
    device.negotiate(0)?;
    let queue = device.queue(0, 64)?;
    device.start()?;
    let (start, size) = (device.config64(0), device.config64(8));
    println!("start={start:#x}");
    println!("size={size}");
    for gib in (start..start + size).step_by(1 << 30) {
        memory::map_gib(gib);
    }
    let (at, len, seed) = (number("at", 4096), number("len", 64 << 10), number("seed", 1));
    let mut job = Job { device, queue, start, size, at, len, seed };
    for test in
        options::value(boot.cmdline, "tests").unwrap_or("read,write,verify,flush").split(',')
    {
        match test {
            "read" => println!("first={:016x}", job.word(0).swap_bytes()),
            "write" => write(&job),
            "verify" => verify(&job)?,
            "flush" => flush(&mut job)?,
            "refused" => refused(&job)?,
            "bad" => bad(&mut job)?,
            "wait" => wait(&job)?,
            "dma" => dma(boot, &job)?,
            "watch" => watch(&job),
            _ => fail!("test {test} is unknown"),
        }
    }
    Ok(())
}

impl Job {
    fn word(&self, offset: u64) -> u64 {
        // SAFETY: the device's memory, mapped; no Rust object lies there.
        unsafe { ((self.start + offset) as *const u64).read_volatile() }
    }

    fn byte(&self, i: u64) -> *mut u8 {
        (self.start + self.at + i) as *mut u8
    }

    fn request(&mut self, kind: u32) -> Result<(u32, u32), rt::Failure> {
        let (request, mut result) = (kind.to_le_bytes(), [0xee; 4]);
        let buffers = [Buffer::readable(&request), Buffer::writable(&mut result)];
        let used = self.queue.round_trip(&buffers, TIMEOUT_US)?;
        // SAFETY: the device has written it behind the compiler's back.
        let result = unsafe { (&raw const result).read_volatile() };
        Ok((u32::from_le_bytes(result), used))
    }
}

fn pattern(i: u64, seed: u64) -> u8 {
    (i * 7 + i / 512 + seed) as u8
}

fn write(job: &Job) {
    for i in 0..job.len {
        // SAFETY: as in `word`.
        unsafe { job.byte(i).write_volatile(pattern(i, job.seed)) };
    }
    println!("write=ok");
}

fn verify(job: &Job) -> Outcome {
    for i in 0..job.len {
        // SAFETY: as in `word`.
        let byte = unsafe { job.byte(i).read_volatile() };
        let want = pattern(i, job.seed);
        ensure!(byte == want, "byte {i} is {byte:#x}, not {want:#x}");
    }
    println!("verify=ok");
    Ok(())
}

fn flush(job: &mut Job) -> Outcome {
    let (result, used) = job.request(FLUSH)?;
    ensure!((result, used) == (0, 4), "flush: result {result:#x}, {used} bytes");
    println!("flush=ok");
    Ok(())
}

/// Writing to what may only be read has no effect.
fn refused(job: &Job) -> Outcome {
    let before = job.word(job.at);
    memory::mmio_write32((job.start + job.at) as usize, !before as u32);
    ensure!(job.word(job.at) == before, "a write to read-only memory had an effect");
    println!("write=refused");
    Ok(())
}

fn bad(job: &mut Job) -> Outcome {
    let (result, used) = job.request(7)?;
    ensure!((result, used) == (0xeeee_eeee, 0), "type 7: result {result:#x}, {used} bytes");
    ensure!(job.device.status() == 15, "status {:#x}", job.device.status());
    println!("bad=refused");
    Ok(())
}

fn dma(boot: &BootInfo, job: &Job) -> Outcome {
    let mut disk = Block::open(boot.cmdline, 0)?;
    let buffer = |is_device_written| {
        let (address, len) = (job.start + job.at, SECTOR as u32);
        Some(Buffer { address, len, is_device_written })
    };
    let (read, _) = disk.request(block::READ, 0, buffer(true))?;
    let (write, _) = disk.request(block::WRITE, 1, buffer(false))?;
    println!("dma_read={read}");
    println!("dma_write={write}");
    if read == block::OK {
        println!("dma_first={:016x}", job.word(job.at).swap_bytes());
    }
    Ok(())
}

fn wait(job: &Job) -> Outcome {
    println!("waiting=1");
    let came = clock::wait_until(6 * TIMEOUT_US, || job.word(0) != 0);
    ensure!(came, "the first byte is still 0");
    Ok(())
}

fn watch(job: &Job) {
    let last = job.size - 4096;
    println!("last={:#x}", job.word(last));
    println!("watching=1");
    loop {
        job.word(last);
    }
}
