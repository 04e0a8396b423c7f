//! The host side of devices: files, taps, consoles. No virtio in here.
pub mod console;
pub mod disk;
pub mod file;
pub mod mapped;
pub mod overlay;
pub mod passed;
pub mod stream;
pub mod tap;
pub mod unix;
pub mod vhost_user;
pub mod vsock;
