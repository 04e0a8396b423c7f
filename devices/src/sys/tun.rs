//! The tun driver's ioctls (Linux, Documentation/networking/tuntap.rst). vmm-sys-util and rustix
//! have none of them.
use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd};
use std::os::raw::c_int;

/// Most bytes of an interface name, without the NUL.
pub const MAX_NAME_BYTES: usize = libc::IFNAMSIZ - 1;

/// What a tap must be for us: Ethernet frames, nothing before them but a virtio-net header.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// `struct ifreq`, as far as the tun driver uses it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

impl InterfaceRequest {
    fn new(name: &str, flags: c_int) -> Self {
        let mut request =
            Self { name: [0; _], flags: u16::try_from(flags).unwrap_or(0), rest: [0; _] };
        let room = request.name.iter_mut().take(MAX_NAME_BYTES);
        room.zip(name.bytes()).for_each(|(to, from)| *to = from);
        request
    }
}

/// Attaches `fd`, an open `/dev/net/tun`, to the tap called `name`. Makes one if there is none and
/// we may.
pub fn attach(fd: impl AsFd, name: &str) -> Result<()> {
    let mut request = InterfaceRequest::new(name, FLAGS);
    control(fd, libc::TUNSETIFF, &raw mut request)
}

/// Whether `fd` is attached to an interface that is a tap as [`attach`] would have it.
pub fn is_suitable(fd: impl AsFd) -> Result<bool> {
    let mut request = InterfaceRequest::new("", 0);
    control(fd, libc::TUNGETIFF, &raw mut request)?;
    Ok(c_int::from(request.flags) & FLAGS == FLAGS)
}

/// Sets the length of the header before each frame.
pub fn set_header_len(fd: impl AsFd, len: c_int) -> Result<()> {
    let mut len = len;
    control(fd, libc::TUNSETVNETHDRSZ, &raw mut len)
}

/// Sets what frames the reader of `fd` can take, as a sum of `TUN_F_*`.
pub fn set_offload(fd: impl AsFd, offload: u32) -> Result<()> {
    #[expect(unsafe_code, reason = "an ioctl")]
    // SAFETY: TUNSETOFFLOAD takes a number in place of a pointer.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD, offload) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

fn control<T>(fd: impl AsFd, request: libc::Ioctl, argument: *mut T) -> Result<()> {
    #[expect(unsafe_code, reason = "an ioctl")]
    // SAFETY: the callers above pass, for each request, a pointer to a live value of the type that
    // it reads or writes.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, argument) };
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}
