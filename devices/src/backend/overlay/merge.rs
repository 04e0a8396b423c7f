//! Frozen layers on their way to be one. What they hold is copied by a thread of its own, because a guest stands still
//! while its layers are frozen. Until that is done, and if it fails, they stay as they are.
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread;

use super::layer::{self, Layer};
use crate::sys::again::spawn;

/// Layers that are being copied to one. Dropped before that is done, it is called off.
#[derive(Debug)]
pub(super) struct Merge {
    of: Vec<Arc<Layer>>,
    done: Receiver<io::Result<Layer>>,
    is_off: Arc<AtomicBool>,
}

impl Merge {
    /// Begins to copy `of`, which follow each other in a stack over a disk of `size` bytes, to the empty layer `to`.
    pub(super) fn begin(of: Vec<Arc<Layer>>, size: u64, mut to: Layer) -> io::Result<Self> {
        let (sender, done) = sync_channel(1);
        let is_off = Arc::<AtomicBool>::default();
        let (layers, stop) = (of.clone(), is_off.clone());
        let work = move || {
            let copied = layer::flatten(&layers, size, &to.file, |_| {
                if stop.load(Ordering::Relaxed) {
                    Err(io::ErrorKind::Interrupted.into())
                } else {
                    Ok(())
                }
            });
            // Nobody waits for it any more, if it was called off.
            let _ = sender.send(copied.map(|map| {
                to.map = map;
                to
            }));
        };
        spawn(|work| thread::Builder::new().name("husk_overlay".into()).spawn(work), work)?;
        Ok(Self { of, done, is_off })
    }

    /// Puts what it has come to in the place of what it was made of, if that is still in `stack`. False if it goes on.
    pub(super) fn settle(&self, stack: &mut Vec<Arc<Layer>>) -> bool {
        let one = match self.done.try_recv() {
            Ok(Ok(one)) => one,
            Ok(Err(e)) => {
                log::warn!("the layers of a disk are not made fewer: {e}");
                return true;
            }
            Err(TryRecvError::Disconnected) => return true,
            Err(TryRecvError::Empty) => return false,
        };
        let is_it = |(a, b): (&Arc<Layer>, &Arc<Layer>)| Arc::ptr_eq(a, b);
        let mut places = stack.windows(self.of.len());
        if let Some(first) = places.position(|window| window.iter().zip(&self.of).all(is_it)) {
            stack.splice(first..first.saturating_add(self.of.len()), [Arc::new(one)]);
        }
        true
    }
}

impl Drop for Merge {
    fn drop(&mut self) {
        self.is_off.store(true, Ordering::Relaxed);
    }
}
