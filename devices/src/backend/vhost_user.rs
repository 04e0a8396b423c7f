//! Another process that serves a virtio device: it maps guest memory, and takes the kicks and raises
//! the interrupts of the device's queues itself (the vhost-user protocol, over crate `vhost`).
//!
//! That process may hang or go. Nothing here waits for an answer longer than [`PATIENCE`]: then the
//! connection is shut, and the device is dead.
use std::fmt;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::GuestRam;
use crate::sys::errand::Errands;

/// How long the other process may take to answer.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// Why another process cannot serve a device.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// There is nothing to connect to.
    #[error("cannot connect to the back end at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// It lacks what is needed.
    #[error("the back end at {path} lacks {what}")]
    Lacks {
        /// The socket.
        path: PathBuf,
        /// What.
        what: &'static str,
    },
    /// It does not answer.
    #[error("the back end at {path} has not answered for {PATIENCE:?} when asked to {what}")]
    Silent {
        /// The socket.
        path: PathBuf,
        /// What it was asked to do.
        what: &'static str,
    },
    /// It does not do as the protocol says.
    #[error("the back end at {path} fails to {what}")]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What it was asked to do.
        what: &'static str,
        /// What went wrong.
        source: vhost::Error,
    },
    /// Guest memory is not shared, or too fragmented to be.
    #[error("guest memory cannot be shared with another process")]
    Memory,
}

/// A ring as the driver set it up, in guest addresses.
#[derive(Clone, Copy, Debug)]
pub struct Ring<'a> {
    /// Entries.
    pub size: u16,
    /// Most entries there could be.
    pub max_size: u16,
    /// Descriptor table.
    pub desc_table: u64,
    /// Available ring.
    pub avail_ring: u64,
    /// Used ring.
    pub used_ring: u64,
    /// The next entry of the available ring to be served.
    pub next_avail: u16,
    /// Written by the driver when there is something to serve.
    pub kick: &'a EventFd,
    /// Written by the back end when something was served.
    pub call: &'a EventFd,
}

/// A connected back end of one device.
pub struct BackEnd {
    frontend: Frontend,
    /// The same socket, to shut it and to see it end.
    socket: UnixStream,
    path: PathBuf,
    features: u64,
}

impl fmt::Debug for BackEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackEnd").field("path", &self.path).finish_non_exhaustive()
    }
}

impl BackEnd {
    /// Connects to the back end that listens at `path`, for a device with `queues` queues. `connector` does the first step
    /// if this thread may not.
    pub fn connect(
        path: &Path,
        queues: u64,
        connector: Option<&Errands>,
    ) -> Result<Self, VhostUserError> {
        let failed = |source| VhostUserError::Connect { path: path.into(), source };
        let socket = match connector {
            Some(connector) => connector.run(|| connect(path)),
            None => connect(path),
        };
        let stream = socket.and_then(blocking).map_err(failed)?;
        let socket = stream.try_clone().map_err(failed)?;
        let frontend = Frontend::from_stream(stream, queues);
        let mut back_end = Self { frontend, socket, path: path.into(), features: 0 };
        back_end.negotiate()?;
        Ok(back_end)
    }

    /// Features of the device that the back end offers, those of the ring and of the protocol
    /// included.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// A copy of the socket, which hangs up when the back end goes.
    pub fn hangup(&self) -> std::io::Result<UnixStream> {
        self.socket.try_clone()
    }

    fn negotiate(&mut self) -> Result<(), VhostUserError> {
        self.ask("take an owner", |frontend| frontend.set_owner())?;
        self.features = self.ask("tell its features", |frontend| frontend.get_features())?;
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(self.lacks("protocol features"));
        }
        let offered = self.ask("tell its protocol features", |f| f.get_protocol_features())?;
        if !offered.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(self.lacks("a configuration space"));
        }
        let wanted = VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK;
        let taken = offered & wanted;
        self.ask("take protocol features", |frontend| frontend.set_protocol_features(taken))?;
        if taken.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // It then says whether it could do what it was told, too.
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        Ok(())
    }

    /// The first `len` bytes of the device's configuration space.
    pub fn config(&mut self, len: u32) -> Result<Vec<u8>, VhostUserError> {
        let room = vec![0; usize::try_from(len).unwrap_or_default()];
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, space) = self.ask("show the configuration space", |frontend| {
            frontend.get_config(0, len, flags, &room)
        })?;
        Ok(space)
    }

    /// Hands the queues over, with the memory that they are in.
    pub fn start(
        &mut self,
        mem: &GuestRam,
        features: u64,
        rings: &[Ring<'_>],
    ) -> Result<(), VhostUserError> {
        let features = features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let regions = regions(mem)?;
        self.ask("take features", |frontend| frontend.set_features(features))?;
        self.ask("map guest memory", |frontend| frontend.set_mem_table(&regions).map(drop))?;
        for (index, ring) in rings.iter().enumerate() {
            let config = vring(mem, ring)?;
            self.ask("take a queue", |frontend| {
                frontend.set_vring_num(index, ring.size)?;
                frontend.set_vring_addr(index, &config)?;
                frontend.set_vring_base(index, ring.next_avail)?;
                frontend.set_vring_call(index, ring.call)?;
                frontend.set_vring_kick(index, ring.kick)?;
                frontend.set_vring_enable(index, true)
            })?;
        }
        Ok(())
    }

    /// Takes a queue back when the back end has finished what it was doing; the next entry of the
    /// available ring that it would have served.
    pub fn stop(&mut self, index: usize) -> Result<u16, VhostUserError> {
        let base = self.ask("give a queue back", |frontend| {
            frontend.set_vring_enable(index, false)?;
            frontend.get_vring_base(index)
        })?;
        // Split rings have 16 bits.
        Ok(u16::try_from(base & 0xffff).unwrap_or_default())
    }

    /// Does `f`, which talks to the back end, and shuts the connection if it takes too long: a read
    /// that waits for an answer then fails. The library has no deadlines of its own.
    fn ask<T>(
        &mut self,
        what: &'static str,
        f: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, VhostUserError> {
        let Self { frontend, socket, path, .. } = self;
        let (done, is_done) = channel::<()>();
        let is_late = AtomicBool::new(false);
        let answer = thread::scope(|scope| {
            let is_late = &is_late;
            scope.spawn(move || {
                if is_done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    is_late.store(true, Ordering::Relaxed);
                    // Fails if the other side has shut it: then nobody waits.
                    let _ = socket.shutdown(Shutdown::Both);
                }
            });
            let answer = f(frontend);
            drop(done);
            answer
        });
        let path = path.clone();
        answer.map_err(|source| match is_late.into_inner() {
            true => VhostUserError::Silent { path, what },
            false => VhostUserError::Protocol { path, what, source },
        })
    }

    fn lacks(&self, what: &'static str) -> VhostUserError {
        VhostUserError::Lacks { path: self.path.clone(), what }
    }
}

/// Connects, but does not wait for a listener that does not accept.
fn connect(path: &Path) -> std::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn blocking(socket: OwnedFd) -> std::io::Result<UnixStream> {
    let status = rustix::fs::fcntl_getfl(&socket)?;
    rustix::fs::fcntl_setfl(&socket, status.difference(OFlags::NONBLOCK))?;
    Ok(socket.into())
}

/// Guest memory as the protocol describes it.
fn regions(mem: &GuestRam) -> Result<Vec<VhostUserMemoryRegionInfo>, VhostUserError> {
    mem.iter()
        .map(|region| {
            let file = region.file_offset().ok_or(VhostUserError::Memory)?;
            let host = region.get_host_address(MemoryRegionAddress(0));
            Ok(VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: address(host)?,
                mmap_offset: file.start(),
                mmap_handle: file.file().as_raw_fd(),
            })
        })
        .collect()
}

/// A ring as the protocol describes it: by addresses in this process.
fn vring(mem: &GuestRam, ring: &Ring<'_>) -> Result<VringConfigData, VhostUserError> {
    let host = |at| address(mem.get_host_address(GuestAddress(at)));
    Ok(VringConfigData {
        queue_max_size: ring.max_size,
        queue_size: ring.size,
        flags: 0,
        desc_table_addr: host(ring.desc_table)?,
        used_ring_addr: host(ring.used_ring)?,
        avail_ring_addr: host(ring.avail_ring)?,
        log_addr: None,
    })
}

fn address<E>(host: Result<*mut u8, E>) -> Result<u64, VhostUserError> {
    host.map(|host| host.addr() as u64).map_err(|_| VhostUserError::Memory)
}
