//! A VM that takes another's place in the same process, and what of the host's side it takes over: a
//! tap, a locked disk, a socket, the terminal cannot be opened twice.
//!
//! ```text
//!   old VM    runs ───────────────────────────────── paused ── gone
//!   new VM          open the rest, put together ─┐      │
//!                   with stand-ins               └──────┴─ take over, run
//! ```
//!
//! Until both stand still nothing of the old VM is touched, so it goes on if anything fails.
use std::path::PathBuf;
use std::sync::Arc;

use devices::backend::unix::SocketName;
use devices::io::IoThread;
use devices::legacy::serial::Serial;
use devices::limiter::Groups;
use devices::mmds::Service;
use devices::sync::Mutex;

use crate::config::VmConfig;
use crate::machine::Machine;
use crate::parts::Part;

/// What a VM takes over.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    /// Stand-ins for devices.
    pub(crate) devices: Vec<Part>,
    pub(crate) port: Option<Port>,
    /// Limits that devices share, if they are the same.
    pub(crate) rate_limit_groups: Option<Groups>,
    /// The metadata service, if it is the same.
    pub(crate) mmds: Option<Arc<Service>>,
}

/// The serial port, what feeds it, and what leads to it.
#[derive(Clone, Debug)]
pub(crate) struct Port {
    pub(crate) io: Arc<IoThread>,
    pub(crate) serial: Arc<Mutex<Serial>>,
    pub(crate) path: Option<PathBuf>,
    /// The socket that it is, if it is one.
    pub(crate) name: Option<Arc<SocketName>>,
}

impl Taken {
    /// What a VM with the configuration `new` takes over from `machine`, which has the configuration
    /// `old`: what is configured in the same way.
    pub(crate) fn of(machine: &Machine, old: &VmConfig, new: &VmConfig) -> Self {
        let has_same_groups = old.has_same_rate_limit_groups(new);
        let has_same_mmds = old.mmds == new.mmds;
        let mut devices = Vec::new();
        for recipe in new.devices() {
            let (model, id) = (recipe.model(), recipe.id());
            let twin = old.devices().find(|other| other.model() == model && other.id() == id);
            let is_same = twin.is_some_and(|twin| twin.to_json() == recipe.to_json())
                && (has_same_groups || recipe.rate_limit_groups().is_empty())
                && (has_same_mmds || !new.leads_to_mmds(id) && !old.leads_to_mmds(id));
            if is_same && let Some(part) = machine.stand_in(model, id) {
                devices.push(part);
            }
        }
        let env = machine.env();
        Self {
            devices,
            port: (old.serial_to() == new.serial_to()).then(|| machine.port()),
            rate_limit_groups: has_same_groups.then(|| env.rate_limit_groups.clone()),
            mmds: env.mmds.clone().filter(|_| has_same_mmds),
        }
    }

    /// The stand-in for a device, if it is taken over.
    pub(crate) fn device(&mut self, model: &str, id: &str) -> Option<Part> {
        let at = self.devices.iter().position(|part| part.model == model && part.id == id)?;
        Some(self.devices.swap_remove(at))
    }
}
