//! What a guest was told is flushed is in the disk's file, whatever kills husk.
//!
//! A process that is killed loses what it has not given to the kernel, so this is about writes that husk would keep to
//! itself. `HUSK_KILLS` says how many times, for long runs: docs/evidence.md.
use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::exit_truth::{Dice, count};
use crate::util::*;

const SECTORS: u64 = 2048;

/// The two engines a drive can have.
const ENGINES: [&str; 2] = ["io=sync", "io=async"];

/// The last number that the guest was told is safe. A line that is not whole says nothing.
fn last_flushed(said: &str) -> Option<u64> {
    let lines = said.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    lines.filter_map(|line| line.trim().strip_prefix("flushed=")?.parse().ok()).next_back()
}

#[test]
fn what_is_flushed_survives_a_kill() {
    let (times, mut dice) = (count("HUSK_KILLS", 20), Dice(0x9e37_79b9_7f4a_7c15));
    let (mut most, mut in_all) = (0, 0);
    for i in 0..times {
        let scratch = Scratch::new();
        let (disk, serial) = (scratch.sparse("disk", SECTORS * 512), scratch.path("serial"));
        let option = format!("{},{}", disk.display(), ENGINES[(i % 2) as usize]);
        let husk = Husk::guest("sequence", "").memory(16).disk(option);
        let vm = husk.serial(&format!("file={}", serial.display())).start();
        let said = || fs::read_to_string(&serial).unwrap_or_default();
        let deadline = std::time::Instant::now() + PATIENCE;
        while last_flushed(&said()).is_none() {
            assert!(
                vm.is_running() && std::time::Instant::now() < deadline,
                "kill {i}: {}",
                said()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        // The moment is what is random here: there is no event to wait for.
        std::thread::sleep(Duration::from_micros(dice.below(30_000)));
        vm.signal(Signal::KILL);
        assert_eq!(vm.wait().signal(), Some(9));
        let last = last_flushed(&said()).expect("it was told of one before");
        let file = fs::File::open(&disk).unwrap();
        for number in (1..=last).rev().take(SECTORS as usize) {
            let mut sector = [0; 512];
            file.read_exact_at(&mut sector, number % SECTORS * 512).unwrap();
            for word in sector.chunks_exact(8) {
                let found = u64::from_le_bytes(word.try_into().unwrap());
                // What was written after the flush, over a sector that is used again, may be there or not.
                let is_there =
                    found == number || (found > last && found % SECTORS == number % SECTORS);
                assert!(is_there, "kill {i}: sector of {number} holds {found}; flushed: {last}");
            }
        }
        (most, in_all) = (most.max(last), in_all + last);
    }
    println!("{times} kills, {in_all} sectors flushed, at most {most} in one run: none lost");
}
