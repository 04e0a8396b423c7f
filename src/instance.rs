//! Who a VM is and what it is doing: `GET /`.
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Serialize;

use crate::boot::BootPhases;

/// The version of Firecracker whose API this is.
pub(crate) const FIRECRACKER_VERSION: &str = "1.17.0";

/// A VM, for whoever asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct InstanceInfo {
    /// Always "Firecracker": whose API this is, for clients that look.
    pub app_name: &'static str,
    /// The id given on the command line.
    pub id: String,
    /// What it is doing.
    pub state: State,
    /// The version of Firecracker whose API this is.
    pub vmm_version: &'static str,
    /// husk's own version. Not in Firecracker.
    pub husk_version: &'static str,
    /// What leads to the serial port of a started VM, if it is a pseudo-terminal or a socket. Not in
    /// Firecracker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_path: Option<PathBuf>,
    /// How long the phases of the last start of a started VM took. Not in Firecracker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootPhases>,
}

impl InstanceInfo {
    pub(crate) fn new(id: String, state: State) -> Self {
        Self {
            app_name: "Firecracker",
            id,
            state,
            vmm_version: FIRECRACKER_VERSION,
            husk_version: env!("CARGO_PKG_VERSION"),
            serial_path: None,
            boot: None,
        }
    }
}

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub enum State {
    /// It is being configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// The vCPUs run.
    Running,
    /// The vCPUs and devices stand still.
    Paused,
    /// It is over; the process is about to be. Not in Firecracker.
    Ended,
}
