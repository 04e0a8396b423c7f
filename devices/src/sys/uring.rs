//! Reads, writes and syncs of files that go on while the caller does something else (io_uring).
//!
//! Memory that the kernel works on must stay where it is until the kernel is done. So a [`Uring`]
//! keeps guest memory mapped and files open as long as anything is in flight, and lets pieces of
//! no other memory in.
#![expect(unsafe_code, reason = "io_uring works on memory that it is given the addresses of")]
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use vmm_sys_util::eventfd::EventFd;

use super::again::{again, eventfd};

use super::rw::{Full, IoSlices};
use crate::GuestRam;

/// How long a dropped ring is waited for before what it uses is left to the kernel for good.
const PATIENCE: Duration = Duration::from_millis(500);
/// Room for pieces of memory that a slot keeps: more would be for one operation in a thousand.
const VECTORS_KEPT: usize = 128;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
}

/// Something that was begun and has ended.
#[derive(Debug)]
pub struct Ended {
    /// What it was begun with.
    pub token: u16,
    /// Whether all of it was done. The end of the file is an error.
    pub result: Result<()>,
}

/// A ring of the kernel's with nothing in flight. It reads, writes and syncs files, and does nothing else for anybody:
/// what it is asked no seccomp filter sees.
struct Ring {
    ring: IoUring,
    event: Arc<EventFd>,
}

impl Ring {
    fn new(entries: u16) -> Result<Self> {
        let ring =
            again(|| IoUring::builder().dontfork().setup_r_disabled().build(entries.into()))?;
        let event = eventfd()?;
        let submitter = ring.submitter();
        again(|| submitter.register_eventfd(event.as_raw_fd()))?;
        let mut allowed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE]
            .map(Restriction::sqe_op);
        again(|| submitter.register_restrictions(&mut allowed))?;
        again(|| submitter.register_enable_rings())?;
        Ok(Self { ring, event: Arc::new(event) })
    }
}

/// A ring while nobody uses it. It is made when a file is opened: once a guest runs, no thread may make another.
#[derive(Clone)]
pub struct Reserve {
    entries: u16,
    ring: Arc<Mutex<Option<Ring>>>,
}

impl std::fmt::Debug for Reserve {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reserve").field("entries", &self.entries).finish_non_exhaustive()
    }
}

impl Reserve {
    /// Makes a ring for at most `entries` operations at a time.
    pub fn new(entries: u16) -> Result<Self> {
        Ok(Self { entries, ring: Arc::new(Mutex::new(Some(Ring::new(entries)?))) })
    }

    fn place(&self) -> MutexGuard<'_, Option<Ring>> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A ring, and what is in flight.
pub struct Uring {
    /// `None` only after [`Drop`] gave it up.
    ring: Option<IoUring>,
    event: Arc<EventFd>,
    /// Where it goes when it has nothing in flight any more.
    reserve: Reserve,
    mem: GuestRam,
    /// Never moves while something in it is in flight, as each slot keeps its vectors on the heap.
    slots: Vec<Slot>,
    free: Vec<usize>,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

/// One operation, or room for one.
#[derive(Default)]
struct Slot {
    job: Option<Job>,
    /// The pieces of memory; those before `first` are done.
    vectors: Vec<libc::iovec>,
    first: usize,
}

struct Job {
    token: u16,
    file: Arc<File>,
    /// `None` for a sync.
    transfer: Option<Transfer>,
}

struct Transfer {
    direction: Direction,
    offset: u64,
    /// Bytes not yet transferred.
    left: u64,
}

// SAFETY: the vectors are addresses for the kernel; nobody dereferences them here.
unsafe impl Send for Slot {}

impl Uring {
    /// Takes the ring of `reserve`, to work on memory in `mem`. There is none if somebody uses it, or had to leave
    /// operations to a host that does not answer.
    pub fn new(reserve: &Reserve, mem: GuestRam) -> Result<Self> {
        let taken = reserve.place().take();
        let Ring { ring, event } = taken
            .ok_or_else(|| Error::other("the ring is still in use: the host has not answered"))?;
        // What was told of its last user's operations.
        let _ = event.read();
        let slots = (0..reserve.entries).map(|_| Slot::default()).collect();
        let free = (0..usize::from(reserve.entries)).rev().collect();
        Ok(Self { ring: Some(ring), event, reserve: reserve.clone(), mem, slots, free })
    }

    /// Whether this host lets husk have one.
    pub fn check() -> Result<()> {
        Ring::new(1).map(drop)
    }

    /// Readable when something has ended.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Operations begun and not yet given back as ended.
    pub fn in_flight(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    /// Begins a transfer between `offset` of `file` and the pieces of guest memory that `gather`
    /// collects. Nothing is done before [`Self::submit`].
    pub fn transfer<E: From<Full>>(
        &mut self,
        token: u16,
        direction: Direction,
        file: &Arc<File>,
        offset: u64,
        gather: impl for<'m> FnOnce(&'m GuestRam, &mut IoSlices<'m>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        // The closure can only gather what lives as long as any borrow of our memory: pieces of it.
        let mut slices = IoSlices::default();
        gather(&self.mem, &mut slices)?;
        let index = self.free.pop().ok_or(Full)?;
        if let Some(slot) = self.slots.get_mut(index) {
            slot.vectors.clear();
            slot.vectors.extend_from_slice(slices.vectors());
            slot.first = 0;
            let transfer = Some(Transfer { direction, offset, left: slices.bytes() });
            slot.job = Some(Job { token, file: file.clone(), transfer });
        }
        self.push(index)?;
        Ok(())
    }

    /// Begins to make what was written to `file` survive a loss of power.
    pub fn sync(&mut self, token: u16, file: &Arc<File>) -> std::result::Result<(), Full> {
        let index = self.free.pop().ok_or(Full)?;
        if let Some(slot) = self.slots.get_mut(index) {
            slot.job = Some(Job { token, file: file.clone(), transfer: None });
        }
        self.push(index)
    }

    fn push(&mut self, index: usize) -> std::result::Result<(), Full> {
        self.try_push(index).inspect_err(|_| {
            if let Some(slot) = self.slots.get_mut(index) {
                slot.job = None;
                self.free.push(index);
            }
        })
    }

    fn try_push(&mut self, index: usize) -> std::result::Result<(), Full> {
        let Self { ring: Some(ring), slots, .. } = self else { return Err(Full) };
        let entry = slots.get_mut(index).and_then(Slot::entry).ok_or(Full)?;
        let entry = entry.user_data(index as u64);
        // SAFETY: the descriptor stays open and the vectors stay where they are until the slot's
        // operation has ended, and so does the guest memory they describe: `drop` sees to it.
        if unsafe { ring.submission().push(&entry) }.is_ok() {
            return Ok(());
        }
        // Full of what the kernel has not been told of yet.
        again(|| ring.submit()).map_err(|_| Full)?;
        // SAFETY: as above.
        unsafe { ring.submission().push(&entry) }.map_err(|_| Full)
    }

    /// Tells the kernel of what was begun.
    pub fn submit(&mut self) -> Result<()> {
        let Some(ring) = &self.ring else { return Ok(()) };
        again(|| ring.submit()).map(drop)
    }

    /// The next operation that has ended, if one has.
    pub fn next_ended(&mut self) -> Option<Ended> {
        loop {
            let entry = self.ring.as_mut()?.completion().next()?;
            let index = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let Some(slot) = self.slots.get_mut(index) else { continue };
            match slot.heed(entry.result()) {
                Progress::Ended(ended) => {
                    slot.vectors.clear();
                    slot.vectors.shrink_to(VECTORS_KEPT);
                    self.free.push(index);
                    return Some(ended);
                }
                // A short transfer goes on where it stopped.
                Progress::GoOn(token) => {
                    if self.push(index).is_err() {
                        let result = Err(Error::other("cannot go on with a short transfer"));
                        return Some(Ended { token, result });
                    }
                    // It is in the ring, so it has not ended even if the kernel has no memory to hear
                    // of it now: it would end a second time, perhaps for another with its token.
                    if let Err(e) = self.submit() {
                        log::warn!("io_uring: a short transfer waits: {e}");
                    }
                }
                Progress::Nothing => {}
            }
        }
    }

    /// Waits until something has ended or the time is over: false.
    pub fn wait(&mut self, deadline: Instant) -> bool {
        let Some(ring) = &mut self.ring else { return false };
        let left = Timespec::from(deadline.saturating_duration_since(Instant::now()));
        let args = SubmitArgs::new().timespec(&left);
        // Interrupted or out of time: the look below tells.
        let _ = ring.submitter().submit_with_args(1, &args);
        !ring.completion().is_empty() || Instant::now() < deadline
    }
}

impl Drop for Uring {
    /// What is in flight is waited for, because the memory it works on may be gone next.
    fn drop(&mut self) {
        let deadline = Instant::now().checked_add(PATIENCE).unwrap_or_else(Instant::now);
        while self.in_flight() > 0 && self.wait(deadline) {
            while self.next_ended().is_some() {}
        }
        if self.in_flight() > 0 {
            log::error!("requests to a file are left to a host that does not answer");
            std::mem::forget(self.ring.take());
            std::mem::forget(self.mem.clone());
            std::mem::forget(std::mem::take(&mut self.slots));
        } else if let Some(ring) = self.ring.take() {
            *self.reserve.place() = Some(Ring { ring, event: self.event.clone() });
        }
    }
}

/// What an answer of the kernel means.
enum Progress {
    Ended(Ended),
    GoOn(u16),
    Nothing,
}

impl Slot {
    /// What to ask the kernel for.
    fn entry(&mut self) -> Option<squeue::Entry> {
        let Self { job: Some(job), vectors, first } = self else { return None };
        let fd = Fd(job.file.as_raw_fd());
        let Some(transfer) = &job.transfer else {
            return Some(opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build());
        };
        let rest = vectors.get(*first..)?;
        let count = u32::try_from(rest.len()).ok()?;
        Some(match transfer.direction {
            Direction::Read => {
                opcode::Readv::new(fd, rest.as_ptr(), count).offset(transfer.offset).build()
            }
            Direction::Write => {
                opcode::Writev::new(fd, rest.as_ptr(), count).offset(transfer.offset).build()
            }
        })
    }

    fn heed(&mut self, result: i32) -> Progress {
        let Some(job) = &mut self.job else { return Progress::Nothing };
        let result = match (u64::try_from(result), &mut job.transfer) {
            (Err(_), _) if matches!(result.saturating_neg(), libc::EINTR | libc::EAGAIN) => {
                return Progress::GoOn(job.token);
            }
            (Err(_), _) => Err(Error::from_raw_os_error(result.saturating_neg())),
            (Ok(_), None) => Ok(()),
            (Ok(0), Some(transfer)) if transfer.left > 0 => match transfer.direction {
                Direction::Read => Err(ErrorKind::UnexpectedEof.into()),
                Direction::Write => Err(ErrorKind::WriteZero.into()),
            },
            (Ok(done), Some(transfer)) => {
                transfer.left = transfer.left.saturating_sub(done);
                transfer.offset = transfer.offset.saturating_add(done);
                if transfer.left > 0 {
                    let token = job.token;
                    self.advance(done);
                    return Progress::GoOn(token);
                }
                Ok(())
            }
        };
        let token = job.token;
        self.job = None;
        Progress::Ended(Ended { token, result })
    }

    /// Cuts off what a short transfer has done.
    fn advance(&mut self, done: u64) {
        let mut left = usize::try_from(done).unwrap_or(usize::MAX);
        while let Some(vector) = self.vectors.get_mut(self.first).filter(|_| left > 0) {
            if left < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(left);
                vector.iov_len = vector.iov_len.saturating_sub(left);
                return;
            }
            left = left.saturating_sub(vector.iov_len);
            self.first = self.first.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;

    const MEM: usize = 1 << 16;

    fn memory() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), MEM)]).unwrap()
    }

    fn file(content: &[u8]) -> Arc<File> {
        let mut file = File::from(memfd_create("uring", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(content).unwrap();
        Arc::new(file)
    }

    /// Gathers `(address, length)` pieces.
    fn begin(
        ring: &mut Uring,
        token: u16,
        direction: Direction,
        file: &Arc<File>,
        offset: u64,
        pieces: &[(u64, usize)],
    ) {
        ring.transfer(token, direction, file, offset, |mem, slices| {
            for &(at, len) in pieces {
                slices.push_writable(&mem.get_slice(GuestAddress(at), len).unwrap())?;
            }
            Ok::<(), Full>(())
        })
        .unwrap();
    }

    fn finish(ring: &mut Uring) -> Ended {
        let deadline = Instant::now() + Duration::from_secs(30);
        ring.submit().unwrap();
        loop {
            if let Some(ended) = ring.next_ended() {
                return ended;
            }
            assert!(ring.wait(deadline), "nothing has ended");
        }
    }

    #[test]
    fn reads_writes_and_syncs_across_pieces() {
        let mem = memory();
        let mut ring = Uring::new(&Reserve::new(8).unwrap(), mem.clone()).unwrap();
        let file = file(b"0123456789");
        begin(&mut ring, 7, Direction::Read, &file, 2, &[(0, 3), (100, 4)]);
        assert_eq!(ring.in_flight(), 1);
        let ended = finish(&mut ring);
        ended.result.unwrap();
        assert_eq!((ended.token, ring.in_flight()), (7, 0));
        let mut got = [0; 4];
        mem.read_slice(&mut got, GuestAddress(100)).unwrap();
        assert_eq!(&got, b"5678");
        begin(&mut ring, 8, Direction::Write, &file, 0, &[(100, 4), (0, 3)]);
        finish(&mut ring).result.unwrap();
        ring.sync(9, &file).unwrap();
        assert_eq!(finish(&mut ring).token, 9);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        assert_eq!(std::fs::read(path).unwrap(), b"5678234789");
    }

    #[test]
    fn the_end_of_the_file_is_an_error_after_what_there_was() {
        let mem = memory();
        let mut ring = Uring::new(&Reserve::new(8).unwrap(), mem.clone()).unwrap();
        let file = file(&[7; 10]);
        begin(&mut ring, 1, Direction::Read, &file, 0, &[(0, 5), (5, 7)]);
        let ended = finish(&mut ring);
        assert_eq!(ended.result.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        let mut got = [0; 12];
        mem.read_slice(&mut got, GuestAddress(0)).unwrap();
        assert_eq!(got, [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0]);
    }

    #[test]
    fn takes_no_more_than_it_has_room_for() {
        let mut ring = Uring::new(&Reserve::new(4).unwrap(), memory()).unwrap();
        let file = file(&[1; 4096]);
        for token in 0..4 {
            begin(&mut ring, token, Direction::Read, &file, 0, &[(0, 4096)]);
        }
        assert_eq!(ring.sync(4, &file), Err(Full));
        let mut tokens: Vec<u16> = (0..4).map(|_| finish(&mut ring).token).collect();
        tokens.sort_unstable();
        assert_eq!(tokens, [0, 1, 2, 3]);
        ring.sync(4, &file).unwrap();
    }

    #[test]
    fn errors_of_the_host_come_back() {
        let mut ring = Uring::new(&Reserve::new(4).unwrap(), memory()).unwrap();
        let file = Arc::new(File::open("/proc/self/exe").unwrap());
        begin(&mut ring, 3, Direction::Write, &file, 0, &[(0, 512)]);
        let ended = finish(&mut ring);
        assert_eq!(ended.result.unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn a_ring_that_goes_lets_the_kernel_finish() {
        let mem = memory();
        let mut ring = Uring::new(&Reserve::new(4).unwrap(), mem.clone()).unwrap();
        let file = file(&[9; 4096]);
        begin(&mut ring, 0, Direction::Read, &file, 0, &[(0, 4096)]);
        ring.submit().unwrap();
        drop(ring);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(4095)).unwrap(), 9);
    }

    #[test]
    fn a_ring_is_used_by_one_at_a_time_and_again() {
        let reserve = Reserve::new(4).unwrap();
        for _ in 0..3 {
            let mut ring = Uring::new(&reserve, memory()).unwrap();
            assert!(Uring::new(&reserve, memory()).is_err());
            let file = file(&[1; 512]);
            begin(&mut ring, 5, Direction::Read, &file, 0, &[(0, 512)]);
            assert_eq!(finish(&mut ring).token, 5);
        }
    }

    #[test]
    fn a_ring_opens_nothing() {
        let Ring { mut ring, event: _ } = Ring::new(4).unwrap();
        let path = c"/dev/null";
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build();
        // SAFETY: the path is there until the operation has ended.
        unsafe { ring.submission().push(&open) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().next().unwrap().result(), -libc::EACCES);
        let submitter = ring.submitter();
        assert!(submitter.register_files(&[0]).is_err(), "it is what it was made as");
    }
}
