//! The serial console: text is formatted into a fixed buffer and leaves by one `rep outsb`. KVM still exits once a byte,
//! but with no ring-0 instruction between two of them. Lines end in CR LF, as a terminal wants them.

use core::fmt::{self, Write};

use crate::ring0;

/// Prints one line.
#[macro_export]
macro_rules! println {
    () => { $crate::console::line(format_args!("")) };
    ($($arg:tt)*) => { $crate::console::line(format_args!($($arg)*)) };
}

/// Prints text without a line end.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => { $crate::console::text(format_args!($($arg)*)) };
}

/// Prints `args` and a line end. Beyond 1 KiB the text is cut.
pub fn line(args: fmt::Arguments) {
    let mut text = Text::<1024>::new();
    text.push(args);
    text.end_line();
    write(text.as_bytes());
}

/// Prints `args`, at most 1 KiB.
pub fn text(args: fmt::Arguments) {
    let mut text = Text::<1024>::new();
    text.push(args);
    write(text.as_bytes());
}

/// Sends bytes to the first serial port.
pub fn write(bytes: &[u8]) {
    ring0::out_bytes(0x3f8, bytes);
}

/// Text in a buffer of `N` bytes; what does not fit is dropped.
#[derive(Debug)]
pub struct Text<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Text<N> {
    pub const fn new() -> Self {
        Self { bytes: [0; N], len: 0 }
    }

    pub fn push(&mut self, args: fmt::Arguments) {
        // The only error is a full buffer, and cutting the text is the answer to that.
        let _ = self.write_fmt(args);
    }

    /// Appends CR LF, over the last characters if there is no room.
    pub fn end_line(&mut self) {
        self.len = self.len.min(N - 2);
        self.push(format_args!("\r\n"));
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The text, up to a character cut in two.
    pub fn as_str(&self) -> &str {
        match core::str::from_utf8(self.as_bytes()) {
            Ok(text) => text,
            Err(e) => core::str::from_utf8(&self.bytes[..e.valid_up_to()]).unwrap_or(""),
        }
    }
}

impl<const N: usize> Default for Text<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Write for Text<N> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let n = s.len().min(N - self.len);
        self.bytes[self.len..self.len + n].copy_from_slice(&s.as_bytes()[..n]);
        self.len += n;
        if n < s.len() { Err(fmt::Error) } else { Ok(()) }
    }
}
