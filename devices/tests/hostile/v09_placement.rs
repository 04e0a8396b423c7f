//! V9: rings of sizes and at places that cannot be. Activation fails, and the device says so.
use crate::bench::{Case, LATCHED, REJECTED, Verdict};
use crate::driver::{ACPI, HIGH, LOW, OWN, Ring};
use crate::kinds::Kind;

const END: u64 = HIGH.0 + HIGH.1;

type Spoil = fn(&mut Ring);

const SPOILT: [(&str, Spoil); 30] = [
    ("size_0", |r| r.size = 0),
    ("size_3", |r| r.size = 3),
    ("size_15", |r| r.size = 15),
    ("size_512", |r| r.size = 512),
    ("size_32768", |r| r.size = 0x8000),
    ("size_65535", |r| r.size = u16::MAX),
    ("descriptors_misaligned", |r| r.desc += 8),
    ("descriptors_misaligned_by_1", |r| r.desc += 1),
    ("available_misaligned", |r| r.avail += 1),
    ("used_misaligned", |r| r.used += 2),
    ("used_misaligned_by_1", |r| r.used += 1),
    ("descriptors_at_the_end", |r| r.desc = END - 16),
    ("available_at_the_end", |r| r.avail = END - 2),
    ("used_at_the_end", |r| r.used = END - 4),
    ("descriptors_behind_the_end", |r| r.desc = END),
    ("available_behind_the_end", |r| r.avail = END),
    ("used_behind_the_end", |r| r.used = END),
    ("descriptors_in_the_hole", |r| r.desc = LOW.0 + LOW.1),
    ("descriptors_across_the_hole", |r| r.desc = LOW.0 + LOW.1 - 16),
    ("available_across_the_hole", |r| r.avail = LOW.0 + LOW.1 - 4),
    ("used_across_the_hole", |r| r.used = LOW.0 + LOW.1 - 8),
    ("descriptors_wrap", |r| r.desc = u64::MAX - 15),
    ("available_wraps", |r| r.avail = u64::MAX - 1),
    ("used_wraps", |r| r.used = u64::MAX - 3),
    ("all_at_one_place", |r| (r.avail, r.used) = (r.desc, r.desc)),
    ("used_on_available", |r| r.used = r.avail + 4),
    ("used_on_descriptors", |r| r.used = r.desc + 16),
    ("used_in_a_window", |r| r.used = ACPI),
    ("used_in_devices_own_memory", |r| r.used = OWN.0),
    ("no_addresses", |r| (r.desc, r.avail, r.used) = (0, 0, 0)),
];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let mut cases = Vec::new();
    for queue in 0..kind.queues().len() {
        for (what, spoil) in SPOILT {
            let name = format!("v09_{what}");
            cases.push(Case::on_queue(kind, queue, name, LATCHED, move |b| {
                let number = u16::try_from(queue).unwrap();
                b.m.negotiate(0);
                let mut ring = Ring::new(&b.m.mem, number, 16);
                spoil(&mut ring);
                b.m.place(&[ring]);
                b.m.set(0x70, 15);
                let verdict = b.latched();
                b.m.set(0x50, number.into());
                verdict
            }));
        }
        // A size that does not fit 16 bits is none, and not its low half.
        cases.push(Case::on_queue(kind, queue, "v09_size_65552", LATCHED, move |b| {
            let number = u16::try_from(queue).unwrap();
            b.m.negotiate(0);
            let ring = Ring::new(&b.m.mem, number, 16);
            b.m.place(&[ring]);
            b.m.set(0x44, 0);
            b.m.set(0x38, 0x1_0010);
            b.m.set(0x44, 1);
            b.m.set(0x70, 15);
            b.latched()
        }));
        cases.push(Case::on_queue(kind, queue, "v09_size_1", REJECTED, move |b| {
            // The smallest there may be (virtio 1.2, 2.7) is as good as any.
            let number = u16::try_from(queue).unwrap();
            b.m.negotiate(0);
            b.m.place(&[Ring::new(&b.m.mem, number, 1)]);
            b.m.set(0x70, 15);
            assert_eq!(b.m.status(), 15);
            Verdict::Rejected
        }));
    }
    cases
}
