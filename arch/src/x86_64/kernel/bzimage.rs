//! bzImage: a compressed Linux with its own boot header (Documentation/arch/x86/boot.rst).
use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::super::error::FileError;
use super::super::layout;
use super::{Fields, Segment, Source};

/// The header starts here in the file; its end is at 0x202 + the byte at 0x201.
const HEADER: usize = 0x1f1;
const SECTOR: u64 = 512;
const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
/// Protocol 2.12 brought `xloadflags`, and with it the promise of a 64-bit entry.
pub(super) const VERSION_MIN: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
/// The 64-bit entry, from the start of the loaded part.
const ENTRY_64: u64 = 0x200;

/// What a bzImage says.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) segment: Segment,
    pub(super) entry: u64,
    pub(super) header: setup_header,
}

pub(super) fn read(source: &Source<'_>, magic: [u8; 4]) -> Result<Image, FileError> {
    let mut first = [0; 0x270];
    if source.len < first.len() as u64 {
        return Err(FileError::Format(magic));
    }
    source.read(0, &mut first, "the boot header")?;
    if first.u32_at(0x202) != HDRS {
        return Err(FileError::Format(magic));
    }
    let header = parse_header(&first);
    check(&first)?;
    let offset = u64::from(setup_sects(&first)).saturating_add(1).saturating_mul(SECTOR);
    let file_len = source.len.saturating_sub(offset);
    let announced = u64::from(first.u32_at(0x1f4)) * 16;
    if announced == 0 || announced > file_len.next_multiple_of(16) {
        let (what, end) =
            ("the protected-mode kernel (syssize)", offset.saturating_add(announced.max(1)));
        return Err(FileError::Truncated { what, end, len: source.len });
    }
    let addr = load_address(&first)?;
    // What the kernel needs to unpack itself: counted, so that nothing else is put there.
    let mem_len = u64::from(first.u32_at(0x260)).max(file_len);
    let Some(_) = addr.checked_add(mem_len) else {
        let want = "an address from which init_size does not wrap";
        return Err(FileError::Field { field: "pref_address", value: addr, want });
    };
    if file_len <= ENTRY_64 {
        let (what, end) = ("the 64-bit entry", offset.saturating_add(ENTRY_64));
        return Err(FileError::Truncated { what, end, len: source.len });
    }
    let segment = Segment { file_offset: offset, file_len, addr, mem_len };
    Ok(Image { segment, entry: addr.saturating_add(ENTRY_64), header })
}

fn parse_header(first: &[u8]) -> setup_header {
    let mut header = setup_header::default();
    let fields = first.iter().skip(HEADER);
    header.as_mut_slice().iter_mut().zip(fields).for_each(|(to, from)| *to = *from);
    header
}

fn check(first: &[u8]) -> Result<(), FileError> {
    let field = |field, value: u64, want| Err(FileError::Field { field, value, want });
    if first.u16_at(0x1fe) != BOOT_FLAG {
        return field("boot_flag", first.u16_at(0x1fe).into(), "0xaa55");
    }
    if first.u16_at(0x206) < VERSION_MIN {
        return field("version", first.u16_at(0x206).into(), "0x20c or later");
    }
    if first.u8_at(0x211) & LOADED_HIGH == 0 {
        return field("loadflags", first.u8_at(0x211).into(), "bit 0 (LOADED_HIGH) set");
    }
    if first.u16_at(0x236) & XLF_KERNEL_64 == 0 {
        let want = "bit 0 (a 64-bit entry at 0x200) set";
        return field("xloadflags", first.u16_at(0x236).into(), want);
    }
    if setup_sects(first) == u8::MAX {
        return field("setup_sects", u8::MAX.into(), "a number of 512-byte sectors below 255");
    }
    Ok(())
}

/// 0 means 4, for the sake of very old kernels.
fn setup_sects(first: &[u8]) -> u8 {
    match first.u8_at(HEADER) {
        0 => 4,
        count => count,
    }
}

/// Where the kernel would like to be: there it runs without moving itself.
fn load_address(first: &[u8]) -> Result<u64, FileError> {
    match first.u64_at(0x258) {
        0 => Ok(layout::HIGH_RAM),
        preferred if preferred < layout::HIGH_RAM => {
            let want = "0 or at least 0x100000";
            Err(FileError::Field { field: "pref_address", value: preferred, want })
        }
        preferred => Ok(preferred),
    }
}
