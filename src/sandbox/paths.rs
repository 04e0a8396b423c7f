//! Landlock: which files a thread may reach by path, whatever its user may; and no TCP.
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use devices::backend::file::is_shortage;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};

use super::{Allowed, Wanted, ready};
use crate::error::Refusal;

/// The newest of Landlock that this was tested with. Of an older kernel as much is used as it has.
const ABI_TESTED: ABI = ABI::V7;

/// Where files may be used by path once the guest runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Roots {
    /// Anywhere, by the one thread that may.
    Anywhere,
    /// At or below these.
    Below(Vec<PathBuf>),
    /// By no thread at all.
    Nowhere,
}

impl Roots {
    /// Those that are wanted. Who wants the whole sandbox wants no path that was not said.
    pub(super) fn of(wanted: &Wanted) -> Result<Self, Refusal> {
        let paths = match &wanted.allowed {
            Allowed::Unsaid if wanted.is_required => return Ok(Self::Below(Vec::new())),
            Allowed::Unsaid => return Ok(Self::Anywhere),
            Allowed::Nothing => return Ok(Self::Nowhere),
            Allowed::Below(paths) => paths,
        };
        for path in paths {
            let found = rustix::fs::stat(path);
            found.map_err(|e| Refusal::Allow { path: path.clone(), source: e.into() })?;
        }
        Ok(Self::Below(paths.clone()))
    }
}

/// What a thread may do by path.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rules<'a> {
    /// Nothing at all.
    Closed,
    /// Use files at the roots and in some other directories, and remove files in yet others.
    Files { roots: &'a Roots, removable: &'a [PathBuf], usable: &'a [PathBuf] },
    /// Remove files in some directories.
    Names { removable: &'a [PathBuf] },
}

/// What a VM that is restored in place of another opens anew, and what children do.
const DEVICES: [&str; 2] = ["/dev/kvm", "/dev/null"];

/// All that husk may want of a file that it uses: never to execute it, nor to make a device node.
fn of_files() -> BitFlags<AccessFs> {
    let never = AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::MakeSym;
    AccessFs::from_all(ABI_TESTED) & !never
}

impl Rules<'_> {
    /// Enforces them on the calling thread, and those that it starts from now on. Does nothing where the kernel has no
    /// Landlock.
    pub(super) fn enforce(self) -> io::Result<()> {
        if matches!(self, Self::Closed)
            && let Some(done) = ready::enforce()
        {
            return done;
        }
        enforce(self.ruleset()?)
    }

    /// Makes them: a descriptor, until they are in force.
    pub(super) fn ruleset(self) -> io::Result<RulesetCreated> {
        let mut rules = all(self).map_err(io::Error::other)?;
        let removable = match self {
            Self::Closed => &[],
            Self::Files { removable, .. } | Self::Names { removable } => removable,
        };
        for path in removable {
            rules = allow(rules, path, AccessFs::RemoveFile.into())?;
        }
        let Self::Files { roots, usable, .. } = self else { return Ok(rules) };
        // Page maps. What is of other processes there is theirs: Landlock lets nobody trace out of a sandbox.
        rules = allow(rules, Path::new("/proc"), AccessFs::ReadFile.into())?;
        for path in usable {
            rules = allow(rules, path, of_files())?;
        }
        match roots {
            Roots::Nowhere => {}
            Roots::Anywhere => rules = allow(rules, Path::new("/"), of_files())?,
            Roots::Below(paths) => {
                let paths = paths.iter().map(PathBuf::as_path);
                for path in paths.chain(DEVICES.map(Path::new)) {
                    rules = allow(rules, path, of_files())?;
                }
            }
        }
        Ok(rules)
    }
}

/// Enforces what was made on the calling thread, and those that it starts from now on.
pub(super) fn enforce(rules: RulesetCreated) -> io::Result<()> {
    // Set for the whole process before there were threads.
    rules.no_new_privs(false).restrict_self().map(drop).map_err(io::Error::other)
}

/// Makes the rules of threads that may use no path, for all of them.
pub(super) fn make_ready() -> io::Result<()> {
    ready::keep(Rules::Closed.ruleset()?.into());
    Ok(())
}

/// Nothing is allowed yet.
fn all(rules: Rules<'_>) -> Result<RulesetCreated, RulesetError> {
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI_TESTED))?
        .handle_access(AccessNet::from_all(ABI_TESTED))?
        .scope(Scope::AbstractUnixSocket)?;
    match rules {
        // Seccomp forbids to name another process.
        Rules::Closed | Rules::Names { .. } => ruleset,
        // Before that a thread could not send signals to another of its own process.
        Rules::Files { .. } if version() < SIGNALS_BETWEEN_THREADS => ruleset,
        Rules::Files { .. } => ruleset.scope(Scope::Signal)?,
    }
    .create()
}

/// The version of Landlock since which signals between threads of one process are not taken for ones to another.
const SIGNALS_BETWEEN_THREADS: u32 = 7;

fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> io::Result<RulesetCreated> {
    let file = match PathFd::new(path) {
        Ok(file) => file,
        Err(e) if is_shortage(&e) => return Err(io::Error::other(e)),
        // What is gone by now cannot be named, and cannot be opened.
        Err(_) => return Ok(rules),
    };
    let is_directory = rustix::fs::fstat(file.as_fd()).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory
    });
    let access = match is_directory {
        true => access,
        false => access & AccessFs::from_file(ABI_TESTED),
    };
    rules.add_rule(PathBeneath::new(file, access)).map_err(io::Error::other)
}

/// The version of Landlock that the kernel has; 0 is none.
pub(super) fn version() -> u32 {
    abi::version()
}

mod abi {
    #![expect(unsafe_code, reason = "our library does not tell the version")]

    const CREATE_RULESET_VERSION: libc::c_uint = 1;

    pub(super) fn version() -> u32 {
        // SAFETY: with this flag and no attributes the kernel only tells its version.
        let version = unsafe {
            libc::syscall(
                libc::SYS_landlock_create_ruleset,
                std::ptr::null::<libc::c_void>(),
                0_usize,
                CREATE_RULESET_VERSION,
            )
        };
        u32::try_from(version).unwrap_or(0)
    }
}
