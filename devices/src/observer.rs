//! What happens to a device that somebody outside of its VM may want to know.
use std::fmt::Debug;

use schemars::JsonSchema;
use serde::Serialize;

/// What happened to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Happening {
    /// A driver has brought it up.
    Activated,
    /// Its driver has reset it.
    Reset,
    /// It cannot go on until its driver resets it: the driver's ring lies, or the host failed.
    NeedsReset,
    /// Its configuration changed, and its driver was told.
    ConfigChanged,
    /// The user has changed it.
    Updated,
    /// The user has taken it out.
    Removed,
    /// Its host side went away: a tap, another process.
    HostGone,
    /// Somebody has connected to its host side.
    Connected,
    /// They are gone again.
    Disconnected,
}

/// Who is told. Called by vCPUs and I/O threads: must not wait, however often the guest makes it happen.
pub trait Observer: Debug + Send + Sync {
    /// `what` has just happened.
    fn notice(&self, what: Happening);
}
