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
#![expect(unsafe_code, reason = "makes a process")]

mod chunk;
mod copier;
mod plan;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};

use self::copier::Copier;
pub(crate) use self::plan::{Changes, Order, Patch, Piece, Plan, Zeroes};
use crate::snapshot::{EXTENT_LEN, Extent};

const PAGE: usize = 4096;

/// What a copy consists of.
#[derive(Debug, Default)]
pub(crate) struct Dumped {
    pub(crate) extents: Vec<Extent>,
    /// Pages that are in the other snapshot and not in this one, with their sums.
    pub(crate) witnesses: Vec<Extent>,
    /// Whether something is in the other snapshot only.
    pub(crate) is_partial: bool,
}

/// A copy in progress. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Dump {
    child: Option<Pid>,
    results: File,
    /// What has been read of them.
    bytes: Vec<u8>,
}

/// Begins to copy what is ordered of `pieces`, as they are now.
pub(crate) fn begin(pieces: &[Piece], order: Order<'_>) -> io::Result<Dump> {
    let (results, to_parent) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let parent = rustix::process::getpid();
    // SAFETY: the child runs `Copier` and nothing else; it takes no lock but the allocator's, which
    // glibc keeps usable in a child.
    match unsafe { crate::fork::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // A panic ends here: further out are the destructors of the VM, of which this is no more than
            // a copy.
            let run = AssertUnwindSafe(|| Copier::run(parent, pieces, order, &to_parent));
            let status = catch_unwind(run).unwrap_or(1);
            // SAFETY: ends the process at once; nothing is left to be run in it.
            unsafe { libc::_exit(status) }
        }
        pid => {
            Ok(Dump { child: Pid::from_raw(pid), results: File::from(results), bytes: Vec::new() })
        }
    }
}

impl Dump {
    /// Waits until the copy is there; what it consists of.
    pub(crate) fn finish(mut self) -> io::Result<Dumped> {
        self.wait()?;
        let bytes = std::mem::take(&mut self.bytes);
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

    /// Waits until nothing is copied any more, whatever became of it.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        let read = self.results.read_to_end(&mut self.bytes);
        self.reap();
        read.map(drop)
    }

    /// The process that copies. `None` where the kernel has no descriptors of processes.
    pub(crate) fn process(&self) -> Option<OwnedFd> {
        let pidfd = self.child.map(|pid| pidfd_open(pid, PidfdFlags::empty()))?;
        pidfd.inspect_err(|e| log::debug!("cannot open the process that copies memory: {e}")).ok()
    }

    fn reap(&mut self) {
        if let Some(pid) = self.child.take()
            && let Err(e) = rustix::io::retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()))
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

fn usize_of(n: u64) -> usize {
    usize::try_from(n).expect("guest memory is mapped, so its size is an address")
}

#[cfg(test)]
mod tests {
    use vm_memory::mmap::MmapRegion;

    use super::*;
    use crate::snapshot::Compression;

    #[test]
    fn a_copier_that_panics_ends_there() {
        let page: MmapRegion = MmapRegion::new(PAGE).unwrap();
        let target = rustix::fs::memfd_create("dump", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let (host, len) = (page.as_ptr().addr() as u64, PAGE as u64);
        let piece = Piece { host, len, start: 0, base: None, vacated: Vec::new() };
        // It does not fit into its page.
        let patch = Patch { at: len - 1, bytes: [1; 16], blank: 0..0 };
        let (plan, compression) = (Plan::Full, Compression::None);
        let order = Order { plan: &plan, patch, target: &target.into(), compression };
        let mut dump = begin(&[piece], order).unwrap();
        let (_, status) = waitpid(dump.child.take(), WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(1), "{status:?}");
    }
}
