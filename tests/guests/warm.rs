//! Writes all of `pages=256` again and again, in order, each time with the number of the pass. So at any moment the
//! memory is one number up to some page and the number before from there on: a guest that finds anything else says
//! `torn=`, and has been restored from a mixture. Says `tick=` after every `every=50` ms, and goes on for ever.
#![no_std]
#![no_main]

use rt::{BootInfo, Outcome, clock, ensure, memory, options, println};

rt::entry!(run);

const PAGE: usize = 4096;

fn run(boot: &'static BootInfo) -> Outcome {
    clock::start();
    let pages = options::number(boot.cmdline, "pages", 256) as usize;
    let every_us = options::number(boot.cmdline, "every", 50) * 1000;
    let memory = memory::allocate(pages * PAGE);
    let mut next_us = 0;
    for pass in 1_u64.. {
        for page in 0..pages {
            let word = &mut memory[page * PAGE + 64..][..8];
            let found = u64::from_le_bytes(word.try_into().unwrap_or_default());
            if found != pass - 1 {
                println!("torn=page {page} has {found}, not {}", pass - 1);
                ensure!(false, "the memory is a mixture");
            }
            word.copy_from_slice(&pass.to_le_bytes());
        }
        let now_us = clock::now_us();
        if now_us >= next_us {
            println!("tick={pass}");
            next_us = now_us + every_us;
        }
    }
    Ok(())
}
