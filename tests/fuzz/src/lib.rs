//! What fuzz targets share: a guest's RAM, a driver that obeys the fuzzer, and the bounds that nothing may leave.
//!
//! ```text
//!  bytes.rs     the fuzzer's input, as a stream of choices
//!  confine.rs   Landlock: what hostile paths name is not opened
//!  guest.rs     guest RAM between pages that nobody may touch
//!  machine.rs   a virtio device at its registers, its worker driven by hand
//!  queue.rs     a virtqueue as the specification has it
//!  ring.rs      a virtqueue from the driver's side, and what was completed on it
//!  session.rs   a driver's life: the input as registers written, chains offered, resets, restores
//!  snapshot.rs  snapshots in files
//!  devices/     one device of each model, and what is told to it
//!  json.rs      JSON that is changed in some places
//!  kernel.rs    a kernel image, up to the first instruction
//! ```
//!
//! A panic, a sanitizer's report, a timeout or too much memory is a finding; so is each `assert!` in here.
pub mod bytes;
pub mod confine;
pub mod devices;
pub mod guest;
pub mod json;
pub mod kernel;
pub mod machine;
pub mod queue;
pub mod ring;
pub mod session;
pub mod snapshot;

/// What each target does first.
pub fn begin() {
    confine::confine();
    // A program's `main` in Rust begins so, libFuzzer's does not.
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
