//! How fast the serial port is, from the guest to a pipe.
use crate::report::{Report, Target};
use crate::vmm::{Running, Vmm};
use crate::{Bench, Result, guest};

pub(crate) fn output(bench: &Bench, report: &mut Report) -> Result<()> {
    for (name, count, kernel) in [
        ("serial output, a byte at a time", 20_000, guest::bytes(bench, 20_000)?),
        ("serial output, by a string instruction", 1 << 20, guest::burst(bench, 1 << 20)?),
    ] {
        let mut process = Running::start(&mut Vmm::Husk.command_that_stays(&kernel)?)?;
        process.read_bytes(1)?;
        let begin = std::time::Instant::now();
        process.read_bytes(count - 1)?;
        let rate = count as f64 / begin.elapsed().as_secs_f64() / 1e3;
        report.add_one(name, "kB/s", rate, Target::None);
    }
    Ok(())
}
