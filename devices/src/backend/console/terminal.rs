//! The user's terminal: raw while it is ours, as it was afterwards, and a way out of it.
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, OutputModes, Termios};

/// The terminal to restore, and how it was. In a static because whoever must restore it, a signal
/// handler or a panic hook, has nothing else to reach it by.
static SAVED: Mutex<Option<Saved>> = Mutex::new(None);

struct Saved {
    fd: OwnedFd,
    modes: Termios,
    is_raw: bool,
}

/// Puts the terminal back as it was found, if it is still raw and still ours.
///
/// Async-signal-safe: allocates nothing, waits for nothing, and makes two system calls at most. To
/// be called wherever the process ends without unwinding: signal handlers, the panic hook, before
/// `process::exit`. May be called any number of times.
pub fn restore_terminal() {
    // The lock is held for moments only, and nobody waits for anything while holding it. If it is
    // held by the very code a signal interrupted, that code is about to say what we would.
    if let Ok(mut saved) = SAVED.try_lock()
        && let Some(saved) = &mut *saved
        && saved.is_raw
    {
        saved.is_raw = false;
        // In the background the terminal belongs to the shell, and touching it would stop us.
        if is_foreground(saved.fd.as_fd())
            && let Err(e) =
                rustix::termios::tcsetattr(&saved.fd, OptionalActions::Now, &saved.modes)
        {
            // Nothing to be done, and no safe way to say so in a signal handler.
            let _: rustix::io::Errno = e;
        }
    }
}

/// A terminal in raw mode, until dropped.
#[derive(Debug)]
pub(super) struct RawMode(());

impl RawMode {
    /// Puts the terminal `fd` into raw mode.
    ///
    /// Output processing stays on, so that our own messages, which end in a bare newline, do not
    /// turn into a staircase; the guest's `\r\n` comes to the same.
    pub(super) fn enter(fd: BorrowedFd<'_>) -> std::io::Result<Self> {
        // A console before this one may still have it raw: that is not how it was.
        restore_terminal();
        let modes = rustix::termios::tcgetattr(fd)?;
        let mut raw = modes.clone();
        raw.make_raw();
        raw.output_modes |= modes.output_modes & (OutputModes::OPOST | OutputModes::ONLCR);
        let own = rustix::io::fcntl_dupfd_cloexec(fd, 3)?;
        // Saved first, so that there is no moment when the terminal is raw and nobody knows.
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Saved { fd: own, modes, is_raw: true });
        let guard = Self(());
        rustix::termios::tcsetattr(fd, OptionalActions::Now, &raw)?;
        Ok(guard)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Whether reading the terminal `fd` is ours to do. In the background it would stop the process
/// (SIGTTIN); a terminal that does not control us has no such rule.
pub(super) fn is_foreground(fd: BorrowedFd<'_>) -> bool {
    match rustix::termios::tcgetpgrp(fd) {
        Ok(foreground) => foreground == rustix::process::getpgrp(),
        Err(_) => true,
    }
}

/// What the user asked of husk itself, not of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A h.
    Help,
}

/// What Ctrl-A h says.
pub(super) const HELP: &[u8] =
    b"\r\nCtrl-A x: quit    Ctrl-A Ctrl-A: send Ctrl-A    Ctrl-A h: this help\r\n";

/// Ctrl-A, the escape: what follows it may be for us.
#[derive(Debug, Default)]
pub(super) struct Escape {
    is_armed: bool,
}

impl Escape {
    const CTRL_A: u8 = 0x01;

    /// Passes one byte on to `guest`, at most two: the escape and a key that means nothing to us
    /// both go to the guest, where Ctrl-A starts a line.
    pub(super) fn filter(&mut self, byte: u8, mut guest: impl FnMut(u8)) -> Option<Key> {
        if !self.is_armed {
            self.is_armed = byte == Self::CTRL_A;
            if !self.is_armed {
                guest(byte);
            }
            return None;
        }
        self.is_armed = false;
        match byte {
            b'x' => return Some(Key::Quit),
            b'h' | b'?' => return Some(Key::Help),
            b'a' | Self::CTRL_A => guest(Self::CTRL_A),
            other => {
                guest(Self::CTRL_A);
                guest(other);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(escape: &mut Escape, bytes: &[u8]) -> (Vec<u8>, Vec<Key>) {
        let mut guest = Vec::new();
        let keys =
            bytes.iter().filter_map(|byte| escape.filter(*byte, |b| guest.push(b))).collect();
        (guest, keys)
    }

    #[test]
    fn ctrl_a_speaks_to_husk() {
        for (bytes, guest, keys) in [
            (&b"ls\r"[..], &b"ls\r"[..], &[][..]),
            (b"a\x01xb", b"ab", &[Key::Quit]),
            (b"\x01h\x01?", b"", &[Key::Help, Key::Help]),
            (b"\x01\x01x", b"\x01x", &[]),
            (b"\x01ax", b"\x01x", &[]),
            (b"\x01e", b"\x01e", &[]),
        ] {
            let mut escape = Escape::default();
            assert_eq!(typed(&mut escape, bytes), (guest.to_vec(), keys.to_vec()));
        }
    }

    #[test]
    fn the_escape_waits_for_the_next_read() {
        let mut escape = Escape::default();
        assert_eq!(typed(&mut escape, b"a\x01"), (b"a".to_vec(), vec![]));
        assert_eq!(typed(&mut escape, b"x"), (vec![], vec![Key::Quit]));
    }

    #[test]
    fn the_terminal_is_as_it_was_afterwards() {
        let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
        let master = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
        let modes = || {
            let t = rustix::termios::tcgetattr(&slave).unwrap();
            (t.input_modes, t.output_modes, t.control_modes, t.local_modes)
        };
        let before = modes();
        for _ in 0..2 {
            let raw = RawMode::enter(slave.as_fd()).unwrap();
            assert_ne!(modes(), before);
            assert!(modes().1.contains(OutputModes::OPOST));
            restore_terminal();
            assert_eq!(modes(), before);
            drop(raw);
            assert_eq!(modes(), before);
        }
        let _first = RawMode::enter(slave.as_fd()).unwrap();
        drop(RawMode::enter(slave.as_fd()).unwrap());
        assert_eq!(modes(), before, "raw twice is not how it was");
    }
}
