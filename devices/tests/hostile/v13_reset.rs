//! V13: resets at bad moments. When the status reads 0, rings and buffers are the driver's again.
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bench::{Bench, Case, SIZE, Verdict};
use crate::driver::Ring;
use crate::kinds::{DATA, Kind};

const RESET: &[Verdict] = &[Verdict::Reset];

type Attack = fn(&mut Bench);

const ATTACKS: [(&str, Attack); 7] = [
    ("with_requests_in_flight", |b| (0..20).for_each(|_| in_flight(b, SIZE / 4))),
    ("with_full_rings", |b| (0..20).for_each(|_| in_flight(b, SIZE))),
    ("a_thousand_times", |b| {
        for _ in 0..1000 {
            b.m.set(0x70, 0);
            assert_eq!(b.m.status(), 0);
        }
    }),
    ("a_hundred_times_live", |b| {
        for _ in 0..100 {
            b.up();
            b.m.set(0x70, 0);
            assert_eq!(b.m.status(), 0);
        }
    }),
    ("while_it_is_saved", |b| {
        b.pause();
        let saved = b.m.transport.lock().unwrap().save();
        b.m.set(0x70, 0);
        assert_eq!(b.m.status(), 0);
        b.resume();
        assert_eq!(b.m.status(), 0, "what was paused is gone");
        drop(saved);
    }),
    ("while_others_kick", |b| {
        let stop = AtomicBool::new(false);
        let Bench { m, rings, .. } = b;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    rings.iter().for_each(|ring| m.kick(ring));
                }
            });
            for _ in 0..50 {
                m.start(0);
                m.set(0x70, 0);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }),
    ("when_latched", |b| {
        for _ in 0..20 {
            b.up();
            b.ring(0).set_avail_idx(9999);
            b.m.kick(&b.rings[0]);
            b.latched();
            b.m.set(0x70, 0);
            assert_eq!((b.m.status(), b.m.get(0x60)), (0, 0));
        }
    }),
];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let case = |(what, attack): (_, Attack)| {
        Case::on(kind, format!("v13_reset_{what}"), RESET, move |b| {
            attack(b);
            nothing_is_written(b);
            Verdict::Reset
        })
    };
    ATTACKS.map(case).into()
}

/// Resets, and takes rings and buffers back: they stay as they are.
pub(crate) fn nothing_is_written(b: &mut Bench) {
    b.m.set(0x70, 0);
    assert_eq!(b.m.status(), 0);
    let mark = [0xa7; 4096];
    b.write(DATA, &mark);
    let rings: Vec<Ring> =
        (0..b.m.queues()).map(|queue| Ring::new(&b.m.mem, queue, SIZE)).collect();
    for ring in &rings {
        b.m.kick(ring);
    }
    // Whatever was on its way has had its time by then.
    b.m.transport.lock().unwrap().pause().unwrap();
    assert_eq!(b.read(DATA), mark, "a buffer was written after the reset");
    for ring in &rings {
        assert_eq!(ring.used_idx(), 0, "a ring was written after the reset");
    }
}

fn in_flight(b: &mut Bench, chains: u16) {
    b.up();
    for queue in 0..b.rings.len() {
        let buffers = b.honest(queue);
        let count = chains / u16::try_from(buffers.len()).unwrap();
        for _ in 0..count {
            b.ring(queue).add(&buffers);
        }
        b.m.kick(&b.rings[queue]);
    }
    nothing_is_written(b);
}
