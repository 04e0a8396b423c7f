//! `husk jail`: from arguments to a jail, and to the husk in it.
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Arg, ArgMatches, Parser};
use rustix::fs::{Gid, Uid};
use rustix::process::Resource;

use super::flags::{self, Flag, Given, number, text};
use super::{Cli, Command, fail, refuse_arguments};
use crate::exit::ExitCode;
use crate::jail::{
    Entry, Existing, Group, IO_WORDS, IoMax, Jail, JailError, Kind, Limit, Limits, Mounted, Owner,
    Side, default_limits, forget_inheritance, open,
};

/// Descriptors that a jailed process may have; a vsock device has 2048 streams.
const DESCRIPTORS: u64 = 4096;
/// The kernel's own choice.
const CPU_PERIOD_US: u64 = 100_000;

/// The flags, and what they mean.
const FLAGS: &[Flag] = &[
    (
        "id",
        Some("ID"),
        "A name that no other jail has, 1 to 64 letters, digits or '-'; the VM's, too, unless it has its own",
    ),
    ("uid", Some("N"), "The user that husk runs as; one that nobody else has. Not 0"),
    ("gid", Some("N"), "The group that husk runs as. Not 0"),
    (
        "file",
        Some("FILE"),
        "A file of the host: HOST[:JAIL][,rw]; JAIL is its path in there, the same if it is not said; read-only without rw",
    ),
    (
        "dir",
        Some("DIR"),
        "A directory of the host, without what is mounted in it: HOST[:JAIL][,rw]",
    ),
    (
        "device",
        Some("DEVICE"),
        "A device of the host: HOST[:JAIL]; a node like it, for husk's user. /dev/kvm and /dev/null are always there",
    ),
    ("kvm", Some("DEVICE"), "The node that is /dev/kvm in the jail [default: /dev/kvm]"),
    ("fd", Some("N"), "Leave this descriptor open, for --net fd=N; all others are closed"),
    (
        "netns",
        Some("PATH"),
        "The network namespace, like /run/netns/NAME; without it a new one, with nothing in it",
    ),
    ("user-ns", None, "A user namespace, too, in which there is only husk's user"),
    ("no-proc", None, "No /proc in the jail; then there are no snapshots"),
    (
        "memory-max",
        Some("BYTES"),
        "Most memory, guest and husk together: 512M; K, M and G are 2^10, 2^20, 2^30. None is swapped",
    ),
    (
        "cpu-max",
        Some("TIME"),
        "Most processor time, QUOTA[/PERIOD], in microseconds: 150000/100000 is one and a half processors",
    ),
    ("pids-max", Some("N"), "Most processes and threads"),
    (
        "io-max",
        Some("LIMIT"),
        "Most I/O on a disk, a second: MAJ:MIN[,rbps=N][,wbps=N][,riops=N][,wiops=N]",
    ),
    ("cgroup-parent", Some("PATH"), "The cgroup in which the jail's is made [default: husk]"),
    (
        "cgroup-root",
        Some("DIR"),
        "The cgroup hierarchy, of version 2, if it is not one of those that are mounted",
    ),
    (
        "rlimit",
        Some("LIMIT"),
        "A limit of the process: NAME=N; NAME is nofile, fsize, nproc or memlock",
    ),
];

/// Start a husk in a jail.
#[derive(Debug)]
pub(super) struct JailArgs {
    id: String,
    owner: Owner,
    files: Vec<PathArg>,
    directories: Vec<PathArg>,
    devices: Vec<PathArg>,
    kvm: PathBuf,
    descriptors: Vec<RawFd>,
    network: Option<PathBuf>,
    has_user_namespace: bool,
    has_proc: bool,
    limits: Limits,
    group_parent: PathBuf,
    group_root: Option<PathBuf>,
    process_limits: Vec<Limit>,
    /// What to run, with its arguments.
    command: Vec<OsString>,
}

impl clap::Args for JailArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        let inner = Arg::new(COMMAND).last(true).required(true).num_args(1..).help(
            "What to run: run, api or restore, with their arguments; paths are those of the jail",
        );
        let inner = inner.value_name("COMMAND").value_parser(clap::value_parser!(OsString));
        flags::add(command, FLAGS).arg(inner).after_help(EXAMPLES)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for JailArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = Given(matches);
        let limits = Limits {
            memory: given.one("memory-max", bytes)?,
            cpu: given.one("cpu-max", cpu_max)?,
            pids: given.one("pids-max", number)?,
            io: given.all("io-max", io_max)?,
        };
        Ok(Self {
            id: given.needed("id", id)?,
            owner: owner(&given)?,
            files: given.all("file", path_arg)?,
            directories: given.all("dir", path_arg)?,
            devices: given.all("device", path_arg)?,
            kvm: given.one("kvm", text)?.unwrap_or_else(|| "/dev/kvm".into()),
            descriptors: given.all("fd", descriptor)?,
            network: given.one("netns", text)?,
            has_user_namespace: given.has("user-ns"),
            has_proc: !given.has("no-proc"),
            limits,
            group_parent: given.one("cgroup-parent", text)?.unwrap_or_else(|| "husk".into()),
            group_root: given.one("cgroup-root", text)?,
            process_limits: given.all("rlimit", rlimit)?,
            command: words(matches, COMMAND),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

const COMMAND: &str = "command";

/// What follows `--`.
pub(super) fn words(matches: &ArgMatches, name: &str) -> Vec<OsString> {
    matches.get_many(name).into_iter().flatten().cloned().collect()
}

/// Who runs in the jail.
pub(super) fn owner(given: &Given<'_>) -> Result<Owner, clap::Error> {
    Ok(Owner {
        uid: Uid::from_raw(given.needed("uid", not_root)?),
        gid: Gid::from_raw(given.needed("gid", not_root)?),
    })
}

const EXAMPLES: &str = "\
Examples:
  husk jail --id a --uid 9001 --gid 9001 --memory-max 256M -- run
  husk jail --id b --uid 9002 --gid 9002 --file vmlinux --file root.ext4,rw \\
       -- run --kernel vmlinux --disk root.ext4
  husk jail --id c --uid 9003 --gid 9003 --dir /srv/c:/srv,rw --netns /run/netns/c \\
       --device /dev/net/tun -- api --api-sock /srv/husk.sock

The files must let the user in. The exit code is that of what runs, and 128 and the signal's number if
one kills it; 2, 3 and 4 also tell that there is no jail. docs/jail.md says more.";

/// `HOST[:JAIL][,rw]`
#[derive(Clone, Debug)]
struct PathArg {
    host: PathBuf,
    jail: PathBuf,
    is_writable: bool,
}

fn path_arg(s: &str) -> Result<PathArg, String> {
    let (paths, is_writable) = match s.strip_suffix(",rw") {
        Some(paths) => (paths, true),
        None => (s.strip_suffix(",ro").unwrap_or(s), false),
    };
    // A name may have a colon in it.
    let split = paths.rsplit_once(':').filter(|(_, jail)| jail.starts_with('/'));
    let (host, jail) = split.unwrap_or((paths, paths));
    match host.is_empty() {
        true => Err("want HOST[:JAIL][,rw]".into()),
        false => Ok(PathArg { host: host.into(), jail: jail.into(), is_writable }),
    }
}

impl JailArgs {
    pub(super) fn carry_out(self, started: Instant) -> ExitCode {
        let command = match inner(&self.id, &self.command) {
            Ok(command) => command,
            Err(code) => return code,
        };
        match self.jail().and_then(Jail::enter) {
            Ok(Side::Inside) => command.carry_out(started),
            Ok(Side::Outside(code)) => std::process::exit(code),
            Err(e) => fail(e.exit_code(), &e),
        }
    }

    /// Opens all that is named.
    fn jail(self) -> Result<Jail, JailError> {
        forget_inheritance(&self.descriptors)?;
        let kvm = Entry::open(&self.kvm, Path::new("/dev/kvm"), Kind::Device, false)?;
        // The process that makes children has it for standard streams.
        let null = Path::new("/dev/null");
        let mut entries = vec![kvm, Entry::open(null, null, Kind::Device, false)?];
        let lists = [
            (self.directories, Kind::Directory),
            (self.files, Kind::File),
            (self.devices, Kind::Device),
        ];
        for (list, kind) in lists {
            for PathArg { host, jail, is_writable } in list {
                entries.push(Entry::open(&host, &jail, kind, is_writable)?);
            }
        }
        let network = self.network.map(|path| open(&path, Kind::Any)).transpose()?;
        let mounted = Mounted::find(self.group_root.as_deref())?;
        let version = mounted.version_for(&self.limits);
        let settings = self.limits.settings(version);
        let place = (self.group_parent.as_path(), self.id.as_str());
        let group = Group::make(&mounted, version, place, &settings, Existing::Replace)?;
        Ok(Jail {
            id: self.id,
            owner: self.owner,
            entries,
            network,
            group,
            limits: default_limits(DESCRIPTORS).into_iter().chain(self.process_limits).collect(),
            has_user_namespace: self.has_user_namespace,
            has_proc: self.has_proc,
        })
    }
}

/// What runs in the jail.
fn inner(id: &str, words: &[OsString]) -> Result<Command, ExitCode> {
    let mut words: Vec<OsString> = words.to_vec();
    let is_named =
        words.iter().any(|word| word == "--id" || word.as_encoded_bytes().starts_with(b"--id="));
    if !is_named {
        words.extend(["--id".into(), id.into()]);
    }
    let parsed = Cli::try_parse_from(std::iter::once("husk".into()).chain(words));
    match parsed.map_err(|e| refuse_arguments(&e))?.command {
        command @ (Command::Run(_) | Command::Api(_) | Command::Restore(_)) => Ok(command),
        _ => {
            crate::logger::complain(
                "husk jail starts run, api or restore; say one of them after --",
            );
            Err(ExitCode::Usage)
        }
    }
}

/// What Firecracker's jailer allows.
pub(super) fn id(s: &str) -> Result<String, String> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '-';
    match (1..=64).contains(&s.len()) && s.chars().all(is_allowed) {
        true => Ok(s.into()),
        false => Err("want 1 to 64 letters, digits or '-'".into()),
    }
}

/// A user or group: not root, and not the kernel's word for none.
fn not_root(s: &str) -> Result<u32, String> {
    match s.parse() {
        Ok(0 | u32::MAX) | Err(_) => Err("want a number above 0: nobody is root in a jail".into()),
        Ok(id) => Ok(id),
    }
}

fn descriptor(s: &str) -> Result<RawFd, String> {
    match s.parse() {
        Ok(fd @ 3..) => Ok(fd),
        _ => Err("want a number above 2; standard streams stay open".into()),
    }
}

fn bytes(s: &str) -> Result<u64, String> {
    let digits = s.trim_end_matches(['K', 'M', 'G', 'k', 'm', 'g']);
    let shift = match s[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err("want a number, K, M or G after it or not".into()),
    };
    let number = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    number.ok_or_else(|| "want a number, K, M or G after it or not".into())
}

fn cpu_max(s: &str) -> Result<(u64, u64), String> {
    let (quota, period) = s.split_once('/').map_or((s, None), |(q, p)| (q, Some(p)));
    let period = period.map_or(Ok(CPU_PERIOD_US), str::parse);
    match (quota.parse(), period) {
        (Ok(quota), Ok(period)) => Ok((quota, period)),
        _ => Err("want QUOTA[/PERIOD], two numbers of microseconds".into()),
    }
}

fn io_max(s: &str) -> Result<IoMax, String> {
    let bad = || "want MAJ:MIN[,rbps=N][,wbps=N][,riops=N][,wiops=N]".to_owned();
    let mut words = s.split(',');
    let device = words.next().unwrap_or_default();
    let numbers = device.split_once(':').map(|(a, b)| (a.parse::<u32>(), b.parse::<u32>()));
    let Some((Ok(_), Ok(_))) = numbers else { return Err(bad()) };
    let limits = words.map(|word| {
        let (name, most) = word.split_once('=').ok_or_else(bad)?;
        let is_known = IO_WORDS.iter().any(|(known, _)| *known == name);
        match most.parse() {
            Ok(most) if is_known => Ok((name.to_owned(), most)),
            _ => Err(bad()),
        }
    });
    let limits = limits.collect::<Result<Vec<_>, _>>()?;
    if limits.is_empty() {
        return Err(bad());
    }
    Ok(IoMax { device: device.into(), limits })
}

fn rlimit(s: &str) -> Result<Limit, String> {
    limit(
        s,
        &[
            ("nofile", Resource::Nofile),
            ("fsize", Resource::Fsize),
            ("nproc", Resource::Nproc),
            ("memlock", Resource::Memlock),
        ],
    )
}

/// `NAME=N`, of these names.
pub(super) fn limit(s: &str, names: &[(&str, Resource)]) -> Result<Limit, String> {
    let found = s.split_once('=').and_then(|(name, most)| {
        let (_, resource) = names.iter().find(|(known, _)| *known == name)?;
        Some((*resource, most.parse().ok()?))
    });
    found.ok_or_else(|| {
        let names: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
        format!("want NAME=N, where NAME is {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_have_a_colon_and_a_comma() {
        let parse = |s: &str| {
            let PathArg { host, jail, is_writable } = path_arg(s).unwrap();
            (host.display().to_string(), jail.display().to_string(), is_writable)
        };
        assert_eq!(parse("a"), ("a".into(), "a".into(), false));
        assert_eq!(parse("a,ro"), ("a".into(), "a".into(), false));
        assert_eq!(parse("/x:y/a,b:/c,rw"), ("/x:y/a,b".into(), "/c".into(), true));
        assert!(path_arg("").is_err() && path_arg(":/a").is_err());
    }

    #[test]
    fn numbers_have_units_and_bounds() {
        assert_eq!(bytes("512M"), Ok(512 << 20));
        assert_eq!(bytes("7"), Ok(7));
        for bad in ["", "M", "-1", "1MM", "1T", "99999999999G"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
        assert_eq!(cpu_max("50000"), Ok((50_000, CPU_PERIOD_US)));
        assert_eq!(cpu_max("5/10"), Ok((5, 10)));
        assert!(cpu_max("1.5").is_err() && cpu_max("5/").is_err());
        assert_eq!(io_max("8:0,rbps=1").unwrap().limits, [("rbps".to_owned(), 1)]);
        for bad in ["8:0", "8,rbps=1", "sda,rbps=1", "8:0,rbps=max", "8:0,speed=1"] {
            assert!(io_max(bad).is_err(), "{bad}");
        }
        assert!(
            rlimit("nofile=5").is_ok() && rlimit("core=5").is_err() && rlimit("nofile").is_err()
        );
    }

    #[test]
    fn an_id_is_firecrackers() {
        assert!(id("a-B-9").is_ok() && id(&"a".repeat(64)).is_ok());
        for bad in ["", ".", "..", "a/b", "a_b", "ä", &"a".repeat(65)] {
            assert!(id(bad).is_err(), "{bad}");
        }
    }
}
