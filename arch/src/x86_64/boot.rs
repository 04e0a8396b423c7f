//! Describing the machine to the kernel: command line, memory map, initrd, processors, devices.
//!
//! A kernel may look for the same fact in several places (PVH start info or `boot_params`, ACPI or
//! MP table); all are written, from one description, so that they cannot disagree.
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::error::{BootError, FileError};
use super::kernel::{Entry, Kernel, Protocol, copy_file};
use super::{acpi, layout, mptable, regs};
use crate::GuestRam;

const PAGE: u64 = 0x1000;
/// "Undefined" boot loader (boot.rst, type_of_loader).
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// An initrd, opened.
#[derive(Debug)]
pub struct Initrd {
    /// For messages.
    pub path: PathBuf,
    /// Read from its start.
    pub file: File,
}

impl Initrd {
    /// Checks that there is room for it in `ram_size` bytes of RAM, beside `kernel`.
    pub fn check(&self, kernel: &Kernel, ram_size: u64) -> Result<(), BootError> {
        self.place(&kernel.entry(), ram_size).map(|_| ())
    }

    /// As high as it may lie, so that the kernel below it can grow.
    fn place(&self, kernel: &Entry, ram_size: u64) -> Result<Placed, BootError> {
        let len = self.file.metadata().map_err(|e| self.failed(FileError::Read(e)))?.size();
        if len == 0 {
            return Err(self.failed(FileError::Empty));
        }
        let ram_end = ram_size.min(layout::HOLE);
        let ceiling = kernel.initrd_ceiling().min(ram_end);
        let floor = if kernel.start < layout::HIGH_RAM {
            layout::HIGH_RAM
        } else {
            kernel.end.next_multiple_of(PAGE)
        };
        let floor = floor.max(kernel.end.next_multiple_of(PAGE));
        let addr = ceiling.checked_sub(len).map(|a| a / PAGE * PAGE).filter(|&a| a >= floor);
        match addr {
            Some(addr) => Ok(Placed { addr, len }),
            None => Err(self.failed(FileError::NoRoom { len, floor, ceiling })),
        }
    }

    fn failed(&self, why: FileError) -> BootError {
        BootError::File { what: "initrd", path: self.path.clone(), why }
    }
}

/// Where a virtio-mmio device answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// The window that ACPI describes.
    pub acpi_window: u64,
    /// The window on the command line.
    pub cmdline_window: u64,
    /// Its interrupt.
    pub irq: u32,
}

impl VirtioMmio {
    pub(crate) const WINDOW_LEN: u32 = 0x1000;

    /// What the kernel command line says of it.
    pub fn kernel_arg(&self) -> String {
        format!("virtio_mmio.device=4K@{:#x}:{}", self.cmdline_window, self.irq)
    }
}

/// The machine, as a kernel is told of it.
#[derive(Debug)]
pub struct Platform<'a> {
    /// The whole command line, without NUL.
    pub cmdline: &'a str,
    /// The initrd, if there is one.
    pub initrd: Option<&'a Initrd>,
    /// The APIC id of each vCPU.
    pub apic_ids: &'a [u8],
    /// Virtio devices, in order.
    pub devices: &'a [VirtioMmio],
}

/// Where the initrd went.
#[derive(Clone, Copy, Debug)]
struct Placed {
    addr: u64,
    len: u64,
}

/// A range of the memory map.
struct Range {
    start: u64,
    len: u64,
    is_ram: bool,
}

impl Platform<'_> {
    /// Writes everything that `kernel` may look for into `mem`.
    pub fn write(&self, mem: &GuestRam, kernel: &Entry) -> Result<(), BootError> {
        check_cmdline(self.cmdline, kernel.cmdline_max())?;
        let cmdline = [self.cmdline.as_bytes(), b"\0"].concat();
        write(mem, layout::CMDLINE, &cmdline, "the command line")?;
        let initrd = self.initrd.map(|i| place_initrd(mem, kernel, i)).transpose()?;
        write(mem, layout::MP_TABLE, &mptable::build(self.apic_ids), "the MP table")?;
        write(mem, layout::ACPI, &acpi::build(self.apic_ids, self.devices), "the ACPI tables")?;
        match kernel.protocol {
            Protocol::Linux64 => {
                self.write_zero_page(mem, kernel.setup_header, initrd)?;
                regs::write_page_tables(mem, kernel.end)
            }
            Protocol::Pvh => self.write_start_info(mem, initrd),
        }
        .and_then(|()| regs::write_gdt(mem, kernel.protocol))
    }

    fn write_zero_page(
        &self,
        mem: &GuestRam,
        header: Option<setup_header>,
        initrd: Option<Placed>,
    ) -> Result<(), BootError> {
        let hdr = header.unwrap_or_else(|| setup_header {
            boot_flag: 0xaa55,
            header: 0x5372_6448,
            kernel_alignment: 0x0100_0000,
            ..setup_header::default()
        });
        let mut params = boot_params { hdr, ..boot_params::default() };
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        params.hdr.cmd_line_ptr = low(layout::CMDLINE);
        params.hdr.cmdline_size = u32::try_from(self.cmdline.len()).unwrap_or(0);
        params.acpi_rsdp_addr = layout::ACPI;
        if let Some(initrd) = initrd {
            params.hdr.ramdisk_image = low(initrd.addr);
            params.hdr.ramdisk_size = low(initrd.len);
        }
        for (entry, range) in params.e820_table.iter_mut().zip(memory_map(mem)) {
            let kind = if range.is_ram { E820_RAM } else { E820_RESERVED };
            *entry = boot_e820_entry { addr: range.start, size: range.len, r#type: kind };
            params.e820_entries += 1;
        }
        mem.write_obj(params, GuestAddress(layout::ZERO_PAGE))
            .map_err(|_| BootError::Memory("the zero page"))
    }

    fn write_start_info(&self, mem: &GuestRam, initrd: Option<Placed>) -> Result<(), BootError> {
        let ranges = memory_map(mem);
        let info = hvm_start_info {
            magic: XEN_HVM_START_MAGIC_VALUE,
            version: 1,
            nr_modules: initrd.is_some().into(),
            modlist_paddr: initrd.map_or(0, |_| layout::PVH_MODULES),
            cmdline_paddr: layout::CMDLINE,
            rsdp_paddr: layout::ACPI,
            memmap_paddr: layout::PVH_MEMORY_MAP,
            memmap_entries: u32::try_from(ranges.len()).unwrap_or(0),
            ..hvm_start_info::default()
        };
        let failed = |_| BootError::Memory("the PVH start info");
        mem.write_obj(info, GuestAddress(layout::PVH_START_INFO)).map_err(failed)?;
        if let Some(Placed { addr, len }) = initrd {
            let module = hvm_modlist_entry { paddr: addr, size: len, ..Default::default() };
            mem.write_obj(module, GuestAddress(layout::PVH_MODULES)).map_err(failed)?;
        }
        let step = size_of::<hvm_memmap_table_entry>();
        for (at, range) in (layout::PVH_MEMORY_MAP..).step_by(step).zip(ranges) {
            let kind =
                if range.is_ram { XEN_HVM_MEMMAP_TYPE_RAM } else { XEN_HVM_MEMMAP_TYPE_RESERVED };
            let entry = hvm_memmap_table_entry {
                addr: range.start,
                size: range.len,
                type_: kind,
                reserved: 0,
            };
            mem.write_obj(entry, GuestAddress(at)).map_err(failed)?;
        }
        Ok(())
    }
}

/// Refuses what a kernel that takes `max` bytes, the NUL included, would cut off or misread.
pub fn check_cmdline(cmdline: &str, max: usize) -> Result<(), BootError> {
    let max = max.saturating_sub(1);
    if cmdline.len() > max {
        return Err(BootError::CmdlineTooLong { len: cmdline.len(), max });
    }
    let bad = cmdline.bytes().enumerate().find(|(_, b)| !(b' '..=b'~').contains(b) && *b != b'\t');
    match bad {
        Some((at, byte)) => Err(BootError::CmdlineByte { byte, at }),
        None => Ok(()),
    }
}

/// RAM and what lies between its parts that a kernel must not touch.
fn memory_map(mem: &GuestRam) -> Vec<Range> {
    let mut ranges = Vec::new();
    for region in mem.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        if start >= layout::HOLE_END {
            ranges.push(Range { start, len: end - start, is_ram: true });
            continue;
        }
        ranges.push(Range { start: 0, len: layout::MP_TABLE, is_ram: true });
        let reserved = layout::HIGH_RAM - layout::MP_TABLE;
        ranges.push(Range { start: layout::MP_TABLE, len: reserved, is_ram: false });
        if end > layout::HIGH_RAM {
            let len = end - layout::HIGH_RAM;
            ranges.push(Range { start: layout::HIGH_RAM, len, is_ram: true });
        }
    }
    ranges
}

/// Puts the initrd in its place.
fn place_initrd(mem: &GuestRam, kernel: &Entry, initrd: &Initrd) -> Result<Placed, BootError> {
    let placed = initrd.place(kernel, mem.iter().map(GuestMemoryRegion::len).sum())?;
    copy_file(mem, placed.addr, &initrd.file, placed.len).map_err(|why| initrd.failed(why))?;
    Ok(placed)
}

fn write(mem: &GuestRam, at: u64, bytes: &[u8], what: &'static str) -> Result<(), BootError> {
    mem.write_slice(bytes, GuestAddress(at)).map_err(|_| BootError::Memory(what))
}

/// An address or length below 4 GiB, as everything is that `boot_params` names.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
