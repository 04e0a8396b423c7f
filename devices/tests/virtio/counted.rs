//! Every counter that is declared counts: the other tests make each do so.
use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use devices::metrics::Group;
use devices::virtio::{MODELS, notifier};

use crate::driver::COUNTED_FILE;

/// These count failures of the host that no test here can bring about.
const NEED_A_FAILING_HOST: [&str; 4] = [
    "memory_hotplug unplug_discard_fails",
    "pmem execute_fails",
    "vsock tx_flush_fails",
    "vsock muxer_event_fails",
];

/// Runs the other tests in a process of their own, and looks what has counted there.
#[test]
fn every_declared_counter_counts() {
    let file = std::env::temp_dir().join(format!("husk-counted-{}", std::process::id()));
    // Whether they pass is theirs to say.
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["--skip", "every_declared_counter_counts", "--quiet"])
        .env(COUNTED_FILE, &file)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let run = run.unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    let _ = std::fs::remove_file(&file);
    let counted: BTreeSet<&str> = text.lines().collect();
    let groups = MODELS.iter().map(|row| row.metrics).chain([notifier::Counters::GROUP]);
    let names = |Group { name, declared }: Group| {
        declared.iter().map(move |d| format!("{name} {}", d.name))
    };
    let is_idle = |name: &String| {
        !counted.contains(name.as_str()) && !NEED_A_FAILING_HOST.contains(&name.as_str())
    };
    let idle: Vec<String> = groups.flat_map(names).filter(is_idle).collect();
    assert!(idle.is_empty(), "no test makes these count ({run}): {idle:#?}");
}
