//! What devices and the VMM count, declared once: [`counters!`](crate::counters) makes the storage,
//! the names and the help texts of one declaration. Who writes them out, and how, is not known here.
//!
//! ```
//! devices::counters! {
//!     /// What a lamp counts.
//!     struct Counters as "lamp" {
//!         /// Times it was switched.
//!         switch_count: Counter,
//!         /// Whether it is on.
//!         is_on: Gauge,
//!         /// How long switching took.
//!         switch_agg: Latency,
//!     }
//! }
//! let counters = Counters::default();
//! counters.switch_agg().time(|| counters.is_on().set(1));
//! counters.switch_count().inc();
//! ```
//!
//! What nothing counts does not compile, so that nobody trusts a value that is always zero.
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A count that only grows. Cheap enough for every request: one relaxed addition, no lock.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A value that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// It is `value` now.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Does `f`; the value is how long it took, in microseconds.
    pub fn time<T>(&self, f: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = f();
        self.set(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
        result
    }

    /// The value last set.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long something took: how often, in all, at least and at most. Two looks at the clock and
/// two relaxed additions a time.
#[derive(Debug)]
pub struct Latency {
    count: AtomicU64,
    sum_ns: AtomicU64,
    min_ns: AtomicU64,
    max_ns: AtomicU64,
}

impl Default for Latency {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self { count: zero(), sum_ns: zero(), min_ns: AtomicU64::new(u64::MAX), max_ns: zero() }
    }
}

impl Latency {
    /// Does `f`, and counts how long it took.
    pub fn time<T>(&self, f: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = f();
        self.since(start);
        result
    }

    /// Counts what has taken since `start`.
    pub fn since(&self, start: Instant) {
        let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.count.fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
        // Looked at first: writing is rare, and a line that is only read can be shared.
        if ns < self.min_ns.load(Ordering::Relaxed) {
            self.min_ns.fetch_min(ns, Ordering::Relaxed);
        }
        if ns > self.max_ns.load(Ordering::Relaxed) {
            self.max_ns.fetch_max(ns, Ordering::Relaxed);
        }
    }

    /// What was counted so far.
    pub fn get(&self) -> Durations {
        let load = |of: &AtomicU64| of.load(Ordering::Relaxed);
        let count = load(&self.count);
        let min_ns = if count == 0 { 0 } else { load(&self.min_ns) };
        Durations { count, sum_ns: load(&self.sum_ns), min_ns, max_ns: load(&self.max_ns) }
    }
}

/// What a [`Latency`] has counted. All zero if there was nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Durations {
    /// How often.
    pub count: u64,
    /// In all, nanoseconds.
    pub sum_ns: u64,
    /// The shortest, nanoseconds.
    pub min_ns: u64,
    /// The longest, nanoseconds.
    pub max_ns: u64,
}

/// How a declared value behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows: [`Counter`].
    Counter,
    /// Goes up and down: [`Gauge`].
    Gauge,
    /// Durations: [`Latency`].
    Latency,
}

/// What was read of a declared value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Of a [`Counter`].
    Counter(u64),
    /// Of a [`Gauge`].
    Gauge(u64),
    /// Of a [`Latency`].
    Latency(Durations),
}

impl Value {
    /// The count or the value; of durations, how many there were.
    pub fn amount(self) -> u64 {
        match self {
            Self::Counter(amount) | Self::Gauge(amount) => amount,
            Self::Latency(durations) => durations.count,
        }
    }
}

/// What can be a field of a declaration.
pub trait Metric: Debug + Default + Send + Sync {
    /// How it behaves.
    const KIND: Kind;
    /// What it is now.
    fn value(&self) -> Value;
}

impl Metric for Counter {
    const KIND: Kind = Kind::Counter;
    fn value(&self) -> Value {
        Value::Counter(self.get())
    }
}

impl Metric for Gauge {
    const KIND: Kind = Kind::Gauge;
    fn value(&self) -> Value {
        Value::Gauge(self.get())
    }
}

impl Metric for Latency {
    const KIND: Kind = Kind::Latency;
    fn value(&self) -> Value {
        Value::Latency(self.get())
    }
}

/// One declared value.
#[derive(Clone, Copy, Debug)]
pub struct Declared {
    /// Its name in Firecracker's metrics, or one in their style.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// The lines of its doc comment.
    pub help: &'static [&'static str],
}

impl Declared {
    /// The doc comment in one line, without the full stop.
    pub fn help(&self) -> String {
        let lines: Vec<_> = self.help.iter().map(|line| line.trim()).collect();
        lines.join(" ").trim_end_matches('.').to_owned()
    }
}

/// A declaration: all that one kind of thing counts.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Firecracker's name for the kind of thing: "block". The values of a device are under this
    /// and its id.
    pub name: &'static str,
    /// What is counted, in the order of the declaration.
    pub declared: &'static [Declared],
}

/// The counters of one thing. Implemented by [`counters!`](crate::counters).
pub trait CounterSet: Debug + Send + Sync {
    /// What they are.
    fn group(&self) -> &'static Group;
    /// What they are now, in the order of the declaration.
    fn values(&self) -> Vec<Value>;
}

/// What has nothing to count.
impl CounterSet for () {
    fn group(&self) -> &'static Group {
        &Group { name: "", declared: &[] }
    }
    fn values(&self) -> Vec<Value> {
        Vec::new()
    }
}

/// Declares what something counts: a struct that is a [`CounterSet`], with its `GROUP`, and a
/// method that gives each [`Counter`], [`Gauge`] or [`Latency`] to whoever counts. The names are
/// those that people see, their doc comments the help; each must have one.
#[macro_export]
macro_rules! counters {
    ($(#[$about:meta])* $vis:vis struct $set:ident as $group:literal {
        $($(#[doc = $help:literal])+ $name:ident: $kind:ident,)+
    }) => {
        $(#[$about])*
        #[derive(Debug, Default)]
        $vis struct $set {
            $($name: $crate::metrics::$kind,)+
        }

        #[deny(dead_code, reason = "a counter that nothing increments tells lies")]
        impl $set {
            $($(#[doc = $help])+
            #[inline]
            pub(crate) fn $name(&self) -> &$crate::metrics::$kind {
                &self.$name
            })+
        }

        impl $set {
            /// What is counted.
            $vis const GROUP: $crate::metrics::Group = $crate::metrics::Group {
                name: $group,
                declared: &[$($crate::metrics::Declared {
                    name: stringify!($name),
                    kind: <$crate::metrics::$kind as $crate::metrics::Metric>::KIND,
                    help: &[$($help),+],
                }),+],
            };
        }

        impl $crate::metrics::CounterSet for $set {
            fn group(&self) -> &'static $crate::metrics::Group {
                const { &$set::GROUP }
            }

            fn values(&self) -> Vec<$crate::metrics::Value> {
                vec![$($crate::metrics::Metric::value(&self.$name)),+]
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    crate::counters! {
        /// What a lamp counts.
        struct Lamp as "lamp" {
            /// Times it was
            /// switched.
            switch_count: Counter,
            /// Whether it is on.
            is_on: Gauge,
            /// How long switching took.
            switch_agg: Latency,
        }
    }

    #[test]
    fn a_declaration_is_all_there_is() {
        let lamp = Lamp::default();
        lamp.switch_count().add(3);
        lamp.switch_count().inc();
        lamp.is_on().set(1);
        assert_eq!(lamp.switch_agg().get(), Durations::default());
        let set: &dyn CounterSet = &lamp;
        let group = set.group();
        assert_eq!(group.name, "lamp");
        let names: Vec<_> = group.declared.iter().map(|d| (d.name, d.kind)).collect();
        let expected = [
            ("switch_count", Kind::Counter),
            ("is_on", Kind::Gauge),
            ("switch_agg", Kind::Latency),
        ];
        assert_eq!(names, expected);
        assert_eq!(group.declared[0].help(), "Times it was switched");
        let none = Value::Latency(Durations::default());
        assert_eq!(set.values(), [Value::Counter(4), Value::Gauge(1), none]);
    }

    #[test]
    fn durations_add_up() {
        let latency = Latency::default();
        let now = Instant::now();
        for ms in [20, 10, 30] {
            latency.since(now - Duration::from_millis(ms));
        }
        let Durations { count, sum_ns, min_ns, max_ns } = latency.get();
        let ms = |ns: u64| ns / 1_000_000;
        assert_eq!(count, 3);
        assert!(ms(sum_ns) >= 60 && ms(min_ns) >= 10 && ms(max_ns) >= 30);
        assert!(min_ns < max_ns && min_ns.saturating_add(max_ns) < sum_ns);
        assert_eq!(latency.time(|| 7), 7);
        assert!(latency.get().min_ns < min_ns);
    }
}
