//! What happens to a VM and its devices, for whoever wants to follow it.
//!
//! ```text
//!  transports, workers ──Watch::notice──► channel, bell ──► Hub ──► sinks: GET /events, the log
//!  (vCPU and I/O threads)      │ too many, or no room
//!                              └► counted; told together, a second later
//! ```
//!
//! A guest decides how often its devices are reset. So what it makes happen never waits, takes bounded
//! room, and is told of a bounded number of times a second.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::todo)]
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devices::observer::{Happening, Observer};

use serde::Serialize;

use crate::bell::Bell;
use crate::exit::Ending;
use crate::snapshot::SnapshotType;

/// Something that happened to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Event {
    /// Microseconds of the monotonic clock since husk (or the library's VM) started.
    pub time_us: u64,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum What {
    /// The vCPUs run for the first time.
    Started,
    /// The VM is there as a snapshot has it.
    Restored {
        /// The snapshot's id.
        id: String,
        /// Whether the vCPUs and devices stand still.
        paused: bool,
        /// Microseconds from the request until the guest could go on.
        took_us: u64,
    },
    /// A snapshot is there, under its name.
    SnapshotCreated {
        /// Its id.
        id: String,
        /// How much of the memory it holds.
        kind: SnapshotType,
        /// Microseconds it took.
        took_us: u64,
        /// Microseconds of it in which the guest stood still for it: 0 if it did so anyway.
        paused_us: u64,
        /// Bytes written, of state and memory.
        bytes: u64,
    },
    /// The VM is back at a snapshot of it.
    Rewound {
        /// The snapshot's id.
        id: String,
        /// Whether the vCPUs and devices stand still.
        paused: bool,
        /// Microseconds it took.
        took_us: u64,
        /// Bytes of memory that had been written since.
        bytes: u64,
    },
    /// What leads to the serial port, a pseudo-terminal or a socket. Before the start.
    SerialPath {
        /// The path.
        path: PathBuf,
    },
    /// Something happened to a device.
    Device {
        /// Which.
        #[serde(flatten)]
        device: Name,
        /// What.
        what: Happening,
    },
    /// More happened to a device than is told of.
    DeviceEventsMissed {
        /// Which.
        #[serde(flatten)]
        device: Name,
        /// How many events were not told.
        count: u64,
        /// The last that happened, told or not.
        last: Happening,
    },
    /// The vCPUs and devices stand still.
    Paused,
    /// They go on.
    Resumed,
    /// Children of the VM run, in processes of their own.
    Forked {
        /// How many.
        children: usize,
        /// How long the VM stood still for it, in microseconds; 0 if it did so anyway.
        paused_us: u64,
        /// How long it took, in microseconds.
        took_us: u64,
    },
    /// The power button was pressed.
    ShutdownRequested,
    /// The guest reset itself and boots again.
    Rebooted,
    /// The VM is over. The last event.
    Ended(Ending),
}

/// What a device is called in the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct Name {
    /// The kind: "drives", or "serial".
    pub model: &'static str,
    /// Its id; the kind again where there can be only one.
    pub id: String,
}

/// Takes events until it returns false. Runs on the VMM thread: must not block.
pub struct Sink(Box<dyn FnMut(&Event) -> bool + Send>);

impl Sink {
    /// A sink that calls `f`.
    pub fn new(f: impl FnMut(&Event) -> bool + Send + 'static) -> Self {
        Self(Box::new(f))
    }
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sink").finish_non_exhaustive()
    }
}

/// Events of devices told in a second, of all devices together: few enough for any client to keep up.
const DEVICE_EVENTS_MAX: u8 = 32;
/// How long what was not told is collected.
const MISSED_PERIOD: Duration = Duration::from_secs(1);

/// An event of a device on its way to the VMM thread.
#[derive(Debug)]
struct Notice {
    time: Instant,
    device: Arc<Name>,
    what: Happening,
}

/// What the watches of a VM share with its hub.
#[derive(Debug)]
struct Board {
    sender: SyncSender<Notice>,
    bell: Bell,
    started: Instant,
    /// The second since `started`, and how many were told in it: `second << 8 | count`.
    told: AtomicU64,
    /// Whether some watch has missed something. Rung for once, until the hub has told it.
    has_missed: AtomicBool,
}

impl Board {
    /// Whether one more may be told now.
    fn admits(&self, time: Instant) -> bool {
        let second = time.saturating_duration_since(self.started).as_secs();
        let next = |told: u64| match (told >> 8, told & 0xff) {
            (then, count) if then == second => {
                (count < DEVICE_EVENTS_MAX.into()).then_some(told.saturating_add(1))
            }
            _ => Some(second << 8 | 1),
        };
        self.told.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok()
    }
}

/// Tells the hub of one device.
#[derive(Debug)]
pub(crate) struct Watch {
    board: Arc<Board>,
    device: Arc<Name>,
    missed: AtomicU64,
    last: Mutex<Happening>,
}

impl Observer for Watch {
    fn notice(&self, what: Happening) {
        let time = Instant::now();
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = what;
        let notice = Notice { time, device: self.device.clone(), what };
        if self.board.admits(time) && self.board.sender.try_send(notice).is_ok() {
            return self.board.bell.ring();
        }
        self.missed.fetch_add(1, Ordering::Relaxed);
        if !self.board.has_missed.swap(true, Ordering::AcqRel) {
            self.board.bell.ring();
        }
    }
}

/// What was posted, and when.
type Post = (Instant, What);

/// Tells the hub, from another thread, what has happened.
#[derive(Debug)]
pub(crate) struct Poster {
    posts: Sender<Post>,
    board: Arc<Board>,
}

impl Poster {
    /// `what` happens now.
    pub(crate) fn post(&self, what: What) {
        // Without a hub nobody listens.
        if self.posts.send((Instant::now(), what)).is_ok() {
            self.board.bell.ring();
        }
    }
}

/// Hands each event to every sink.
#[derive(Debug)]
pub(crate) struct Hub {
    started: Instant,
    sinks: Vec<Sink>,
    /// The time of the last event: they are told in their order.
    last_us: u64,
    /// Once there are devices.
    devices: Option<Devices>,
}

/// The hub's end of the board.
#[derive(Debug)]
struct Devices {
    board: Arc<Board>,
    notices: Receiver<Notice>,
    /// From posters, who are few.
    posts: (Sender<Post>, Receiver<Post>),
    watches: Vec<Arc<Watch>>,
    /// When what was missed is told.
    due: Option<Instant>,
}

impl Hub {
    /// A hub whose clock starts at `started`.
    pub(crate) fn new(started: Instant) -> Self {
        Self { started, sinks: Vec::new(), last_us: 0, devices: None }
    }

    pub(crate) fn subscribe(&mut self, sink: Sink) {
        self.sinks.push(sink);
    }

    /// How many devices it is told of.
    pub(crate) fn watched(&self) -> usize {
        self.devices.as_ref().map_or(0, |devices| devices.watches.len())
    }

    /// Forgets the first `count` devices, because others have come; but not those called `kept`.
    pub(crate) fn forget_before(&mut self, count: usize, kept: Option<&str>) {
        if let Some(devices) = &mut self.devices {
            let mut index = 0_usize;
            devices.watches.retain(|watch| {
                index = index.saturating_add(1);
                index > count || kept == Some(watch.device.model)
            });
        }
    }

    /// Forgets all devices but the first `count`, which stay after all. If there were none, nothing is left open.
    pub(crate) fn forget_after(&mut self, count: usize) {
        match &mut self.devices {
            // Only a VM that is live has posters.
            Some(_) if count == 0 => self.devices = None,
            Some(devices) => devices.watches.truncate(count),
            None => {}
        }
    }

    /// Something that tells of a device from now on.
    pub(crate) fn watch(&mut self, model: &'static str, id: &str) -> std::io::Result<Arc<Watch>> {
        let devices = self.devices()?;
        let watch = Arc::new(Watch {
            board: devices.board.clone(),
            device: Arc::new(Name { model, id: id.to_owned() }),
            missed: AtomicU64::new(0),
            last: Mutex::new(Happening::Reset),
        });
        devices.watches.push(watch.clone());
        Ok(watch)
    }

    /// Something that tells from another thread what happens.
    pub(crate) fn poster(&mut self) -> std::io::Result<Poster> {
        let devices = self.devices()?;
        Ok(Poster { posts: devices.posts.0.clone(), board: devices.board.clone() })
    }

    fn devices(&mut self) -> std::io::Result<&mut Devices> {
        match &mut self.devices {
            Some(devices) => Ok(devices),
            none => {
                let (sender, notices) = sync_channel(DEVICE_EVENTS_MAX.into());
                let board = Arc::new(Board {
                    sender,
                    bell: Bell::new()?,
                    started: self.started,
                    told: AtomicU64::new(0),
                    has_missed: AtomicBool::new(false),
                });
                let (posts, watches) = (channel(), Vec::new());
                Ok(none.insert(Devices { board, notices, posts, watches, due: None }))
            }
        }
    }

    /// Readable when [`Self::heed`] has something to do.
    pub(crate) fn bell(&self) -> Option<BorrowedFd<'_>> {
        self.devices.as_ref().map(|devices| devices.board.bell.as_fd())
    }

    /// When [`Self::heed`] has something to do.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.devices.as_ref()?.due
    }

    /// Tells what devices have noticed, and what was posted.
    pub(crate) fn heed(&mut self) {
        let Some(devices) = &mut self.devices else { return };
        devices.board.bell.hush();
        let notices: Vec<Notice> = devices.notices.try_iter().collect();
        let now = Instant::now();
        if devices.due.is_none() && devices.board.has_missed.load(Ordering::Acquire) {
            devices.due = now.checked_add(MISSED_PERIOD);
        }
        let is_due = devices.due.is_some_and(|due| due <= now);
        let of_device = |Notice { time, device, what }| {
            (time, What::Device { device: Name::clone(&device), what })
        };
        let mut all: Vec<_> = notices.into_iter().map(of_device).collect();
        all.extend(devices.posts.1.try_iter());
        all.sort_by_key(|(time, _)| *time);
        for (time, what) in all {
            self.tell(time, what);
        }
        if is_due {
            self.tell_missed(now);
        }
    }

    fn tell_missed(&mut self, now: Instant) {
        let Some(devices) = &mut self.devices else { return };
        devices.due = None;
        // Before the counts: who misses something from here on says so again.
        devices.board.has_missed.store(false, Ordering::Release);
        let missed = devices.watches.iter().filter_map(|watch| {
            let count = watch.missed.swap(0, Ordering::Relaxed);
            let last = *watch.last.lock().unwrap_or_else(PoisonError::into_inner);
            let device = (*watch.device).clone();
            (count > 0).then_some(What::DeviceEventsMissed { device, count, last })
        });
        for what in missed.collect::<Vec<_>>() {
            self.tell(now, what);
        }
    }

    /// Tells `what`, which happens now, after all that has happened before.
    pub(crate) fn publish(&mut self, what: What) {
        self.heed();
        if matches!(what, What::Ended(_)) {
            self.tell_missed(Instant::now());
        }
        self.tell(Instant::now(), what);
    }

    /// Tells `what`, which happened at `time`, before what devices have noticed since.
    pub(crate) fn tell(&mut self, time: Instant, what: What) {
        let since = time.saturating_duration_since(self.started);
        let time_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX).max(self.last_us);
        self.last_us = time_us;
        let event = Event { time_us, what };
        log::info!("event: {:?}", event.what);
        self.sinks.retain_mut(|sink| (sink.0)(&event));
    }
}

#[cfg(test)]
#[expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that panics is a test that fails"
)]
mod tests {
    use super::*;

    /// A hub, and what it tells.
    fn hub() -> (Hub, Arc<Mutex<Vec<Event>>>) {
        let mut hub = Hub::new(Instant::now());
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = told.clone();
        hub.subscribe(Sink::new(move |event| {
            sink.lock().unwrap().push(event.clone());
            true
        }));
        (hub, told)
    }

    fn device(model: &'static str, id: &str) -> Name {
        Name { model, id: id.into() }
    }

    #[test]
    fn devices_are_told_of_in_their_order_and_before_the_end() {
        let (mut hub, told) = hub();
        let disk = hub.watch("drives", "root").unwrap();
        disk.notice(Happening::Activated);
        std::thread::spawn(move || disk.notice(Happening::HostGone)).join().unwrap();
        hub.publish(What::Ended(Ending::Killed));
        let told = told.lock().unwrap();
        let happened: Vec<_> = told.iter().map(|event| event.what.clone()).collect();
        let of = |what| What::Device { device: device("drives", "root"), what };
        let expected =
            [of(Happening::Activated), of(Happening::HostGone), What::Ended(Ending::Killed)];
        assert_eq!(happened, expected);
        assert!(told.is_sorted_by_key(|event| event.time_us));
        let json = serde_json::to_value(&told[0]).unwrap();
        assert_eq!((&json["event"], &json["model"]), (&"device".into(), &"drives".into()));
        assert_eq!((&json["id"], &json["what"]), (&"root".into(), &"activated".into()));
    }

    #[test]
    fn nothing_is_left_of_devices_that_never_were() {
        let (mut hub, told) = hub();
        hub.watch("drives", "root").unwrap().notice(Happening::Activated);
        hub.forget_after(0);
        assert!(hub.bell().is_none());
        hub.watch("drives", "root").unwrap();
        hub.watch("drives", "data").unwrap().notice(Happening::Activated);
        hub.forget_after(1);
        assert_eq!(hub.watched(), 1);
        hub.heed();
        assert_eq!(told.lock().unwrap().len(), 1);
    }

    #[test]
    fn what_another_thread_posts_rings_and_is_told_in_its_order() {
        let (mut hub, told) = hub();
        let disk = hub.watch("drives", "root").unwrap();
        let poster = hub.poster().unwrap();
        disk.notice(Happening::Activated);
        hub.devices.as_ref().unwrap().board.bell.hush();
        let created = What::SnapshotCreated {
            id: "07".into(),
            kind: SnapshotType::Full,
            took_us: 9,
            paused_us: 1,
            bytes: 4096,
        };
        let posted = created.clone();
        std::thread::spawn(move || poster.post(posted)).join().unwrap();
        assert!(hub.devices.as_ref().unwrap().board.bell.hush());
        disk.notice(Happening::Reset);
        hub.publish(What::Paused);
        let told = told.lock().unwrap();
        let happened: Vec<_> = told.iter().map(|event| event.what.clone()).collect();
        let of = |what| What::Device { device: device("drives", "root"), what };
        let expected = [of(Happening::Activated), created, of(Happening::Reset), What::Paused];
        assert_eq!(happened, expected);
        let json = serde_json::to_value(&told[1]).unwrap();
        assert_eq!((&json["event"], &json["kind"]), (&"snapshot_created".into(), &"Full".into()));
    }

    #[test]
    fn a_flood_is_told_of_as_a_count() {
        let (mut hub, told) = hub();
        let (flood, other) =
            (hub.watch("drives", "a").unwrap(), hub.watch("entropy", "entropy").unwrap());
        for _ in 0..100_000 {
            flood.notice(Happening::Reset);
            flood.notice(Happening::Activated);
        }
        other.notice(Happening::NeedsReset);
        hub.heed();
        assert!(hub.due().is_some());
        // The second may have changed meanwhile, more than once on a slow machine; the channel is full.
        assert_eq!(told.lock().unwrap().len(), usize::from(DEVICE_EVENTS_MAX));
        hub.publish(What::Ended(Ending::Killed));
        let told = told.lock().unwrap();
        let last: Vec<_> = told[DEVICE_EVENTS_MAX.into()..].iter().map(|e| &e.what).collect();
        let [flood, other, end] = &last[..] else { panic!("{last:?}") };
        let expected = What::DeviceEventsMissed {
            device: device("drives", "a"),
            count: 200_000 - u64::from(DEVICE_EVENTS_MAX),
            last: Happening::Activated,
        };
        assert_eq!(**flood, expected);
        let (device, last) = (device("entropy", "entropy"), Happening::NeedsReset);
        assert_eq!(**other, What::DeviceEventsMissed { device, count: 1, last });
        assert_eq!(**end, What::Ended(Ending::Killed));
        assert!(hub.due().is_none());
    }

    #[test]
    fn what_was_missed_rings_once_and_is_due() {
        let (mut hub, _) = hub();
        let watch = hub.watch("drives", "a").unwrap();
        for _ in 0..1000 {
            watch.notice(Happening::Reset);
        }
        hub.heed();
        assert!(!hub.devices.as_ref().unwrap().board.bell.hush());
        watch.notice(Happening::Reset);
        // Already due: nobody is woken for more of it, unless a new second has begun.
        let is_rung = hub.devices.as_ref().unwrap().board.bell.hush();
        assert!(!is_rung || hub.devices.as_ref().unwrap().notices.try_recv().is_ok());
        assert!(hub.due().unwrap() <= Instant::now() + MISSED_PERIOD);
    }
}
