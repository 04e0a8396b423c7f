#![no_main]
//! Snapshots: state files, memory that is compressed or is not, chains of what has changed, working sets.

use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::begin(), |input: &[u8]| {
    fuzz::snapshot::restore(input);
});
