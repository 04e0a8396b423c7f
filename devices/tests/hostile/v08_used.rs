//! V8: what is the device's to write, and what only advises it, scribbled over: it keeps its own indices.
use vm_memory::{Bytes, GuestAddress};

use crate::bench::{ANY_END, Bench, Case, SIZE, Verdict};
use crate::driver::F_EVENT_IDX;
use crate::kinds::Kind;

type Scribble = fn(&mut Bench, usize, u16);

const SCRIBBLES: [(&str, u64, Scribble); 8] = [
    ("used_ring", 0, |b, queue, _| {
        let at = b.rings[queue].used + 4;
        b.write(at, &[0xff; 8 * SIZE as usize]);
    }),
    ("used_index", 0, |b, queue, round| {
        // Far from what it is, and never what a driver would take for a completion of this one.
        let at = b.rings[queue].used + 2;
        b.write(at, &(0x4000 + round).to_le_bytes());
    }),
    ("used_flags", 0, |b, queue, _| {
        let at = b.rings[queue].used;
        b.write(at, &[0xff; 2]);
    }),
    ("available_flags", 0, |b, queue, round| {
        // All of them but the one that asks for silence.
        let at = b.rings[queue].avail;
        b.write(at, &((round << 1) | 0xfff0).to_le_bytes());
    }),
    ("slots_beyond_the_index", 0, |b, queue, round| {
        let at = b.rings[queue].avail + 4 + 2 * u64::from((round + 2) % SIZE);
        b.write(at, &[0xff; 2]);
    }),
    ("avail_event", F_EVENT_IDX, |b, queue, round| {
        let at = b.rings[queue].used + 4 + 8 * u64::from(SIZE);
        b.write(at, &(round ^ 0x5555).to_le_bytes());
    }),
    ("used_event_far", F_EVENT_IDX, |b, queue, round| {
        b.rings[queue].set_used_event(round.wrapping_add(0x8000));
    }),
    ("used_event_extreme", F_EVENT_IDX, |b, queue, round| {
        b.rings[queue].set_used_event(if round % 2 == 0 { u16::MAX } else { 0 });
    }),
];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let on = |queue| {
        SCRIBBLES.map(|(what, features, scribble)| {
            Case::on_queue(kind, queue, format!("v08_{what}"), ANY_END, move |b| {
                b.up_with(features);
                attack(b, queue, scribble)
            })
        })
    };
    (0..kind.queues().len()).flat_map(on).collect()
}

/// More rounds than the ring has entries.
fn attack(b: &mut Bench, queue: usize, scribble: Scribble) -> Verdict {
    // A queue whose buffers are held is full after a round, and those held are looked at again.
    let rounds = if b.kind.holds(queue) { SIZE - 3 } else { 3 * SIZE };
    for round in 0..rounds {
        let buffers = b.honest(queue);
        // Before the device may use the chain, which it may without a kick when it has just come up.
        scribble(b, queue, round);
        b.ring(queue).add(&buffers[..1]);
        b.m.kick(&b.rings[queue]);
        if b.kind.holds(queue) {
            b.settle();
            continue;
        }
        let done = round + 1;
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while b.rings[queue].used_idx() != done {
            assert!(std::time::Instant::now() < end, "round {round} does not end");
            std::thread::yield_now();
        }
    }
    assert_eq!(b.m.status(), 15, "it must not be latched");
    let _: u16 = b.m.mem.read_obj(GuestAddress(b.rings[queue].used)).unwrap();
    if b.kind.holds(queue) { Verdict::Held } else { Verdict::Used0 }
}
