//! Descriptors that whoever started this process has left open for it, by their numbers.
use std::io::{Error, Result};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// A descriptor of one's own for what `number` is open for. `number` stays as it is.
pub fn duplicate(number: RawFd) -> Result<OwnedFd> {
    // Not one of the standard streams, should one of them be closed.
    const LEAST: libc::c_int = 3;
    #[expect(unsafe_code, reason = "fcntl by number")]
    // SAFETY: the kernel looks whether the number is a descriptor, and changes nothing of it.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, LEAST) };
    if copy < 0 {
        return Err(Error::last_os_error());
    }
    #[expect(unsafe_code, reason = "the descriptor is new")]
    // SAFETY: it was made above, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn is_another_of_the_same() {
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        let copy = duplicate(writer.as_raw_fd()).unwrap();
        assert!(rustix::io::fcntl_getfd(&copy).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        writer.write_all(b"1").unwrap();
        drop(writer);
        std::fs::File::from(copy).write_all(b"2").unwrap();
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert_eq!(said, "12");
    }

    #[test]
    fn a_number_that_is_none_is_refused() {
        for number in [-1, RawFd::MAX] {
            assert_eq!(duplicate(number).unwrap_err().raw_os_error(), Some(libc::EBADF));
        }
    }
}
