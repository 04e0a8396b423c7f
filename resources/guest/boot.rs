//! What the loader tells: PVH's hvm_start_info or Linux's boot_params, as one [`BootInfo`].

use core::fmt;

use crate::memory::read_at;

const START_INFO_MAGIC: u32 = 0x336e_c578;
const MAX_RANGES: usize = 128;
const MAX_CMDLINE: u64 = 65536;

static mut BOOT_INFO: Option<BootInfo> = None;

/// How the guest was entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// 32-bit protected mode, hvm_start_info in EBX.
    Pvh,
    /// 64-bit long mode, boot_params in RSI.
    Linux64,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Pvh => "PVH",
            Self::Linux64 => "Linux 64-bit",
        })
    }
}

/// One range of the memory map; `kind` as in e820: 1 RAM, 2 reserved, 3 ACPI data, 4 ACPI NVS.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    pub start: u64,
    pub size: u64,
    pub kind: u32,
}

impl Range {
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }

    pub fn is_ram(&self) -> bool {
        self.kind == 1
    }
}

/// The boot information, whichever protocol brought it.
#[derive(Debug)]
pub struct BootInfo {
    pub protocol: Protocol,
    /// Where hvm_start_info or boot_params lies.
    pub address: u64,
    pub cmdline: &'static str,
    /// Address of the ACPI RSDP, 0 if the loader gave none.
    pub rsdp: u64,
    /// Address and size of the initial RAM disk.
    pub initrd: Option<(u64, u64)>,
    ranges: [Range; MAX_RANGES],
    range_count: usize,
}

impl BootInfo {
    /// The memory map in the loader's order.
    pub fn memory(&self) -> &[Range] {
        &self.ranges[..self.range_count]
    }

    /// Bytes of RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.memory().iter().filter(|r| r.is_ram()).map(|r| r.size).sum()
    }

    fn new(protocol: Protocol, address: u64) -> Self {
        let ranges = [Range { start: 0, size: 0, kind: 0 }; MAX_RANGES];
        Self { protocol, address, cmdline: "", rsdp: 0, initrd: None, ranges, range_count: 0 }
    }

    fn push(&mut self, range: Range) {
        if self.range_count < MAX_RANGES {
            self.ranges[self.range_count] = range;
            self.range_count += 1;
        }
    }
}

/// # Safety
/// `address` is that of a hvm_start_info (`protocol` 0) or a boot_params (1), which the loader filled in.
pub(crate) unsafe fn read(address: u64, protocol: u32) -> &'static BootInfo {
    // SAFETY: the caller's promise; nothing refers to the static before this one write.
    unsafe {
        let info = if protocol == 0 { read_start_info(address) } else { read_boot_params(address) };
        let cell = &raw mut BOOT_INFO;
        (*cell).insert(info)
    }
}

/// The boot information once it has been read: for what may run before that, such as a fault's report.
pub(crate) fn current() -> Option<&'static BootInfo> {
    let cell = &raw const BOOT_INFO;
    // SAFETY: written once, by `read`, on this only thread.
    unsafe { (*cell).as_ref() }
}

/// Xen's `arch-x86/hvm/start_info.h`.
///
/// # Safety
/// See [`read`].
unsafe fn read_start_info(at: u64) -> BootInfo {
    let mut info = BootInfo::new(Protocol::Pvh, at);
    // SAFETY: all addresses are the loader's.
    unsafe {
        if read_at::<u32>(at) != START_INFO_MAGIC {
            return info;
        }
        let (version, modules) = (read_at::<u32>(at + 4), read_at::<u32>(at + 12));
        info.cmdline = read_cmdline(read_at(at + 24));
        info.rsdp = read_at(at + 32);
        if modules > 0 {
            let module: u64 = read_at(at + 16);
            info.initrd = Some((read_at(module), read_at(module + 8)));
        }
        if version >= 1 {
            let (map, entries) = (read_at::<u64>(at + 40), read_at::<u32>(at + 48));
            for entry in (0..u64::from(entries)).map(|i| map + i * 24) {
                let (start, size) = (read_at(entry), read_at(entry + 8));
                info.push(Range { start, size, kind: read_at(entry + 16) });
            }
        }
    }
    info
}

/// Linux's `Documentation/arch/x86/boot.rst` and `zero-page.rst`.
///
/// # Safety
/// See [`read`].
unsafe fn read_boot_params(at: u64) -> BootInfo {
    let mut info = BootInfo::new(Protocol::Linux64, at);
    // SAFETY: all addresses are the loader's.
    unsafe {
        let wide = |low: u64, high: u64| {
            u64::from(read_at::<u32>(at + low)) | u64::from(read_at::<u32>(at + high)) << 32
        };
        info.cmdline = read_cmdline(wide(0x228, 0xc8));
        info.rsdp = read_at(at + 0x70);
        let initrd = (wide(0x218, 0xc0), wide(0x21c, 0xc4));
        info.initrd = Some(initrd).filter(|&(_, size)| size > 0);
        for entry in (0..u64::from(read_at::<u8>(at + 0x1e8))).map(|i| at + 0x2d0 + i * 20) {
            let (start, size) = (read_at(entry), read_at(entry + 8));
            info.push(Range { start, size, kind: read_at(entry + 16) });
        }
    }
    info
}

/// # Safety
/// `address` is 0 or that of a NUL-terminated string that stays.
unsafe fn read_cmdline(address: u64) -> &'static str {
    if address == 0 {
        return "";
    }
    // SAFETY: the caller's promise. No `CStr::from_ptr`: it wants C's strlen.
    let bytes = unsafe {
        let len = (0..MAX_CMDLINE).find(|&i| read_at::<u8>(address + i) == 0);
        core::slice::from_raw_parts(address as *const u8, len.unwrap_or(MAX_CMDLINE) as usize)
    };
    core::str::from_utf8(bytes).unwrap_or("")
}
