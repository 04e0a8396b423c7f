//! How long it takes to save a VM, to restore it, to put it back, and what its first work after that takes.
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::api::Client;
use crate::report::{Report, Samples, Target};
use crate::vmm::{Running, husk};
use crate::{Bench, Result, guest};

/// RAM of the guests that are restored, in MiB: the time must not follow it.
const SIZES_MIB: [u64; 2] = [128, 8192];
const SNAPSHOTS: usize = 15;
const REWINDS: usize = 50;
const DIFFS: usize = 50;
/// Pages that a guest writes before it is put back, or saved again.
const WRITTEN_PAGES: u32 = 1000;
/// Pages that a restored guest writes first.
const FIRST_PAGES: u32 = 8000;
/// `mov al, '!'; out 0x80, al; hlt`: what the floor's guest goes on with.
const SAY: &[u8] = &[0xb0, b'!', 0xe6, 0x80, 0xf4];

/// A guest with an API, which has said that it is there.
fn start(bench: &Bench, kernel: &Path, mib: u64) -> Result<(Running, Client)> {
    let socket = bench.scratch.join("saved.sock");
    let mut command = Command::new(husk());
    command.arg("run").arg("--kernel").arg(kernel).arg("--api-sock").arg(&socket);
    command.args(["--memory", &mib.to_string()]);
    let mut process = Running::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
    process.await_byte()?;
    Ok((process, Client::connect(&socket)?))
}

fn create(client: &mut Client, directory: &Path) -> Result<Duration> {
    let body = format!("{{\"directory\": \"{}\"}}", directory.display());
    client.call("PUT", "/snapshot/create", &body)
}

/// A snapshot of `kernel`, made while it runs, after it has worked `rounds` times.
fn saved(bench: &Bench, name: &str, kernel: &Path, mib: u64, rounds: u32) -> Result<PathBuf> {
    let directory = bench.scratch.join(name);
    let (mut process, mut client) = start(bench, kernel, mib)?;
    for _ in 0..rounds {
        process.send_byte()?;
        process.await_byte()?;
    }
    create(&mut client, &directory)?;
    process.kill()?;
    process.reap()?;
    Ok(directory)
}

fn restore(directory: &Path) -> Command {
    let mut command = Command::new(husk());
    command.arg("restore").arg(directory).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// Process start to the first instruction after a restore, beside a floor that maps a file and sets registers.
pub(crate) fn one(bench: &Bench, report: &mut Report) -> Result<()> {
    let kernel = guest::chatter(bench)?;
    let mut medians = Vec::new();
    for mib in SIZES_MIB {
        let directory = saved(bench, &format!("chatter-{mib}"), &kernel, mib, 0)?;
        let image = bench.scratch.join(format!("floor-{mib}"));
        let file = File::create(&image)?;
        file.set_len(mib << 20)?;
        file.write_all_at(SAY, 0x1000)?;
        let floor = || -> Result<Command> {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("floor").arg("--image").arg(&image).args(["--mem", &mib.to_string()]);
            command.args(["--echo", "stay"]).stdin(Stdio::null()).stdout(Stdio::piped());
            Ok(command)
        };
        let mut times = [Vec::new(), Vec::new()];
        // The first run pages the binaries in.
        for run in 0..=bench.runs {
            let mut both = [(0, restore(&directory)), (1, floor()?)];
            if run % 2 == 1 {
                both.reverse();
            }
            for (who, mut command) in both {
                let mut process = Running::start(&mut command)?;
                process.await_byte()?;
                if run > 0 {
                    times[who].push(process.started.elapsed());
                }
            }
        }
        let [husk, floor] = times.map(|times| Samples::millis(&times));
        let (ratio, least) = (husk.median() / floor.median(), husk.at(0) / floor.at(0));
        medians.push(husk.median());
        report.add(format!("restore of {mib} MiB to first instruction, husk"), "ms", husk);
        report.add(format!("restore of {mib} MiB to first instruction, floor"), "ms", floor);
        let name = format!("restore of {mib} MiB, husk / floor");
        report.add_one(name, "ratio", ratio, Target::AtMost(1.5));
        report.add_one("the same of the fastest runs", "ratio", least, Target::None);
    }
    if let [small, large] = medians[..] {
        report.add_one("restore, 8 GiB / 128 MiB", "ratio", large / small, Target::AtMost(1.1));
    }
    Ok(())
}

/// Snapshots of an idle guest with 1 GiB, on disk when they are answered; and the longest that a guest that writes
/// all the time is silent while one is made.
pub(crate) fn snapshot(bench: &Bench, report: &mut Report) -> Result<()> {
    let (process, mut client) = start(bench, &guest::idle(bench)?, 1024)?;
    let directory = bench.scratch.join("idle");
    let times =
        (0..SNAPSHOTS).map(|_| create(&mut client, &directory)).collect::<Result<Vec<_>>>()?;
    let target = Target::AtMost(50.0);
    report.add_with_target(
        "snapshot of an idle 1 GiB guest",
        "ms",
        Samples::millis(&times),
        target,
    );
    drop((process, client));
    let (mut process, mut client) = start(bench, &guest::chatter(bench)?, 1024)?;
    let mut gaps = Vec::new();
    for _ in 0..SNAPSHOTS {
        let directory = directory.clone();
        let making = std::thread::spawn(move || {
            let made = create(&mut client, &directory).map_err(|e| e.to_string());
            made.map(|_| client)
        });
        let (mut gap, mut last) = (Duration::ZERO, Instant::now());
        while !making.is_finished() {
            process.await_byte()?;
            gap = gap.max(last.elapsed());
            last = Instant::now();
        }
        client = making.join().map_err(|_| "the client panicked")??;
        gaps.push(gap);
    }
    let name = "longest silence of a guest while it is saved";
    report.add_with_target(name, "ms", Samples::millis(&gaps), Target::AtMost(10.0));
    Ok(())
}

/// Putting a VM back whose guest has written 1,000 pages, as the API's client sees it.
pub(crate) fn rewind(bench: &Bench, report: &mut Report) -> Result<()> {
    let kernel = guest::writer(bench, WRITTEN_PAGES)?;
    let (mut process, mut client) = start(bench, &kernel, 1024)?;
    process.send_byte()?;
    process.await_byte()?;
    create(&mut client, &bench.scratch.join("rewound"))?;
    let mut times = Vec::new();
    // The first maps the memory anew.
    for run in 0..=REWINDS {
        process.send_byte()?;
        process.await_byte()?;
        let took = client.call("PUT", "/snapshot/rewind", "{}")?;
        if run > 0 {
            times.push(took);
        }
    }
    let target = Target::AtMost(2.0);
    report.add_with_target("rewind of 1,000 written pages", "ms", Samples::millis(&times), target);
    Ok(())
}

/// A Diff of a guest that has written 1,000 pages since the last one: how long it takes, and what it takes on disk. And what
/// it costs the guest that these pages are noted.
pub(crate) fn diff(bench: &Bench, report: &mut Report) -> Result<()> {
    let directory = saved(bench, "diffed", &guest::writer(bench, WRITTEN_PAGES)?, 1024, 1)?;
    let socket = bench.scratch.join("diffed.sock");
    let mut work = [Vec::new(), Vec::new()];
    let (mut times, mut sizes) = (Vec::new(), Vec::new());
    for (is_tracked, work) in [false, true].into_iter().zip(&mut work) {
        let mut command = restore(&directory);
        command.arg("--api-sock").arg(&socket).args(is_tracked.then_some("--track-dirty"));
        let mut process = Running::start(&mut command)?;
        // Once its guest works, it listens.
        process.send_byte()?;
        process.await_byte()?;
        let mut client = Client::connect(&socket)?;
        // The first copies what it writes, and is a Diff of that.
        for run in 0..=DIFFS {
            let start = Instant::now();
            process.send_byte()?;
            process.await_byte()?;
            let worked = start.elapsed();
            let diff = bench.scratch.join(format!("diff{run}"));
            if is_tracked {
                let body = format!(
                    "{{\"directory\": \"{}\", \"snapshot_type\": \"Diff\"}}",
                    diff.display()
                );
                let took = client.call("PUT", "/snapshot/create", &body)?;
                if run > 0 {
                    times.push(took);
                    sizes.push(held_kib(&diff)?);
                }
            }
            if run > 0 {
                work.push(worked);
            }
        }
    }
    report.add("Diff of 1,000 written pages", "ms", Samples::millis(&times));
    report.add("the same on disk", "KiB", Samples::new(sizes));
    let [plain, noted] = work.map(|times| Samples::micros(&times));
    report.add("guest writes 1,000 pages that it has written before", "µs", plain);
    report.add("the same after a Diff, with what is written noted", "µs", noted);
    Ok(())
}

/// What the files of a directory take.
fn held_kib(directory: &Path) -> Result<f64> {
    let mut held = 0.0;
    for entry in fs::read_dir(directory)? {
        held += entry?.metadata()?.blocks() as f64 / 2.0;
    }
    Ok(held)
}

/// From process start to the end of a restored guest's first work, 8,000 pages to write, which the host has brought
/// in before, or the guest takes one by one; with the memory file in the page cache, and not.
pub(crate) fn first_request(bench: &Bench, report: &mut Report) -> Result<()> {
    let kernel = guest::writer(bench, FIRST_PAGES)?;
    let directory = saved(bench, "writer", &kernel, 128, 1)?;
    note_working_set(bench, &directory)?;
    let memory = memory_file(&directory)?;
    for (is_warm, state) in [(true, "cached"), (false, "not cached")] {
        for (words, how) in [(&["--no-prefault"][..], "one by one"), (&[], "brought in")] {
            let mut times = Vec::new();
            for _ in 0..bench.runs.div_ceil(5) {
                if !is_warm {
                    memory.sync_all()?;
                    rustix::fs::fadvise(&memory, 0, None, rustix::fs::Advice::DontNeed)?;
                }
                let mut process = Running::start(restore(&directory).args(words))?;
                process.send_byte()?;
                process.await_byte()?;
                times.push(process.started.elapsed());
            }
            let name = format!("restored guest writes 8,000 pages, {how}, file {state}");
            report.add(name, "ms", Samples::millis(&times));
        }
    }
    Ok(())
}

fn note_working_set(bench: &Bench, directory: &Path) -> Result<()> {
    let socket = bench.scratch.join("noted.sock");
    let mut process = Running::start(restore(directory).arg("--api-sock").arg(&socket))?;
    process.send_byte()?;
    process.await_byte()?;
    Client::connect(&socket)?.call("PUT", "/snapshot/working-set", "{}").map(drop)
}

fn memory_file(directory: &Path) -> Result<File> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("memory-") {
            return Ok(File::open(entry.path())?);
        }
    }
    Err("the snapshot has no memory file".into())
}
