#![no_main]

use fuzz::bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::begin(), |input: &[u8]| {
    let mut input = Bytes::new(input);
    let kind = input.u8();
    fuzz::devices::one("memory-hotplug", kind, input, false);
});
