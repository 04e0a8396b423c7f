//! System calls that no library wraps for us. The only unsafe code of this crate, beside the plain
//! data structures read from guest memory.
pub mod again;
pub mod discard;
pub mod errand;
pub mod fd;
pub mod heap;
pub mod map;
pub mod rw;
pub mod stack;
pub mod tun;
pub mod uring;
