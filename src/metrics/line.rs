//! One line of Firecracker's metrics: JSON with a key for each kind of thing that counts.
//!
//! Counters, and the sums of durations, are what came since the last line; the rest is as it is. A
//! device of which there may be several is under its kind and id (`block_rootfs`); under the kind alone
//! (`block`) is the sum. Every key is always there, also of devices that the VM does not have.
use std::borrow::Cow;
use std::collections::BTreeMap;

use devices::metrics::{Group, Kind, Value};
use devices::virtio::{MODELS, notifier};
use serde::ser::{Serialize, SerializeMap, Serializer};

use super::{One, Source};
use crate::api::RequestCounters;

/// What a line has besides what was counted.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) id: Option<String>,
    pub(super) properties: Option<BTreeMap<String, String>>,
}

/// What the last line was about.
#[derive(Debug, Default)]
pub(super) struct Previous(BTreeMap<String, u64>);

/// What Firecracker counts and husk does not, because it cannot happen here or is not there yet. Zero,
/// so that whoever expects the keys finds them.
pub(super) const NEVER: &[(&str, &[&str])] = &[
    ("block", &["no_avail_buffer", "io_engine_throttled_events", "remaining_reqs_count"]),
    ("entropy", &["host_rng_fails"]),
    (
        "net",
        &[
            "mac_address_updates",
            "no_tx_avail_buffer",
            "tx_partial_reads",
            "tx_remaining_reqs_count",
            "tx_spoofed_mac_count",
        ],
    ),
    ("seccomp", &["num_faults"]),
    ("signals", &["sigbus", "sigsegv", "sigxfsz", "sigxcpu", "sigpipe", "sighup", "sigill"]),
    ("vmm", &["panic_count"]),
    (
        "vsock",
        &[
            "rx_queue_event_fails",
            "tx_queue_event_fails",
            "ev_queue_event_fails",
            "conn_event_fails",
            "killq_resync",
        ],
    ),
    ("interrupts", &["config_updates"]),
];

/// The line, with its newline; and what the next must know of it.
pub(super) fn write(
    header: &Header,
    sources: &[Source],
    requests: Option<&RequestCounters>,
    previous: &Previous,
) -> (String, Previous) {
    let mut now = Previous::default();
    let mut groups = Groups::default();
    for row in MODELS {
        groups.declare(row.metrics.name, &row.metrics);
        groups.declare(row.metrics.name, &notifier::Counters::GROUP);
    }
    groups.declare("vcpu", &crate::vcpu::Counters::GROUP);
    groups.declare("i8042", &devices::legacy::i8042::Counters::GROUP);
    groups.declare("uart", &devices::legacy::serial::Counters::GROUP);
    groups.declare("interrupts", &super::Interrupts::GROUP);
    for source in sources {
        let which = match &source.one {
            Some(One::Device { id, .. }) => id.clone(),
            Some(One::Vcpu(index)) => index.to_string(),
            None => String::new(),
        };
        let own = source.own_key();
        for (declared, value) in source.read() {
            let key = format!("{} {which} {}", source.key, declared.name);
            let field = Field::of(value, |total| now.since(previous, key, total));
            groups.add(source.key, declared.name, field);
            if let Some(own) = &own {
                groups.add(own.clone(), declared.name, field);
            }
        }
    }
    for row in requests.into_iter().flat_map(RequestCounters::rows) {
        let group = format!("{}_api_requests", row.method.name().to_ascii_lowercase());
        for (kind, counter) in [("count", &row.count), ("fails", &row.fails)] {
            let key = format!("{group} {} {kind}", row.path);
            let count = now.since(previous, key, counter.get());
            groups.add(group.clone(), format!("{}_{kind}", row.key), Field::Number(count));
        }
    }
    let own = sources.iter().filter_map(|source| Some((source.key, source.own_key()?)));
    let own: Vec<(&str, Name)> = own.map(|(key, own)| (key, own.into())).collect();
    for (group, names) in NEVER {
        let alone = own.iter().filter(|(key, _)| key == group).map(|(_, own)| own.clone());
        for key in alone.chain([(*group).into()]) {
            for name in *names {
                groups.add(key.clone(), *name, Field::zero(Kind::Counter));
            }
        }
    }
    let line = Line { header, groups: &groups };
    let mut text = serde_json::to_string(&line).expect("a map with strings for keys");
    text.push('\n');
    (text, now)
}

impl Source {
    /// The key under which it is shown alone, if there may be several of its kind.
    fn own_key(&self) -> Option<String> {
        let Some(One::Device { model, id }) = &self.one else { return None };
        let is_many = MODELS.iter().any(|row| row.name == *model && row.is_many);
        is_many.then(|| format!("{}_{id}", self.key))
    }
}

impl Previous {
    /// Notes that `key` is at `total`; what came since the last line. What has begun anew, a device
    /// in the place of one that was removed, began at zero.
    fn since(&mut self, last: &Self, key: String, total: u64) -> u64 {
        let before = last.0.get(&key).copied().unwrap_or(0);
        self.0.insert(key, total);
        total.checked_sub(before).unwrap_or(total)
    }
}

/// A value as Firecracker shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
enum Field {
    Number(u64),
    Durations { min_us: u64, max_us: u64, sum_us: u64 },
}

impl Field {
    fn of(value: Value, since: impl FnOnce(u64) -> u64) -> Self {
        match value {
            Value::Counter(count) => Self::Number(since(count)),
            Value::Gauge(value) => Self::Number(value),
            Value::Latency(durations) => Self::Durations {
                min_us: durations.min_ns / 1000,
                max_us: durations.max_ns / 1000,
                sum_us: since(durations.sum_ns / 1000),
            },
        }
    }

    fn zero(kind: Kind) -> Self {
        match kind {
            Kind::Counter | Kind::Gauge => Self::Number(0),
            Kind::Latency => Self::Durations { min_us: 0, max_us: 0, sum_us: 0 },
        }
    }

    /// The sum of what two of a kind have counted.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Number(a), Self::Number(b)) => Self::Number(a.saturating_add(b)),
            (
                Self::Durations { min_us: min_a, max_us: max_a, sum_us: sum_a },
                Self::Durations { min_us: min_b, max_us: max_b, sum_us: sum_b },
            ) => Self::Durations {
                // Zero is that there was none.
                min_us: if min_a == 0 || (min_b != 0 && min_b < min_a) { min_b } else { min_a },
                max_us: max_a.max(max_b),
                sum_us: sum_a.saturating_add(sum_b),
            },
            (first, _) => first,
        }
    }
}

type Name = Cow<'static, str>;

/// Fields by group.
#[derive(Debug, Default)]
struct Groups(BTreeMap<Name, BTreeMap<Name, Field>>);

impl Groups {
    fn add(&mut self, group: impl Into<Name>, name: impl Into<Name>, field: Field) {
        let fields = self.0.entry(group.into()).or_default();
        fields.entry(name.into()).and_modify(|sum| *sum = sum.and(field)).or_insert(field);
    }

    fn declare(&mut self, key: &'static str, group: &Group) {
        for declared in group.declared {
            self.add(key, declared.name, Field::zero(declared.kind));
        }
    }
}

/// All of it, in Firecracker's order: the time comes first.
struct Line<'a> {
    header: &'a Header,
    groups: &'a Groups,
}

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("utc_timestamp_ms", &(time.tv_sec * 1000 + time.tv_nsec / 1_000_000))?;
        if let Some(id) = &self.header.id {
            map.serialize_entry("id", id)?;
        }
        if let Some(properties) = &self.header.properties {
            map.serialize_entry("properties", properties)?;
        }
        for (name, fields) in &self.groups.0 {
            map.serialize_entry(name, fields)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use devices::metrics::CounterSet;
    use serde_json::{Value as Json, json};

    use super::*;

    devices::counters! {
        /// What a lamp counts.
        struct Lamp as "lamp" {
            /// Times it was switched.
            switch_count: Counter,
            /// How bright it is.
            brightness: Gauge,
            /// How long switching took.
            switch_agg: Latency,
        }
    }

    fn source(model: &'static str, id: &str, lamp: &Arc<Lamp>) -> Source {
        let set: Arc<dyn CounterSet> = lamp.clone();
        Source { key: "lamp", one: Some(One::Device { model, id: id.into() }), set }
    }

    fn plain() -> Header {
        Header { id: None, properties: None }
    }

    fn line(sources: &[Source], previous: &mut Previous) -> Json {
        let (text, now) = write(&plain(), sources, None, previous);
        *previous = now;
        assert_eq!((text.matches('\n').count(), text.ends_with("}\n")), (1, true));
        assert!(text.starts_with("{\"utc_timestamp_ms\":"), "{text}");
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn counters_are_what_came_since_the_last_line() {
        let (a, b) = (Arc::new(Lamp::default()), Arc::new(Lamp::default()));
        // Drives: of these there are several.
        let sources = [source("drives", "a", &a), source("drives", "b", &b)];
        let mut previous = Previous::default();
        let then = Instant::now() - Duration::from_millis(5);
        a.switch_count().add(3);
        a.brightness().set(7);
        a.switch_agg().since(then);
        b.switch_count().add(4);
        let first = line(&sources, &mut previous);
        assert_eq!(first["lamp"]["switch_count"], 7);
        assert_eq!(
            (&first["lamp_a"]["switch_count"], &first["lamp_a"]["brightness"]),
            (&json!(3), &json!(7))
        );
        let took = &first["lamp"]["switch_agg"];
        assert!(took["min_us"].as_u64().unwrap() >= 5000, "{took}");
        assert_eq!((&took["min_us"], &took["sum_us"]), (&took["max_us"], &took["max_us"]));
        b.switch_count().inc();
        let second = line(&sources, &mut previous);
        assert_eq!(
            second["lamp"],
            json!({
                "switch_count": 1, "brightness": 7,
                "switch_agg": {"min_us": took["min_us"], "max_us": took["max_us"], "sum_us": 0},
            })
        );
        // One that was removed, and another in its place.
        let sources =
            [source("drives", "a", &Arc::new(Lamp::default())), source("drives", "b", &b)];
        assert_eq!(line(&sources, &mut previous)["lamp"]["switch_count"], 0);
    }

    #[test]
    fn a_line_that_was_lost_is_made_up_for() {
        let lamp = Arc::new(Lamp::default());
        let sources = [source("entropy", "entropy", &lamp)];
        let previous = Previous::default();
        lamp.switch_count().add(3);
        // Not taken: what it told is not told.
        let _ = write(&plain(), &sources, None, &previous);
        lamp.switch_count().add(2);
        let (text, _) = write(&plain(), &sources, None, &previous);
        let line: Json = serde_json::from_str(&text).unwrap();
        assert_eq!(line["lamp"]["switch_count"], 5);
        // There can be only one: no key of its own.
        assert!(line.get("lamp_entropy").is_none());
    }

    #[test]
    fn every_key_is_there_without_a_machine() {
        let line = line(&[], &mut Previous::default());
        for row in MODELS {
            let group = &line[row.metrics.name];
            assert_eq!(group["activate_fails"], 0, "{}", row.name);
            for declared in row.metrics.declared {
                assert!(group.get(declared.name).is_some(), "{} {}", row.name, declared.name);
            }
        }
        assert_eq!(line["seccomp"], json!({"num_faults": 0}));
        assert_eq!(line["vcpu"]["exit_io_in_agg"], json!({"min_us": 0, "max_us": 0, "sum_us": 0}));
        assert_eq!(line["memory_hotplug"]["plug_agg"]["sum_us"], 0);
    }

    #[test]
    fn says_whose_it_is_if_asked() {
        let properties = BTreeMap::from([("customer".to_owned(), "\"7\"\n".to_owned())]);
        let header = Header { id: Some("vm-1".into()), properties: Some(properties) };
        let (text, _) = write(&header, &[], None, &Previous::default());
        let line: Json = serde_json::from_str(&text).unwrap();
        assert_eq!(line["id"], "vm-1");
        assert_eq!(line["properties"], json!({"customer": "\"7\"\n"}));
        assert_eq!(text.matches('\n').count(), 1);
    }
}
