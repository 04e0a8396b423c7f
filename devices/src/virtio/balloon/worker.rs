//! Serves the queues of a balloon.
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::EventSet;
use serde_json::json;
use vm_memory::Le32;

use super::pages::{Budget, Pages, Progress};
use super::{Counters, Shared, feature};
use crate::io::{Retired, Watch, Worker};
use crate::virtio::chain::{Buffers, Chain};
use crate::virtio::queue::{Served, VirtQueue};

/// Buffers with statistics read in one turn, of a driver that has to have one.
const STATISTICS_PER_TURN: u32 = 16;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
    /// Its feature was not negotiated: nothing should come, and what comes goes back.
    None,
}

/// What the queues of a driver with `features` are for, in order. Queues of features that were not
/// negotiated do not exist, and those behind them move up: Linux has it so, where virtio 1.2, 5.5.2
/// can be read in two ways.
fn roles(features: u64) -> impl Iterator<Item = Role> {
    let optional = [
        (feature::STATS_VQ, Role::Statistics),
        (feature::FREE_PAGE_HINT, Role::Hinting),
        (feature::PAGE_REPORTING, Role::Reporting),
    ];
    let optional = optional.into_iter().filter(move |(bit, _)| features & bit != 0);
    let roles = [Role::Inflate, Role::Deflate].into_iter().chain(optional.map(|(_, role)| role));
    roles.chain(std::iter::repeat(Role::None))
}

/// The data half.
#[derive(Debug)]
pub(super) struct BalloonWorker {
    queues: Vec<(Role, VirtQueue)>,
    /// When to ask for statistics, if the driver has any.
    timer: Option<Arc<OwnedFd>>,
    shared: Arc<Shared>,
    pages: Pages,
    statistics: StatisticsBuffer,
    /// Bytes of the first chain that were dealt with in earlier turns, for hints and for reports.
    hinted: u64,
    reported: u64,
}

/// The driver's one buffer with statistics (virtio 1.2, 5.5.6.4): the device has it, and asks for
/// new ones by giving it back.
#[derive(Debug, Default)]
struct StatisticsBuffer {
    held: Option<u16>,
    /// Whether the next one was read before this worker had it.
    is_read: bool,
    scratch: Buffers,
}

impl BalloonWorker {
    /// `is_read` says that the first buffer with statistics was read by an earlier worker.
    pub(super) fn new(
        queues: Vec<VirtQueue>,
        features: u64,
        timer: Option<Arc<OwnedFd>>,
        shared: Arc<Shared>,
        is_read: bool,
    ) -> Option<Self> {
        let mem = queues.first()?.mem().clone();
        let pages = Pages::new(mem, shared.counters.clone());
        Some(Self {
            queues: roles(features).zip(queues).collect(),
            timer: timer.filter(|_| features & feature::STATS_VQ != 0),
            shared,
            pages,
            statistics: StatisticsBuffer { is_read, ..StatisticsBuffer::default() },
            hinted: 0,
            reported: 0,
        })
    }

    fn ask_for_statistics(&mut self) {
        let Some(timer) = &self.timer else { return };
        if rustix::io::read(timer, &mut [0; 8]).is_err() {
            // Set anew since: not yet.
            return;
        }
        let queue = self.queues.iter_mut().find(|(role, _)| *role == Role::Statistics);
        let Some((_, queue)) = queue else { return };
        // What it has answered may not have been read yet.
        self.statistics.read(queue, &self.shared);
        match self.statistics.held.take() {
            Some(head) => {
                queue.complete(head, 0);
                queue.notify();
            }
            // The driver has not answered since it was asked last.
            None => self.shared.counters.stats_update_fails().inc(),
        }
    }
}

impl Worker for BalloonWorker {
    fn sources(&self) -> Vec<(&dyn AsRawFd, EventSet)> {
        let kicks = self.queues.iter().map(|(_, queue)| queue.kick_fd() as &dyn AsRawFd);
        let timer = self.timer.as_deref().map(|timer| timer as &dyn AsRawFd);
        kicks.chain(timer).map(|fd| (fd, EventSet::IN)).collect()
    }

    fn ready(&mut self, source: usize) -> Watch {
        let Self { queues, shared, pages, statistics, hinted, reported, .. } = self;
        let Some((role, queue)) = queues.get_mut(source) else {
            self.ask_for_statistics();
            return Watch::Keep;
        };
        match role {
            Role::Inflate => inflate(queue, pages, &shared.counters),
            Role::Deflate => deflate(queue, &shared.counters),
            Role::Statistics => statistics.read(queue, shared),
            Role::Hinting => hint(queue, pages, hinted, shared),
            Role::Reporting => report(queue, pages, reported, &shared.counters),
            Role::None => queue.serve(|_| Served::Used(0)),
        }
        Watch::Keep
    }

    fn retire(mut self: Box<Self>) -> Retired {
        let statistics = self.queues.iter_mut().find(|(role, _)| *role == Role::Statistics);
        let mut state = self.shared.lock().clone();
        state.is_statistics_read = self.statistics.is_read;
        if let (Some((_, queue)), Some(head)) = (statistics, self.statistics.held) {
            // The last that was popped: an earlier one goes back when another comes.
            queue.undo_pop(head);
            state.is_statistics_read = true;
        }
        let queues = self.queues.into_iter().map(|(_, queue)| queue).collect();
        Retired { queues, state: json!(state) }
    }
}

fn inflate(queue: &mut VirtQueue, pages: &mut Pages, counters: &Counters) {
    let mut budget = Budget::of_a_turn();
    queue.serve(|chain| {
        if budget.is_spent() {
            return Served::Later;
        }
        counters.inflate_count().inc();
        // The driver waits for it to come back before it relies on anything.
        pages.inflate(&chain, &mut budget);
        Served::Used(0)
    });
    go_on_later(queue, &budget);
}

/// The driver says that it uses pages again. It need not wait for an answer: they are there.
fn deflate(queue: &mut VirtQueue, counters: &Counters) {
    queue.serve(|_| {
        counters.deflate_count().inc();
        Served::Used(0)
    });
}

fn report(queue: &mut VirtQueue, pages: &mut Pages, done: &mut u64, counters: &Counters) {
    let mut budget = Budget::of_a_turn();
    queue.serve(|chain| {
        let progress = pages.release(&chain, done, &mut budget, |freed| {
            counters.free_page_report_count().inc();
            match freed {
                Some(freed) => counters.free_page_report_freed().add(freed),
                None => counters.free_page_report_fails().inc(),
            }
        });
        served(progress)
    });
    go_on_later(queue, &budget);
}

/// What the driver has to say is in what the device reads, the pages are what it may write
/// (virtio 1.2, 5.5.6.5).
fn hint(queue: &mut VirtQueue, pages: &mut Pages, done: &mut u64, shared: &Shared) {
    let counters = &shared.counters;
    let mut budget = Budget::of_a_turn();
    let mut is_changed = false;
    queue.serve(|chain| {
        if *done == 0 {
            is_changed |= hear(&chain, shared);
        }
        if !shared.lock().hinting.takes_hints() {
            *done = 0;
            return Served::Used(0);
        }
        let progress = pages.release(&chain, done, &mut budget, |freed| {
            counters.free_page_hint_count().inc();
            match freed {
                Some(freed) => counters.free_page_hint_freed().add(freed),
                None => counters.free_page_hint_fails().inc(),
            }
        });
        served(progress)
    });
    if is_changed {
        queue.announce_config_change();
    }
    go_on_later(queue, &budget);
}

/// Takes the command in a chain, if there is one; whether that changed the host's.
fn hear(chain: &Chain<'_>, shared: &Shared) -> bool {
    let mut said = chain.readable();
    if said.is_empty() {
        return false;
    }
    let is_command = said.len() == size_of::<Le32>() as u64;
    match said.read_obj::<Le32>() {
        Ok(command) if is_command => shared.lock().hinting.hear(command.into()),
        _ => {
            shared.counters.free_page_hint_fails().inc();
            false
        }
    }
}

fn served(progress: Progress) -> Served {
    match progress {
        Progress::Done => Served::Used(0),
        Progress::Part => Served::Later,
    }
}

fn go_on_later(queue: &VirtQueue, budget: &Budget) {
    if budget.is_spent() {
        queue.kick_again();
    }
}

impl StatisticsBuffer {
    fn read(&mut self, queue: &mut VirtQueue, shared: &Shared) {
        queue.consume_kick();
        let mut turns = STATISTICS_PER_TURN;
        while turns > 0 {
            turns = turns.saturating_sub(1);
            self.scratch.clear();
            let Some(head) = queue.pop(&mut self.scratch) else {
                if queue.enable_kicks() {
                    continue;
                }
                break;
            };
            // There should be one buffer. A driver with two gets the first back.
            if let Some(earlier) = self.held.take() {
                queue.complete(earlier, 0);
            }
            let said = self.scratch.readable(queue.mem());
            match shared.lock().statistics.update(said) {
                Ok(unknown) => {
                    self.held = Some(head);
                    if !std::mem::take(&mut self.is_read) {
                        shared.counters.stats_updates_count().inc();
                        shared.counters.stats_update_fails().add(unknown);
                    }
                }
                Err(_) => {
                    shared.counters.stats_update_fails().inc();
                    queue.complete(head, 0);
                }
            }
        }
        if turns == 0 {
            queue.kick_again();
        }
        queue.notify();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_move_up_where_features_are_missing() {
        let of = |features| roles(features).take(5).collect::<Vec<_>>();
        use Role::{Deflate, Hinting, Inflate, None, Reporting, Statistics};
        assert_eq!(of(0), [Inflate, Deflate, None, None, None]);
        assert_eq!(of(feature::PAGE_REPORTING), [Inflate, Deflate, Reporting, None, None]);
        let all = feature::STATS_VQ | feature::FREE_PAGE_HINT | feature::PAGE_REPORTING;
        assert_eq!(of(all), [Inflate, Deflate, Statistics, Hinting, Reporting]);
    }
}
