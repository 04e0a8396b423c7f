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
use super::SnapshotError;
use super::extent::{EXTENT_LEN, Extent, checksum};

/// The version that is written. The one before it can be read as well, once there is one.
pub(crate) const VERSION: u32 = 1;
const OLDEST: u32 = 1;
const MAGIC: [u8; 8] = *b"husk-vm\0";
const HEADER_LEN: usize = 64;
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

    /// Reads a file's bytes, and says which check they fail.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let failed = |check| Err(SnapshotError::Damaged(check));
        if bytes.starts_with(&FIRECRACKER) {
            return Err(SnapshotError::Firecracker);
        }
        if !bytes.starts_with(&MAGIC) {
            return Err(SnapshotError::Foreign);
        }
        let Some((header, rest)) = bytes.split_at_checked(HEADER_LEN) else {
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
        let len = |at, size: usize| usize::try_from(word(at)).ok()?.checked_mul(size);
        let (Some(json_len), Some(table_len)) = (len(16, 1), len(24, EXTENT_LEN)) else {
            return failed("length: the file is shorter than its header says");
        };
        if json_len.checked_add(table_len) != Some(rest.len()) {
            return failed("length: the file has another length than its header says");
        }
        let (json, table) = rest.split_at(json_len);
        if word(32) != checksum(json) {
            return failed("state checksum");
        }
        if word(40) != checksum(table) {
            return failed("extents checksum");
        }
        let extents: Option<Vec<_>> = table.as_chunks().0.iter().map(Extent::from_bytes).collect();
        let Some(extents) = extents.filter(|all| are_in_order(all)) else {
            return failed("extents: they are not in order");
        };
        Ok(Self { version, json: json.to_vec(), extents })
    }
}

fn are_in_order(extents: &[Extent]) -> bool {
    extents.iter().zip(extents.iter().skip(1)).all(|(one, next)| one.end() <= next.start)
}

#[cfg(test)]
mod tests {
    use super::super::extent::Kind;
    use super::*;

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
        let file = StateFile::decode(&sample()).unwrap();
        assert_eq!((file.version, &file.json[..]), (VERSION, &br#"{"a": 1}"#[..]));
        assert_eq!(file.extents.iter().map(|e| e.sum).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = sample();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(StateFile::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_other_length_is_found() {
        let good = sample();
        for len in 0..good.len() {
            assert!(StateFile::decode(&good[..len]).is_err(), "{len} bytes");
        }
        assert!(StateFile::decode(&[&good[..], &[0]].concat()).is_err());
    }

    #[test]
    fn versions_and_other_files_are_named() {
        let mut later = sample();
        later[8] = 2;
        let sum = checksum(&later[..56]).to_le_bytes();
        later[56..64].copy_from_slice(&sum);
        let refusal = StateFile::decode(&later).unwrap_err();
        assert!(matches!(refusal, SnapshotError::Version { is: 2, .. }), "{refusal}");
        let refusal = StateFile::decode(&FIRECRACKER).unwrap_err();
        assert!(matches!(refusal, SnapshotError::Firecracker), "{refusal}");
    }
}
