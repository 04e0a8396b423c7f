//! husk under the name `jailer`: Firecracker's jailer, its flags and the directory that it makes.
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Arg, ArgMatches, Command};
use rustix::process::Resource;
use rustix::time::ClockId;

use super::flags::{self, Flag, Given, text};
use super::jail::{id, limit, owner, words};
use super::{fail, firecracker, refuse_arguments};
use crate::exit::ExitCode;
use crate::instance::FIRECRACKER_VERSION;
use crate::jail::chroot::{Chroot, Program, open_network};
use crate::jail::{
    Existing, Group, JailError, Limit, Mounted, Owner, Setting, Version, default_limits,
    forget_inheritance,
};

/// Descriptors, if nothing else is said.
const DESCRIPTORS: u64 = 2048;

/// The flags, and what they mean.
const FLAGS: &[Flag] = &[
    ("id", Some("ID"), "The jail's name, 1 to 64 letters, digits or '-'"),
    (
        "exec-file",
        Some("FILE"),
        "The program to run in the jail: husk under the name firecracker, or another, static one",
    ),
    ("uid", Some("N"), "The user that it runs as. Not 0"),
    ("gid", Some("N"), "The group that it runs as. Not 0"),
    (
        "chroot-base-dir",
        Some("DIR"),
        "Where jails are; this one's root is DIR/<name of the program>/<id>/root [default: /srv/jailer]",
    ),
    ("netns", Some("PATH"), "The network namespace to join"),
    ("daemonize", None, "Go on in the background, with /dev/null for standard streams"),
    ("new-pid-ns", None, "A process namespace of its own"),
    ("cgroup", Some("SETTING"), "Set FILE of the cgroup to VALUE: FILE=VALUE"),
    ("cgroup-version", Some("N"), "The version of cgroups: 1 or 2 [default: 1]"),
    (
        "parent-cgroup",
        Some("PATH"),
        "The cgroup in which the jail's is made [default: the name of the program]",
    ),
    ("resource-limit", Some("LIMIT"), "A limit of the process: fsize=N or no-file=N"),
    ("version", None, "Print the version"),
];

const ARGS: &str = "args";

/// husk, called by this name, takes the arguments of Firecracker's jailer.
#[derive(Debug)]
struct JailerArgs {
    id: String,
    program: PathBuf,
    owner: Owner,
    base: PathBuf,
    network: Option<PathBuf>,
    is_daemon: bool,
    has_new_pids: bool,
    settings: Vec<Setting>,
    version: Version,
    parent: Option<PathBuf>,
    limits: Vec<Limit>,
    /// Arguments for the program.
    args: Vec<OsString>,
}

pub(super) fn command() -> Command {
    let args = Arg::new(ARGS).last(true).num_args(0..).value_name("ARGS");
    let args = args.help("Arguments for the program").value_parser(clap::value_parser!(OsString));
    flags::add(Command::new("jailer"), FLAGS).arg(args)
}

pub(super) fn main(words: Vec<OsString>, started: Instant) -> ExitCode {
    let matches = match command().try_get_matches_from(words) {
        // What else is needed, it does not need then.
        Ok(matches) if matches.get_flag("version") => {
            return super::print(format!("Jailer v{FIRECRACKER_VERSION}\n").as_bytes());
        }
        matches => matches,
    };
    match matches.and_then(|matches| JailerArgs::new(&matches)) {
        Ok(args) => args.carry_out(started).unwrap_or_else(|e| fail(e.exit_code(), &e)),
        Err(e) => refuse_arguments(&e),
    }
}

impl JailerArgs {
    fn new(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = Given(matches);
        Ok(Self {
            id: given.needed("id", id)?,
            program: given.needed("exec-file", text)?,
            owner: owner(&given)?,
            base: given.one("chroot-base-dir", text)?.unwrap_or_else(|| "/srv/jailer".into()),
            network: given.one("netns", text)?,
            is_daemon: given.has("daemonize"),
            has_new_pids: given.has("new-pid-ns"),
            settings: given.all("cgroup", setting)?,
            version: given.one("cgroup-version", version)?.unwrap_or(Version::V1),
            parent: given.one("parent-cgroup", text)?,
            limits: given.all("resource-limit", resource_limit)?,
            args: words(matches, ARGS),
        })
    }

    fn carry_out(self, started: Instant) -> Result<ExitCode, JailError> {
        let (start_us, start_cpu_us) =
            (now_us(ClockId::Monotonic), now_us(ClockId::ProcessCPUTime));
        let jailer = rustix::process::getpid();
        forget_inheritance(&[])?;
        let program = Program::open(&self.program)?;
        let parent = self.parent.clone().unwrap_or_else(|| program.name().into());
        let chroot = Chroot {
            owner: self.owner,
            base: self.base.clone(),
            program,
            network: self.network.as_deref().map(open_network).transpose()?,
            group: self.group(&parent)?,
            limits: default_limits(DESCRIPTORS)
                .into_iter()
                .chain(self.limits.iter().copied())
                .collect(),
            is_daemon: self.is_daemon,
            has_new_pids: self.has_new_pids,
            id: self.id.clone(),
        };
        let program = chroot.enter()?;
        // Of a child the clock begins anew.
        let cpu_us = now_us(ClockId::ProcessCPUTime);
        let is_same = rustix::process::getpid() == jailer;
        let (new_start_us, parent_us) =
            if is_same { (cpu_us, cpu_us.saturating_sub(start_cpu_us)) } else { (0, start_cpu_us) };
        let mut args: Vec<OsString> = ["--id", &self.id].map(Into::into).to_vec();
        for (flag, us) in [
            ("--start-time-us", start_us),
            ("--start-time-cpu-us", new_start_us),
            ("--parent-cpu-time-us", parent_us),
        ] {
            args.extend([flag.into(), us.to_string().into()]);
        }
        args.extend(self.args);
        if !program.is_loaded() {
            return Err(program.execute(&args));
        }
        drop(program);
        // Clients look for this name.
        rustix::thread::set_name(c"firecracker").map_err(JailError::host("set the name"))?;
        crate::logger::start_as("firecracker");
        let words = std::iter::once("firecracker".into()).chain(args).collect();
        Ok(firecracker::main(words, started))
    }

    fn group(&self, parent: &Path) -> Result<Group, JailError> {
        let version = self.version;
        if self.settings.is_empty() {
            // Of version 2, whoever names a group and no setting has made it.
            return match (version, &self.parent) {
                (Version::V2, Some(parent)) => Group::open(&Mounted::find(None)?, parent),
                _ => Ok(Group::default()),
            };
        }
        let place = (parent, self.id.as_str());
        Group::make(&Mounted::find(None)?, version, place, &self.settings, Existing::Use)
    }
}

fn now_us(clock: ClockId) -> u64 {
    let now = rustix::time::clock_gettime(clock);
    u64::try_from(now.tv_sec * 1_000_000 + now.tv_nsec / 1000).unwrap_or_default()
}

fn setting(s: &str) -> Result<Setting, String> {
    let is_name = |file: &str| {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        file.contains('.') && !file.starts_with('.') && file.chars().all(is_allowed)
    };
    match s.split_once('=') {
        Some((file, value)) if is_name(file) && !value.is_empty() => Ok(Setting::new(file, value)),
        _ => Err("want FILE=VALUE, like cpu.shares=512".into()),
    }
}

fn version(s: &str) -> Result<Version, String> {
    match s {
        "1" => Ok(Version::V1),
        "2" => Ok(Version::V2),
        _ => Err("want 1 or 2".into()),
    }
}

fn resource_limit(s: &str) -> Result<Limit, String> {
    limit(s, &[("fsize", Resource::Fsize), ("no-file", Resource::Nofile)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_a_file_of_the_group_and_no_path() {
        assert!(setting("cpuset.cpus=0-1").is_ok() && setting("io.max=8:0 rbps=1").is_ok());
        for bad in ["cpu", "cpu=1", "cpu.max", "cpu.max=", "../cpu.max=1", "a/b.c=1", ".x=1"] {
            assert!(setting(bad).is_err(), "{bad}");
        }
    }
}
