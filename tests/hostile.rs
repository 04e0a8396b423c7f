//! Hostile guests on real KVM, against the real program: registers, doorbells, queues, ports and CPUs.
//! docs/hostile-guests.md has the rows, and how another program is attacked in the same way.
mod verdicts;
mod vmm;

use std::time::{Duration, Instant};

use serde_json::json;

pub(crate) use self::vmm::other;
use self::vmm::{How, Machine, Vmm};
use crate::never_torn::Strace;
use crate::util::*;

/// All queues of the devices of a guest.
const QUEUES: usize = 12;
/// A guest that walks through everything; ring 0 may be emulated.
const LONG: Duration = Duration::from_secs(240);
/// Replies are promised within this, whatever the guest does.
const REPLY_MAX: Duration = Duration::from_secs(1);
/// What husk may have taken in the end.
const GROWTH_MAX_KIB: u64 = 1 << 10;

fn devices(cmdline: &str, cpus: u32) -> Machine<'_> {
    Machine { guest: "hostile", cmdline, cpus, has_devices: true }
}

fn cpu(cmdline: &str, cpus: u32) -> Machine<'_> {
    Machine { guest: "hostile_cpu", cmdline, cpus, has_devices: false }
}

fn hello(cmdline: &str) -> Machine<'_> {
    Machine { guest: "hello", cmdline, cpus: 1, has_devices: false }
}

/// Lets a guest make its attacks; each must come out as the catalogue has it, and there must be so many.
/// Of another program the verdicts are printed.
fn attack(machine: Machine<'_>, least: usize) {
    let Some(vmm) = Vmm::start(machine) else { return };
    let end = vmm.line("RESULT", LONG);
    let said = vmm.said();
    let cases = verdicts::cases(&said);
    verdicts::print(&cases);
    println!("{} cases; {end:?}", cases.len());
    if other().is_some() {
        return;
    }
    assert!(
        end.is_ok_and(|line| line.contains("RESULT ok")),
        "the guest did not get through: {said}"
    );
    let wrong: Vec<_> = cases.iter().filter(|case| !case.is_as_wanted()).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(cases.len() >= least, "{} cases, want {least}", cases.len());
    let (how, errors) = vmm.end(PATIENCE).expect("an end");
    assert_eq!(how, How::Exited(0), "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
}

#[test]
fn registers_m1_m2_m4_m8() {
    attack(devices("attack=registers", 1), 7 * 52);
}

#[test]
fn queues_v1_to_v13() {
    attack(devices("attack=queues", 1), QUEUES * 55 + 7 * 5);
}

#[test]
fn races_v14() {
    attack(devices("attack=race rounds=1000", 2), QUEUES * 3);
}

#[test]
fn ports_m3() {
    attack(cpu("how=ports", 1), 20);
}

#[test]
fn serial_registers_m6() {
    attack(cpu("how=serial", 1), 4);
}

#[test]
fn keyboard_controller_m7() {
    attack(cpu("how=keyboard", 1), 4);
}

/// M7: the reset ends the guest once, with code 0.
#[test]
fn keyboard_reset_ends_with_0() {
    ends(hello("how=reboot-i8042"), 5, 0, &[]);
}

/// X1: a triple fault is the same end each time.
#[test]
fn crashes_x1() {
    for how in ["how=triple", "how=ud-no-idt", "how=no-cr3"] {
        ends(hello(how), 20, 5, &["triple fault", "rip"]);
    }
}

/// X2: what KVM cannot go on with is told with its cause and place.
#[test]
fn kvm_errors_x2() {
    for how in ["how=internal-error", "how=wild-jump"] {
        ends(hello(how), 20, 6, &["suberror 1", "rip"]);
    }
}

/// X3: one CPU crashes while the other is busy.
#[test]
fn another_cpu_crashes_x3() {
    ends(cpu("how=ap-crash", 2), 20, 5, &["triple fault on vCPU 1"]);
}

/// The monitor ends so, and says so, each of several times.
fn ends(machine: Machine<'_>, times: u32, code: i32, words: &[&str]) {
    let mut seen = Vec::new();
    for _ in 0..times {
        let Some(vmm) = Vmm::start(machine) else { return };
        let end = vmm.end(PATIENCE);
        if other().is_none() {
            let (how, said) = end.expect("an end");
            assert_eq!(how, How::Exited(code), "{}: {said}", machine.cmdline);
            for word in words {
                assert!(said.contains(word), "{}: no {word:?} in {said}", machine.cmdline);
            }
        } else {
            seen.push(end.map(|(how, _)| how));
        }
    }
    seen.sort();
    let counts = seen.chunk_by(PartialEq::eq).map(|same| (same.len(), same[0]));
    let counts: Vec<_> = counts.collect();
    println!("{}: want code {code} {times} times; another program: {counts:?}", machine.cmdline);
}

/// X3: whatever CPUs are busy with, the API answers, pauses, goes on and ends the guest.
#[test]
fn api_answers_whatever_cpus_do_x3() {
    for machine in [
        hello("how=hlt"),
        hello("how=hang"),
        cpu("how=lapic", 1),
        cpu("how=msr", 1),
        cpu("how=init-storm", 2),
        Machine { guest: "hammer", cmdline: "mode=kick ms=100000", cpus: 1, has_devices: true },
        Machine { guest: "hammer", cmdline: "mode=random ms=100000", cpus: 1, has_devices: true },
    ] {
        let Some(vmm) = Vmm::start(machine) else { continue };
        if machine.guest != "hammer" {
            let sign = if machine.guest == "hello" { "how=" } else { "ready=1" };
            let is_ready = vmm.line(sign, PATIENCE);
            assert!(is_ready.is_ok() || other().is_some(), "{}: {is_ready:?}", machine.cmdline);
        }
        let mut took = Vec::new();
        for _ in 0..5 {
            took.push(timed(|| vmm.api().get("/")));
            for state in ["Paused", "Resumed"] {
                let body = json!({ "state": state });
                took.push(timed(|| vmm.api().patch("/vm", &body)));
            }
        }
        took.sort();
        // Other tests run beside; the promise is for a machine that has time.
        let (median, most) = (took[took.len() / 2], took[took.len() - 1]);
        println!("{}: median {median:?}, at most {most:?}", machine.cmdline);
        if other().is_some() {
            continue;
        }
        assert!(median < REPLY_MAX && most < 4 * REPLY_MAX, "{}: {took:?}", machine.cmdline);
        let begin = Instant::now();
        vmm.vm.signal(Signal::TERM);
        let (how, errors) = vmm.end(PATIENCE).expect("an end");
        assert_eq!(how, How::Exited(143), "{}: {errors}", machine.cmdline);
        assert!(begin.elapsed() < 4 * REPLY_MAX, "{}: {:?}", machine.cmdline, begin.elapsed());
    }
}

fn timed(ask: impl FnOnce() -> Reply) -> Duration {
    let begin = Instant::now();
    let reply = ask();
    let took = begin.elapsed();
    let is_done = matches!(reply.status, 200 | 204);
    assert!(is_done || other().is_some(), "after {took:?}: {} {}", reply.status, reply.body);
    took
}

/// X4: KVM_RUN fails now and then, or for good. strace makes the call fail before it is one.
#[test]
fn kvm_run_that_fails_x4() {
    for (error, times, is_survived) in [
        ("EINTR", "1..200", true),
        ("EAGAIN", "1..200", true),
        ("EFAULT", "3", false),
        ("ENOMEM", "3", false),
        ("EIO", "3", false),
    ] {
        let machine =
            Machine { guest: "warm", cmdline: "pages=16 every=5", cpus: 1, has_devices: false };
        let Some(vmm) = Vmm::start(machine) else { return };
        vmm.line("tick=", PATIENCE).expect("a guest that ticks");
        let scratch = Scratch::new();
        let inject = format!("error={error}:when={times}");
        let strace = Strace::attach(&vmm.vm, &scratch, "ioctl", &inject);
        if is_survived {
            for _ in 0..20 {
                vmm.line("tick=", PATIENCE).unwrap_or_else(|e| panic!("{error}: {e}"));
            }
            assert!(strace.detach(), "{error}: nothing was injected");
            println!("{error}: survived");
        } else {
            let end = vmm.end(PATIENCE);
            assert!(strace.detach(), "{error}: nothing was injected");
            if other().is_none() {
                let (how, said) = end.expect("an end");
                assert_eq!(how, How::Exited(6), "{error}: {said}");
                assert!(said.contains("KVM_RUN"), "{error}: {said}");
            } else {
                println!("{error}: {:?}", end.map(|(how, _)| how));
            }
        }
    }
}

/// M5, for a moment: a guest that says much, to where nobody takes it. Its memory is not husk's.
#[test]
fn serial_flood_m5() {
    for (what, path) in [("a full pipe", None), ("a device that is full", Some("/dev/full"))] {
        let scratch = Scratch::new();
        let fifo = scratch.fifo("stuck");
        // Kept open, so that there is a reader who does not read.
        let _reader = std::fs::File::options().read(true).write(true).open(&fifo).unwrap();
        let path = path.map_or(fifo, Into::into);
        let prepare = |api: &Api| {
            let reply = api.put("/serial", json!({ "serial_out_path": path }));
            println!("{what}: serial_out_path: {}", reply.status);
        };
        let machine = cpu("how=flood bytes=4M", 1);
        let Some(vmm) = Vmm::start_with(machine, prepare) else { continue };
        let before = resident_kib(vmm.vm.pid()).unwrap();
        let mut most = before;
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(3) {
            match resident_kib(vmm.vm.pid()) {
                Ok(now) => most = most.max(now),
                Err(_) => break,
            }
            timed(|| vmm.api().get("/"));
        }
        println!("{what}: {before} KiB, at most {most} KiB");
        if other().is_none() {
            assert!(most <= before + GROWTH_MAX_KIB, "{what}: {before} KiB have become {most}");
        }
    }
}
