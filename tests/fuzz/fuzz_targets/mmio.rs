#![no_main]
//! The transport of each model of the device table, register by register, with no driver that knows the way.

use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::begin(), |input: &[u8]| fuzz::devices::any(input, true));
