//! Calls to KVM as they are meant: one that a signal interrupts is made again, and one that fails is not taken for a no.
use kvm_ioctls::Error;

/// Makes a call to KVM, again and again if a signal interrupts it: KVM_CREATE_VM and others then give up with EINTR
/// without having done anything.
pub fn again<T>(mut call: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    loop {
        let done = call().map_err(|e| match e.errno() {
            // Of some calls kvm-ioctls gives what they returned, and not why.
            -1 => Error::last(),
            _ => e,
        });
        match done {
            Err(e) if e.errno() == libc::EINTR => {}
            done => return done,
        }
    }
}

/// What KVM_CHECK_EXTENSION, which `ask` makes, says: 0 if there is no such extension. An error is none.
pub fn extension(mut ask: impl FnMut() -> i32) -> Result<u32, Error> {
    again(|| u32::try_from(ask()).map_err(|_| Error::last()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_interrupted_is_done_again_and_nothing_else() {
        let mut calls = 0;
        let done = again(|| {
            calls += 1;
            if calls < 3 { Err(Error::new(libc::EINTR)) } else { Ok(calls) }
        });
        assert_eq!(done, Ok(3));
        let mut calls = 0;
        let failed: Result<(), _> = again(|| {
            calls += 1;
            Err(Error::new(libc::ENOMEM))
        });
        assert_eq!((failed, calls), (Err(Error::new(libc::ENOMEM)), 1));
    }

    #[test]
    fn an_extension_that_is_not_there_is_no_error() {
        assert_eq!(extension(|| 0), Ok(0));
        assert_eq!(extension(|| 509), Ok(509));
        assert_eq!(extension(fails), Err(Error::new(libc::EBADF)));
        let without_reason = || -> Result<(), _> { Err(Error::new(fails())) };
        assert_eq!(again(without_reason), Err(Error::new(libc::EBADF)));
    }

    #[expect(unsafe_code, reason = "an ioctl that fails")]
    fn fails() -> i32 {
        // SAFETY: no descriptor has that number, so nothing is done.
        unsafe { libc::ioctl(std::os::fd::RawFd::MAX, 0) }
    }
}
