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
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use devices::backend::file::{self, Access, OpenError};
use devices::backend::passed::is_descriptor;

use super::document::hex;
use super::extent::checksum;
use super::temporary::Temporary;
use super::{Image, SnapshotError};

/// Its name in a snapshot's directory; beside two files that of the memory is before it, with a dot.
pub(super) const NAME: &str = "working-set";
const MAGIC: [u8; 8] = *b"husk-ws\0";
const VERSION: u32 = 1;
const ID_LEN: usize = 32;
const HEADER_LEN: usize = 16 + ID_LEN;
const RUN_LEN: usize = 16;
const PAGE: u64 = 4096;
/// More than any guest touches first: 16 million runs.
const LEN_MAX: u64 = 256 << 20;
/// Why one is not used that is as good as any.
const OF_ANOTHER: &str = "it is of another snapshot";

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

    /// Writes that of the snapshot `id`, in the place of what is there.
    pub(crate) fn write(&self, path: &Path, id: &str) -> Result<(), SnapshotError> {
        let mut random = [0; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| SnapshotError::Copy(e.into()))?;
        // Nobody else's, though many VMs may be restored from one snapshot.
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.tmp", hex(&random)));
        let temporary = Temporary::create(path, name.as_ref())?;
        let wrote = temporary.file().write_all(&self.encode(id));
        wrote.map_err(SnapshotError::file("cannot write the working set", path))?;
        temporary.replace(path, name.as_ref())
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
            return Err(OF_ANOTHER);
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

/// The working set that is beside an image.
#[derive(Debug)]
pub(crate) struct Noted {
    file: File,
    path: PathBuf,
    /// Of the image.
    id: String,
    len: u64,
}

impl Noted {
    /// Looks for that of `image`.
    pub(crate) fn find(image: &Image) -> Option<Self> {
        let path = image.working_set_path()?;
        match file::open(&path, Access::Read, file::Kind::Regular) {
            Ok(file) => {
                let (id, len) = (image.document.id.clone(), image.document.memory.len);
                Some(Self { file, path, id, len })
            }
            Err(OpenError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(e) => {
                log::warn!("the working set is not used: {}", crate::error::chain(&e));
                None
            }
        }
    }

    /// What it says, if it is fit for use.
    pub(crate) fn read(self) -> Option<WorkingSet> {
        let Self { file, path, id, len } = self;
        let mut bytes = Vec::new();
        let read = file.take(LEN_MAX).read_to_end(&mut bytes).map_err(|e| e.to_string());
        let set = read.and_then(|_| Ok(WorkingSet::decode(&bytes, &id, len)?));
        let level = match &set {
            // Noted by a VM that was restored before the snapshot was replaced.
            Err(why) if why == OF_ANOTHER => log::Level::Debug,
            _ => log::Level::Warn,
        };
        set.inspect_err(|why| {
            log::log!(level, "{}: the working set is not used: {why}", path.display())
        })
        .ok()
    }
}

/// The id of the snapshot that these bytes say they are the working set of.
fn snapshot_of(bytes: &[u8]) -> Option<&[u8]> {
    bytes.get(16..HEADER_LEN).filter(|_| bytes.starts_with(&MAGIC))
}

/// Whether there is one at `path` that is of another snapshot than `id`.
pub(super) fn is_stale(path: &Path, id: &str) -> bool {
    let mut header = [0; HEADER_LEN];
    let file = file::open(path, Access::Read, file::Kind::Regular);
    file.is_ok_and(|file| file.read_exact_at(&mut header, 0).is_ok())
        && snapshot_of(&header).is_some_and(|of| of != id.as_bytes())
}

impl Image {
    /// Where its working set is: in a snapshot's directory under a name of its own, else beside the memory
    /// file. An image in memory has none, nor has one that came as descriptors.
    pub(crate) fn working_set_path(&self) -> Option<PathBuf> {
        let memory = &self.own.as_ref()?.path;
        if is_descriptor(memory) {
            return None;
        }
        let in_directory = format!("memory-{}", self.document.id);
        if memory.file_name().is_some_and(|name| *name == *in_directory) {
            return Some(memory.with_file_name(NAME));
        }
        let mut path = memory.clone().into_os_string();
        path.push(format!(".{NAME}"));
        Some(path.into())
    }
}

#[cfg(test)]
mod tests {
    use super::super::temporary::tests::{names, scratch};
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
        assert_eq!(WorkingSet::decode(&good, other, LEN), Err(OF_ANOTHER));
        let beyond = WorkingSet::decode(&good, ID, LEN - 4096);
        assert_eq!(beyond, Err("it has pages that are not there"));
        let odd = WorkingSet(vec![TouchedRun { range: 2..4098, is_written: false }]).encode(ID);
        assert_eq!(WorkingSet::decode(&odd, ID, LEN), Err("it has pages that are not there"));
    }

    #[test]
    fn is_written_to_no_file_but_its_own() {
        let directory = scratch();
        let [path, victim] = [NAME, "victim"].map(|name| directory.join(name));
        std::fs::write(&victim, "kept").unwrap();
        for link in [NAME.into(), format!("{NAME}.{}.tmp", std::process::id())] {
            std::os::unix::fs::symlink(&victim, directory.join(link)).unwrap();
        }
        sample().write(&path, ID).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"kept", "a link was followed");
        assert_eq!(std::fs::read(&path).unwrap(), sample().encode(ID));
        assert!(is_stale(&path, "another") && !is_stale(&path, ID));
        assert_eq!(names(&directory).len(), 3, "something is left over");
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
