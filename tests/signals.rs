//! Signals: those that stop husk, those that must not.
use crate::util::*;

#[test]
fn quit_stops_as_a_hang_up_does() {
    let vm = Husk::guest("hello", "how=hlt").start();
    vm.expect("how=hlt");
    vm.signal(Signal::QUIT);
    assert_eq!(vm.wait().code(143).errors.lines().last(), Some("husk: stopped by SIGQUIT"));
}

#[test]
fn stop_signals_ignored_at_the_start_stay_ignored() {
    let vm = Husk::api().after("trap '' HUP INT QUIT").start();
    for signal in [Signal::HUP, Signal::INT, Signal::QUIT] {
        vm.signal(signal);
    }
    assert_eq!(vm.api().state(), "Not started");
    vm.signal(Signal::TERM);
    assert_eq!(vm.wait().code(143).errors.lines().last(), Some("husk: stopped by SIGTERM"));
}

#[test]
fn alarms_and_the_terminals_stop_change_nothing() {
    let vm = Husk::guest("hello", "how=hang").listening().start();
    vm.expect("how=hang");
    for signal in [Signal::ALARM, Signal::VTALARM, Signal::TSTP] {
        vm.signal(signal);
    }
    assert_eq!(vm.api().state(), "Running");
    vm.api().act("Kill").done();
    vm.wait().code(0);
}
