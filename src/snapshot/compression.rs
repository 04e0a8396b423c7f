//! Pieces of memory in less space, each by itself.
use ruzstd::decoding::FrameDecoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::extent::{Extent, Kind};

/// How the memory in a snapshot is compressed.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// It is not: its file is mapped when the VM is restored.
    #[default]
    None,
    /// By LZ4: fast.
    Lz4,
    /// By Zstandard: small.
    Zstd,
}

impl Compression {
    /// Whether there is none.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::None
    }

    /// Its name, as in the API.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// What its extents are, besides such as do not get smaller.
    pub(super) fn kind(self) -> Kind {
        match self {
            Self::None => Kind::Plain,
            Self::Lz4 => Kind::Lz4,
            Self::Zstd => Kind::Zstd,
        }
    }

    /// `content` compressed. `None` if that is no smaller.
    pub(super) fn compress(self, content: &[u8]) -> Option<Vec<u8>> {
        let packed = match self {
            Self::None => return None,
            Self::Lz4 => lz4_flex::block::compress(content),
            Self::Zstd => compress_to_vec(content, CompressionLevel::Fastest),
        };
        (packed.len() < content.len()).then_some(packed)
    }
}

/// Takes what was compressed, whoever says that it was.
pub(crate) struct Decompressor(FrameDecoder);

impl Decompressor {
    pub(crate) fn new() -> Self {
        let mut decoder = FrameDecoder::new();
        // No extent refers to more than itself: a frame that wants more memory is none of husk's.
        decoder.set_max_window_size(Extent::LEN_MAX.into());
        Self(decoder)
    }

    /// Fills `content` with what `stored` holds. False if that is not exactly as much.
    pub(crate) fn decompress(&mut self, kind: Kind, stored: &[u8], content: &mut [u8]) -> bool {
        let len = content.len();
        match kind {
            Kind::Plain if stored.len() == len => {
                content.copy_from_slice(stored);
                true
            }
            Kind::Plain | Kind::Zero => false,
            Kind::Lz4 => lz4_flex::block::decompress_into(stored, content).is_ok_and(|n| n == len),
            Kind::Zstd => self.0.decode_all(stored, content).is_ok_and(|n| n == len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Compression; 2] = [Compression::Lz4, Compression::Zstd];

    /// Neither all the same nor all different, as memory is.
    fn content(len: usize) -> Vec<u8> {
        let mut state = 1_u32;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        (0..len).map(|n| if n % 64 < 40 { (n / 64).to_le_bytes()[0] } else { next() }).collect()
    }

    #[test]
    fn what_was_compressed_comes_back() {
        for compression in BOTH {
            for len in [4096, 64 << 10, Extent::LEN_MAX as usize] {
                let content = content(len);
                let packed = compression.compress(&content).unwrap();
                let mut back = vec![0xff; len];
                let mut decompressor = Decompressor::new();
                assert!(decompressor.decompress(compression.kind(), &packed, &mut back));
                assert_eq!(back, content, "{compression:?}");
                // Twice, with what is left of the first time.
                assert!(decompressor.decompress(compression.kind(), &packed, &mut back));
                assert_eq!(back, content, "{compression:?}");
            }
        }
    }

    #[test]
    fn what_gets_no_smaller_is_left() {
        let mut noise = vec![0; 4096];
        rustix::rand::getrandom(&mut noise, rustix::rand::GetRandomFlags::empty()).unwrap();
        for compression in BOTH {
            assert_eq!(compression.compress(&noise), None);
        }
    }

    /// It gives what was asked for, or nothing; and it does not go beyond its place.
    #[test]
    fn what_is_damaged_stays_in_bounds() {
        for compression in BOTH {
            let content = content(4 << 10);
            let good = compression.compress(&content).unwrap();
            let mut decompressor = Decompressor::new();
            for len in [2048, content.len() - 1, content.len() + 1, Extent::LEN_MAX as usize] {
                let mut other = vec![0; len];
                assert!(!decompressor.decompress(compression.kind(), &good, &mut other));
            }
            let mut back = vec![0; content.len()];
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                // Whether it is what was meant is told by its sum.
                decompressor.decompress(compression.kind(), &bad, &mut back);
            }
            for cut in 0..good.len() {
                let is_whole = decompressor.decompress(compression.kind(), &good[..cut], &mut back);
                assert!(!is_whole || back == content, "{cut} bytes");
            }
        }
    }

    /// A frame of 128 KiB that would become 4 GiB: blocks that each repeat a byte (RFC 8878, 3.1.1.2).
    #[test]
    fn a_bomb_is_refused() {
        let mut bomb = b"\x28\xb5\x2f\xfd\x00\x38".to_vec();
        let block = |is_last: u32| (is_last | 1 << 1 | (128 << 10) << 3).to_le_bytes();
        for _ in 0..32 << 10 {
            bomb.extend(&block(0)[..3]);
            bomb.push(0);
        }
        bomb.extend(&block(1)[..3]);
        bomb.push(0);
        let mut content = vec![0; Extent::LEN_MAX as usize];
        assert!(!Decompressor::new().decompress(Kind::Zstd, &bomb, &mut content));
        // The same for a window of 2 GiB, which nothing should be set aside for.
        let mut window = bomb[..6].to_vec();
        window[5] = 0xa8;
        window.extend(&block(1)[..3]);
        window.push(7);
        assert!(!Decompressor::new().decompress(Kind::Zstd, &window, &mut content[..128 << 10]));
        // And one that is right, to know that the frames above are frames.
        window[5] = 0x38;
        assert!(Decompressor::new().decompress(Kind::Zstd, &window, &mut content[..128 << 10]));
        assert!(content[..128 << 10].iter().all(|byte| *byte == 7));
    }
}
