//! V2: indirect tables that are not allowed, or are not there.
use crate::bench::{Bench, Case, LATCHED, SIZE, Verdict};
use crate::driver::{Desc, F_INDIRECT, HIGH, INDIRECT, LOW, NEXT, WRITE};
use crate::kinds::{DATA, HEADER, Kind};

const TABLE: u64 = HIGH.0 + 0x1_0000;
const END: u64 = HIGH.0 + HIGH.1;

/// The descriptor that leads to the table: address, length, flags.
const OUTSIDE: [(&str, (u64, u32, u16)); 15] = [
    ("with_next", (TABLE, 16, INDIRECT | NEXT)),
    ("writable_with_next", (TABLE, 16, INDIRECT | NEXT | WRITE)),
    ("empty", (TABLE, 0, INDIRECT)),
    ("one_byte", (TABLE, 1, INDIRECT)),
    ("ragged", (TABLE, 17, INDIRECT)),
    ("one_byte_short", (TABLE, 31, INDIRECT)),
    ("too_long", (TABLE, 16 * 1025, INDIRECT)),
    ("huge", (TABLE, 0xffff_fff0, INDIRECT)),
    ("largest", (TABLE, u32::MAX, INDIRECT)),
    ("out_of_ram", (END, 16, INDIRECT)),
    ("in_the_hole", (LOW.0 + LOW.1, 16, INDIRECT)),
    ("across_the_hole", (LOW.0 + LOW.1 - 8, 16, INDIRECT)),
    ("across_the_end", (END - 8, 16, INDIRECT)),
    ("wrapping", (u64::MAX - 7, 16, INDIRECT)),
    ("at_the_largest", (u64::MAX, 16, INDIRECT)),
];

/// The first entries of a table of two.
const INSIDE: [(&str, &[Desc]); 6] = [
    ("nested", &[(TABLE, 16, INDIRECT, 0)]),
    ("nested_behind_a_start", &[(DATA, 16, NEXT, 1), (TABLE, 16, INDIRECT, 0)]),
    ("loop_inside", &[(DATA, 64, NEXT, 0)]),
    ("cycle_inside", &[(DATA, 64, NEXT, 1), (DATA, 64, NEXT | WRITE, 0)]),
    ("next_out_of_the_table", &[(DATA, 64, NEXT, 2)]),
    ("next_is_the_largest", &[(DATA, 64, NEXT, u16::MAX)]),
];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    (0..kind.queues().len()).flat_map(|queue| on(kind, queue)).collect()
}

fn on(kind: Kind, queue: usize) -> Vec<Case> {
    let name = |what: &str| format!("v02_{what}");
    let mut cases = Vec::new();
    for (what, (addr, len, flags)) in OUTSIDE {
        cases.push(Case::on_queue(kind, queue, name(what), LATCHED, move |b| {
            let ring = b.ring(queue);
            ring.write_desc(TABLE, 0, (DATA, 64, 0, 0));
            ring.write_desc(ring.desc, 0, (addr, len, flags, 1));
            ring.offer(0);
            b.kick_and_see(queue)
        }));
    }
    for (what, table) in INSIDE {
        cases.push(Case::on_queue(kind, queue, name(what), LATCHED, move |b| {
            let ring = b.ring(queue);
            for (index, desc) in (0..).zip(table) {
                ring.write_desc(TABLE, index, *desc);
            }
            ring.write_desc(ring.desc, 0, (TABLE, 32, INDIRECT, 0));
            ring.offer(0);
            b.kick_and_see(queue)
        }));
    }
    cases.push(Case::on_queue(kind, queue, name("behind_a_start"), LATCHED, move |b| {
        // Virtio 1.2, 2.7.5.3.1 allows it at the end; the table is longer than the chain may be.
        let ring = b.ring(queue);
        ring.write_desc(TABLE, 0, (DATA, u32::MAX, 0, 0));
        ring.write_desc(ring.desc, 0, (HEADER, 16, NEXT, 1));
        ring.write_desc(ring.desc, 1, (TABLE, 16, INDIRECT, 0));
        ring.offer(0);
        b.kick_and_see(queue)
    }));
    cases.push(Case::on_queue(kind, queue, name("not_negotiated"), LATCHED, move |b| {
        b.up_with(0);
        offer_honest(b, queue)
    }));
    cases.push(Case::on_queue(kind, queue, name("as_long_as_may_be"), ALL_BUT_LATCHED, move |b| {
        // 1024 buffers of nothing: allowed, and no request of any device.
        let ring = b.ring(queue);
        for index in 0..1024 {
            let flags = if index < 1023 { NEXT } else { 0 };
            ring.write_desc(TABLE, index, (DATA, 0, flags, index + 1));
        }
        ring.write_desc(ring.desc, 0, (TABLE, 16 * 1024, INDIRECT, 0));
        ring.offer(0);
        b.kick_and_see(queue)
    }));
    cases.push(Case::on_queue(kind, queue, name("honest"), ALL_BUT_LATCHED, move |b| {
        // What the others are to be measured by.
        b.up_with(F_INDIRECT);
        offer_honest(b, queue)
    }));
    cases
}

const ALL_BUT_LATCHED: &[Verdict] = crate::bench::ANY_END;

fn offer_honest(b: &mut Bench, queue: usize) -> Verdict {
    let buffers = b.honest(queue);
    debug_assert!(buffers.len() < usize::from(SIZE));
    b.ring(queue).add_indirect(TABLE, &buffers);
    b.kick_and_see(queue)
}
