//! Never stands still: writes to all of `pages=64` pages, in turn, what it wrote to them in the pass before and one more, and
//! has the entropy device, if there is one, write to memory. It looks at what it overwrites, so that a copy of it of
//! which a page is older or newer than the rest fails. `c` on the serial port makes it say in which pass it is, `q` ends it.
#![no_std]
#![no_main]

use rt::virtio::{self, Buffer};
use rt::{BootInfo, Outcome, clock, ensure, memory, options, println, ring0};

rt::entry!(run);

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = DATA + 5;
const DATA_READY: u8 = 1;
const PAGE: usize = 4096;
const TIMEOUT_US: u64 = 10_000_000;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let mut rng = match virtio::find(boot.cmdline, virtio::ID_RNG, 0) {
        Err(_) => None,
        Ok(device) => {
            device.negotiate(0)?;
            let queue = device.queue(0, 4)?;
            device.start()?;
            Some(queue)
        }
    };
    let area = memory::allocate(options::number(boot.cmdline, "pages", 64) as usize * PAGE);
    let random = memory::allocate(PAGE);
    println!("ready=1");
    let mut pass = 0_u64;
    loop {
        for (n, page) in area.chunks_exact_mut(PAGE).enumerate() {
            let is = u64::from_le_bytes(*page.first_chunk().unwrap_or(&[0; 8]));
            ensure!(is == pass, "page {n} is of pass {is}, in pass {pass}");
            page[..8].copy_from_slice(&(pass + 1).to_le_bytes());
        }
        pass += 1;
        if let Some(queue) = &mut rng {
            random[..64].fill(0);
            let len = queue.round_trip(&[Buffer::writable(&mut random[..64])], TIMEOUT_US)?;
            ensure!(len == 64, "{len} random bytes, not 64");
            ensure!(random[..64].iter().any(|&byte| byte != 0), "random bytes are zero");
        }
        if ring0::in8(LINE_STATUS) & DATA_READY != 0 {
            match ring0::in8(DATA) {
                b'q' => return Ok(()),
                _ => println!("pass={pass}"),
            }
        }
    }
}
