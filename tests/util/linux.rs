//! The Linux guest, booted and restored: every test of it goes both ways.
//!
//! ```text
//!   both_ways(|scratch, origin| ...)         once                          once more
//!       origin.start(husk, &disks) ──► boots, waits ──► snapshot ┈┈┈┈► restores the snapshot
//!                                             │                             │
//!                                             └──► runs its script ◄────────┘
//! ```
//! A boot takes about 15 s where KVM emulates guest ring 0, a restore a moment: there is one boot a test, of its
//! configuration.
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::{Husk, Scratch, TestVm};

/// How long a boot may take, with other tests beside it.
pub(crate) const BOOT: Duration = Duration::from_secs(240);

/// What the guest says before its script: see `husk.wait` in resources/linux/README.md.
const WAITING: &str = "husk-guest: waiting";

/// Where a guest comes from.
#[derive(Debug)]
pub(crate) enum Origin<'a> {
    /// It boots, and is saved in this directory before it goes on.
    Boot(&'a Scratch),
    /// It was saved there.
    Snapshot(&'a Scratch),
}

/// Runs a test with a guest that boots, and again with one that was saved when the first was about to begin. The
/// `Scratch` is the same, so all that the guest was given is still called what it was.
#[track_caller]
pub(crate) fn both_ways(test: impl Fn(&Scratch, &Origin)) {
    let (scratch, saved) = (Scratch::new(), Scratch::new());
    test(&scratch, &Origin::Boot(&saved));
    eprintln!("-- what boots passed; the same restored");
    test(&scratch, &Origin::Snapshot(&saved));
}

impl Origin<'_> {
    /// A guest that is about to run its script, or to give a shell. `disks` are those that it writes to.
    #[track_caller]
    pub(crate) fn start(&self, husk: Husk, disks: &[&Path]) -> TestVm {
        let vm = match self {
            Self::Boot(_) => {
                let vm = husk.typing().listening().start();
                self.save(&vm, disks);
                vm
            }
            Self::Snapshot(saved) => {
                self.put_back(disks);
                husk.restored_from(saved.path("snapshot")).typing().listening().start()
            }
        };
        vm.type_in("\n");
        vm
    }

    /// Saves a guest that waits, and what is on its disks; it then runs.
    #[track_caller]
    pub(crate) fn save(&self, vm: &TestVm, disks: &[&Path]) {
        let Self::Boot(saved) = self else { panic!("it was saved before") };
        vm.expect_within(WAITING, BOOT);
        vm.api().patch("/vm", json!({ "state": "Paused" })).done();
        let directory = saved.path("snapshot");
        vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
        for (number, disk) in disks.iter().enumerate() {
            copy_sparse(disk, &saved.path(&format!("disk{number}")));
        }
        vm.api().patch("/vm", json!({ "state": "Resumed" })).done();
    }

    /// Where a guest that is to be restored was saved.
    pub(crate) fn snapshot(&self) -> Option<PathBuf> {
        match self {
            Self::Boot(_) => None,
            Self::Snapshot(saved) => Some(saved.path("snapshot")),
        }
    }

    /// Has the disks hold what they held when the guest was saved.
    fn put_back(&self, disks: &[&Path]) {
        let Self::Snapshot(saved) = self else { return };
        for (number, disk) in disks.iter().enumerate() {
            copy_sparse(&saved.path(&format!("disk{number}")), disk);
        }
    }
}

/// A product of `resources/linux/build`, which `tests/run` calls.
pub(crate) fn product(name: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let path = target.join("guest").join(name);
    assert!(path.exists(), "{} is missing: run resources/linux/build", path.display());
    path
}

/// The command line that boots Linux here, has it wait before it does anything, and `words`.
pub(crate) fn cmdline(words: &str) -> String {
    let mut line =
        "console=ttyS0 reboot=k panic=-1 quiet i8042.noaux i8042.nomux i8042.dumbkbd husk.wait"
            .to_owned();
    if Path::new("/sys/module/kvm_pvm").exists() {
        line += " soft_kvm noxsave mitigations=off rodata=off clearcpuid=popcnt,cx16,fsgsbase,\
                 smap,smep,pcid,invpcid,rdrand,rdseed,umip \
                 GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX2,-AVX512F,-AVX_Fast_Unaligned_Load";
    }
    line + " " + words
}

/// Linux from the initrd, with `program` as `/test.sh`: a script, or anything that can be executed.
pub(crate) fn from_initrd(scratch: &Scratch, program: impl AsRef<[u8]>, words: &str) -> Husk {
    Husk::run(product("vmlinux"))
        .initrd(initrd_with(scratch, program.as_ref()))
        .memory(256)
        .cmdline(&cmdline(&format!("husk.run=/test.sh {words}")))
}

/// The initrd with this as `/test.sh`.
pub(crate) fn initrd_with(scratch: &Scratch, program: &[u8]) -> PathBuf {
    let mut archive = std::fs::read(product("initrd.cpio")).unwrap();
    archive.extend(cpio("test.sh", program));
    scratch.file("initrd.cpio", archive)
}

/// A copy of the root disk.
pub(crate) fn root_disk(scratch: &Scratch) -> PathBuf {
    let root = scratch.path("root.ext4");
    copy_sparse(&product("root.ext4"), &root);
    root
}

/// A disk that the guest's init runs as a script.
pub(crate) fn script_disk(scratch: &Scratch, script: &str) -> PathBuf {
    let mut bytes = script.as_bytes().to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    scratch.file("script.img", bytes)
}

fn copy_sparse(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("--sparse=always").args([from, to]).status();
    assert!(copied.unwrap().success(), "cannot copy {} to {}", from.display(), to.display());
}

/// An archive with one file, in the format of an initramfs ("newc").
fn cpio(name: &str, contents: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, mode, contents) in [(name, 0o100_755, contents), ("TRAILER!!!", 0, &[][..])] {
        let mut header = "070701".to_owned();
        let name_len = name.len() + 1;
        let fields = [1, mode, 0, 0, 1, 0, contents.len(), 0, 0, 0, 0, name_len, 0];
        for field in fields {
            write!(header, "{field:08x}").unwrap();
        }
        archive.extend(header.as_bytes());
        archive.extend(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(contents);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}
