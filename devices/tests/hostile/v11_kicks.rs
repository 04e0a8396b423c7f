//! V11: kicks before, after, for queues that are not there, and very many. Work for each is bounded.
use crate::bench::{Bench, Case, REJECTED, Verdict};
use crate::kinds::Kind;

const KICKS: u32 = if cfg!(husk_asan) { 100_000 } else { 1_000_000 };

type Attack = fn(&mut Bench);

const ATTACKS: [(&str, Attack); 8] = [
    ("after_reset", |b| {
        b.m.set(0x70, 0);
        all(b);
        assert_eq!(b.m.status(), 0);
    }),
    ("before_features", |b| {
        b.m.set(0x70, 0);
        b.m.set(0x70, 3);
        all(b);
    }),
    ("before_driver_ok", |b| {
        b.m.negotiate(0);
        let rings: Vec<_> = b.rings.clone();
        b.m.place(&rings);
        all(b);
        assert_eq!(b.m.status(), 11);
    }),
    ("no_queue_ready", |b| {
        b.m.negotiate(0);
        b.m.set(0x70, 15);
        all(b);
        b.settle();
        assert_eq!(b.m.status(), 15);
    }),
    ("absent_queues", |b| {
        for queue in [5, 6, 63, 64, 255, 0x7fff, 0xffff, 0x1_0000, 0x8000_0000, u32::MAX] {
            b.m.set(0x50, queue);
        }
        b.settle();
        assert_eq!(b.m.status(), 15);
    }),
    ("when_latched", |b| {
        b.ring(0).set_avail_idx(9999);
        b.m.kick(&b.rings[0]);
        b.latched();
        all(b);
        b.up();
    }),
    ("while_paused", |b| {
        b.pause();
        all(b);
        b.resume();
        b.settle();
        assert_eq!(b.m.status(), 15);
    }),
    ("very_many", |b| {
        let queues = u32::try_from(b.rings.len()).unwrap();
        for kick in 0..KICKS {
            b.m.set(0x50, kick % queues);
        }
        b.settle();
        assert_eq!(b.m.status(), 15);
    }),
];

fn all(b: &Bench) {
    for queue in (0..64).chain([0xffff, u32::MAX]) {
        b.m.set(0x50, queue);
    }
}

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let case = |(what, attack): (_, Attack)| {
        Case::on(kind, format!("v11_kicks_{what}"), REJECTED, move |b| {
            attack(b);
            for ring in &b.rings {
                assert_eq!(ring.used_idx(), 0, "nothing was there to be used");
            }
            Verdict::Rejected
        })
        .flooding()
    };
    ATTACKS.map(case).into()
}
