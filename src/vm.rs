//! A VM in a Rust program.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = husk::VmConfig::new("vmlinux");
//! config.machine.mem_size_mib = 256;
//! let vm = husk::Vm::start(config)?;
//! println!("{}", vm.wait()?);
//! # Ok(())
//! # }
//! ```
//!
//! A snapshot is opened once, and goes on as many VMs as one likes:
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let vm = husk::Vm::start(husk::VmConfig::new("vmlinux"))?;
//! vm.snapshot(husk::SnapshotParams::to_directory("warm"))?;
//! let image = husk::Image::open("warm")?;
//! for i in 0..3 {
//!     let mut overrides = husk::Overrides::default();
//!     let path = format!("clone{i}.ext4");
//!     overrides.add("drives", serde_json::json!({ "drive_id": "root", "path_on_host": path }));
//!     let clone = husk::Vm::restore(&image, overrides)?;
//!     println!("{}", clone.wait()?);
//! }
//! # Ok(())
//! # }
//! ```
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use serde_json::Value;

use crate::bell::Bell;
use crate::config::{SerialTo, VmConfig};
use crate::controller::{Controller, Instance};
use crate::error::{Refusal, chain};
use crate::events::{Event, Sink};
use crate::exit::Ending;
use crate::fork::{ChildOverrides, ForkError, ForkParams, ImageSink, Parent, plan};
use crate::machine::ThreadNames;
use crate::request::{Handle, Request, Requests};
use crate::snapshot::{Image, Overrides, Restore, RewindParams, SnapshotParams};
use crate::vmm;

/// Events a subscriber may leave unread before it is taken to have gone.
const EVENTS_KEPT: usize = 256;

/// A running VM, with a thread of its own that looks after it. Dropping it kills the guest.
#[derive(Debug)]
pub struct Vm {
    handle: Handle,
    thread: Option<JoinHandle<Ending>>,
    /// How many VMs it has been forked to.
    children: AtomicU64,
}

impl Vm {
    /// Starts what `config` describes. When this returns, the guest runs.
    pub fn start(config: VmConfig) -> Result<Self, Refusal> {
        let vm = Self::prepare(config)?;
        vm.handle.call(Request::Start)?;
        Ok(vm)
    }

    /// A VM that goes on from a snapshot. When this returns, the guest runs. [`Restore`] has more to
    /// choose from: [`Request::Restore`] takes it, of a VM that was [prepared](Self::prepare).
    pub fn restore(image: &Image, overrides: Overrides) -> Result<Self, Refusal> {
        let mut config = VmConfig::default();
        config.defaults.serial = SerialTo::None;
        let vm = Self::prepare(config)?;
        let restore = Restore { overrides, ..Restore::new(image) };
        vm.handle.call(Request::Restore(Box::new(restore)))?;
        Ok(vm)
    }

    /// A VM that is configured but not started: for whoever wants its events from the first on.
    /// [`Self::handle`] then takes [`Request::Start`].
    pub fn prepare(config: VmConfig) -> Result<Self, Refusal> {
        let (handle, requests) = Requests::channel()?;
        let quit = Bell::new().map(Arc::new).map_err(Refusal::host("cannot make an eventfd"))?;
        let quit_writer = quit.clone();
        let instance = Instance {
            id: "anonymous-instance".into(),
            names: ThreadNames {
                io: "husk_io",
                vcpu: "husk_vcpu ",
                api: "husk_api",
                files: "husk_files",
            },
            started: Instant::now(),
            counters: Arc::default(),
            tells_more: true,
            quit: Arc::new(move || quit_writer.ring()),
            announce: |path| log::info!("serial console: {}", path.display()),
        };
        let thread = thread::Builder::new()
            .name("husk_vmm".into())
            .spawn(move || {
                let mut signals = vmm::NoSignals(&quit);
                let mut controller = Controller::new(instance, config);
                vmm::serve(&mut controller, &requests, &quit, &mut signals)
            })
            .map_err(Refusal::host("cannot start the VMM thread"))?;
        Ok(Self { handle, thread: Some(thread), children: AtomicU64::new(0) })
    }

    /// For every request there is, and for other threads.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// State changes from now on. A receiver that lags by 256 events gets no more.
    pub fn events(&self) -> Result<Receiver<Event>, Refusal> {
        let (sender, receiver) = sync_channel(EVENTS_KEPT);
        let sink = Sink::new(move |event| sender.try_send(event.clone()).is_ok());
        self.handle.call(Request::Subscribe(sink))?;
        Ok(receiver)
    }

    /// Stops the guest where it is.
    pub fn pause(&self) -> Result<(), Refusal> {
        self.handle.call(Request::Pause).map(drop)
    }

    /// Lets it go on.
    pub fn resume(&self) -> Result<(), Refusal> {
        self.handle.call(Request::Resume).map(drop)
    }

    /// Writes a snapshot. When this returns, it is there; the guest goes on meanwhile if it ran.
    pub fn snapshot(&self, params: SnapshotParams) -> Result<(), Refusal> {
        self.handle.call(Request::Snapshot(params)).map(drop)
    }

    /// Puts it back to a snapshot of it, in place: what it was restored from, or saved to later, unless
    /// `params` name another. It goes on from there.
    pub fn rewind(&self, params: RewindParams) -> Result<(), Refusal> {
        self.handle.call(Request::Rewind(params)).map(drop)
    }

    /// Notes beside the snapshot that it was restored from which pages it has touched: later restores have
    /// them there before the guest asks.
    pub fn record_working_set(&self) -> Result<(), Refusal> {
        self.handle.call(Request::Record).map(drop)
    }

    /// An image of the VM as it is now, in memory. The guest goes on if it ran; what it does from now on is
    /// not in the image. At once if RAM is [`forkable`](crate::MachineConfig::forkable) and nobody has
    /// written to it since the VM was last frozen; else memory is copied, while the guest goes on.
    pub fn freeze(&self) -> Result<Image, Refusal> {
        let (sender, receiver) = sync_channel(1);
        // Whoever asked waits below.
        let sink = ImageSink::new(move |image| drop(sender.send(image)));
        self.handle.call(Request::Freeze(sink))?;
        receiver.recv().map_err(|_| Refusal::Gone)
    }

    /// `count` VMs in this process that go on from where this one is, which goes on as well: all of them, or
    /// none. `overrides` are one for each, one for all, or none; what a VM has that another cannot have too
    /// (a tap, a disk that is written to) needs one.
    pub fn fork(&self, count: u32, overrides: Vec<Overrides>) -> Result<Vec<Self>, Refusal> {
        let overrides = overrides.into_iter();
        let overrides =
            overrides.map(|overrides| ChildOverrides { api_sock: None, overrides }).collect();
        let params = ForkParams { n: Some(count), overrides, ..ForkParams::default() };
        let image = self.freeze()?;
        let config = image.config(&Overrides::default())?;
        let children = self.children.fetch_add(count.into(), Ordering::Relaxed);
        let id = "anonymous-instance";
        let specs = plan(Parent { config: &config, id, api_sock: None, children }, &params)?;
        let vms = specs.into_iter().enumerate().map(|(number, spec)| {
            let (image, mut overrides) = (image.with_config(spec.config), Overrides::default());
            (overrides.id, overrides.mmds) = (Some(spec.id), spec.mmds);
            overrides.payload = spec.payload;
            let failed = |e: Refusal| ForkError::Child { number, why: chain(&e) };
            let vm = Self::prepare(VmConfig::default())?;
            let restore = Restore { overrides, is_paused: true, ..Restore::new(&image) };
            vm.handle.call(Request::Restore(Box::new(restore))).map_err(failed)?;
            Ok(vm)
        });
        let vms = vms.collect::<Result<Vec<_>, Refusal>>()?;
        vms.iter().try_for_each(Self::resume)?;
        Ok(vms)
    }

    /// Presses the power button. Whether and when the guest heeds it is its business.
    pub fn shutdown(&self) -> Result<(), Refusal> {
        self.handle.call(Request::Shutdown).map(drop)
    }

    /// Ends the VM at once.
    pub fn kill(&self) -> Result<(), Refusal> {
        self.handle.call(Request::Kill).map(drop)
    }

    /// What `GET /` answers.
    pub fn describe(&self) -> Result<Value, Refusal> {
        self.handle.call(Request::Describe)
    }

    /// Waits until the VM has ended.
    pub fn wait(mut self) -> Result<Ending, Refusal> {
        let thread = self.thread.take().ok_or(Refusal::Gone)?;
        thread.join().map_err(|_| Refusal::Gone)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Ended already: the reply says so, and there is nothing to end.
            let _ = self.handle.call(Request::Quit);
            if thread.join().is_err() {
                log::error!("the VMM thread panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_refuses_values_that_no_machine_has() {
        let mut config = VmConfig::new(crate::DEMO_GUEST);
        config.machine.vcpu_count = 0;
        let refusal = Vm::start(config).unwrap_err();
        assert!(refusal.to_string().contains("vcpu_count"), "{refusal}");
    }
}
