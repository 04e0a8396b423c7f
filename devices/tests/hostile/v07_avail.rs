//! V7: an available index that jumps, goes back, or wraps as it may.
use devices::virtio::mmio::Saved;
use vm_memory::{Bytes, GuestAddress};

use crate::bench::{ANY_END, Bench, Case, LATCHED, SIZE, Verdict};
use crate::kinds::Kind;

const LATCHED_OR_HELD: &[Verdict] = &[Verdict::Latched, Verdict::Held];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let mut cases = Vec::new();
    for queue in 0..kind.queues().len() {
        for (what, to) in [
            ("one_too_far", SIZE + 1),
            ("twice_the_size", 2 * SIZE),
            ("half_of_all", 0x8000),
            ("half_less_1", 0x7fff),
            ("back_by_1", u16::MAX),
            ("back_by_the_size", SIZE.wrapping_neg()),
        ] {
            let name = format!("v07_jump_{what}");
            cases.push(Case::on_queue(kind, queue, name, LATCHED, move |b| {
                let buffers = b.honest(queue);
                b.ring(queue).add(&buffers);
                b.ring(queue).set_avail_idx(to);
                b.kick_and_see(queue)
            }));
        }
        for (what, by) in [("back_after_2", 2_u16.wrapping_neg()), ("far_after_2", SIZE + 1)] {
            let name = format!("v07_{what}");
            // What is held may have been given back just then: then it is not back, but where it was.
            let may_be_held = kind.holds(queue) && by > SIZE + 1;
            let expected = if may_be_held { LATCHED_OR_HELD } else { LATCHED };
            cases.push(Case::on_queue(kind, queue, name, expected, move |b| {
                for _ in 0..2 {
                    let buffers = b.honest(queue);
                    assert!(ANY_END.contains(&b.send(queue, &buffers)));
                }
                b.ring(queue).set_avail_idx(2_u16.wrapping_add(by));
                b.kick_and_see(queue)
            }));
        }
        cases.push(
            Case::on_queue(kind, queue, "v07_wraps_at_65535", ANY_END, move |b| wrap(b, queue))
                .allowing(16 << 20),
        );
    }
    cases
}

/// Both indices go past their end: a device that was saved just before is brought there.
fn wrap(b: &mut Bench, queue: usize) -> Verdict {
    const START: u16 = u16::MAX - 5;
    b.pause();
    let mut saved = serde_json::to_value(b.m.transport.lock().unwrap().save()).unwrap();
    b.resume();
    for position in saved["positions"].as_array_mut().unwrap() {
        *position = serde_json::json!([START, START]);
    }
    let saved: Saved = serde_json::from_value(saved).unwrap();
    let mut other = Bench::restored(b, &saved, START);
    for ring in &mut other.rings {
        ring.set_avail_idx(START);
        let used = ring.used;
        other.m.mem.write_obj(START, GuestAddress(used + 2)).unwrap();
    }
    other.resume();
    let mut verdict = None;
    for _ in 0..12 {
        let buffers = other.honest(queue);
        verdict = Some(other.send(queue, &buffers));
        assert!(ANY_END.contains(&verdict.unwrap()), "{verdict:?}");
    }
    if !other.kind.holds(queue) {
        assert_eq!(other.ring(queue).used_idx(), START.wrapping_add(12));
    }
    verdict.unwrap()
}
