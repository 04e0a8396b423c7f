//! Does what it is told by bytes on the serial port, after `ready=1`. `w` writes the number of the round to `count=100`
//! pages, from the second round on to every second of them, and says `round=N`; `c` looks at them all and says
//! `pages=N..M`, the least and the largest number; `s` maps another page at an address whose page it has looked at, `v`
//! says what is there: `window=A` or `window=B`; `z` makes every third page zero, and says `zero=1`; `h` sums all of
//! them up and says `sum=X`; `b` counts in all pages, one after the other, and looks whether they have what they should,
//! until the next byte: `busy=ok`; `q` ends it. With `high` the pages are all that there are above 4 GiB.
#![no_std]
#![no_main]

use core::arch::naked_asm;

use rt::{BootInfo, Failure, Outcome, clock, ensure, fail, memory, options, println, ring0};

rt::entry!(run);

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = DATA + 5;
const PAGE: usize = 4096;
/// An address that nothing else is mapped at: 256 GiB.
const WINDOW: u64 = 1 << 38;
/// Present, writable, for ring 3.
const MAPPED: u64 = 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let count = options::number(boot.cmdline, "count", 100) as usize;
    let pages = match options::has(boot.cmdline, "high") {
        true => above_4_gib(boot)?,
        false => memory::allocate(count * PAGE),
    };
    let shown = memory::allocate(2 * PAGE);
    (shown[0], shown[PAGE]) = (b'A', b'B');
    let mut window = Window::new(shown.as_ptr() as u64);
    let mut round = 0;
    println!("ready=1");
    loop {
        match next() {
            b'w' => {
                round += 1;
                let step = if round == 1 { 1 } else { 2 };
                for (n, page) in pages.chunks_exact_mut(PAGE).enumerate().step_by(step) {
                    page[7] = round;
                    // Not the same as another.
                    page[14..18].copy_from_slice(&(n as u32).to_le_bytes());
                }
                println!("round={round}");
            }
            b'c' => {
                let numbers = || pages.chunks_exact(PAGE).map(|page| page[7]);
                let (least, most) = (numbers().min().unwrap_or(0), numbers().max().unwrap_or(0));
                println!("pages={least}..{most}");
            }
            b'z' => {
                pages.chunks_exact_mut(PAGE).step_by(3).for_each(|page| page.fill(0));
                println!("zero=1");
            }
            b'h' => {
                let sum = pages.iter().step_by(7).fold(0_u64, |sum, byte| {
                    (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
                });
                println!("sum={sum:x}");
            }
            b'b' => {
                pages.fill(0);
                println!("busy=1");
                let mut count = 0_u32;
                while ring0::in8(LINE_STATUS) & 1 == 0 {
                    for (n, page) in pages.chunks_exact_mut(PAGE).enumerate() {
                        let is = u32::from_le_bytes([page[0], page[1], page[2], page[3]]);
                        ensure!(is == count, "page {n} has {is}, want {count}");
                        page[..4].copy_from_slice(&(count + 1).to_le_bytes());
                    }
                    count += 1;
                }
                println!("busy=ok");
            }
            b's' => {
                window.swap();
                println!("window={}", window.look());
            }
            b'v' => println!("window={}", window.look()),
            b'q' => return Ok(()),
            other => fail!("no command is {other:#x}"),
        }
    }
}

fn above_4_gib(boot: &BootInfo) -> Result<&'static mut [u8], Failure> {
    let Some(ram) = boot.memory().iter().find(|r| r.is_ram() && r.start >= 1 << 32) else {
        fail!("no RAM above 4 GiB");
    };
    (ram.start..ram.end()).step_by(1 << 30).for_each(memory::map_gib);
    // SAFETY: RAM that the allocator does not hand out, mapped.
    Ok(unsafe { core::slice::from_raw_parts_mut(ram.start as *mut u8, ram.size as usize) })
}

fn next() -> u8 {
    while ring0::in8(LINE_STATUS) & 1 == 0 {}
    ring0::in8(DATA)
}

/// A page table of one page.
struct Window {
    table: &'static mut [u8],
    pages: u64,
    shows_second: bool,
}

impl Window {
    fn new(pages: u64) -> Self {
        let table = memory::allocate(PAGE);
        let directory = memory::allocate(PAGE);
        let pml4 = ring0::control_register(3) & ADDRESS;
        // SAFETY: the page tables are identity mapped, and nothing is at this address: the entry turns from absent to
        // present.
        unsafe {
            let pdpt = (pml4 as *const u64).read_volatile() & ADDRESS;
            let entry = (pdpt as *mut u64).add((WINDOW >> 30) as usize);
            (directory.as_mut_ptr() as *mut u64).write_volatile(table.as_ptr() as u64 | MAPPED);
            entry.write_volatile(directory.as_ptr() as u64 | MAPPED);
        }
        let mut window = Self { table, pages, shows_second: true };
        window.swap();
        window
    }

    fn swap(&mut self) {
        #[unsafe(naked)]
        unsafe extern "C" fn flush() {
            naked_asm!("mov rax, cr3", "mov cr3, rax", "ret")
        }
        self.shows_second ^= true;
        let page = self.pages + u64::from(self.shows_second) * PAGE as u64;
        // SAFETY: the table is ours, and the address has no object of Rust's.
        unsafe { (self.table.as_mut_ptr() as *mut u64).write_volatile(page | MAPPED) };
        // SAFETY: changes no mapping but that of the window.
        let _ = unsafe { ring0::call(flush, 0, 0, 0) };
    }

    fn look(&self) -> char {
        // SAFETY: mapped by `swap`.
        char::from(unsafe { (WINDOW as *const u8).read_volatile() })
    }
}
