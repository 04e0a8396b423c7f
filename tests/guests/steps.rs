//! Does one thing for each byte on the serial port, so that a test decides what happens before a snapshot and what after
//! it: `c` counts, and looks whether memory is as it was left; `b` reads the first sector of the first disk, `w` writes
//! the count to its second, which `s` reads; `f` writes to the disk from its second page on until a write fails, and
//! tells how many bytes that were; `r` takes random bytes; `n`, `p` and `v` show the address of the interface, the first
//! bytes of the pmem device and the vsock address; `m` shows registers of the processor that KVM does not list, and
//! changes them; `i` shows who it is: generation id, VMClock's counter, payload; `t`
//! tells the time: microseconds by the clock, and by the TSC alone; `l`
//! lets the interrupts of the disk and of one more byte get lost, and says when both have come after all; `x`
//! resets the machine, `q` ends. `pages=N` is how much memory to look after.
#![no_std]
#![no_main]

use rt::block::{Block, SECTOR};
use rt::virtio::{self, Buffer, Device, Queue, reg};
use rt::{
    BootInfo, Failure, Outcome, acpi, clock, ensure, fail, interrupts, memory, options, power,
    println, ring0,
};

rt::entry!(run);

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const LINE_STATUS: u16 = DATA + 5;
const DATA_READY: u8 = 1;
const PAGE: usize = 4096;
const TIMEOUT_US: u64 = 10_000_000;
const PATIENCE_US: u64 = 60_000_000;
/// An interrupt that was raised has come by then, unless the host has much else to do.
const RAISED_US: u64 = 20_000;
const MSR_TSC: u32 = 0x10;
/// ISA IRQ 4, which is the I/O APIC's input 4.
const SERIAL_IRQ: u32 = 4;

struct Job {
    boot: &'static BootInfo,
    count: u64,
    area: &'static mut [u8],
    disk: Option<Block>,
    sector: &'static mut [u8],
    rng: Option<Queue>,
    net: Option<Device>,
    pmem: Option<Device>,
    vsock: Option<Device>,
}

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let find = |id| virtio::find(boot.cmdline, id, 0).ok();
    let claimed = |id| {
        let device = find(id)?;
        device.negotiate(1 << 5).ok()?;
        Some(device)
    };
    let rng = match find(virtio::ID_RNG) {
        None => None,
        Some(device) => {
            device.negotiate(0)?;
            let queue = device.queue(0, 4)?;
            device.start()?;
            Some(queue)
        }
    };
    let disk = match find(virtio::ID_BLOCK) {
        None => None,
        Some(_) => Some(Block::open(boot.cmdline, 0)?),
    };
    let pages = options::number(boot.cmdline, "pages", 1024) as usize;
    let mut job = Job {
        boot,
        count: 0,
        area: memory::allocate(pages * PAGE),
        disk,
        sector: memory::allocate(SECTOR as usize),
        rng,
        net: claimed(virtio::ID_NET),
        pmem: claimed(virtio::ID_PMEM),
        vsock: claimed(virtio::ID_VSOCK),
    };
    println!("ready=1");
    while job.step(input())? {}
    Ok(())
}

fn input() -> u8 {
    while !has_input() {}
    ring0::in8(DATA)
}

fn has_input() -> bool {
    ring0::in8(LINE_STATUS) & DATA_READY != 0
}

impl Job {
    fn step(&mut self, what: u8) -> Result<bool, Failure> {
        match what {
            b'c' => self.count()?,
            b'b' => {
                let Some(disk) = &mut self.disk else { return missing("disk") };
                disk.read(0, self.sector)?;
                println!("disk={}", text(self.sector));
            }
            b'w' => {
                let Some(disk) = &mut self.disk else { return missing("disk") };
                self.sector.fill(0);
                self.sector[..8].copy_from_slice(&self.count.to_le_bytes());
                disk.write(1, self.sector)?;
                println!("wrote={}", self.count);
            }
            b's' => {
                let Some(disk) = &mut self.disk else { return missing("disk") };
                disk.read(1, self.sector)?;
                let count = self.sector.first_chunk().copied().unwrap_or_default();
                println!("second={}", u64::from_le_bytes(count));
            }
            b'f' => {
                let Some(disk) = &mut self.disk else { return missing("disk") };
                self.sector.fill(0xff);
                let mut sector = 8;
                while sector < disk.sectors && disk.write(sector, self.sector).is_ok() {
                    sector += 1;
                }
                println!("filled={}", (sector - 8) * SECTOR);
            }
            b'r' => {
                let Some(queue) = &mut self.rng else { return missing("rng") };
                let mut bytes = [0; 16];
                let len = queue.round_trip(&[Buffer::writable(&mut bytes)], TIMEOUT_US)?;
                ensure!(len == 16, "{len} random bytes, not 16");
                println!("random={:032x}", u128::from_le_bytes(bytes));
            }
            b'n' => {
                let Some(device) = &self.net else { return missing("net") };
                let byte = |i| device.config8(i);
                println!(
                    "mac={:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}",
                    byte(0),
                    byte(1),
                    byte(2),
                    byte(3),
                    byte(4),
                    byte(5)
                );
            }
            b'p' => {
                let Some(device) = &self.pmem else { return missing("pmem") };
                let start = device.config64(0);
                memory::map_gib(start);
                let first = memory::mmio_read64(start as usize).to_le_bytes();
                println!("pmem={}", text(&first));
            }
            b'v' => {
                let Some(device) = &self.vsock else { return missing("vsock") };
                println!("cid={}", device.config64(0));
            }
            b'm' => memory_types()?,
            b'i' => identity(),
            b't' => {
                let tsc = ring0::rdmsr(MSR_TSC).unwrap_or(0);
                println!("time={} {}", clock::now_us(), clock::ticks_to_ns(tsc) / 1000);
            }
            b'l' => self.lose_interrupts()?,
            b'x' => power::reboot(),
            b'q' => return Ok(false),
            _ => println!("unknown={what:#x}"),
        }
        Ok(true)
    }

    /// The I/O APIC forgets an edge that comes while its input is masked, as it was until now: only the devices know
    /// that they wait.
    fn lose_interrupts(&mut self) -> Outcome {
        let Some(io_apic) = acpi::io_apic(self.boot) else { fail!("no I/O APIC") };
        let Some(disk) = &mut self.disk else { fail!("no disk") };
        disk.queue.want_interrupts(true);
        disk.read(0, self.sector)?;
        let has_raised = || disk.device.read(reg::INTERRUPT_STATUS) != 0;
        ensure!(clock::wait_until(TIMEOUT_US, has_raised), "no interrupt status");
        ring0::out8(INTERRUPT_ENABLE, 1);
        ensure!(clock::wait_until(TIMEOUT_US, has_input), "no input");
        // What a register shows may be on its way to the I/O APIC yet: whether it was, shows in what comes.
        clock::wait_until(RAISED_US, || false);
        interrupts::enable(io_apic, disk.device.irq, 0);
        interrupts::enable(io_apic, SERIAL_IRQ, 1);
        clock::wait_until(RAISED_US, || false);
        println!("lost={}", interrupts::count(0) == 0 && interrupts::count(1) == 0);
        let have_come = || interrupts::count(0) > 0 && interrupts::count(1) > 0;
        // The host takes a snapshot meanwhile, and may have much else to do.
        clock::wait_until(PATIENCE_US, have_come);
        println!("told={},{}", interrupts::count(0) > 0, interrupts::count(1) > 0);
        Ok(())
    }

    /// Each page holds the count and its own number, so a page that is old or another's is found.
    fn count(&mut self) -> Outcome {
        for (n, page) in self.area.chunks_exact_mut(PAGE).enumerate() {
            let want = if self.count == 0 { 0 } else { word(self.count, n) };
            let is = u64::from_le_bytes(*page.first_chunk().unwrap_or(&[0; 8]));
            ensure!(is == want, "page {n} holds {is:#x}, not {want:#x}");
            page[..8].copy_from_slice(&word(self.count + 1, n).to_le_bytes());
        }
        self.count += 1;
        println!("count={}", self.count);
        Ok(())
    }
}

/// A memory type range, its mask, one of fixed size, the default.
const MTRRS: [u32; 4] = [0x206, 0x207, 0x26f, 0x2ff];

/// The next value of each has another type, or begins one page later.
fn memory_types() -> Outcome {
    let mut all = [0; 4];
    for (value, index) in all.iter_mut().zip(MTRRS) {
        let Ok(now) = ring0::rdmsr(index) else { fail!("MSR {index:#x} cannot be read") };
        *value = now;
        let next = match index {
            0x206 | 0x207 => now + 0x1000,
            0x26f => now ^ 0x0606,
            _ => now ^ 0x400,
        };
        // SAFETY: without devices that do DMA past the caches, KVM only keeps it.
        let _ = unsafe { ring0::wrmsr(index, next) };
    }
    println!("mtrrs={all:x?}");
    Ok(())
}

/// Where husk puts them.
const GENERATION_ID: usize = 0xc200_0000;
const VMCLOCK_COUNTER: usize = 0xc_1068;
const PAYLOAD: usize = 0xd_0000;

fn identity() {
    let word = |at: usize| memory::mmio_read64(at);
    let len = (word(PAYLOAD + 24) & 0xffff_ffff) as usize;
    // SAFETY: husk says that the text is there.
    let text = unsafe { core::slice::from_raw_parts((PAYLOAD + 64) as *const u8, len) };
    println!(
        "identity={:016x}{:016x} {} {} {}",
        word(GENERATION_ID),
        word(GENERATION_ID + 8),
        word(VMCLOCK_COUNTER),
        word(PAYLOAD + 16),
        core::str::from_utf8(text).unwrap_or("?")
    );
}

fn word(count: u64, page: usize) -> u64 {
    count << 32 | page as u64
}

fn text(bytes: &[u8]) -> &str {
    core::str::from_utf8(&bytes[..8]).unwrap_or("?")
}

fn missing(what: &str) -> Result<bool, Failure> {
    println!("missing={what}");
    Ok(true)
}
