//! Why a guest cannot be booted from what the user gave.
use std::io;
use std::path::PathBuf;

use vm_memory::GuestMemoryError;

/// A kernel, an initrd or a command line is no good, or RAM cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Something is wrong with a file.
    #[error("{what} {path}: {why}")]
    File {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: FileError,
    },
    /// The command line is too long. Never truncated.
    #[error("the kernel command line has {len} bytes, at most {max} are possible")]
    CmdlineTooLong {
        /// Its length, what husk adds included, the NUL not.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The command line has a byte that it cannot have.
    #[error(
        "the kernel command line has byte {byte:#04x} at {at}: only printable ASCII and tabs are possible"
    )]
    CmdlineByte {
        /// The byte.
        byte: u8,
        /// Its position.
        at: usize,
    },
    /// Boot structures do not fit.
    #[error("cannot write {0} to guest memory")]
    Memory(&'static str),
}

impl BootError {
    /// Whether the user's files or words are at fault, rather than the host.
    pub fn is_config(&self) -> bool {
        !matches!(self, Self::Memory(_) | Self::File { why: FileError::Read(_), .. })
    }
}

impl FileError {
    /// What a read came to of bytes that were in the file a moment ago.
    pub(super) fn of_read(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Shrunk,
            _ => Self::Read(error),
        }
    }

    /// The same of a read into RAM.
    pub(super) fn of_copy(error: GuestMemoryError) -> Self {
        match error {
            GuestMemoryError::PartialBuffer { .. } => Self::Shrunk,
            GuestMemoryError::IOError(e) => Self::of_read(e),
            other => Self::Read(io::Error::other(other)),
        }
    }
}

/// What can be wrong with a kernel or an initrd.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The host cannot read it.
    #[error("cannot read: {0}")]
    Read(io::Error),
    /// It ends before it should.
    #[error("truncated: {what} needs bytes up to {end:#x}, the file has {len:#x}")]
    Truncated {
        /// What should be there.
        what: &'static str,
        /// Where it should end.
        end: u64,
        /// Where the file ends.
        len: u64,
    },
    /// It has become shorter since its length was asked for.
    #[error("it became shorter while it was read: start again when it is complete")]
    Shrunk,
    /// It is empty.
    #[error("the file is empty")]
    Empty,
    /// It is neither of the formats known.
    #[error("neither an ELF file nor a bzImage: it starts with {0:02x?}")]
    Format([u8; 4]),
    /// A header field has a value that cannot be.
    #[error("{field} is {value:#x}, want {want}")]
    Field {
        /// The field, as its specification names it.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it should be.
        want: &'static str,
    },
    /// Nothing to load.
    #[error("no segment to load")]
    NoSegment,
    /// A part of the image would not lie in RAM.
    #[error("{what} {start:#x}..{end:#x} is not in RAM (RAM is 0..{ram_end:#x})")]
    OutsideRam {
        /// Which part.
        what: &'static str,
        /// Its first address.
        start: u64,
        /// The address after its last.
        end: u64,
        /// End of the RAM below the hole.
        ram_end: u64,
    },
    /// A part of the image would lie over something else.
    #[error("{what} {start:#x}..{end:#x} overlaps {other}")]
    Overlap {
        /// Which part.
        what: &'static str,
        /// Its first address.
        start: u64,
        /// The address after its last.
        end: u64,
        /// What is there already.
        other: &'static str,
    },
    /// The entry point is nowhere in the image.
    #[error("entry point {0:#x} is outside every loaded segment")]
    Entry(u64),
    /// It does not fit.
    #[error("{len} bytes do not fit: between the kernel's end {floor:#x} and {ceiling:#x}")]
    NoRoom {
        /// Its length.
        len: u64,
        /// Lowest possible address.
        floor: u64,
        /// End of what could hold it.
        ceiling: u64,
    },
}
