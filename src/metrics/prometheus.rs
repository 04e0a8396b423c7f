//! Everything that is counted, as Prometheus reads it: text exposition format 0.0.4.
//!
//! | declared | here |
//! |---|---|
//! | counter `read_count` of `block` | `husk_block_read_total` |
//! | gauge `pause_vm` of `latencies_us` | `husk_latencies_us_pause_vm` |
//! | latency `read_agg` of `block` | summary `husk_block_read_seconds`, gauges `husk_block_read_seconds_min`, `_max` |
//!
//! Values are since the VM's start, and stay when the guest reboots. Devices have labels `model` and
//! `id`, vCPUs `vcpu`.
use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::time::Duration;

use devices::metrics::{Kind, Value};

use super::{One, Source};
use crate::api::RequestCounters;
use crate::boot::BootPhases;

/// What media type this is.
pub(crate) const MIME: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Who says this.
pub(super) struct Process<'a> {
    pub(super) id: &'a str,
    pub(super) uptime: Duration,
    pub(super) boot: Option<&'a BootPhases>,
}

/// The text.
pub(super) fn write(
    process: &Process<'_>,
    sources: &[Source],
    requests: Option<&RequestCounters>,
) -> String {
    let mut page = Page::default();
    let info = [("id", process.id), ("version", env!("CARGO_PKG_VERSION"))];
    page.add(Shape::gauge("husk_info", "Which VM, and which husk"), &labels(&info), 1);
    let uptime = seconds(process.uptime.as_nanos());
    page.add(Shape::gauge("husk_uptime_seconds", "Time since husk started"), "", uptime);
    for (phase, us) in process.boot.into_iter().flat_map(BootPhases::named) {
        let shape = Shape::gauge("husk_boot_seconds", "How long a phase of the last start took");
        page.add(shape, &labels(&[("phase", phase)]), seconds(u128::from(us) * 1000));
    }
    for source in sources {
        let vcpu;
        let labels = match &source.one {
            Some(One::Device { model, id }) => labels(&[("model", model), ("id", id)]),
            Some(One::Vcpu(index)) => {
                vcpu = index.to_string();
                labels(&[("vcpu", &vcpu)])
            }
            None => String::new(),
        };
        for (declared, value) in source.read() {
            let (group, name) = (source.set.group().name, declared.name);
            page.add_value(group, name, &declared.help(), &labels, value);
        }
    }
    for row in requests.into_iter().flat_map(RequestCounters::rows) {
        let labels = labels(&[("method", row.method.name()), ("path", &row.path)]);
        let requests = Shape::counter("husk_api_requests_total", "Requests");
        page.add(requests, &labels, row.count.get());
        let failures = Shape::counter("husk_api_request_failures_total", "Requests refused");
        page.add(failures, &labels, row.fails.get());
    }
    page.finish()
}

/// What a metric is, as its first two lines say.
struct Shape<'a> {
    name: &'a str,
    help: &'a str,
    kind: &'static str,
}

impl<'a> Shape<'a> {
    fn counter(name: &'a str, help: &'a str) -> Self {
        Self { name, help, kind: "counter" }
    }

    fn gauge(name: &'a str, help: &'a str) -> Self {
        Self { name, help, kind: "gauge" }
    }
}

/// Metrics by name: all samples of one must stand together.
#[derive(Default)]
struct Page(BTreeMap<String, String>);

impl Page {
    fn add(&mut self, shape: Shape<'_>, labels: &str, value: impl Display) {
        self.add_suffixed(shape, "", labels, value);
    }

    fn add_suffixed(&mut self, shape: Shape<'_>, suffix: &str, labels: &str, value: impl Display) {
        let Shape { name, help, kind } = shape;
        let lines = self.0.entry(name.to_owned()).or_insert_with(|| {
            let help = help.replace('\\', "\\\\").replace('\n', "\\n");
            format!("# HELP {name} {help}\n# TYPE {name} {kind}\n")
        });
        // Writing to a String does not fail.
        let _ = writeln!(lines, "{name}{suffix}{labels} {value}");
    }

    fn add_value(&mut self, group: &str, name: &str, help: &str, labels: &str, value: Value) {
        match value {
            Value::Counter(count) => {
                let name = self::name(group, name, Kind::Counter);
                self.add(Shape::counter(&name, help), labels, count);
            }
            Value::Gauge(value) => {
                let name = self::name(group, name, Kind::Gauge);
                self.add(Shape::gauge(&name, help), labels, value);
            }
            Value::Latency(durations) => {
                let name = self::name(group, name, Kind::Latency);
                let shape = || Shape { name: &name, help, kind: "summary" };
                self.add_suffixed(shape(), "_sum", labels, seconds(durations.sum_ns.into()));
                self.add_suffixed(shape(), "_count", labels, durations.count);
                for (suffix, which, ns) in [
                    ("min", "the shortest", durations.min_ns),
                    ("max", "the longest", durations.max_ns),
                ] {
                    let (name, help) = (format!("{name}_{suffix}"), format!("{help}: {which}"));
                    self.add(Shape::gauge(&name, &help), labels, seconds(ns.into()));
                }
            }
        }
    }

    fn finish(self) -> String {
        self.0.into_values().collect()
    }
}

/// What `declared` of `group` is called here.
pub(super) fn name(group: &str, declared: &str, kind: Kind) -> String {
    let (suffix, ending) = match kind {
        Kind::Counter => ("_count", "_total"),
        Kind::Gauge => ("", ""),
        Kind::Latency => ("_agg", "_seconds"),
    };
    let stem = declared.strip_suffix(suffix).unwrap_or(declared);
    format!("husk_{group}_{stem}{ending}")
}

/// `{name="value",...}`.
fn labels(pairs: &[(&str, &str)]) -> String {
    let escaped =
        |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let pairs: Vec<_> =
        pairs.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    format!("{{{}}}", pairs.join(","))
}

/// Exactly, as no floating-point number is.
fn seconds(ns: u128) -> String {
    format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
}
