//! Virtio devices, driven through their registers and rings as a driver would drive them.
mod balloon;
mod block;
mod conformance;
mod counted;
mod driver;
mod guest_tcp;
mod limits;
mod mem;
mod mmds;
mod net;
mod overlay;
mod pmem;
mod rng;
mod samples;
mod stuck;
mod vsock;
