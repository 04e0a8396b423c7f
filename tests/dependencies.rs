//! What husk depends on is what `deny.toml` allows: its licences, where it comes from, versions without known
//! holes, one of each. As `cargo deny` has it, which nobody needs to install for this.
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// The entries of a list of `deny.toml`: the first string of each line.
fn policy(section: &str, list: &str) -> Vec<String> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/deny.toml")).unwrap();
    let start = format!("{list} = [");
    let lines = text.lines().skip_while(|line| *line != format!("[{section}]")).skip(1);
    let lines = lines.take_while(|line| !line.starts_with('[')).skip_while(|line| *line != start);
    let entries = lines.skip(1).take_while(|line| *line != "]");
    let entries: Vec<_> = entries.map(|line| line.split('"').nth(1).unwrap().to_owned()).collect();
    assert!(!entries.is_empty(), "deny.toml has no list {list} in [{section}]");
    entries
}

type Version = Vec<u64>;

fn version(text: &str) -> Version {
    let numbers = text.split(['-', '+']).next().unwrap().split('.');
    numbers.map(|number| number.parse().unwrap_or_else(|e| panic!("{text}: {e}"))).collect()
}

/// `NAME:<VERSION`, the only kind of requirement that is used.
fn below(entry: &str) -> (&str, Version) {
    let (name, limit) = entry.split_once(":<").unwrap_or_else(|| panic!("{entry}: no limit"));
    (name, version(limit))
}

/// Every crate that any feature of husk brings in.
fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--all-features"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

fn name_and_version(package: &Value) -> (&str, Version) {
    (package["name"].as_str().unwrap(), version(package["version"].as_str().unwrap()))
}

/// Whether an expression of SPDX holds if what `is_allowed` is granted. AND binds closer than OR; crates of old
/// write OR as a slash.
fn is_licence_allowed(expression: &str, is_allowed: &dyn Fn(&str) -> bool) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut tokens: Vec<&str> = spaced.split_whitespace().rev().collect();
    let holds = any(&mut tokens, is_allowed);
    assert!(tokens.is_empty(), "not understood: {expression}");
    holds
}

fn any(tokens: &mut Vec<&str>, is_allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut holds = all(tokens, is_allowed);
    while tokens.last() == Some(&"OR") {
        tokens.pop();
        holds |= all(tokens, is_allowed);
    }
    holds
}

fn all(tokens: &mut Vec<&str>, is_allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut holds = one(tokens, is_allowed);
    while tokens.last() == Some(&"AND") {
        tokens.pop();
        holds &= one(tokens, is_allowed);
    }
    holds
}

fn one(tokens: &mut Vec<&str>, is_allowed: &dyn Fn(&str) -> bool) -> bool {
    let token = tokens.pop().expect("a licence");
    if token == "(" {
        let holds = any(tokens, is_allowed);
        assert_eq!(tokens.pop(), Some(")"));
        return holds;
    }
    if tokens.last() != Some(&"WITH") {
        return is_allowed(token);
    }
    tokens.pop();
    let exception = tokens.pop().expect("an exception");
    is_allowed(&format!("{token} WITH {exception}"))
}

#[test]
fn licences_are_those_that_are_allowed() {
    let allowed = policy("licenses", "allow");
    let is_allowed = |licence: &str| allowed.iter().any(|allowed| allowed == licence);
    for package in packages() {
        let name = &package["name"];
        let licence = package["license"].as_str().unwrap_or_else(|| panic!("{name}: no licence"));
        assert!(is_licence_allowed(licence, &is_allowed), "{name}: {licence} is not in deny.toml");
    }
}

#[test]
fn an_expression_of_licences_is_read_as_spdx_has_it() {
    let is_allowed = |licence: &str| ["MIT", "0BSD"].contains(&licence);
    for (expression, holds) in [
        ("MIT", true),
        ("GPL-3.0-only", false),
        ("GPL-3.0-only/MIT", true),
        ("GPL-3.0-only OR MIT AND Zlib", false),
        ("(GPL-3.0-only OR MIT) AND 0BSD", true),
        ("MIT WITH Some-exception", false),
    ] {
        assert_eq!(is_licence_allowed(expression, &is_allowed), holds, "{expression}");
    }
}

#[test]
fn all_comes_from_the_registry_or_from_here() {
    let registries = policy("sources", "allow-registry");
    for package in packages() {
        let Some(source) = package["source"].as_str() else {
            let manifest = package["manifest_path"].as_str().unwrap();
            assert!(manifest.starts_with(env!("CARGO_MANIFEST_DIR")), "{manifest} is elsewhere");
            continue;
        };
        let registry = source.strip_prefix("registry+");
        let is_allowed = registry.is_some_and(|url| registries.iter().any(|known| known == url));
        assert!(is_allowed, "{}: {source} is not in deny.toml", package["name"]);
    }
}

#[test]
fn no_version_has_a_hole_that_is_known() {
    let packages = packages();
    for entry in policy("bans", "deny") {
        let (name, limit) = below(&entry);
        let mut found =
            packages.iter().map(name_and_version).filter(|(n, _)| *n == name).peekable();
        assert!(found.peek().is_some(), "{name} is not used: take it out of deny.toml");
        for (_, version) in found {
            assert!(version >= limit, "{name} {version:?} is denied: {entry}");
        }
    }
}

#[test]
fn of_each_there_is_one_version() {
    let packages = packages();
    let mut versions = BTreeMap::<&str, BTreeSet<Version>>::new();
    for (name, version) in packages.iter().map(name_and_version) {
        versions.entry(name).or_default().insert(version);
    }
    for entry in policy("bans", "skip") {
        let (name, limit) = below(&entry);
        let of_name = versions.get_mut(name).unwrap_or_else(|| panic!("{name} is not used"));
        let count = of_name.len();
        of_name.retain(|version| *version >= limit);
        assert!(of_name.len() < count && count > 1, "{entry} is not needed: take it out");
    }
    versions.retain(|_, versions| versions.len() > 1);
    assert!(versions.is_empty(), "several versions of one crate: {versions:?}");
}
