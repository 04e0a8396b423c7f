//! What a request comes with besides its bytes: files, taps and descriptors that are opened here, and passed to husk.
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::str::FromStr;

use devices::backend::file::{self, Access, Kind, OpenError};
use devices::backend::tap::{Tap, TapError};
use devices::sys::fd;

/// `FILE[,ro]`, `tap=NAME` or `fd=N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PassArg {
    File { path: PathBuf, access: Access },
    Tap(String),
    Descriptor(RawFd),
}

/// Why there is nothing to pass.
#[derive(Debug, thiserror::Error)]
pub(super) enum PassError {
    #[error("--pass")]
    File(#[from] OpenError),
    #[error("--pass")]
    Tap(#[from] TapError),
    #[error("--pass fd={number}: the shell has to open it, and leave it open")]
    Descriptor { number: RawFd, source: std::io::Error },
}

impl FromStr for PassArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once('=') {
            Some(("tap", name)) => return Ok(Self::Tap(name.into())),
            Some(("fd", number)) => {
                let number = number.parse().ok().filter(|number| *number >= 0);
                return number.map(Self::Descriptor).ok_or_else(|| format!("'{s}': want fd=N"));
            }
            _ => {}
        }
        let (path, access) = match s.rsplit_once(',') {
            Some((path, "ro")) => (path, Access::Read),
            Some((path, "rw")) => (path, Access::ReadWrite),
            Some((_, word)) => return Err(format!("'{word}' is not one of ro, rw")),
            None => (s, Access::ReadWrite),
        };
        match path {
            "" => Err("want a file, tap=NAME or fd=N".into()),
            path => Ok(Self::File { path: path.into(), access }),
        }
    }
}

impl PassArg {
    pub(super) fn open(&self) -> Result<OwnedFd, PassError> {
        match self {
            // Whatever it is to be, husk takes no other kinds.
            Self::File { path, access } => Ok(file::open(path, *access, Kind::Disk)?.into()),
            Self::Tap(name) => Ok(Tap::open(name)?.into()),
            Self::Descriptor(number) => fd::duplicate(*number)
                .map_err(|source| PassError::Descriptor { number: *number, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_is_passed_and_for_what() {
        let file = |path: &str, access| Ok(PassArg::File { path: path.into(), access });
        for (text, want) in [
            ("a.img", file("a.img", Access::ReadWrite)),
            ("a.img,rw", file("a.img", Access::ReadWrite)),
            ("a,b.img,ro", file("a,b.img", Access::Read)),
            ("./tap=x", file("./tap=x", Access::ReadWrite)),
            ("tap=tap0", Ok(PassArg::Tap("tap0".into()))),
            ("fd=7", Ok(PassArg::Descriptor(7))),
        ] {
            assert_eq!(text.parse(), want, "{text}");
        }
        for text in ["", ",ro", "a.img,rx", "fd=", "fd=-1", "fd=x"] {
            assert!(text.parse::<PassArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_passed_is_refused_here() {
        let refused = |text: &str| {
            let e = text.parse::<PassArg>().unwrap().open().unwrap_err();
            crate::error::chain(&e)
        };
        assert!(refused("/nonexistent/disk").contains("/nonexistent/disk"));
        assert!(refused("/dev/zero").contains("a character device"));
        assert!(refused("tap=husk-none").contains("does not exist"));
        assert!(
            refused("fd=2147483647").starts_with("--pass fd=2147483647: the shell has to open")
        );
    }
}
