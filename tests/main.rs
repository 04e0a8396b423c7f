//! The integration tests: the real binary, real guests, real KVM.
//!
//! They need root, /dev/kvm, iproute2, ping and python3; what is missing is a failure, never a skipped test.
//! `tests/run` installs it. Each test starts its own processes and files and leaves nothing behind, so all may run at once.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "numbers in tests are small, and a wrong one fails the test"
)]

mod acpi;
mod api;
mod attack;
mod balloon;
mod boot;
mod cli;
mod clients;
mod clones;
mod compression;
mod contract;
mod cpu;
mod dependencies;
mod devices;
mod docs;
mod documents;
mod durability;
mod early;
mod ends;
mod events;
mod exit_truth;
mod faults;
mod firecracker;
mod floods;
mod fork;
mod golden;
mod high_memory;
mod hostile;
mod huge_pages;
mod identity;
mod increments;
mod input;
mod jail;
mod jailer;
mod library;
mod lifecycle;
mod limits;
mod linux;
mod logger;
mod memory;
mod metrics;
mod mmds;
mod never_torn;
mod outside;
mod overlay;
mod passed;
mod restore;
mod rewind;
mod rows;
mod sandbox;
mod signals;
mod smp;
mod soak;
mod terminal;
mod unheard;
mod util;
mod vhost_user;
mod vsock;
mod wire;
