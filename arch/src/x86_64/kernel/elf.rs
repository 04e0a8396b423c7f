//! ELF images: `vmlinux`, unikernels, bare-metal programs (System V ABI, chapters 4 and 5).
use super::super::error::FileError;
use super::{Fields, Segment, Source};

pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// The note that says where a PVH loader enters (Xen, elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY).
const XEN_PHYS32_ENTRY: u32 = 18;
/// More notes than any kernel has; what lies beyond is not looked at.
const NOTES_MAX: u64 = 64 << 10;

/// What an ELF file says.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) segments: Vec<Segment>,
    pub(super) entry: u64,
    pub(super) pvh_entry: Option<u64>,
}

pub(super) fn read(source: &Source<'_>) -> Result<Image, FileError> {
    let mut header = [0; HEADER_SIZE];
    source.read(0, &mut header, "the ELF header")?;
    check_header(&header)?;
    let headers = read_program_headers(source, &header)?;
    let mut segments = Vec::new();
    let mut pvh_entry = None;
    for header in headers.chunks_exact(PROGRAM_HEADER_SIZE) {
        match header.u32_at(0) {
            PT_LOAD => segments.extend(segment(source, header)?),
            PT_NOTE => pvh_entry = pvh_entry.or(find_pvh_entry(source, header)?),
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err(FileError::NoSegment);
    }
    check_overlaps(&segments)?;
    Ok(Image { segments, entry: header.u64_at(24), pvh_entry })
}

fn check_header(header: &[u8]) -> Result<(), FileError> {
    let field = |field, value: u64, want| Err(FileError::Field { field, value, want });
    let kind = header.u16_at(16);
    if header.u8_at(4) != CLASS_64 {
        return field("EI_CLASS", header.u8_at(4).into(), "2 (64-bit)");
    }
    if header.u8_at(5) != LITTLE_ENDIAN {
        return field("EI_DATA", header.u8_at(5).into(), "1 (little-endian)");
    }
    if header.u16_at(18) != EM_X86_64 {
        return field("e_machine", header.u16_at(18).into(), "62 (x86-64)");
    }
    if kind != ET_EXEC && kind != ET_DYN {
        return field("e_type", kind.into(), "2 (executable) or 3 (position-independent)");
    }
    if usize::from(header.u16_at(54)) != PROGRAM_HEADER_SIZE {
        return field("e_phentsize", header.u16_at(54).into(), "56");
    }
    if header.u16_at(56) == u16::MAX {
        // PN_XNUM: the number is elsewhere, because there are more than 65,534.
        return field("e_phnum", u16::MAX.into(), "at most 65534");
    }
    Ok(())
}

fn read_program_headers(source: &Source<'_>, header: &[u8]) -> Result<Vec<u8>, FileError> {
    let offset = header.u64_at(32);
    let len = usize::from(header.u16_at(56)) * PROGRAM_HEADER_SIZE;
    if offset < HEADER_SIZE as u64 && len > 0 {
        return Err(FileError::Field { field: "e_phoff", value: offset, want: "at least 64" });
    }
    let mut headers = vec![0; len];
    source.read(offset, &mut headers, "the program headers")?;
    Ok(headers)
}

/// A segment to load; none if it has no memory at all.
fn segment(source: &Source<'_>, header: &[u8]) -> Result<Option<Segment>, FileError> {
    let file_offset = header.u64_at(8);
    let addr = header.u64_at(24);
    let (file_len, mem_len) = (header.u64_at(32), header.u64_at(40));
    let file_end = file_offset.saturating_add(file_len);
    if file_len > mem_len {
        let want = "at most p_memsz";
        return Err(FileError::Field { field: "p_filesz", value: file_len, want });
    }
    if file_end > source.len {
        let what = "a segment";
        return Err(FileError::Truncated { what, end: file_end, len: source.len });
    }
    if addr.checked_add(mem_len).is_none() {
        let want = "an address from which p_memsz does not wrap";
        return Err(FileError::Field { field: "p_paddr", value: addr, want });
    }
    Ok((mem_len > 0).then_some(Segment { file_offset, file_len, addr, mem_len }))
}

fn check_overlaps(segments: &[Segment]) -> Result<(), FileError> {
    let mut sorted = segments.to_vec();
    sorted.sort_by_key(|s| s.addr);
    let mut neighbours = sorted.iter().zip(sorted.iter().skip(1));
    match neighbours.find(|(below, above)| above.addr < below.end()) {
        Some((_, above)) => Err(FileError::Overlap {
            what: "segment",
            start: above.addr,
            end: above.end(),
            other: "another segment",
        }),
        None => Ok(()),
    }
}

/// Looks for the PVH note. A note that runs past its segment ends the search: the rest of the
/// segment cannot be told apart.
fn find_pvh_entry(source: &Source<'_>, header: &[u8]) -> Result<Option<u64>, FileError> {
    let (offset, len) = (header.u64_at(8), header.u64_at(32).min(NOTES_MAX));
    let mut notes = vec![0; usize::try_from(len).unwrap_or(0)];
    source.read(offset, &mut notes, "the notes")?;
    let mut rest = notes.as_slice();
    while rest.len() >= 12 {
        let (name_len, desc_len) = (rest.u32_at(0) as usize, rest.u32_at(4) as usize);
        let name_end = name_len.saturating_add(12);
        let desc_start = name_len.next_multiple_of(4).saturating_add(12);
        let desc_end = desc_start.saturating_add(desc_len);
        let Some(desc) = rest.get(desc_start..desc_end) else { break };
        if rest.u32_at(8) == XEN_PHYS32_ENTRY && rest.get(12..name_end) == Some(b"Xen\0") {
            // Linux writes a 32-bit word, others a 64-bit one; the address is below 4 GiB.
            if desc.len() != 4 && desc.len() != 8 {
                let want = "4 or 8";
                let value = desc.len() as u64;
                return Err(FileError::Field { field: "n_descsz of the PVH note", value, want });
            }
            return Ok(Some(desc.u32_at(0).into()));
        }
        let next = desc_start.saturating_add(desc_len.next_multiple_of(4));
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(None)
}
