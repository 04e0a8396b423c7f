//! V1: chains that do not end.
use crate::bench::{Bench, Case, LATCHED, SIZE};
use crate::driver::{Desc, NEXT, WRITE};
use crate::kinds::{DATA, Kind};

/// The descriptors from 0 on, and the head.
type Table = fn() -> Vec<Desc>;

const TABLES: [(&str, Table); 9] = [
    ("self_loop", || vec![(DATA, 64, NEXT, 0)]),
    ("self_loop_writable", || vec![(DATA, 64, NEXT | WRITE, 0)]),
    ("cycle_of_two", || vec![(DATA, 64, NEXT, 1), (DATA, 64, NEXT | WRITE, 0)]),
    ("cycle_behind_a_start", || vec![(DATA, 16, NEXT, 1), (DATA, 64, NEXT, 2), (DATA, 1, NEXT, 1)]),
    // As long as the queue, and one more: the last leads back to the first.
    ("one_more_than_the_queue", || (1..=SIZE).map(|i| (DATA, 1, NEXT, i % SIZE)).collect()),
    ("cycle_of_empty_buffers", || (1..=SIZE).map(|i| (DATA, 0, NEXT, i % SIZE)).collect()),
    ("next_is_the_size", || vec![(DATA, 64, NEXT, SIZE)]),
    ("next_beyond_the_size", || vec![(DATA, 64, NEXT, 1), (DATA, 64, NEXT | WRITE, SIZE + 1)]),
    ("next_is_the_largest", || vec![(DATA, 64, NEXT, u16::MAX)]),
];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let on = |queue| {
        TABLES.map(|(what, table)| {
            Case::on_queue(kind, queue, format!("v01_{what}"), LATCHED, move |b: &mut Bench| {
                let ring = b.ring(queue);
                for (index, desc) in (0..).zip(table()) {
                    ring.write_desc(ring.desc, index, desc);
                }
                ring.offer(0);
                b.kick_and_see(queue)
            })
        })
    };
    (0..kind.queues().len()).flat_map(on).collect()
}
