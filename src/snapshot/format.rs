//! The state file: a header, a JSON document, a table of the memory image's extents.
//!
//! ```text
//!   0  "husk-vm\0"
//!   8  u32 format version     12  u32 zero
//!  16  u64 bytes of JSON      24  u64 extents
//!  32  u64 sum of the JSON    40  u64 sum of the extents
//!  48  u64 zero               56  u64 sum of the 56 bytes before
//!  64  JSON, then extents of 40 bytes each
//! ```
//!
//! Numbers are little-endian, sums CRC-64/XZ. Every bit of the file is under one of the sums.
use std::io::Read;

use crc64fast::Digest;

use super::SnapshotError;
use super::extent::{EXTENT_LEN, Extent, checksum};

/// The version that is written. The one before it can be read as well, once there is one.
pub(crate) const VERSION: u32 = 1;
const OLDEST: u32 = 1;
const MAGIC: [u8; 8] = *b"husk-vm\0";
const HEADER_LEN: usize = 64;
/// More bytes than the JSON of any state has, with 32 vCPUs and 17 devices.
const JSON_MAX: u64 = 64 << 20;
/// Bytes of extents that are read at once.
const PIECE_LEN: usize = 256 * EXTENT_LEN;
/// How Firecracker's state files begin on x86-64.
const FIRECRACKER: [u8; 8] = 0x0710_1984_8664_0000_u64.to_le_bytes();

/// What a state file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateFile {
    pub(crate) version: u32,
    pub(crate) json: Vec<u8>,
    pub(crate) extents: Vec<Extent>,
}

impl StateFile {
    /// The file's bytes.
    pub(crate) fn encode(json: &[u8], extents: &[Extent]) -> Vec<u8> {
        let table: Vec<u8> = extents.iter().flat_map(|extent| extent.to_bytes()).collect();
        let mut bytes = Vec::with_capacity(HEADER_LEN + json.len() + table.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend((json.len() as u64).to_le_bytes());
        bytes.extend((extents.len() as u64).to_le_bytes());
        bytes.extend(checksum(json).to_le_bytes());
        bytes.extend(checksum(&table).to_le_bytes());
        bytes.extend(0_u64.to_le_bytes());
        bytes.extend(checksum(&bytes).to_le_bytes());
        bytes.extend(json);
        bytes.extend(table);
        bytes
    }

    /// Bytes of it.
    pub(crate) fn len(&self) -> u64 {
        (HEADER_LEN + self.json.len() + self.extents.len() * EXTENT_LEN) as u64
    }

    /// Reads a file of `len` bytes, and says which check it fails; `failed` says that it cannot be read. What the
    /// header says is believed only as far as the file goes on: nothing is kept of one that is not sound.
    pub(crate) fn read(
        from: &mut impl Read,
        len: u64,
        failed: impl Fn(std::io::Error) -> SnapshotError,
    ) -> Result<Self, SnapshotError> {
        let damaged = SnapshotError::Damaged;
        let (Header { version, extents: count, extents_sum, .. }, json) =
            read_json(from, len, &failed)?;
        let (mut extents, mut digest) = (Vec::new(), Digest::new());
        let (mut end, mut left) = (0, count);
        let mut piece = [0; PIECE_LEN];
        while left > 0 {
            let count = left.min((PIECE_LEN / EXTENT_LEN) as u64);
            let bytes = usize::try_from(count).map_or(PIECE_LEN, |count| count * EXTENT_LEN);
            let piece = &mut piece[..bytes];
            from.read_exact(piece).map_err(&failed)?;
            digest.write(piece);
            for record in piece.as_chunks().0 {
                let extent = Extent::from_bytes(record).filter(|extent| extent.start >= end);
                let extent = extent.ok_or(damaged("extents: they are not in order"))?;
                end = extent.end();
                extents.push(extent);
            }
            left -= count;
        }
        if extents_sum != digest.sum64() {
            return Err(damaged("extents checksum"));
        }
        Ok(Self { version, json, extents })
    }

    /// The JSON alone, checked: what it costs does not grow with the memory of the VM.
    pub(crate) fn read_json(
        from: &mut impl Read,
        len: u64,
        failed: impl Fn(std::io::Error) -> SnapshotError,
    ) -> Result<Vec<u8>, SnapshotError> {
        read_json(from, len, failed).map(|(_, json)| json)
    }
}

fn read_json(
    from: &mut impl Read,
    len: u64,
    failed: impl Fn(std::io::Error) -> SnapshotError,
) -> Result<(Header, Vec<u8>), SnapshotError> {
    let mut bytes = Vec::with_capacity(HEADER_LEN);
    from.take(HEADER_LEN as u64).read_to_end(&mut bytes).map_err(&failed)?;
    let header = Header::decode(&bytes, len)?;
    let mut json = vec![0; header.json_len];
    from.read_exact(&mut json).map_err(&failed)?;
    match header.json_sum == checksum(&json) {
        true => Ok((header, json)),
        false => Err(SnapshotError::Damaged("state checksum")),
    }
}

/// What a header says.
struct Header {
    version: u32,
    json_len: usize,
    json_sum: u64,
    extents: u64,
    extents_sum: u64,
}

impl Header {
    /// Reads that of a file of `len` bytes, given the first of them.
    fn decode(bytes: &[u8], len: u64) -> Result<Self, SnapshotError> {
        let failed = |check| Err(SnapshotError::Damaged(check));
        if bytes.starts_with(&FIRECRACKER) {
            return Err(SnapshotError::Firecracker);
        }
        if !bytes.starts_with(&MAGIC) {
            return Err(SnapshotError::Foreign);
        }
        let Some(header) = bytes.get(..HEADER_LEN) else {
            return failed("length: the file ends within its header");
        };
        let word = |at: usize| {
            let bytes = header.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        if word(56) != checksum(&header[..56]) {
            return failed("header checksum");
        }
        let version = u32::try_from(word(8)).unwrap_or(u32::MAX);
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(SnapshotError::Version { is: version, newest: VERSION, oldest: OLDEST });
        }
        let (json_len, extents) = (word(16), word(24));
        let table_len = extents.checked_mul(EXTENT_LEN as u64);
        let all = table_len.and_then(|table| table.checked_add(json_len));
        if all.and_then(|all| all.checked_add(HEADER_LEN as u64)) != Some(len) {
            return failed("length: the file has another length than its header says");
        }
        match usize::try_from(json_len) {
            Ok(json) if json_len <= JSON_MAX => Ok(Self {
                version,
                json_len: json,
                json_sum: word(32),
                extents,
                extents_sum: word(40),
            }),
            _ => failed("length: its state is longer than any is"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::extent::Kind;
    use super::*;

    fn decode(bytes: &[u8]) -> Result<StateFile, SnapshotError> {
        let failed = |e| panic!("all of it is there: {e}");
        StateFile::read(&mut &bytes[..], bytes.len() as u64, failed)
    }

    fn sample() -> Vec<u8> {
        let extent = |start, sum| Extent {
            start,
            len: 4096,
            kind: Kind::Plain,
            at: start,
            stored: 4096,
            sum,
        };
        StateFile::encode(br#"{"a": 1}"#, &[extent(0, 1), extent(8192, 2)])
    }

    #[test]
    fn encoded_and_decoded() {
        let file = decode(&sample()).unwrap();
        assert_eq!((file.version, &file.json[..]), (VERSION, &br#"{"a": 1}"#[..]));
        assert_eq!(file.extents.iter().map(|e| e.sum).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = sample();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_other_length_is_found() {
        let good = sample();
        for len in 0..good.len() {
            assert!(decode(&good[..len]).is_err(), "{len} bytes");
        }
        assert!(decode(&[&good[..], &[0]].concat()).is_err());
    }

    #[test]
    fn versions_and_other_files_are_named() {
        let mut later = sample();
        later[8] = 2;
        let sum = checksum(&later[..56]).to_le_bytes();
        later[56..64].copy_from_slice(&sum);
        let refusal = decode(&later).unwrap_err();
        assert!(matches!(refusal, SnapshotError::Version { is: 2, .. }), "{refusal}");
        let refusal = decode(&FIRECRACKER).unwrap_err();
        assert!(matches!(refusal, SnapshotError::Firecracker), "{refusal}");
    }

    #[test]
    fn nothing_is_taken_on_trust() {
        // A header that is as it should be; behind it zeroes, as in a file that is a hole.
        let refusal = |json_len: u64, extents: u64| {
            let mut header = sample()[..HEADER_LEN].to_vec();
            for (at, word) in [(16, json_len), (24, extents), (32, checksum(&[]))] {
                header[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
            let sum = checksum(&header[..56]).to_le_bytes();
            header[56..].copy_from_slice(&sum);
            let len = HEADER_LEN as u64 + json_len + extents * EXTENT_LEN as u64;
            let mut file = header.chain(std::io::repeat(0));
            StateFile::read(&mut file, len, |e| panic!("{e}")).unwrap_err().to_string()
        };
        assert!(refusal(JSON_MAX + 1, 0).contains("its state is longer than any is"));
        assert!(refusal(0, 1 << 40).contains("extents: "));
    }
}
