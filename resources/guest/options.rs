//! The command line: `key=value` words, flags, and virtio-mmio devices.

/// The value of the first `key=value` word.
pub fn value<'a>(cmdline: &'a str, key: &str) -> Option<&'a str> {
    values(cmdline, key).next()
}

/// The values of all `key=value` words, in order.
pub fn values<'a>(cmdline: &'a str, key: &str) -> impl Iterator<Item = &'a str> {
    cmdline
        .split_ascii_whitespace()
        .filter_map(move |word| word.strip_prefix(key)?.strip_prefix('='))
}

/// Whether the word `flag` is there.
pub fn has(cmdline: &str, flag: &str) -> bool {
    cmdline.split_ascii_whitespace().any(|word| word == flag)
}

/// The number in `key=number`, or `default`.
pub fn number(cmdline: &str, key: &str, default: u64) -> u64 {
    value(cmdline, key).and_then(parse).unwrap_or(default)
}

/// Parses decimal or 0x hexadecimal with an optional suffix K, M or G.
pub fn parse(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    number.ok()?.checked_shl(shift)
}
