//! What CPUID says.

use crate::console::Text;
use crate::ring0::cpuid;

/// The CPU's brand string, e.g. `Intel(R) Xeon(R) Processor`, without surrounding blanks.
pub fn brand() -> Text<48> {
    let mut bytes = [0; 48];
    for (leaf, chunk) in (0x8000_0002..).zip(bytes.chunks_mut(16)) {
        copy(chunk, &cpuid(leaf, 0));
    }
    text(&bytes)
}

/// The hypervisor's signature, e.g. `KVMKVMKVM`, or nothing where CPUID says there is none.
pub fn hypervisor() -> Option<Text<12>> {
    if cpuid(1, 0)[2] >> 31 == 0 {
        return None;
    }
    let [_, signature @ ..] = cpuid(0x4000_0000, 0);
    let mut bytes = [0; 12];
    copy(&mut bytes, &signature);
    Some(text(&bytes))
}

/// The CPU vendor, e.g. `GenuineIntel`.
pub fn vendor() -> Text<12> {
    let [_, b, c, d] = cpuid(0, 0);
    let mut bytes = [0; 12];
    copy(&mut bytes, &[b, d, c]);
    text(&bytes)
}

fn copy(to: &mut [u8], registers: &[u32]) {
    for (to, register) in to.chunks_mut(4).zip(registers) {
        to.copy_from_slice(&register.to_le_bytes());
    }
}

fn text<const N: usize>(bytes: &[u8; N]) -> Text<N> {
    let mut text = Text::new();
    let line = core::str::from_utf8(bytes).unwrap_or("?");
    text.push(format_args!("{}", line.trim_matches(|c: char| c == '\0' || c == ' ')));
    text
}
