//! The root of a jail: a mount that nobody sees yet, which becomes `/` of a mount namespace of its own.
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use super::path::{Beneath, Kind, Owner, in_jail, open, stat};
use super::{JailError, sys};

/// What nothing in a jail needs.
const RESTRICTED: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// The size of a root in memory. Nothing is in it but names.
const TMPFS_OPTIONS: [(&str, &str); 4] =
    [("source", "jail"), ("size", "64k"), ("nr_inodes", "4096"), ("mode", "0755")];

/// A mount that is not attached to any place.
#[derive(Debug)]
pub(super) struct Detached(OwnedFd);

impl Detached {
    /// The file or directory `fd`, without what is mounted in it.
    pub(super) fn clone_of(fd: impl AsFd) -> Result<Self, JailError> {
        Self::copy(fd, OpenTreeFlags::empty())
    }

    /// The directory `fd`, with what is mounted in it.
    pub(super) fn clone_all_of(fd: impl AsFd) -> Result<Self, JailError> {
        Self::copy(fd, OpenTreeFlags::AT_RECURSIVE)
    }

    fn copy(fd: impl AsFd, more: OpenTreeFlags) -> Result<Self, JailError> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | more;
        rustix::mount::open_tree(fd, c"", flags)
            .map(Self)
            .map_err(JailError::host("copy a mount, which needs root and Linux 5.12 or later"))
    }

    /// A new file system in memory.
    pub(super) fn tmpfs() -> Result<Self, JailError> {
        Self::of(
            "tmpfs",
            &TMPFS_OPTIONS,
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC,
        )
    }

    /// What the kernel tells a process of itself, and nothing else.
    fn proc() -> Result<Self, JailError> {
        let options = [("source", "proc"), ("hidepid", "ptraceable"), ("subset", "pid")];
        Self::of("proc", &options, RESTRICTED | MountAttrFlags::MOUNT_ATTR_RDONLY)
    }

    fn of(kind: &str, options: &[(&str, &str)], flags: MountAttrFlags) -> Result<Self, JailError> {
        let failed = |e: Errno| JailError::host(&format!("make a file system of kind {kind}"))(e);
        let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
        for (key, value) in options {
            rustix::mount::fsconfig_set_string(&context, *key, *value).map_err(failed)?;
        }
        rustix::mount::fsconfig_create(&context).map_err(failed)?;
        let made = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags);
        made.map(Self).map_err(failed)
    }

    /// Attaches it in the place of `name` in `directory`.
    fn attach(&self, directory: impl AsFd, name: &Path) -> Result<(), JailError> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&self.0, c"", directory, name, flags)
            .map_err(JailError::host("attach a mount in the jail"))
    }

    /// Sets attributes.
    pub(super) fn restrict(&self, flags: MountAttrFlags) -> Result<(), JailError> {
        sys::set_mount(&self.0, flags)
            .map_err(JailError::host("restrict a mount, which needs Linux 5.12 or later"))
    }
}

/// Something of the host that is to be in the jail, open.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Its path from the jail's root.
    path: PathBuf,
    what: What,
}

#[derive(Debug)]
enum What {
    File(Detached),
    Directory(Detached),
    /// Made anew, for the jail's user: the host's may be for others.
    Node(FileType, u64),
}

impl Entry {
    /// Opens `host`, which is to be at `path`.
    pub(crate) fn open(
        host: &Path,
        path: &Path,
        kind: Kind,
        is_writable: bool,
    ) -> Result<Self, JailError> {
        let path = in_jail(path)?;
        let fd = open(host, kind)?;
        let what = match kind {
            Kind::File | Kind::Directory => {
                let mount = Detached::clone_of(&fd)?;
                let read_only = match is_writable {
                    true => MountAttrFlags::empty(),
                    false => MountAttrFlags::MOUNT_ATTR_RDONLY,
                };
                mount.restrict(RESTRICTED | read_only)?;
                if kind == Kind::File { What::File(mount) } else { What::Directory(mount) }
            }
            Kind::Device | Kind::Any => {
                let found = stat(&fd)?;
                What::Node(FileType::from_raw_mode(found.st_mode), found.st_rdev)
            }
        };
        Ok(Self { path, what })
    }

    /// Puts it into the jail, whose root is `root`: a file system that is as yet ours alone.
    fn put(&self, root: &Beneath<OwnedFd>, owner: Owner) -> Result<(), JailError> {
        let Self { path, what } = self;
        let mount = match what {
            What::Node(kind, device) => return root.node(path, *kind, *device, owner),
            What::File(mount) | What::Directory(mount) => mount,
        };
        let (directory, name) = root.place(path)?;
        match what {
            What::Directory(_) => {
                let made = rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755));
                made.map_err(|e| super::path::taken(path, e))?;
            }
            _ => drop(Beneath::new(&directory).create(name, Mode::RUSR)?),
        }
        mount.attach(&directory, name)
    }
}

/// Makes `root` the root of this process, in a mount namespace that is its own; the root, open. The rest of the
/// host's files is out of reach from then on.
pub(super) fn enter(root: Detached) -> Result<Beneath<OwnedFd>, JailError> {
    // What happens to mounts of the host is not seen here, nor the other way round.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private)
        .map_err(JailError::host("part from the host's mounts"))?;
    root.attach(CWD, Path::new("/"))?;
    let Detached(root) = root;
    rustix::process::fchdir(&root).map_err(JailError::host("enter the jail"))?;
    // The old root comes to lie on the new one, and goes from there.
    rustix::process::pivot_root(".", ".").map_err(JailError::host("change the root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)
        .map_err(JailError::host("let go of the old root"))?;
    rustix::process::chdir("/").map_err(JailError::host("enter the jail"))?;
    Ok(Beneath::new(root))
}

/// Fills a root that is ours alone.
pub(super) fn fill(
    root: &Beneath<OwnedFd>,
    entries: &[Entry],
    owner: Owner,
) -> Result<(), JailError> {
    entries.iter().try_for_each(|entry| entry.put(root, owner))
}

/// Lets the process see what the kernel tells of it, at `/proc`.
pub(super) fn add_proc(root: &Beneath<OwnedFd>) -> Result<(), JailError> {
    root.directory(Path::new("proc"), Mode::from_raw_mode(0o555))?;
    Detached::proc()?.attach(&root.top, Path::new("proc"))
}

/// Nothing can be made in the root itself any more.
pub(super) fn seal(root: &Beneath<OwnedFd>) -> Result<(), JailError> {
    sys::set_mount(&root.top, MountAttrFlags::MOUNT_ATTR_RDONLY)
        .map_err(JailError::host("make the root read-only"))
}
