//! husk on a terminal: raw while the guest has it, as it was afterwards, and a way out.
use crate::util::*;

#[test]
fn terminal_is_as_it_was_after_every_end() {
    for (how, code) in [("poweroff", 0), ("triple", 5), ("internal-error", 6)] {
        let end = Husk::guest("hello", &format!("how={how}")).on_terminal().wait().code(code);
        assert_as_new(&end);
    }
    for (signal, code) in
        [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 143), (Signal::QUIT, 143)]
    {
        let vm = Husk::guest("hello", "how=hlt").on_terminal().start();
        vm.expect("how=hlt");
        assert!(vm.terminal().is_raw());
        vm.signal(signal);
        assert_as_new(&vm.wait().code(code));
    }
}

#[test]
fn terminal_is_as_it_was_after_a_crash() {
    for (signal, number, name) in [
        (Signal::ABORT, 6, "SIGABRT"),
        (Signal::SEGV, 11, "SIGSEGV"),
        (Signal::BUS, 7, "SIGBUS"),
        (Signal::ILL, 4, "SIGILL"),
        (Signal::FPE, 8, "SIGFPE"),
        (Signal::SYS, 31, "SIGSYS"),
    ] {
        let husk = Husk::guest("hello", "how=hlt").on_terminal().after("ulimit -c 0");
        let vm = husk.start();
        vm.expect("how=hlt");
        assert!(vm.terminal().is_raw());
        vm.signal(signal);
        let end = vm.wait();
        assert_eq!(end.signal(), Some(number));
        assert_eq!(end.errors, format!("husk: crashed: {name}\n"));
        assert_as_new(&end);
    }
}

#[track_caller]
fn assert_as_new(end: &End) {
    let (new, _) = Terminal::new();
    assert_eq!(end.terminal.as_ref().unwrap().settings(), new.settings(), "{end}");
}

#[test]
fn ctrl_a_x_quits() {
    for how in ["hang", "hlt"] {
        let vm = Husk::guest("hello", &format!("how={how}")).on_terminal().start();
        vm.expect(&format!("how={how}"));
        vm.type_in("\x01x");
        let end = vm.wait().code(0);
        assert_as_new(&end);
        assert_eq!(end.errors, "");
    }
}

#[test]
fn ctrl_a_x_quits_behind_unread_input() {
    let vm = Husk::guest("hello", "how=hang").on_terminal().start();
    vm.expect("how=hang");
    vm.type_in("nobody reads this ".repeat(50));
    vm.type_in("\x01x");
    vm.wait().code(0);
}

#[test]
fn ctrl_a_twice_is_one_for_the_guest() {
    let vm = Husk::guest("serial", "input=polled").on_terminal().start();
    vm.expect("ready=1");
    // Ctrl-C, Ctrl-D and Ctrl-Z are the guest's, too.
    vm.type_in("\x01\x01\x03\x04\x1aq");
    let end = vm.wait().ok();
    let echoed: String =
        end.output.lines().filter_map(|l| l.trim_end().strip_prefix("input=")).collect();
    assert_eq!(echoed, "0103041a71");
}

#[test]
fn ctrl_a_question_mark_shows_the_keys() {
    let vm = Husk::guest("hello", "how=hang").on_terminal().start();
    vm.expect("how=hang");
    vm.type_in("\x01?");
    vm.expect_text("Ctrl-A x");
    vm.type_in("\x01x");
    vm.wait().code(0);
}

#[test]
fn terminal_is_left_alone_when_the_start_fails() {
    let end = Husk::run("/nowhere/vmlinux").on_terminal().wait().code(3);
    assert_as_new(&end);
}
