//! A device whose host side does not answer.
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use devices::io::{Retired, Source, Watch, Worker};
use devices::metrics::CounterSet;
use devices::virtio::model::{DeviceError, VirtioDevice};
use devices::virtio::queue::VirtQueue;
use event_manager::EventSet;
use serde_json::Value;

use crate::driver::{Machine, NEEDS_RESET};
use crate::samples::sample;

/// Tells that it is busy, and is until it is told to go on.
#[derive(Debug)]
struct Stuck {
    /// One of another kind, for what they have in common.
    other: Box<dyn VirtioDevice>,
    ends: Option<(SyncSender<()>, Receiver<()>)>,
}

impl VirtioDevice for Stuck {
    fn device_id(&self) -> u32 {
        self.other.device_id()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.other.queue_sizes()
    }

    fn activate(
        &mut self,
        queues: Vec<VirtQueue>,
        _features: u64,
        _saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError> {
        let (busy, go_on) = self.ends.take().ok_or(DeviceError::Removed)?;
        Ok(Box::new(StuckWorker { queues, busy, go_on }))
    }

    fn counters(&self) -> Arc<dyn CounterSet> {
        self.other.counters()
    }
}

struct StuckWorker {
    queues: Vec<VirtQueue>,
    busy: SyncSender<()>,
    go_on: Receiver<()>,
}

impl Worker for StuckWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        vec![(self.queues[0].kick_fd(), EventSet::IN)]
    }

    fn ready(&mut self, _source: usize) -> Watch {
        self.queues[0].consume_kick();
        self.busy.send(()).unwrap();
        // Its end is a word, too.
        let _ = self.go_on.recv();
        Watch::Keep
    }

    fn retire(self: Box<Self>) -> Retired {
        Retired { queues: self.queues, state: Value::Null }
    }
}

#[test]
fn resets_by_many_cpus_do_not_wait_one_after_the_other() {
    const CPUS: u32 = 16;
    let (busy, is_busy) = sync_channel(1);
    let (go_on, waits) = sync_channel(1);
    let other = sample("entropy").device;
    let m = Machine::new(Box::new(Stuck { other, ends: Some((busy, waits)) }));
    // It looks at its queues when it has come up.
    m.start(0);
    is_busy.recv().unwrap();
    let started = Instant::now();
    thread::scope(|scope| {
        for _ in 0..CPUS {
            scope.spawn(|| m.set(0x70, 0));
        }
    });
    // Each would wait half a second.
    assert!(started.elapsed() < CPUS * Duration::from_millis(500) / 2, "{:?}", started.elapsed());
    assert_ne!(m.status() & NEEDS_RESET, 0);
    drop(go_on);
    while m.status() != 0 {
        m.set(0x70, 0);
    }
}
