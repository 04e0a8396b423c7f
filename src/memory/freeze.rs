//! Freezes RAM that is a file in memory: the file becomes an image that nobody writes any more, and RAM
//! a private mapping of it, at the same addresses.
//!
//! ```text
//!   before:  guest ──shared──► file            after:  guest ──private──► file ◄──private── children
//! ```
//!
//! Nothing is copied: pages that the guest writes from then on are its own. KVM's slots stay as they
//! are; its page tables follow the mapping (MMU notifiers).
#![expect(unsafe_code, reason = "maps over guest memory")]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::memory::Behind;
use rustix::fs::{SealFlags, SeekFrom};
use rustix::io::{Errno, retry_on_intr};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use vm_memory::mmap::GuestRegionMmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Ram, advise_as_ram, host_addr};
use crate::config::HugePages;
use crate::snapshot::{Extent, Kind, MemoryImage};

impl Ram {
    /// Freezes RAM if it is a file in memory that has not been frozen. The VM stands still: nobody
    /// reads or writes guest memory. If this fails, RAM is as it was.
    pub(crate) fn freeze(&mut self, pages: HugePages) -> io::Result<()> {
        // Something else has been mapped there since: an image that the VM was taken back to.
        if self.backings.iter().any(|backing| backing.behind() != Behind::Shared) {
            self.live = None;
        }
        let Some(file) = &self.live else { return Ok(()) };
        let extents = extents(file)?.into();
        let regions: Vec<_> = self.guest.iter().collect();
        for (count, region) in regions.iter().enumerate() {
            let advise = |region: &&GuestRegionMmap<()>| advise_as_ram(&region.get_mmap(), pages);
            if let Err(e) = remap(region, MapFlags::PRIVATE).and_then(|()| advise(region)) {
                // Nobody has written since, so nothing is lost on the way back. This one may be on it, too.
                for region in &regions[..=count] {
                    remap(region, MapFlags::SHARED)
                        .expect("there is room for a mapping where one has just been");
                    if let Err(e) = advise(region) {
                        log::warn!("cannot advise the host on guest memory: {e}");
                    }
                }
                return Err(e);
            }
        }
        // So that nobody who is given the file can change it.
        let seals = SealFlags::FUTURE_WRITE | SealFlags::GROW | SealFlags::SHRINK;
        if let Err(e) = rustix::fs::fcntl_add_seals(file, seals) {
            log::debug!("frozen memory cannot be sealed: {e}");
        }
        for backing in &self.backings {
            backing.set_behind(Behind::Image);
        }
        self.is_untouched.store(true, Ordering::Relaxed);
        self.image = self.live.take().map(|file| MemoryImage { file, extents, over: [].into() });
        Ok(())
    }
}

/// Maps the file of a region in the place of what is mapped there.
fn remap(region: &GuestRegionMmap<()>, kind: MapFlags) -> io::Result<()> {
    let offset = region.file_offset().ok_or(Errno::INVAL)?;
    let len = usize::try_from(region.len()).map_err(io::Error::other)?;
    let addr = host_addr(region)? as *mut std::ffi::c_void;
    let flags = kind | MapFlags::FIXED | MapFlags::NORESERVE;
    let (file, start) = (offset.file().as_fd(), offset.start());
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the range is all of a mapping of guest memory, of which nobody holds a reference, and
    // the VM stands still. What is there afterwards is mapped with the same rights.
    unsafe { retry_on_intr(|| mmap(addr, len, access, flags, file, start)) }?;
    Ok(())
}

/// Where in a file in memory there is something.
fn extents(file: &Arc<File>) -> io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut at = 0;
    loop {
        at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(at) => at,
            // There is nothing more.
            Err(Errno::NXIO) => return Ok(extents),
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(at))?;
        while at < end {
            let len = u32::try_from(end - at).unwrap_or(u32::MAX).min(Extent::LEN_MAX);
            let (kind, stored) = (Kind::Plain, len);
            // Nobody else writes it, and it is gone with this host: it needs no sums.
            extents.push(Extent { start: at, len, kind, at, stored, sum: 0 });
            at += u64::from(len);
        }
    }
}
