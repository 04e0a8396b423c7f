//! The file of a layer: what was written to a disk, at the places where it was written, holes
//! elsewhere. One that is kept has a trailer that says what it is and what it has:
//!
//! ```text
//!   0             the data; as long as the disk, rounded up to granules
//!   T  "husk-ov\0"
//!   T+8   u32 version         T+12  u32 bytes of a granule
//!   T+16  u64 bytes of the disk     T+24  u64 witness: what the base's bytes sum up to, here and there
//!   T+32  u64 1 if sealed     T+40  u64 sum of the map     T+48  u64 sum of the data
//!   T+56  u64 sum of the 56 bytes before
//!   T+4096  the map: a bit for each granule, in chunks of 512 bytes
//! ```
//!
//! Numbers are little-endian, sums CRC-64/XZ. A sealed layer never changes again: it is part of a
//! snapshot, and its map and its data are summed up.
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crc64fast::Digest;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::map::{CHUNK_BYTES, CHUNK_GRANULES, GRANULE, Map, floor};
use crate::backend::file::{self, Access, Kind, OpenError};

const MAGIC: &[u8; 8] = b"husk-ov\0";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
const GRANULE_BYTES: usize = 4096;
const CHUNK_LEN: u64 = CHUNK_BYTES as u64;

/// Why a file will not do as a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// It cannot be opened, or is no file.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is something else.
    #[error("{path} is there, and is no layer: name one, or a file that is not there")]
    Foreign {
        /// The path.
        path: PathBuf,
    },
    /// It belongs to another disk.
    #[error("{path} is a layer of another disk")]
    OtherBase {
        /// The path.
        path: PathBuf,
    },
    /// It belongs to a disk of another size.
    #[error("{path} is a layer of a disk of {is} bytes, this one has {want}")]
    Size {
        /// The path.
        path: PathBuf,
        /// Of the layer.
        is: u64,
        /// Of the disk.
        want: u64,
    },
    /// It is part of a snapshot.
    #[error("{path} is part of a snapshot, which must not change")]
    Sealed {
        /// The path.
        path: PathBuf,
    },
    /// It would have to be over what a snapshot holds.
    #[error("{path} cannot be over the layer of a snapshot: leave it out, or name memory")]
    NotOverLayer {
        /// The path.
        path: PathBuf,
    },
    /// A check has failed.
    #[error("{path} is damaged: {check}")]
    Damaged {
        /// The path.
        path: PathBuf,
        /// Which.
        check: &'static str,
    },
    /// The host failed.
    #[error("cannot {what} {path}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
}

impl LayerError {
    pub(super) fn host(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Host { what, path, source }
    }
}

/// A file, and what it has.
#[derive(Debug)]
pub struct Layer {
    pub(super) file: Arc<File>,
    pub(super) map: Map,
}

/// What a trailer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Bytes of the disk.
    pub size: u64,
    /// What tells its base from others.
    pub witness: u64,
    /// Whether it changes no more. Only then its sums mean something.
    pub is_sealed: bool,
    /// Of the map.
    pub map_sum: u64,
    /// Of the data that the map tells of, in order.
    pub data_sum: u64,
}

/// How many granules a disk has.
pub(super) fn granules(size: u64) -> u64 {
    size.div_ceil(GRANULE)
}

fn trailer_at(size: u64) -> Option<u64> {
    granules(size).checked_mul(GRANULE)
}

fn map_at(size: u64) -> Option<u64> {
    trailer_at(size)?.checked_add(GRANULE)
}

/// How long the file of a layer with a trailer is.
fn file_len(size: u64) -> Option<u64> {
    let chunks = granules(size).div_ceil(CHUNK_GRANULES);
    map_at(size)?.checked_add(chunks.checked_mul(CHUNK_LEN)?)
}

impl Description {
    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let words = [
            u64::from_le_bytes(*MAGIC),
            u64::from(VERSION) | GRANULE << 32,
            self.size,
            self.witness,
            self.is_sealed.into(),
            self.map_sum,
            self.data_sum,
        ];
        let (places, _) = bytes.as_chunks_mut::<8>();
        places.iter_mut().zip(words).for_each(|(to, word)| *to = word.to_le_bytes());
        let sum = checksum(bytes.split_last_chunk::<8>().map_or(&[], |(start, _)| start));
        if let Some(last) = bytes.last_chunk_mut() {
            *last = sum.to_le_bytes();
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let word = |n: usize| bytes.as_chunks::<8>().0.get(n).copied().map(u64::from_le_bytes);
        let this = Self {
            size: word(2)?,
            witness: word(3)?,
            is_sealed: word(4)? == 1,
            map_sum: word(5)?,
            data_sum: word(6)?,
        };
        // All that is not taken apart is the same in every trailer of this version.
        (this.to_bytes() == *bytes).then_some(this)
    }
}

impl Layer {
    /// Reads the trailer and the map of the file at `path`, a layer of a disk of `size` bytes.
    pub(super) fn read(
        path: &Path,
        file: Arc<File>,
        size: u64,
    ) -> Result<(Self, Description), LayerError> {
        let host = |source| LayerError::host("read", path)(source);
        let foreign = || LayerError::Foreign { path: path.into() };
        let damaged = |check| LayerError::Damaged { path: path.into(), check };
        let len = file.metadata().map_err(host)?.len();
        let mut header = [0; HEADER_BYTES];
        let at = trailer_at(size).ok_or_else(foreign)?;
        match file.read_exact_at(&mut header, at) {
            Err(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => return Err(host(e)),
            Ok(()) if header.starts_with(MAGIC) => {}
            // Of a disk of another size the trailer is elsewhere.
            _ => {
                let path = path.into();
                return Err(match other_size(&file, len) {
                    Some(is) if is != size => LayerError::Size { path, is, want: size },
                    _ => LayerError::Foreign { path },
                });
            }
        }
        let description = Description::from_bytes(&header).ok_or_else(|| damaged("header sum"))?;
        let is = description.size;
        if is != size {
            return Err(LayerError::Size { path: path.into(), is, want: size });
        }
        if Some(len) != file_len(size) {
            return Err(damaged("length"));
        }
        let mut digest = Digest::new();
        let map = read_map(&file, size, &mut digest).map_err(host)?;
        let map = map.ok_or_else(|| damaged("map: it goes on behind the end of the disk"))?;
        if description.is_sealed && digest.sum64() != description.map_sum {
            return Err(damaged("map sum"));
        }
        Ok((Self { file, map }, description))
    }

    /// Sums its data up.
    pub(super) fn data_sum(&self, size: u64) -> std::io::Result<u64> {
        let mut digest = Digest::new();
        let mut buffer = vec![0; COPY_BYTES];
        for (at, len) in self.map.runs(granules(size)).flat_map(|run| pieces(run, size)) {
            let Some(piece) = buffer.get_mut(..len) else { continue };
            self.file.read_exact_at(piece, at)?;
            digest.write(piece);
        }
        Ok(digest.sum64())
    }
}

/// Bytes copied at once.
const COPY_BYTES: usize = 256 << 10;

/// A run of granules as places on the disk, in pieces that fit into a buffer.
fn pieces(run: Range<u64>, size: u64) -> impl Iterator<Item = (u64, usize)> {
    let end = run.end.saturating_mul(GRANULE).min(size);
    let starts = (run.start.saturating_mul(GRANULE)..end).step_by(COPY_BYTES);
    starts.map(move |at| {
        let len = end.saturating_sub(at);
        (at, usize::try_from(len).map_or(COPY_BYTES, |len| len.min(COPY_BYTES)))
    })
}

/// Of which disk a file is a layer, going by its length alone: `size` follows from it but for the last
/// granule, which the trailer tells.
fn other_size(file: &File, len: u64) -> Option<u64> {
    // The trailer's page and the map are a 32768th of the data, rounded up to chunks.
    let chunk_span = CHUNK_GRANULES.checked_mul(GRANULE)?.checked_add(CHUNK_LEN)?;
    let rest = len.checked_sub(GRANULE)?;
    let chunks = rest.div_ceil(chunk_span);
    let at = rest.checked_sub(chunks.checked_mul(CHUNK_LEN)?)?;
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, at).ok()?;
    Some(Description::from_bytes(&header)?.size)
}

/// Reads a map, holes of it not; `None` if it has granules that the disk has not.
fn read_map(file: &File, size: u64, digest: &mut Digest) -> std::io::Result<Option<Map>> {
    let mut map = Map::default();
    let (Some(start), Some(end)) = (map_at(size), file_len(size)) else { return Ok(None) };
    let mut at = start;
    while at < end {
        at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        // Where data begins need not be where a chunk begins, but it is in a chunk from the start on.
        let number = at.saturating_sub(start) / CHUNK_LEN;
        at = start.saturating_add(number.saturating_mul(CHUNK_LEN));
        if at >= end {
            break;
        }
        let mut chunk = [0; CHUNK_BYTES];
        file.read_exact_at(&mut chunk, at)?;
        if chunk.iter().any(|byte| *byte != 0) {
            if !map.read_chunk(number, &chunk, granules(size)) {
                return Ok(None);
            }
            sum_chunk(digest, number, &chunk);
        }
        at = at.saturating_add(CHUNK_LEN);
    }
    Ok(Some(map))
}

fn sum_chunk(digest: &mut Digest, number: u64, chunk: &[u8; CHUNK_BYTES]) {
    digest.write(&number.to_le_bytes());
    digest.write(chunk);
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut digest = Digest::new();
    digest.write(bytes);
    digest.sum64()
}

/// What the bytes of a disk sum up to at a few places: enough to tell one image from another. Its
/// start tells file systems and partition tables apart, which have ids and times in there.
pub(super) fn witness(base: &File, size: u64) -> std::io::Result<u64> {
    const PLACES: u64 = 8;
    let mut digest = Digest::new();
    let mut look = |at: u64, len: usize| {
        let mut bytes = [0; 8192];
        let len = usize::try_from(size.saturating_sub(at)).map_or(len, |left| left.min(len));
        let Some(bytes) = bytes.get_mut(..len) else { return Ok(()) };
        base.read_exact_at(bytes, at)?;
        digest.write(bytes);
        std::io::Result::Ok(())
    };
    look(0, 8192)?;
    for n in 1..PLACES {
        look(floor((size / PLACES).saturating_mul(n)), 4096)?;
    }
    look(size.saturating_sub(4096), 4096)?;
    Ok(digest.sum64())
}

/// Makes the file of a layer that is kept, with nothing in it.
pub(super) fn write_empty(file: &File, description: Description) -> std::io::Result<()> {
    let too_large = || std::io::Error::from(std::io::ErrorKind::FileTooLarge);
    file.set_len(file_len(description.size).ok_or_else(too_large)?)?;
    let at = trailer_at(description.size).ok_or_else(too_large)?;
    file.write_all_at(&description.to_bytes(), at)
}

/// Writes one chunk of the map of a layer that is kept.
pub(super) fn write_chunk(file: &File, size: u64, map: &Map, number: u64) -> std::io::Result<()> {
    let offset = number.saturating_mul(CHUNK_LEN);
    let at = map_at(size).and_then(|start| start.checked_add(offset));
    let at = at.ok_or(std::io::ErrorKind::FileTooLarge)?;
    file.write_all_at(&map.chunk_bytes(number), at)
}

/// Seals what `layers` have, the later ones over the earlier, in one file. Gives up when `is_off` says so.
pub(super) fn write_sealed(
    layers: &[Arc<Layer>],
    size: u64,
    witness: u64,
    file: &File,
    is_off: impl Fn() -> bool,
) -> std::io::Result<Description> {
    let draft = Description { size, witness, is_sealed: true, map_sum: 0, data_sum: 0 };
    write_empty(file, draft)?;
    let mut data = Digest::new();
    let all = flatten(layers, size, file, |piece| {
        data.write(piece);
        if is_off() { Err(std::io::Error::other("it was called off")) } else { Ok(()) }
    })?;
    let mut map = Digest::new();
    for (number, chunk) in all.chunks() {
        sum_chunk(&mut map, number, &chunk);
        write_chunk(file, size, &all, number)?;
    }
    let description = Description { map_sum: map.sum64(), data_sum: data.sum64(), ..draft };
    let at = trailer_at(size).ok_or(std::io::ErrorKind::FileTooLarge)?;
    file.write_all_at(&description.to_bytes(), at)?;
    Ok(description)
}

/// Copies what `layers` have, the later ones over the earlier, to an empty file; what that is.
/// `each` sees it, in order.
pub(super) fn flatten(
    layers: &[Arc<Layer>],
    size: u64,
    to: &File,
    mut each: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> std::io::Result<Map> {
    let (mut all, mut buffer) = (Map::default(), vec![0; COPY_BYTES]);
    let (mut at, end) = (0, granules(size));
    while at < end {
        let (source, until) = topmost(layers.iter().map(|layer| &**layer), at, end);
        if let Some(layer) = source {
            all.insert(at..until, |_chunk| {});
            for (at, len) in pieces(at..until, size) {
                let Some(piece) = buffer.get_mut(..len) else { continue };
                layer.file.read_exact_at(piece, at)?;
                each(piece)?;
                write_sparse(to, piece, at)?;
            }
        }
        at = until;
    }
    Ok(all)
}

/// Writes to a file that is empty there: granules of zeroes become holes.
fn write_sparse(to: &File, mut bytes: &[u8], mut at: u64) -> std::io::Result<()> {
    let is_zero = |granule: &&[u8]| granule.iter().all(|byte| *byte == 0);
    while !bytes.is_empty() {
        let zeroes = bytes.chunks(GRANULE_BYTES).take_while(is_zero).map(<[u8]>::len).sum();
        let (zeroes, rest) = bytes.split_at_checked(zeroes).unwrap_or((bytes, &[]));
        at = at.saturating_add(zeroes.len() as u64);
        let full = rest.chunks(GRANULE_BYTES).take_while(|g| !is_zero(g)).map(<[u8]>::len).sum();
        let (full, rest) = rest.split_at_checked(full).unwrap_or((rest, &[]));
        to.write_all_at(full, at)?;
        at = at.saturating_add(full.len() as u64);
        bytes = rest;
    }
    Ok(())
}

/// Which of `layers`, the last one first, has the granule `at`; and the end of the run, `end` at most,
/// of which that is true as well.
pub(super) fn topmost<'a>(
    layers: impl DoubleEndedIterator<Item = &'a Layer>,
    at: u64,
    mut end: u64,
) -> (Option<&'a Layer>, u64) {
    for layer in layers.rev() {
        let (is_in, until) = layer.map.run(at, end);
        end = until;
        if is_in {
            return (Some(layer), end);
        }
    }
    (None, end)
}

/// Opens a layer that is there.
pub(super) fn open(path: &Path, access: Access) -> Result<Arc<File>, LayerError> {
    Ok(Arc::new(file::open(path, access, Kind::Regular)?))
}
