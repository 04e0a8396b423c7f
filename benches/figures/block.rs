//! How fast a disk is: the guest of tests/guests/bench_block.rs, beside the same reads by the host.
//! The image is in the page cache, so that it is husk that is measured.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use crate::report::{Report, Target};
use crate::vmm::{Running, Vmm};
use crate::{Bench, Result, compile};

const DISK_LEN: u64 = 64 << 20;
const GUEST_ADDR: u64 = 0x10_0000;
const HOST_READS: u64 = 10_000;

pub(crate) fn reads(bench: &Bench, report: &mut Report) -> Result<()> {
    let disk = bench.scratch.join("disk.img");
    // Written, not sparse: holes would be read without touching a page.
    std::fs::write(&disk, vec![0xa5; usize::try_from(DISK_LEN)?])?;
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let guest = bench.scratch.join("bench_block.elf");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests/bench_block.rs");
    compile::compile(rustc.as_ref(), &source, &guest, GUEST_ADDR)?;

    let mut command = Vmm::Husk.command(&guest)?;
    // The guest reads its command line for devices, which husk appends.
    command.args(["--cmdline", "", "--disk"]).arg(&disk);
    let text = Running::start(&mut command)?.read_to_end()?;
    if !text.contains("RESULT ok") {
        return Err(format!("the guest says {text}").into());
    }
    for line in text.lines().filter(|line| line.starts_with("name=")) {
        let value = |key| {
            line.split(' ').find_map(|word| word.strip_prefix(key)).ok_or(format!("no {key}"))
        };
        let name = value("name=")?;
        match name {
            "warm-up" => {}
            _ if name.starts_with("rand") => {
                let iops = value("iops=")?.parse()?;
                report.add_one(format!("disk {name}"), "IOPS", iops, Target::None);
            }
            _ => {
                let rate = value("mb_s=")?.parse()?;
                report.add_one(format!("disk {name}"), "MB/s", rate, Target::None);
            }
        }
    }
    host(&disk, report)
}

/// What a process on the host gets by plain reads.
fn host(disk: &Path, report: &mut Report) -> Result<()> {
    let file = File::open(disk)?;
    for (name, len) in [("host pread rand4k", 4 << 10), ("host pread seq128k", 128 << 10)] {
        let mut data = vec![0; len];
        let (blocks, len) = (DISK_LEN / len as u64, len as u64);
        let mut random = 88_172_645_463_325_252_u64;
        let begin = Instant::now();
        for i in 0..HOST_READS {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let block = if len == 4096 { random } else { i };
            file.read_exact_at(&mut data, block % blocks * len)?;
        }
        let seconds = begin.elapsed().as_secs_f64();
        let (iops, rate) = (HOST_READS as f64 / seconds, (HOST_READS * len) as f64 / seconds / 1e6);
        match len {
            4096 => report.add_one(name, "IOPS", iops, Target::None),
            _ => report.add_one(name, "MB/s", rate, Target::None),
        }
    }
    Ok(())
}
