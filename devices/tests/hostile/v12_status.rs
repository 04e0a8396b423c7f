//! V12: status and features out of turn (virtio 1.2, 2.1 and 3.1.1).
use crate::bench::{Bench, Case, REJECTED, Verdict};
use crate::driver::F_VERSION_1;
use crate::kinds::Kind;

type Attack = fn(&mut Bench);

const ATTACKS: [(&str, Attack); 11] = [
    ("features_ok_without_driver", |b| {
        b.m.set(0x70, 0);
        b.m.set(0x70, 1 | 8);
        assert_eq!(b.m.status(), 1);
    }),
    ("driver_without_acknowledge", |b| {
        b.m.set(0x70, 0);
        b.m.set(0x70, 2);
        assert_eq!(b.m.status(), 0);
    }),
    ("driver_ok_without_features_ok", |b| {
        b.m.set(0x70, 0);
        b.m.set(0x70, 1 | 2 | 4);
        assert_eq!(b.m.status(), 3);
    }),
    ("all_values_of_a_device_that_is_reset", |b| {
        for value in 0..=255u32 {
            b.m.set(0x70, 0);
            b.m.set(0x70, value);
            let ack = value & 1;
            let driver = if ack != 0 { value & 2 } else { 0 };
            assert_eq!(b.m.status(), ack | driver | value & 128, "{value:#x}");
        }
    }),
    ("all_values_after_features_ok", |b| {
        for value in 1..=255u32 {
            b.m.negotiate(0);
            b.m.set(0x70, value);
            // Clearing a bit is refused as a whole.
            let expected = if value & 11 == 11 { 11 | value & (4 | 128) } else { 11 };
            assert_eq!(b.m.status(), expected, "{value:#x}");
        }
    }),
    ("all_values_of_a_live_device", |b| {
        for value in 1..=255u32 {
            b.up();
            b.m.set(0x70, value);
            let expected = if value & 15 == 15 { 15 | value & 128 } else { 15 };
            assert_eq!(b.m.status(), expected, "{value:#x}");
        }
    }),
    ("high_bits", |b| {
        for bit in 8..32 {
            b.m.set(0x70, 15 | 1 << bit);
            assert_eq!(b.m.status(), 15, "bit {bit}");
        }
    }),
    ("each_unoffered_feature", |b| {
        let offered = b.m.features();
        for bit in (0..64).filter(|bit| offered >> bit & 1 == 0) {
            b.m.set(0x70, 0);
            b.m.set(0x70, 3);
            features(b, F_VERSION_1 | 1 << bit);
            b.m.set(0x70, 11);
            assert_eq!(b.m.status(), 3, "bit {bit}");
        }
    }),
    ("version_1_refused", |b| {
        b.m.set(0x70, 0);
        b.m.set(0x70, 3);
        features(b, b.m.features() & !F_VERSION_1);
        b.m.set(0x70, 11);
        assert_eq!(b.m.status(), 3);
    }),
    ("features_after_features_ok", |b| {
        b.m.negotiate(0);
        features(b, u64::MAX);
        b.m.set(0x70, 15);
        assert_eq!(b.m.status(), 15);
    }),
    ("pages_of_features_beyond_the_second", |b| {
        for page in [2, 3, 31, 0x8000_0000, u32::MAX] {
            b.m.set(0x14, page);
            assert_eq!(b.m.get(0x10), 0, "page {page}");
            b.m.set(0x24, page);
            b.m.set(0x20, u32::MAX);
        }
        assert_eq!(b.m.status(), 15);
    }),
];

fn features(b: &Bench, features: u64) {
    for (page, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
        b.m.set(0x24, page);
        b.m.set(0x20, u32::try_from(half).unwrap());
    }
}

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let case = |(what, attack): (_, Attack)| {
        Case::on(kind, format!("v12_{what}"), REJECTED, move |b| {
            attack(b);
            Verdict::Rejected
        })
    };
    ATTACKS.map(case).into()
}
