//! Landlock: a configuration or a snapshot may name any path, and a fuzzer will. What this process opens or makes is
//! beneath the directories that it was given, that of temporary files, or, to be read only, where programs are.
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

/// linux/landlock.h, version 1 of the interface: all that can be done with files.
const ALL: u64 = (1 << 13) - 1;
const READ: u64 = 1 << 0 | 1 << 2 | 1 << 3;
/// Rights that a file can have, as opposed to a directory.
const OF_FILES: u64 = 1 << 0 | 1 << 1 | 1 << 2;
const RULE_PATH_BENEATH: libc::c_int = 1;

#[repr(C)]
struct Ruleset {
    handled_access_fs: u64,
}

#[repr(C, packed)]
struct PathBeneath {
    allowed_access: u64,
    parent_fd: RawFd,
}

/// Confines this process, before it has threads. Where the kernel has no Landlock it says so and goes on.
pub(crate) fn confine() {
    if let Err(e) = restrict() {
        eprintln!("fuzz: paths are not confined: {e}");
    }
}

fn restrict() -> std::io::Result<()> {
    let ruleset = Ruleset { handled_access_fs: ALL };
    let (none, size) = (0_u64, size_of::<Ruleset>());
    // SAFETY: the structure is as long as is said.
    let fd =
        checked(unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &ruleset, size, none) })?;
    for path in given().into_iter().chain([std::env::temp_dir(), "/dev/shm".into()]) {
        allow(fd, &path, ALL)?;
    }
    // What programs need: libFuzzer starts itself again to minimise, the sanitizer looks at its process.
    let program = std::env::current_exe()?;
    let needed = ["/usr", "/lib", "/lib64", "/etc", "/proc"].map(PathBuf::from);
    for path in needed.iter().chain([&program]) {
        allow(fd, path, READ)?;
    }
    // SAFETY: no pointers; the descriptor is a ruleset.
    unsafe {
        checked(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        checked(libc::syscall(libc::SYS_landlock_restrict_self, fd, none))?;
        libc::close(fd);
    }
    Ok(())
}

/// The files and directories on the command line, those that libFuzzer writes to, and where it was started.
fn given() -> Vec<PathBuf> {
    let mut paths = vec![PathBuf::from(".")];
    for argument in std::env::args().skip(1) {
        let path = argument.split_once('=').map_or(&*argument, |(_, value)| value);
        let path = Path::new(path);
        paths.push(path.to_owned());
        paths.extend(path.parent().map(Path::to_owned));
    }
    paths.retain(|path| path.exists() && *path != Path::new("/"));
    paths
}

fn allow(ruleset: RawFd, path: &Path, access: u64) -> std::io::Result<()> {
    let Ok(c_path) = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()) else {
        return Ok(());
    };
    // SAFETY: the path ends with a zero.
    let parent_fd = unsafe { libc::open(c_path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) };
    if parent_fd < 0 {
        return Ok(());
    }
    let of_kind = if path.is_dir() { access } else { access & OF_FILES };
    let rule = PathBeneath { allowed_access: of_kind, parent_fd };
    // SAFETY: the structure is what the kernel expects of the kind of rule.
    let added = unsafe {
        let added =
            libc::syscall(libc::SYS_landlock_add_rule, ruleset, RULE_PATH_BENEATH, &rule, 0);
        libc::close(parent_fd);
        added
    };
    checked(added).map(drop)
}

fn checked(result: libc::c_long) -> std::io::Result<RawFd> {
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(RawFd::try_from(result).unwrap_or(RawFd::MAX))
}
