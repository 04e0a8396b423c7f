//! Makes one request of a disk for each byte on the serial port, and tells its status, so that a test decides what
//! happens to the disk in between: `r` reads the first sector, whose first byte it tells too, `R` the last one; `w` and `W`
//! write them, with a byte that counts up; `f` flushes; `q` ends. `nth=0` is the disk.
#![no_std]
#![no_main]

use rt::block::{self, Block, SECTOR};
use rt::virtio::Buffer;
use rt::{BootInfo, Outcome, clock, memory, options, println, ring0};

rt::entry!(run);

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = DATA + 5;
const DATA_READY: u8 = 1;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let mut disk = Block::open(boot.cmdline, options::number(boot.cmdline, "nth", 0) as usize)?;
    let sector = memory::allocate(SECTOR as usize);
    let last = disk.sectors - 1;
    let mut value = 0;
    println!("ready=1");
    loop {
        let at = |command: u8| if command.is_ascii_uppercase() { last } else { 0 };
        match input() {
            command @ (b'r' | b'R') => {
                sector.fill(0);
                let data = Some(Buffer::writable(sector));
                let (status, _) = disk.request(block::READ, at(command), data)?;
                println!("read={status} {}", sector[0]);
            }
            command @ (b'w' | b'W') => {
                value += 1;
                sector.fill(value);
                let data = Some(Buffer::readable(sector));
                let (status, _) = disk.request(block::WRITE, at(command), data)?;
                println!("write={status} {value}");
            }
            b'f' => println!("flush={} 0", disk.request(block::FLUSH, 0, None)?.0),
            b'q' => return Ok(()),
            other => println!("unknown={other}"),
        }
    }
}

fn input() -> u8 {
    while ring0::in8(LINE_STATUS) & DATA_READY == 0 {}
    ring0::in8(DATA)
}
