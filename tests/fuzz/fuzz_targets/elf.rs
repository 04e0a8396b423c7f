#![no_main]
//! ELF kernels: any bytes, or program headers and notes of the fuzzer's choice in a file that is one otherwise.

use fuzz::bytes::Bytes;
use fuzz::kernel::boot;
use libfuzzer_sys::fuzz_target;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Where the notes are.
const NOTES: usize = 0x400;

fuzz_target!(init: fuzz::begin(), |input: &[u8]| {
    match input.split_first() {
        Some((0x7f, _)) => boot(input, "console=ttyS0"),
        Some((_, rest)) => boot(&image(&mut Bytes::new(rest)), "console=ttyS0"),
        None => {}
    }
});

fn image(input: &mut Bytes<'_>) -> Vec<u8> {
    let mut image = vec![0; NOTES];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let count = u16::from(input.below(8));
    let how = input.u8();
    put(16, &u16::from(2 + (how & 1)).to_le_bytes());
    put(18, &62_u16.to_le_bytes());
    put(24, &address(input).to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(54, &56_u16.to_le_bytes());
    put(56, &if how & 0xf0 == 0xf0 { input.u16() } else { count }.to_le_bytes());
    let mut next = 0x10_0000;
    for n in 0..usize::from(count) {
        let at = 64 + 56 * n;
        let how = input.u8();
        let kind = match how & 7 {
            0..5 => PT_LOAD,
            5 | 6 => PT_NOTE,
            _ => input.u32(),
        };
        let offset = if how & 8 == 0 { NOTES as u64 } else { length(input) };
        let filesz = length(input);
        let memsz =
            if how & 0x10 == 0 { filesz.saturating_add(input.u8().into()) } else { length(input) };
        let paddr = if how & 0x20 == 0 { next } else { address(input) };
        next = paddr.saturating_add(memsz);
        put(at, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, paddr), (32, filesz), (40, memsz)] {
            put(at + field, &value.to_le_bytes());
        }
    }
    // Notes whose lengths may be anything.
    while !input.is_empty() {
        let how = input.u8();
        let name: &[u8] = if how & 1 == 0 { b"Xen\0" } else { input.take((how >> 4).into()) };
        let desc = input.take([4, 8, 4, 5][usize::from(how >> 1 & 3)]);
        let lie = |is_lie: bool, len: usize, input: &mut Bytes<'_>| match is_lie {
            true => input.u32(),
            false => len as u32,
        };
        image.extend(lie(how & 0x88 == 0x88, name.len(), input).to_le_bytes());
        image.extend(lie(how & 0x48 == 0x48, desc.len(), input).to_le_bytes());
        image.extend(if how & 0x30 == 0x30 { input.u32() } else { 18 }.to_le_bytes());
        for part in [name, desc] {
            image.extend(part);
            image.resize(image.len().next_multiple_of(4), 0);
        }
    }
    image
}

fn address(input: &mut Bytes<'_>) -> u64 {
    match input.below(8) {
        0..3 => 0x10_0000 + u64::from(input.u16()),
        3 => 0x10_0000 + 16 * u64::from(input.u16()),
        4 => 16 * u64::from(input.u16()),
        5 => (4 << 20) - u64::from(input.u16()),
        6 => u64::MAX - u64::from(input.u8()),
        _ => input.u64(),
    }
}

fn length(input: &mut Bytes<'_>) -> u64 {
    match input.below(8) {
        0..4 => input.u8().into(),
        4..6 => input.u16().into(),
        6 => input.u32().into(),
        _ => input.u64(),
    }
}
