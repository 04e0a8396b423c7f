//! V6: heads that are none, or are offered more often than they may be.
use crate::bench::{Bench, Case, LATCHED, SIZE, Verdict};
use crate::kinds::Kind;

/// Once for each offer at most.
const NEVER_MORE_OFTEN: &[Verdict] = &[Verdict::Latched, Verdict::Done, Verdict::Held];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let mut cases = Vec::new();
    for queue in 0..kind.queues().len() {
        for head in [SIZE, SIZE + 1, 255, 256, 0x7fff, 0x8000, u16::MAX] {
            let name = format!("v06_head_{head:#x}");
            cases.push(Case::on_queue(kind, queue, name, LATCHED, move |b| {
                b.ring(queue).offer(head);
                b.kick_and_see(queue)
            }));
        }
        for (what, times) in [("twice", 2), ("in_all_slots", SIZE)] {
            let name = format!("v06_one_head_{what}");
            cases.push(Case::on_queue(kind, queue, name, NEVER_MORE_OFTEN, move |b| {
                let buffers = b.honest(queue);
                b.ring(queue).add(&buffers);
                (1..times).for_each(|_| b.ring(queue).offer(0));
                many(b, queue, times)
            }));
        }
        // A good one before a bad one: what was good is done or forgotten, the rest is dead.
        cases.push(Case::on_queue(kind, queue, "v06_good_then_bad", LATCHED, move |b| {
            let buffers = b.honest(queue);
            b.ring(queue).add(&buffers);
            b.ring(queue).offer(SIZE);
            b.m.kick(&b.rings[queue]);
            let verdict = b.latched();
            assert!(b.ring(queue).used_idx() <= 1);
            verdict
        }));
    }
    cases
}

/// Kicks, and waits until each offer has come to an end, or is held.
fn many(b: &mut Bench, queue: usize, offers: u16) -> Verdict {
    b.kick_and_see(queue);
    b.settle();
    while !b.kind.holds(queue) && !b.is_latched() && b.ring(queue).used_idx() < offers {
        b.settle();
    }
    let used = b.ring(queue).used_idx();
    assert!(used <= offers, "{used} completions of {offers} offers");
    for slot in 0..used {
        assert_eq!(b.ring(queue).used_entry(slot).0, 0, "a head that was not offered");
    }
    match (b.is_latched(), used) {
        (true, _) => Verdict::Latched,
        (_, 0) => Verdict::Held,
        _ => Verdict::Done,
    }
}
