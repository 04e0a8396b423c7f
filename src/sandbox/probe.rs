//! `husk sandbox --probe`: what this host offers, layer by layer.
use std::fmt::Write as _;

use rustix::process::geteuid;

use super::{Levels, Roots, Seccomp, filter, paths};

/// A table for people: each layer, what there is of it, what it does; the last line says what husk comes to.
pub(crate) fn probe() -> String {
    let version = paths::version();
    let landlock = match version {
        0 => "none".into(),
        version => format!("version {version}"),
    };
    let rows = [
        ("no_new_privs", "yes".to_owned(), "no program that husk started could gain rights"),
        ("capabilities", "dropped".to_owned(), "root without the rights of root"),
        (
            "seccomp",
            yes(filter::is_available(Seccomp::Kill)),
            "a list of system calls for each thread; any other ends husk",
        ),
        ("seccomp log", yes(filter::is_available(Seccomp::Log)), "--seccomp=log, to find out"),
        ("Landlock files", landlock, "no path but those of --allow (needs version 3)"),
        ("Landlock TCP", yes(version >= 4), "no TCP (version 4)"),
        ("Landlock sockets", yes(version >= 6), "no abstract Unix sockets of others (version 6)"),
        (
            "user",
            if geteuid().is_root() { "root" } else { "not root" }.to_owned(),
            "husk jail, which needs root, gives each VM a user of its own",
        ),
    ];
    let mut text = String::new();
    for (layer, has, what) in rows {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{layer:<17} {has:<10} {what}");
    }
    let below = Levels::of(Seccomp::Kill, &Roots::Below(Vec::new()));
    let verdict = match below.shortfall() {
        None => "--require-sandbox: would start".to_owned(),
        Some(why) => format!("--require-sandbox: would refuse: {why}"),
    };
    text.push_str(&verdict);
    text.push('\n');
    text
}

fn yes(has: bool) -> String {
    if has { "yes" } else { "no" }.to_owned()
}
