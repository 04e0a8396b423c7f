//! Files for a test, gone when it ends.
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that is removed with everything in it. Its path is short, for sockets.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("husk-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        // Left over from a process of the same number, that was killed.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self(path)
    }

    /// The path of `name` in it, which need not exist.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file with these contents.
    pub(crate) fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, contents).unwrap();
        path
    }

    /// A file of `len` bytes of zeroes that take no space.
    pub(crate) fn sparse(&self, name: &str, len: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(len).unwrap();
        path
    }

    /// A FIFO.
    pub(crate) fn fifo(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left-overs harm nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl AsRef<Path> for Scratch {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

/// Makes an ext4 file system in `image`, with the tree at `root` in it.
pub(crate) fn ext4(image: &Path, root: &Path) {
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(root).arg(image).output();
    let made = made.expect("mkfs.ext4, of the package e2fsprogs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// How many entries a directory has: descriptors or threads of a process in /proc.
pub(crate) fn files_in(directory: &str) -> usize {
    fs::read_dir(directory).unwrap_or_else(|e| panic!("{directory}: {e}")).count()
}

/// What a process has open, in order.
pub(crate) fn descriptors(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    let mut all: Vec<_> = targets.map(|target| target.display().to_string()).collect();
    all.sort();
    all
}

/// The SHA-256 of these bytes, in the digits of `sha256sum`, as guests print it.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    let scratch = Scratch::new();
    let output = Command::new("sha256sum").arg(scratch.file("bytes", bytes)).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}
