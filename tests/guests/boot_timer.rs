//! Tells the boot timer that it has booted, after having said everything that must not be taken for that; with
//! `quiet`, only that.
#![no_std]
#![no_main]

use rt::{BootInfo, Outcome, options, println};

rt::entry!(run);

const BOOT_TIMER: usize = 0xc000_0000;
const BOOTED: u8 = 123;

fn run(boot: &'static BootInfo) -> Outcome {
    let byte = BOOT_TIMER as *mut u8;
    // SAFETY: a page of the hole below 4 GiB, with the timer's registers or nothing.
    unsafe {
        println!("reads={:#x}", byte.read_volatile());
        byte.write_volatile(0);
        byte.write_volatile(BOOTED + 1);
        byte.add(1).write_volatile(BOOTED);
        byte.add(4095).write_volatile(BOOTED);
        byte.cast::<u16>().write_volatile(BOOTED.into());
        byte.cast::<u32>().write_volatile(BOOTED.into());
        if !options::has(boot.cmdline, "quiet") {
            byte.write_volatile(BOOTED);
        }
    }
    Ok(())
}
