//! What husk needs beside its guest's RAM, from /proc/PID/smaps.
//!
//! Guest RAM is the one mapping of its size that is anonymous and has the flag `dd`
//! (MADV_DONTDUMP), which husk sets on nothing else. There must be exactly one.
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use crate::report::{Report, Samples, Target};
use crate::vmm::{RAM_MIB, Running, Vmm, husk};
use crate::{Bench, Result, api, guest};

/// Firecracker's figure on the same machine.
const TARGET_KIB: f64 = 336.0;
const TARGET_WITH_API_KIB: f64 = 512.0;
const SAMPLES: usize = 5;

/// Memory of a process, without guest RAM.
pub(crate) struct Use {
    pub(crate) private_dirty_kib: f64,
    pub(crate) pss_kib: f64,
}

/// One mapping.
#[derive(Default)]
struct Mapping {
    is_anonymous: bool,
    is_not_dumped: bool,
    size_kib: u64,
    private_dirty_kib: u64,
    pss_kib: u64,
}

impl Use {
    /// What process `pid` uses.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        let mappings = parse(&fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?);
        let is_ram =
            |m: &&Mapping| m.is_anonymous && m.is_not_dumped && m.size_kib == RAM_MIB << 10;
        let rams = mappings.iter().filter(is_ram).count();
        if rams != 1 {
            return Err(format!("{path}: {rams} mappings look like guest RAM").into());
        }
        let sum = |of: fn(&Mapping) -> u64| {
            mappings.iter().filter(|m| !is_ram(m)).map(of).sum::<u64>() as f64
        };
        Ok(Self { private_dirty_kib: sum(|m| m.private_dirty_kib), pss_kib: sum(|m| m.pss_kib) })
    }
}

/// Private dirty memory of the process `pid` in KiB, what its guest has written included.
pub(crate) fn private_kib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps");
    let mappings = parse(&fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?);
    Ok(mappings.iter().map(|mapping| mapping.private_dirty_kib).sum::<u64>() as f64)
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        let Some(key) = first.strip_suffix(':') else {
            // address, permissions, offset, device, inode, then a path if there is one
            let is_anonymous = words.nth(3) == Some("0") && words.next().is_none();
            mappings.push(Mapping { is_anonymous, ..Mapping::default() });
            continue;
        };
        let Some(mapping) = mappings.last_mut() else { continue };
        if key == "VmFlags" {
            mapping.is_not_dumped = words.any(|flag| flag == "dd");
            continue;
        }
        let value = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        match key {
            "Size" => mapping.size_kib = value,
            "Private_Dirty" => mapping.private_dirty_kib = value,
            "Pss" => mapping.pss_kib = value,
            _ => {}
        }
    }
    mappings
}

/// An idle VM with one vCPU and 128 MiB, once without and once with an API socket that has been
/// asked something.
pub(crate) fn one(bench: &Bench, report: &mut Report) -> Result<()> {
    // A binary that was just built is dirty in the page cache, and would be taken for memory.
    fs::File::open(husk())?.sync_all()?;
    let kernel = guest::idle(bench)?;
    let mut used = [Vec::new(), Vec::new()];
    for _ in 0..SAMPLES {
        for (has_api, used) in [false, true].into_iter().zip(&mut used) {
            let mut command = Vmm::Husk.command_that_stays(&kernel)?;
            let socket = bench.scratch.join("memory.sock");
            if has_api {
                command.arg("--api-sock").arg(&socket);
            }
            let mut process = Running::start(&mut command)?;
            process.await_byte()?;
            if has_api {
                api::Client::connect(&socket)?.call("GET", "/", "")?;
            }
            sleep(Duration::from_millis(100));
            used.push(Use::of(process.pid())?);
        }
    }
    for (used, (what, target)) in
        used.iter().zip([("no API", TARGET_KIB), ("API", TARGET_WITH_API_KIB)])
    {
        let of = |value: fn(&Use) -> f64| Samples::new(used.iter().map(value).collect());
        let name = format!("private dirty memory, {what}");
        let dirty = of(|u| u.private_dirty_kib);
        report.add_with_target(name, "KiB", dirty, Target::AtMost(target));
        report.add(format!("PSS, {what}"), "KiB", of(|u| u.pss_kib));
    }
    Ok(())
}
