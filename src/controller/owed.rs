//! A reply that another thread owes: given by that thread, or by the controller if the VM ends before.
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use devices::sync::Mutex;
use devices::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};

use crate::error::Refusal;
use crate::request::Respond;

type Slot = Arc<Mutex<Option<Respond>>>;

/// The controller's side.
pub(super) struct Owed {
    slot: Slot,
    /// Disconnected when the other side is through.
    answered: Receiver<()>,
}

/// The side of the thread that works for it.
pub(super) struct Owing {
    slot: Slot,
    /// Dropped after the answer.
    _answering: SyncSender<()>,
}

/// What is asked of another thread: what that has, and what the controller keeps.
pub(super) fn owe(respond: Respond) -> (Owing, Owed) {
    let slot: Slot = Arc::new(Mutex::new(Some(respond)));
    let (sender, answered) = sync_channel(0);
    (Owing { slot: slot.clone(), _answering: sender }, Owed { slot, answered })
}

impl Owing {
    /// Who is to be answered. `None` if they were told that the VM has ended.
    pub(super) fn claim(&self) -> Option<Respond> {
        take(&self.slot)
    }
}

impl Owed {
    /// Whether nobody waits for an answer any more.
    pub(super) fn is_settled(&self) -> bool {
        self.answered.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// Waits until the answer has been given. False if `deadline` comes before.
    pub(super) fn wait(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        self.answered.recv_timeout(left) == Err(RecvTimeoutError::Disconnected)
    }

    /// Gives the answer in the thread's stead, unless that is about to.
    pub(super) fn answer(&self, why: Refusal) {
        if let Some(respond) = take(&self.slot) {
            respond(Err(why));
        }
    }
}

fn take(slot: &Slot) -> Option<Respond> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

#[cfg(all(test, feature = "models"))]
mod models;

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn is_answered_once_by_whoever_comes_first() {
        for thread_is_first in [true, false] {
            let (sender, replies) = channel();
            let (owing, owed) = owe(Box::new(move |reply| sender.send(reply).unwrap()));
            assert!(!owed.is_settled());
            if thread_is_first {
                owing.claim().unwrap()(Ok(serde_json::Value::Null));
            }
            owed.answer(Refusal::Gone);
            assert!(owing.claim().is_none());
            assert!(!owed.wait(Instant::now()));
            drop(owing);
            assert!(owed.is_settled() && owed.wait(Instant::now()));
            let replies: Vec<_> = replies.iter().map(|reply| reply.is_ok()).collect();
            assert_eq!(replies, [thread_is_first]);
        }
    }
}
