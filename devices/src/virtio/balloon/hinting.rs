//! A run of free-page hinting (virtio 1.2, 5.5.6.5): the host asks once, the guest names all pages
//! that are free, and keeps them until the host has acknowledged.
//!
//! ```text
//!   host    run N          hints are          DONE: the guest may use them
//!   guest          N       given back   STOP
//! ```
//!
//! The host's command is in the configuration space, the guest's comes through the queue.
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// No run; from the guest, its end.
const STOP: u32 = 0;
/// The guest may use again what it has hinted at.
const DONE: u32 = 1;
/// The first number that a run can have.
const FIRST_RUN: u32 = 2;

/// Where the two sides are.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct Hinting {
    host_cmd: u32,
    guest_cmd: Option<u32>,
    last_run: u32,
    is_acknowledged_on_stop: bool,
}

/// How a run of hinting is to be.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "BalloonStartCmd")]
pub struct Start {
    /// Whether the guest may have its pages back as soon as it has named them all. Otherwise it gets
    /// them when the run is stopped.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

fn yes() -> bool {
    true
}

/// What `GET /balloon/hinting/status` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(rename = "BalloonHintingStatus")]
pub struct Status {
    /// What the host has said last: 0 nothing yet, 1 that the pages may be used again, otherwise the
    /// number of the run.
    pub host_cmd: u32,
    /// What the guest has said last: the number of the run it is at, or 0 when it is through. `null`
    /// if it has said nothing.
    pub guest_cmd: Option<u32>,
}

impl Hinting {
    /// What the driver finds in the configuration space.
    pub(super) fn host_cmd(&self) -> u32 {
        self.host_cmd
    }

    pub(super) fn status(&self) -> Status {
        Status { host_cmd: self.host_cmd, guest_cmd: self.guest_cmd }
    }

    /// Begins a run, with a number that the last one did not have.
    pub(super) fn start(&mut self, start: &Start) {
        self.last_run = self.last_run.wrapping_add(1).max(FIRST_RUN);
        self.host_cmd = self.last_run;
        self.is_acknowledged_on_stop = start.acknowledge_on_stop;
    }

    /// Lets the guest have its pages back.
    pub(super) fn stop(&mut self) {
        self.host_cmd = DONE;
    }

    /// Takes what the guest says; whether that changed what the host says.
    pub(super) fn hear(&mut self, command: u32) -> bool {
        // The end of a run that another has replaced does not end that.
        let was_at_it = self.takes_hints();
        let is_end = command == STOP || command == DONE;
        self.guest_cmd = Some(command);
        let is_through = was_at_it && is_end && self.is_acknowledged_on_stop;
        if is_through {
            self.stop();
        }
        is_through
    }

    /// Whether what the guest hints at now belongs to the run that the host wants.
    pub(super) fn takes_hints(&self) -> bool {
        self.host_cmd >= FIRST_RUN && self.guest_cmd == Some(self.host_cmd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Start = Start { acknowledge_on_stop: true };
    const LATER: Start = Start { acknowledge_on_stop: false };

    #[test]
    fn a_run_goes_from_its_number_to_done() {
        let mut hinting = Hinting::default();
        assert_eq!(hinting.status(), Status { host_cmd: 0, guest_cmd: None });
        hinting.start(&AT_ONCE);
        assert!(hinting.host_cmd() == 2 && !hinting.takes_hints());
        assert!(!hinting.hear(2) && hinting.takes_hints());
        assert!(hinting.hear(STOP) && !hinting.takes_hints());
        assert_eq!(hinting.status(), Status { host_cmd: DONE, guest_cmd: Some(STOP) });
        hinting.start(&LATER);
        assert!(!hinting.hear(3) && !hinting.hear(STOP));
        assert_eq!(hinting.host_cmd(), 3);
        hinting.stop();
        assert_eq!(hinting.host_cmd(), DONE);
    }

    #[test]
    fn a_run_that_was_replaced_changes_nothing() {
        let mut hinting = Hinting::default();
        hinting.start(&AT_ONCE);
        hinting.hear(2);
        hinting.start(&AT_ONCE);
        assert!(!hinting.takes_hints());
        assert!(!hinting.hear(STOP), "the first run's end");
        assert_eq!(hinting.host_cmd(), 3);
        hinting.hear(3);
        assert!(hinting.takes_hints());
    }

    #[test]
    fn a_guest_cannot_choose_the_run() {
        let mut hinting = Hinting::default();
        for command in [STOP, DONE, 2, 3, u32::MAX] {
            assert!(!hinting.hear(command) && !hinting.takes_hints());
        }
        hinting.start(&AT_ONCE);
        for command in [STOP, DONE, 3, u32::MAX] {
            assert!(!hinting.hear(command) && !hinting.takes_hints(), "{command}");
        }
        hinting.hear(2);
        assert!(hinting.hear(DONE), "an end, though not in the right words");
    }

    #[test]
    fn numbers_wrap_past_the_reserved_ones() {
        let mut hinting = Hinting { last_run: u32::MAX, ..Hinting::default() };
        hinting.start(&AT_ONCE);
        assert_eq!(hinting.host_cmd(), 2);
    }
}
