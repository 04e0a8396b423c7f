//! The child of a VMM that copies guest memory: one thread, which takes no lock that another thread of its parent could
//! have held.
#![expect(unsafe_code, reason = "closes descriptors of its parent's")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use crc64fast::Digest;
use rustix::process::{Pid, Signal};

use super::chunk::{CHUNK_PAGES, Chunk, Coverage, ENTRY, Patched, ZEROS, mask, runs, touched};
use super::plan::{Changes, Order, Piece, Plan, Zeroes};
use super::{DONE, EXTENT, FAILED, PAGE, PARTIAL, RECORD_LEN, WITNESS, usize_of};
use crate::memory::pagemap;
use crate::snapshot::{Compression, EXTENT_LEN, Extent, Kind, Packer};

/// Entries of the page map read at once.
const BATCH: usize = 4096;

/// The child's work.
pub(super) struct Copier<'a> {
    order: Order<'a>,
    /// Writes the file, if it is compressed.
    packer: Option<Packer<'a>>,
    /// What is compressed next.
    content: Vec<u8>,
    to_parent: &'a OwnedFd,
    page_map: File,
    /// Entries of the page map.
    entries: Vec<u8>,
    /// Records for the parent.
    records: Vec<u8>,
    /// Whether it has been said that this is not all.
    is_partial: bool,
}

/// What of a chunk goes into the file. Of each set a bit is a page.
struct Pages<'a> {
    /// Those that are not zero.
    full: u64,
    /// Those of the others that are written.
    zero: u64,
    patched: Option<&'a Patched>,
}

impl<'a> Copier<'a> {
    /// Copies; the child's exit status.
    pub(super) fn run(parent: Pid, pieces: &[Piece], order: Order<'a>, pipe: &'a OwnedFd) -> i32 {
        let failed = |to_parent: &OwnedFd, e: &io::Error| {
            let mut record = [0; RECORD_LEN];
            record[0] = FAILED;
            record[1..5].copy_from_slice(&e.raw_os_error().unwrap_or(libc::EIO).to_le_bytes());
            // The parent is gone, or learns it from the end of the pipe.
            let _ = rustix::io::write(to_parent, &record);
            1
        };
        // Whoever made this process must not outlive it unnoticed, nor the other way round.
        let tied = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
        if tied.is_err() || rustix::process::getppid() != Some(parent) {
            return 1;
        }
        close_others(&[order.target.as_raw_fd(), pipe.as_raw_fd()]);
        let mut copier = match Self::new(order, pipe) {
            Ok(copier) => copier,
            Err(e) => return failed(pipe, &e),
        };
        match pieces.iter().try_for_each(|piece| copier.copy(piece)).and_then(|()| copier.end()) {
            Ok(()) => 0,
            Err(e) => failed(pipe, &e),
        }
    }

    fn new(order: Order<'a>, to_parent: &'a OwnedFd) -> io::Result<Self> {
        // This process's own: what the parent does with its memory meanwhile does not matter.
        let page_map = pagemap::open()?;
        let Order { target, compression, ref patch, .. } = order;
        let packer = match compression {
            Compression::None => None,
            _ => Some(Packer::begin(target, compression, &patch.bytes)?),
        };
        let (content, records, entries) = (Vec::new(), Vec::new(), vec![0; BATCH * ENTRY]);
        let is_partial = false;
        Ok(Self { order, packer, content, to_parent, page_map, entries, records, is_partial })
    }

    fn copy(&mut self, piece: &Piece) -> io::Result<()> {
        let pages = usize_of(piece.len) / PAGE;
        let mut base = piece.base.as_deref().map(Coverage);
        let mut before = match self.order.plan {
            Plan::Full => Coverage(&[]),
            Plan::Changes(changes) => Coverage(&changes.before),
        };
        let mut first = 0;
        while first < pages {
            let count = (pages - first).min(BATCH);
            let at = (piece.host / PAGE as u64 + first as u64) * ENTRY as u64;
            let mut entries = std::mem::take(&mut self.entries);
            self.page_map.read_exact_at(&mut entries[..count * ENTRY], at)?;
            let mut done = 0;
            let (words, _) = entries[..count * ENTRY].as_chunks::<ENTRY>();
            for chunk in words.chunks(CHUNK_PAGES) {
                let offset = (first + done) as u64 * PAGE as u64;
                let start = piece.start + offset;
                let all = u64::MAX >> (CHUNK_PAGES - chunk.len());
                let vacated = piece.vacated.get((first + done) / CHUNK_PAGES).copied().unwrap_or(0);
                let touched = touched(chunk, piece.base.is_some());
                let of_base = match &mut base {
                    Some(base) => base.pages(start, chunk.len()) & !vacated,
                    None => 0,
                };
                let here = Chunk {
                    host: piece.host + offset,
                    start,
                    all,
                    // What nobody has written is as the image has it, or zero.
                    written: if base.is_some() { touched | vacated } else { all },
                    present: (touched | of_base)
                        & !self.order.patch.blank_pages(start, chunk.len()),
                    before: before.pages(start, chunk.len()),
                };
                match self.order.plan {
                    Plan::Full => self.copy_chunk(&here)?,
                    Plan::Changes(changes) => self.copy_changes(&here, changes)?,
                }
                done += chunk.len();
            }
            self.entries = entries;
            first += count;
        }
        Ok(())
    }

    /// Copies those of some pages in a row that are not zero.
    fn copy_chunk(&mut self, chunk: &Chunk) -> io::Result<()> {
        let patched = self.patched(chunk);
        if chunk.present == 0 && patched.is_none() {
            return Ok(());
        }
        let full = chunk.full(chunk.present, patched.as_ref());
        if full == 0 {
            return Ok(());
        }
        let first = full.trailing_zeros() as usize;
        let last = full.ilog2() as usize;
        let pages = Pages { full, zero: 0, patched: patched.as_ref() };
        let extent = self.put(chunk, (first, last - first + 1), &pages)?;
        self.record(EXTENT, &extent)
    }

    /// Copies those of some pages in a row that have changed; an extent is of such pages only.
    fn copy_changes(&mut self, chunk: &Chunk, changes: &Changes) -> io::Result<()> {
        let patched = self.patched(chunk);
        let of_patch = patched.as_ref().map_or(0, |(page, _)| 1 << page);
        let changed = match &changes.pages {
            Some(pages) => {
                let index = usize_of(chunk.start) / PAGE / CHUNK_PAGES;
                pages.get(index).copied().unwrap_or(0) & chunk.all
            }
            None => chunk.written,
        };
        let changed = changed | of_patch;
        if chunk.before & !changed != 0 {
            self.bear_witness(chunk, changed, changes)?;
        }
        if changed == 0 {
            return Ok(());
        }
        let full = chunk.full(changed & chunk.present, patched.as_ref());
        let zero = changed & chunk.before & !full;
        let (data, told) = match changes.zeroes {
            Zeroes::Written => (full | zero, 0),
            Zeroes::Told => (full, zero),
        };
        let mut extents: Vec<_> = runs(data).map(|run| (run, Kind::Plain)).collect();
        extents.extend(runs(told).map(|run| (run, Kind::Zero)));
        extents.sort_unstable_by_key(|((first, _), _)| *first);
        let pages = Pages { full, zero, patched: patched.as_ref() };
        for (run, kind) in extents {
            let extent = match kind {
                Kind::Zero => chunk.extent(run.0, run.1, kind, 0),
                _ => self.put(chunk, run, &pages)?,
            };
            self.record(EXTENT, &extent)?;
        }
        Ok(())
    }

    /// Puts `count` pages from the `first` on into the file; the extent that they are.
    fn put(
        &mut self,
        chunk: &Chunk,
        (first, count): (usize, usize),
        pages: &Pages<'_>,
    ) -> io::Result<Extent> {
        let Pages { full, zero, patched } = *pages;
        // A page that is not full is zero, and is not touched.
        let page = |n: usize| if full & 1 << n != 0 { chunk.page(n, patched) } else { &ZEROS };
        let at = |n: usize| chunk.start + (n * PAGE) as u64;
        if let Some(packer) = &mut self.packer {
            self.content.clear();
            (first..first + count).for_each(|n| self.content.extend_from_slice(page(n)));
            return packer.add(at(first), &self.content);
        }
        let mut digest = Digest::new();
        (first..first + count).for_each(|n| digest.write(page(n)));
        for (n, count) in runs(full & mask(first, count)) {
            self.write(chunk, n, count, patched)?;
        }
        for (n, count) in runs(zero & mask(first, count)) {
            (n..n + count).try_for_each(|n| self.order.target.write_all_at(&ZEROS, at(n)))?;
        }
        Ok(chunk.extent(first, count, Kind::Plain, digest.sum64()))
    }

    /// Says that pages of the other snapshot are not in this one, and sums up those that were asked
    /// for.
    fn bear_witness(&mut self, chunk: &Chunk, changed: u64, changes: &Changes) -> io::Result<()> {
        if !self.is_partial {
            self.is_partial = true;
            self.records.push(PARTIAL);
            self.records.extend([0; EXTENT_LEN]);
        }
        let end = chunk.start + u64::from(Extent::LEN_MAX);
        let first = changes.witnesses.partition_point(|at| *at < chunk.start);
        for at in changes.witnesses.iter().skip(first).take_while(|at| **at < end) {
            let n = usize_of(*at - chunk.start) / PAGE;
            if chunk.full(1 << n & !changed & chunk.present & chunk.before, None) != 0 {
                let mut digest = Digest::new();
                digest.write(chunk.page(n, None));
                self.record(WITNESS, &chunk.extent(n, 1, Kind::Plain, digest.sum64()))?;
            }
        }
        Ok(())
    }

    /// The page of the chunk that is patched, if one is.
    fn patched(&self, chunk: &Chunk) -> Option<Patched> {
        let page = usize_of(self.order.patch.at.checked_sub(chunk.start)?) / PAGE;
        (page < CHUNK_PAGES && chunk.all & 1 << page != 0).then(|| {
            let mut bytes = [0; PAGE];
            bytes.copy_from_slice(chunk.page(page, None));
            let at = usize_of(self.order.patch.at) % PAGE;
            bytes[at..][..self.order.patch.bytes.len()].copy_from_slice(&self.order.patch.bytes);
            (page, bytes)
        })
    }

    /// Writes `count` pages from the `first` on.
    fn write(
        &self,
        chunk: &Chunk,
        first: usize,
        count: usize,
        patched: Option<&Patched>,
    ) -> io::Result<()> {
        let at = |n: usize| chunk.start + (n * PAGE) as u64;
        match patched {
            Some((one, _)) if (first..first + count).contains(one) => (first..first + count)
                .try_for_each(|n| self.order.target.write_all_at(chunk.page(n, patched), at(n))),
            _ => self.order.target.write_all_at(chunk.pages(first, count), at(first)),
        }
    }

    fn record(&mut self, what: u8, extent: &Extent) -> io::Result<()> {
        self.records.push(what);
        self.records.extend(extent.to_bytes());
        if self.records.len() >= 64 * RECORD_LEN { self.send() } else { Ok(()) }
    }

    fn end(&mut self) -> io::Result<()> {
        self.records.push(DONE);
        self.records.extend([0; EXTENT_LEN]);
        self.send()
    }

    fn send(&mut self) -> io::Result<()> {
        let mut rest = &self.records[..];
        while !rest.is_empty() {
            match rustix::io::write(self.to_parent, rest) {
                Ok(count) => rest = &rest[count..],
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.records.clear();
        Ok(())
    }
}

/// Closes all descriptors but these and the standard ones: a tap, a socket or a lock must not stay with this process
/// when its parent lets go of it.
fn close_others(kept: &[RawFd; 2]) {
    let [one, other] = *kept;
    let (low, high) = (one.min(other), one.max(other));
    let after_standard = libc::STDERR_FILENO + 1;
    for (first, last) in [(after_standard, low - 1), (low + 1, high - 1), (high + 1, RawFd::MAX)] {
        let (first, last) = (first.max(after_standard).cast_unsigned(), last.cast_unsigned());
        if first <= last {
            // SAFETY: nothing in this process uses the others, nor runs anything that would close them. Kernels before
            // 5.9 do not know the call: then they stay until this process ends, as it does when its parent does.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}
