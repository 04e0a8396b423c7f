//! Asks for as much as it gets, and says at which rate that is: `name=… ops=… bytes=… ns=…`. Options: `device=read`
//! (`write`, `send`, `receive`, `entropy`), `len=4096` bytes a request, `depth=8` at once, `warm_ms=1000` before it
//! counts, `ms=10000` while it does, `least=1` operations though it take longer, `nth=0` device of its kind.
//!
//! Time and work are counted from one completion to another, so that nothing is cut off at either end.
#![no_std]
#![no_main]

use rt::block::{self, Block};
use rt::virtio::{self, Buffer, Queue};
use rt::{BootInfo, Failure, Outcome, clock, ensure, fail, memory, options, println};

rt::entry!(run);

/// `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;
const RX: u16 = 0;
const TX: u16 = 1;
/// How long nothing may happen.
const PATIENCE_NS: u64 = 60_000_000_000;

/// A device, and a buffer for each slot.
struct Source {
    work: Work,
    /// Bytes of a request; if nothing, what the device says that it has written.
    len: Option<u64>,
    /// Bytes of that which do not count.
    overhead: u64,
    buffers: &'static mut [u8],
    room: usize,
}

/// What is asked of it.
enum Work {
    Disk { block: Block, kind: u32, sector: u64 },
    Send(Queue),
    Fill(Queue),
}

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let number = |key, default| options::number(boot.cmdline, key, default);
    let device = options::value(boot.cmdline, "device").unwrap_or("read");
    let depth = number("depth", 8) as u16;
    let mut source =
        open(boot.cmdline, device, number("nth", 0) as usize, number("len", 4096), depth)?;
    println!("begin");
    for slot in 0..depth {
        source.submit(slot);
    }
    source.kick();
    let warm_ns = number("warm_ms", 1000) * 1_000_000;
    let count_ns = number("ms", 10_000) * 1_000_000;
    let least = number("least", 1);
    let start = clock::now_ns();
    let (mut begin, mut end, mut ops, mut bytes) = (0, start, 0_u64, 0_u64);
    loop {
        let now = clock::now_ns();
        ensure!(now - end < PATIENCE_NS, "nothing for {} ms", PATIENCE_NS / 1_000_000);
        let Some((slot, len)) = source.poll()? else { continue };
        end = now;
        if begin == 0 {
            // The first completion after the warm-up is where counting begins.
            begin = if now - start >= warm_ns { now } else { 0 };
        } else {
            ops += 1;
            bytes += len;
            if now - begin >= count_ns && ops >= least {
                break;
            }
        }
        source.submit(slot);
        source.kick();
    }
    println!("name={device} ops={ops} bytes={bytes} ns={}", end - begin);
    Ok(())
}

fn open(cmdline: &str, name: &str, nth: usize, len: u64, depth: u16) -> Result<Source, Failure> {
    let room = len as usize + HEADER;
    let buffers = memory::allocate(room * usize::from(depth));
    let queue = |id, index| {
        let device = virtio::find(cmdline, id, nth)?;
        device.negotiate(0)?;
        let queue = device.queue(index, 256)?;
        ensure!(depth <= queue.size, "only {} at once", queue.size);
        device.start()?;
        Ok(queue)
    };
    let (work, fixed, overhead) = match name {
        "read" | "write" => {
            let block = Block::open(cmdline, nth)?;
            ensure!(depth <= block.slots(), "only {} at once", block.slots());
            ensure!(block.sectors * block::SECTOR >= len, "the disk is too small");
            let kind = if name == "read" { block::READ } else { block::WRITE };
            (Work::Disk { block, kind, sector: 0 }, Some(len), 0)
        }
        "send" => {
            // Frames to everybody, behind an empty header.
            buffers.chunks_mut(room).for_each(|frame| frame[HEADER..HEADER + 6].fill(0xff));
            (Work::Send(queue(virtio::ID_NET, TX)?), Some(len), 0)
        }
        "receive" => (Work::Fill(queue(virtio::ID_NET, RX)?), None, HEADER as u64),
        "entropy" => (Work::Fill(queue(virtio::ID_RNG, 0)?), None, 0),
        _ => fail!("no device is {name}"),
    };
    Ok(Source { work, len: fixed, overhead, buffers, room })
}

impl Source {
    /// Makes a request.
    fn submit(&mut self, slot: u16) {
        let data = &mut self.buffers[usize::from(slot) * self.room..][..self.room];
        match &mut self.work {
            Work::Disk { block, kind, sector } => {
                let data = &mut data[HEADER..];
                let sectors = data.len() as u64 / block::SECTOR;
                let at = if *sector + sectors <= block.sectors { *sector } else { 0 };
                *sector = at + sectors;
                let buffer = match *kind {
                    block::READ => Buffer::writable(data),
                    _ => Buffer::readable(data),
                };
                block.submit(slot, *kind, at, Some(buffer));
            }
            Work::Send(queue) => {
                queue.chain(slot, &[Buffer::readable(data)]);
                queue.offer(slot);
            }
            Work::Fill(queue) => {
                queue.chain(slot, &[Buffer::writable(data)]);
                queue.offer(slot);
            }
        }
    }

    fn kick(&mut self) {
        match &self.work {
            Work::Disk { block, .. } => block.queue.kick(),
            Work::Send(queue) | Work::Fill(queue) => queue.kick(),
        }
    }

    /// A request that is done: its slot, and its bytes.
    fn poll(&mut self) -> Result<Option<(u16, u64)>, Failure> {
        let done = match &mut self.work {
            Work::Disk { block, .. } => match block.poll() {
                Some((slot, block::OK, len)) => Some((slot, len)),
                Some((_, status, _)) => fail!("status {status}"),
                None => None,
            },
            Work::Send(queue) | Work::Fill(queue) => queue.poll(),
        };
        let Some((slot, len)) = done else { return Ok(None) };
        ensure!(usize::from(slot) < self.buffers.len() / self.room, "used head {slot}");
        Ok(Some((slot, self.len.unwrap_or(u64::from(len).saturating_sub(self.overhead)))))
    }
}
