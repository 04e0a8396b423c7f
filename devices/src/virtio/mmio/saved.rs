//! What is saved of a device and its transport.
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::registers::Registers;
use crate::backend::overlay::Frozen;
use crate::virtio::notifier::status;

/// What a snapshot keeps of one device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    pub(super) registers: Registers,
    pub(super) status: u32,
    pub(super) isr: u32,
    pub(super) generation: u32,
    /// `(next_avail, next_used)` of each live queue.
    pub(super) positions: Vec<(u16, u16)>,
    pub(super) device: Value,
    /// What the memory that it brings along says.
    #[serde(default)]
    pub(super) memory: Value,
    /// What it has written on the host.
    #[serde(default)]
    pub(super) files: Files,
}

/// What a device has written on the host. It is not among what is saved, which tells only whether it
/// has to be beside it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(from = "bool", into = "bool")]
pub(super) enum Files {
    /// Nothing, or nothing that is part of it.
    #[default]
    None,
    /// It is elsewhere, and has to be [put back](Saved::set_files).
    Elsewhere,
    Here(Frozen),
}

impl From<bool> for Files {
    fn from(are_there: bool) -> Self {
        if are_there { Self::Elsewhere } else { Self::None }
    }
}

impl From<Files> for bool {
    fn from(files: Files) -> Self {
        !matches!(files, Files::None)
    }
}

impl Saved {
    /// What the device has written on the host, if that is part of it.
    pub fn files(&self) -> Option<&Frozen> {
        match &self.files {
            Files::Here(files) => Some(files),
            Files::None | Files::Elsewhere => None,
        }
    }

    /// What the memory that it brings along says.
    pub fn memory(&self) -> &Value {
        &self.memory
    }

    /// Whether [`Self::set_files`] has to be called.
    pub fn wants_files(&self) -> bool {
        matches!(self.files, Files::Elsewhere)
    }

    /// Says what the device has written on the host.
    pub fn set_files(&mut self, files: Frozen) {
        self.files = Files::Here(files);
    }

    /// Whether its worker was at work when it was paused.
    pub(super) fn has_live_queues(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }
}
