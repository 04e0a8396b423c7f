//! The virtio-mmio transport (virtio 1.2, 4.2), modern interface only.
//!
//! The driver configures queues through registers; DRIVER_OK makes an immutable value of them and
//! gives it to the device, and from then on the registers change nothing.
//!
//! ```text
//!            DRIVER_OK               pause
//!   Idle ───────────────► Running ◄────────► Parked
//!    ▲ │ activation fails    │       resume     │
//!    │ ▼                     ▼                  │
//!    │ Broken ◄──── host or ring failure        │
//!    └───────────── reset (status = 0) ─────────┘
//! ```
//!
//! A device answers at two addresses ([`Window`]): one that ACPI describes and one on the kernel
//! command line. The first at which a driver acknowledges the device gets it; the other reads as a
//! placeholder (device ID 0, 4.2.3.1.1), which drivers skip. So a guest may look in both places
//! and finds each device once.
mod reg;
mod registers;
mod removed;
mod saved;
mod stand_in;
mod window;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use self::registers::Registers;
use self::removed::Placeholder;
use self::saved::Files;
pub use self::saved::Saved;
pub use self::stand_in::StandIn;
pub use self::window::{Window, WindowDevice};
use super::model::{Change, DeviceError, Left, VirtioDevice};
use super::notifier::{Notifier, status};
use super::queue::{RingFeatures, VirtQueue};
use crate::GuestRam;
use crate::io::{IoError, IoThread, PATIENCE, Retired, Ticket};
use crate::metrics::CounterSet;
use crate::observer::Happening;
use crate::sys::again::eventfd;

/// Bytes of address space per window: registers, then the configuration space.
pub const WINDOW_SIZE: u64 = 0x1000;
/// Offset of the register that a driver kicks with (an ioeventfd in the VMM).
pub const QUEUE_NOTIFY: u64 = 0x50;

/// How long a reset waits for the host's side that did not answer another one a moment ago.
const PATIENCE_AGAIN: Duration = Duration::from_millis(5);
/// How long ago that may have been.
const UNANSWERED_FOR: Duration = Duration::from_secs(2);

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// The modern interface.
const VERSION: u32 = 2;
/// "husk", little-endian.
const VENDOR: u32 = 0x6b73_7568;

const F_RING_INDIRECT_DESC: u64 = 1 << 28;
const F_RING_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
/// Features that every device offers: what its queues can do.
pub(super) const TRANSPORT_FEATURES: u64 = F_RING_INDIRECT_DESC | F_RING_EVENT_IDX | F_VERSION_1;

/// Where the queues are now. Exactly one place, by construction.
#[derive(Debug)]
enum Stage {
    /// Not made yet: the driver is still configuring them.
    Idle,
    /// The worker has them, on the I/O thread.
    Running(Ticket),
    /// Held here, stopped.
    Parked(Retired),
    /// Gone with a failure; a reset makes new ones.
    Broken,
}

/// The transport of one device: what the vCPUs see at its windows.
#[derive(Debug)]
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    stage: Stage,
    registers: Registers,
    kicks: Vec<Arc<EventFd>>,
    mem: GuestRam,
    notifier: Arc<Notifier>,
    io: Arc<IoThread>,
    /// When the host's side did not answer a reset, if it has not since.
    unanswered: Option<Instant>,
}

impl MmioTransport {
    /// Connects `device` to its driver, memory and I/O thread. Boot and restore are one path;
    /// `saved` is the only difference. A restored device is paused, and has not told its driver yet
    /// what that may have missed: [`Self::tell_again`].
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestRam,
        notifier: Notifier,
        io: Arc<IoThread>,
        saved: Option<&Saved>,
    ) -> Result<Self, DeviceError> {
        let kicks = device
            .queue_sizes()
            .iter()
            .map(|_| eventfd().map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(DeviceError::host("cannot make an eventfd for a queue"))?;
        let mut transport = Self {
            stage: Stage::Idle,
            unanswered: None,
            registers: Registers::default(),
            kicks,
            mem,
            notifier: Arc::new(notifier),
            io,
            device,
        };
        transport.registers = transport.fresh_registers();
        if let Some(saved) = saved {
            transport.restore(saved)?;
        }
        Ok(transport)
    }

    /// Doorbells in queue order, for the VMM to register as ioeventfds.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// What is counted of the device: what is of every one, and what is of this
    /// ([`VirtioDevice::counters`]).
    pub fn counters(&self) -> [Arc<dyn CounterSet>; 2] {
        [self.notifier.counters().clone(), self.device.counters()]
    }

    /// The device, when the VM around it is taken apart. Its worker is stopped first.
    pub fn into_device(mut self) -> Result<Box<dyn VirtioDevice>, DeviceError> {
        self.pause()?;
        self.stage = Stage::Idle;
        self.device.reset();
        Ok(self.device)
    }

    /// Takes the device out of a machine that goes on: its driver, which is told that it needs a reset,
    /// finds a placeholder. What was in progress is finished first.
    pub fn remove(&mut self) -> Result<Box<dyn VirtioDevice>, DeviceError> {
        self.pause()?;
        self.stage = Stage::Idle;
        self.notifier.needs_reset();
        let device = std::mem::replace(&mut self.device, Box::new(Placeholder));
        self.registers = Registers { owner: self.registers.owner, ..self.fresh_registers() };
        Ok(device)
    }

    /// What stands for the device while another machine is put together that is to have it. `None` if it
    /// brings memory along, which has its place in this machine, or if that machine can have one of its
    /// own.
    pub fn stand_in(&mut self) -> Option<StandIn> {
        let is_needed = self.device.own_memory().is_none() && !self.device.can_open_twice();
        is_needed.then(|| StandIn::of(&*self.device))
    }

    /// Takes the device from the transport in another machine, where a stand-in for it is left. Both are
    /// paused. What it had begun there does not go on.
    pub fn take_over(&mut self, from: &mut Self) {
        std::mem::swap(&mut self.device, &mut from.device);
        self.device.reset();
    }

    /// What `GET` shows of the device: [`VirtioDevice::show`].
    pub fn show(&self, view: Option<&str>) -> Result<Value, DeviceError> {
        self.device.show(view)
    }

    /// Takes the worker off its thread. Requests in progress are finished first; a worker whose host
    /// side does not answer ([`IoError::Busy`]) goes on, and can be asked again.
    pub fn pause(&mut self) -> Result<(), DeviceError> {
        self.pause_within(PATIENCE)
    }

    fn pause_within(&mut self, patience: Duration) -> Result<(), DeviceError> {
        if let Stage::Running(ticket) = self.stage {
            self.stage = match self.io.take_within(ticket, patience) {
                Ok(worker) => {
                    let _lease = self.mem.lease();
                    Stage::Parked(worker.retire())
                }
                Err(IoError::Busy) => return Err(IoError::Busy.into()),
                Err(e) => {
                    self.stage = Stage::Broken;
                    return Err(e.into());
                }
            };
        }
        Ok(())
    }

    /// Puts the worker of a paused device back to work. What was queued meanwhile is served.
    pub fn resume(&mut self) -> Result<(), DeviceError> {
        if let Stage::Parked(retired) = &mut self.stage {
            let Retired { queues, state } = std::mem::take(retired);
            self.stage = Stage::Broken;
            self.run(queues, Some(&state)).inspect_err(|_| self.notifier.needs_reset())?;
        }
        Ok(())
    }

    /// Applies a run-time change and tells the driver if it can see it. A change that is refused
    /// leaves the device as it was.
    pub fn update(&mut self, view: Option<&str>, patch: &Value) -> Result<(), DeviceError> {
        let was_running = matches!(self.stage, Stage::Running(_));
        self.pause()?;
        let changed = self.device.update(view, patch);
        if was_running {
            self.resume()?;
        }
        if changed? == Change::Config {
            self.notifier.config_change();
        }
        Ok(())
    }

    /// Everything a restored device needs. The device must be paused.
    pub fn save(&mut self) -> Saved {
        let (positions, device) = match &self.stage {
            Stage::Parked(retired) => {
                let positions = retired.queues.iter().map(|q| q.state());
                (positions.map(|q| (q.next_avail, q.next_used)).collect(), retired.state.clone())
            }
            Stage::Idle | Stage::Broken | Stage::Running(_) => (Vec::new(), Value::Null),
        };
        Saved {
            registers: self.registers.clone(),
            status: self.notifier.status(),
            isr: self.notifier.isr(),
            generation: self.notifier.generation(),
            positions,
            device,
            memory: self.device.own_memory().map(|own| own.save()).unwrap_or_default(),
            files: Files::None,
        }
    }

    /// Adds to what was saved what the device has written on the host: [`VirtioDevice::freeze_files`].
    /// The device must be paused.
    pub fn save_files(&mut self, saved: &mut Saved) -> Result<(), DeviceError> {
        saved.files = self.device.freeze_files()?.map_or(Files::None, Files::Here);
        Ok(())
    }

    /// Goes back to what was saved, in the machine that it is in. The device must be paused, and stays
    /// so. If the host refuses half-way, it is neither here nor there: [`Self::check`] finds all else
    /// before.
    pub fn rewind(&mut self, saved: &Saved) -> Result<Left, DeviceError> {
        // Requests that were in progress then are served again; those of later have not been made.
        self.stage = Stage::Idle;
        let left = self.device.rewind()?;
        self.notifier.reset();
        self.restore(saved)?;
        self.tell_again();
        Ok(if saved.files().is_some() { Left::Nothing } else { left })
    }

    /// Raises the interrupt of a restored device again if its driver has not acknowledged it: when it
    /// was saved, it may have been on its way to interrupt controllers that did not have it yet. Those
    /// must have their state by now, which takes the place of all that they are told before.
    pub fn tell_again(&self) {
        self.notifier.tell_again();
    }

    /// Tells the driver that the configuration space is another.
    pub fn tell_config_change(&self) {
        self.notifier.config_change();
    }

    /// Refuses what was not saved of such a device.
    pub fn check(&self, saved: &Saved) -> Result<(), DeviceError> {
        if saved.registers.queues.len() != self.kicks.len() {
            return Err(DeviceError::Saved("it has another number of queues"));
        }
        if saved.status & status::FEATURES_OK != 0 && !self.accepts(saved.registers.driver_features)
        {
            return Err(DeviceError::Saved("its driver uses features that are not offered here"));
        }
        if saved.has_live_queues() && saved.positions.len() != self.kicks.len() {
            return Err(DeviceError::Saved("it was not paused when it was saved"));
        }
        Ok(())
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), DeviceError> {
        self.check(saved)?;
        if let Some(own) = self.device.own_memory() {
            own.restore(&saved.memory)?;
        }
        match &saved.files {
            Files::None => {}
            Files::Elsewhere => return Err(DeviceError::Saved("what it had written is missing")),
            Files::Here(files) => self.device.adopt_files(files)?,
        }
        self.registers = saved.registers.clone();
        self.notifier.restore(saved.status, saved.isr, saved.generation);
        if saved.has_live_queues() {
            let mut queues = self.live_queues()?;
            for (queue, &(next_avail, next_used)) in queues.iter_mut().zip(&saved.positions) {
                queue.seek(next_avail, next_used);
            }
            self.stage = Stage::Parked(Retired { queues, state: saved.device.clone() });
        } else if saved.status & status::DRIVER_OK != 0 {
            // Its queues may be what it needs a reset for.
            self.stage = Stage::Broken;
        }
        Ok(())
    }

    /// Makes live queues of the registers and starts the device on them.
    fn activate(&mut self) -> Result<(), DeviceError> {
        self.stage = Stage::Broken;
        let queues = self.live_queues()?;
        self.run(queues, None)?;
        self.notifier.counters().activate_count().inc();
        self.notifier.notice(Happening::Activated);
        Ok(())
    }

    fn run(&mut self, queues: Vec<VirtQueue>, saved: Option<&Value>) -> Result<(), DeviceError> {
        let _lease = self.mem.lease();
        let worker = self.device.activate(queues, self.registers.driver_features, saved)?;
        let leases = self.mem.leases().cloned();
        self.stage = Stage::Running(self.io.add(worker, leases)?);
        // What was kicked while nobody listened, or before a save, is looked at once.
        for kick in &self.kicks {
            kick.write(1).map_err(DeviceError::host("cannot kick a queue"))?;
        }
        Ok(())
    }

    fn live_queues(&self) -> Result<Vec<VirtQueue>, DeviceError> {
        let features = RingFeatures {
            is_indirect: self.registers.driver_features & F_RING_INDIRECT_DESC != 0,
            is_event_idx: self.registers.driver_features & F_RING_EVENT_IDX != 0,
        };
        let sizes = self.device.queue_sizes().iter().zip(&self.registers.queues);
        (0..)
            .zip(sizes.zip(&self.kicks))
            .map(|(index, ((&max_size, config), kick))| {
                let (kick, mem) = (kick.clone(), self.mem.clone());
                let notifier = self.notifier.clone();
                Ok(VirtQueue::new(index, max_size, config, features, kick, mem, notifier)?)
            })
            .collect()
    }

    /// Dropping what the worker left is what stops the device: when the status reads 0, nobody
    /// writes to guest memory any more. While its host side does not answer it does not read 0.
    fn reset(&mut self) {
        // Every vCPU may ask for it, and they wait one after the other, which whoever stops them has to wait for.
        let is_again = self.unanswered.is_some_and(|at| at.elapsed() < UNANSWERED_FOR);
        let patience = if is_again { PATIENCE_AGAIN } else { PATIENCE };
        let stopped = self.pause_within(patience);
        self.unanswered = match (&stopped, &self.stage) {
            (Err(_), Stage::Running(_)) => {
                self.unanswered.filter(|_| is_again).or_else(|| Some(Instant::now()))
            }
            _ => None,
        };
        if let Err(e) = stopped {
            log::error!("virtio device {}: cannot stop: {e}", self.device.device_id());
            if matches!(self.stage, Stage::Running(_)) {
                self.notifier.needs_reset();
                return;
            }
        }
        // A driver that finds a device resets it first: nothing has happened to it.
        let was_up = !matches!(std::mem::replace(&mut self.stage, Stage::Idle), Stage::Idle);
        self.device.reset();
        self.registers = self.fresh_registers();
        self.notifier.reset();
        self.notifier.counters().reset_count().inc();
        if was_up {
            self.notifier.notice(Happening::Reset);
        }
    }

    fn features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn fresh_registers(&self) -> Registers {
        Registers::new(self.device.queue_sizes())
    }

    fn read_register(&self, offset: u64) -> u32 {
        let selected = self.registers.selected_queue();
        match offset {
            reg::MAGIC_VALUE => MAGIC,
            reg::VERSION => VERSION,
            reg::DEVICE_ID => self.device.device_id(),
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => page(self.features(), self.registers.device_page),
            reg::QUEUE_NUM_MAX => self.selected_max_size().into(),
            reg::QUEUE_READY => selected.is_some_and(|q| q.is_ready).into(),
            reg::INTERRUPT_STATUS => self.notifier.isr(),
            reg::STATUS => self.notifier.status(),
            reg::CONFIG_GENERATION => self.notifier.generation(),
            // No shared memory region exists: its length reads as -1 (4.2.2.1).
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.registers.device_page = value,
            reg::DRIVER_FEATURES_SEL => self.registers.driver_page = value,
            reg::DRIVER_FEATURES => self.write_driver_features(value),
            reg::QUEUE_SEL => self.registers.selected = value,
            QUEUE_NOTIFY => self.kick(value),
            reg::INTERRUPT_ACK => self.notifier.acknowledge(value),
            reg::STATUS => self.write_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    /// A kick that missed the ioeventfd: one at a width or value that it does not match.
    fn kick(&self, queue: u32) {
        let kick = usize::try_from(queue).ok().and_then(|q| self.kicks.get(q));
        if let (Some(kick), Stage::Running(_)) = (kick, &self.stage) {
            // A full counter means it is readable already.
            let _ = kick.write(1);
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        let status = self.notifier.status();
        if status & status::DRIVER != 0 && status & status::FEATURES_OK == 0 {
            self.registers.write_features(value);
        }
    }

    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let status = self.notifier.status();
        if status & status::DRIVER_OK != 0 || status & status::FEATURES_OK == 0 {
            return;
        }
        let max_size = self.selected_max_size();
        self.registers.write_queue(offset, value, max_size);
    }

    fn selected_max_size(&self) -> u16 {
        self.registers
            .selected()
            .and_then(|at| self.device.queue_sizes().get(at))
            .copied()
            .unwrap_or(0)
    }

    /// Virtio 1.2, 2.1.1 and 3.1.1: bits are added in order and taken back only by a reset.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let was = self.notifier.status();
        let settled = was & !status::NEEDS_RESET;
        if value & settled != settled {
            return;
        }
        let added = value & !was;
        let mut now = was;
        self.notifier.set_status_bits(added & status::FAILED);
        for (bit, needs) in [
            (status::ACKNOWLEDGE, 0),
            (status::DRIVER, status::ACKNOWLEDGE),
            (status::FEATURES_OK, status::DRIVER),
            (status::DRIVER_OK, status::FEATURES_OK),
        ] {
            let is_refused = bit == status::FEATURES_OK && !self.are_features_acceptable();
            if added & bit != 0 && now & needs == needs && !is_refused {
                now |= bit;
                self.notifier.set_status_bits(bit);
            }
        }
        if now & !was & status::DRIVER_OK != 0
            && let Err(e) = self.activate()
        {
            // The guest cannot be told why; the operator can.
            log::error!("virtio device {}: cannot activate: {e}", self.device.device_id());
            self.notifier.counters().activate_fails().inc();
            self.notifier.needs_reset();
        }
    }

    fn are_features_acceptable(&self) -> bool {
        self.accepts(self.registers.driver_features)
    }

    fn accepts(&self, features: u64) -> bool {
        features & !self.features() == 0 && features & F_VERSION_1 != 0
    }

    fn read(&mut self, window: Window, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if self.registers.owner.is_some_and(|owner| owner != window) {
            // A placeholder: magic and version, no device.
            if data.len() == 4 && (offset == reg::MAGIC_VALUE || offset == reg::VERSION) {
                copy(&self.read_register(offset).to_le_bytes(), 0, data);
            }
        } else if offset >= reg::CONFIG {
            let space = &*self.device.config_space();
            let end = offset.wrapping_sub(reg::CONFIG).saturating_add(data.len() as u64);
            if end > space.len() as u64 {
                self.notifier.counters().cfg_fails().inc();
            }
            copy(space, offset.wrapping_sub(reg::CONFIG), data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            // Registers are accessed as aligned 32-bit words only (4.2.2.2).
            copy(&self.read_register(offset).to_le_bytes(), 0, data);
        }
    }

    fn write(&mut self, window: Window, offset: u64, data: &[u8]) {
        if self.registers.owner.is_some_and(|owner| owner != window) {
            return;
        }
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            return self.device.write_config(offset, data);
        }
        let (Ok(bytes), true) = (data.try_into(), offset.is_multiple_of(4)) else { return };
        let value = u32::from_le_bytes(bytes);
        if offset == reg::STATUS && value & status::ACKNOWLEDGE != 0 {
            self.registers.owner = Some(window);
        }
        self.write_register(offset, value);
    }
}

/// 32 bits of `features`: page 0 the low half, page 1 the high one, nothing beyond.
fn page(features: u64, page: u32) -> u32 {
    let half = match page {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(half).unwrap_or(0)
}

/// Bytes of `space` from `offset`; what lies past its end stays as it is.
fn copy(space: &[u8], offset: u64, data: &mut [u8]) {
    let tail = usize::try_from(offset).ok().and_then(|o| space.get(o..)).unwrap_or_default();
    data.iter_mut().zip(tail).for_each(|(to, from)| *to = *from);
}
