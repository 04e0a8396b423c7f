//! From an image to children that run: all of them or none, whoever dies on the way.
//!
//! ```text
//!   VMM                     zygote         child
//!    ├── order ───────────────►├── fork ────►│ restores; its guest stands still
//!    │◄── report: there, or why not ─────────┤
//!    │◄── report: ended ───────┤             ✗ if it is killed meanwhile
//!    ├── go: a byte for each ───────────────►│ runs
//!    └── or the end of it ──────────────────►│ ends
//! ```
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::backend::unix::SocketFile;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::time::Timespec;

use super::batch::{Absence, Arrival, DIE, LIVE, Report};
use super::params::Child;
use super::zygote::{Live, Order, Zygote, pair};
use super::{Batch, ForkError, Household, Spec};
use crate::signals::Held;
use crate::snapshot::Image;

/// How long children may take to be there, all together. What they open may be on a file system that
/// hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long children that are not to live may take to end before that is no longer waited for.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// More than a report has.
const REPORT_MAX: usize = 16 << 10;

/// Where the children of a process come from. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Nursery {
    /// What children have of this process.
    pub(crate) household: Household,
    zygote: Arc<Zygote>,
}

/// Children to be.
#[derive(Debug)]
pub(crate) struct Birth {
    pub(crate) batch: Batch,
    pub(crate) specs: Vec<Spec>,
    pub(crate) image: Image,
}

impl Nursery {
    /// Of a process with one thread, whose API listens at `socket` and which holds signals back.
    pub(crate) fn begin(
        household: Household,
        socket: &SocketFile,
        held: &Held,
        live: Live,
    ) -> io::Result<Self> {
        Ok(Self { household, zygote: Arc::new(Zygote::begin(socket, held, live)?) })
    }

    /// Ends what makes children, though threads that wait for some may still have a clone of this.
    pub(crate) fn end(&self) {
        self.zygote.end();
    }

    fn ask(&self, order: &Order) -> Result<(), ForkError> {
        self.zygote.ask(order).map_err(|e| match Errno::from_io_error(&e) {
            Some(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => ForkError::Barren,
            _ => ForkError::Process(e),
        })
    }
}

impl Birth {
    /// Makes the children; waits until they run. `may_live` is asked when all of them are there.
    pub(crate) fn deliver(
        self,
        nursery: &Nursery,
        may_live: impl FnOnce() -> bool,
    ) -> Result<Vec<Child>, ForkError> {
        let Self { mut batch, specs, image } = self;
        let process = ForkError::Process;
        let (reports, theirs) = pair().map_err(process)?;
        let (hear, go) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| process(e.into()))?;
        let layers = batch.write_layers().map_err(process)?;
        let children = batch.write_specs(&specs).map_err(process)?;
        let file = batch.to_file(&image.memory.extents).map_err(process)?;
        let memory = image.memory.file.clone();
        let order = Order { batch: file, children, memory, reports: theirs, go: hear, layers };
        nursery.ask(&order)?;
        // From here on the children alone have these ends.
        drop(order);
        let count = specs.len();
        let arrivals = await_all(&reports, count)
            .and_then(|all| if may_live() { Ok(all) } else { Err(ForkError::Ended) });
        let word = if arrivals.is_ok() { LIVE } else { DIE };
        // A pipe has room for all of them. It may be that nobody is there to read.
        let told = rustix::io::retry_on_intr(|| rustix::io::write(&go, &vec![word; count]));
        let arrivals = arrivals.inspect_err(|_| await_end(&reports))?;
        told.map_err(|e| process(e.into()))?;
        let children = arrivals.into_iter().zip(specs).map(|(arrival, spec)| Child {
            id: spec.id,
            pid: arrival.pid,
            api_sock: spec.api_sock.unwrap_or_default(),
            serial_path: arrival.serial_path,
        });
        Ok(children.collect())
    }
}

/// Waits until no child is there any more that could say something, but not for long.
fn await_end(reports: &OwnedFd) {
    let deadline = Instant::now() + LAST_WORDS;
    let mut buffer = vec![0; REPORT_MAX];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(timeout) = Timespec::try_from(left) else { return };
        match poll(&mut [PollFd::from_borrowed_fd(reports.as_fd(), PollFlags::IN)], Some(&timeout))
        {
            Ok(0) => return log::warn!("children that are not to live are still there"),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(e) => return log::warn!("cannot wait for children to end: {e}"),
        }
        match recv(reports, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return,
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return log::debug!("children have ended: {e}"),
        }
    }
}

/// Waits until `count` children are there, in their order.
fn await_all(reports: &OwnedFd, count: usize) -> Result<Vec<Arrival>, ForkError> {
    let deadline = Instant::now() + PATIENCE;
    let mut arrived: Vec<Option<Arrival>> = (0..count).map(|_| None).collect();
    let mut buffer = vec![0; REPORT_MAX];
    let mut ended = 0;
    loop {
        let missing = arrived.iter().filter(|arrival| arrival.is_none()).count();
        // All that has been said, before it is judged: one that was there may have ended, and others with it.
        let len = match recv(reports, &mut buffer[..], RecvFlags::DONTWAIT) {
            // All who could say something have ended, or never were.
            Ok((_, 0)) | Err(Errno::CONNRESET) => {
                let missing = if missing == 0 { count } else { missing };
                return Err(ForkError::Lost { missing, count });
            }
            Ok((_, len)) => len,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) if ended > 0 => {
                return Err(ForkError::Lost { missing: ended, count });
            }
            Err(Errno::AGAIN) if missing == 0 => {
                return Ok(arrived.into_iter().flatten().collect());
            }
            Err(Errno::AGAIN) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let timeout = Timespec::try_from(left)
                    .map_err(|e| ForkError::Process(io::Error::other(e)))?;
                let mut fds = [PollFd::from_borrowed_fd(reports.as_fd(), PollFlags::IN)];
                match poll(&mut fds, Some(&timeout)) {
                    Ok(0) => return Err(ForkError::Late { missing, count }),
                    Ok(_) | Err(Errno::INTR) => continue,
                    Err(e) => return Err(ForkError::Process(e.into())),
                }
            }
            Err(e) => return Err(ForkError::Process(e.into())),
        };
        let report: Report = serde_json::from_slice(&buffer[..len])
            .map_err(|e| ForkError::Process(io::Error::other(e)))?;
        let number = report.index;
        match (report.result, arrived.get_mut(number)) {
            (Ok(arrival), Some(place)) => *place = Some(arrival),
            (Err(Absence::Refused(why)), _) => return Err(ForkError::Child { number, why }),
            (Err(Absence::Ended), _) => ended += 1,
            (Ok(_), None) => {}
        }
    }
}
