//! The jail that Firecracker's jailer makes: a directory of the host, which its client has put files into, and which
//! becomes the root. There is no process outside: this one goes on, or a child of it.
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, OFlags, makedev};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use rustix::thread::UnshareFlags;

use super::path::{Beneath, file_name, stat, swapped};
use super::root::{self, Detached};
use super::{Group, JailError, Limit, Owner, privileges, process, sys};

/// Nodes that are made, by their numbers on every Linux.
const NODES: [(&str, u32, u32); 3] =
    [("dev/net/tun", 10, 200), ("dev/kvm", 10, 232), ("dev/urandom", 1, 9)];
/// This one's number differs, and not every host has it.
const USERFAULTFD: &str = "dev/userfaultfd";
/// Directories that belong to the jail's user, who makes sockets there.
const OWNED: [&str; 4] = [".", "dev", "dev/net", "run"];

/// The program that is to run in the jail.
#[derive(Debug)]
pub(crate) struct Program {
    file: File,
    path: PathBuf,
    name: OsString,
    is_loaded: bool,
}

impl Program {
    /// Opens it. A link to husk under another name is husk.
    pub(crate) fn open(path: &Path) -> Result<Self, JailError> {
        let shown = path.display();
        let name = file_name(path)?.to_owned();
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty())
            .map_err(JailError::path(format!("cannot open {shown}")))?;
        let found = stat(&file)?;
        let own = rustix::fs::stat("/proc/self/exe").map(|own| (own.st_dev, own.st_ino));
        let is_loaded = own == Ok((found.st_dev, found.st_ino));
        match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => {
                Ok(Self { file: file.into(), path: path.into(), name, is_loaded })
            }
            _ => Err(JailError::Refused(format!("{shown} is no program"))),
        }
    }

    /// What it is called.
    pub(crate) fn name(&self) -> &OsStr {
        &self.name
    }

    /// Whether it is the program that runs here: then there is nothing to execute.
    pub(crate) fn is_loaded(&self) -> bool {
        self.is_loaded
    }

    /// Copies it into the jail. Whoever can write there must have no hand in what is copied where.
    fn copy_to(&mut self, root: &Beneath<OwnedFd>) -> Result<(), JailError> {
        let name = Path::new(&self.name);
        let mut copy: File = root.create(name, Mode::from_raw_mode(0o755))?.into();
        io::copy(&mut self.file, &mut copy)
            .and_then(|_| copy.sync_data())
            .map_err(JailError::host("copy the program into the jail"))?;
        let made = stat(&copy)?;
        // Its writer is closed: a program that is written to cannot be executed.
        drop(copy);
        let found = root.open(name, OFlags::PATH, Mode::empty());
        let found = stat(found.map_err(|_| swapped(name))?)?;
        let is_ours = (found.st_dev, found.st_ino, found.st_nlink) == (made.st_dev, made.st_ino, 1);
        if is_ours { Ok(()) } else { Err(swapped(name)) }
    }
}

/// A jail as it is to be.
#[derive(Debug)]
pub(crate) struct Chroot {
    pub(crate) id: String,
    pub(crate) owner: Owner,
    /// Below it is `PROGRAM/ID/root`.
    pub(crate) base: PathBuf,
    pub(crate) program: Program,
    /// The network namespace; the one of whoever called if there is none.
    pub(crate) network: Option<OwnedFd>,
    pub(crate) group: Group,
    pub(crate) limits: Vec<Limit>,
    pub(crate) is_daemon: bool,
    pub(crate) has_new_pids: bool,
}

/// Opens a network namespace by the path that a client gives, in which `/var/run` may be a link.
pub(crate) fn open_network(path: &Path) -> Result<OwnedFd, JailError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(JailError::path(format!("cannot open {}", path.display())))
}

impl Chroot {
    /// Goes into the jail: returns in the process that is to be the program, with nothing left but to be it.
    pub(crate) fn enter(mut self) -> Result<Program, JailError> {
        let host = Beneath::new(self.directory()?);
        if !self.program.is_loaded {
            self.program.copy_to(&host)?;
        }
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let null = null.map_err(JailError::host("open /dev/null"))?;
        let userfaultfd = rustix::fs::stat(Path::new("/").join(USERFAULTFD)).ok();
        if let Some(network) = &self.network {
            super::join_network(network)?;
        }
        privileges::limit(&self.limits)?;
        self.group.join()?;
        let top = Detached::clone_all_of(&host.top)?;
        top.restrict(MountAttrFlags::MOUNT_ATTR_NOSUID)?;
        let flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
        sys::unshare(flags | UnshareFlags::NEWCGROUP)
            .map_err(JailError::host("make namespaces, which needs root"))?;
        drop(host);
        let root = root::enter(top)?;
        for (path, major, minor) in NODES {
            let device = makedev(major, minor);
            root.node(Path::new(path), FileType::CharacterDevice, device, self.owner)?;
        }
        if self.program.is_loaded {
            // The process that makes children has it for standard streams.
            let null = makedev(1, 3);
            root.node(Path::new("dev/null"), FileType::CharacterDevice, null, self.owner)?;
        }
        if let Some(found) = userfaultfd {
            let kind = FileType::CharacterDevice;
            root.node(Path::new(USERFAULTFD), kind, found.st_rdev, self.owner)?;
        }
        OWNED.iter().try_for_each(|path| own(&root, Path::new(path), self.owner))?;
        // Refused, if it is, before whoever waits is told that all is well.
        let pid_file = self.create_pid_file(&root)?;
        if self.is_daemon {
            process::daemonize(&null)?;
        }
        self.write_pid(&pid_file)?;
        if self.program.is_loaded {
            root::add_proc(&root)?;
        }
        privileges::drop_all(self.owner)?;
        rustix::process::umask(Mode::from_raw_mode(0o077));
        Ok(self.program)
    }

    /// The directory that becomes the root, made if it is missing. The base is the operator's, what is below may
    /// have been written to by whoever was jailed there before.
    fn directory(&self) -> Result<OwnedFd, JailError> {
        let failed =
            |e: io::Error| JailError::path(format!("cannot make {}", self.base.display()))(e);
        fs::create_dir_all(&self.base).map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let base = rustix::fs::openat(CWD, &self.base, flags, Mode::empty());
        let base = base.map_err(|e| failed(e.into()))?;
        let below: PathBuf =
            [self.program.name(), OsStr::new(&self.id), "root".as_ref()].iter().collect();
        Beneath::new(base).directory(&below, Mode::from_raw_mode(0o755))
    }

    /// Makes the file in the jail's root that says who is the program.
    fn create_pid_file(&self, root: &Beneath<OwnedFd>) -> Result<OwnedFd, JailError> {
        let mut name = self.program.name().to_owned();
        name.push(".pid");
        root.create(Path::new(&name), Mode::from_raw_mode(0o644))
    }

    /// Says who will be the program; in a new process namespace that is a child, and this process ends.
    fn write_pid(&self, file: &OwnedFd) -> Result<(), JailError> {
        let write = |pid: i32| {
            let written = rustix::io::write(file, pid.to_string().as_bytes());
            written.map(drop).map_err(JailError::host("write the process's number"))
        };
        if !self.has_new_pids {
            return write(rustix::process::getpid().as_raw_nonzero().get());
        }
        sys::keep_children();
        sys::unshare(UnshareFlags::NEWPID)
            .map_err(JailError::host("make a process namespace, which needs root"))?;
        match sys::fork().map_err(JailError::host("make a process"))? {
            Some(child) => {
                let written = write(child.as_raw_nonzero().get());
                if let Err(e) = written {
                    process::kill(child);
                    return Err(e);
                }
                sys::exit(0)
            }
            // The end of a session's leader would reach its handler of SIGHUP.
            None => rustix::process::setsid().map(drop).map_err(JailError::host("make a session")),
        }
    }
}

impl Program {
    /// Becomes the program that was copied; returns only if that fails.
    pub(crate) fn execute(&self, args: &[OsString]) -> JailError {
        let path = Path::new("/").join(&self.name);
        let e = Command::new(path).args(args).env_clear().exec();
        let shown = self.path.display();
        match Errno::from_io_error(&e) {
            Some(Errno::NOENT) => JailError::Refused(format!(
                "{shown} needs shared libraries, which are not in the jail: give a static binary, or husk itself \
                 under that name"
            )),
            _ => JailError::path(format!("cannot execute {shown}"))(e),
        }
    }
}

/// Makes a directory, for the jail's user alone.
fn own(root: &Beneath<OwnedFd>, path: &Path, owner: Owner) -> Result<(), JailError> {
    let directory = root.directory(path, Mode::RWXU)?;
    rustix::fs::fchmod(directory.as_fd(), Mode::RWXU)
        .and_then(|()| rustix::fs::fchown(&directory, Some(owner.uid), Some(owner.gid)))
        .map_err(JailError::host("give a directory to the jail's user"))
}
