//! Where things lie in the guest's physical address space and on its I/O ports.
//!
//! ```text
//!  0x0000_0000  boot structures: GDT, start info, zero page, page tables, command line
//!  0x0003_0000  free RAM for small kernels
//!  0x0009_fc00  MP table (where the EBDA of a PC lies)
//!  0x000c_0000  the snapshot's id, VMClock; the payload at 0xd0000, ACPI tables at 0xe0000
//!  0x0010_0000  RAM: kernels; the initrd at the top
//!  0xc000_0000  the hole: boot timer, virtio-mmio windows, generation id, I/O APIC, local APICs,
//!               KVM's own pages
//!  0x1_0000_0000 the rest of RAM; above it, in steps of 2 GiB, memory that devices bring along
//! ```
use vm_memory::GuestAddress;

/// Flat segments, for the first instructions of a kernel.
pub(crate) const GDT: u64 = 0x500;
/// PVH: `hvm_start_info`, its module list and its memory map share a page.
pub(crate) const PVH_START_INFO: u64 = 0x6000;
pub(crate) const PVH_MODULES: u64 = 0x6040;
pub(crate) const PVH_MEMORY_MAP: u64 = 0x6100;
/// 64-bit boot protocol: `boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Top of a stack of somewhat less than a page.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
pub(crate) const PML4: u64 = 0x9000;
pub(crate) const PDPT: u64 = 0xa000;
/// Up to four page directories, one a GiB.
pub(crate) const PAGE_DIRECTORIES: u64 = 0xb000;
/// The kernel command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// Most bytes of a command line, the terminating NUL included (Linux on x86: COMMAND_LINE_SIZE).
pub const CMDLINE_MAX: usize = 2048;
/// First address that no boot structure needs.
pub(crate) const LOW_RAM_FREE: u64 = 0x3_0000;
/// The MP table, and the end of what is RAM below 1 MiB.
pub(crate) const MP_TABLE: u64 = 0x9_fc00;
/// Where a memory file has the id of its snapshot, 16 bytes. In a page of its own, behind bytes that no
/// option ROM begins with.
pub const SNAPSHOT_ID: u64 = 0xc_0028;
/// VMClock, a page.
pub const VMCLOCK: u64 = 0xc_1000;
/// Bytes of it.
pub const VMCLOCK_LEN: u64 = 0x1000;
/// What the user gives this VM and no clone of it.
pub const PAYLOAD: u64 = 0xd_0000;
/// Bytes of it.
pub const PAYLOAD_LEN: u64 = 0x1_0000;
/// ACPI tables, the RSDP first: kernels search from here in 16-byte steps.
pub(crate) const ACPI: u64 = 0xe_0000;
/// Where RAM goes on and kernels begin.
pub const HIGH_RAM: u64 = 0x10_0000;

/// First address of the hole below 4 GiB, which is not RAM.
pub const HOLE: u64 = 0xc000_0000;
/// Where RAM goes on above the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Firecracker's boot timer, 4 KiB, if there is one.
pub const BOOT_TIMER: u64 = HOLE;
/// Virtio-mmio windows that ACPI describes, 4 KiB each.
pub const VIRTIO_ACPI: u64 = 0xc100_0000;
/// Virtio-mmio windows that the kernel command line names, 4 KiB each.
pub const VIRTIO_CMDLINE: u64 = 0xc000_1000;
/// The VM generation id, in a page that is not RAM, so that a guest's looking at it is seen.
pub const GENERATION_ID: u64 = 0xc200_0000;
/// The I/O APIC.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors (KVM_SET_TSS_ADDR).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One more, for its identity map.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// A page in the hole where nothing is.
pub const SPARE_PAGE: u64 = KVM_IDENTITY_MAP - 0x1000;

/// Serial port COM1.
pub const SERIAL: u64 = 0x3f8;
/// Keyboard controller: data port 0x60, command port 0x64.
pub const I8042_DATA: u64 = 0x60;
/// See [`I8042_DATA`].
pub const I8042_COMMAND: u64 = 0x64;
/// CMOS clock: index and data.
pub const RTC: u64 = 0x70;
/// ACPI sleep control, sleep status, reset, pending events: a byte each.
pub const ACPI_POWER: u64 = 0x600;

/// Interrupt of the keyboard controller.
pub const I8042_IRQ: u32 = 1;
/// Interrupt of COM1.
pub const SERIAL_IRQ: u32 = 4;
/// Interrupt of the ACPI event device.
pub const ACPI_IRQ: u32 = 9;
/// Interrupts of virtio devices, in order.
pub const VIRTIO_IRQS: [u32; 17] =
    [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// Smallest RAM: what lies below 1 MiB holds the boot structures.
pub const RAM_MIN: u64 = 1 << 20;
/// Largest RAM, well inside the 46 bits of physical address that every server processor has.
pub const RAM_MAX: u64 = 1 << 44;

/// What memory that devices bring along is aligned to: the largest piece in which Linux plugs memory.
pub const DEVICE_MEMORY_ALIGNMENT: u64 = 2 << 30;

/// Where such memory may begin at `floor` or above: not in RAM, nor in the hole. `None` past the
/// last address.
pub fn device_memory(floor: u64) -> Option<u64> {
    floor.max(HOLE_END).checked_next_multiple_of(DEVICE_MEMORY_ALIGNMENT)
}

/// Where `size` bytes of RAM lie: below the hole, and what does not fit there above it.
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(HOLE);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((GuestAddress(HOLE_END), size - low));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_memory_is_above_ram() {
        assert_eq!(device_memory(RAM_MIN), Some(HOLE_END));
        assert_eq!(device_memory(HOLE_END + 1), Some(HOLE_END + DEVICE_MEMORY_ALIGNMENT));
        assert_eq!(device_memory(u64::MAX), None);
    }

    #[test]
    fn ram_leaves_the_hole_free() {
        assert_eq!(ram_ranges(RAM_MIN), [(GuestAddress(0), RAM_MIN)]);
        assert_eq!(ram_ranges(HOLE), [(GuestAddress(0), HOLE)]);
        assert_eq!(ram_ranges(HOLE + 1), [(GuestAddress(0), HOLE), (GuestAddress(HOLE_END), 1)]);
    }
}
