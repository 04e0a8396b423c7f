//! System calls that rustix does not wrap, or wraps as unsafe. All callers have one thread.
#![expect(unsafe_code, reason = "system calls that have no safe wrapper in our libraries")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use rustix::mount::MountAttrFlags;
use rustix::process::Pid;
use rustix::thread::UnshareFlags;

/// Closes all descriptors from 3 on but `kept`.
pub(super) fn close_all_but(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept.into_iter().filter(|fd| *fd >= 3) {
        if first < fd {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX)?;
    // Their numbers are free now, and others' next.
    crate::sandbox::forget_inherited();
    Ok(())
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: the callers own no descriptor in the range, or are the last to have it.
    succeeded(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })
}

unsafe extern "C" {
    static environ: *const *mut libc::c_char;
}

/// Forgets all variables of the environment, and overwrites them: as nothing is executed, they would stay in memory.
pub(super) fn clear_environment() {
    // SAFETY: one thread, so that nobody reads the environment meanwhile; it is a list of strings that ends with a null
    // pointer, in memory that is this process's to write to.
    unsafe {
        let mut next = environ;
        while !next.is_null() && !(*next).is_null() {
            std::ptr::write_bytes(*next, 0, libc::strlen(*next));
            next = next.add(1);
        }
        libc::clearenv();
    }
}

/// `struct mount_attr`.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets attributes of the mount that `mount` is the root of.
pub(super) fn set_mount(mount: impl AsFd, attributes: MountAttrFlags) -> io::Result<()> {
    let fd = mount.as_fd().as_raw_fd();
    let set = u64::from(attributes.bits());
    let attr = MountAttr { set, clear: 0, propagation: 0, userns_fd: 0 };
    let (path, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH);
    // SAFETY: a path that ends, and a structure that is filled in, of the size that is said.
    succeeded(unsafe {
        let size = size_of::<MountAttr>();
        libc::syscall(libc::SYS_mount_setattr, fd, path, flags, &raw const attr, size)
    })
}

/// Leaves namespaces for new ones.
pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: nobody asks for `UnshareFlags::FILES`.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// Makes a child; `None` in it.
pub(super) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: this process has one thread, so that no lock stays held in the child.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Lets children that end be waited for, whatever whoever started us had set.
pub(super) fn keep_children() {
    // SAFETY: the default action runs no code of ours.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Makes `number` another descriptor of what `fd` is, closed at an exec if `is_private`.
pub(super) fn duplicate_to(fd: impl AsFd, number: RawFd, is_private: bool) -> io::Result<()> {
    let flags = if is_private { libc::O_CLOEXEC } else { 0 };
    // SAFETY: whoever has `number` goes on with it, and means what it is now.
    match unsafe { libc::dup3(fd.as_fd().as_raw_fd(), number, flags) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Whether something is open as `number`.
pub(super) fn is_open(number: RawFd) -> bool {
    // SAFETY: asks for flags, nothing else.
    unsafe { libc::fcntl(number, libc::F_GETFD) != -1 }
}

/// Leaves the process at once.
pub(super) fn exit(code: i32) -> ! {
    // SAFETY: ends the process; what is left in it is the child's.
    unsafe { libc::_exit(code) }
}

/// Signals that are waited for rather than handled.
#[derive(Clone, Copy)]
pub(super) struct Signals(libc::sigset_t);

impl std::fmt::Debug for Signals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signals")
    }
}

impl Signals {
    /// Blocks these.
    pub(super) fn block(signals: &[i32]) -> io::Result<Self> {
        let set = Self::of(signals);
        set.mask(libc::SIG_BLOCK)?;
        Ok(set)
    }

    /// Lets these come again.
    pub(super) fn unblock(signals: &[i32]) -> io::Result<()> {
        Self::of(signals).mask(libc::SIG_UNBLOCK)
    }

    fn of(signals: &[i32]) -> Self {
        // SAFETY: plain data, which `sigemptyset` fills in.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in signals {
                libc::sigaddset(&raw mut set, *signal);
            }
            Self(set)
        }
    }

    fn mask(&self, how: i32) -> io::Result<()> {
        // SAFETY: a set that is filled in; the old one is not asked for.
        match unsafe { libc::pthread_sigmask(how, &raw const self.0, std::ptr::null_mut()) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// The next of them.
    pub(super) fn wait(&self) -> io::Result<i32> {
        loop {
            // SAFETY: a set that is filled in; more than the number is not asked for.
            let signal = unsafe { libc::sigwaitinfo(&raw const self.0, std::ptr::null_mut()) };
            match signal {
                -1 => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
                signal => return Ok(signal),
            }
        }
    }
}

fn succeeded(result: libc::c_long) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
