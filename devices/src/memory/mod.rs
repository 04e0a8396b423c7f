//! Guest memory, as devices look it up: RAM, memory that is plugged while the guest runs, and files.
//!
//! Two ways in. The ordinary one ([`GuestMemoryBackend`], and with it everything that reads, writes
//! or holds a ring) reaches RAM and plugged memory. [`GuestRam::for_syscalls`] reaches files too:
//! what it gives must only be handed to system calls, because the host may cut a file short at any
//! time, and then a system call fails where an ordinary access is a SIGBUS.
//!
//! What can go away while the VM runs is only used under a lease ([`Leases`]).
mod backing;
mod lease;
mod own;
mod pages;

use std::sync::Arc;

use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::guest_memory::Error;
use vm_memory::mmap::{FromRangesError, MmapRegion};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestRegionCollectionError, GuestRegionMmap, GuestUsize,
    MemoryRegionAddress, VolatileMemory,
};

pub use self::backing::{Backing, Behind};
pub use self::lease::{Lease, Leases};
pub use self::own::{FileMemory, OwnMemory, Piece, Placement, PluggedMemory, Slots};
pub use self::pages::{PAGE, PageSet, PageSlice};
use crate::sys::map::recorded;
use crate::{GuestBitmap, GuestSlice};

/// All of a guest's memory. Clones are the same memory.
#[derive(Clone, Debug)]
pub struct GuestRam {
    direct: GuestRegionCollection<GuestRegion>,
    /// What only system calls may reach.
    files: Vec<Arc<GuestRegion>>,
    /// There if anything can go away.
    leases: Option<Arc<Leases>>,
}

/// A piece of guest memory without gaps.
#[derive(Debug)]
pub struct GuestRegion {
    start: GuestAddress,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    Ram(Arc<MmapRegion<()>>, Arc<Backing>),
    Plugged(Arc<PluggedMemory>),
    File(Arc<FileMemory>),
}

impl GuestRam {
    /// RAM, which never changes its place, and what is behind it now.
    pub fn new(ram: &GuestMemoryMmap<()>) -> Result<Self, GuestRegionCollectionError> {
        let backings = ram.iter().map(|region| Arc::new(Backing::of(&region.get_mmap())));
        Self::backed(ram, backings)
    }

    /// RAM, and what is behind each region of it.
    pub fn backed(
        ram: &GuestMemoryMmap<()>,
        backings: impl IntoIterator<Item = Arc<Backing>>,
    ) -> Result<Self, GuestRegionCollectionError> {
        let region = |(region, backing): (&GuestRegionMmap<()>, _)| GuestRegion {
            start: region.start_addr(),
            memory: Memory::Ram(region.get_mmap(), backing),
        };
        let regions = ram.iter().zip(backings).map(region).collect();
        let direct = GuestRegionCollection::from_regions(regions)?;
        Ok(Self { direct, files: Vec::new(), leases: None })
    }

    /// New RAM at each start address, of each length.
    pub fn from_ranges(ranges: &[(GuestAddress, usize)]) -> Result<Self, FromRangesError> {
        Ok(Self::new(&GuestMemoryMmap::from_ranges(ranges)?)?)
    }

    /// The same, and `region` besides, used under `leases`.
    pub fn with(
        &self,
        region: GuestRegion,
        leases: Arc<Leases>,
    ) -> Result<Self, GuestRegionCollectionError> {
        let (mut direct, mut files) = (self.direct.clone(), self.files.clone());
        match region.memory {
            Memory::File(_) => files.push(Arc::new(region)),
            Memory::Ram(..) | Memory::Plugged(_) => {
                direct = direct.insert_region(Arc::new(region))?
            }
        }
        Ok(Self { direct, files, leases: Some(leases) })
    }

    /// A lease of memory that can go away, for as long as something is looked up and used. `None`
    /// if nothing can.
    pub fn lease(&self) -> Option<Lease<'_>> {
        self.leases.as_deref().map(Leases::take)
    }

    /// The leases, for a thread that works on this memory.
    pub fn leases(&self) -> Option<&Arc<Leases>> {
        self.leases.as_ref()
    }

    /// Calls `f` with each piece of host memory behind `count` bytes at `addr`, in order, for use
    /// by system calls only. `None`, wherever it shows, if they are not all guest memory.
    pub fn for_syscalls<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        mut f: impl FnMut(GuestSlice<'a>),
    ) -> Option<()> {
        // Nobody's file is in the middle of RAM: it is all in one.
        let at = |region: &GuestRegion| Some((region.to_region_addr(addr)?, region.len()));
        for region in &self.files {
            if let Some((offset, len)) = at(region) {
                let fits = offset.0.checked_add(count as u64)? <= len;
                f(fits.then(|| region.slice(offset.0, count))??);
                return Some(());
            }
        }
        self.get_slices(addr, count).try_for_each(|slice| slice.ok().map(&mut f))
    }
}

impl GuestMemoryBackend for GuestRam {
    type R = GuestRegion;

    fn num_regions(&self) -> usize {
        self.direct.num_regions()
    }

    fn find_region(&self, addr: GuestAddress) -> Option<&GuestRegion> {
        self.direct.find_region(addr)
    }

    fn iter(&self) -> impl Iterator<Item = &GuestRegion> {
        self.direct.iter()
    }
}

impl GuestRegion {
    /// Memory that is plugged and unplugged, at `start`.
    pub fn plugged(start: GuestAddress, memory: Arc<PluggedMemory>) -> Self {
        Self { start, memory: Memory::Plugged(memory) }
    }

    /// A file's memory, at `start`.
    pub fn file(start: GuestAddress, memory: Arc<FileMemory>) -> Self {
        Self { start, memory: Memory::File(memory) }
    }

    /// What is behind it.
    pub fn backing(&self) -> &Backing {
        match &self.memory {
            Memory::Ram(_, backing) => backing,
            Memory::Plugged(plugged) => plugged.mapping().backing(),
            Memory::File(file) => file.mapping().backing(),
        }
    }

    /// The runs of bytes in it that are there: offset and length.
    pub fn present(&self) -> Vec<(u64, u64)> {
        match &self.memory {
            Memory::Ram(..) | Memory::File(_) => vec![(0, self.len())],
            Memory::Plugged(plugged) => {
                let block = plugged.block_size();
                let bytes = |(first, count): (u64, u64)| {
                    (first.saturating_mul(block), count.saturating_mul(block))
                };
                plugged.runs().into_iter().map(bytes).collect()
            }
        }
    }

    /// Where its first byte is in this process, whether it can be looked up or not.
    pub fn host(&self) -> u64 {
        match &self.memory {
            Memory::Ram(ram, _) => ram.as_ptr().addr() as u64,
            Memory::Plugged(plugged) => plugged.mapping().host_address(0),
            Memory::File(file) => file.mapping().host_address(0),
        }
    }

    fn slice(&self, offset: u64, count: usize) -> Option<GuestSlice<'_>> {
        match &self.memory {
            Memory::Ram(ram, backing) => {
                let offset = usize::try_from(offset).ok()?;
                Some(recorded(ram.get_slice(offset, count).ok()?, backing.written(), offset))
            }
            Memory::Plugged(plugged) => plugged.slice(offset, count),
            Memory::File(file) => file.slice(offset, count),
        }
    }
}

impl GuestMemoryRegion for GuestRegion {
    type B = GuestBitmap;

    fn len(&self) -> GuestUsize {
        match &self.memory {
            Memory::Ram(ram, _) => ram.size() as u64,
            Memory::Plugged(plugged) => plugged.mapping().len(),
            Memory::File(file) => file.mapping().len(),
        }
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    fn bitmap(&self) -> BS<'_, GuestBitmap> {
        self.backing().written().slice_at(0)
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8, Error> {
        let slice = self.slice(addr.0, 1).ok_or(Error::HostAddressNotAvailable)?;
        Ok(slice.ptr_guard_mut().as_ptr())
    }

    fn file_offset(&self) -> Option<&vm_memory::FileOffset> {
        match &self.memory {
            Memory::Ram(ram, _) => ram.file_offset(),
            Memory::Plugged(_) | Memory::File(_) => None,
        }
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<GuestSlice<'_>, Error> {
        self.slice(offset.0, count).ok_or(Error::InvalidBackendAddress)
    }
}

impl GuestMemoryRegionBytes for GuestRegion {}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use vm_memory::Bytes;

    use super::*;
    use crate::sys::map::{ALIGNMENT, Access, Mapping, Pages};

    const OWN: GuestAddress = GuestAddress(1 << 32);

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]).unwrap()
    }

    fn pieces(mem: &GuestRam, addr: u64, count: usize) -> Option<Vec<usize>> {
        let mut pieces = Vec::new();
        mem.for_syscalls(GuestAddress(addr), count, |slice| pieces.push(slice.len()))?;
        Some(pieces)
    }

    #[test]
    fn unplugged_blocks_cannot_be_looked_up() {
        const BLOCK: u64 = 0x1000;
        let mapping = Mapping::anonymous(ALIGNMENT, Pages::Normal, Access::ReadWrite).unwrap();
        let plugged = Arc::new(PluggedMemory::new(mapping, BLOCK));
        let leases = Arc::new(Leases::default());
        let region = GuestRegion::plugged(OWN, plugged.clone());
        let mem = ram().with(region, leases.clone()).unwrap();
        let block = |n: u64| GuestAddress(OWN.0 + n * BLOCK);
        assert!(mem.read_obj::<u8>(block(0)).is_err());
        plugged.plug(63..66);
        assert_eq!((plugged.count(0..512), plugged.count(64..65)), (3, 1));
        assert_eq!(plugged.runs(), [(63, 3)]);
        mem.write_slice(&[7; 3 * 0x1000], block(63)).unwrap();
        assert!(mem.write_slice(&[7; 3 * 0x1000], block(64)).is_err());
        assert!(mem.read_obj::<u8>(GuestAddress(block(63).0 - 1)).is_err());
        assert_eq!(pieces(&mem, block(64).0, 0x2000), Some(vec![0x2000]));
        assert!(plugged.withdraw(64..65, &leases));
        assert!(mem.read_obj::<u8>(block(64)).is_err() && mem.read_obj::<u8>(block(65)).is_ok());
        assert_eq!(pieces(&mem, block(64).0, 0x2000), None);
        assert_eq!(plugged.runs(), [(63, 1), (65, 1)]);
    }

    #[test]
    fn a_block_in_use_stays() {
        let mapping = Mapping::anonymous(ALIGNMENT, Pages::Normal, Access::ReadWrite).unwrap();
        let plugged = PluggedMemory::new(mapping, 0x1000);
        plugged.plug(0..4);
        let leases = Leases::default();
        std::thread::scope(|scope| {
            let (taken, is_taken) = std::sync::mpsc::channel();
            let (done, is_done) = std::sync::mpsc::channel::<()>();
            let leases = &leases;
            scope.spawn(move || {
                let _lease = leases.take();
                taken.send(()).unwrap();
                is_done.recv().unwrap();
            });
            is_taken.recv().unwrap();
            assert!(!plugged.withdraw(1..3, leases));
            assert_eq!(plugged.count(0..8), 4);
            done.send(()).unwrap();
        });
    }

    #[test]
    fn files_are_for_system_calls_only() {
        let fd = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, ALIGNMENT).unwrap();
        let mapping =
            Mapping::file(&File::from(fd), ALIGNMENT, ALIGNMENT, Access::ReadWrite).unwrap();
        let file = Arc::new(FileMemory::new(mapping));
        let leases = Arc::new(Leases::default());
        let mem = ram().with(GuestRegion::file(OWN, file.clone()), leases.clone()).unwrap();
        assert!(mem.read_obj::<u8>(OWN).is_err());
        assert!(!mem.check_range(OWN, 1));
        assert_eq!(pieces(&mem, OWN.0 + 4096, 8192), Some(vec![8192]));
        assert_eq!(pieces(&mem, OWN.0 + ALIGNMENT - 1, 2), None);
        assert_eq!(pieces(&mem, 0xfff, 2), Some(vec![1, 1]));
        assert_eq!(pieces(&mem, 0x1fff, 2), None);
        assert!(file.withdraw(&leases));
        assert_eq!(pieces(&mem, OWN.0, 1), None);
    }
}
