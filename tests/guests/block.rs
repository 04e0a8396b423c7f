//! Drives a virtio-blk device. `tests=` picks and orders some of: id, read, write, verify, flush, discard, zeroes, range,
//! type; default is all the device's features allow. Other options: `nth=0` device, `at=8` sector, `len=64K` bytes and
//! `seed=1` of the written pattern, byte i of which is (i * 7 + i / 512 + seed) mod 256; `irq` also checks that the
//! device interrupts. On a read-only device, `write` expects a refusal.
#![no_std]
#![no_main]

use rt::block::{self, Block, SECTOR};
use rt::virtio::Buffer;
use rt::{
    BootInfo, Failure, Outcome, acpi, clock, ensure, fail, interrupts, memory, options, println,
};

rt::entry!(run);

/// What the tests work on.
struct Job {
    disk: Block,
    at: u64,
    len: usize,
    seed: u64,
}

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let number = |key, default| options::number(boot.cmdline, key, default);
    let disk = Block::open(boot.cmdline, number("nth", 0) as usize)?;
    println!("features={:#x}", disk.features);
    println!("sectors={}", disk.sectors);
    let len = number("len", 64 << 10) as usize;
    let mut job = Job { disk, at: number("at", 8), len, seed: number("seed", 1) };
    let all = "id,read,write,verify,flush,discard,zeroes,range,type";
    for test in options::value(boot.cmdline, "tests").unwrap_or(all).split(',') {
        match test {
            "id" => id(&mut job.disk)?,
            "read" => read(&mut job)?,
            "write" => write(&mut job)?,
            "verify" if job.is_read_only() => {}
            "verify" => verify(&mut job, pattern)?,
            "flush" => flush(&mut job.disk)?,
            "discard" => discard(&mut job)?,
            "zeroes" => zeroes(&mut job)?,
            "range" => out_of_range(&mut job)?,
            "type" => bad_type(&mut job.disk)?,
            _ => fail!("test {test} is unknown"),
        }
    }
    if options::has(boot.cmdline, "irq") {
        interrupt(boot, &mut job.disk)?;
    }
    Ok(())
}

impl Job {
    fn is_read_only(&self) -> bool {
        self.disk.features & block::F_RO != 0
    }
}

fn pattern(i: usize, seed: u64) -> u8 {
    (i * 7 + i / 512 + seed as usize) as u8
}

fn id(disk: &mut Block) -> Outcome {
    let mut id = [0; 20];
    let (status, len) = disk.request(block::GET_ID, 0, Some(Buffer::writable(&mut id)))?;
    ensure!(status == block::OK, "get-id: status {status}");
    let end = id.iter().position(|&c| c == 0).unwrap_or(20);
    println!("id={} len={len}", core::str::from_utf8(&id[..end]).unwrap_or("?"));
    Ok(())
}

fn read(job: &mut Job) -> Outcome {
    let sector = memory::allocate(SECTOR as usize);
    job.disk.read(0, sector)?;
    let first = u64::from_be_bytes(*sector.first_chunk().unwrap_or(&[0; 8]));
    println!("sector0={first:016x}");
    job.disk.read(job.disk.sectors - 1, sector)?;
    println!("read=ok");
    Ok(())
}

fn write(job: &mut Job) -> Outcome {
    let data = memory::allocate(job.len);
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = pattern(i, job.seed);
    }
    if !job.is_read_only() {
        job.disk.write(job.at, data)?;
        println!("write=ok");
        return Ok(());
    }
    let (status, _) = job.disk.request(block::WRITE, job.at, Some(Buffer::readable(data)))?;
    ensure!(status == block::IO_ERROR, "write to a read-only device: status {status}");
    println!("write=refused");
    Ok(())
}

fn verify(job: &mut Job, expected: fn(usize, u64) -> u8) -> Outcome {
    let data = memory::allocate(job.len);
    data.fill(0x55);
    job.disk.read(job.at, data)?;
    for (i, &byte) in data.iter().enumerate() {
        let want = expected(i, job.seed);
        ensure!(byte == want, "byte {i} is {byte:#x}, not {want:#x}");
    }
    println!("verify=ok");
    Ok(())
}

fn flush(disk: &mut Block) -> Outcome {
    if disk.features & block::F_FLUSH == 0 {
        println!("flush=not offered");
        return Ok(());
    }
    let (status, _) = disk.request(block::FLUSH, 0, None)?;
    ensure!(status == block::OK, "flush: status {status}");
    println!("flush=ok");
    Ok(())
}

fn discard(job: &mut Job) -> Outcome {
    if job.disk.features & block::F_DISCARD == 0 || job.is_read_only() {
        println!("discard=not offered");
        return Ok(());
    }
    let status = on_range(job, block::DISCARD, 0)?;
    ensure!(status == block::OK, "discard: status {status}");
    // Unmap has no meaning for a discard (virtio 1.2, 5.2.6.2).
    let status = on_range(job, block::DISCARD, 1)?;
    ensure!(status == block::UNSUPPORTED, "discard with unmap: status {status}");
    println!("discard=ok");
    Ok(())
}

fn zeroes(job: &mut Job) -> Outcome {
    if job.disk.features & block::F_WRITE_ZEROES == 0 || job.is_read_only() {
        println!("zeroes=not offered");
        return Ok(());
    }
    write(job)?;
    let status = on_range(job, block::WRITE_ZEROES, 0)?;
    ensure!(status == block::OK, "write-zeroes: status {status}");
    verify(job, |_, _| 0)?;
    println!("zeroes=ok");
    Ok(())
}

/// A discard or write-zeroes of the job's range.
fn on_range(job: &mut Job, kind: u32, flags: u32) -> Result<u8, Failure> {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&job.at.to_le_bytes());
    segment[8..12].copy_from_slice(&(job.len as u32 / SECTOR as u32).to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    Ok(job.disk.request(kind, 0, Some(Buffer::readable(&segment)))?.0)
}

fn out_of_range(job: &mut Job) -> Outcome {
    let data = memory::allocate(2 * SECTOR as usize);
    let sectors = job.disk.sectors;
    for sector in [sectors, sectors - 1, sectors + 1, u64::MAX / SECTOR, u64::MAX - 1, u64::MAX] {
        let (status, _) = job.disk.request(block::READ, sector, Some(Buffer::writable(data)))?;
        ensure!(status == block::IO_ERROR, "read of 2 sectors at {sector}: status {status}");
        let (status, _) = job.disk.request(block::WRITE, sector, Some(Buffer::readable(data)))?;
        ensure!(status == block::IO_ERROR, "write of 2 sectors at {sector}: status {status}");
    }
    println!("range=refused");
    Ok(())
}

fn bad_type(disk: &mut Block) -> Outcome {
    let data = memory::allocate(SECTOR as usize);
    // Even ones: some devices take the lowest bit for the direction.
    for kind in [100, 5000, 0x7fff_fffe] {
        let (status, _) = disk.request(kind, 0, Some(Buffer::writable(data)))?;
        ensure!(status == block::UNSUPPORTED, "request type {kind}: status {status}");
    }
    println!("type=unsupported");
    Ok(())
}

fn interrupt(boot: &BootInfo, disk: &mut Block) -> Outcome {
    let Some(io_apic) = acpi::io_apic(boot) else { fail!("no I/O APIC") };
    let sector = memory::allocate(SECTOR as usize);
    disk.queue.want_interrupts(true);
    interrupts::enable(io_apic, disk.device.irq, 0);
    disk.read(0, sector)?;
    let came = clock::wait_until(1_000_000, || interrupts::count(0) > 0);
    let status = disk.device.read(rt::virtio::reg::INTERRUPT_STATUS);
    disk.device.write(rt::virtio::reg::INTERRUPT_ACK, status);
    println!("interrupts={} status={status:#x}", interrupts::count(0));
    ensure!(came && status & 1 == 1, "no interrupt for a used buffer");
    ensure!(disk.device.read(rt::virtio::reg::INTERRUPT_STATUS) == 0, "the ack does not clear it");
    Ok(())
}
