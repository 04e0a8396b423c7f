//! Where the bytes of a memory image are in its file, and what they sum up to.

/// A piece of a memory image that is not all zero, or of one that was not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Its place in the image: a multiple of the page size.
    pub(crate) start: u64,
    /// Bytes: a multiple of the page size, [`Extent::LEN_MAX`] at most.
    pub(crate) len: u32,
    /// How it is kept.
    pub(crate) kind: Kind,
    /// Where it is in the file.
    pub(crate) at: u64,
    /// Bytes in the file.
    pub(crate) stored: u32,
    /// CRC-64/XZ of what it holds, and of how that is kept if it is compressed.
    pub(crate) sum: u64,
}

/// How an extent is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    /// As it is, at its place in the image.
    Plain = 0,
    /// Not at all: zeroes, where another snapshot that this one goes over has something.
    Zero = 1,
    /// As an LZ4 block, close behind the extent before.
    Lz4 = 2,
    /// As a Zstandard frame, close behind the extent before.
    Zstd = 3,
}

/// The bytes of one extent in a file.
pub(crate) const EXTENT_LEN: usize = 40;

impl Extent {
    /// Most bytes of one.
    pub(crate) const LEN_MAX: u32 = 256 << 10;

    /// The first byte of the image behind it.
    pub(crate) fn end(&self) -> u64 {
        self.start + u64::from(self.len)
    }

    /// As it is written to a file: little-endian numbers.
    pub(crate) fn to_bytes(self) -> [u8; EXTENT_LEN] {
        let mut bytes = [0; EXTENT_LEN];
        bytes[..8].copy_from_slice(&self.start.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.at.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.stored.to_le_bytes());
        bytes[32..].copy_from_slice(&self.sum.to_le_bytes());
        bytes
    }

    /// The same, read. `None` if it cannot be one.
    pub(crate) fn from_bytes(bytes: &[u8; EXTENT_LEN]) -> Option<Self> {
        let (numbers, _) = bytes.as_chunks::<4>();
        let half = |n: usize| numbers.get(n).copied().map(u32::from_le_bytes);
        let word = |n: usize| Some(u64::from(half(n)?) | u64::from(half(n + 1)?) << 32);
        let kind = match half(3)? {
            0 => Kind::Plain,
            1 => Kind::Zero,
            2 => Kind::Lz4,
            3 => Kind::Zstd,
            _ => return None,
        };
        let extent = Self {
            start: word(0)?,
            len: half(2)?,
            kind,
            at: word(4)?,
            stored: half(6)?,
            sum: word(8)?,
        };
        let is_sound = (1..=Self::LEN_MAX).contains(&extent.len)
            && extent.start.checked_add(u64::from(extent.len)).is_some();
        is_sound.then_some(extent)
    }
}

/// The CRC-64/XZ of `bytes`.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    let mut digest = crc64fast::Digest::new();
    digest.write(bytes);
    digest.sum64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_back() {
        let extent = Extent {
            start: 1 << 40,
            len: Extent::LEN_MAX,
            kind: Kind::Plain,
            at: u64::MAX,
            stored: 7,
            sum: 0x0123_4567_89ab_cdef,
        };
        assert_eq!(Extent::from_bytes(&extent.to_bytes()), Some(extent));
        let none = Extent { len: 0, ..extent };
        assert_eq!(Extent::from_bytes(&none.to_bytes()), None);
        let wraps = Extent { start: u64::MAX, ..extent };
        assert_eq!(Extent::from_bytes(&wraps.to_bytes()), None);
    }
}
