//! virtio-vsock (virtio 1.2, 5.10): streams between the guest and Unix sockets of the host. This file
//! is what the driver and the user see; `worker` moves packets between the rings and
//! [`crate::backend::vsock`], which has the streams.
mod worker;

use std::borrow::Cow;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::worker::VsockWorker;
use super::model::{DeviceError, Env, Model, NoPatch, VirtioDevice};
use super::queue::{VirtQueue, split};
use crate::backend::unix::{ListenError, Listener, SocketName};
use crate::backend::vsock::{Counters, Muxer, MuxerError};
use crate::io::Worker;
use crate::metrics::{CounterSet, Group};

/// The lowest address a guest may have; those below are taken (virtio 1.2, 5.10.4).
const MIN_GUEST_CID: u32 = 3;
/// "Any address" to the sockets of Linux, so nobody's.
const ANY_CID: u32 = u32::MAX;
/// VIRTIO_VSOCK_F_STREAM (5.10.3).
const F_STREAM: u64 = 1 << 0;
/// Receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [256; 3];
/// What a snapshot keeps: the port of the next connection that the host asks for.
const SAVED_PORT: &str = "next_port";
/// In what a worker leaves: whether the driver has yet to hear that its connections are gone.
const SAVED_MOVED: &str = "has_moved";

/// What the user says about it.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Vsock")]
pub struct Config {
    /// The guest's address, 3 to 4294967294.
    #[schemars(range(min = 3, max = 4_294_967_294_u32))]
    pub guest_cid: u32,
    /// The Unix socket by which the host reaches the guest. Where the guest reaches port N of the
    /// host is this path, an underscore and N.
    pub uds_path: PathBuf,
    /// Deprecated; means nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("deprecated" = true))]
    pub vsock_id: Option<String>,
}

impl Config {
    /// A guest with this address, and the socket that leads to it.
    pub fn new(guest_cid: u32, uds_path: impl Into<PathBuf>) -> Self {
        Self { guest_cid, uds_path: uds_path.into(), vsock_id: None }
    }

    fn check_cid(&self) -> Result<(), DeviceError> {
        if (MIN_GUEST_CID..ANY_CID).contains(&self.guest_cid) {
            return Ok(());
        }
        let range = format!("{MIN_GUEST_CID} to {}", ANY_CID.wrapping_sub(1));
        Err(DeviceError::field("guest_cid", format!("{} is not in {range}", self.guest_cid)))
    }

    fn refused(&self, e: ListenError) -> DeviceError {
        let path = self.uds_path.display();
        match e {
            ListenError::Host { doing, source }
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                DeviceError::field("uds_path", format!("{path}: cannot {doing}: {source}"))
            }
            ListenError::Host { doing, source } => {
                DeviceError::host(format!("uds_path: {path}: cannot {doing}"))(source)
            }
            e @ ListenError::TooLong { .. } => {
                DeviceError::field("uds_path", format!("{path}: {e}"))
            }
            // The path is good; it is the host that has something there.
            e => {
                DeviceError::host(format!("uds_path: {path}"))(std::io::Error::other(e.to_string()))
            }
        }
    }
}

/// Where the host's side is while no worker has it.
type Home = Arc<Mutex<Option<Muxer>>>;

/// The control half.
#[derive(Debug)]
pub struct Vsock {
    space: [u8; 8],
    home: Home,
    /// Whether the guest has had its driver up in this process, so that connections it knows of are
    /// those that are there.
    is_known: bool,
    /// Of the socket on the host. Here and not with the muxer, as a thread that runs workers may remove no files.
    _name: SocketName,
    counters: Arc<Counters>,
}

impl Model for Vsock {
    const NAME: &'static str = "vsock";
    const IGNORES_REST: bool = true;
    const DEPRECATED: &'static [&'static str] = &["vsock_id"];
    const OUTSIDE: &'static [&'static str] = &["uds_path", "guest_cid"];
    const ABOUT: &'static str = "Streams between the guest and Unix sockets of the host";
    const METRICS: Group = Counters::GROUP;
    type Config = Config;
    type Patch = NoPatch;

    fn check(config: &Config) -> Result<(), DeviceError> {
        config.check_cid()?;
        Listener::check(&config.uds_path).map_err(|e| config.refused(e))
    }

    fn listens_at(config: &Config) -> Option<&Path> {
        Some(&config.uds_path)
    }

    fn open(config: &Config, env: &Env) -> Result<Self, DeviceError> {
        config.check_cid()?;
        let counters = Arc::<Counters>::default();
        let connector = env.start_connector()?;
        let muxer = Muxer::bind(config.guest_cid, &config.uds_path, connector, counters.clone());
        let (muxer, name) = muxer.map_err(|e| match e {
            MuxerError::Listen(e) => config.refused(e),
            MuxerError::Host(e) => DeviceError::host("cannot watch streams")(e),
        })?;
        Ok(Self {
            space: u64::from(config.guest_cid).to_le_bytes(),
            home: Arc::new(Mutex::new(Some(muxer))),
            is_known: false,
            _name: name,
            counters,
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        19
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn config_space(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.space)
    }

    fn activate(
        &mut self,
        queues: Vec<VirtQueue>,
        _features: u64,
        saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError> {
        let rings = split(queues)?;
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        // A worker that ended in some other way than by being retired took it along.
        let Some(mut muxer) = home.take() else { return Err(DeviceError::Removed) };
        let was_known = std::mem::replace(&mut self.is_known, true);
        if let Some(port) = saved.and_then(|saved| saved[SAVED_PORT].as_u64())
            && !was_known
        {
            muxer.seek_port(u32::try_from(port).unwrap_or(0));
        }
        if saved.is_none() || !was_known {
            muxer.reset();
        }
        // The driver was up elsewhere: its connections are there, or nowhere (5.10.6.7.1). Or it was not told so before
        // the device was paused.
        let is_untold = |saved: &Value| saved.get(SAVED_MOVED).is_some_and(|moved| *moved == true);
        let has_moved = saved.is_some_and(|saved| !was_known || is_untold(saved));
        let counters = self.counters.clone();
        Ok(Box::new(VsockWorker::new(rings, muxer, self.home.clone(), has_moved, counters)))
    }

    fn reset(&mut self) {
        self.is_known = false;
        if let Some(muxer) = &mut *self.home.lock().unwrap_or_else(PoisonError::into_inner) {
            muxer.reset();
        }
    }

    fn counters(&self) -> Arc<dyn CounterSet> {
        self.counters.clone()
    }
}

/// What a worker leaves for [`Vsock::activate`].
fn saved(muxer: &Muxer, has_moved: bool) -> Value {
    json!({ SAVED_PORT: muxer.next_port(), SAVED_MOVED: has_moved })
}
