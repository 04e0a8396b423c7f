//! A terminal for a process to run on.
#![expect(unsafe_code, reason = "a process takes a controlling terminal between fork and exec")]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::pty::OpenptFlags;
use rustix::termios::Termios;

/// The side of a pseudo-terminal at which a person sits.
#[derive(Debug)]
pub(crate) struct Terminal {
    ours: OwnedFd,
}

impl Terminal {
    /// A new terminal, and the descriptor of its other side.
    pub(crate) fn new() -> (Self, OwnedFd) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&ours).unwrap();
        let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags).unwrap();
        (Self { ours }, theirs)
    }

    /// Its settings now, in a form to compare and to print.
    pub(crate) fn settings(&self) -> String {
        let Termios { input_modes, output_modes, control_modes, local_modes, .. } =
            rustix::termios::tcgetattr(&self.ours).unwrap();
        format!("{input_modes:?} {output_modes:?} {control_modes:?} {local_modes:?}")
    }

    /// Whether characters go to the process one at a time, without echo.
    pub(crate) fn is_raw(&self) -> bool {
        let settings = self.settings();
        !settings.contains("ICANON") && !settings.contains("ECHO |")
    }

    /// To read what is shown, or to write what is typed.
    pub(crate) fn file(&self) -> File {
        self.ours.try_clone().unwrap().into()
    }
}

/// Makes the process the leader of a session whose terminal is its standard input.
pub(super) fn control(command: &mut Command) {
    // SAFETY: two system calls between fork and exec.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        })
    };
}
