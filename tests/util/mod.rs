//! What the tests share: the `husk` process under test, guests for it, files, networks and terminals.
//!
//! ```text
//!  Husk::guest("hello", "how=hang")      what to start ...
//!      .cpus(2).disk(&image)             ... and with what
//!      .start() ──► TestVm               it runs: expect lines, type, signal, ask its API
//!                      .wait() ──► End   exit code and everything it said
//! ```
//! Whoever waits here waits for an event with a deadline. A deadline that passes kills the process and fails the test
//! with the process's whole output.

mod attack;
mod files;
mod guest;
mod http;
mod husk;
mod image;
mod jail;
mod linux;
mod network;
mod output;
mod python;
mod terminal;

use std::fs::OpenOptions;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

pub(crate) use attack::{ATTACKS, Attack, ask, resident_kib, under};
pub(crate) use files::{Scratch, descriptors, ext4, files_in, sha256};
pub(crate) use guest::{guest, guest_at, linux_program};
pub(crate) use http::{Api, Reply, operations, request, send_with};
pub(crate) use husk::{End, Husk, TestVm, tell};
pub(crate) use image::{Elf, PLUS_AND_POWEROFF, Segment, bz_image, field, without_pvh};
pub(crate) use jail::{CGROUPS, Jail, among_files_of, inside, tree};
pub(crate) use linux::{
    BOOT, Origin, both_ways, cmdline, from_initrd, initrd_with, product, root_disk, script_disk,
};
pub(crate) use network::Network;
pub(crate) use output::Output;
pub(crate) use python::{clients, python};
pub(crate) use rustix::process::Signal;
pub(crate) use terminal::Terminal;

/// How long anything may take that takes a moment: the machine may be busy with other tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Fails with advice unless this machine can run the tests.
pub(crate) fn require_host() {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    let missing = MISSING.get_or_init(|| {
        if !rustix::process::geteuid().is_root() {
            return Some("these tests need root, for network namespaces and taps".into());
        }
        match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            Ok(_) => None,
            Err(e) => Some(format!("these tests need KVM, and /dev/kvm cannot be opened: {e}")),
        }
    });
    if let Some(what) = missing {
        panic!("{what}");
    }
}

/// Times what is promised to be quick. Bounds are generous: tests run beside each other.
#[derive(Debug)]
pub(crate) struct Stopwatch(Instant);

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    /// It took as long as this, or the test fails.
    #[track_caller]
    pub(crate) fn within(self, least: Duration, most: Duration) {
        let took = self.0.elapsed();
        assert!((least..=most).contains(&took), "took {took:?}, want {least:?} to {most:?}");
    }
}
