//! Jails for tests: an id, a user and a directory that no other test has.
#![expect(unsafe_code, reason = "namespaces are entered by system calls in new threads")]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use super::{Husk, Scratch, TestVm, guest};

/// Hierarchies of cgroups of version 1, or the one of version 2.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";

#[derive(Debug)]
pub(crate) struct Jail {
    pub(crate) id: String,
    /// Of group and user.
    pub(crate) user: u32,
    /// Belongs to the user.
    pub(crate) scratch: Scratch,
    pub(crate) parent: String,
}

impl Jail {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let user = 1_000_000 + process * 16 + number;
        let scratch = Scratch::new();
        chown(&scratch, Some(user), Some(user)).unwrap();
        let id = format!("test-{process}-{number}");
        Self { parent: format!("husk-{id}"), id, user, scratch }
    }

    /// `husk jail` with these flags; what runs in it is to follow.
    pub(crate) fn husk(&self, flags: &[&str]) -> Husk {
        let user = self.user.to_string();
        let own = ["jail", "--id", &self.id, "--uid", &user, "--gid", &user];
        let parent = ["--cgroup-parent", &self.parent];
        Husk::new(own.iter().chain(&parent).chain(flags))
    }

    /// The guest `hello` in it.
    pub(crate) fn guest(&self, flags: &[&str], cmdline: &str) -> Husk {
        let guest = guest("hello");
        let husk = self.husk(flags).option("--file", &guest).arg("--");
        husk.option("run", "--kernel").arg(&guest).cmdline(cmdline)
    }

    /// `husk api` in it, with the scratch directory, where its socket is.
    pub(crate) fn api(&self, flags: &[&str]) -> Husk {
        let directory = format!("{},rw", self.scratch.as_ref().display());
        let husk = self.husk(flags).option("--dir", directory).arg("--").arg("api");
        husk.serial("none").listening_at(&self.scratch.path("api.sock"))
    }

    /// Its cgroups that there are, with the name of their hierarchy.
    pub(crate) fn cgroups(&self) -> Vec<(String, PathBuf)> {
        let groups = hierarchies().into_iter().filter_map(|hierarchy| {
            let group = hierarchy.join(&self.parent).join(&self.id);
            let name = hierarchy.file_name().unwrap().to_str().unwrap().to_owned();
            group.exists().then_some((name, group))
        });
        groups.collect()
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        for hierarchy in hierarchies() {
            // Made only if a test wants it; of a test that fails, something may be in it.
            let parent = hierarchy.join(&self.parent);
            let _ = fs::remove_dir(parent.join(&self.id));
            let _ = fs::remove_dir(parent);
        }
    }
}

/// Where hierarchies may be.
fn hierarchies() -> Vec<PathBuf> {
    let entries = fs::read_dir(CGROUPS).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).chain([CGROUPS.into()]).collect()
}

/// The process in the jail: the only child of the one that waits.
#[track_caller]
pub(crate) fn inside(vm: &TestVm) -> u32 {
    let parent = format!("PPid:\t{}\n", vm.pid());
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid: u32 = entry.unwrap().file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        status.contains(&parent).then_some(pid)
    });
    match processes.collect::<Vec<_>>()[..] {
        [pid] => pid,
        ref children => panic!("{} has the children {children:?}", vm.pid()),
    }
}

/// Calls `f` where the files of process `pid` are.
pub(crate) fn among_files_of<T: Send>(pid: u32, f: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/proc/{pid}/ns/mnt")).unwrap();
    thread::scope(|scope| {
        let called = scope.spawn(|| {
            // SAFETY: changes this thread only, which ends here.
            let entered = unsafe {
                libc::unshare(libc::CLONE_FS) == 0
                    && libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) == 0
            };
            assert!(entered, "{}", std::io::Error::last_os_error());
            f()
        });
        called.join().unwrap()
    })
}

/// All that is in a directory, links and other mounts not followed, sorted.
pub(crate) fn tree(top: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![top.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap().map(|entry| entry.unwrap()) {
            let path = entry.path();
            found.push(path.strip_prefix(top).unwrap().display().to_string());
            if entry.file_type().unwrap().is_dir() && !path.ends_with("proc") {
                left.push(path);
            }
        }
    }
    found.sort();
    found
}
