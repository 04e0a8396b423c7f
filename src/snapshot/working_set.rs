//! Which pages a restored VM touched first: kept beside the snapshot, so that the next restore can have them
//! there before the guest asks.
//!
//! ```text
//!   0  "husk-ws\0"
//!   8  u32 format version   12  u32 zero
//!  16  the snapshot's id, 32 hexadecimal digits
//!  48  runs of 16 bytes: u64 first byte in the image, plus 1 if written; u64 bytes
//!      u64 CRC-64/XZ of all before
//! ```
//!
//! It is advice. One that is missing, damaged or of another snapshot changes nothing but how fast the guest is
//! at first, so nobody waits for it to be on disk.
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::extent::checksum;
use super::{Image, SnapshotError};

const MAGIC: [u8; 8] = *b"husk-ws\0";
const VERSION: u32 = 1;
const ID_LEN: usize = 32;
const HEADER_LEN: usize = 16 + ID_LEN;
const RUN_LEN: usize = 16;
const PAGE: u64 = 4096;
/// More than any guest touches first: 16 million runs.
const LEN_MAX: u64 = 256 << 20;

/// Pages of an image in a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TouchedRun {
    /// Bytes of the image, whole pages.
    pub(crate) range: Range<u64>,
    /// Whether they were written, not only read.
    pub(crate) is_written: bool,
}

/// What a VM touched first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct WorkingSet(pub(crate) Vec<TouchedRun>);

impl WorkingSet {
    /// Bytes, whether read or written.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|run| run.range.end - run.range.start).sum()
    }

    /// Writes it beside `image`.
    pub(crate) fn write(&self, image: &Image) -> Result<(), SnapshotError> {
        let path = path(image);
        let mut name = path.clone().into_os_string();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = PathBuf::from(name);
        let bytes = self.encode(&image.document.id);
        let mut options = File::options();
        let wrote = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(&bytes))
            .and_then(|()| fs::rename(&temporary, &path));
        wrote.map_err(|e| {
            // Not made, or renamed: then there is nothing to remove.
            let _ = fs::remove_file(&temporary);
            SnapshotError::file("cannot write the working set", &path)(e)
        })
    }

    /// What is there beside the image of the snapshot `id`, if it is fit for use.
    pub(crate) fn read(path: &Path, id: &str, len: u64) -> Option<Self> {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(LEN_MAX).read_to_end(&mut bytes));
        match read.map_err(|e| (e.kind(), e)) {
            Ok(_) => {}
            Err((io::ErrorKind::NotFound, _)) => return None,
            Err((_, e)) => {
                log::warn!("{}: the working set is not used: {e}", path.display());
                return None;
            }
        }
        Self::decode(&bytes, id, len)
            .inspect_err(|why| log::warn!("{}: the working set is not used: {why}", path.display()))
            .ok()
    }

    fn encode(&self, id: &str) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.0.len() * RUN_LEN + 8);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(id.as_bytes());
        for TouchedRun { range, is_written } in &self.0 {
            bytes.extend((range.start | u64::from(*is_written)).to_le_bytes());
            bytes.extend((range.end - range.start).to_le_bytes());
        }
        bytes.extend(checksum(&bytes).to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8], id: &str, len: u64) -> Result<Self, &'static str> {
        let (body, sum) = bytes.split_last_chunk().ok_or("it is cut off")?;
        let (header, runs) = body.split_at_checked(HEADER_LEN).ok_or("it is cut off")?;
        if !header.starts_with(&MAGIC) || u64::from_le_bytes(*sum) != checksum(body) {
            return Err("it is damaged");
        }
        if header[8..12] != VERSION.to_le_bytes() {
            return Err("it is of another version");
        }
        if &header[16..] != id.as_bytes() {
            return Err("it is of another snapshot");
        }
        let (runs, []) = runs.as_chunks::<RUN_LEN>() else { return Err("it is cut off") };
        let run = |run: &[u8; RUN_LEN]| {
            let (halves, _) = run.as_chunks::<8>();
            let [start, count] =
                [0, 1].map(|n| halves.get(n).map_or(0, |h| u64::from_le_bytes(*h)));
            let (start, is_written) = (start & !1, start & 1 != 0);
            let end = start.checked_add(count).filter(|end| *end <= len && count > 0);
            let is_whole = start.is_multiple_of(PAGE) && count.is_multiple_of(PAGE);
            end.filter(|_| is_whole).map(|end| TouchedRun { range: start..end, is_written })
        };
        runs.iter()
            .map(run)
            .collect::<Option<_>>()
            .map(Self)
            .ok_or("it has pages that are not there")
    }
}

/// Where that of `image` is: in a snapshot's directory under a name of its own, else beside the memory file.
pub(crate) fn path(image: &Image) -> PathBuf {
    let memory = &image.memory_path;
    if memory.file_name().is_some_and(|name| *name == *format!("memory-{}", image.document.id)) {
        return memory.with_file_name("working-set");
    }
    let mut path = memory.clone().into_os_string();
    path.push(".working-set");
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "00112233445566778899aabbccddeeff";
    const LEN: u64 = 1 << 20;

    fn sample() -> WorkingSet {
        let run = |range, is_written| TouchedRun { range, is_written };
        WorkingSet(vec![run(0..4096, true), run(8192..65536, false), run(65536..LEN, true)])
    }

    #[test]
    fn encoded_and_decoded() {
        assert_eq!(WorkingSet::decode(&sample().encode(ID), ID, LEN), Ok(sample()));
        assert_eq!(sample().bytes(), LEN - 4096);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let good = sample().encode(ID);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(WorkingSet::decode(&bad, ID, LEN).is_err(), "bit {bit}");
        }
        for len in 0..good.len() {
            assert!(WorkingSet::decode(&good[..len], ID, LEN).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn what_does_not_belong_to_the_image_is_refused() {
        let good = sample().encode(ID);
        let other = "ff112233445566778899aabbccddeeff";
        assert_eq!(WorkingSet::decode(&good, other, LEN), Err("it is of another snapshot"));
        let beyond = WorkingSet::decode(&good, ID, LEN - 4096);
        assert_eq!(beyond, Err("it has pages that are not there"));
        let odd = WorkingSet(vec![TouchedRun { range: 2..4098, is_written: false }]).encode(ID);
        assert_eq!(WorkingSet::decode(&odd, ID, LEN), Err("it has pages that are not there"));
    }
}
