//! `cargo bench`: husk's figures beside their targets, and beside the floor, which makes the same
//! KVM calls and nothing else. docs/performance.md says how each is measured and why.
//!
//!     cargo bench                        everything
//!     cargo bench -- start memory        these groups only
//!     cargo bench -- --runs 20           fewer runs of what is repeated
//!     cargo bench -- --json FILE         also writes the figures as JSON
//!     HUSK=FILE cargo bench              another binary than the one that cargo built beside it
//!     cargo bench -- floor [...]         the floor by itself, with its options
//!
//! It knows nothing of husk's insides: all it has are processes, /proc and the socket.
mod api;
#[path = "../../tests/util/attack.rs"]
mod attack;
mod block;
#[path = "../../resources/guest/compile.rs"]
mod compile;
#[path = "../floor/floor.rs"]
mod floor;
mod fork;
mod guest;
mod host;
mod limits;
mod memory;
mod report;
mod restore;
mod serial;
mod start;
mod vmm;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs};

use report::Report;

/// Any failure: the harness stops at the first, with what was being measured.
type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// What every measurement is given.
struct Bench {
    /// For files and sockets; removed at the end.
    scratch: PathBuf,
    /// How often the things are repeated that vary.
    runs: usize,
}

/// A group of figures that share their preparations.
struct Group {
    name: &'static str,
    measure: fn(&Bench, &mut Report) -> Result<()>,
}

const GROUPS: &[Group] = &[
    Group { name: "size", measure: host::binary_size },
    Group { name: "start", measure: start::one },
    Group { name: "at-once", measure: start::many },
    Group { name: "memory", measure: memory::one },
    Group { name: "end", measure: start::to_end },
    Group { name: "api", measure: api::latencies },
    Group { name: "configure", measure: api::configure },
    Group { name: "attack", measure: api::under_attack },
    Group { name: "fork", measure: fork::hundred },
    Group { name: "fork-full", measure: fork::full },
    Group { name: "restore", measure: restore::one },
    Group { name: "snapshot", measure: restore::snapshot },
    Group { name: "rewind", measure: restore::rewind },
    Group { name: "diff", measure: restore::diff },
    Group { name: "prefault", measure: restore::first_request },
    Group { name: "serial", measure: serial::output },
    Group { name: "block", measure: block::reads },
    Group { name: "limits", measure: limits::accuracy },
];

struct Options {
    groups: Vec<String>,
    runs: usize,
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    // Cargo passes --bench to everything under benches/.
    let arguments: Vec<String> = env::args().skip(1).filter(|a| a != "--bench").collect();
    let done = match arguments.split_first() {
        Some((first, rest)) if first == "floor" => floor::main(rest).map_err(Into::into),
        Some((first, _)) if first == limits::FLOOD => limits::flood(),
        _ => parse(arguments).and_then(|options| measure(&options)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<()> {
    let scratch =
        PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("figures-{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    let bench = Bench { scratch, runs: options.runs };
    let mut report = Report::default();
    let is_wanted =
        |g: &&Group| options.groups.is_empty() || options.groups.contains(&g.name.into());
    let done = GROUPS.iter().filter(is_wanted).try_for_each(|group| {
        eprintln!("measuring: {}", group.name);
        (group.measure)(&bench, &mut report).map_err(|e| format!("{}: {e}", group.name).into())
    });
    // Files left behind harm no figure.
    let _ = fs::remove_dir_all(&bench.scratch);
    report.print();
    if let Some(path) = &options.json {
        fs::write(path, report.to_json()).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    done
}

fn parse(arguments: Vec<String>) -> Result<Options> {
    let mut options = Options { groups: Vec::new(), runs: 100, json: None };
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
        match argument.as_str() {
            "--json" => options.json = Some(value()?.into()),
            "--runs" => options.runs = value()?.parse().map_err(|e| format!("--runs: {e}"))?,
            name if GROUPS.iter().any(|g| g.name == name) => options.groups.push(argument),
            other => {
                let names: Vec<_> = GROUPS.iter().map(|g| g.name).collect();
                return Err(format!("{other} is none of {}", names.join(", ")).into());
            }
        }
    }
    if options.runs == 0 {
        return Err("--runs wants at least 1".into());
    }
    Ok(options)
}
