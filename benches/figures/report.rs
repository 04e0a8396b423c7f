//! What was measured, and how it is shown: a table for people, JSON for programs.
use std::fmt::Write;
use std::time::Duration;

/// A set of samples of one thing, sorted.
#[derive(Clone)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn new(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }

    /// Times in milliseconds.
    pub(crate) fn millis(times: &[Duration]) -> Self {
        Self::new(times.iter().map(|t| t.as_secs_f64() * 1e3).collect())
    }

    /// Times in microseconds.
    pub(crate) fn micros(times: &[Duration]) -> Self {
        Self::new(times.iter().map(|t| t.as_secs_f64() * 1e6).collect())
    }

    pub(crate) fn median(&self) -> f64 {
        self.at(50)
    }

    /// The sample that `percent` of all do not exceed.
    pub(crate) fn at(&self, percent: usize) -> f64 {
        let last = self.0.len().saturating_sub(1);
        self.0.get(last * percent / 100).copied().unwrap_or(f64::NAN)
    }

    fn show(&self) -> String {
        match self.0.as_slice() {
            [one] => number(*one),
            _ => format!(
                "{} ({} .. {} .. {})",
                number(self.median()),
                number(self.at(0)),
                number(self.at(90)),
                number(self.at(99))
            ),
        }
    }
}

/// What a figure is to be.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    /// It informs.
    None,
    AtMost(f64),
    AtLeast(f64),
}

/// One line of the table.
struct Figure {
    name: String,
    unit: &'static str,
    samples: Samples,
    target: Target,
}

impl Figure {
    fn is_met(&self) -> Option<bool> {
        match self.target {
            Target::None => None,
            Target::AtMost(most) => Some(self.samples.median() <= most),
            Target::AtLeast(least) => Some(self.samples.median() >= least),
        }
    }
}

/// All figures, in the order in which they were measured.
#[derive(Default)]
pub(crate) struct Report(Vec<Figure>);

impl Report {
    /// Adds a figure that informs.
    pub(crate) fn add(&mut self, name: impl Into<String>, unit: &'static str, samples: Samples) {
        self.add_with_target(name, unit, samples, Target::None);
    }

    /// Adds a figure whose median has a target.
    pub(crate) fn add_with_target(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        samples: Samples,
        target: Target,
    ) {
        self.0.push(Figure { name: name.into(), unit, samples, target });
    }

    /// Adds a figure that is one number.
    pub(crate) fn add_one(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        value: f64,
        target: Target,
    ) {
        self.add_with_target(name, unit, Samples::new(vec![value]), target);
    }

    pub(crate) fn print(&self) {
        let row = |name: &str, value: &str, unit: &str, target: &str, verdict: &str| {
            println!("{name:<52} {value:<38} {unit:<8} {target:<10} {verdict}");
        };
        row("figure", "median (min .. p90 .. p99)", "unit", "target", "");
        for figure in &self.0 {
            let target = match figure.target {
                Target::None => String::new(),
                Target::AtMost(most) => format!("<= {}", number(most)),
                Target::AtLeast(least) => format!(">= {}", number(least)),
            };
            let verdict = figure.is_met().map_or("", |is_met| if is_met { "pass" } else { "MISS" });
            row(&figure.name, &figure.samples.show(), figure.unit, &target, verdict);
        }
    }

    pub(crate) fn to_json(&self) -> String {
        let mut json = String::from("[");
        for (i, figure) in self.0.iter().enumerate() {
            let samples = &figure.samples;
            // Writing to a String does not fail; names have nothing to escape.
            let _ = write!(
                json,
                "{}\n  {{\"name\": \"{}\", \"unit\": \"{}\", \"samples\": {}, \"median\": {}, \
                 \"min\": {}, \"p90\": {}, \"p99\": {}, \"max\": {}",
                if i == 0 { "" } else { "," },
                figure.name,
                figure.unit,
                samples.0.len(),
                samples.median(),
                samples.at(0),
                samples.at(90),
                samples.at(99),
                samples.at(100),
            );
            let _ = match figure.target {
                Target::None => Ok(()),
                Target::AtMost(most) => write!(json, ", \"at_most\": {most}"),
                Target::AtLeast(least) => write!(json, ", \"at_least\": {least}"),
            };
            if let Some(is_met) = figure.is_met() {
                let _ = write!(json, ", \"met\": {is_met}");
            }
            json.push('}');
        }
        json.push_str("\n]\n");
        json
    }
}

/// Three significant digits or so.
fn number(n: f64) -> String {
    match n.abs() {
        a if a >= 100.0 || n == n.trunc() => format!("{n:.0}"),
        a if a >= 10.0 => format!("{n:.1}"),
        _ => format!("{n:.2}"),
    }
}
