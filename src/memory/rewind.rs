//! Puts RAM back to what an image holds, in place: KVM and devices go on with the same addresses.
//!
//! Of RAM that is a private mapping of the image only the pages go that were written since: the kernel
//! then shows those of the file again. Other RAM becomes such a mapping first.
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use arch::{again, layout};
use devices::memory::{Backing, Behind, GuestRegion};
use devices::sys::map::Pages;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};
use rustix::io::retry_on_intr;
use rustix::mm::{Advice, madvise};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::pagemap::{PAGE, PageMap, Run};
use super::{Ram, Sharing, host_addr, image};
use crate::snapshot::MemoryImage;

/// Ranges in one call: UIO_MAXIOV.
const RANGES_MAX: usize = 1024;

/// What it takes of the host. Had before anything is changed: a host that has no descriptor left refuses it then.
#[derive(Debug)]
pub(crate) struct RewindTools {
    pages: PageMap,
    /// This process. None where it cannot be had: then each range takes a call of its own.
    this: Option<OwnedFd>,
}

impl RewindTools {
    /// Opens them.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self { pages: PageMap::open()?, this: pidfd_open(getpid(), PidfdFlags::empty()).ok() })
    }
}

impl Ram {
    /// Why it cannot be put back to an image.
    pub(crate) fn cannot_rewind(&self, sharing: Sharing) -> Option<&'static str> {
        let is_huge = |backing: &Arc<Backing>| backing.pages() != Pages::Normal;
        match sharing {
            Sharing::Shared => Some("memory: another process has it too"),
            Sharing::Private if self.is_served() => Some("memory: another process serves it"),
            Sharing::Private if self.backings.iter().any(is_huge) => {
                Some("memory: it is in huge pages, which cannot be put back one by one")
            }
            Sharing::Private => None,
        }
    }

    /// Puts it back to what `image` holds, which is as large. The bytes that had been written. If this
    /// fails, it is neither what it was nor what it should be.
    pub(crate) fn rewind(&mut self, image: &MemoryImage, tools: &RewindTools) -> io::Result<u64> {
        let is_behind = match &self.image {
            Some(behind) => is_same(behind, image)?,
            None => false,
        };
        let RewindTools { pages, this } = tools;
        let (mut bytes, mut start) = (0, 0);
        for (region, backing) in self.all.iter().zip(&self.backings) {
            let (host, len) = (region.host(), region.len());
            let written = pages.written(host..host + len)?;
            bytes += written.iter().map(|run| run.range.end - run.range.start).sum::<u64>();
            if is_behind && backing.behind() == Behind::Image {
                uncover(image, start, region)?;
                discard(this.as_ref(), &written)?;
                image::copy_again(image, start, region)?;
            } else {
                image::map_again(image, start, region, 0..len)?;
            }
            backing.set_behind(Behind::Image);
            start += len;
        }
        self.image = Some(image.clone());
        // Whatever was frozen is not what is there now.
        self.live = None;
        self.touch();
        Ok(bytes)
    }
}

/// Whether two are the same image, and not only made of the same file.
fn is_same(one: &MemoryImage, other: &MemoryImage) -> io::Result<bool> {
    let identity = |file: &File| rustix::fs::fstat(file).map(|stat| (stat.st_dev, stat.st_ino));
    let has_same_file = identity(&one.file)? == identity(&other.file)?;
    let are_bare = one.over.is_empty() && other.over.is_empty();
    Ok(has_same_file && (are_bare || Arc::ptr_eq(&one.over, &other.over)))
}

/// Maps the image again where zeroes have been mapped over it.
fn uncover(image: &MemoryImage, start: u64, region: &GuestRegion) -> io::Result<()> {
    let Some(words) = region.backing().vacated() else { return Ok(()) };
    let is_vacated = |page: &u64| {
        let word = usize::try_from(page / 64).ok().and_then(|n| words.get(n));
        word.is_some_and(|word| word & 1 << (page % 64) != 0)
    };
    let pages = region.len() / PAGE;
    let mut next = 0;
    while let Some(first) = (next..pages).find(is_vacated) {
        next = (first..pages).find(|page| !is_vacated(page)).unwrap_or(pages);
        image::map_again(image, start, region, first * PAGE..next * PAGE)?;
    }
    Ok(())
}

/// Gives up pages of guest memory: what is behind them shows again.
fn discard(this: Option<&OwnedFd>, runs: &[Run]) -> io::Result<()> {
    for runs in runs.chunks(RANGES_MAX) {
        // One call for many of them takes a seventh of the time, but has been allowed for a process's
        // own sake since Linux 6.13 only.
        if this.is_none_or(|this| discard_at_once(this, runs).is_err()) {
            runs.iter().try_for_each(|run| discard_one(&run.range))?;
        }
    }
    Ok(())
}

fn discard_at_once(this: &OwnedFd, runs: &[Run]) -> io::Result<()> {
    let len = |range: &Range<u64>| usize::try_from(range.end - range.start).unwrap_or(0);
    let ranges: Vec<_> = runs
        .iter()
        .map(|run| libc::iovec {
            iov_base: run.range.start as *mut libc::c_void,
            iov_len: len(&run.range),
        })
        .collect();
    // SAFETY: the ranges are pages of guest memory, of which nobody holds a reference.
    let done = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            this.as_raw_fd(),
            ranges.as_ptr(),
            ranges.len(),
            libc::MADV_DONTNEED,
            0,
        )
    };
    let wanted: usize = ranges.iter().map(|range| range.iov_len).sum();
    match usize::try_from(done) {
        Ok(done) if done == wanted => Ok(()),
        Ok(_) => Err(io::ErrorKind::Interrupted.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn discard_one(range: &Range<u64>) -> io::Result<()> {
    let len = usize::try_from(range.end - range.start).unwrap_or(0);
    // SAFETY: as above.
    unsafe { retry_on_intr(|| madvise(range.start as *mut _, len, Advice::LinuxDontNeed)) }?;
    Ok(())
}

/// Makes KVM forget what it has made of the guest's page tables. Without two-dimensional paging it
/// shadows them, and learns of their changes from the guest's writes, which going back is not.
pub(crate) fn forget_page_tables(kvm: &Kvm, vm: &VmFd, ram: &Ram) -> io::Result<()> {
    if has_two_dimensional_paging() {
        return Ok(());
    }
    let region = ram.guest.iter().next().ok_or(io::ErrorKind::NotFound)?;
    // Taking away any slot does it; this one is there for that only.
    let spare = super::spare_slot(kvm);
    let spare = spare.map_err(|e| io::Error::other(format!("KVM_CHECK_EXTENSION: {e}")))?;
    let slot = |len| kvm_userspace_memory_region {
        slot: spare,
        guest_phys_addr: layout::SPARE_PAGE,
        memory_size: len,
        userspace_addr: host_addr(region).unwrap_or(0),
        ..Default::default()
    };
    for len in [PAGE, 0] {
        // SAFETY: the page is the first of RAM, which outlives the VM; no vCPU runs while it can be
        // seen at a second place.
        again(|| unsafe { vm.set_user_memory_region(slot(len)) })
            .map_err(|e| io::Error::other(format!("KVM_SET_USER_MEMORY_REGION: {e}")))?;
    }
    Ok(())
}

fn has_two_dimensional_paging() -> bool {
    let says_yes = |path| std::fs::read(path).is_ok_and(|text| text.first() == Some(&b'Y'));
    ["/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"]
        .into_iter()
        .any(says_yes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use devices::sys::discard::discard as give_back;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::MachineConfig;
    use crate::snapshot::Segment;

    const PAGES: u64 = 256;
    const PAGE_LEN: usize = 4096;

    /// A file in memory of which every page is full of `byte`.
    fn full_of(byte: u8) -> Arc<File> {
        let fd = rustix::fs::memfd_create("rewind", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        let bytes = vec![byte; usize::try_from(PAGES * PAGE).unwrap()];
        file.write_all_at(&bytes, 0).unwrap();
        Arc::new(file)
    }

    /// An image of 1s, over which lie long and short segments of 2s and of zeroes.
    fn image() -> MemoryImage {
        let later = full_of(2);
        let segment = |first: u64, count: u64, from: Option<&Arc<File>>| Segment {
            start: first * PAGE,
            len: count * PAGE,
            from: from.cloned(),
        };
        let over = [
            segment(32, 32, Some(&later)),
            segment(96, 32, None),
            segment(160, 2, Some(&later)),
            segment(192, 2, None),
        ];
        MemoryImage { file: full_of(1), extents: Arc::default(), over: over.into() }
    }

    /// The pages of guest memory: the byte that each is full of.
    fn content(ram: &Ram) -> Vec<u8> {
        let page = |n: u64| {
            let mut bytes = [0; PAGE_LEN];
            ram.all.read_slice(&mut bytes, GuestAddress(n * PAGE)).unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {n} is mixed");
            bytes[0]
        };
        (0..PAGES).map(page).collect()
    }

    /// A page that was given back and written again is neither left zero nor what lies under a segment.
    #[test]
    fn what_a_balloon_took_comes_back_of_every_segment() {
        let image = image();
        let machine = MachineConfig { mem_size_mib: (PAGES * PAGE) >> 20, ..Default::default() };
        let mut ram = super::super::map(&machine, Sharing::Private, Some(&image)).unwrap();
        let saved = content(&ram);
        assert_eq!([0, 32, 63, 96, 160, 162, 193].map(|n| saved[n]), [1, 2, 2, 0, 2, 1, 0]);
        for round in 0..2 {
            for first in [8, 40, 104, 160, 192] {
                let addr = GuestAddress(first * PAGE);
                assert_eq!(give_back(&ram.all, addr, 2 * PAGE).unwrap(), 2 * PAGE);
                // The other one stays as it was given back.
                ram.all.write_slice(&[7; PAGE_LEN], addr).unwrap();
            }
            // Once more, when what was mapped over has been written at most.
            for again in 0..2 {
                ram.rewind(&image, &RewindTools::open().unwrap()).unwrap();
                assert_eq!(content(&ram), saved, "round {round}, rewind {again}");
            }
        }
    }
}
