//! V10: queues that are ready before they are anything, twice, now and then; and registers that are
//! written when it is too late.
use crate::bench::{ANY_END, Bench, Case, LATCHED, REJECTED, SIZE, Verdict};
use crate::driver::Ring;
use crate::kinds::Kind;

/// Registers that say what a queue is.
const QUEUE_REGISTERS: [(&str, u64); 8] = [
    ("size", 0x38),
    ("ready", 0x44),
    ("desc_low", 0x80),
    ("desc_high", 0x84),
    ("driver_low", 0x90),
    ("driver_high", 0x94),
    ("device_low", 0xa0),
    ("device_high", 0xa4),
];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let mut cases = Vec::new();
    for queue in 0..kind.queues().len() {
        let number = u16::try_from(queue).unwrap();
        let mut add = |what: &str, expected, attack: fn(&mut Bench, u16) -> Verdict| {
            let name = format!("v10_{what}");
            cases.push(Case::on_queue(kind, queue, name, expected, move |b| attack(b, number)));
        };
        add("ready_without_addresses", LATCHED, |b, number| {
            b.m.negotiate(0);
            b.m.set(0x30, number.into());
            b.m.set(0x44, 1);
            b.m.set(0x70, 15);
            b.latched()
        });
        add("ready_before_features", REJECTED, |b, number| {
            b.m.set(0x70, 0);
            b.m.set(0x70, 3);
            b.m.set(0x30, number.into());
            b.m.set(0x44, 1);
            assert_eq!(b.m.get(0x44), 0, "no queue is ready before FEATURES_OK");
            Verdict::Rejected
        });
        add("ready_twice", ANY_END, |b, number| {
            b.m.negotiate(0);
            let ring = Ring::new(&b.m.mem, number, SIZE);
            b.m.place(std::slice::from_ref(&ring));
            b.m.set(0x44, 1);
            serve(b, ring)
        });
        add("ready_toggled", ANY_END, |b, number| {
            b.m.negotiate(0);
            let ring = Ring::new(&b.m.mem, number, SIZE);
            b.m.place(std::slice::from_ref(&ring));
            for ready in [0, 1, 0, 2, u32::MAX, 1] {
                b.m.set(0x44, ready);
                assert_eq!(b.m.get(0x44), u32::from(ready == 1));
            }
            serve(b, ring)
        });
        for (what, register) in QUEUE_REGISTERS {
            for value in [0, 1, 3, 0x8000, u32::MAX] {
                let name = format!("v10_{what}_is_{value:#x}_when_live");
                cases.push(Case::on_queue(kind, queue, name, ANY_END, move |b| {
                    b.m.set(0x30, number.into());
                    b.m.set(register, value);
                    assert_eq!(b.m.get(0x44), 1);
                    // Nor does a pause pick it up.
                    b.pause();
                    b.resume();
                    let buffers = b.honest(queue);
                    b.send(queue, &buffers)
                }));
            }
        }
        cases.push(Case::on_queue(kind, queue, "v10_registers_when_ready", ANY_END, move |b| {
            b.m.negotiate(0);
            let ring = Ring::new(&b.m.mem, number, SIZE);
            b.m.place(std::slice::from_ref(&ring));
            for (_, register) in QUEUE_REGISTERS.into_iter().filter(|(_, at)| *at != 0x44) {
                b.m.set(register, 0xdead_beef);
            }
            serve(b, ring)
        }));
    }
    cases
}

/// The queue is what it was, and serves.
fn serve(b: &mut Bench, ring: Ring) -> Verdict {
    b.m.set(0x70, 15);
    assert_eq!(b.m.status(), 15);
    let queue = usize::from(ring.queue);
    b.rings[queue] = ring;
    let buffers = b.honest(queue);
    b.send(queue, &buffers)
}
