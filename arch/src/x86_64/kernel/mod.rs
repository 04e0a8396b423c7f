//! Kernel images: read and judged once, then put into RAM.
//!
//! The loader in rust-vmm takes an image at its word (it ignores `p_memsz`, overlaps and entry
//! points), so the headers are read here. An image is judged in two steps: [`Kernel::read`] finds
//! what is wrong with the file by itself, [`Kernel::load`] what is wrong with it in this much RAM.
//! The file is read with read(2) only: one that shrinks meanwhile gives an error, not a SIGBUS.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::todo)]
mod bzimage;
mod elf;
mod positioned;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use self::positioned::Positioned;
use super::boot::check_cmdline;
use super::error::{BootError, FileError};
use super::layout;
use crate::GuestRam;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 64-bit mode, `boot_params` in rsi (Linux, Documentation/arch/x86/boot.rst).
    Linux64,
    /// 32-bit mode, `hvm_start_info` in ebx (Xen, docs/misc/pvh.pandoc).
    Pvh,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Linux64 => "Linux 64-bit",
            Self::Pvh => "PVH",
        })
    }
}

/// Bytes of the file that go to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    file_offset: u64,
    file_len: u64,
    addr: u64,
    mem_len: u64,
}

impl Segment {
    /// The reader has checked that it does not wrap.
    fn end(&self) -> u64 {
        self.addr.saturating_add(self.mem_len)
    }

    fn contains(&self, addr: u64) -> bool {
        (self.addr..self.end()).contains(&addr)
    }
}

/// An image that could be loaded.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    segments: Vec<Segment>,
    protocol: Protocol,
    entry: u64,
    setup_header: Option<setup_header>,
}

/// A loaded kernel: where it starts and what it wants to be told.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// How it is entered.
    pub protocol: Protocol,
    /// Physical address of its first instruction.
    pub addr: u64,
    /// First address after it, the memory it needs to unpack itself included.
    pub end: u64,
    /// Lowest address of it.
    pub(crate) start: u64,
    /// A bzImage's own header, to be handed back to it.
    pub(crate) setup_header: Option<setup_header>,
}

impl Entry {
    /// Highest address an initrd may use, exclusive, as far as the kernel cares.
    pub(crate) fn initrd_ceiling(&self) -> u64 {
        self.setup_header.map_or(layout::HOLE, |h| u64::from(h.initrd_addr_max).saturating_add(1))
    }

    /// Most bytes of command line the kernel takes, the NUL included.
    pub(crate) fn cmdline_max(&self) -> usize {
        let own =
            self.setup_header.map_or(usize::MAX, |h| (h.cmdline_size as usize).saturating_add(1));
        own.min(layout::CMDLINE_MAX)
    }
}

impl Kernel {
    /// Reads the headers of `file` (of `path`, for messages) and checks all that does not depend
    /// on the size of RAM.
    pub fn read(path: &Path, file: File) -> Result<Self, BootError> {
        Self::parse(path, file).map_err(|why| BootError::File {
            what: "kernel",
            path: path.into(),
            why,
        })
    }

    fn parse(path: &Path, file: File) -> Result<Self, FileError> {
        let source = Source::new(&file)?;
        if source.len == 0 {
            return Err(FileError::Empty);
        }
        let mut magic = [0; 4];
        source.read(0, &mut magic, "magic number")?;
        let (segments, protocol, entry, setup_header) = if magic == elf::MAGIC {
            let image = elf::read(&source)?;
            let (protocol, entry) = match image.pvh_entry {
                Some(entry) => (Protocol::Pvh, entry),
                None => (Protocol::Linux64, image.entry),
            };
            (image.segments, protocol, entry, None)
        } else {
            let image = bzimage::read(&source, magic)?;
            (vec![image.segment], Protocol::Linux64, image.entry, Some(image.header))
        };
        if !segments.iter().any(|s| s.contains(entry)) {
            return Err(FileError::Entry(entry));
        }
        Ok(Self { path: path.into(), file, segments, protocol, entry, setup_header })
    }

    /// How the kernel will be entered.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Checks that every segment fits into `ram_size` bytes of RAM, beside the boot structures.
    pub fn check(&self, ram_size: u64) -> Result<(), BootError> {
        let ram_end = ram_size.min(layout::HOLE);
        self.segments.iter().try_for_each(|s| place(s, ram_end)).map_err(|why| self.failed(why))
    }

    /// Copies the kernel into `mem`.
    pub fn load(&self, mem: &GuestRam) -> Result<Entry, BootError> {
        let ram_size = mem.iter().map(GuestMemoryRegion::len).sum();
        self.check(ram_size)?;
        self.copy(mem).map_err(|why| self.failed(why))?;
        Ok(self.entry())
    }

    /// Checks that the kernel takes `cmdline` whole.
    pub fn check_cmdline(&self, cmdline: &str) -> Result<(), BootError> {
        check_cmdline(cmdline, self.entry().cmdline_max())
    }

    pub(crate) fn entry(&self) -> Entry {
        Entry {
            protocol: self.protocol,
            addr: self.entry,
            start: self.segments.iter().map(|s| s.addr).min().unwrap_or(0),
            end: self.segments.iter().map(Segment::end).max().unwrap_or(0),
            setup_header: self.setup_header,
        }
    }

    fn copy(&self, mem: &GuestRam) -> Result<(), FileError> {
        self.segments.iter().try_for_each(|segment| {
            let Segment { addr, file_offset, file_len, .. } = *segment;
            copy_part(mem, addr, &self.file, file_offset, file_len)
        })
    }

    fn failed(&self, why: FileError) -> BootError {
        BootError::File { what: "kernel", path: self.path.clone(), why }
    }
}

/// Refuses a segment that is not wholly RAM or lies over a boot structure.
fn place(segment: &Segment, ram_end: u64) -> Result<(), FileError> {
    let (start, end) = (segment.addr, segment.end());
    if end > ram_end {
        return Err(FileError::OutsideRam { what: "segment", start, end, ram_end });
    }
    for (from, to, other) in [
        (0, layout::LOW_RAM_FREE, "the boot structures below 0x30000"),
        (layout::MP_TABLE, layout::HIGH_RAM, "the MP and ACPI tables at 0x9fc00..0x100000"),
    ] {
        if start < to && from < end {
            return Err(FileError::Overlap { what: "segment", start, end, other });
        }
    }
    Ok(())
}

/// The file, with its length, read by position.
struct Source<'a> {
    file: &'a File,
    len: u64,
}

impl<'a> Source<'a> {
    fn new(file: &'a File) -> Result<Self, FileError> {
        let mut end = file;
        // Not `metadata`: a block device has no length there.
        let len = end.seek(SeekFrom::End(0)).map_err(FileError::Read)?;
        Ok(Self { file, len })
    }

    /// Fills `to` from `offset`; `what` is what should be there.
    fn read(&self, offset: u64, to: &mut [u8], what: &'static str) -> Result<(), FileError> {
        let end = offset.saturating_add(to.len() as u64);
        if end > self.len {
            return Err(FileError::Truncated { what, end, len: self.len });
        }
        self.file.read_exact_at(to, offset).map_err(FileError::of_read)
    }
}

/// Reads all of `file` into RAM at `addr`.
pub(crate) fn copy_file(mem: &GuestRam, addr: u64, file: &File, len: u64) -> Result<(), FileError> {
    copy_part(mem, addr, file, 0, len)
}

fn copy_part(
    mem: &GuestRam,
    addr: u64,
    file: &File,
    offset: u64,
    len: u64,
) -> Result<(), FileError> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    mem.read_exact_volatile_from(GuestAddress(addr), &mut Positioned { file, offset }, len)
        .map_err(FileError::of_copy)
}

/// Little-endian integers out of a header that has been read in full: what lay beyond it would be zero.
trait Fields {
    fn u8_at(&self, at: usize) -> u8;
    fn u16_at(&self, at: usize) -> u16;
    fn u32_at(&self, at: usize) -> u32;
    fn u64_at(&self, at: usize) -> u64;
}

impl Fields for [u8] {
    fn u8_at(&self, at: usize) -> u8 {
        u8::from_le_bytes(bytes_at(self, at))
    }
    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes(bytes_at(self, at))
    }
    fn u32_at(&self, at: usize) -> u32 {
        u32::from_le_bytes(bytes_at(self, at))
    }
    fn u64_at(&self, at: usize) -> u64 {
        u64::from_le_bytes(bytes_at(self, at))
    }
}

fn bytes_at<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    header.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

#[cfg(test)]
#[expect(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that panics is a test that fails"
)]
mod tests;
