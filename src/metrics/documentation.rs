//! The tables of docs/metrics.md are what is declared.
use std::collections::BTreeSet;
use std::fmt::Write as _;

use devices::legacy::serial;
use devices::metrics::{Group, Kind};
use devices::mmds::Mmds;
use devices::virtio::{MODELS, notifier};

use super::*;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
const BEGIN: &str =
    "<!-- What is declared. To write it anew: HUSK_WRITE_DOCS=1 cargo test documentation -->\n";
const END: &str = "<!-- End of what is declared. -->\n";

/// All there is, with what it is about.
fn groups() -> Vec<(&'static str, Group)> {
    let mut groups = vec![("Every virtio device", notifier::Counters::GROUP)];
    for row in MODELS {
        groups.push((row.about, row.metrics));
        groups.extend(row.other_metrics.iter().map(|group| ("", *group)));
    }
    groups.push(("The serial port", serial::Counters::GROUP));
    let machine = MachineCounters::new(1);
    let metrics = Metrics::new("t".into(), Instant::now(), Arc::default(), Mmds::new(0).counters());
    for source in machine.sources().chain(metrics.sources(&[])) {
        groups.push(("", *source.set.group()));
    }
    groups
}

fn tables() -> String {
    let mut text = String::new();
    let mut counted = BTreeSet::new();
    let mut last = "";
    for (about, group) in groups() {
        counted.extend(group.declared.iter().map(|declared| (group.name, declared.name)));
        if group.name != last {
            let about = if about.is_empty() { String::new() } else { format!(": {about}") };
            let _ = write!(
                text,
                "\n### `{}`{about}\n\n| Key | Prometheus | |\n|---|---|---|\n",
                group.name
            );
        }
        last = group.name;
        for declared in group.declared {
            let (name, help) = (declared.name, declared.help());
            let exposed = prometheus::name(group.name, name, declared.kind);
            let kind = match declared.kind {
                Kind::Counter => "",
                Kind::Gauge => " (as it is)",
                Kind::Latency => " (microseconds)",
            };
            let _ = writeln!(text, "| `{name}` | `{exposed}` | {help}{kind} |");
        }
    }
    let is_counted = |group: &str, name: &str| {
        let is_device = MODELS.iter().any(|row| row.metrics.name == group);
        counted.contains(&(group, name)) || is_device && counted.contains(&("virtio", name))
    };
    text.push_str("\n### Always zero\n\n");
    for (group, names) in line::NEVER {
        let counted: Vec<_> = names.iter().filter(|name| is_counted(group, name)).collect();
        assert!(counted.is_empty(), "{group} has {counted:?}, which are not always zero any more");
        let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
        let _ = writeln!(text, "- `{group}`: {}", names.join(" "));
    }
    text.push('\n');
    text
}

#[test]
fn documentation_lists_what_is_declared() {
    let document = std::fs::read_to_string(DOCUMENT).unwrap();
    let (before, rest) = document.split_once(BEGIN).expect("the tables' beginning");
    let (written, after) = rest.split_once(END).expect("the tables' end");
    let tables = tables();
    if std::env::var_os("HUSK_WRITE_DOCS").is_some() {
        std::fs::write(DOCUMENT, [before, BEGIN, &tables, END, after].concat()).unwrap();
        return;
    }
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (written, tables) = (lines(written), lines(&tables));
    let (stale, missing): (Vec<_>, Vec<_>) =
        (written.difference(&tables).collect(), tables.difference(&written).collect());
    assert!(
        stale.is_empty() && missing.is_empty(),
        "docs/metrics.md is not what is declared; HUSK_WRITE_DOCS=1 cargo test documentation writes \
         it.\nToo much: {stale:#?}\nMissing: {missing:#?}"
    );
}

#[test]
fn no_two_values_have_one_name() {
    let mut keys = BTreeSet::new();
    let mut exposed = BTreeSet::new();
    for (_, group) in groups() {
        for declared in group.declared {
            let (group, name) = (group.name, declared.name);
            assert!(keys.insert((group, name)), "{group}.{name} is declared twice");
            let name = prometheus::name(group, name, declared.kind);
            assert!(exposed.insert(name.clone()), "{name} is two things");
            let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            assert!(name.chars().all(is_name), "{name} is no name");
        }
    }
    // What is counted of every device is shown with what each counts.
    for row in MODELS {
        for group in row.other_metrics.iter().chain([&row.metrics]) {
            for name in group.declared.iter().map(|declared| declared.name) {
                assert!(!keys.contains(&("virtio", name)), "{}: {name}", group.name);
            }
        }
    }
}
