//! What the binary is on disk.
use std::fs;

use crate::report::{Report, Target};
use crate::vmm::husk;
use crate::{Bench, Result};

const TARGET_MIB: f64 = 5.0;
const SECTION_HEADER: usize = 64;
const SHT_SYMTAB: u32 = 2;

/// The size of the binary as `strip` would leave it: without its symbol table.
pub(crate) fn binary_size(_: &Bench, report: &mut Report) -> Result<()> {
    let husk = husk();
    let elf = fs::read(&husk).map_err(|e| format!("{}: {e}", husk.display()))?;
    let symbols = symbols_len(&elf).ok_or("husk's ELF headers make no sense")?;
    let len = (elf.len() - symbols) as f64 / f64::from(1 << 20);
    report.add_one("binary, stripped", "MiB", len, Target::AtMost(TARGET_MIB));
    Ok(())
}

/// The bytes of the symbol table and of its strings.
fn symbols_len(elf: &[u8]) -> Option<usize> {
    let half = |at| Some(usize::from(u16::from_le_bytes(*elf.get(at..)?.first_chunk()?)));
    let word = |at| Some(u32::from_le_bytes(*elf.get(at..)?.first_chunk()?));
    let long = |at| usize::try_from(u64::from_le_bytes(*elf.get(at..)?.first_chunk()?)).ok();
    let (table, count) = (long(40)?, half(60)?);
    let section = |index: usize| table + index * SECTION_HEADER;
    let mut len = 0;
    for header in (0..count).map(section) {
        if word(header + 4)? == SHT_SYMTAB {
            let strings = section(usize::try_from(word(header + 40)?).ok()?);
            len += long(header + 32)? + long(strings + 32)?;
        }
    }
    (len < elf.len()).then_some(len)
}
