//! V5: buffers of the wrong direction, in the wrong order, too few or too many.
use crate::bench::{ANY_END, Case, Verdict};
use crate::driver::Buf;
use crate::kinds::{DATA, Kind, RESPONSE};

type Spoil = fn(&mut Vec<Buf>);

const SPOILT: [(&str, Spoil); 12] = [
    ("first_flipped", |buffers| buffers[0].2 ^= true),
    ("last_flipped", |buffers| buffers.last_mut().unwrap().2 ^= true),
    ("all_flipped", |buffers| buffers.iter_mut().for_each(|buffer| buffer.2 ^= true)),
    ("all_readable", |buffers| buffers.iter_mut().for_each(|buffer| buffer.2 = false)),
    ("all_writable", |buffers| buffers.iter_mut().for_each(|buffer| buffer.2 = true)),
    ("backwards", |buffers| buffers.reverse()),
    ("first_missing", |buffers| buffers.drain(..buffers.len().min(2) - 1).for_each(drop)),
    ("last_missing", |buffers| buffers.truncate(buffers.len().max(2) - 1)),
    ("response_at_the_front", |buffers| buffers.insert(0, (RESPONSE, 1, true))),
    ("response_twice", |buffers| buffers.push((RESPONSE, 1, true))),
    ("readable_behind", |buffers| buffers.push((DATA, 16, false))),
    ("nothing_at_all", |buffers| *buffers = vec![(DATA, 0, false)]),
];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    let on = |queue| {
        SPOILT.map(|(what, spoil)| {
            let expected = expected(kind, what);
            Case::on_queue(kind, queue, format!("v05_{what}"), expected, move |b| {
                let mut buffers = b.honest(queue);
                spoil(&mut buffers);
                b.send(queue, &buffers)
            })
        })
    };
    (0..kind.queues().len()).flat_map(on).collect()
}

fn expected(kind: Kind, what: &str) -> &'static [Verdict] {
    match what {
        _ if !kind.is_block() => ANY_END,
        // Nowhere to put the status.
        "last_missing" | "first_flipped" | "response_twice" => ANY_END,
        "all_readable" | "nothing_at_all" => &[Verdict::Used0],
        // The status is there, if not where it belongs.
        "last_flipped" => &[Verdict::IoErr, Verdict::Used0],
        _ => &[Verdict::IoErr, Verdict::Used0],
    }
}
