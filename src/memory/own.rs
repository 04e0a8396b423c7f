//! Memory that devices bring along: its place in the guest's address space, and KVM's slots for it.
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arch::{HostCpu, again, extension, layout};
use devices::GuestRam;
use devices::memory::{Leases, Piece, Placement, Slots};
use devices::sys::map::ALIGNMENT;
use devices::virtio::model::DeviceError;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::Ram;
use crate::error::Refusal;
use crate::parts::Part;
use crate::snapshot::{MachineState, SnapshotError};

/// What of the host decides where memory may lie.
#[derive(Clone, Copy)]
pub(crate) struct Host<'a> {
    pub(crate) kvm: &'a Kvm,
    pub(crate) cpu: &'a HostCpu,
}

/// Gives the memory that `devices` bring along its place above `ram`, in their order: the same
/// devices lie at the same addresses again after a reset, and where they were `saved`. All memory, as
/// devices see it.
pub(crate) fn place(
    vm: &Arc<VmFd>,
    host: Host<'_>,
    ram: &mut Ram,
    devices: &mut [Part],
    saved: Option<&MachineState>,
) -> Result<GuestRam, Refusal> {
    let limit = 1_u64 << host.cpu.address_bits();
    let end = ram.guest.last_addr().0 + 1;
    if end > limit {
        let why = format!("RAM would end at {end:#x}, the processor's addresses at {limit:#x}");
        return Err(Refusal::Field { section: "machine-config", field: "mem_size_mib", why });
    }
    let no_room = |e| Refusal::Host { what: "guest memory".into(), source: io::Error::other(e) };
    let mut all = ram.all.clone();
    let is_recorded = ram.backings.iter().any(|backing| backing.written().is_some());
    let leases = Arc::<Leases>::default();
    let (mut floor, mut slot) = (end, ram.guest.num_regions() as u64);
    for Part { model, id, device, .. } in devices {
        let Some(own) = device.own_memory() else { continue };
        let refused = |source| Refusal::Device { section: model, id: id.clone(), source };
        let too_big = |what, limit| {
            let mib = own.size() >> 20;
            let source = io::Error::from(io::ErrorKind::OutOfMemory);
            refused(DeviceError::Host { what: format!("{mib} MiB {what} {limit:#x}"), source })
        };
        if let Some(state) = saved.and_then(|saved| saved.device(model, id).ok()) {
            own.check(state.state.memory()).map_err(refused)?;
        }
        let lowest = layout::device_memory(floor).unwrap_or(u64::MAX);
        let before = saved.and_then(|saved| saved.memory_at(model, id));
        let addr = before.unwrap_or(lowest);
        if addr < lowest || !addr.is_multiple_of(ALIGNMENT) {
            let why = format!("the memory of {model} {id} cannot be at {addr:#x}");
            return Err(SnapshotError::Inconsistent(why).into());
        }
        floor = addr.checked_add(own.size()).filter(|&end| end <= limit).ok_or_else(|| {
            too_big("do not fit below the end of the processor's addresses at", limit)
        })?;
        ram.places.push((*model, id.clone(), addr));
        let first = slot;
        slot = slot.saturating_add(own.slots());
        let spare = spare_slot(host.kvm);
        let slots_max =
            spare.map_err(Refusal::kvm("KVM_CHECK_EXTENSION of KVM_CAP_NR_MEMSLOTS"))?;
        let slots_max = u64::from(slots_max);
        if slot > slots_max {
            return Err(too_big("need more memory slots than KVM has, which are", slots_max));
        }
        let first = u32::try_from(first).expect("KVM has fewer than 2^32 slots");
        let slots = Arc::new(KvmSlots::new(vm, first, is_recorded));
        ram.slots.push(slots.clone());
        let (addr, leased) = (GuestAddress(addr), leases.clone());
        let placement = Placement { addr, slots, leases: leased, is_recorded };
        let region = own.place(placement).map_err(refused)?;
        all = all.with(region, leases.clone()).map_err(no_room)?;
    }
    ram.all = all.clone();
    ram.vm = Arc::downgrade(vm);
    Ok(all)
}

/// The slot that nobody has for long: the last.
pub(crate) fn spare_slot(kvm: &Kvm) -> Result<u32, kvm_ioctls::Error> {
    let count = extension(|| kvm.check_extension_int(Cap::NrMemslots))?;
    // KVM has so many where it does not say.
    Ok(if count == 0 { 32 } else { count } - 1)
}

/// A device's range of KVM's memory slots.
#[derive(Debug)]
pub(super) struct KvmSlots {
    /// A device that survives its VM must not keep it.
    vm: Weak<VmFd>,
    first: u32,
    /// Whether KVM remembers the pages that the guest writes.
    is_recorded: bool,
    /// What the guest sees and may write.
    shown: Mutex<BTreeMap<u32, Piece>>,
}

impl KvmSlots {
    fn new(vm: &Arc<VmFd>, first: u32, is_recorded: bool) -> Self {
        Self { vm: Arc::downgrade(vm), first, is_recorded, shown: Mutex::default() }
    }

    /// What the guest sees and may write, with the numbers of the slots.
    pub(super) fn shown(&self) -> Vec<(u32, Piece)> {
        self.lock().iter().map(|(slot, piece)| (self.first + slot, piece.clone())).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Piece>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, piece: &Piece, len: u64) -> io::Result<()> {
        // Gone, and its slots with it.
        let Some(vm) = self.vm.upgrade() else { return Ok(()) };
        let slot = kvm_userspace_memory_region {
            slot: self.first + piece.slot,
            flags: match (piece.is_read_only, self.is_recorded) {
                (true, _) => KVM_MEM_READONLY,
                (false, true) => KVM_MEM_LOG_DIRTY_PAGES,
                (false, false) => 0,
            },
            guest_phys_addr: piece.addr.0,
            memory_size: len,
            userspace_addr: piece.host,
        };
        // SAFETY: the range is a mapping of a device's, which hides it before it unmaps it; the VM's
        // own memory map keeps what is left of it until the machine is gone.
        again(|| unsafe { vm.set_user_memory_region(slot) })
            .map_err(|e| io::Error::other(format!("KVM_SET_USER_MEMORY_REGION: {e}")))
    }
}

impl Slots for KvmSlots {
    fn show(&self, piece: &Piece) -> io::Result<()> {
        self.set(piece, piece.len)?;
        if !piece.is_read_only {
            self.lock().insert(piece.slot, piece.clone());
        }
        Ok(())
    }

    fn hide(&self, piece: &Piece) -> io::Result<()> {
        self.lock().remove(&piece.slot);
        self.set(piece, 0)
    }
}
