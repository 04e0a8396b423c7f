//! Guest memory. Here RAM: mapped, and registered with KVM; what devices bring along is in `own`.
#![expect(unsafe_code, reason = "gives KVM addresses of ours to map into the guest")]

mod dump;
mod freeze;
mod image;
mod own;
mod pagemap;
mod prefault;
mod rewind;
mod served;
mod track;

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use arch::{GuestRam, again, layout};
use devices::memory::{Backing, Behind, GuestRegion};
use devices::sys::map::Pages;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use rustix::fs::MemfdFlags;
use rustix::io::retry_on_intr;
use rustix::mm::{Advice, madvise};
use vm_memory::mmap::{GuestRegionMmap, MmapRegion, MmapRegionError};
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

pub(crate) use self::dump::{Changes, Dump, Dumped, Patch, Plan, Zeroes};
use self::own::KvmSlots;
pub(crate) use self::own::{Host, place, spare_slot};
pub(crate) use self::rewind::{RewindTools, forget_page_tables};
pub(crate) use self::served::ServeError;
use self::served::Served;
pub(crate) use self::track::{Since, Tracker};
use crate::config::{HugePages, MachineConfig};
use crate::error::Refusal;
use crate::outcome::Outcome;
use crate::snapshot::{Compression, MemoryImage};

/// Guest RAM, mapped, and what devices have brought along.
#[derive(Debug)]
pub(crate) struct Ram {
    /// What takes pages of it. First, so that it ends before the memory goes.
    prefault: Option<prefault::Prefault>,
    pub(crate) guest: GuestRam,
    /// What is behind each region of RAM now. Whoever maps something else there says so.
    pub(crate) backings: Vec<Arc<Backing>>,
    /// All that an image holds: RAM, then in the order of addresses the memory that is plugged while the
    /// guest runs. Not files.
    pub(crate) all: devices::GuestRam,
    /// Where the memory of devices begins: model, id and address.
    pub(crate) places: Vec<(&'static str, String, u64)>,
    /// What is behind pages that nobody has written since, if it is not zeros.
    image: Option<MemoryImage>,
    /// The file in memory that is RAM, until it is frozen.
    live: Option<Arc<File>>,
    /// Whether nobody can have written since it was frozen.
    is_untouched: AtomicBool,
    /// There if another process serves it.
    served: Option<Served>,
    /// KVM's slots of devices' memory.
    slots: Vec<Arc<KvmSlots>>,
    /// Gone with the machine.
    vm: Weak<VmFd>,
    /// What has changed since the last snapshot.
    pub(crate) tracker: Arc<Tracker>,
}

impl Ram {
    /// Bytes, which are as many in an image of it.
    pub(crate) fn len(&self) -> u64 {
        self.all.iter().map(GuestMemoryRegion::len).sum()
    }

    /// What a copy has in place of what is there: the snapshot's id, and nothing where the payload is,
    /// which is for this VM alone.
    pub(crate) fn patch(&self, id: [u8; 16]) -> Patch {
        let at = self.offset_of(layout::SNAPSHOT_ID);
        let blank = self.offset_of(layout::PAYLOAD);
        Patch { at, bytes: id, blank: blank..blank + layout::PAYLOAD_LEN }
    }

    /// Where a guest address is in an image, which is memory without the holes. The address is one of
    /// the layout's, and in RAM of any size.
    pub(crate) fn offset_of(&self, addr: u64) -> u64 {
        debug_assert!(addr < layout::RAM_MIN);
        addr
    }

    /// The memory besides RAM: address and bytes of each region.
    pub(crate) fn plugged(&self) -> Vec<(u64, u64)> {
        let plugged = self.all.iter().skip(self.guest.num_regions());
        plugged.map(|region| (region.start_addr().0, region.len())).collect()
    }

    /// Where the memory of a device begins.
    pub(crate) fn place_of(&self, model: &str, id: &str) -> Option<u64> {
        let place = self.places.iter().find(|place| (place.0, place.1.as_str()) == (model, id));
        place.map(|(_, _, addr)| *addr)
    }

    /// The image that it is, exactly: it was frozen, and nobody has run since.
    pub(crate) fn frozen(&self) -> Option<MemoryImage> {
        let is_all = self.guest.num_regions() == self.all.num_regions();
        self.image.clone().filter(|_| is_all && self.is_untouched.load(Ordering::Relaxed))
    }

    /// The guest, or a device, may write to it from now on.
    pub(crate) fn touch(&self) {
        self.is_untouched.store(false, Ordering::Relaxed);
    }

    /// Has it served by whoever listens at `socket`, which is told of pages that are given back if
    /// something does. Nobody has touched it yet.
    pub(crate) fn serve(
        &mut self,
        machine: &MachineConfig,
        socket: &Path,
        gives_back: bool,
    ) -> Result<(), ServeError> {
        let page_size = match machine.huge_pages {
            HugePages::Hugetlb2M => 2 << 20,
            HugePages::None | HugePages::Transparent => 4096,
        };
        self.served = Some(Served::begin(&self.guest, page_size, socket, gives_back)?);
        Ok(())
    }

    /// Ends the run if the process that serves it ends, if there is one.
    pub(crate) fn watch(&mut self, outcome: &Arc<Outcome>) -> std::io::Result<()> {
        self.served.as_mut().map_or(Ok(()), |served| served.watch(outcome))
    }

    /// The guest runs from now on. False if it must not, because its memory is gone.
    pub(crate) fn run(&self) -> bool {
        self.served.as_ref().is_none_or(Served::run)
    }

    /// Whether another process serves it.
    pub(crate) fn is_served(&self) -> bool {
        self.served.is_some()
    }

    /// Whether the process that serves it is gone.
    pub(crate) fn is_lost(&self) -> bool {
        self.served.as_ref().is_some_and(Served::is_lost)
    }

    /// Has all of it brought in, if another process serves it.
    pub(crate) fn bring_in(&self) -> std::io::Result<()> {
        self.served.as_ref().map_or(Ok(()), |served| served.bring_in(&self.guest))
    }

    /// Begins to copy what `plan` wants of it to `target`, as it is now.
    pub(crate) fn dump(
        &self,
        plan: &Plan,
        patch: Patch,
        target: &File,
        compression: Compression,
    ) -> std::io::Result<Dump> {
        // The copier would see what is written from now on.
        if self.backings.iter().any(|backing| backing.behind() == Behind::Shared) {
            return Err(std::io::Error::other("others map guest memory, too"));
        }
        // The process that copies would find zeros where nobody has been yet.
        self.bring_in()?;
        let mut dump =
            dump::begin(&self.pieces(), dump::Order { plan, patch, target, compression })?;
        // A guest that wrote a huge page of which the copier had not been would take another one from the host's pool;
        // where there is none, the kernel takes the page from the copier, which dies of it (hugetlb_wp()).
        if self.all.iter().any(|region| region.backing().pages() == Pages::Huge2M) {
            dump.wait()?;
        }
        Ok(dump)
    }

    /// Gives memory besides RAM the contents that the image has. It has been plugged, and nobody uses it
    /// yet.
    pub(crate) fn fill(&self) -> std::io::Result<()> {
        let Some(image) = &self.image else { return Ok(()) };
        let mut start = self.guest.iter().map(GuestMemoryRegion::len).sum::<u64>();
        for region in self.all.iter().skip(self.guest.num_regions()) {
            image::fill(image, start, region)?;
            start += region.len();
        }
        Ok(())
    }

    fn pieces(&self) -> Vec<dump::Piece> {
        let mut start = 0;
        let piece = |region: &GuestRegion| {
            let (backing, len, at) = (region.backing(), region.len(), start);
            start += len;
            let base = match (backing.behind(), &self.image) {
                (Behind::Image, Some(image)) => Some(image.extents.clone()),
                _ => None,
            };
            let vacated = backing.vacated().unwrap_or_default();
            dump::Piece { host: region.host(), len, start: at, base, vacated }
        };
        self.all.iter().map(piece).collect()
    }
}

/// Where a region of RAM is in this process.
fn host_addr(region: &GuestRegionMmap<()>) -> std::io::Result<u64> {
    let addr = region.get_host_address(MemoryRegionAddress(0));
    addr.map(|addr| addr as u64).map_err(std::io::Error::other)
}

/// What may map guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// This process only.
    Private,
    /// Whoever is given its file: a back end of a device in another process.
    Shared,
}

/// Maps the RAM that `machine` asks for: zero, or what `image` holds, not yet backed by anything.
pub(crate) fn map(
    machine: &MachineConfig,
    sharing: Sharing,
    image: Option<&MemoryImage>,
) -> Result<Ram, Refusal> {
    let size = machine.mem_size_bytes();
    let what = || cannot_map(machine);
    check(machine)?;
    let live = match (sharing, image) {
        (Sharing::Private, None) if machine.forkable => {
            Some(Arc::new(file(machine, size).map_err(Refusal::host(what()))?))
        }
        _ => None,
    };
    // Else its file is mapped.
    let is_copied = match image {
        Some(image) => {
            !image::can_be_mapped(&image.file, machine.huge_pages).map_err(Refusal::host(what()))?
        }
        None => false,
    };
    let mapped = image.filter(|_| !is_copied);
    let mut flags = match (sharing, mapped) {
        (Sharing::Private, None) if live.is_some() => libc::MAP_SHARED,
        (Sharing::Private, None) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        (Sharing::Private, Some(_)) => libc::MAP_PRIVATE,
        (Sharing::Shared, _) => libc::MAP_SHARED,
    };
    // Reserved in the one case: a pool that runs dry later would be a SIGBUS in the guest.
    flags |= match machine.huge_pages {
        HugePages::Hugetlb2M => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        HugePages::None | HugePages::Transparent => libc::MAP_NORESERVE,
    };
    let (mut regions, mut backings) = (Vec::new(), Vec::new());
    let mut offset = 0;
    for (start, len) in layout::ram_ranges(size) {
        let file = match (sharing, mapped) {
            (Sharing::Private, None) => {
                live.as_ref().map(|file| FileOffset::from_arc(file.clone(), offset))
            }
            (Sharing::Private, Some(image)) => {
                Some(FileOffset::from_arc(image.file.clone(), offset))
            }
            (Sharing::Shared, _) => {
                let file = file(machine, len).map_err(Refusal::host(what()))?;
                Some(FileOffset::new(file, 0))
            }
        };
        offset += len;
        let len = usize::try_from(len).map_err(|_| too_big(what()))?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let map = || match MmapRegion::build(file.clone(), len, access, flags) {
            Err(MmapRegionError::Mmap(e)) => Err(e),
            mapped => mapped.map_err(std::io::Error::other),
        };
        let region = devices::sys::again::again(map).map_err(Refusal::host(what()))?;
        let image_at = offset - len as u64;
        if let (Sharing::Private, Some(image)) = (sharing, mapped) {
            image::lay_over(image, image_at, &region).map_err(Refusal::host(what()))?;
        }
        advise_as_ram(&region, machine.huge_pages)
            .map_err(Refusal::host("cannot advise the host on guest memory"))?;
        if let (Sharing::Private, Some(image), true) = (sharing, image, is_copied) {
            image::copy_into(image, image_at, &region)
                .map_err(Refusal::host("cannot copy guest memory from its file"))?;
        }
        let backing = Backing::of(&region);
        backings.push(Arc::new(match machine.track_dirty_pages {
            true => backing.recording(),
            false => backing,
        }));
        regions.push(GuestRegionMmap::new(region, start).ok_or_else(|| too_big(what()))?);
    }
    let failed = |e| Refusal::Host { what: what(), source: std::io::Error::other(e) };
    let guest = GuestRam::from_regions(regions).map_err(failed)?;
    let all = devices::GuestRam::backed(&guest, backings.iter().cloned()).map_err(failed)?;
    Ok(Ram {
        prefault: None,
        served: None,
        live,
        is_untouched: AtomicBool::new(false),
        guest,
        backings,
        all,
        places: Vec::new(),
        image: image.cloned(),
        slots: Vec::new(),
        vm: Weak::new(),
        tracker: Arc::default(),
    })
}

/// A file in memory of `len` bytes, for RAM that others map too.
fn file(machine: &MachineConfig, len: u64) -> std::io::Result<File> {
    let pages = match machine.huge_pages {
        HugePages::Hugetlb2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        HugePages::None | HugePages::Transparent => MemfdFlags::empty(),
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | pages;
    let fd = retry_on_intr(|| rustix::fs::memfd_create("husk-guest-ram", flags))?;
    retry_on_intr(|| rustix::fs::ftruncate(&fd, len))?;
    Ok(File::from(fd))
}

/// Refuses more RAM than the host has.
pub(crate) fn check(machine: &MachineConfig) -> Result<(), Refusal> {
    check_host_has(machine.mem_size_bytes()).map_err(Refusal::host(cannot_map(machine)))
}

fn cannot_map(machine: &MachineConfig) -> String {
    let size = machine.mem_size_mib;
    match machine.huge_pages {
        HugePages::Hugetlb2M => format!(
            "cannot map {size} MiB of guest memory, which take {} free pages of \
             /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
            size / 2
        ),
        HugePages::None | HugePages::Transparent => {
            format!("cannot map {size} MiB of guest memory")
        }
    }
}

/// A guest larger than the host is a mistake, or soon an out-of-memory kill.
pub(crate) fn check_host_has(size: u64) -> std::io::Result<()> {
    let info = rustix::system::sysinfo();
    let total = info.totalram.saturating_mul(info.mem_unit.into());
    if size <= total {
        return Ok(());
    }
    let why = format!("the host has {} MiB (ENOMEM)", total >> 20);
    Err(std::io::Error::new(std::io::ErrorKind::OutOfMemory, why))
}

fn too_big(what: String) -> Refusal {
    Refusal::Host { what, source: std::io::ErrorKind::OutOfMemory.into() }
}

/// Asks for what RAM needs of the host besides being mapped.
fn advise_as_ram(region: &MmapRegion, pages: HugePages) -> std::io::Result<()> {
    if pages == HugePages::Transparent {
        advise(region, Advice::LinuxHugepage)?;
    }
    // A core dump of husk is for husk's developers: the guest's memory is its owner's.
    advise(region, Advice::LinuxDontDump)
}

fn advise(region: &MmapRegion, advice: Advice) -> std::io::Result<()> {
    // SAFETY: the range is the mapping just made, and neither advice changes its contents.
    unsafe { retry_on_intr(|| madvise(region.as_ptr().cast(), region.size(), advice)) }
        .map_err(Into::into)
}

/// Shows `ram` to the guest. Before the irqchip exists: afterwards KVM waits for a grace period of
/// several milliseconds at each slot. KVM remembers the pages that the guest writes if `machine` says
/// so.
pub(crate) fn register(vm: &VmFd, ram: &GuestRam, machine: &MachineConfig) -> Result<(), Refusal> {
    let flags = if machine.track_dirty_pages { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
    for (slot, region) in (0..).zip(ram.iter()) {
        let host = host_addr(region).map_err(Refusal::host("guest memory has no address"))?;
        let slot = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host,
        };
        // SAFETY: the range is a mapping of ours, and it outlives the VM: the machine that owns both
        // drops the VM and its vCPUs first.
        again(|| unsafe { vm.set_user_memory_region(slot) })
            .map_err(Refusal::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}
