//! Everything that is counted of a VM, from where it is counted to those who want to know.
//!
//! ```text
//!  devices, vCPUs, API, log ──Source──► line.rs        Firecracker's JSON ──► output.rs ──► file, FIFO
//!  (counters! in their files)    └────► prometheus.rs  text ──► GET /metrics
//! ```
//!
//! Firecracker's counters say what came since the last line, Prometheus's what came in all; nobody
//! who counts knows of either.
#[cfg(test)]
mod documentation;
mod line;
mod output;
mod prometheus;

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use devices::legacy::i8042;
use devices::metrics::{CounterSet, Declared, Gauge, Value};

use self::line::Previous;
use self::output::Output;
pub(crate) use self::prometheus::MIME;
use crate::api::{RequestCounters, Routes};
use crate::boot::BootPhases;
use crate::config::MetricsConfig;
use crate::error::Refusal;
use crate::snapshot::SnapshotType;
use crate::vcpu;

/// How often a line is written unasked.
const PERIOD: std::time::Duration = std::time::Duration::from_secs(60);

devices::counters! {
    /// How long the user waited, in microseconds: for the last request of each kind.
    pub(crate) struct Latencies as "latencies_us" {
        /// Microseconds it took to pause, as the API's client sees it.
        pause_vm: Gauge,
        /// Microseconds it took to go on, as the API's client sees it.
        resume_vm: Gauge,
        /// Microseconds it took to write a snapshot of all memory, as the API's client sees it.
        full_create_snapshot: Gauge,
        /// Microseconds it took to write a snapshot of what has changed, as the API's client sees it.
        diff_create_snapshot: Gauge,
        /// Microseconds it took to restore a VM, as the API's client sees it.
        load_snapshot: Gauge,
        /// Microseconds it took to write a snapshot of all memory.
        vmm_full_create_snapshot: Gauge,
        /// Microseconds it took to write a snapshot of what has changed.
        vmm_diff_create_snapshot: Gauge,
        /// Microseconds it took to go back to a snapshot.
        rewind: Gauge,
        /// Microseconds it took to restore a VM.
        vmm_load_snapshot: Gauge,
        /// Microseconds it took to stop vCPUs and devices.
        vmm_pause_vm: Gauge,
        /// Microseconds it took to let devices and vCPUs go on.
        vmm_resume_vm: Gauge,
    }
}

impl Latencies {
    /// Of the last snapshot of a kind, as its client sees it.
    pub(crate) fn asked_for_snapshot(&self, kind: SnapshotType) -> &Gauge {
        match kind {
            SnapshotType::Full => self.full_create_snapshot(),
            SnapshotType::Diff => self.diff_create_snapshot(),
        }
    }

    /// Of the last snapshot of a kind.
    pub(crate) fn wrote_snapshot(&self, kind: SnapshotType) -> &Gauge {
        match kind {
            SnapshotType::Full => self.vmm_full_create_snapshot(),
            SnapshotType::Diff => self.vmm_diff_create_snapshot(),
        }
    }
}

devices::counters! {
    /// What is counted of the API as a whole.
    pub(crate) struct ApiServer as "api_server" {
        /// Microseconds from the start of the process until it was ready to be configured.
        process_startup_time_us: Gauge,
        /// Microseconds of processor time until then, that of the jailer included.
        process_startup_time_cpu_us: Gauge,
        /// Requests for what no row of the API's table is.
        unknown_request_count: Counter,
    }
}

devices::counters! {
    /// What is counted of clients that should be changed.
    pub(crate) struct Deprecated as "deprecated_api" {
        /// Requests that used something deprecated.
        deprecated_http_api_calls: Counter,
    }
}

devices::counters! {
    /// What is counted of interrupts.
    pub(crate) struct Interrupts as "interrupts" {
        /// Interrupts of virtio devices.
        triggers: Counter,
    }
}

/// What is counted of a VM whether or not there is a machine yet.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) api_server: Arc<ApiServer>,
    pub(crate) deprecated: Arc<Deprecated>,
    pub(crate) latencies: Arc<Latencies>,
    /// Made when they are first wanted: by the API's server, or for a file.
    pub(crate) requests: OnceLock<RequestCounters>,
}

impl Counters {
    /// What is counted of requests, for each of the API's table.
    fn requests(&self) -> &RequestCounters {
        let routes = || Routes::new(crate::config::sections().collect());
        self.requests.get_or_init(|| RequestCounters::new(&routes()))
    }
}

/// What is counted of a machine's parts that are made anew at a reboot.
#[derive(Clone, Debug, Default)]
pub(crate) struct MachineCounters {
    pub(crate) interrupts: Arc<Interrupts>,
    pub(crate) i8042: Arc<i8042::Counters>,
    pub(crate) vcpus: Vec<Arc<vcpu::Counters>>,
}

impl MachineCounters {
    /// For a machine with so many vCPUs.
    pub(crate) fn new(vcpus: u8) -> Self {
        let vcpus = (0..vcpus).map(|_| Arc::default()).collect();
        Self { vcpus, ..Self::default() }
    }

    /// All of them.
    pub(crate) fn sources(&self) -> impl Iterator<Item = Source> {
        let vcpus = self.vcpus.iter().enumerate().map(|(index, set)| Source {
            one: Some(One::Vcpu(index)),
            ..Source::only(set.clone())
        });
        [Source::only(self.interrupts.clone()), Source::only(self.i8042.clone())]
            .into_iter()
            .chain(vcpus)
    }
}

/// Who counts.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// Its key in Firecracker's line.
    pub(crate) key: &'static str,
    /// Which of several.
    pub(crate) one: Option<One>,
    pub(crate) set: Arc<dyn CounterSet>,
}

/// One of several.
#[derive(Clone, Debug)]
pub(crate) enum One {
    /// A device, which Firecracker's line shows also on its own.
    Device { model: &'static str, id: String },
    /// A vCPU.
    Vcpu(usize),
}

impl Source {
    /// Whether the other is where the same things are counted.
    pub(crate) fn is_same_set(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.set, &other.set)
    }

    /// A source that is the only one of its kind.
    pub(crate) fn only(set: Arc<dyn CounterSet>) -> Self {
        Self { key: set.group().name, one: None, set }
    }

    fn read(&self) -> impl Iterator<Item = (&'static Declared, Value)> + use<> {
        self.set.group().declared.iter().zip(self.set.values())
    }
}

/// Writes what is counted, for those who asked.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// The VM's id.
    id: String,
    started: Instant,
    counters: Arc<Counters>,
    flushes: Arc<output::Counters>,
    mmds: Arc<dyn CounterSet>,
    file: Option<File>,
    /// What counted and is gone, until a line has told of it.
    departed: Vec<Source>,
}

/// Where lines go, and what they begin with.
#[derive(Debug)]
pub(crate) struct File {
    output: Output,
    header: line::Header,
    previous: Previous,
    /// When the next line is to be written unasked, once the guest runs.
    due: Option<Instant>,
}

impl Metrics {
    pub(crate) fn new(
        id: String,
        started: Instant,
        counters: Arc<Counters>,
        mmds: Arc<dyn CounterSet>,
    ) -> Self {
        Self {
            id,
            started,
            counters,
            flushes: Arc::default(),
            mmds,
            file: None,
            departed: Vec::new(),
        }
    }

    /// Opens the file that lines are to go to, if there is to be one; [`Self::adopt`] makes it that.
    pub(crate) fn open(&self, config: Option<&MetricsConfig>) -> Result<Option<File>, Refusal> {
        let Some(config) = config else { return Ok(None) };
        // Their keys are there without an API, too.
        self.counters.requests();
        let output = Output::open(&config.metrics_path).map_err(Refusal::Metrics)?;
        let header = line::Header {
            id: config.emit_id.then(|| self.id.clone()),
            properties: config.properties.clone(),
        };
        Ok(Some(File { output, header, previous: Previous::default(), due: None }))
    }

    /// From now on lines go to `file`, if there is one.
    pub(crate) fn adopt(&mut self, file: Option<File>) {
        self.file = file.or(self.file.take());
    }

    /// What `sources` have counted since the last line is told by the next, though they are gone.
    pub(crate) fn see_off(&mut self, sources: impl IntoIterator<Item = Source>) {
        if self.file.is_some() {
            self.departed.extend(sources);
        }
    }

    /// Whether there is a file already: it is the only one.
    pub(crate) fn is_open(&self) -> bool {
        self.file.is_some()
    }

    /// From `now` on there is a line now and then.
    pub(crate) fn start(&mut self, now: Instant, machine: &[Source]) {
        if let Some(file) = &mut self.file {
            file.due = Some(now);
        }
        self.tick(now, machine);
    }

    /// When [`Self::tick`] has something to do.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.file.as_ref()?.due
    }

    /// Writes a line if it is time to.
    pub(crate) fn tick(&mut self, now: Instant, machine: &[Source]) {
        match &mut self.file {
            Some(File { due: Some(due), .. }) if *due <= now => *due = now + PERIOD,
            _ => return,
        }
        // Counted, and told with the next that somebody asks for.
        if let Err(e) = self.write(machine) {
            log::debug!("metrics: {e}");
        }
    }

    /// Writes a line because somebody asked; nothing if nobody said where to.
    pub(crate) fn flush(&mut self, machine: &[Source]) -> Result<(), Refusal> {
        self.write(machine).map_err(|e| {
            self.flushes.metrics_fails().inc();
            Refusal::MetricsLost(e)
        })
    }

    /// Writes the last line.
    pub(crate) fn finish(&mut self, machine: &[Source]) {
        if self.file.is_some()
            && let Err(e) = self.write(machine)
        {
            log::warn!("the last metrics are lost: {e}");
        }
    }

    fn write(&mut self, machine: &[Source]) -> Result<(), String> {
        let mut sources = self.sources(machine);
        let Some(file) = &mut self.file else { return Ok(()) };
        sources.extend(self.departed.iter().cloned());
        let (line, previous) =
            line::write(&file.header, &sources, self.counters.requests.get(), &file.previous);
        file.output.write(line.as_bytes()).inspect_err(|_| {
            self.flushes.missed_metrics_count().inc();
        })?;
        // What a line that was lost would have told is told by the next.
        file.previous = previous;
        self.departed.clear();
        Ok(())
    }

    /// Everything as Prometheus reads it.
    pub(crate) fn text(&self, machine: &[Source], boot: Option<&BootPhases>) -> String {
        let process = prometheus::Process { id: &self.id, uptime: self.started.elapsed(), boot };
        prometheus::write(&process, &self.sources(machine), self.counters.requests.get())
    }

    fn sources(&self, machine: &[Source]) -> Vec<Source> {
        let counters = &self.counters;
        let own: [Arc<dyn CounterSet>; 6] = [
            counters.api_server.clone(),
            counters.deprecated.clone(),
            counters.latencies.clone(),
            crate::logger::counters().clone(),
            self.flushes.clone(),
            self.mmds.clone(),
        ];
        own.into_iter().map(Source::only).chain(machine.iter().cloned()).collect()
    }
}

/// Microseconds since `start`.
pub(crate) fn micros_since(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::Value as Json;

    use super::*;

    #[test]
    fn lines_come_every_minute_while_the_guest_runs_and_at_the_end() {
        let path = std::env::temp_dir().join(format!("husk-minutes-{}", std::process::id()));
        let counters = Arc::new(Counters::default());
        let mmds: Arc<dyn CounterSet> = counters.deprecated.clone();
        let began = Instant::now();
        let mut metrics = Metrics::new("t".into(), began, counters.clone(), mmds);
        let config = MetricsConfig::new(&path);
        let file = metrics.open(Some(&config)).unwrap();
        metrics.adopt(file);
        // What was counted between this line and the one before it.
        let unknown = || -> Vec<u64> {
            let text = std::fs::read_to_string(&path).unwrap();
            let lines = text.lines().map(|line| serde_json::from_str::<Json>(line).unwrap());
            lines.map(|l| l["api_server"]["unknown_request_count"].as_u64().unwrap()).collect()
        };
        let count = || counters.api_server.unknown_request_count().inc();

        // Before the start nothing is due, however late it is.
        count();
        metrics.tick(began + 2 * PERIOD, &[]);
        assert_eq!((metrics.due(), unknown()), (None, vec![]));
        metrics.start(began, &[]);
        assert_eq!((metrics.due(), unknown()), (Some(began + PERIOD), vec![1]));
        // Woken for something else, a moment before it is time.
        count();
        metrics.tick(began + PERIOD - Duration::from_nanos(1), &[]);
        assert_eq!(unknown(), [1]);
        metrics.tick(began + PERIOD, &[]);
        assert_eq!((metrics.due(), unknown()), (Some(began + 2 * PERIOD), vec![1, 1]));
        // One that somebody asks for does not put off the next; one that is late is written once.
        metrics.flush(&[]).unwrap();
        count();
        count();
        let late = began + 5 * PERIOD;
        metrics.tick(late, &[]);
        assert_eq!((metrics.due(), unknown()), (Some(late + PERIOD), vec![1, 1, 0, 2]));
        count();
        metrics.finish(&[]);
        assert_eq!(unknown(), [1, 1, 0, 2, 1]);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_a_removed_device_counted_is_told_once() {
        let path = std::env::temp_dir().join(format!("husk-departed-{}", std::process::id()));
        let counters = Arc::new(Counters::default());
        let mmds: Arc<dyn CounterSet> = counters.deprecated.clone();
        let mut metrics = Metrics::new("t".into(), Instant::now(), counters.clone(), mmds);
        metrics.adopt(metrics.open(Some(&MetricsConfig::new(&path))).unwrap());
        let device = Arc::new(Interrupts::default());
        let one = Some(One::Device { model: "drives", id: "a".into() });
        let source = Source { key: "block", one, set: device.clone() };
        device.triggers().add(2);
        metrics.flush(std::slice::from_ref(&source)).unwrap();
        device.triggers().add(3);
        metrics.see_off([source]);
        metrics.flush(&[]).unwrap();
        metrics.flush(&[]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Json> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let told = |key| lines.iter().map(|l| l[key]["triggers"].as_u64()).collect::<Vec<_>>();
        assert_eq!(told("block_a"), [Some(2), Some(3), None]);
        assert_eq!(told("block"), [Some(2), Some(3), None]);
        // Nobody else has asked for it: requests have their keys without an API.
        assert_eq!(lines[0]["put_api_requests"]["actions_count"], 0);
        std::fs::remove_file(path).unwrap();
    }
}
