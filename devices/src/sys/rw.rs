//! Vectored I/O between a descriptor and guest memory, and locks on open files.
//!
//! std's and rustix's vectors are slices of `&mut [u8]`, which guest memory must never be: the
//! guest writes to it at any time. So these calls go to libc.
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::raw::c_int;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Most pieces that one call takes (`UIO_MAXIOV`).
pub const MAX_SLICES: usize = 1024;

/// More than [`MAX_SLICES`] pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {MAX_SLICES} pieces of memory")]
pub struct Full;

/// Pieces of memory for one vectored call. Lives on the stack: no request allocates.
pub struct IoSlices<'a> {
    vectors: [MaybeUninit<libc::iovec>; MAX_SLICES],
    /// `vectors[first..count]` are initialised and not yet transferred.
    first: usize,
    count: usize,
    bytes: u64,
    memory: PhantomData<VolatileSlice<'a>>,
}

impl std::fmt::Debug for IoSlices<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoSlices")
            .field("count", &self.count)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Default for IoSlices<'_> {
    fn default() -> Self {
        Self {
            vectors: [const { MaybeUninit::uninit() }; MAX_SLICES],
            first: 0,
            count: 0,
            bytes: 0,
            memory: PhantomData,
        }
    }
}

impl<'a> IoSlices<'a> {
    /// Appends `slice`, which the call will fill. It counts as written to from here on.
    pub fn push_writable<B: BitmapSlice>(
        &mut self,
        slice: &VolatileSlice<'a, B>,
    ) -> std::result::Result<(), Full> {
        slice.bitmap().mark_dirty(0, slice.len());
        self.push(slice)
    }

    /// Appends `slice`, which the call will read.
    pub fn push<B: BitmapSlice>(
        &mut self,
        slice: &VolatileSlice<'a, B>,
    ) -> std::result::Result<(), Full> {
        if slice.is_empty() {
            return Ok(());
        }
        let vector = self.vectors.get_mut(self.count).ok_or(Full)?;
        vector.write(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        });
        self.count = self.count.saturating_add(1);
        self.bytes = self.bytes.saturating_add(slice.len() as u64);
        Ok(())
    }

    /// Drops all pieces from the `count`-th on.
    pub fn truncate(&mut self, count: usize) {
        let dropped = self.pending().get(count..).unwrap_or_default();
        let bytes = dropped.iter().map(|v| v.iov_len as u64).fold(0, u64::saturating_add);
        self.bytes = self.bytes.saturating_sub(bytes);
        self.count = self.count.min(self.first.saturating_add(count));
    }

    /// Pieces held.
    pub fn count(&self) -> usize {
        self.count.saturating_sub(self.first)
    }

    /// The pieces not yet transferred, for whoever transfers them later.
    pub(super) fn vectors(&mut self) -> &[libc::iovec] {
        self.pending()
    }

    /// Bytes not yet transferred.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Fills all pieces from `offset` of `file`. The end of the file is an error.
    pub fn read_exact_at(&mut self, file: &File, offset: u64) -> Result<()> {
        self.read_part_at(file, offset, self.bytes)
    }

    /// Fills the first `len` bytes of all pieces from `offset` of `file`, and cuts them off. The end of
    /// the file is an error.
    pub fn read_part_at(&mut self, file: &File, offset: u64, len: u64) -> Result<()> {
        self.transfer_at(offset, len, ErrorKind::UnexpectedEof, |vectors, count, offset| {
            #[expect(unsafe_code, reason = "preadv")]
            // SAFETY: `pending` gives `count` initialised vectors; each describes a piece of memory
            // that outlives 'a, and nobody holds a reference to its bytes.
            unsafe {
                libc::preadv(file.as_raw_fd(), vectors, count, offset)
            }
        })
    }

    /// Writes all pieces to `offset` of `file`.
    pub fn write_all_at(&mut self, file: &File, offset: u64) -> Result<()> {
        self.transfer_at(offset, self.bytes, ErrorKind::WriteZero, |vectors, count, offset| {
            #[expect(unsafe_code, reason = "pwritev")]
            // SAFETY: as in `read_exact_at`.
            unsafe {
                libc::pwritev(file.as_raw_fd(), vectors, count, offset)
            }
        })
    }

    /// Reads once: one packet of a tap or a packet socket. Gives its length.
    pub fn read(&mut self, fd: impl AsFd) -> Result<usize> {
        let (vectors, count) = self.raw()?;
        retry(|| {
            #[expect(unsafe_code, reason = "readv")]
            // SAFETY: as in `read_exact_at`.
            unsafe {
                libc::readv(fd.as_fd().as_raw_fd(), vectors, count)
            }
        })
    }

    /// Writes once: one packet.
    pub fn write(&mut self, fd: impl AsFd) -> Result<usize> {
        let (vectors, count) = self.raw()?;
        retry(|| {
            #[expect(unsafe_code, reason = "writev")]
            // SAFETY: as in `read_exact_at`.
            unsafe {
                libc::writev(fd.as_fd().as_raw_fd(), vectors, count)
            }
        })
    }

    /// Sends once what a socket takes now, and cuts it off. Neither waits nor raises SIGPIPE.
    pub fn send(&mut self, fd: impl AsFd) -> Result<usize> {
        let (vectors, count) = self.raw()?;
        let count = usize::try_from(count).map_err(|_| ErrorKind::InvalidInput)?;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let sent = retry(|| {
            #[expect(unsafe_code, reason = "sendmsg")]
            // SAFETY: a `msghdr` may be all zeros: no address, no control data. As for the vectors,
            // see `read_exact_at`; sendmsg does not write to them.
            unsafe {
                let mut message: libc::msghdr = std::mem::zeroed();
                message.msg_iov = vectors.cast_mut();
                message.msg_iovlen = count;
                libc::sendmsg(fd.as_fd().as_raw_fd(), &raw const message, flags)
            }
        })?;
        self.advance(sent as u64);
        Ok(sent)
    }

    /// Appends a copy of all bytes not yet transferred to `to`.
    pub fn append_to(&mut self, to: &mut VecDeque<u8>) {
        let mut piece = [0; 4096];
        while let Some(vector) = self.pending().first() {
            let len = vector.iov_len.min(piece.len());
            #[expect(unsafe_code, reason = "a vector is memory again")]
            // SAFETY: the memory behind a pushed slice lives as long as 'a, `advance` has only
            // shortened it, and a `VolatileSlice` asks for no more.
            let slice: VolatileSlice<'a> =
                unsafe { VolatileSlice::new(vector.iov_base.cast(), len) };
            let copied = slice.copy_to(&mut piece[..]);
            to.extend(piece.get(..copied).unwrap_or_default());
            self.advance(len as u64);
        }
    }

    fn transfer_at(
        &mut self,
        mut offset: u64,
        len: u64,
        at_end: ErrorKind,
        call: impl Fn(*const libc::iovec, c_int, libc::off_t) -> libc::ssize_t,
    ) -> Result<()> {
        let mut left = len.min(self.bytes);
        while left > 0 {
            let at = libc::off_t::try_from(offset).map_err(|_| ErrorKind::InvalidInput)?;
            let all = self.raw()?;
            let is_all = left == self.bytes;
            let (count, whole) = if is_all { (all.1, 0) } else { self.shorten(left)? };
            let done = retry(|| call(all.0, count, at));
            if !is_all {
                self.lengthen(count, whole);
            }
            let done = done? as u64;
            if done == 0 {
                return Err(at_end.into());
            }
            self.advance(done);
            offset = offset.saturating_add(done);
            left = left.saturating_sub(done);
        }
        Ok(())
    }

    /// Shortens the piece in which the first `bytes` end; how many pieces they are in, and how long that
    /// one was.
    fn shorten(&mut self, bytes: u64) -> Result<(c_int, usize)> {
        let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
        for (count, vector) in (1..).zip(self.pending()) {
            if vector.iov_len >= left {
                return Ok((count, std::mem::replace(&mut vector.iov_len, left)));
            }
            left = left.saturating_sub(vector.iov_len);
        }
        Err(ErrorKind::InvalidInput.into())
    }

    /// Undoes [`Self::shorten`].
    fn lengthen(&mut self, count: c_int, whole: usize) {
        let last = usize::try_from(count).ok().and_then(|count| count.checked_sub(1));
        if let Some(vector) = last.and_then(|last| self.pending().get_mut(last)) {
            vector.iov_len = whole;
        }
    }

    /// Cuts off what a short transfer has done.
    fn advance(&mut self, done: u64) {
        self.bytes = self.bytes.saturating_sub(done);
        let mut left = usize::try_from(done).unwrap_or(usize::MAX);
        while left > 0 {
            let Some(vector) = self.pending().first_mut() else { return };
            if left < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(left);
                vector.iov_len = vector.iov_len.saturating_sub(left);
                return;
            }
            left = left.saturating_sub(vector.iov_len);
            self.first = self.first.saturating_add(1);
        }
    }

    fn raw(&mut self) -> Result<(*const libc::iovec, c_int)> {
        let pending = self.pending();
        let count = c_int::try_from(pending.len()).map_err(|_| ErrorKind::InvalidInput)?;
        Ok((pending.as_ptr(), count))
    }

    fn pending(&mut self) -> &mut [libc::iovec] {
        let pending = self.vectors.get_mut(self.first..self.count).unwrap_or_default();
        #[expect(unsafe_code, reason = "part of the array is initialised")]
        // SAFETY: `push` initialised every element below `count`.
        unsafe {
            pending.assume_init_mut()
        }
    }
}

/// Repeats a call that a signal interrupted.
fn retry(call: impl Fn() -> libc::ssize_t) -> Result<usize> {
    loop {
        if let Ok(done) = usize::try_from(call()) {
            return Ok(done);
        }
        let e = Error::last_os_error();
        if e.kind() != ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// How a file is locked against other users of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Others may read, nobody may write.
    Shared,
    /// Nobody else may use it.
    Exclusive,
}

/// Locks the whole of `file` for as long as this open file description lives; false if somebody
/// else holds it. Two descriptions of one process exclude each other as well.
pub fn try_lock(file: &File, lock: Lock) -> Result<bool> {
    match fcntl_lock(file, libc::F_OFD_SETLK, lock) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Whether [`try_lock`] would succeed now. Changes nothing.
pub fn can_lock(file: &File, lock: Lock) -> Result<bool> {
    let found = fcntl_lock(file, libc::F_OFD_GETLK, lock)?;
    Ok(c_int::from(found.l_type) == libc::F_UNLCK)
}

/// The same, were `file` opened anew: what this very open file has locked counts too, as it does for locks of processes.
pub fn is_unlocked(file: &File, lock: Lock) -> Result<bool> {
    let found = fcntl_lock(file, libc::F_GETLK, lock)?;
    Ok(c_int::from(found.l_type) == libc::F_UNLCK)
}

fn fcntl_lock(file: &File, command: c_int, lock: Lock) -> Result<libc::flock> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
    };
    let mut flock = libc::flock {
        l_type: kind.try_into().map_err(|_| ErrorKind::InvalidInput)?,
        l_whence: libc::SEEK_SET.try_into().map_err(|_| ErrorKind::InvalidInput)?,
        l_start: 0,
        // To the end, however far the file grows.
        l_len: 0,
        l_pid: 0,
    };
    #[expect(unsafe_code, reason = "fcntl with a lock, which rustix lacks")]
    // SAFETY: all these commands take a pointer to a `flock` that lives across the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut flock) };
    if result == -1 { Err(Error::last_os_error()) } else { Ok(flock) }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    fn file(content: &[u8]) -> File {
        let fd = rustix::fs::memfd_create("rw", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn reads_and_writes_across_pieces() {
        let file = file(b"0123456789");
        let (mut a, mut b) = ([0; 3], [0; 4]);
        let mut slices = IoSlices::default();
        slices.push_writable(&VolatileSlice::from(&mut a[..])).unwrap();
        slices.push_writable(&VolatileSlice::from(&mut b[..])).unwrap();
        assert_eq!((slices.count(), slices.bytes()), (2, 7));
        slices.read_exact_at(&file, 2).unwrap();
        assert_eq!((&a, &b), (b"234", b"5678"));

        let mut slices = IoSlices::default();
        slices.push(&VolatileSlice::from(&mut b[..])).unwrap();
        slices.push(&VolatileSlice::from(&mut a[..])).unwrap();
        slices.truncate(1);
        assert_eq!(slices.bytes(), 4);
        slices.write_all_at(&file, 0).unwrap();
        assert_eq!(
            std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap(),
            b"5678456789"
        );
    }

    #[test]
    fn end_of_file_is_an_error_however_the_pieces_fall() {
        let file = file(&[7; 10]);
        let mut bytes = [0; 12];
        let (a, b) = bytes.split_at_mut(5);
        let mut slices = IoSlices::default();
        slices.push(&VolatileSlice::from(a)).unwrap();
        slices.push(&VolatileSlice::from(b)).unwrap();
        let e = slices.read_exact_at(&file, 0).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::UnexpectedEof);
        assert_eq!(slices.bytes(), 2);
        assert_eq!(bytes, [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0]);
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let mut bytes = [1, 2, 3, 4, 5, 6];
        let (a, b) = bytes.split_at_mut(2);
        let mut slices = IoSlices::default();
        slices.push(&VolatileSlice::from(a)).unwrap();
        slices.push(&VolatileSlice::from(b)).unwrap();
        slices.advance(3);
        assert_eq!((slices.bytes(), slices.count()), (3, 1));
        let file = file(&[0; 3]);
        slices.write_all_at(&file, 0).unwrap();
        assert_eq!(
            std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap(),
            [4, 5, 6]
        );
    }

    #[test]
    fn sends_what_there_is_room_for_and_copies_the_rest() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut all: Vec<u8> = (0..1_000_000u32).map(|i| i.to_le_bytes()[1]).collect();
        let expected = all.clone();
        let mut slices = IoSlices::default();
        for piece in all.chunks_mut(9_999) {
            slices.push(&VolatileSlice::from(piece)).unwrap();
        }
        let sent = slices.send(&ours).unwrap();
        assert_eq!(slices.bytes(), (expected.len() - sent) as u64);
        assert_eq!(slices.send(&ours).unwrap_err().kind(), ErrorKind::WouldBlock);
        let mut rest = VecDeque::from([7]);
        slices.append_to(&mut rest);
        assert_eq!(slices.bytes(), 0);
        assert_eq!(rest.make_contiguous()[1..], expected[sent..]);
        drop(theirs);
        let mut byte = [1];
        let mut slices = IoSlices::default();
        slices.push(&VolatileSlice::from(&mut byte[..])).unwrap();
        assert_eq!(slices.send(&ours).unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn is_full_after_the_most_that_one_call_takes() {
        let mut byte = [0];
        let slice = VolatileSlice::from(&mut byte[..]);
        let mut slices = IoSlices::default();
        for _ in 0..MAX_SLICES {
            slices.push(&slice).unwrap();
        }
        assert_eq!(slices.push(&slice), Err(Full));
    }

    #[test]
    fn locks_exclude_another_description_of_the_same_file() {
        let a = file(b"x");
        let b = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", a.as_raw_fd()))
            .unwrap();
        assert!(is_unlocked(&a, Lock::Exclusive).unwrap());
        assert!(try_lock(&a, Lock::Shared).unwrap());
        // By the same open file nothing is in the way, to whom it is another's.
        let same = a.try_clone().unwrap();
        assert!(can_lock(&same, Lock::Exclusive).unwrap());
        assert!(!is_unlocked(&same, Lock::Exclusive).unwrap());
        assert!(is_unlocked(&same, Lock::Shared).unwrap());
        drop(same);
        assert!(can_lock(&b, Lock::Shared).unwrap() && !can_lock(&b, Lock::Exclusive).unwrap());
        assert!(try_lock(&b, Lock::Shared).unwrap() && !try_lock(&b, Lock::Exclusive).unwrap());
        drop(a);
        assert!(try_lock(&b, Lock::Exclusive).unwrap());
    }
}
