//! Attacks every virtio device of the command line through its registers, doorbells and queues, as `attack=` says:
//! registers, queues, race. Prints `case=NAME verdict=WORD want=WORD,WORD` for each, and goes on whatever comes out;
//! whoever started this monitor judges. Option `rounds=N` of a race.
//!
//! A verdict: rejected (no effect, or the specification's), used (the chain came back), held (kept, nothing written),
//! latched (DEVICE_NEEDS_RESET and the configuration interrupt), broken (the device does not work after a reset).
#![no_std]
#![no_main]

#[path = "hostile/queues.rs"]
mod queues;
#[path = "hostile/race.rs"]
mod race;
#[path = "hostile/registers.rs"]
mod registers;
#[path = "hostile/target.rs"]
mod target;

use rt::virtio::{self, Device};
use rt::{BootInfo, Outcome, clock, ensure, fail, options, println};

use crate::queues::queues;
use crate::race::race;
use crate::registers::registers;
use crate::target::Target;

rt::entry!(run);

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let attack: fn(&'static BootInfo, &Target) -> Outcome =
        match options::value(boot.cmdline, "attack").unwrap_or("registers") {
            "registers" => |_, target| registers(target),
            "queues" => |_, target| queues(target),
            "race" => race,
            attack => fail!("attack={attack} is unknown"),
        };
    let mut count = 0;
    for device in virtio::devices(boot.cmdline).filter(Device::is_present) {
        attack(boot, &Target::new(device)?)?;
        count += 1;
    }
    println!("devices={count}");
    ensure!(count > 0, "no devices");
    Ok(())
}
