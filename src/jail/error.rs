//! Why there is no jail. Each says what to do about it.
use std::io;

use crate::exit::ExitCode;

/// Why there is no jail.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JailError {
    /// What was asked for cannot be had.
    #[error("{0}")]
    Refused(String),
    /// A path that was given is no good.
    #[error("{what}")]
    Path {
        /// Which, and what was to be done with it.
        what: String,
        /// What the host said.
        source: io::Error,
    },
    /// The host does not do its part.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: String,
        /// What the host said.
        source: io::Error,
    },
}

impl JailError {
    /// Makes a [`JailError::Host`] of an error.
    pub(crate) fn host<E: Into<io::Error>>(what: &str) -> impl FnOnce(E) -> Self {
        move |e| Self::Host { what: what.into(), source: e.into() }
    }

    /// Makes a [`JailError::Path`] of an error.
    pub(super) fn path<E: Into<io::Error>>(what: String) -> impl FnOnce(E) -> Self {
        move |e| Self::Path { what, source: e.into() }
    }

    /// The exit code of a process that could not be jailed for this reason.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Refused(_) | Self::Path { .. } => ExitCode::Config,
            Self::Host { .. } => ExitCode::Host,
        }
    }
}
