//! A virtual machine: what of it runs, stands still, is changed and shown.
mod assemble;
mod rewind;
mod save;
mod take_over;

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use devices::GuestRam;
use devices::legacy::acpi::Acpi;
use devices::legacy::i8042::I8042;
use devices::legacy::rtc::Rtc;
use devices::limiter::RateLimiter;
use devices::observer::Happening;
use devices::sync::{Mutex, MutexGuard};
use devices::sys::again::spawn;
use devices::virtio::model::DeviceError;
use kvm_ioctls::VmFd;
use serde_json::Value;

pub(crate) use self::assemble::command_line;
use crate::attach::Attached;
use crate::config::RATE_LIMIT_GROUPS;
use crate::error::{Refusal, chain};
use crate::identity::Identity;
use crate::memory::Ram;
use crate::metrics::Source;
use crate::outcome::Outcome;
use crate::parts::Parts;
use crate::request::Reply;
use crate::vcpu::Vcpus;

/// How long the last output may take to reach its reader when a machine ends.
const SERIAL_DEADLINE: Duration = Duration::from_millis(150);
/// How long a guest may take to look at the generation id when it is told to.
const LOOK_MAX: Duration = Duration::from_millis(500);
/// How long a machine may take to stop whose memory another process serves.
const SERVED_DEADLINE: Duration = Duration::from_secs(2);
/// How long it may take to end.
const SERVED_END: Duration = Duration::from_millis(200);

/// A machine. Dropping it stops it: vCPUs first, then KVM's VM, so that nothing needs to be hidden
/// from the guest any more, then devices, then memory.
#[derive(Debug)]
pub(crate) struct Machine {
    vcpus: Vcpus,
    vm: Arc<VmFd>,
    outcome: Arc<Outcome>,
    legacy: Legacy,
    identity: Identity,
    devices: Vec<Attached>,
    has_pit: bool,
    rest: Rest,
    ram: Ram,
    _memory: GuestRam,
}

/// The devices of a PC that are made with the machine.
#[derive(Debug)]
struct Legacy {
    acpi: Arc<Mutex<Acpi>>,
    i8042: Arc<Mutex<I8042>>,
    rtc: Arc<Mutex<Rtc>>,
}

/// The parts that are not built into the machine, kept to build it again.
#[derive(Debug)]
struct Rest(Parts);

/// What names a device in its VM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name<'a> {
    pub(crate) model: &'static str,
    /// The model's name where there can be only one.
    pub(crate) id: &'a str,
}

impl Name<'_> {
    fn refused(self, source: DeviceError) -> Refusal {
        Refusal::Device { section: self.model, id: self.id.into(), source }
    }
}

/// Names of threads, which tools look for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadNames {
    /// The thread that runs devices.
    pub(crate) io: &'static str,
    /// The thread of a vCPU, without its number.
    pub(crate) vcpu: &'static str,
    /// The API's thread.
    pub(crate) api: &'static str,
    /// The thread that uses paths.
    pub(crate) files: &'static str,
}

impl Machine {
    /// Lets the guest run. A device whose host side is lost stays behind, and its driver is told.
    pub(crate) fn run(&self) {
        self.ram.touch();
        if !self.ram.run() {
            // The outcome says so.
            return;
        }
        for Attached { model, id, transport, .. } in &self.devices {
            if let Err(e) = lock(transport).resume() {
                log::error!("{model} {id}: cannot go on: {}", chain(&e));
            }
        }
        self.vcpus.run();
    }

    /// Stops the guest where it is: vCPUs first, so that nothing new is asked of the devices. If a
    /// device does not stop, because its host side does not answer, the guest goes on.
    pub(crate) fn pause(&self) -> Result<(), Refusal> {
        // Memory that another process serves may never come.
        let deadline = self.ram.is_served().then(|| Instant::now() + SERVED_DEADLINE);
        if !self.vcpus.park(deadline) {
            self.vcpus.run();
            let why = "a vCPU waits for memory that another process serves";
            let source = std::io::Error::new(std::io::ErrorKind::TimedOut, why);
            return Err(Refusal::host("the guest does not stop")(source));
        }
        let paused =
            self.devices.iter().try_for_each(|Attached { model, id, transport, .. }| {
                lock(transport).pause().map_err(|e| Name { model, id }.refused(e))
            });
        paused.inspect_err(|_| self.run())
    }

    /// Stops the guest, to be copied: if it can be, where a copy of it looks at the generation id
    /// before it does anything else.
    pub(crate) fn pause_to_copy(&self) -> Result<(), Refusal> {
        if self.identity.has_driver() {
            let tell = || lock(&self.legacy.acpi).announce_generation();
            let start = Instant::now();
            let looks = self.vcpus.await_look(tell, LOOK_MAX);
            let took = start.elapsed();
            if looks {
                log::debug!("the guest looks at the generation id after {took:?}");
            } else {
                log::info!(
                    "the guest has not looked at the generation id in {took:?}: its copies will, \
                     a moment after they go on"
                );
            }
        }
        self.pause()
    }

    /// Whether what it was booted from is here.
    pub(crate) fn can_reboot(&self) -> bool {
        self.rest.0.kernel.is_some()
    }

    /// Its RAM.
    pub(crate) fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Applies a run-time change to a device, or to a view of it.
    pub(crate) fn update(
        &self,
        name: Name<'_>,
        view: Option<&str>,
        patch: &Value,
    ) -> Result<(), Refusal> {
        let device = &self.devices[self.position(name)?];
        lock(&device.transport).update(view, patch).map_err(|e| name.refused(e))?;
        device.notice(Happening::Updated);
        Ok(())
    }

    /// Changes the limits of a group, whichever device waits for them.
    pub(crate) fn update_group(&self, id: &str, limiter: &RateLimiter) -> Result<(), Refusal> {
        let group = self.rest.0.env.rate_limit_groups.get(id);
        let missing = || Refusal::NoSuchDevice { section: RATE_LIMIT_GROUPS, id: id.into() };
        group.ok_or_else(missing)?.update(limiter);
        Ok(())
    }

    /// What `GET` shows of a device, or of a view of it.
    pub(crate) fn show(&self, name: Name<'_>, view: Option<&str>) -> Reply {
        let device = &self.devices[self.position(name)?];
        lock(&device.transport).show(view).map_err(|e| name.refused(e))
    }

    /// Takes a device out of the running machine, and closes what it has open; what counted in it.
    pub(crate) fn remove(&mut self, name: Name<'_>) -> Result<Vec<Source>, Refusal> {
        let position = self.position(name)?;
        let removed = lock(&self.devices[position].transport).remove();
        removed.map_err(|e| name.refused(e))?;
        let device = self.devices.remove(position);
        device.notice(Happening::Removed);
        Ok(device.sources().collect())
    }

    fn position(&self, Name { model, id }: Name<'_>) -> Result<usize, Refusal> {
        let position = self.devices.iter().position(|d| d.model == model && d.id == id);
        position.ok_or_else(|| Refusal::NoSuchDevice { section: model, id: id.into() })
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self) {
        lock(&self.legacy.acpi).press_power_button();
    }

    /// Presses Ctrl-Alt-Del. False if the guest does not read its keyboard.
    pub(crate) fn ctrl_alt_del(&self) -> bool {
        lock(&self.legacy.i8042).ctrl_alt_del()
    }

    /// How the run ended, and the descriptor that says so.
    pub(crate) fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// All that counts in it.
    pub(crate) fn sources(&self) -> Vec<Source> {
        let uart = Source::only(lock(&self.rest.0.serial).counters().clone());
        let devices = self.devices.iter().flat_map(Attached::sources);
        devices.chain([uart]).chain(self.rest.0.counters.sources()).collect()
    }

    /// Stops the machine for good, and sees its last output off.
    pub(crate) fn finish(self) {
        self.end(|Self { vcpus, rest: Rest(parts), devices, .. }| {
            drop(vcpus);
            let serial = parts.serial.clone();
            lock(&serial).finish(SERIAL_DEADLINE);
            // The port goes last, and here: it may have a socket's file to remove, which an I/O thread may not.
            drop((devices, parts));
        });
    }

    /// Stops the machine for good, whose serial port goes on.
    pub(crate) fn leave(self) {
        self.end(drop);
    }

    /// Does `what` ends it. If another process serves its memory, threads may wait for pages that never
    /// come; nobody waits for them then.
    fn end(self, what: fn(Self)) {
        if !self.ram.is_served() {
            return what(self);
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        let end = move || {
            what(self);
            // Nobody waits for it any more if it took too long.
            let _ = sender.send(());
        };
        match spawn(|work| std::thread::Builder::new().name("husk_end".into()).spawn(work), end) {
            Ok(_) if receiver.recv_timeout(SERVED_END).is_ok() => {}
            Ok(_) => log::warn!("threads of the microVM still wait for memory that nobody serves"),
            Err(e) => log::error!("cannot start a thread to end the microVM: {e}"),
        }
    }
}

/// A device's lock. A panic is fatal in the binary; in a library the device may still be stopped.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use arch::power_ports as told;
    use devices::legacy::acpi;

    /// The tables and the device are in crates that do not know each other.
    #[test]
    fn acpi_device_is_what_the_tables_tell() {
        assert_eq!(acpi::SLEEP_CONTROL, told::SLEEP_CONTROL);
        assert_eq!(acpi::SLEEP_STATUS, told::SLEEP_STATUS);
        assert_eq!(acpi::RESET, told::RESET);
        assert_eq!(acpi::EVENTS, told::EVENTS);
        assert_eq!(acpi::SLEEP_TYPE_S5, told::SLEEP_TYPE_S5);
        assert_eq!(acpi::RESET_VALUE, told::RESET_VALUE);
        assert_eq!(acpi::EVENT_POWER_BUTTON, told::EVENT_POWER_BUTTON);
        assert_eq!(acpi::EVENT_GENERATION, told::EVENT_GENERATION);
    }
}
