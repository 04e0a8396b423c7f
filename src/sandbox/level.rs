//! How much of the sandbox this host lets husk have: said in the log, and asked for by `--require-sandbox`.
use std::fmt;

use super::{Roots, Seccomp, filter, paths};

/// The version of Landlock that has all that is asked for: files, their truncation, TCP (Linux 6.7).
const LANDLOCK_WHOLE: u32 = 4;

/// What each layer comes to.
#[derive(Clone, Debug)]
pub(crate) struct Levels {
    seccomp: Seccomp,
    has_seccomp: bool,
    landlock: u32,
    roots: Roots,
}

impl Levels {
    /// Of this host, if `seccomp` and `roots` are what is wanted.
    pub(super) fn of(seccomp: Seccomp, roots: &Roots) -> Self {
        let has_seccomp = filter::is_available(seccomp);
        Self { seccomp, has_seccomp, landlock: paths::version(), roots: roots.clone() }
    }

    /// Why it is less than the whole, if it is.
    pub(crate) fn shortfall(&self) -> Option<String> {
        if !self.has_seccomp {
            return Some("the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)".into());
        }
        if self.seccomp != Seccomp::Kill {
            return Some("--seccomp is not kill".into());
        }
        if self.landlock < LANDLOCK_WHOLE {
            return Some(format!(
                "the kernel's Landlock has version {}, want {LANDLOCK_WHOLE} (Linux 6.7, with landlock in lsm=)",
                self.landlock
            ));
        }
        match self.roots {
            Roots::Anywhere => Some("files may be used anywhere: give --allow".into()),
            Roots::Below(_) | Roots::Nowhere => None,
        }
    }
}

impl fmt::Display for Levels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seccomp = match (self.has_seccomp, self.seccomp) {
            (false, _) => "none (the kernel has no filters)",
            (_, Seccomp::Kill) => "kill",
            (_, Seccomp::Errno) => "errno",
            (_, Seccomp::Log) => "log only",
            (_, Seccomp::Off) => "off",
        };
        write!(f, "no_new_privs; capabilities none; seccomp {seccomp}; ")?;
        match self.landlock {
            0 => write!(f, "Landlock none (the kernel has none); ")?,
            version => write!(f, "Landlock version {version}; ")?,
        }
        match &self.roots {
            Roots::Anywhere => write!(f, "files by one thread, anywhere"),
            Roots::Nowhere => write!(f, "files only if they are open: no thread opens by path"),
            Roots::Below(paths) if paths.is_empty() => write!(f, "files only if they are open"),
            Roots::Below(paths) => write!(f, "files by one thread, below {paths:?}"),
        }
    }
}
