//! Fills memory and gives it back by a balloon, as the host wants: the balloon's target size tells when. Each step ends with
//! a line, and the next waits for another target. Options: `mib=48` how much memory, `by=inflate`, `report` or `hint`.
//!
//!   touched=MIB   all of it is in use        (target: anything else)
//!   given=MIB     all of it was given back   (target: anything else)
//!   taken=MIB     it was zero, and is in use again   (target: anything else, the end)
#![no_std]
#![no_main]

use rt::virtio::{self, Buffer, Device, Queue, reg};
use rt::{BootInfo, Failure, Outcome, clock, ensure, fail, memory, options, println};

rt::entry!(run);

const ID_BALLOON: u32 = 5;
const F_STATS: u64 = 1 << 1;
const F_HINT: u64 = 1 << 3;
const F_REPORT: u64 = 1 << 5;

/// Offsets of the configuration (virtio 1.2, 5.5.4).
const TARGET: usize = 0;
const ACTUAL: usize = 4;
const COMMAND: usize = 8;

const PAGE: u64 = 4096;
/// Page frames in a list, as Linux has it.
const LIST: usize = 256;
/// What is reported or hinted at in one buffer, and buffers in a chain.
const BLOCK: u64 = 2 << 20;
const BLOCKS: usize = 8;

const TIMEOUT_US: u64 = 60_000_000;

struct Balloon {
    device: Device,
    inflate: Queue,
    deflate: Queue,
    /// The queue for hints or reports.
    other: Option<Queue>,
    list: &'static mut [u8],
}

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let mib = options::number(boot.cmdline, "mib", 48);
    let by = options::value(boot.cmdline, "by").unwrap_or("inflate");
    let Some(ram) = boot.memory().iter().filter(|r| r.is_ram()).max_by_key(|r| r.end() - r.start)
    else {
        fail!("no RAM");
    };
    // The end of RAM, far above what the allocator hands out.
    let end = ram.end() / BLOCK * BLOCK;
    let pages = end - (mib << 20)..end;
    let mut balloon = Balloon::open(boot.cmdline, by)?;
    ensure!(memory::image().1 + (8 << 20) < pages.start, "{mib} MiB are not to be had");

    let mut target = balloon.device.config32(TARGET);
    fill(pages.clone());
    println!("touched={mib}");
    balloon.wait_for_another(&mut target)?;
    match by {
        "inflate" => balloon.inflate(pages.clone())?,
        "report" => balloon.report(pages.clone())?,
        _ => balloon.hint(pages.clone())?,
    }
    println!("given={mib}");
    balloon.wait_for_another(&mut target)?;
    if by == "inflate" {
        balloon.deflate(pages.clone())?;
    }
    for page in pages.clone().step_by(PAGE as usize) {
        // SAFETY: RAM that is ours, and aligned.
        let found = unsafe { (page as *const u64).read_volatile() };
        ensure!(found == 0, "{found:#x} at {page:#x}");
    }
    fill(pages);
    println!("taken={mib}");
    balloon.wait_for_another(&mut target)
}

/// Writes to each page: not zero, and not the same to any two.
fn fill(pages: core::ops::Range<u64>) {
    for page in pages.step_by(PAGE as usize) {
        // SAFETY: RAM that is ours, and aligned.
        unsafe { (page as *mut u64).write_volatile(!page) };
    }
}

impl Balloon {
    fn open(cmdline: &str, by: &str) -> Result<Self, Failure> {
        let device = virtio::find(cmdline, ID_BALLOON, 0)?;
        let wanted = match by {
            "inflate" => 0,
            "report" => F_REPORT,
            "hint" => F_HINT,
            _ => fail!("by={by} is unknown"),
        };
        let features = device.negotiate(wanted)?;
        ensure!(features & wanted == wanted, "features {features:#x}");
        ensure!(features & F_STATS == 0, "statistics were not wanted");
        let (inflate, deflate) = (device.queue(0, 16)?, device.queue(1, 16)?);
        // The first optional queue, because statistics were not negotiated.
        let other = if wanted == 0 { None } else { Some(device.queue(2, 16)?) };
        device.start()?;
        Ok(Self { device, inflate, deflate, other, list: memory::allocate(LIST * 4) })
    }

    fn wait_for_another(&self, target: &mut u32) -> Outcome {
        let changed = clock::wait_until(TIMEOUT_US, || self.device.config32(TARGET) != *target);
        ensure!(changed, "the target has not changed");
        *target = self.device.config32(TARGET);
        Ok(())
    }

    fn inflate(&mut self, pages: core::ops::Range<u64>) -> Outcome {
        let actual = (pages.end - pages.start) / PAGE;
        let mut pages = pages.step_by(PAGE as usize);
        while let Some(buffer) = write_list(self.list, &mut pages) {
            self.inflate.round_trip(&[buffer], TIMEOUT_US)?;
        }
        self.device.write(reg::CONFIG + ACTUAL, actual as u32);
        Ok(())
    }

    fn deflate(&mut self, pages: core::ops::Range<u64>) -> Outcome {
        let mut pages = pages.step_by(PAGE as usize);
        while let Some(buffer) = write_list(self.list, &mut pages) {
            self.deflate.round_trip(&[buffer], TIMEOUT_US)?;
        }
        self.device.write(reg::CONFIG + ACTUAL, 0);
        Ok(())
    }

    fn report(&mut self, pages: core::ops::Range<u64>) -> Outcome {
        let Some(queue) = &mut self.other else { fail!("no queue") };
        let mut blocks = pages.step_by(BLOCK as usize).peekable();
        while blocks.peek().is_some() {
            let none = Buffer { address: 0, len: 0, is_device_written: true };
            let mut chain = [none; BLOCKS];
            let mut count = 0;
            for (buffer, address) in chain.iter_mut().zip(&mut blocks) {
                *buffer = Buffer { address, len: BLOCK as u32, is_device_written: true };
                count += 1;
            }
            queue.round_trip(&chain[..count], TIMEOUT_US)?;
        }
        Ok(())
    }

    /// A whole run, from the host's order to its acknowledgement.
    fn hint(&mut self, pages: core::ops::Range<u64>) -> Outcome {
        let ordered = clock::wait_until(TIMEOUT_US, || self.device.config32(COMMAND) > 1);
        ensure!(ordered, "hints were not asked for");
        self.say(self.device.config32(COMMAND))?;
        self.report(pages)?;
        self.say(0)?;
        let done = clock::wait_until(TIMEOUT_US, || self.device.config32(COMMAND) == 1);
        ensure!(done, "hints were not acknowledged");
        Ok(())
    }

    fn say(&mut self, command: u32) -> Outcome {
        self.list[..4].copy_from_slice(&command.to_le_bytes());
        let Some(queue) = &mut self.other else { fail!("no queue") };
        queue.round_trip(&[Buffer::readable(&self.list[..4])], TIMEOUT_US)?;
        Ok(())
    }
}

/// Writes the numbers of the next pages; none if there are no more.
fn write_list(list: &mut [u8], pages: &mut impl Iterator<Item = u64>) -> Option<Buffer> {
    let mut len = 0;
    for (entry, page) in list.chunks_exact_mut(4).zip(pages) {
        entry.copy_from_slice(&((page / PAGE) as u32).to_le_bytes());
        len += 4;
    }
    (len > 0).then(|| Buffer::readable(&list[..len]))
}
