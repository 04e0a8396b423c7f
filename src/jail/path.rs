//! Opening what was named by path, once: from there on it is a descriptor, whatever becomes of the path.
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use devices::backend::file::name_of;
use rustix::fs::{AtFlags, CWD, Dev, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid};
use rustix::io::Errno;

use super::JailError;

/// Whose files of the jail are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
}

/// Which kinds of file a path may lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A character or block device.
    Device,
    /// Whatever it is, another check follows: a namespace.
    Any,
}

/// Opens `path` without reading from it, and without following a link on the way.
pub(crate) fn open(path: &Path, kind: Kind) -> Result<OwnedFd, JailError> {
    let flags = match kind {
        Kind::Any => OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY,
        _ => OFlags::PATH,
    };
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let opened = rustix::fs::openat2(CWD, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve);
    let fd = opened.map_err(|e| refuse(path, e))?;
    let found = stat(&fd)?;
    let found = FileType::from_raw_mode(found.st_mode);
    let wanted = match (kind, found) {
        (Kind::Any, _)
        | (Kind::File, FileType::RegularFile)
        | (Kind::Directory, FileType::Directory)
        | (Kind::Device, FileType::CharacterDevice | FileType::BlockDevice) => return Ok(fd),
        (Kind::File, _) => "a regular file; use --dir or --device",
        (Kind::Directory, _) => "a directory; use --file or --device",
        (Kind::Device, _) => "a device; use --file or --dir",
    };
    let shown = path.display();
    Err(JailError::Refused(format!("{shown} is {}, want {wanted}", name_of(found))))
}

fn refuse(path: &Path, e: Errno) -> JailError {
    let shown = path.display();
    match e {
        Errno::LOOP => JailError::Refused(format!(
            "{shown} has a symbolic link in it, which could lead elsewhere by the time it is used; give \
             its real path: realpath {shown}"
        )),
        Errno::NOSYS => JailError::host("open without links, which needs Linux 5.12 or later")(e),
        _ => JailError::path(format!("cannot open {shown}"))(e),
    }
}

pub(super) fn stat(fd: impl AsFd) -> Result<Stat, JailError> {
    rustix::fs::fstat(fd).map_err(JailError::host("look at what was opened"))
}

/// A path in the jail, from its root, without `.` and `..`.
pub(super) fn in_jail(path: &Path) -> Result<PathBuf, JailError> {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::RootDir | Component::CurDir => {}
            _ => {
                let shown = path.display();
                return Err(JailError::Refused(format!(
                    "{shown}: a path in the jail has no '..'; say where it is to be: {shown}:/NAME"
                )));
            }
        }
    }
    match clean.as_os_str().is_empty() {
        false => Ok(clean),
        true => Err(JailError::Refused("the jail's root cannot be replaced; say where".into())),
    }
}

/// Where paths of the jail begin. Whoever is to be jailed may have written to what is there, and may go on: nothing
/// is followed, and everything is judged when it is open.
#[derive(Debug)]
pub(super) struct Beneath<F> {
    pub(super) top: F,
    resolve: ResolveFlags,
}

impl<F: AsFd> Beneath<F> {
    /// What is below `top`.
    pub(super) fn new(top: F) -> Self {
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        Self { top, resolve }
    }

    /// The same without what is mounted there.
    pub(super) fn without_mounts(self) -> Self {
        Self { resolve: self.resolve | ResolveFlags::NO_XDEV, ..self }
    }

    /// Opens what is called `path`.
    pub(super) fn open(&self, path: &Path, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat2(&self.top, path, flags, mode, self.resolve)
    }

    /// The same rules in another directory.
    fn at<G: AsFd>(&self, top: G) -> Beneath<G> {
        Beneath { top, resolve: self.resolve }
    }

    /// Opens a directory, and makes it and those above it if they are missing.
    pub(super) fn directory(&self, path: &Path, mode: Mode) -> Result<OwnedFd, JailError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let shown = path.display();
        let failed = |e: Errno| match e {
            Errno::LOOP | Errno::NOTDIR => JailError::Refused(format!(
                "{shown}: a part of it is a symbolic link or no directory; remove it"
            )),
            Errno::XDEV => JailError::Refused(format!(
                "/{shown} of the jail is in a directory of the host; choose another place for what is in it"
            )),
            e => JailError::host(&format!("make {shown} in the jail"))(e),
        };
        let mut reached = self.open(Path::new("."), flags, Mode::empty()).map_err(failed)?;
        for name in path {
            let name = Path::new(name);
            match rustix::fs::mkdirat(&reached, name, mode) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(failed(e)),
            }
            reached = self.at(reached).open(name, flags, Mode::empty()).map_err(failed)?;
        }
        Ok(reached)
    }

    /// The directory that `path` is in, made if it is missing, and its name there.
    pub(super) fn place<'a>(&self, path: &'a Path) -> Result<(OwnedFd, &'a Path), JailError> {
        let (parent, name) = (path.parent(), path.file_name().map(Path::new));
        let name = name.ok_or_else(|| JailError::Refused("a path without a name".into()))?;
        Ok((self.directory(parent.unwrap_or(Path::new("")), Mode::from_raw_mode(0o755))?, name))
    }

    /// Makes a file that was not there.
    pub(super) fn create(&self, name: &Path, mode: Mode) -> Result<OwnedFd, JailError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        self.open(name, flags, mode).map_err(|e| taken(name, e))
    }

    /// Makes a node for a device, for `owner` alone.
    pub(super) fn node(
        &self,
        path: &Path,
        kind: FileType,
        device: Dev,
        owner: Owner,
    ) -> Result<(), JailError> {
        let (directory, name) = self.place(path)?;
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(&directory, name, kind, mode, device).map_err(|e| taken(path, e))?;
        // It may have been swapped for a link to another's file by now.
        let node = self.at(directory).open(name, OFlags::PATH, Mode::empty());
        let node = node.map_err(|e| taken(path, e))?;
        let found = stat(&node)?;
        if FileType::from_raw_mode(found.st_mode) != kind
            || (found.st_rdev, found.st_nlink) != (device, 1)
        {
            return Err(swapped(path));
        }
        let (uid, gid) = (Some(owner.uid), Some(owner.gid));
        rustix::fs::chownat(&node, c"", uid, gid, AtFlags::EMPTY_PATH)
            .map_err(JailError::host("give a device to the jail's user"))
    }
}

/// Something in the jail's directory is not what was made there a moment ago.
pub(super) fn swapped(path: &Path) -> JailError {
    let shown = path.display();
    JailError::Refused(format!(
        "{shown} was changed while the jail was made; use another directory"
    ))
}

pub(super) fn taken(path: &Path, e: Errno) -> JailError {
    let shown = path.display();
    match e {
        Errno::EXIST | Errno::LOOP => JailError::Refused(format!(
            "{shown} is in the jail already, of an earlier start or because two have that path; remove it or \
             choose another"
        )),
        e => JailError::host(&format!("make {shown} in the jail"))(e),
    }
}

/// The last part of a path that names a program.
pub(crate) fn file_name(path: &Path) -> Result<&OsStr, JailError> {
    let why = || JailError::Refused(format!("{} names no file", path.display()));
    path.file_name().ok_or_else(why)
}
