//! Guest memory filled from a place in a file. Its offset is left alone: the file may have been opened by somebody else,
//! for several VMs that start at the same time.
use std::fs::File;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// A file, and where to go on reading.
pub(super) struct Positioned<'a> {
    pub(super) file: &'a File,
    pub(super) offset: u64,
}

impl ReadVolatile for Positioned<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        to: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let offset = i64::try_from(self.offset)
            .map_err(|_| VolatileMemoryError::IOError(std::io::ErrorKind::UnexpectedEof.into()))?;
        let guard = to.ptr_guard_mut();
        #[expect(unsafe_code, reason = "pread into guest memory, which is no slice of bytes")]
        // SAFETY: the guard keeps the piece of memory there, with as many bytes as it says.
        let read = unsafe {
            libc::pread64(self.file.as_raw_fd(), guard.as_ptr().cast(), guard.len(), offset)
        };
        let Ok(count) = usize::try_from(read) else {
            return Err(VolatileMemoryError::IOError(std::io::Error::last_os_error()));
        };
        to.bitmap().mark_dirty(0, count);
        self.offset = self.offset.saturating_add(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
#[expect(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that panics is a test that fails"
)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    #[test]
    fn leaves_the_offset_alone() {
        let path = std::env::temp_dir().join(format!("husk-positioned-{}", std::process::id()));
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(b"0123456789").unwrap();
        let mut bytes = [0; 4];
        let mut from = Positioned { file: &file, offset: 3 };
        let mut read = |count| {
            let mut slice = VolatileSlice::from(&mut bytes[..count]);
            from.read_exact_volatile(&mut slice).map(|()| bytes[..count].to_vec())
        };
        assert_eq!(read(4).unwrap(), b"3456");
        assert_eq!(read(3).unwrap(), b"789");
        assert!(read(1).is_err(), "there is no more");
        assert_eq!(file.stream_position().unwrap(), 10);
    }
}
