//! An image of a kernel, put into RAM as at a boot.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

use arch::{GuestRam, Kernel, Platform, VirtioMmio};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::guest::{guarded, is_zero};

/// Bytes of RAM.
const RAM: u64 = 4 << 20;

/// RAM that is all zero, the same for all inputs.
fn ram() -> &'static GuestRam {
    static RAM_ONCE: OnceLock<GuestRam> = OnceLock::new();
    let ram = RAM_ONCE.get_or_init(|| {
        let region = GuestRegionMmap::new(guarded(RAM), GuestAddress(0)).expect("it is small");
        GuestRam::from_regions(vec![region]).expect("it is one")
    });
    for region in ram.iter() {
        let host = region.get_host_address(vm_memory::MemoryRegionAddress(0)).expect("it is RAM");
        let len = usize::try_from(region.len()).expect("it is small");
        // SAFETY: the region is anonymous memory of which nobody has a reference.
        unsafe { assert_eq!(libc::madvise(host.cast(), len, libc::MADV_DONTNEED), 0) };
    }
    ram
}

/// Boots `image` as far as that goes without a vCPU.
pub fn boot(image: &[u8], cmdline: &str) {
    static FILE: OnceLock<File> = OnceLock::new();
    let file = FILE.get_or_init(|| {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        File::from(rustix::fs::memfd_create("kernel", flags).expect("there is memory"))
    });
    file.set_len(0).and_then(|()| file.write_all_at(image, 0)).expect("there is memory");
    let file = file.try_clone().expect("there are descriptors");
    let Ok(kernel) = Kernel::read(Path::new("kernel"), file) else { return };
    let fits = kernel.check(RAM).is_ok();
    let mem = ram();
    let loaded = kernel.load(mem);
    assert_eq!(loaded.is_ok(), fits, "one says that it has room, the other that it has not");
    let Ok(entry) = loaded else { return };
    assert!(entry.addr < entry.end && entry.end <= RAM, "{entry:x?}");
    // What husk is to put beside it is not there yet.
    for (start, end) in arch::fuzzing::RESERVED {
        let host = mem.get_host_address(GuestAddress(start)).expect("it is RAM");
        let len = usize::try_from(end - start).expect("it is small");
        // SAFETY: RAM is in one piece, and larger.
        let is_free = unsafe { is_zero(host, len) };
        assert!(is_free, "the kernel lies over boot structures");
    }
    let place = VirtioMmio { acpi_window: 0xd000_0000, cmdline_window: 0xd000_1000, irq: 5 };
    let platform = Platform { cmdline, initrd: None, apic_ids: &[0, 1], devices: &[place] };
    let is_taken = kernel.check_cmdline(cmdline).is_ok();
    assert_eq!(platform.write(mem, &entry).is_ok(), is_taken, "{cmdline:?}");
}
