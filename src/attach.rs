//! From a device to its place in the machine: address, interrupt, doorbells, bus slots.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::todo)]
use std::sync::Arc;

use arch::{VirtioMmio, again, layout};
use devices::GuestRam;
use devices::bus::{Bus, BusDevice};
use devices::io::IoThread;
use devices::metrics::CounterSet;
use devices::observer::{Happening, Observer};
use devices::sync::Mutex;
use devices::virtio::mmio::{
    MmioTransport, QUEUE_NOTIFY, Saved, WINDOW_SIZE, Window, WindowDevice,
};
use devices::virtio::notifier::{self, Interrupt, Notifier};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::error::Refusal;
use crate::events::Watch;
use crate::metrics::{Interrupts, One, Source};
use crate::parts::{Part, eventfd};
use crate::sandbox;

/// A device in its place.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) model: &'static str,
    pub(crate) id: String,
    /// Which place it has.
    pub(crate) index: usize,
    pub(crate) place: VirtioMmio,
    pub(crate) transport: Arc<Mutex<MmioTransport>>,
    pub(crate) counters: Arc<notifier::Counters>,
    /// What the device itself counts.
    own_counters: Arc<dyn CounterSet>,
    pub(crate) watch: Option<Arc<Watch>>,
}

impl Attached {
    /// Tells what the user did to it.
    pub(crate) fn notice(&self, what: Happening) {
        if let Some(watch) = &self.watch {
            watch.notice(what);
        }
    }

    /// What counts in it.
    pub(crate) fn sources(&self) -> impl Iterator<Item = Source> {
        let sets: [Arc<dyn CounterSet>; 2] = [self.counters.clone(), self.own_counters.clone()];
        let key = self.own_counters.group().name;
        let one = One::Device { model: self.model, id: self.id.clone() };
        sets.into_iter().map(move |set| Source { key, one: Some(one.clone()), set })
    }
}

/// An irqfd: a write raises an edge in the guest, with no exit and no lock.
struct Irq(EventFd, Arc<Interrupts>);

impl Interrupt for Irq {
    fn used_buffer(&self, _queue: u16) {
        self.raise();
    }

    fn config_change(&self) {
        self.raise();
    }
}

impl Irq {
    fn raise(&self) {
        self.1.triggers().inc();
        if let Err(e) = self.0.write(1) {
            log::warn!("cannot raise an interrupt: {e}");
        }
    }
}

/// What a device is attached to.
pub(crate) struct Slots<'a> {
    pub(crate) vm: &'a VmFd,
    pub(crate) memory: &'a GuestRam,
    pub(crate) mmio: &'a mut Bus,
    pub(crate) io: &'a Arc<IoThread>,
    /// Name of the shared I/O thread, from which those of other I/O threads follow.
    pub(crate) io_name: &'static str,
    pub(crate) interrupts: &'a Arc<Interrupts>,
}

impl Slots<'_> {
    /// Gives the device with `index` its place: addresses and interrupt follow from the index, so a
    /// machine that is put together again looks the same. A device that was `saved` is paused.
    pub(crate) fn attach(
        &mut self,
        index: usize,
        part: Part,
        saved: Option<&Saved>,
    ) -> Result<Attached, Refusal> {
        let Part { model, id, device, counters, watch } = part;
        let full = Refusal::TooManyDevices(layout::VIRTIO_IRQS.len());
        let place = places().nth(index).ok_or(full)?;
        let line = register_irq(self.vm, place.irq)?;
        let failed = |source| Refusal::Device { section: model, id: id.clone(), source };
        let io = match device.may_block() {
            true => {
                let name = format!("{}{index}", self.io_name);
                let io = IoThread::spawn_with(&name, Vec::new(), sandbox::enter_io);
                Arc::new(io.map_err(|e| failed(e.into()))?)
            }
            false => self.io.clone(),
        };
        let own_counters = device.counters();
        let irq = Arc::new(Irq(line, self.interrupts.clone()));
        let mut notifier = Notifier::new(irq, counters.clone());
        if let Some(watch) = &watch {
            notifier = notifier.observed_by(watch.clone());
        }
        let transport =
            MmioTransport::new(device, self.memory.clone(), notifier, io, saved).map_err(failed)?;
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            for window in [place.acpi_window, place.cmdline_window] {
                let addr = IoEventAddress::Mmio(window.saturating_add(QUEUE_NOTIFY));
                again(|| self.vm.register_ioevent(kick, &addr, queue))
                    .map_err(Refusal::kvm("KVM_IOEVENTFD"))?;
            }
        }
        let transport = Arc::new(Mutex::new(transport));
        for (base, window) in
            [(place.acpi_window, Window::Acpi), (place.cmdline_window, Window::CommandLine)]
        {
            let device = WindowDevice::new(transport.clone(), window);
            insert(self.mmio, base, WINDOW_SIZE, Arc::new(device));
        }
        Ok(Attached { model, id, index, place, transport, counters, own_counters, watch })
    }
}

/// Where devices go, in their order.
pub(crate) fn places() -> impl Iterator<Item = VirtioMmio> {
    (0_u64..).zip(layout::VIRTIO_IRQS).map(|(index, irq)| {
        let offset = index.saturating_mul(WINDOW_SIZE);
        VirtioMmio {
            acpi_window: layout::VIRTIO_ACPI.saturating_add(offset),
            cmdline_window: layout::VIRTIO_CMDLINE.saturating_add(offset),
            irq,
        }
    })
}

/// Makes an eventfd whose writes raise `irq`.
pub(crate) fn register_irq(vm: &VmFd, irq: u32) -> Result<EventFd, Refusal> {
    let line = eventfd()?;
    again(|| vm.register_irqfd(&line, irq)).map_err(Refusal::kvm("KVM_IRQFD"))?;
    Ok(line)
}

/// Puts a device where the layout says. The layout's ranges do not overlap.
#[expect(clippy::expect_used, reason = "of constants, and before the guest runs")]
pub(crate) fn insert(bus: &mut Bus, base: u64, len: u64, device: Arc<dyn BusDevice>) {
    bus.insert(base, len, device).expect("the ranges of the memory layout do not overlap");
}
