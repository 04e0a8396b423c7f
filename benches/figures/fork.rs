//! A hundred children of a VM beside a hundred VMs of the floor, and what a child costs.
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::api::Client;
use crate::report::{Report, Samples, Target};
use crate::vmm::{Running, Vmm, husk};
use crate::{Bench, Result, guest, memory};

/// Children, and VMs of the floor.
const MANY: usize = 100;
const ROUNDS: usize = 7;
/// Forks of one child each.
const SINGLE: usize = 20;
/// What a parent has written that is not idle.
const WRITTEN_PAGES: u32 = 204_800;
const FULL: usize = 5;

/// A forkable VM that idles, with an API.
pub(crate) fn hundred(bench: &Bench, report: &mut Report) -> Result<()> {
    std::fs::File::open(husk())?.sync_all()?;
    let kernel = guest::idle(bench)?;
    let socket = bench.scratch.join("fork.sock");
    let (mut forks, mut floors) = (Vec::new(), Vec::new());
    let (mut pauses, mut private) = (Vec::new(), Vec::new());
    let mut command = Vmm::Husk.command_that_stays(&kernel)?;
    let mut parent = Running::start(command.arg("--forkable").arg("--api-sock").arg(&socket))?;
    parent.await_byte()?;
    for round in 0..ROUNDS {
        floors.push(floor(&kernel)?);
        let (took, told) = fork(&socket, MANY)?;
        forks.push(took);
        pauses.push(told.paused_us);
        if round == 0 {
            let used = told.pids.iter().map(|pid| memory::private_kib(*pid));
            private = used.collect::<Result<_>>()?;
        }
        end(&told.pids)?;
    }
    let (mut running, mut paused) = (Vec::new(), Vec::new());
    for _ in 0..SINGLE {
        let (took, told) = fork(&socket, 1)?;
        running.push(took);
        end(&told.pids)?;
    }
    Client::connect(&socket)?.call("PATCH", "/vm", r#"{"state": "Paused"}"#)?;
    for _ in 0..SINGLE {
        let (took, told) = fork(&socket, 1)?;
        paused.push(took);
        end(&told.pids)?;
    }
    let (forks, floors) = (Samples::millis(&forks), Samples::millis(&floors));
    let ratio = forks.median() / floors.median();
    report.add("100 forks", "ms", forks);
    report.add("100 VMs at once, floor", "ms", floors);
    report.add_one("100 forks / 100 VMs of the floor", "ratio", ratio, Target::AtMost(2.0));
    let target = Target::AtMost(256.0);
    report.add_with_target(
        "private dirty memory of each child",
        "KiB",
        Samples::new(private),
        target,
    );
    report.add("parent stands still", "us", Samples::new(pauses));
    report.add("one fork of a VM that runs", "ms", Samples::millis(&running));
    report.add("one fork of a VM that is paused", "ms", Samples::millis(&paused));
    Ok(())
}

/// How long a parent stands still that has written much: the kernel copies its page tables for whoever copies its
/// memory then. Forkable memory is a file, and has none to be copied.
pub(crate) fn full(bench: &Bench, report: &mut Report) -> Result<()> {
    let kernel = guest::writer(bench, WRITTEN_PAGES)?;
    let socket = bench.scratch.join("full.sock");
    for (words, what) in [(&[][..], "not forkable"), (&["--forkable"], "forkable")] {
        let mut pauses = Vec::new();
        for _ in 0..FULL {
            let mut command = Command::new(husk());
            command.arg("run").arg("--kernel").arg(&kernel).arg("--api-sock").arg(&socket);
            command.args(["--memory", "1024"]).args(words);
            let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut parent = Running::start(command)?;
            parent.await_byte()?;
            parent.send_byte()?;
            parent.await_byte()?;
            let (_, told) = fork(&socket, 1)?;
            pauses.push(told.paused_us);
            end(&told.pids)?;
        }
        let name = format!("parent that has written 800 MiB stands still, {what}");
        report.add(name, "us", Samples::new(pauses));
    }
    Ok(())
}

/// What a fork has answered.
struct Told {
    paused_us: f64,
    pids: Vec<u32>,
}

/// From the request to the answer, which comes when all children are let go.
fn fork(socket: &std::path::Path, count: usize) -> Result<(Duration, Told)> {
    let mut client = Client::connect(socket)?;
    let (took, answer) = client.ask("POST", "/fork", &format!("{{\"n\": {count}}}"))?;
    let pids: Vec<u32> = numbers(&answer, "\"pid\":");
    let paused_us = numbers(&answer, "\"paused_us\":").first().copied().ok_or("no pause")?;
    match pids.len() == count {
        true => Ok((took, Told { paused_us, pids })),
        false => Err(format!("{} children, not {count}", pids.len()).into()),
    }
}

/// The numbers that follow `key`.
fn numbers<T: std::str::FromStr>(answer: &str, key: &str) -> Vec<T> {
    let pieces = answer.split(key).skip(1);
    pieces
        .filter_map(|piece| piece.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
        .collect()
}

/// Ends children, and waits until they are gone.
fn end(pids: &[u32]) -> Result<()> {
    let words: Vec<_> = pids.iter().map(u32::to_string).collect();
    Command::new("kill").arg("-9").args(&words).status()?;
    let patience = Instant::now() + Duration::from_secs(10);
    while pids.iter().any(|pid| std::fs::exists(format!("/proc/{pid}")).unwrap_or(false)) {
        if Instant::now() > patience {
            return Err("children do not end".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// How long the floor takes for as many VMs, in processes that are all started at once.
fn floor(kernel: &std::path::Path) -> Result<Duration> {
    let begin = Instant::now();
    let mut all = (0..MANY)
        .map(|_| Running::start(&mut Vmm::Floor.command_that_stays(kernel)?))
        .collect::<Result<Vec<_>>>()?;
    all.iter_mut().try_for_each(Running::await_byte)?;
    let took = begin.elapsed();
    all.iter_mut().try_for_each(Running::kill)?;
    all.into_iter().try_for_each(Running::reap)?;
    Ok(took)
}
