//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI finds its
//! processors and interrupts.
use super::layout;

const ISA_BUS: u8 = 0;
const INTERRUPT_INPUTS: u8 = 24;

/// The table for `vcpus` processors, to be written at [`layout::MP_TABLE`]. At most 1 KiB for the
/// 32 vCPUs that a VM may have.
pub(crate) fn build(apic_ids: &[u8]) -> Vec<u8> {
    let io_apic_id = apic_ids.iter().copied().max().unwrap_or(0).saturating_add(1);
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for (index, &apic_id) in apic_ids.iter().enumerate() {
        // Enabled; the first is the boot processor. Version 0x14 is an integrated APIC.
        let flags = if index == 0 { 3 } else { 1 };
        let mut processor = [0; 20];
        processor[..4].copy_from_slice(&[0, apic_id, 0x14, flags]);
        processor[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        processor[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        entry(&processor);
    }
    entry(&[1, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = u32::to_le_bytes(0xfec0_0000);
    entry(&[2, io_apic_id, 0x11, 1, a, b, c, d]);
    for input in 0..INTERRUPT_INPUTS {
        entry(&[3, 0, 0, 0, ISA_BUS, input, io_apic_id, input]);
    }
    // Local interrupts of every processor: ExtINT on LINT0, NMI on LINT1.
    entry(&[4, 3, 0, 0, ISA_BUS, 0, 0, 0]);
    entry(&[4, 1, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let mut table = Vec::with_capacity(1024);
    table.extend_from_slice(&floating_pointer());
    table.extend_from_slice(&header(&entries, count));
    table.extend_from_slice(&entries);
    table
}

fn floating_pointer() -> [u8; 16] {
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    let table = u32::try_from(layout::MP_TABLE).map_or(0, |p| p + 16);
    pointer[4..8].copy_from_slice(&table.to_le_bytes());
    pointer[8] = 1;
    pointer[9] = 4;
    pointer[10] = checksum(&pointer);
    pointer
}

fn header(entries: &[u8], count: u16) -> [u8; 44] {
    let mut header = [0; 44];
    let len = u16::try_from(header.len() + entries.len()).unwrap_or(u16::MAX);
    header[..4].copy_from_slice(b"PCMP");
    header[4..6].copy_from_slice(&len.to_le_bytes());
    header[6] = 4;
    header[8..16].copy_from_slice(b"HUSK    ");
    header[16..28].copy_from_slice(b"MICROVM     ");
    header[34..36].copy_from_slice(&count.to_le_bytes());
    header[36..40].copy_from_slice(&0xfee0_0000u32.to_le_bytes());
    header[7] = checksum(&[&header[..], entries].concat());
    header
}

/// What makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, b| sum.wrapping_add(*b))
    }

    #[test]
    fn checksums_hold_and_the_largest_table_fits_below_640_kib() {
        for vcpus in 1..=32 {
            let ids: Vec<u8> = (0..vcpus).collect();
            let table = build(&ids);
            assert_eq!(sum(&table[..16]), 0);
            assert_eq!(sum(&table[16..]), 0);
            assert!(table.len() <= 1024, "{}", table.len());
            let len = usize::from(u16::from_le_bytes([table[20], table[21]]));
            assert_eq!(len, table.len() - 16);
        }
    }

    #[test]
    fn the_first_processor_boots_and_the_io_apic_has_its_own_id() {
        let table = build(&[0, 1, 2]);
        let processors: Vec<&[u8]> = table[60..].chunks(20).take(3).collect();
        assert_eq!(processors.iter().map(|p| p[3]).collect::<Vec<_>>(), [3, 1, 1]);
        let io_apic = &table[60 + 60 + 8..];
        assert_eq!((io_apic[0], io_apic[1]), (2, 3));
    }
}
