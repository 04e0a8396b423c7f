//! D9-D12: a disk that changes, fails or is full under a guest that uses it. The guest gets an error for that request, and
//! for no other.
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::subject::{Subject, differs};
use crate::never_torn::Strace;
use crate::util::*;

const MIB: u64 = 1 << 20;
/// Of a request's status: VIRTIO_BLK_S_OK and VIRTIO_BLK_S_IOERR.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;

/// A guest that makes a request when it is told to.
struct Sectors {
    subject: Subject,
    scratch: Scratch,
    disk: PathBuf,
}

impl Sectors {
    /// `None` if the program under attack has no such guest. `io_engine` is Firecracker's word.
    fn start(row: &'static str, io_engine: &str, cache_type: &str) -> Option<Self> {
        let scratch = Scratch::new();
        let disk = scratch.file("disk.img", vec![7; MIB as usize]);
        let subject = Subject::start_with(row, Husk::typing);
        let config = json!({
            "boot-source": {"kernel_image_path": guest("sectors")},
            "drives": [{"drive_id": "a", "path_on_host": disk, "is_root_device": false,
                        "io_engine": io_engine, "cache_type": cache_type}],
        });
        if let Some(refusal) = subject.refusal(&config) {
            assert!(differs(row), "{refusal:?}");
            return None;
        }
        let sectors = Self { subject, scratch, disk };
        if !sectors.subject.is_ready("ready=1") {
            return None;
        }
        Some(sectors)
    }

    fn expect(&self, pattern: &str) -> String {
        match crate::hostile::other() {
            None => self.subject.vm().expect(pattern),
            Some(_) => self.subject.vm().serial.line(pattern, deadline()).unwrap_or_default(),
        }
    }

    /// Makes the request of this letter: status, and the byte that was read or written.
    fn ask(&self, command: &str) -> (u8, u8) {
        self.subject.vm().type_in(command);
        let line = self.expect("=");
        let words = line.split_once('=').and_then(|(_, words)| words.trim().split_once(' '));
        let both =
            words.and_then(|(status, byte)| Some((status.parse().ok()?, byte.parse().ok()?)));
        both.unwrap_or_else(|| panic!("{command}: {line:?}"))
    }

    /// The request has this status.
    #[track_caller]
    fn is(&self, command: &str, status: u8) {
        let is = self.ask(command);
        println!("{}: {command}: status {}", self.disk.display(), is.0);
        assert!(is.0 == status || differs("D9-D12"), "{command}: status {is:?}");
    }

    fn file(&self) -> File {
        File::options().read(true).write(true).open(&self.disk).unwrap()
    }

    /// Makes calls of the process to the host fail so while `f` runs; whether one was made.
    fn while_failing<T>(&self, call: &str, inject: &str, f: impl FnOnce() -> T) -> (T, bool) {
        let strace = Strace::attach(self.subject.vm(), &self.scratch, call, inject);
        let result = f();
        (result, strace.detach())
    }

    /// Everything is as it was before: requests are done, the API answers, and the guest ends by itself.
    fn goes_on(self) {
        for command in ["w", "r", "W", "R", "f"] {
            self.is(command, OK);
        }
        self.ends();
    }

    fn ends(self) {
        assert_eq!(self.subject.ask("GET", "/", "").0, 200);
        self.subject.vm().type_in("q");
        self.subject.ends(0);
    }
}

fn deadline() -> std::time::Instant {
    std::time::Instant::now() + std::time::Duration::from_secs(10)
}

const ENGINES: [&str; 2] = ["Sync", "Async"];

/// Of a file that has become shorter, what is left can be used; nothing dies of SIGBUS.
#[test]
fn d09_disk_that_becomes_shorter() {
    for engine in ENGINES {
        let Some(sectors) = Sectors::start("D9", engine, "Writeback") else { continue };
        sectors.is("R", OK);
        let file = sectors.file();
        file.set_len(4096).unwrap();
        sectors.is("R", IO_ERROR);
        sectors.is("r", OK);
        file.set_len(0).unwrap();
        sectors.is("r", IO_ERROR);
        // Whoever makes it long again has a disk again.
        file.set_len(MIB).unwrap();
        sectors.goes_on();
    }
}

/// The one that was opened is used on, by whatever name, or none.
#[test]
fn d09_disk_that_is_deleted_or_replaced() {
    for engine in ENGINES {
        let Some(sectors) = Sectors::start("D9", engine, "Writeback") else { continue };
        let file = sectors.file();
        fs::remove_file(&sectors.disk).unwrap();
        assert_eq!(sectors.ask("r"), (OK, 7));
        fs::write(&sectors.disk, vec![9; MIB as usize]).unwrap();
        assert_eq!(sectors.ask("r"), (OK, 7));
        assert_eq!(sectors.ask("w"), (OK, 1));
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [1]);
        assert!(fs::read(&sectors.disk).unwrap().iter().all(|byte| *byte == 9), "another's file");
        sectors.goes_on();
    }
}

/// The calls by which a drive reads, and by which it writes.
const READS: &str = "preadv,pread64,preadv2,readv,read";
const WRITES: &str = "pwritev,pwrite64,pwritev2,writev";

#[test]
fn d10_calls_that_fail_fail_one_request() {
    let Some(sectors) = Sectors::start("D10", "Sync", "Writeback") else { return };
    for error in ["EIO", "ENOSPC", "EDQUOT", "EAGAIN", "ENOMEM"] {
        for (calls, command) in [(READS, "r"), (WRITES, "w")] {
            // For every N: the third of five requests fails, and no other.
            for nth in 1..=3 {
                let path = sectors.disk.to_str().unwrap().to_owned();
                let inject = format!("error={error}:when={nth}");
                let (statuses, was_made) = sectors.while_failing_at(&path, calls, &inject, || {
                    [(); 4].map(|()| sectors.ask(command).0)
                });
                println!("D10 {error} at call {nth} of {command}: {statuses:?}");
                let mut wanted = [OK; 4];
                wanted[nth - 1] = IO_ERROR;
                assert!(was_made && statuses == wanted || differs("D10"), "{statuses:?}");
            }
        }
    }
    sectors.goes_on();
}

/// This is no error: the call is made again.
#[test]
fn d10_calls_that_are_interrupted_are_made_again() {
    let Some(sectors) = Sectors::start("D10", "Sync", "Writeback") else { return };
    let path = sectors.disk.to_str().unwrap().to_owned();
    for (calls, command) in [(READS, "r"), (WRITES, "w")] {
        let inject = "error=EINTR:when=1..3";
        let (status, was_made) =
            sectors.while_failing_at(&path, calls, inject, || sectors.ask(command).0);
        println!("D10 EINTR of {command}: {status}");
        assert!(was_made && status == OK || differs("D10"), "{command}: {status}");
    }
    sectors.goes_on();
}

impl Sectors {
    /// The same, of calls on one file.
    fn while_failing_at<T>(
        &self,
        path: &str,
        calls: &str,
        inject: &str,
        f: impl FnOnce() -> T,
    ) -> (T, bool) {
        let strace = Strace::attach_to(self.subject.vm(), &self.scratch, Some(path), calls, inject);
        let result = f();
        (result, strace.detach())
    }
}

/// SIGXFSZ must end nobody.
#[test]
fn d11_limit_on_the_size_of_files() {
    for engine in ENGINES {
        let Some(sectors) = Sectors::start("D11", engine, "Writeback") else { continue };
        let pid = rustix::process::Pid::from_raw(sectors.subject.vm().pid().cast_signed());
        let limit = |current| {
            let limit = rustix::process::Rlimit { current, maximum: None };
            rustix::process::prlimit(pid, rustix::process::Resource::Fsize, limit).unwrap();
        };
        limit(Some(4096));
        sectors.is("W", IO_ERROR);
        sectors.is("w", OK);
        sectors.is("R", OK);
        limit(None);
        sectors.goes_on();
    }
}

/// What was written before may be lost, so that no later one may say that it is not.
#[test]
fn d12_flush_that_fails_goes_on_failing() {
    for engine in ENGINES {
        let Some(sectors) = Sectors::start("D12", engine, "Writeback") else { continue };
        sectors.is("f", OK);
        if engine == "Sync" {
            let (_, was_made) =
                sectors.while_failing("fdatasync,fsync", "error=EIO:when=1", || {
                    sectors.is("f", IO_ERROR);
                });
            assert!(was_made || differs("D12"));
            sectors.is("f", IO_ERROR);
            sectors.is("f", IO_ERROR);
        }
        sectors.is("w", OK);
        sectors.is("r", OK);
        // Another file is another disk.
        let other = sectors.scratch.file("other", vec![3; MIB as usize]);
        replace(&sectors, &other);
        sectors.is("f", OK);
        sectors.goes_on();
    }
}

fn replace(sectors: &Sectors, path: &Path) {
    let body = json!({"drive_id": "a", "path_on_host": path});
    let (status, said) = sectors.subject.ask("PATCH", "/drives/a", &body.to_string());
    assert!(status == 204 || differs("D12"), "{said}");
}
