//! How long a VM takes to start and to end, alone and with 99 others.
use std::time::Instant;

use crate::report::{Report, Samples, Target};
use crate::vmm::{Running, Vmm};
use crate::{Bench, Result, guest, memory};

/// VMs started at once.
const MANY: usize = 100;
/// How often: each round is a hundred starts.
const ROUNDS: usize = 7;

/// Who comes first changes, because a VM that has just ended slows the next one down.
fn order(round: usize) -> [Vmm; 2] {
    if round.is_multiple_of(2) { [Vmm::Husk, Vmm::Floor] } else { [Vmm::Floor, Vmm::Husk] }
}

/// Process start to the first instruction: from before the fork to the byte that the guest's first
/// `out` writes. husk and the floor take turns, so that both see the same machine.
pub(crate) fn one(bench: &Bench, report: &mut Report) -> Result<()> {
    let kernel = guest::idle(bench)?;
    let mut times = [Vec::new(), Vec::new()];
    // The first run pages the binaries in.
    for run in 0..=bench.runs {
        for vmm in order(run) {
            let mut process = Running::start(&mut vmm.command_that_stays(&kernel)?)?;
            process.await_byte()?;
            if run > 0 {
                times[vmm as usize].push(process.started.elapsed());
            }
        }
    }
    let [husk, floor] = times.map(|times| Samples::millis(&times));
    let (ratio, least) = (husk.median() / floor.median(), husk.at(0) / floor.at(0));
    report.add("start to first instruction, husk", "ms", husk);
    report.add("start to first instruction, floor", "ms", floor);
    let target = Target::AtMost(1.5);
    report.add_one("start to first instruction, husk / floor", "ratio", ratio, target);
    report.add_one("the same of the fastest runs", "ratio", least, Target::None);
    Ok(())
}

/// A hundred processes started in a row without waiting: the rate at which their guests run. All
/// stay until the last is there.
pub(crate) fn many(bench: &Bench, report: &mut Report) -> Result<()> {
    let kernel = guest::idle(bench)?;
    let (mut rates, mut ends) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    let mut pss = Vec::new();
    for round in 0..ROUNDS {
        for vmm in order(round) {
            let begin = Instant::now();
            let mut all = (0..MANY)
                .map(|_| Running::start(&mut vmm.command_that_stays(&kernel)?))
                .collect::<Result<Vec<_>>>()?;
            all.iter_mut().try_for_each(Running::await_byte)?;
            rates[vmm as usize].push(MANY as f64 / begin.elapsed().as_secs_f64());
            if vmm == Vmm::Husk && pss.is_empty() {
                pss = all
                    .iter()
                    .map(|vm| memory::Use::of(vm.pid()).map(|used| used.pss_kib))
                    .collect::<Result<_>>()?;
            }
            let begin = Instant::now();
            all.iter_mut().try_for_each(Running::kill)?;
            all.into_iter().try_for_each(Running::reap)?;
            ends[vmm as usize].push(begin.elapsed());
        }
    }
    let [husk, floor] = rates.map(Samples::new);
    let ratio = husk.median() / floor.median();
    report.add("100 VMs at once, husk", "VMs/s", husk);
    report.add("100 VMs at once, floor", "VMs/s", floor);
    report.add_one("100 VMs at once, husk / floor", "ratio", ratio, Target::AtLeast(0.7));
    let [husk, floor] = ends.map(|ends| Samples::millis(&ends));
    report.add("100 VMs killed at once, husk", "ms", husk);
    report.add("100 VMs killed at once, floor", "ms", floor);
    report.add("PSS of each of 100 VMs, without guest RAM", "KiB", Samples::new(pss));
    Ok(())
}

/// The whole life of a VM whose guest ends it at once, and how much of it is the end. Most of that
/// is the kernel's: the floor has it too.
pub(crate) fn to_end(bench: &Bench, report: &mut Report) -> Result<()> {
    let kernel = guest::reset(bench)?;
    let (mut lives, mut ends) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for run in 0..bench.runs {
        for vmm in order(run) {
            let mut command = vmm.command(&kernel)?;
            command.args(match vmm {
                Vmm::Husk => ["--on-reboot", "exit"],
                Vmm::Floor => ["--echo", "exit"],
            });
            let mut process = Running::start(&mut command)?;
            process.await_byte()?;
            let ran = Instant::now();
            process.await_end()?;
            ends[vmm as usize].push(ran.elapsed());
            lives[vmm as usize].push(process.started.elapsed());
        }
    }
    let [husk, floor] = ends.map(|times| Samples::millis(&times));
    report.add("guest's end to process's end, husk", "ms", husk);
    report.add("guest's end to process's end, floor", "ms", floor);
    let [husk, floor] = lives.map(|times| Samples::millis(&times));
    report.add("start to end, husk", "ms", husk);
    report.add("start to end, floor", "ms", floor);
    Ok(())
}
