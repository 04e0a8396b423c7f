#![no_main]
//! bzImages: any bytes, or fields of the fuzzer's choice in a header that is one otherwise.

use fuzz::bytes::Bytes;
use fuzz::kernel::boot;
use libfuzzer_sys::fuzz_target;

/// Fields of the setup header (Documentation/arch/x86/boot.rst): place and bytes.
const FIELDS: [(usize, usize); 14] = [
    (0x1f1, 1),
    (0x1f4, 4),
    (0x1fe, 2),
    (0x201, 1),
    (0x202, 4),
    (0x206, 2),
    (0x211, 1),
    (0x22c, 4),
    (0x230, 4),
    (0x236, 2),
    (0x238, 4),
    (0x250, 8),
    (0x258, 8),
    (0x260, 4),
];

fuzz_target!(init: fuzz::begin(), |input: &[u8]| {
    let mut input = Bytes::new(input);
    let how = input.u8();
    let cmdline = "a".repeat(if how & 2 == 0 { 10 } else { input.u16().into() });
    if how & 1 != 0 {
        return boot(input.rest(), &cmdline);
    }
    let mut image = vec![0; 0x200 * 2];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let body = 0x201 + usize::from(input.u16() % 0x4000);
    put(0x1f1, &[1]);
    put(0x1f4, &(body as u32 / 16).to_le_bytes());
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x201, &[0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &[1, 0]);
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x10_0000_u64.to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    for _ in 0..input.below(5) {
        let (at, len) = input.of(&FIELDS);
        let value = match input.below(4) {
            0 => u64::from(input.u8()),
            1 => 0x10_0000 + u64::from(input.u16()) * 16,
            2 => u64::MAX - u64::from(input.u8()),
            _ => input.u64(),
        };
        put(at, &value.to_le_bytes()[..len]);
    }
    image.resize(image.len() + body, 0x90);
    if input.flip() {
        image.truncate(input.u16().into());
    }
    boot(&image, &cmdline);
});
