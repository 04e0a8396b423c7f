//! How accurate rate limits are: the guest of tests/guests/bench_limits.rs asks for as much as it gets, for ten
//! seconds, and counts.
use std::io::Read;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::report::{Report, Target};
use crate::vmm::husk;
use crate::{Bench, Result, compile};

const GUEST_ADDR: u64 = 0x10_0000;
/// How far off a rate may be, percent.
const TARGET: f64 = 5.0;
/// The name under which this program is the host that sends more than a guest may receive.
pub(crate) const FLOOD: &str = "flood";
const DATAGRAM: usize = 1400;

/// What is measured: the limit as husk's options say it, and what the guest does.
struct Limit {
    name: &'static str,
    options: &'static str,
    guest: &'static str,
    counts: Counts,
    rate: f64,
}

#[derive(PartialEq)]
enum Counts {
    Bytes,
    Ops,
}

const DISK: &[Limit] = &[
    Limit {
        name: "disk, 20 MB/s in reads of 128 KiB",
        options: "bw=20M",
        guest: "device=read len=131072",
        counts: Counts::Bytes,
        rate: 20e6,
    },
    Limit {
        name: "disk, 10 MB/s in writes of 16 KiB",
        options: "bw=10M",
        guest: "device=write len=16384 depth=32",
        counts: Counts::Bytes,
        rate: 10e6,
    },
    Limit {
        name: "disk, 1,000 reads/s of 4 KiB",
        options: "ops=1000",
        guest: "device=read len=4096 depth=8",
        counts: Counts::Ops,
        rate: 1e3,
    },
];

const NET: &[Limit] = &[
    Limit {
        name: "network, 2 MB/s sent in frames of 1500 bytes",
        options: "tx-bw=2M",
        guest: "device=send len=1500 depth=32",
        counts: Counts::Bytes,
        rate: 2e6,
    },
    Limit {
        name: "network, 2,000 frames/s sent",
        options: "tx-ops=2000",
        guest: "device=send len=60 depth=32",
        counts: Counts::Ops,
        rate: 2e3,
    },
    Limit {
        name: "network, 2 MB/s received",
        options: "rx-bw=2M",
        guest: "device=receive len=1514 depth=64",
        counts: Counts::Bytes,
        rate: 2e6,
    },
];

pub(crate) fn accuracy(bench: &Bench, report: &mut Report) -> Result<()> {
    let disk = bench.scratch.join("limited.img");
    std::fs::write(&disk, vec![0xa5; 16 << 20])?;
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let guest = bench.scratch.join("bench_limits.elf");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests/bench_limits.rs");
    compile::compile(rustc.as_ref(), &source, &guest, GUEST_ADDR)?;
    for limit in DISK {
        let mut command = Command::new(husk());
        command.args(["run", "--cmdline", limit.guest, "--disk"]);
        command.arg(format!("{},{}", disk.display(), limit.options)).arg("--kernel").arg(&guest);
        measure(&mut command, limit, report)?;
    }
    if !can_make_taps() {
        eprintln!(
            "limits: no figures of the network: this is not root, or there is no tap to be had"
        );
        return Ok(());
    }
    for limit in NET {
        measure(&mut in_namespace(&guest, limit)?, limit, report)?;
    }
    Ok(())
}

/// Adds how far off the rate was that the guest saw.
fn measure(command: &mut Command, limit: &Limit, report: &mut Report) -> Result<()> {
    let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut text = String::new();
    process.stdout.take().ok_or("no standard output")?.read_to_string(&mut text)?;
    let status = process.wait()?;
    if !status.success() || !text.contains("RESULT ok") {
        return Err(format!("{}: {status}, and the guest says {text}", limit.name).into());
    }
    let value = |key: &str| -> Result<f64> {
        let found = text.split_whitespace().find_map(|word| word.strip_prefix(key));
        Ok(found.ok_or(format!("no {key} in {text}"))?.parse()?)
    };
    let counted = value(if limit.counts == Counts::Ops { "ops=" } else { "bytes=" })?;
    let rate = counted / value("ns=")? * 1e9;
    let error = (rate / limit.rate - 1.0).abs() * 100.0;
    report.add_one(format!("limit {}", limit.name), "% off", error, Target::AtMost(TARGET));
    Ok(())
}

/// husk with a tap, in a network namespace in which somebody sends to everybody for as long as it runs.
fn in_namespace(guest: &Path, limit: &Limit) -> Result<Command> {
    let flood: PathBuf = std::env::current_exe()?;
    let script = "ip tuntap add tap0 mode tap && ip addr add 10.0.0.1/24 dev tap0 && \
                  ip link set tap0 up || exit 1\n\
                  \"$1\" \"$2\" & flood=$!\n\
                  \"$3\" run --kernel \"$4\" --cmdline \"$5\" --net \"tap=tap0,$6\"; status=$?\n\
                  kill $flood; exit $status";
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", script, "sh"]).arg(flood).arg(FLOOD);
    command.arg(husk()).arg(guest).args([limit.guest, limit.options]);
    Ok(command)
}

fn can_make_taps() -> bool {
    let script = "ip tuntap add tap0 mode tap";
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", script]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Sends datagrams to everybody on the tap until it is killed, some 10 MB a second.
pub(crate) fn flood() -> Result<()> {
    let socket = UdpSocket::bind("10.0.0.1:0")?;
    socket.set_broadcast(true)?;
    loop {
        for _ in 0..10 {
            // What the tap does not take is lost, as it is to be.
            let _ = socket.send_to(&[0; DATAGRAM], "10.0.0.255:9");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
