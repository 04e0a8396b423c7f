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

/// What is put over the guest's memory in the copy: a place in the image, and bytes within one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patch {
    pub(crate) at: u64,
    pub(crate) bytes: [u8; 16],
}

/// A copy in progress. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Dump {
    child: Option<Pid>,
    results: File,
}

/// Begins to copy `pieces` to `target`, as they are now.
pub(crate) fn begin(pieces: &[Piece], patch: Patch, target: &File) -> io::Result<Dump> {
    let (results, to_parent) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let parent = rustix::process::getpid();
    // SAFETY: the child runs `Copier` and nothing else; it takes no lock but the allocator's, which
    // glibc keeps usable in a child.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let status = Copier::run(parent, pieces, patch, target, to_parent);
            // SAFETY: ends the process at once; nothing is left to be run in it.
            unsafe { libc::_exit(status) }
        }
        pid => Ok(Dump { child: Pid::from_raw(pid), results: File::from(results) }),
    }
}

impl Dump {
    /// Waits until the copy is there; what it consists of.
    pub(crate) fn finish(mut self) -> io::Result<Vec<Extent>> {
        let mut bytes = Vec::new();
        let read = self.results.read_to_end(&mut bytes);
        self.reap();
        read?;
        let ended = || io::Error::other("the process that copies memory ended before it was done");
        let (records, _) = bytes.as_chunks::<RECORD_LEN>();
        let (last, extents) = records.split_last().ok_or_else(ended)?;
        match last[0] {
            DONE => {}
            FAILED => {
                let errno = last[1..5].try_into().map(i32::from_le_bytes).unwrap_or(0);
                return Err(io::Error::from_raw_os_error(errno));
            }
            _ => return Err(ended()),
        }
        let extent = |record: &[u8; RECORD_LEN]| Extent::from_bytes(record.last_chunk()?);
        extents.iter().map(extent).collect::<Option<_>>().ok_or_else(ended)
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

/// The child's work.
struct Copier<'a> {
    target: &'a File,
    to_parent: OwnedFd,
    patch: Patch,
    page_map: File,
    /// Entries of the page map.
    entries: Vec<u8>,
    /// Records for the parent.
    records: Vec<u8>,
}

impl Copier<'_> {
    /// Copies; the child's exit status.
    fn run(parent: Pid, pieces: &[Piece], patch: Patch, target: &File, pipe: OwnedFd) -> i32 {
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
        let mut copier =
            Copier { target, to_parent: pipe, patch, page_map, entries, records: Vec::new() };
        match pieces.iter().try_for_each(|piece| copier.copy(piece)).and_then(|()| copier.end()) {
            Ok(()) => 0,
            Err(e) => failed(&copier.to_parent, &e),
        }
    }

    fn copy(&mut self, piece: &Piece) -> io::Result<()> {
        let pages = usize_of(piece.len) / PAGE;
        let mut base = piece.base.as_deref().map(Coverage);
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
                let mut wanted = touched(chunk, piece.base.is_some());
                if let Some(base) = &mut base {
                    let vacated = piece.vacated.get((first + done) / CHUNK_PAGES);
                    wanted |= base.pages(start, chunk.len()) & !vacated.unwrap_or(&0);
                }
                if wanted != 0 {
                    self.copy_chunk(piece.host + offset, start, wanted, chunk.len())?;
                }
                done += chunk.len();
            }
            self.entries = entries;
            first += count;
        }
        Ok(())
    }

    /// Copies those of some pages in a row that are `wanted`, a bit each, and not zero.
    fn copy_chunk(&mut self, host: u64, start: u64, wanted: u64, pages: usize) -> io::Result<()> {
        // SAFETY: the pages are guest memory, which this process alone has as it is, and nobody
        // writes.
        let bytes = unsafe { std::slice::from_raw_parts(host as *const u8, pages * PAGE) };
        let mut patched = [0; PAGE];
        let patched_page = self.patch.at.checked_sub(start).map(|at| usize_of(at) / PAGE);
        if let Some(page) = patched_page.filter(|page| *page < pages) {
            patched.copy_from_slice(&bytes[page * PAGE..][..PAGE]);
            let at = usize_of(self.patch.at) % PAGE;
            patched[at..][..self.patch.bytes.len()].copy_from_slice(&self.patch.bytes);
        }
        let page = |n: usize| match patched_page {
            Some(page) if page == n => &patched[..],
            _ => &bytes[n * PAGE..][..PAGE],
        };
        let is_full =
            |n: usize| patched_page == Some(n) || (wanted & 1 << n != 0 && !is_zero(page(n)));
        let full = (0..pages).filter(|n| is_full(*n)).fold(0_u64, |full, n| full | 1 << n);
        if full == 0 {
            return Ok(());
        }
        let first = full.trailing_zeros() as usize;
        let last = full.ilog2() as usize;
        let mut digest = Digest::new();
        for n in first..=last {
            // A page that is not full is zero, and is not touched.
            digest.write(if full & 1 << n != 0 { page(n) } else { &ZEROS });
        }
        for (n, count) in runs(full) {
            let at = start + (n * PAGE) as u64;
            match patched_page {
                Some(one) if (n..n + count).contains(&one) => {
                    for n in n..n + count {
                        self.target.write_all_at(page(n), start + (n * PAGE) as u64)?;
                    }
                }
                _ => self.target.write_all_at(&bytes[n * PAGE..][..count * PAGE], at)?,
            }
        }
        let len = u32::try_from((last - first + 1) * PAGE).unwrap_or(Extent::LEN_MAX);
        let start = start + (first * PAGE) as u64;
        self.record(&Extent {
            start,
            len,
            kind: Kind::Plain,
            at: start,
            stored: len,
            sum: digest.sum64(),
        })
    }

    fn record(&mut self, extent: &Extent) -> io::Result<()> {
        self.records.push(EXTENT);
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
