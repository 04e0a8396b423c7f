//! A network of a test's own: a namespace without a name, and taps in it. All of it goes with the last descriptor, so
//! nothing is left behind however the test ends.
#![expect(
    unsafe_code,
    reason = "namespaces are entered by system calls in new threads and processes"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::thread;

/// The host's address in every test network.
pub(crate) const HOST_IP: &str = "172.16.0.1";

#[derive(Clone, Debug)]
pub(crate) struct Network {
    namespace: Arc<File>,
}

impl Network {
    /// A namespace with the loopback interface up.
    pub(crate) fn new() -> Self {
        super::require_host();
        let made = thread::spawn(|| {
            // SAFETY: changes this thread only, which ends here.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            File::open("/proc/thread-self/ns/net")
        });
        let namespace = made.join().unwrap().expect("a network namespace, as root");
        let network = Self { namespace: Arc::new(namespace) };
        network.ip("link set lo up");
        network
    }

    /// A namespace with a tap `tap0` that has the host's address.
    pub(crate) fn with_tap() -> Self {
        let network = Self::new();
        network.ip("tuntap add tap0 mode tap vnet_hdr");
        network.ip(&format!("addr add {HOST_IP}/24 dev tap0"));
        network.ip("link set tap0 up");
        network
    }

    /// Runs `ip` with these words in it.
    pub(crate) fn ip(&self, words: &str) -> String {
        self.run("ip", words)
    }

    /// Runs a program in it to its end; what it wrote. Fails if it fails.
    pub(crate) fn run(&self, program: &str, words: &str) -> String {
        let mut command = Command::new(program);
        self.enter(command.args(words.split_whitespace()));
        let output = command
            .output()
            .unwrap_or_else(|e| panic!("{program}: {e} (iproute2 and iputils-ping are needed)"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {words}: {}\n{text}{errors}", output.status);
        text
    }

    /// Makes a process start in it.
    pub(crate) fn enter(&self, command: &mut Command) {
        let namespace = self.namespace.clone();
        // SAFETY: one system call between fork and exec, on a descriptor that the closure keeps.
        unsafe {
            command.pre_exec(move || match libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            })
        };
    }

    /// Calls `f` on a thread in it: for sockets of the test's own.
    pub(crate) fn within<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let called = scope.spawn(|| {
                // SAFETY: changes this thread only, which ends here.
                let entered =
                    unsafe { libc::setns(self.namespace.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(entered, 0, "{}", io::Error::last_os_error());
                f()
            });
            called.join().unwrap()
        })
    }
}
