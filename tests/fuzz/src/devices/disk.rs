//! The file that is a disk, or memory of a guest: in memory, and the same for all inputs.
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

/// Bytes of it.
pub(super) const DISK: u64 = 64 << 10;

fn file() -> &'static File {
    static FILE: OnceLock<File> = OnceLock::new();
    FILE.get_or_init(|| {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        File::from(rustix::fs::memfd_create("disk", flags).expect("there is memory"))
    })
}

/// The path of the disk, which is all zero.
pub(super) fn disk() -> String {
    let file = file();
    file.set_len(0).and_then(|()| file.set_len(DISK)).expect("there is memory");
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Refuses a disk of another size, or one that was written though it must not be.
pub(super) fn check_disk(is_read_only: bool) {
    let len = file().metadata().expect("it is open").len();
    assert_eq!(len, DISK, "the disk has another size");
    if is_read_only {
        let mut bytes = [1; DISK as usize];
        file().read_exact_at(&mut bytes, 0).expect("it is open");
        assert!(bytes == [0; DISK as usize], "a disk was written that must not be");
    }
}
