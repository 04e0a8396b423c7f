//! The documentation does what it says: its shell blocks are run as they stand.
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::util::*;

/// A guest that does nothing for ever, for sessions that end it themselves: `hlt; jmp $-1`.
const IDLE: &[u8] = &[0xf4, 0xeb, 0xfd];

/// Blocks of shell under headings that `is_wanted` likes, as one script.
fn shell(document: &str, is_wanted: impl Fn(&str) -> bool) -> String {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(document));
    let (mut script, mut heading, mut is_inside) = (String::new(), String::new(), false);
    for line in text.unwrap().lines() {
        if line.starts_with("```") {
            is_inside = line.starts_with("```sh") && is_wanted(&heading);
        } else if is_inside {
            script += line;
            script += "\n";
        } else if let Some(title) = line.strip_prefix("## ") {
            heading = title.to_owned();
        }
    }
    assert!(!script.is_empty(), "{document} has no shell blocks");
    script
}

/// Runs `script` where its author imagined it: in a directory with a kernel and a disk, with a tap,
/// and with husk on the path. A refused request or a failed command fails the test.
fn run(script: &str) {
    let scratch = Scratch::new();
    let network = Network::with_tap();
    scratch.file("vmlinux", Elf::new(0x10_0000, &[Segment::new(0x10_0000, IDLE)]).bytes);
    scratch.sparse("root.ext4", 1 << 20);
    std::fs::create_dir(scratch.path("bin")).unwrap();
    symlink(env!("CARGO_BIN_EXE_husk"), scratch.path("bin/husk")).unwrap();
    let prelude = "\
set -euo pipefail
PATH=$PWD/bin:$PATH
trap 'for s in *.sock*; do husk ctl --api-sock $s kill || true; done 2>/dev/null; kill $(jobs -p) 2>/dev/null || true' EXIT
curl() { command curl --silent --show-error --fail-with-body --max-time 60 \"$@\"; }
";
    let mut command = Command::new("bash");
    network.enter(command.arg("-c").arg(format!("{prelude}{script}")).current_dir(&scratch));
    let output = command.stdin(Stdio::null()).output().expect("bash and curl");
    let (text, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{text}\n{errors}\nof\n{script}", output.status);
}

#[test]
fn the_api_session_in_the_docs_runs() {
    run(&shell("docs/api.md", |_| true));
}

#[test]
fn the_sessions_about_snapshots_run() {
    // The second looks into what the first has made.
    run(&["docs/snapshot.md", "docs/snapshot-format.md"]
        .map(|page| shell(page, |_| true))
        .concat());
}

#[test]
fn the_session_about_forks_runs() {
    run(&shell("docs/fork.md", |_| true));
}

#[test]
fn the_sessions_about_jails_run() {
    run(&shell("docs/jail.md", |_| true));
}

#[test]
fn the_session_about_the_sandbox_runs() {
    run(&shell("docs/sandbox.md", |_| true));
}

#[test]
fn every_endpoint_has_an_example() {
    let examples = examples(&shell("docs/api.md", |_| true));
    let vm = Husk::api().start();
    let document = vm.api().get("/openapi.json").json();
    let mut missing: Vec<String> = operations(&document)
        .filter(|(method, path)| !examples.iter().any(|(m, p)| m == method && fits(p, path)))
        .map(|(method, path)| format!("{method} {path}"))
        .collect();
    missing.sort();
    assert!(missing.is_empty(), "docs/api.md lacks a curl example of:\n{}", missing.join("\n"));
}

/// Method and path of each curl in a script.
fn examples(script: &str) -> Vec<(String, String)> {
    let commands = script.replace("\\\n", " ");
    let commands = commands.lines().filter(|line| line.trim_start().starts_with("curl "));
    commands
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let method =
                words.iter().position(|word| *word == "-X").map_or("GET", |i| words[i + 1]);
            let path = words.iter().find_map(|word| word.strip_prefix("http://localhost"));
            (method.to_owned(), path.unwrap_or_else(|| panic!("no path in {line}")).to_owned())
        })
        .collect()
}

/// Whether `path` is one that `pattern` stands for: `{id}` is any one segment.
fn fits(path: &str, pattern: &str) -> bool {
    let (path, pattern): (Vec<_>, Vec<_>) =
        (path.split('/').collect(), pattern.split('/').collect());
    let is_same = |(segment, place): (&&str, &&str)| segment == place || place.starts_with('{');
    path.len() == pattern.len() && path.iter().zip(&pattern).all(is_same)
}

#[test]
fn the_api_session_in_the_readme_runs() {
    run(&shell("README.md", |heading| heading == "The API"));
}
