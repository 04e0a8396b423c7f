//! Copies guest memory to a file while the guest goes on: by a child process, which has the memory as
//! it was when it was made.
//!
//! ```text
//!   guest paused:  fork ──► child: which pages were touched, which of them are not zero,
//!   guest goes on                  their sums; write them ──pipe──► extents
//! ```
//!
//! The kernel copies a page that either side writes; nothing is copied that nobody writes, and the
//! guest stands still only while page tables are copied. The child is made by a process with many
//! threads, of which it has one: it takes no lock that another thread could have held, so it does
//! not log, and ends without running anybody's handlers.
#![expect(unsafe_code, reason = "makes a process, and reads guest memory in it")]

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crc64fast::Digest;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};

use crate::snapshot::{EXTENT_LEN, Extent, Kind};

const PAGE: usize = 4096;
/// Pages of one extent at most: a bit each in a word.
const CHUNK_PAGES: usize = Extent::LEN_MAX as usize / PAGE;
/// Entries of the page map read at once.
const BATCH: usize = 4096;
/// Bytes of an entry of the page map.
const ENTRY: usize = 8;
/// The page is in memory (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
/// The page is in swap.
const SWAPPED: u64 = 1 << 62;
/// The page is a file's, or shared: it has not been written through a private mapping.
const OF_FILE: u64 = 1 << 61;

/// A piece of guest memory to copy.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// Where it is in this process.
    pub(crate) host: u64,
    /// Bytes, a multiple of the page size.
    pub(crate) len: u64,
    /// Where it begins in the image.
    pub(crate) start: u64,
    /// What is behind pages that this process has not written: an image that is mapped privately.
    pub(crate) base: Option<Arc<[Extent]>>,
    /// Which pages of the image have zeroes over them, a bit each: nothing, if none have.
    pub(crate) vacated: Vec<u64>,
}

/// Which pages are copied.
#[derive(Clone, Debug)]
pub(crate) enum Plan {
    /// All that are not zero.
    Full,
    /// Those that have changed since another snapshot.
    Changes(Changes),
}

/// What has changed since another snapshot, and how that is written.
#[derive(Clone, Debug)]
pub(crate) struct Changes {
    /// The pages of the image that have changed, a bit each. `None` if nobody has kept a record: then it
    /// is those that this process has written at all.
    pub(crate) pages: Option<Vec<u64>>,
    /// What was not zero in the other snapshot.
    pub(crate) before: Arc<[Extent]>,
    /// Pages that are looked at if they have not changed, so that the other snapshot can be told by
    /// them: their places in the image, in order.
    pub(crate) witnesses: Vec<u64>,
    /// What becomes of pages that are zero now, and were not.
    pub(crate) zeroes: Zeroes,
}

/// What becomes of pages that have become zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zeroes {
    /// They are written, so that whoever copies what is in the file copies them.
    Written,
    /// The table of extents has them.
    Told,
}

/// What a copy consists of.
#[derive(Debug, Default)]
pub(crate) struct Dumped {
    pub(crate) extents: Vec<Extent>,
    /// Pages that are in the other snapshot and not in this one, with their sums.
    pub(crate) witnesses: Vec<Extent>,
    /// Whether something is in the other snapshot only.
    pub(crate) is_partial: bool,
}

/// What is put over the guest's memory in the copy: a place in the image, and bytes within one page.
#[derive(Clone, Debug)]
pub(crate) struct Patch {
    pub(crate) at: u64,
    pub(crate) bytes: [u8; 16],
    /// Whole pages of the image that are left zero, whatever the guest has there.
    pub(crate) blank: Range<u64>,
}

impl Patch {
    /// Which of `count` pages from `start` are left zero, a bit each.
    fn blank_pages(&self, start: u64, count: usize) -> u64 {
        if self.blank.end <= start || start + (count * PAGE) as u64 <= self.blank.start {
            return 0;
        }
        let pages = (0..count).zip((start..).step_by(PAGE));
        pages.filter(|(_, at)| self.blank.contains(at)).fold(0, |bits, (n, _)| bits | 1 << n)
    }
}

/// A copy in progress. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Dump {
    child: Option<Pid>,
    results: File,
}

/// Begins to copy what `plan` wants of `pieces` to `target`, as they are now.
pub(crate) fn begin(
    pieces: &[Piece],
    plan: &Plan,
    patch: Patch,
    target: &File,
) -> io::Result<Dump> {
    let (results, to_parent) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let parent = rustix::process::getpid();
    // SAFETY: the child runs `Copier` and nothing else; it takes no lock but the allocator's, which
    // glibc keeps usable in a child.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let status = Copier::run(parent, pieces, plan, patch, target, to_parent);
            // SAFETY: ends the process at once; nothing is left to be run in it.
            unsafe { libc::_exit(status) }
        }
        pid => Ok(Dump { child: Pid::from_raw(pid), results: File::from(results) }),
    }
}

impl Dump {
    /// Waits until the copy is there; what it consists of.
    pub(crate) fn finish(mut self) -> io::Result<Dumped> {
        let mut bytes = Vec::new();
        let read = self.results.read_to_end(&mut bytes);
        self.reap();
        read?;
        let ended = || io::Error::other("the process that copies memory ended before it was done");
        let (records, _) = bytes.as_chunks::<RECORD_LEN>();
        let (last, records) = records.split_last().ok_or_else(ended)?;
        match last[0] {
            DONE => {}
            FAILED => {
                let errno = last[1..5].try_into().map(i32::from_le_bytes).unwrap_or(0);
                return Err(io::Error::from_raw_os_error(errno));
            }
            _ => return Err(ended()),
        }
        let mut dumped = Dumped::default();
        for record in records {
            let extent = || Extent::from_bytes(record.last_chunk()?);
            match record[0] {
                EXTENT => dumped.extents.push(extent().ok_or_else(ended)?),
                WITNESS => dumped.witnesses.push(extent().ok_or_else(ended)?),
                PARTIAL => dumped.is_partial = true,
                _ => return Err(ended()),
            }
        }
        Ok(dumped)
    }

    /// The process that copies. `None` where the kernel has no descriptors of processes.
    pub(crate) fn process(&self) -> Option<OwnedFd> {
        let pidfd = self.child.map(|pid| pidfd_open(pid, PidfdFlags::empty()))?;
        pidfd.inspect_err(|e| log::debug!("cannot open the process that copies memory: {e}")).ok()
    }

    fn reap(&mut self) {
        if let Some(pid) = self.child.take()
            && let Err(e) = waitpid(Some(pid), WaitOptions::empty())
        {
            log::warn!("cannot wait for the process that copies memory: {e}");
        }
    }
}

impl Drop for Dump {
    fn drop(&mut self) {
        if let Some(pid) = self.child {
            // Gone already: then there is nothing to end.
            let _ = kill_process(pid, Signal::KILL);
            self.reap();
        }
    }
}

/// A record in the pipe: what it is, then an extent or an error number.
const RECORD_LEN: usize = 1 + EXTENT_LEN;
const EXTENT: u8 = 0;
const DONE: u8 = 1;
const FAILED: u8 = 2;
const WITNESS: u8 = 3;
const PARTIAL: u8 = 4;

/// The child's work.
struct Copier<'a> {
    plan: &'a Plan,
    target: &'a File,
    to_parent: OwnedFd,
    patch: Patch,
    page_map: File,
    /// Entries of the page map.
    entries: Vec<u8>,
    /// Records for the parent.
    records: Vec<u8>,
    /// Whether it has been said that this is not all.
    is_partial: bool,
}

/// A page that is not as the guest has it: which of its chunk, and its bytes.
type Patched = (usize, [u8; PAGE]);

/// Some pages in a row. Of each set a bit is a page.
struct Chunk {
    /// Where they are in this process.
    host: u64,
    /// Where they are in the image.
    start: u64,
    /// Those that there are.
    all: u64,
    /// Those that may not be as what is behind memory.
    written: u64,
    /// Those that may not be zero.
    present: u64,
    /// Those that may not have been zero in another snapshot.
    before: u64,
}

impl Chunk {
    fn pages(&self, first: usize, count: usize) -> &[u8] {
        let host = self.host + (first * PAGE) as u64;
        // SAFETY: the pages are guest memory, which this process alone has as it is, and nobody
        // writes.
        unsafe { std::slice::from_raw_parts(host as *const u8, count * PAGE) }
    }

    fn page<'a>(&'a self, n: usize, patched: Option<&'a Patched>) -> &'a [u8] {
        match patched {
            Some((page, bytes)) if *page == n => bytes,
            _ => self.pages(n, 1),
        }
    }

    /// Which of `wanted` are not zero, and the one that is patched.
    fn full(&self, wanted: u64, patched: Option<&Patched>) -> u64 {
        let of_patch = patched.map_or(0, |(page, _)| 1 << page);
        let is_full = |n: &usize| wanted & 1 << n != 0 && !is_zero(self.page(*n, patched));
        (0..CHUNK_PAGES).filter(is_full).fold(of_patch, |full, n| full | 1 << n)
    }

    /// An extent of `count` pages from the `first` on.
    fn extent(&self, first: usize, count: usize, kind: Kind, sum: u64) -> Extent {
        let start = self.start + (first * PAGE) as u64;
        let len = u32::try_from(count * PAGE).unwrap_or(Extent::LEN_MAX);
        let stored = if kind == Kind::Zero { 0 } else { len };
        Extent { start, len, kind, at: start, stored, sum }
    }
}

impl Copier<'_> {
    /// Copies; the child's exit status.
    fn run(
        parent: Pid,
        pieces: &[Piece],
        plan: &Plan,
        patch: Patch,
        target: &File,
        pipe: OwnedFd,
    ) -> i32 {
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
        close_others(&[target.as_raw_fd(), pipe.as_raw_fd()]);
        // This process's own: what the parent does with its memory meanwhile does not matter.
        let page_map = match File::open("/proc/self/pagemap") {
            Ok(page_map) => page_map,
            Err(e) => return failed(&pipe, &e),
        };
        let entries = vec![0; BATCH * ENTRY];
        let mut copier = Copier {
            plan,
            target,
            to_parent: pipe,
            patch,
            page_map,
            entries,
            records: Vec::new(),
            is_partial: false,
        };
        match pieces.iter().try_for_each(|piece| copier.copy(piece)).and_then(|()| copier.end()) {
            Ok(()) => 0,
            Err(e) => failed(&copier.to_parent, &e),
        }
    }

    fn copy(&mut self, piece: &Piece) -> io::Result<()> {
        let pages = usize_of(piece.len) / PAGE;
        let mut base = piece.base.as_deref().map(Coverage);
        let mut before = match self.plan {
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
                    present: (touched | of_base) & !self.patch.blank_pages(start, chunk.len()),
                    before: before.pages(start, chunk.len()),
                };
                match self.plan {
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
        let mut digest = Digest::new();
        for n in first..=last {
            // A page that is not full is zero, and is not touched.
            digest.write(if full & 1 << n != 0 { chunk.page(n, patched.as_ref()) } else { &ZEROS });
        }
        for (n, count) in runs(full) {
            self.write(chunk, n, count, patched.as_ref())?;
        }
        self.record(EXTENT, &chunk.extent(first, last - first + 1, Kind::Plain, digest.sum64()))
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
        for ((first, count), kind) in extents {
            let mut digest = Digest::new();
            if kind == Kind::Plain {
                for n in first..first + count {
                    let is_zero = full & 1 << n == 0;
                    digest.write(if is_zero { &ZEROS } else { chunk.page(n, patched.as_ref()) });
                }
                for (n, count) in runs(full & mask(first, count)) {
                    self.write(chunk, n, count, patched.as_ref())?;
                }
                for (n, count) in runs(zero & mask(first, count)) {
                    for n in n..n + count {
                        self.target.write_all_at(&ZEROS, chunk.start + (n * PAGE) as u64)?;
                    }
                }
            }
            self.record(EXTENT, &chunk.extent(first, count, kind, digest.sum64()))?;
        }
        Ok(())
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
        let page = usize_of(self.patch.at.checked_sub(chunk.start)?) / PAGE;
        (page < CHUNK_PAGES && chunk.all & 1 << page != 0).then(|| {
            let mut bytes = [0; PAGE];
            bytes.copy_from_slice(chunk.page(page, None));
            let at = usize_of(self.patch.at) % PAGE;
            bytes[at..][..self.patch.bytes.len()].copy_from_slice(&self.patch.bytes);
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
                .try_for_each(|n| self.target.write_all_at(chunk.page(n, patched), at(n))),
            _ => self.target.write_all_at(chunk.pages(first, count), at(first)),
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
            match rustix::io::write(&self.to_parent, rest) {
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

static ZEROS: [u8; PAGE] = [0; PAGE];

/// Which pages this process has touched, a bit each; written, if an image is behind them.
fn touched(entries: &[[u8; ENTRY]], has_base: bool) -> u64 {
    entries.iter().enumerate().fold(0, |bits, (n, entry)| {
        let entry = u64::from_le_bytes(*entry);
        let is_touched =
            entry & SWAPPED != 0 || (entry & PRESENT != 0 && (!has_base || entry & OF_FILE == 0));
        bits | u64::from(is_touched) << n
    })
}

/// Runs of bits: the first of each, and how many.
fn runs(mut bits: u64) -> impl Iterator<Item = (usize, usize)> {
    std::iter::from_fn(move || {
        let first = bits.trailing_zeros();
        let count = bits.checked_shr(first)?.trailing_ones();
        bits &= u64::MAX.checked_shl(first + count).unwrap_or(0);
        Some((first as usize, count as usize))
    })
}

/// `count` bits from the `first` on.
fn mask(first: usize, count: usize) -> u64 {
    (u64::MAX >> (CHUNK_PAGES - count)) << first
}

fn is_zero(page: &[u8]) -> bool {
    // In words, which the compiler makes vectors of.
    let (words, _) = page.as_chunks::<16>();
    words
        .chunks(16)
        .all(|words| words.iter().fold(0, |all, word| all | u128::from_ne_bytes(*word)) == 0)
}

/// The extents of an image, looked up in order.
struct Coverage<'a>(&'a [Extent]);

impl Coverage<'_> {
    /// Which of `count` pages from `start` are in extents, a bit each. Starts only grow.
    fn pages(&mut self, start: u64, count: usize) -> u64 {
        let end = start + (count * PAGE) as u64;
        while let [first, rest @ ..] = self.0
            && first.end() <= start
        {
            self.0 = rest;
        }
        let mut bits = 0;
        for extent in self.0.iter().take_while(|extent| extent.start < end) {
            let from = usize_of(extent.start.max(start) - start) / PAGE;
            let to = usize_of(extent.end().min(end) - start).div_ceil(PAGE);
            (from..to).for_each(|n| bits |= 1 << n);
        }
        bits
    }
}

fn usize_of(n: u64) -> usize {
    usize::try_from(n).expect("guest memory is mapped, so its size is an address")
}
