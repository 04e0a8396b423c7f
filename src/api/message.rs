//! The JSON that the fixed routes take and give. Configuration sections have their own types, which
//! the API passes on unread.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::instance::InstanceInfo;

/// The body of `PUT /actions`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Action {
    /// What to do.
    pub(crate) action_type: ActionType,
}

/// What `PUT /actions` can do.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) enum ActionType {
    /// Start what is configured.
    InstanceStart,
    /// Press Ctrl-Alt-Del.
    SendCtrlAltDel,
    /// Write the metrics now.
    FlushMetrics,
    /// Press the power button. Not in Firecracker.
    Shutdown,
    /// End the microVM at once. Not in Firecracker.
    Kill,
}

/// The body of `PATCH /vm`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Vm {
    /// The state to go to.
    pub(crate) state: VmState,
}

/// Where `PATCH /vm` can bring a microVM.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) enum VmState {
    /// Stop the vCPUs and devices where they are.
    Paused,
    /// Go on.
    Resumed,
}

/// The reply to `GET /version`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Version {
    /// The version of Firecracker's API that is spoken here.
    pub(crate) firecracker_version: &'static str,
}

/// The body of every refusal.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct FaultMessage {
    /// What is wrong.
    pub(crate) fault_message: String,
}

/// The first line of `GET /events`: how things are. Events follow.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct StateLine {
    /// Tells this line from events.
    pub(crate) event: StateTag,
    /// As in `GET /`.
    #[serde(flatten)]
    #[schemars(with = "InstanceInfo")]
    pub(crate) instance: Value,
}

/// `"state"`.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum StateTag {
    /// The only one.
    State,
}
