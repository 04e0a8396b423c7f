//! virtio-rng (virtio 1.2, 5.4): fills the driver's buffers with the host's entropy.
use std::sync::Arc;

use event_manager::EventSet;
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::chain::Chain;
use super::model::{DeviceError, Env, Model, NoPatch, VirtioDevice};
use super::queue::{Served, VirtQueue, split};
use crate::counters;
use crate::io::{Retired, Source, Watch, Worker};
use crate::limiter::{Limiter, Limits, RateLimiter};
use crate::metrics::{CounterSet, Group};

/// Most bytes given to one request, however much room it has.
const MAX_BYTES: u32 = 64 << 10;
/// Bytes after which the other devices of the thread have their turn: some milliseconds' worth.
const TURN_BYTES: u32 = 1 << 20;

/// What the user says about it.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "EntropyDevice")]
pub struct Config {
    /// Limits on the entropy handed out.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// The group whose limits it shares. husk only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_group: Option<String>,
}

/// The control half.
#[derive(Debug)]
pub struct Rng {
    limits: Limits,
    counters: Arc<Counters>,
}

counters! {
    /// What is counted.
    struct Counters as "entropy" {
        /// Times the driver kicked the queue.
        entropy_event_count: Counter,
        /// Bytes given to the driver.
        entropy_bytes: Counter,
        /// Requests that got nothing.
        entropy_event_fails: Counter,
        /// Times a request had to wait because of a rate limit.
        entropy_rate_limiter_throttled: Counter,
        /// Times a rate limit let requests go on.
        rate_limiter_event_count: Counter,
    }
}

impl Model for Rng {
    const NAME: &'static str = "entropy";
    const OUTSIDE: &'static [&'static str] = &["rate_limiter", "rate_limit_group"];
    const ABOUT: &'static str = "Random numbers from the host";
    const METRICS: Group = Counters::GROUP;
    type Config = Config;
    type Patch = NoPatch;

    fn rate_limit_groups(config: &Config) -> Vec<(&'static str, &str)> {
        let group = config.rate_limit_group.as_deref();
        group.map(|id| ("rate_limit_group", id)).into_iter().collect()
    }

    fn check(_config: &Config) -> Result<(), DeviceError> {
        Ok(())
    }

    fn open(config: &Config, env: &Env) -> Result<Self, DeviceError> {
        let group = config.rate_limit_group.as_deref();
        let limits = env.limits(config.rate_limiter.as_ref(), "rate_limit_group", group)?;
        Ok(Self { limits, counters: Arc::default() })
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        4
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256]
    }

    fn activate(
        &mut self,
        queues: Vec<VirtQueue>,
        _features: u64,
        _saved: Option<&Value>,
    ) -> Result<Box<dyn Worker>, DeviceError> {
        let [requests] = split(queues)?;
        let limiter = self.limits.limiter()?;
        Ok(Box::new(RngWorker { requests, limiter, counters: self.counters.clone() }))
    }

    fn counters(&self) -> Arc<dyn CounterSet> {
        self.counters.clone()
    }
}

#[derive(Debug)]
struct RngWorker {
    requests: VirtQueue,
    limiter: Limiter,
    counters: Arc<Counters>,
}

const KICK: usize = 0;

impl Worker for RngWorker {
    fn sources(&self) -> Vec<Source<'_>> {
        let kick: Source<'_> = (self.requests.kick_fd(), EventSet::IN);
        [Some(kick), self.limiter.source()].into_iter().flatten().collect()
    }

    fn ready(&mut self, source: usize) -> Watch {
        let Self { requests, limiter, counters } = self;
        match source {
            KICK => counters.entropy_event_count().inc(),
            _ if limiter.has_fired() => counters.rate_limiter_event_count().inc(),
            _ => return Watch::Keep,
        }
        let mut budget = TURN_BYTES;
        requests.serve(|chain| {
            if budget == 0 {
                return Served::Later;
            }
            if !limiter.take(chain.writable().len().min(MAX_BYTES.into())) {
                counters.entropy_rate_limiter_throttled().inc();
                return Served::Later;
            }
            let written = fill(&chain);
            budget = budget.saturating_sub(written);
            counters.entropy_bytes().add(written.into());
            if written == 0 {
                counters.entropy_event_fails().inc();
            }
            Served::Used(written)
        });
        if budget == 0 {
            requests.kick_again();
        }
        limiter.settle();
        Watch::Keep
    }

    fn retire(self: Box<Self>) -> Retired {
        Retired { queues: vec![self.requests], state: Value::Null }
    }
}

/// Fills what `chain` has to write to, from its start; gives the bytes written.
fn fill(chain: &Chain<'_>) -> u32 {
    let mut room = chain.writable();
    let mut pool = [0; 1024];
    let mut written: u32 = 0;
    while written < MAX_BYTES && !room.is_empty() {
        let left = u64::from(MAX_BYTES.saturating_sub(written)).min(room.len());
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(pool.len());
        let Some(wanted) = pool.get_mut(..want) else { break };
        // Never blocks: the host's pool was initialised long before it could run a VM.
        let got = match getrandom(&mut *wanted, GetRandomFlags::NONBLOCK) {
            Err(Errno::INTR) => continue,
            Err(e) => {
                log::warn!("entropy: the host gives none: {e}");
                break;
            }
            Ok(got) => got,
        };
        if room.write(wanted.get(..got).unwrap_or_default()).is_err() {
            break;
        }
        written = written.saturating_add(u32::try_from(got).unwrap_or(0));
    }
    written
}
