//! A memory file that is compressed: the snapshot's id, then what each extent holds, one close behind another.
//!
//! No page of it is at a place where it could be mapped from. An image of it is a file in memory, filled when it is
//! opened; whatever becomes of a memory image can become of that.
use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use super::SnapshotError;
use super::compression::{Compression, Decompressor};
use super::extent::{Extent, Kind};

/// Bytes before the first extent: the id.
pub(super) const HEADER_LEN: u64 = 16;
/// Bytes of a page.
const PAGE: usize = 4096;
/// Threads that decompress: more of them wait for memory.
const THREADS_MAX: usize = 4;

/// Writes such a file.
#[derive(Debug)]
pub(crate) struct Packer<'a> {
    file: &'a File,
    compression: Compression,
    /// Where the next extent goes.
    at: u64,
}

impl<'a> Packer<'a> {
    /// Begins the file of the snapshot `id`.
    pub(crate) fn begin(
        file: &'a File,
        compression: Compression,
        id: &[u8; 16],
    ) -> io::Result<Self> {
        file.write_all_at(id, 0)?;
        Ok(Self { file, compression, at: HEADER_LEN })
    }

    /// Adds what the image has at `start`, of [`Extent::LEN_MAX`] at most.
    pub(crate) fn add(&mut self, start: u64, content: &[u8]) -> io::Result<Extent> {
        let packed = self.compression.compress(content);
        let (kind, stored) = match &packed {
            Some(packed) => (self.compression.kind(), &packed[..]),
            None => (Kind::Plain, content),
        };
        self.file.write_all_at(stored, self.at)?;
        let count = |bytes: &[u8]| u32::try_from(bytes.len()).map_err(io::Error::other);
        let (at, len, sum) = (self.at, count(content)?, sum(kind, content, stored));
        let stored = count(stored)?;
        self.at += u64::from(stored);
        Ok(Extent { start, len, kind, at, stored, sum })
    }
}

/// What is under the sum of an extent: what it holds, and how that is kept unless it is the same.
fn sum(kind: Kind, content: &[u8], stored: &[u8]) -> u64 {
    let mut digest = crc64fast::Digest::new();
    digest.write(content);
    if kind != Kind::Plain {
        digest.write(stored);
    }
    digest.sum64()
}

/// Bytes of a file with these extents.
pub(super) fn len(extents: &[Extent]) -> u64 {
    HEADER_LEN + extents.iter().map(|extent| u64::from(extent.stored)).sum::<u64>()
}

/// Whether extents follow each other without a gap, each compressed in that way or not at all: no byte of the file
/// is under no sum.
pub(super) fn are_close(extents: &[Extent], compression: Compression) -> bool {
    let mut end = HEADER_LEN;
    extents.iter().filter(|extent| extent.kind != Kind::Zero).all(|extent| {
        let Extent { len, kind, at, stored, .. } = *extent;
        let is_kept = match kind {
            Kind::Plain => stored == len,
            kind => kind == compression.kind() && stored < len,
        };
        let is_next = at == end;
        end = end.saturating_add(stored.into());
        is_kept && is_next
    })
}

/// The image of `len` bytes that a file holds, in memory, and the extents of that: its sums have been compared.
pub(super) fn unpack(
    path: &Path,
    file: &File,
    len: u64,
    extents: &[Extent],
) -> Result<(File, Vec<Extent>), SnapshotError> {
    let failed = |e| SnapshotError::file("cannot decompress", path)(e);
    let kept = extents.iter().filter(|extent| extent.kind != Kind::Zero);
    crate::memory::check_host_has(kept.map(|extent| u64::from(extent.len)).sum())
        .map_err(failed)?;
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let image = rustix::io::retry_on_intr(|| rustix::fs::memfd_create("husk-unpacked", flags));
    let image = File::from(image.map_err(|e| failed(e.into()))?);
    image.set_len(len).map_err(failed)?;
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX);
    let share = extents.len().div_ceil(threads).max(1);
    let damaged = thread::scope(|scope| {
        let unpack = |extents| {
            let image = &image;
            let work = move || unpack_some(file, image, extents);
            thread::Builder::new().name("husk_unpack".into()).spawn_scoped(scope, work)
        };
        let shares: io::Result<Vec<_>> = extents.chunks(share).map(unpack).collect();
        let panicked = |_| Err(io::Error::other("a thread that decompresses panicked"));
        let found = shares?.into_iter().map(|share| share.join().unwrap_or_else(panicked));
        found.collect::<io::Result<Vec<_>>>()
    });
    if let Some(Extent { start, len, .. }) = damaged.map_err(failed)?.into_iter().flatten().next() {
        let why = format!("checksum: the {len} bytes at {start:#x} are not what was saved");
        return Err(SnapshotError::Memory { path: path.into(), why });
    }
    let plain = |extent: &Extent| match extent.kind {
        Kind::Zero => *extent,
        _ => Extent { kind: Kind::Plain, at: extent.start, stored: extent.len, ..*extent },
    };
    Ok((image, extents.iter().map(plain).collect()))
}

/// Fills a part of the image; the first extent that is not what was saved, if one is not.
fn unpack_some(file: &File, image: &File, extents: &[Extent]) -> io::Result<Option<Extent>> {
    let mut decompressor = Decompressor::new();
    let (mut stored, mut content) = (Vec::new(), Vec::new());
    for extent in extents.iter().filter(|extent| extent.kind != Kind::Zero) {
        stored.resize(usize::try_from(extent.stored).unwrap_or(0), 0);
        content.resize(usize::try_from(extent.len).unwrap_or(0), 0);
        file.read_exact_at(&mut stored, extent.at)?;
        let is_whole = decompressor.decompress(extent.kind, &stored, &mut content);
        if !is_whole || sum(extent.kind, &content, &stored) != extent.sum {
            return Ok(Some(*extent));
        }
        for (n, page) in content.chunks(PAGE).enumerate() {
            // What is zero takes no memory.
            if page.iter().any(|byte| *byte != 0) {
                image.write_all_at(page, extent.start + (n * PAGE) as u64)?;
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory_file() -> File {
        let fd = rustix::fs::memfd_create("packed", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        File::from(fd)
    }

    /// Two extents that get smaller, and one that does not.
    fn packed(compression: Compression) -> (File, Vec<Extent>) {
        let file = memory_file();
        let mut packer = Packer::begin(&file, compression, &[0xa5; 16]).unwrap();
        let mut noise = vec![0; PAGE];
        rustix::rand::getrandom(&mut noise, rustix::rand::GetRandomFlags::empty()).unwrap();
        let page = PAGE as u64;
        let extents = [
            (0, vec![1; 2 * PAGE]),
            (4 * page, noise),
            (8 * page, [[2; PAGE], [0; PAGE]].concat()),
        ]
        .map(|(start, content)| packer.add(start, &content).unwrap());
        (file, extents.to_vec())
    }

    const BOTH: [Compression; 2] = [Compression::Lz4, Compression::Zstd];
    const LEN: u64 = 16 * PAGE as u64;

    #[test]
    fn an_image_is_what_was_packed() {
        for compression in BOTH {
            let (file, extents) = packed(compression);
            assert_eq!(
                extents.iter().map(|e| e.kind).collect::<Vec<_>>(),
                [compression.kind(), Kind::Plain, compression.kind()]
            );
            assert!(are_close(&extents, compression));
            assert_eq!(file.metadata().unwrap().len(), len(&extents));
            let (image, plain) = unpack(Path::new("memory"), &file, LEN, &extents).unwrap();
            assert_eq!(image.metadata().unwrap().len(), LEN);
            let mut pages = vec![0; 16 * PAGE];
            image.read_exact_at(&mut pages, 0).unwrap();
            let firsts: Vec<_> = pages.chunks(PAGE).map(|page| page[0]).collect();
            assert_eq!(firsts[..4], [1, 1, 0, 0]);
            assert_eq!(firsts[5..], [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
            assert!(plain.iter().all(|e| e.kind == Kind::Plain && e.at == e.start));
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        for compression in BOTH {
            let (file, extents) = packed(compression);
            let len = usize::try_from(len(&extents)).unwrap();
            for at in HEADER_LEN..len as u64 {
                let here =
                    extents.iter().find(|e| (e.at..e.at + u64::from(e.stored)).contains(&at));
                let here = [*here.unwrap()];
                // A page that gets no smaller is as others are.
                let step = if here[0].kind == Kind::Plain { 7 } else { 1 };
                for bit in (0..8).step_by(step) {
                    let mut byte = [0];
                    file.read_exact_at(&mut byte, at).unwrap();
                    file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
                    let found = unpack_some(&file, &memory_file(), &here).unwrap();
                    assert!(found.is_some(), "{compression:?}: bit {bit} at {at}");
                    file.write_all_at(&byte, at).unwrap();
                }
            }
            assert!(unpack_some(&file, &memory_file(), &extents).unwrap().is_none());
        }
    }

    #[test]
    fn gaps_and_strangers_are_refused() {
        let (_, good) = packed(Compression::Lz4);
        assert!(!are_close(&good, Compression::Zstd));
        assert!(!are_close(&good, Compression::None));
        type Spoil = fn(&mut Extent);
        let spoils: [Spoil; 4] = [
            |extent| extent.at += 1,
            |extent| extent.stored = extent.len,
            |extent| extent.kind = Kind::Zstd,
            |extent| extent.kind = Kind::Plain,
        ];
        for spoil in spoils {
            let mut bad = good.clone();
            spoil(&mut bad[2]);
            assert!(!are_close(&bad, Compression::Lz4), "{:?}", bad[2]);
        }
    }

    /// What is said to be in a file decides how much memory is taken.
    #[test]
    fn more_than_the_host_has_is_refused() {
        let (file, extents) = packed(Compression::Lz4);
        let huge = Extent { len: u32::MAX, ..extents[0] };
        let refused = unpack(Path::new("memory"), &file, LEN, &vec![huge; 1 << 12]).unwrap_err();
        assert!(refused.to_string().contains("the host has"), "{refused}");
    }
}
