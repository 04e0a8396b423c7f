//! What a network interface of a guest is plugged into: a tap of the host, or a packet socket to a
//! network in user space. Either way one read or write is one frame, after a 12-byte virtio-net
//! header (virtio 1.2, 5.1.6).
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::passed;
use crate::sys::rw::IoSlices;
use crate::sys::{fd, tun};

/// Bytes before each frame.
pub const HEADER_BYTES: u32 = 12;

/// What the name of a descriptor begins with.
pub const DESCRIPTOR: &str = "fd:";

/// What a reader of frames can take (`TUN_F_*`).
pub mod offload {
    /// Frames whose checksum is yet to be made.
    pub const CSUM: u32 = libc::TUN_F_CSUM;
    /// TCP over IPv4, to be cut into segments.
    pub const TSO4: u32 = libc::TUN_F_TSO4;
    /// TCP over IPv6, to be cut into segments.
    pub const TSO6: u32 = libc::TUN_F_TSO6;
    /// The same with congestion marks.
    pub const ECN: u32 = libc::TUN_F_TSO_ECN;
    /// UDP, to be cut into fragments.
    pub const UFO: u32 = libc::TUN_F_UFO;
}

/// Why there is nothing to plug into. Says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface can have that name.
    #[error("{0:?} is no interface name: want 1 to {max} letters, digits or .-_", max = tun::MAX_NAME_BYTES)]
    Name(String),
    /// It is not made on the fly: its bridge, address and owner are the host's business.
    #[error("tap '{0}' does not exist; create it with: ip tuntap add {0} mode tap")]
    Missing(String),
    /// One VM has it already.
    #[error("tap '{0}' is in use by another interface or process")]
    InUse(String),
    /// It is another kind of interface.
    #[error("'{0}' is not a tap, or one with several queues")]
    NotTap(String),
    /// It belongs to another user.
    #[error(
        "no permission to use tap '{0}'; create it for this user with: ip tuntap add {0} mode tap user NAME"
    )]
    NotOurs(String),
    /// The descriptor is something else, or a tap with other settings.
    #[error(
        "the descriptor is neither a tap with IFF_NO_PI and IFF_VNET_HDR nor a packet socket \
         (SOCK_DGRAM or SOCK_SEQPACKET)"
    )]
    Unsuitable,
    /// It could be anybody's descriptor.
    #[error("'{0}' is no descriptor of this process; name a tap, or fd:N for the descriptor N")]
    NoNumber(String),
    /// There is no such descriptor.
    #[error(
        "'{0}': no such descriptor is open; whoever starts husk has to open it and leave it open"
    )]
    NoDescriptor(String),
    /// It was passed once, and is not kept any more.
    #[error("{}", passed::missing(.0))]
    NotHeld(String),
    /// The host failed.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
}

/// Makes a [`TapError::Host`] of an I/O error.
fn failed<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> TapError {
    move |e| TapError::Host { what, source: e.into() }
}

/// An open tap or packet socket, non-blocking.
#[derive(Debug)]
pub struct Tap {
    file: File,
    offloads: u32,
}

impl Tap {
    /// Most to least that a tap may know.
    const OFFLOADS: [u32; 4] = {
        use offload::{CSUM, ECN, TSO4, TSO6, UFO};
        [CSUM | TSO4 | TSO6 | ECN | UFO, CSUM | TSO4 | TSO6 | ECN, CSUM | TSO4 | TSO6, CSUM]
    };

    /// Opens the tap called `name`, which must exist; `fd:N` is the descriptor N of this process.
    pub fn open(name: &str) -> Result<Self, TapError> {
        check_name(name)?;
        if passed::is_descriptor(name) {
            let held = passed::held(name).ok_or_else(|| TapError::NotHeld(name.into()))?;
            let copy = held.as_fd().try_clone_to_owned();
            return Self::from_fd(copy.map_err(failed("copy the descriptor"))?);
        }
        if let Some(number) = descriptor(name) {
            let copy = fd::duplicate(number).map_err(|_| TapError::NoDescriptor(name.into()))?;
            return Self::from_fd(copy);
        }
        if !exists(name)? {
            return Err(TapError::Missing(name.into()));
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = retry_on_intr(|| rustix::fs::open("/dev/net/tun", flags, Mode::empty()))
            .map_err(failed("open /dev/net/tun"))?;
        tun::attach(&file, name).map_err(|e| match Errno::from_io_error(&e) {
            Some(Errno::BUSY) => TapError::InUse(name.into()),
            Some(Errno::INVAL) => TapError::NotTap(name.into()),
            Some(Errno::PERM) => TapError::NotOurs(name.into()),
            _ => failed("attach to the tap")(e),
        })?;
        Self::from_tap(file.into())
    }

    /// Takes a descriptor that somebody else opened: a tap, or a packet socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(failed("look at the descriptor"))?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)
            .map_err(failed("make the descriptor non-blocking"))?;
        match tun::is_suitable(&fd) {
            Ok(true) => Self::from_tap(fd.into()),
            Ok(false) => Err(TapError::Unsuitable),
            // Not the tun driver: whoever is at the other end reads the headers.
            Err(e) if Errno::from_io_error(&e) == Some(Errno::NOTTY) => {
                match sockopt::socket_type(&fd) {
                    Ok(SocketType::DGRAM | SocketType::SEQPACKET) => {
                        Ok(Self { file: fd.into(), offloads: 0 })
                    }
                    _ => Err(TapError::Unsuitable),
                }
            }
            Err(e) => Err(failed("look at the tap")(e)),
        }
    }

    fn from_tap(file: File) -> Result<Self, TapError> {
        tun::set_header_len(&file, HEADER_BYTES.cast_signed())
            .map_err(failed("set the header length of the tap"))?;
        let known = Self::OFFLOADS.iter().find(|&&set| tun::set_offload(&file, set).is_ok());
        let tap = Self { file, offloads: known.copied().unwrap_or(0) };
        tap.set_offloads(0).map_err(failed("set the offloads of the tap"))?;
        Ok(tap)
    }

    /// What the host can leave to the reader, as a sum of [`offload`]s.
    pub fn offloads(&self) -> u32 {
        self.offloads
    }

    /// Says what the reader can take, of [`Self::offloads`].
    pub fn set_offloads(&self, set: u32) -> std::io::Result<()> {
        if self.offloads == 0 { Ok(()) } else { tun::set_offload(&self.file, set & self.offloads) }
    }

    /// Reads one frame with its header. What does not fit is lost.
    pub fn read(&self, slices: &mut IoSlices<'_>) -> std::io::Result<usize> {
        slices.read(&self.file)
    }

    /// Writes one frame with its header.
    pub fn write(&self, slices: &mut IoSlices<'_>) -> std::io::Result<usize> {
        slices.write(&self.file)
    }
}

/// Ready for another process: what was set stays set.
impl From<Tap> for OwnedFd {
    fn from(tap: Tap) -> Self {
        tap.file.into()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Whether `e` says that the tap was deleted or the peer of the socket is gone, for good.
pub fn is_gone(e: &std::io::Error) -> bool {
    matches!(
        Errno::from_io_error(e),
        Some(
            Errno::BADFD
                | Errno::NODEV
                | Errno::PIPE
                | Errno::CONNRESET
                | Errno::NOTCONN
                | Errno::CONNREFUSED
        )
    )
}

/// Refuses names that no interface can have, or that the tun driver takes for a pattern (`%d`).
pub fn check_name(name: &str) -> Result<(), TapError> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    let is_dots = name == "." || name == "..";
    let has_length = (1..=tun::MAX_NAME_BYTES).contains(&name.len());
    match descriptor(name) {
        Some(_) => Ok(()),
        None if passed::is_descriptor(name) => Ok(()),
        None if name.starts_with(DESCRIPTOR) => Err(TapError::NoNumber(name.into())),
        None if has_length && name.chars().all(is_allowed) && !is_dots => Ok(()),
        None => Err(TapError::Name(name.into())),
    }
}

/// What `fd:N` names. No interface is called so.
pub fn descriptor(name: &str) -> Option<RawFd> {
    let number = name.strip_prefix(DESCRIPTOR)?;
    number.parse().ok().filter(|number| *number >= 0)
}

fn exists(name: &str) -> Result<bool, TapError> {
    // Any socket will do to ask, and this kind is always there.
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)
        .map_err(failed("make a socket"))?;
    match rustix::net::netdevice::name_to_index(&socket, name) {
        Ok(_) => Ok(true),
        Err(Errno::NODEV) => Ok(false),
        Err(e) => Err(failed("look for the tap")(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_names_that_no_tap_has() {
        for name in ["", "tap%d", "a/b", "a b", "..", "sixteen-bytes-xx", "tap\n", "täp"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name:?}");
        }
        let e = Tap::open("husk-none").unwrap_err().to_string();
        assert_eq!(
            e,
            "tap 'husk-none' does not exist; create it with: ip tuntap add husk-none mode tap"
        );
    }

    #[test]
    fn takes_a_descriptor_by_its_number() {
        let (fd, _peer) = std::os::unix::net::UnixDatagram::pair().unwrap();
        assert!(Tap::open(&format!("fd:{}", fd.as_raw_fd())).is_ok());
        let null = File::open("/dev/null").unwrap();
        let unsuitable = Tap::open(&format!("fd:{}", null.as_raw_fd()));
        assert!(matches!(unsuitable, Err(TapError::Unsuitable)), "{unsuitable:?}");
        assert!(matches!(Tap::open("fd:2147483647"), Err(TapError::NoDescriptor(_))));
        for name in ["fd:", "fd:-1", "fd:x", "fd:2147483648"] {
            assert!(matches!(Tap::open(name), Err(TapError::NoNumber(_))), "{name}");
        }
    }

    #[test]
    fn takes_a_packet_socket_without_offloads() {
        let (fd, _peer) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let tap = Tap::from_fd(fd.into()).unwrap();
        assert_eq!(tap.offloads(), 0);
        tap.set_offloads(offload::CSUM).unwrap();
    }
}
