//! Standard error that nobody reads: husk loses words and nothing else.
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::util::*;

/// How long it may take to end, on a busy machine; one that waits for a reader takes for ever.
const PROMPTLY: Duration = Duration::from_secs(10);

/// Shell that makes standard error a pipe that is full and that nobody reads.
fn full_pipe(scratch: &Scratch) -> String {
    let fifo = scratch.path("fifo");
    let fifo = fifo.display();
    format!(
        "mkfifo {fifo}; exec 2<>{fifo}; \
         dd if=/dev/zero of={fifo} oflag=nonblock bs=4096 count=1000 2>/dev/null || true"
    )
}

#[test]
fn refusals_that_nobody_reads_hold_nothing_up() {
    for (args, code) in [(&["run", "--kernel", "/nope"][..], 3), (&["run", "--nope"], 2)] {
        let scratch = Scratch::new();
        let end = Husk::new(args)
            .after(&full_pipe(&scratch))
            .start_unheard()
            .wait_within(PROMPTLY)
            .code(code);
        assert_eq!(end.errors, "");
    }
}

#[test]
fn logs_that_nobody_reads_hold_nothing_up() {
    let (scratch, (_terminal, theirs)) = (Scratch::new(), Terminal::new());
    let terminal = rustix::termios::ttyname(&theirs, Vec::new()).unwrap().into_string().unwrap();
    for shell in [full_pipe(&scratch), format!("exec 2>{terminal}")] {
        let vm = Husk::api().after(&shell).start_unheard();
        wait_for_socket(&vm);
        for _ in 0..20 {
            let reply = vm.api().put(&format!("/{}", "x".repeat(1500)), "{}");
            assert_eq!(reply.status, 400);
        }
        vm.signal(Signal::TERM);
        vm.wait_within(PROMPTLY).code(143);
    }
}

/// Waits until it listens; its log cannot tell.
#[track_caller]
fn wait_for_socket(vm: &TestVm) {
    let deadline = Instant::now() + PATIENCE;
    while UnixStream::connect(vm.socket()).is_err() {
        assert!(Instant::now() < deadline, "it does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
}
