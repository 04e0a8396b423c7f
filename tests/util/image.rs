//! Kernel images made by hand, right and wrong.
use std::path::{Path, PathBuf};

use super::Scratch;

/// A segment of an [`Elf`]; the file holds `bytes`, the guest sees `mem_len`.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) addr: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) mem_len: u64,
}

impl Segment {
    pub(crate) fn new(addr: u64, bytes: &[u8]) -> Self {
        Self { addr, bytes: bytes.to_vec(), mem_len: bytes.len() as u64 }
    }
}

/// An ELF file, whose bytes can be spoilt: offsets are those of the specification.
#[derive(Clone, Debug)]
pub(crate) struct Elf {
    pub(crate) bytes: Vec<u8>,
}

/// Offsets of fields in the header, and in the first program header.
pub(crate) mod field {
    pub(crate) const CLASS: usize = 4;
    pub(crate) const DATA: usize = 5;
    pub(crate) const TYPE: usize = 16;
    pub(crate) const MACHINE: usize = 18;
    pub(crate) const ENTRY: usize = 24;
    pub(crate) const PHOFF: usize = 32;
    pub(crate) const PHENTSIZE: usize = 54;
    pub(crate) const PHNUM: usize = 56;
    pub(crate) const P_TYPE: usize = 64;
    pub(crate) const P_OFFSET: usize = 72;
    pub(crate) const P_FILESZ: usize = 96;
    pub(crate) const P_MEMSZ: usize = 104;
}

/// Prints `+` on the first serial port and powers off by ACPI's sleep control register: 64-bit code that runs anywhere.
pub(crate) const PLUS_AND_POWEROFF: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'+', // mov al, '+'
    0xee, // out dx, al
    0x66, 0xba, 0x00, 0x06, // mov dx, 0x600
    0xb0, 0x34, // mov al, 5 << 2 | 1 << 5
    0xee, // out dx, al
    0xf4, // hlt
];

impl Elf {
    /// A good one: one segment of code at 1 MiB, entered by the 64-bit boot protocol.
    pub(crate) fn good() -> Self {
        Self::new(0x10_0000, &[Segment::new(0x10_0000, PLUS_AND_POWEROFF)])
    }

    pub(crate) fn new(entry: u64, segments: &[Segment]) -> Self {
        let mut header = vec![0; 64];
        header[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
        let mut elf = Self { bytes: header };
        elf.set(field::TYPE, 2_u16.to_le_bytes());
        elf.set(field::MACHINE, 62_u16.to_le_bytes());
        elf.set(20, 1_u32.to_le_bytes());
        elf.set(field::ENTRY, entry.to_le_bytes());
        elf.set(field::PHOFF, 64_u64.to_le_bytes());
        elf.set(52, 64_u16.to_le_bytes());
        elf.set(field::PHENTSIZE, 56_u16.to_le_bytes());
        elf.set(field::PHNUM, (segments.len() as u16).to_le_bytes());
        let mut offset = 64 + 56 * segments.len() as u64;
        for segment in segments {
            let mut words = vec![1 | 7 << 32, offset, segment.addr, segment.addr];
            words.extend([segment.bytes.len() as u64, segment.mem_len, 0x1000]);
            elf.bytes.extend(words.iter().flat_map(|word: &u64| word.to_le_bytes()));
            offset += segment.bytes.len() as u64;
        }
        segments.iter().for_each(|segment| elf.bytes.extend(&segment.bytes));
        elf
    }

    /// Overwrites bytes.
    pub(crate) fn set<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        self.bytes[at..at + N].copy_from_slice(&bytes);
    }

    /// The same with a field overwritten.
    pub(crate) fn with<const N: usize>(mut self, at: usize, bytes: [u8; N]) -> Self {
        self.set(at, bytes);
        self
    }
}

/// A bzImage (Documentation/arch/x86/boot.rst) whose 64-bit entry is `code`.
pub(crate) fn bz_image(code: &[u8]) -> Vec<u8> {
    let setup_sectors = 1;
    let mut image = vec![0; 512 * (1 + setup_sectors)];
    // The protected-mode part: 64-bit entry at 0x200.
    let mut payload = vec![0xf4; 0x200];
    payload.extend(code);
    payload.resize(payload.len().next_multiple_of(16), 0);
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1f1, &[setup_sectors as u8]);
    set(0x1f4, &(payload.len() as u32 / 16).to_le_bytes());
    set(0x1fe, &0xaa55_u16.to_le_bytes());
    set(0x200, &[0xeb, 0x66]);
    set(0x202, b"HdrS");
    set(0x206, &0x020f_u16.to_le_bytes());
    // LOADED_HIGH.
    set(0x211, &[1]);
    set(0x214, &0x10_0000_u32.to_le_bytes());
    set(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    set(0x230, &0x20_0000_u32.to_le_bytes());
    // XLF_KERNEL_64 | XLF_CAN_BE_LOADED_ABOVE_4G, relocatable, alignment.
    set(0x234, &[1]);
    set(0x236, &3_u16.to_le_bytes());
    set(0x238, &2047_u32.to_le_bytes());
    set(0x258, &0x10_0000_u64.to_le_bytes());
    set(0x260, &0x1_0000_u32.to_le_bytes());
    image.extend(payload);
    image
}

/// A copy of an image without its PVH note, so that it is entered by the 64-bit boot protocol.
pub(crate) fn without_pvh(scratch: &Scratch, image: &Path) -> PathBuf {
    let mut bytes = std::fs::read(image).unwrap();
    // Name length 4, any description, type XEN_ELFNOTE_PHYS32_ENTRY, name.
    let is_note = |w: &[u8]| w[..4] == [4, 0, 0, 0] && w[8..] == *b"\x12\0\0\0Xen\0";
    let at = bytes.windows(16).position(is_note).expect("a PVH note");
    bytes[at + 8] = 0;
    scratch.file("without-pvh.elf", bytes)
}
