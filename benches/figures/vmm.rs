//! husk and the floor as processes: what starts them, what comes out of them, what ends them.
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Instant;

use crate::Result;

/// The binary to measure: the one that cargo built for this benchmark, in the same profile, unless
/// the environment names another.
pub(crate) fn husk() -> PathBuf {
    std::env::var_os("HUSK").unwrap_or_else(|| env!("CARGO_BIN_EXE_husk").into()).into()
}

/// RAM of every guest here, in MiB.
pub(crate) const RAM_MIB: u64 = 128;

/// Who runs the guest.
/// Its number is its place where both are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vmm {
    Husk,
    Floor,
}

impl Vmm {
    /// What boots `kernel` with one vCPU and 128 MiB, its serial port on standard output. husk is
    /// told nothing but the kernel: this is how it runs by itself.
    pub(crate) fn command(self, kernel: &Path) -> Result<Command> {
        let mut command = match self {
            Self::Husk => {
                let mut command = Command::new(husk());
                command.args([OsStr::new("run"), "--kernel".as_ref(), kernel.as_ref()]);
                command
            }
            Self::Floor => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args([OsStr::new("floor"), "--elf".as_ref(), kernel.as_ref()]);
                command
            }
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(command)
    }

    /// The same; the process stays after the guest's first byte until it is killed.
    pub(crate) fn command_that_stays(self, kernel: &Path) -> Result<Command> {
        let mut command = self.command(kernel)?;
        if self == Self::Floor {
            command.args(["--echo", "stay"]);
        }
        Ok(command)
    }
}

/// A process with a VM in it. Killed when dropped.
pub(crate) struct Running {
    pub(crate) started: Instant,
    child: Child,
    stdout: ChildStdout,
}

impl Running {
    /// Starts `command`; the clock runs from before the fork.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let started = Instant::now();
        let mut child = command.spawn().map_err(|e| format!("cannot start {command:?}: {e}"))?;
        let stdout = child.stdout.take().ok_or("no standard output")?;
        Ok(Self { started, child, stdout })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the next byte that the guest writes.
    pub(crate) fn await_byte(&mut self) -> Result<()> {
        let mut byte = [0];
        self.stdout.read_exact(&mut byte).map_err(|e| format!("no output of the guest: {e}"))?;
        if byte == *b"!" { Ok(()) } else { Err(format!("the guest wrote {byte:?}").into()) }
    }

    /// Sends the guest a byte. The command was to have standard input as a pipe.
    pub(crate) fn send_byte(&mut self) -> Result<()> {
        let stdin = self.child.stdin.as_mut().ok_or("no standard input")?;
        Ok(stdin.write_all(b"x")?)
    }

    /// Reads `count` bytes of output.
    pub(crate) fn read_bytes(&mut self, count: usize) -> Result<()> {
        let mut bytes = vec![0; count];
        Ok(self.stdout.read_exact(&mut bytes)?)
    }

    /// All output until the end, which is to be a success.
    pub(crate) fn read_to_end(mut self) -> Result<String> {
        let mut text = String::new();
        self.stdout.read_to_string(&mut text)?;
        self.await_end()?;
        Ok(text)
    }

    /// Waits until the process has ended by itself, successfully.
    pub(crate) fn await_end(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("it ended with {status}").into()) }
    }

    /// Kills the process without waiting for its end.
    pub(crate) fn kill(&mut self) -> Result<()> {
        Ok(self.child.kill()?)
    }

    /// Waits for the end of a process that was killed.
    pub(crate) fn reap(mut self) -> Result<()> {
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
