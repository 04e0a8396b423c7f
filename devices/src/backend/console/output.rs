//! Bytes on their way out: never waits, never grows.
//!
//! What the host does not take at once is kept, up to [`Output::LIMIT`]. Beyond that the oldest
//! byte goes, because the last words of a guest are worth more than its first.
use std::collections::VecDeque;
use std::sync::Arc;

use rustix::io::Errno;

use crate::backend::stream::Stream;

/// What became of the guest's bytes so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes the host took.
    pub written: u64,
    /// Bytes lost: nobody read, or the host refused (a full disk, a closed pipe).
    pub dropped: u64,
    /// Bytes lost to a rate limit.
    pub limited: u64,
}

/// The way out.
#[derive(Debug, Default)]
pub(super) struct Output {
    host: Option<Arc<Stream>>,
    pending: VecDeque<u8>,
    counters: Counters,
}

impl Output {
    /// Bytes kept for a host that does not take them.
    pub(super) const LIMIT: usize = 64 << 10;

    /// Sends to `host` from now on, or keeps the last bytes for whoever comes.
    pub(super) fn connect(&mut self, host: Option<Arc<Stream>>) {
        self.host = host;
    }

    /// What became of the bytes so far.
    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether some bytes wait for a host that is there.
    pub(super) fn is_waiting(&self) -> bool {
        self.host.is_some() && !self.pending.is_empty()
    }

    /// The host, if there is one.
    pub(super) fn host(&self) -> Option<&Arc<Stream>> {
        self.host.as_ref()
    }

    /// Takes bytes; `flush` sends them.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let kept = bytes.len().min(Self::LIMIT);
        let free = Self::LIMIT.saturating_sub(self.pending.len());
        let pushed_out = kept.saturating_sub(free);
        self.pending.drain(..pushed_out.min(self.pending.len()));
        let skipped = bytes.len().saturating_sub(kept);
        self.pending.extend(bytes.iter().skip(skipped));
        self.count_dropped(pushed_out.saturating_add(skipped));
    }

    /// Sends what the host takes without waiting; an error is what the host refused with, and
    /// leaves the bytes here.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        let Some(host) = &self.host else { return Ok(()) };
        while !self.pending.is_empty() {
            match host.write(self.pending.as_slices().0) {
                // Nothing taken and nothing said: as good as full.
                Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                Ok(written) => {
                    self.pending.drain(..written.min(self.pending.len()));
                    self.counters.written =
                        self.counters.written.saturating_add(written.try_into().unwrap_or(0));
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Gives up on what is waiting.
    pub(super) fn discard(&mut self) {
        self.count_dropped(self.pending.len());
        self.pending.clear();
    }

    fn count_dropped(&mut self, bytes: usize) {
        self.counters.dropped =
            self.counters.dropped.saturating_add(bytes.try_into().unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_bytes_whatever_the_pieces() {
        for piece in [1, 7, 4096, Output::LIMIT - 1, Output::LIMIT, Output::LIMIT + 1, 200_000] {
            let mut output = Output::default();
            let all: Vec<u8> = (0..200_000u32).map(|i| i.to_le_bytes()[0]).collect();
            for piece in all.chunks(piece) {
                output.push(piece);
            }
            let kept: Vec<u8> = output.pending.iter().copied().collect();
            assert_eq!(kept, all[all.len() - Output::LIMIT..], "{piece}");
            assert_eq!(output.counters.dropped, (all.len() - Output::LIMIT) as u64);
            assert!(output.pending.capacity() <= 2 * Output::LIMIT);
            output.discard();
            assert_eq!(output.counters.dropped, all.len() as u64);
        }
    }
}
