//! ACPI tables: found through the RSDP, never at fixed addresses. Reads FADT and MADT; runs no AML.

use crate::boot::BootInfo;
use crate::memory::read_at;

/// A table with the standard header.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    pub address: u64,
    pub signature: [u8; 4],
    pub len: u32,
}

impl Table {
    /// # Safety
    /// `address` is that of an ACPI table.
    unsafe fn at(address: u64) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self { address, signature: read_at(address), len: read_at(address + 4) } }
    }

    pub fn name(&self) -> &str {
        core::str::from_utf8(&self.signature).unwrap_or("????")
    }

    pub fn bytes(&self) -> &'static [u8] {
        // SAFETY: firmware tables are never written to.
        unsafe { core::slice::from_raw_parts(self.address as *const u8, self.len as usize) }
    }

    /// Whether the bytes sum to zero, as they must.
    pub fn is_intact(&self) -> bool {
        sum(self.bytes()) == 0
    }

    fn read<T: Copy>(&self, offset: usize) -> Option<T> {
        // SAFETY: inside the table.
        (offset + size_of::<T>() <= self.len as usize)
            .then(|| unsafe { read_at(self.address + offset as u64) })
    }
}

/// A register as a Generic Address Structure describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    Memory(u64),
    Port(u16),
}

/// What FADT says of turning off and resetting.
#[derive(Debug, Clone, Copy)]
pub struct Fadt {
    pub flags: u32,
    pub dsdt: u64,
    pub reset: Option<(Register, u8)>,
    pub sleep_control: Option<Register>,
    pub sleep_status: Option<Register>,
}

/// An entry of the MADT.
#[derive(Debug, Clone, Copy)]
pub enum MadtEntry {
    LocalApic { id: u32, is_enabled: bool },
    IoApic { id: u8, address: u32, first_gsi: u32 },
    Override { irq: u8, gsi: u32 },
    Other { kind: u8 },
}

/// The RSDP's address: the loader's, else the one in the BIOS area.
pub fn rsdp(boot: &BootInfo) -> Option<u64> {
    // SAFETY: low memory is mapped and has no side effects.
    let is_rsdp = |&at: &u64| unsafe { read_at::<[u8; 8]>(at) } == *b"RSD PTR ";
    Some(boot.rsdp)
        .filter(|&at| at != 0)
        .into_iter()
        .chain((0xe0000..0x10_0000).step_by(16))
        .find(is_rsdp)
}

/// Whether both of the RSDP's checksums hold.
pub fn is_rsdp_intact(address: u64) -> bool {
    // SAFETY: `address` came from `rsdp`; revision 2 has 36 bytes.
    let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, 36) };
    sum(&bytes[..20]) == 0 && (bytes[15] < 2 || sum(bytes) == 0)
}

/// XSDT, or RSDT where the RSDP is of revision 0.
pub fn root(boot: &BootInfo) -> Option<Table> {
    let rsdp = rsdp(boot)?;
    // SAFETY: the RSDP's fields point to tables.
    unsafe {
        let xsdt = if read_at::<u8>(rsdp + 15) >= 2 { read_at::<u64>(rsdp + 24) } else { 0 };
        let rsdt: u32 = read_at(rsdp + 16);
        Some(Table::at(if xsdt != 0 { xsdt } else { rsdt.into() }))
    }
}

/// The tables the root names.
pub fn tables(boot: &BootInfo) -> impl Iterator<Item = Table> {
    let root = root(boot);
    let width = root.map_or(8, |r| if r.signature == *b"XSDT" { 8 } else { 4 });
    let entries = root.map_or(&[][..], |r| r.bytes().get(36..).unwrap_or(&[]));
    entries.chunks_exact(width).map(|entry| {
        let mut address = [0; 8];
        address[..entry.len()].copy_from_slice(entry);
        // SAFETY: the root table names tables only.
        unsafe { Table::at(u64::from_le_bytes(address)) }
    })
}

pub fn find(boot: &BootInfo, signature: &[u8; 4]) -> Option<Table> {
    tables(boot).find(|t| t.signature == *signature)
}

/// Reads the FADT (ACPI 6.5, 5.2.9).
pub fn fadt(boot: &BootInfo) -> Option<Fadt> {
    let table = find(boot, b"FACP")?;
    let flags: u32 = table.read(112)?;
    let reset = register(&table, 116).zip(table.read(128)).filter(|_| flags & 1 << 10 != 0);
    let dsdt = match table.read(140) {
        Some(0) | None => table.read::<u32>(40)?.into(),
        Some(wide) => wide,
    };
    let (sleep_control, sleep_status) = (register(&table, 244), register(&table, 256));
    Some(Fadt { flags, dsdt, reset, sleep_control, sleep_status })
}

/// The differentiated system description table, which only the FADT names.
pub fn dsdt(fadt: &Fadt) -> Option<Table> {
    // SAFETY: the FADT's pointer is to a table, or 0.
    (fadt.dsdt != 0).then(|| unsafe { Table::at(fadt.dsdt) })
}

/// Reads the MADT (ACPI 6.5, 5.2.12), entry by entry.
pub fn madt(boot: &BootInfo) -> impl Iterator<Item = MadtEntry> {
    let mut rest = find(boot, b"APIC").map_or(&[][..], |t| t.bytes().get(44..).unwrap_or(&[]));
    core::iter::from_fn(move || {
        let (&[kind, len], _) = rest.split_first_chunk()?;
        let (entry, after) = rest.split_at_checked(usize::from(len).max(2))?;
        rest = after;
        let u32_at = |at: usize| {
            entry.get(at..)?.first_chunk().map(|bytes: &[u8; 4]| u32::from_le_bytes(*bytes))
        };
        let flags_at = |at| u32_at(at).is_some_and(|flags| flags & 1 == 1);
        Some(match (kind, entry) {
            (0, [_, _, _, id, ..]) => {
                MadtEntry::LocalApic { id: (*id).into(), is_enabled: flags_at(4) }
            }
            (1, [_, _, id, ..]) => MadtEntry::IoApic {
                id: *id,
                address: u32_at(4).unwrap_or(0),
                first_gsi: u32_at(8).unwrap_or(0),
            },
            (2, [_, _, _, irq, ..]) => {
                MadtEntry::Override { irq: *irq, gsi: u32_at(4).unwrap_or(0) }
            }
            (9, _) => {
                MadtEntry::LocalApic { id: u32_at(4).unwrap_or(u32::MAX), is_enabled: flags_at(8) }
            }
            _ => MadtEntry::Other { kind },
        })
    })
}

/// APIC ids of the usable CPUs.
pub fn cpus(boot: &BootInfo) -> impl Iterator<Item = u32> {
    madt(boot).filter_map(|entry| match entry {
        MadtEntry::LocalApic { id, is_enabled: true } => Some(id),
        _ => None,
    })
}

/// Address of the first I/O APIC.
pub fn io_apic(boot: &BootInfo) -> Option<usize> {
    madt(boot).find_map(|entry| match entry {
        MadtEntry::IoApic { address, .. } => Some(address as usize),
        _ => None,
    })
}

/// The Generic Address Structure at `offset`; none if its address is 0.
fn register(table: &Table, offset: usize) -> Option<Register> {
    let (space, address): (u8, u64) = (table.read(offset)?, table.read(offset + 4)?);
    match space {
        0 if address != 0 => Some(Register::Memory(address)),
        1 if address != 0 => Some(Register::Port(address as u16)),
        _ => None,
    }
}

pub fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}
