//! Who may be using memory that is about to go.
//!
//! A device looks up a buffer and then reads or writes it; memory that goes in between would be a
//! fault of husk's own, or host memory in use where none should be. So whoever works on guest memory
//! holds a lease meanwhile, and whoever takes memory away first makes it impossible to look up, then
//! waits until all who had a lease by then have given it up.
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

/// How long a device may take to finish what it is doing before whoever waits gives up. Less than
/// what a device is given to pause, so that one that waits here can still be paused.
const PATIENCE: Duration = Duration::from_millis(200);

/// The leases of one VM.
#[derive(Debug, Default)]
pub struct Leases {
    /// The leases held, each with its number, in the order in which they were taken.
    held: Mutex<Held>,
    given_up: Condvar,
}

#[derive(Debug, Default)]
struct Held {
    next: u64,
    by: Vec<(u64, ThreadId)>,
}

/// A lease, given up when dropped.
#[derive(Debug)]
pub struct Lease<'a> {
    leases: &'a Leases,
    number: u64,
}

impl Leases {
    /// Takes a lease for this thread. Waits for nobody.
    pub fn take(&self) -> Lease<'_> {
        let mut held = self.lock();
        let number = held.next;
        held.next = number.wrapping_add(1);
        held.by.push((number, thread::current().id()));
        Lease { leases: self, number }
    }

    /// Waits until the leases that other threads hold now are given up. False if one of them takes
    /// too long.
    pub fn wait_for_others(&self) -> bool {
        let me = thread::current().id();
        let held = self.lock();
        let now = held.next;
        let is_in_use = |held: &mut Held| held.by.iter().any(|(n, by)| *n < now && *by != me);
        let (_held, waited) = self
            .given_up
            .wait_timeout_while(held, PATIENCE, is_in_use)
            .unwrap_or_else(PoisonError::into_inner);
        !waited.timed_out()
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.leases.lock().by.retain(|(number, _)| *number != self.number);
        self.leases.given_up.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn waits_for_those_who_were_there_before() {
        let leases = Leases::default();
        let (taken, is_taken) = channel();
        let (give_up, is_given_up) = channel::<()>();
        let shared = &leases;
        thread::scope(|scope| {
            scope.spawn(move || {
                let lease = shared.take();
                taken.send(()).unwrap();
                is_given_up.recv().unwrap();
                drop(lease);
            });
            is_taken.recv().unwrap();
            // Too long.
            assert!(!leases.wait_for_others());
            give_up.send(()).unwrap();
            assert!(leases.wait_for_others());
        });
    }

    #[test]
    fn does_not_wait_for_its_own_thread() {
        let leases = Leases::default();
        let _mine = leases.take();
        assert!(leases.wait_for_others());
    }
}
