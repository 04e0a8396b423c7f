//! V18: buffers without end, pages that are none, and all of memory at once: rng, balloon, pmem and
//! pluggable memory.
use crate::bench::{ANY, ANY_END, Bench, Case, Verdict};
use crate::driver::{ACPI, HIGH, LOW, OWN};
use crate::kinds::{DATA, HEADER, Kind, RESPONSE, SPARE_PAGE, UNTOUCHED, mem_request};

const USED0: &[Verdict] = &[Verdict::Used0];
const DONE: &[Verdict] = &[Verdict::Done];
const IOERR: &[Verdict] = &[Verdict::IoErr];
const END: u64 = HIGH.0 + HIGH.1;

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    match kind {
        Kind::Rng => rng(),
        Kind::Balloon => balloon(),
        Kind::Pmem => pmem(),
        Kind::Mem => mem(),
        _ => Vec::new(),
    }
}

/// Most bytes for one request.
const CAP: u32 = 64 << 10;

fn rng() -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, len) in
        [("a_mebibyte", 0xf_0000), ("the_cap_and_1", CAP + 1), ("all_there_is", u32::MAX)]
    {
        let name = format!("v18_{what}");
        cases.push(Case::on_queue(Kind::Rng, 0, name, DONE, move |b| {
            let verdict = b.send(0, &[(DATA, len, true)]);
            let (_, used) = b.ring(0).used_entry(0);
            assert_eq!(used, CAP, "capped");
            let behind: [u8; 64] = b.read(DATA + u64::from(CAP));
            assert_eq!(behind, [0; 64]);
            verdict
        }));
    }
    cases.push(Case::on_queue(Kind::Rng, 0, "v18_many_huge", DONE, |b| {
        for _ in 0..64 {
            b.send(0, &[(DATA, 0xf_0000, true)]);
        }
        Verdict::Done
    }));
    cases.push(Case::on_queue(Kind::Rng, 0, "v18_ram_then_not", ANY_END, |b| {
        b.send(0, &[(DATA, 64, true), (END, 64, true)])
    }));
    cases
}

/// Page frame numbers.
type Frames = fn() -> Vec<u32>;

const LISTS: [(&str, Frames); 8] = [
    ("largest", || vec![u32::MAX]),
    ("in_the_hole", || vec![frame(LOW.0 + LOW.1), frame(HIGH.0) - 1]),
    ("behind_the_end", || vec![frame(END)]),
    ("a_window", || vec![frame(ACPI)]),
    ("one_twice", || vec![frame(SPARE_PAGE); 2]),
    ("one_1024_times", || vec![frame(SPARE_PAGE); 1024]),
    ("across_the_hole", || (frame(LOW.0 + LOW.1) - 2..frame(HIGH.0) + 2).collect()),
    ("good_and_bad", || vec![u32::MAX, frame(SPARE_PAGE), frame(END), 0xfffff]),
];

fn frame(addr: u64) -> u32 {
    u32::try_from(addr >> 12).unwrap()
}

fn balloon() -> Vec<Case> {
    let mut cases = Vec::new();
    let list = HIGH.0 + 0x1_0000;
    for (queue, which) in [(0, "inflate"), (1, "deflate")] {
        for (what, frames) in LISTS {
            let name = format!("v18_{which}_{what}");
            cases.push(Case::on_queue(Kind::Balloon, queue, name, USED0, move |b| {
                let frames: Vec<u8> = frames().into_iter().flat_map(u32::to_le_bytes).collect();
                b.write(list, &frames);
                b.send(queue, &[(list, u32::try_from(frames.len()).unwrap(), false)])
            }));
        }
        for len in [1, 2, 3, 5, 4097, 4100, 0xf_0000] {
            let name = format!("v18_{which}_list_of_{len}");
            cases.push(Case::on_queue(Kind::Balloon, queue, name, USED0, move |b| {
                b.send(queue, &[(list, len, false)])
            }));
        }
    }
    // All of memory, rings included: they read as zero then, and nothing is to be served.
    cases.push(Case::on_queue(Kind::Balloon, 0, "v18_inflate_everything", ANY, |b| {
        let all = (LOW.0 >> 12..END >> 12).map(|page| u32::try_from(page).unwrap());
        let bytes: Vec<u8> = all.flat_map(u32::to_le_bytes).collect();
        let list = HIGH.0 + 0x8_0000;
        for (at, piece) in (list..).step_by(0x1000).zip(bytes.chunks(4096)) {
            b.write(at, piece);
            b.ring(0).add(&[(at, u32::try_from(piece.len()).unwrap(), false)]);
        }
        b.kick_and_settle(0);
        if b.is_latched() { Verdict::Latched } else { Verdict::Used0 }
    }));
    for (queue, which) in [(3, "hint"), (4, "report")] {
        for (what, addr, len) in [
            ("all_of_ram", LOW.0, 0x10_0000),
            ("across_the_hole", LOW.0 + LOW.1 - 0x1000, 0x2000),
            ("unaligned", SPARE_PAGE + 1, 0x1000),
            ("less_than_a_page", SPARE_PAGE, 1),
            ("nothing", SPARE_PAGE, 0),
            ("behind_the_end", END, 0x1000),
            ("wraps", u64::MAX - 0xfff, 0x2000),
            ("largest", 0, u32::MAX),
            ("devices_memory", OWN.0, 0x1000),
        ] {
            let name = format!("v18_{which}_{what}");
            cases.push(Case::on_queue(Kind::Balloon, queue, name, ANY, move |b| {
                b.ring(queue).add(&[(addr, len, true)]);
                b.m.kick(&b.rings[queue]);
                b.settle();
                match b.ring(queue).used_idx() {
                    _ if b.is_latched() => Verdict::Latched,
                    0 => Verdict::Held,
                    _ => Verdict::Used0,
                }
            }));
        }
    }
    for command in [0, 1, 2, 3, 0x8000_0000, u32::MAX] {
        let name = format!("v18_hint_command_{command:#x}");
        cases.push(Case::on_queue(Kind::Balloon, 3, name, USED0, move |b| {
            b.write(HEADER, &u32::to_le_bytes(command));
            b.send(3, &[(HEADER, 4, false), (SPARE_PAGE, 0x1000, true)])
        }));
    }
    for len in [0, 1, 9, 11, 4096, 0xf_0000] {
        let name = format!("v18_statistics_of_{len}");
        cases.push(Case::on_queue(Kind::Balloon, 2, name, ANY_END, move |b| {
            b.send(2, &[(HEADER, len, false)])
        }));
    }
    cases
}

fn pmem() -> Vec<Case> {
    let mut cases = Vec::new();
    for request in [1, 2, 0x100, 0x8000_0000, u32::MAX] {
        let name = format!("v18_request_{request:#x}");
        cases.push(Case::on_queue(Kind::Pmem, 0, name, USED0, move |b| {
            b.write(HEADER, &u32::to_le_bytes(request));
            b.write(RESPONSE, &[UNTOUCHED; 4]);
            b.send(0, &[(HEADER, 4, false), (RESPONSE, 4, true)])
        }));
    }
    for (len, room) in [(0, 4), (3, 4), (5, 4), (4, 0), (4, 3), (4, 5), (4, 4096), (8, 8)] {
        let name = format!("v18_request_of_{len}_answer_of_{room}");
        cases.push(Case::on_queue(Kind::Pmem, 0, name, USED0, move |b| {
            b.write(HEADER, &[0; 8]);
            b.write(RESPONSE, &[UNTOUCHED; 4]);
            b.send(0, &[(HEADER, len, false), (RESPONSE, room, true)])
        }));
    }
    for (what, addr) in [("its_own_memory", OWN.0), ("behind_its_memory", OWN.0 + (2 << 20))] {
        // Reached by system calls only: its file may be cut short at any time.
        let name = format!("v18_request_in_{what}");
        cases.push(Case::on_queue(Kind::Pmem, 0, name, USED0, move |b| {
            b.write(RESPONSE, &[UNTOUCHED; 4]);
            b.send(0, &[(addr, 4, false), (RESPONSE, 4, true)])
        }));
    }
    cases
}

/// A block of pluggable memory.
const BLOCK: u64 = 2 << 20;

fn mem() -> Vec<Case> {
    let requests: [(&str, [u8; 24]); 19] = [
        ("unknown_type_4", mem_request(4, OWN.0, 1)),
        ("unknown_type_largest", mem_request(u16::MAX, OWN.0, 1)),
        ("plug_more_than_requested", mem_request(0, OWN.0, 2)),
        ("plug_nothing", mem_request(0, OWN.0, 0)),
        ("plug_all_counts", mem_request(0, OWN.0, u16::MAX)),
        ("plug_below", mem_request(0, OWN.0 - BLOCK, 1)),
        ("plug_behind", mem_request(0, OWN.0 + (256 << 20), 1)),
        ("plug_across_the_end", mem_request(0, OWN.0 + (256 << 20) - BLOCK, 2)),
        ("plug_unaligned", mem_request(0, OWN.0 + 4096, 1)),
        ("plug_ram", mem_request(0, HIGH.0, 1)),
        ("plug_at_0", mem_request(0, 0, 1)),
        ("plug_at_the_largest", mem_request(0, u64::MAX, 1)),
        ("plug_that_wraps", mem_request(0, 0_u64.wrapping_sub(BLOCK), 2)),
        ("unplug_what_is_not_plugged", mem_request(1, OWN.0, 1)),
        ("unplug_nothing", mem_request(1, OWN.0, 0)),
        ("unplug_ram", mem_request(1, LOW.0, 1)),
        ("unplug_that_wraps", mem_request(1, 0_u64.wrapping_sub(BLOCK), 2)),
        ("state_of_nothing", mem_request(3, OWN.0, 0)),
        ("state_of_ram", mem_request(3, HIGH.0, 1)),
    ];
    let mut cases: Vec<Case> = Vec::new();
    for (what, request) in requests {
        cases.push(Case::on_queue(Kind::Mem, 0, format!("v18_{what}"), IOERR, move |b| {
            ask(b, &request, 24, 10)
        }));
    }
    cases.push(Case::on_queue(Kind::Mem, 0, "v18_unplug_all_of_nothing", DONE, |b| {
        ask(b, &mem_request(2, u64::MAX, u16::MAX), 24, 10)
    }));
    for (len, room) in [(0, 10), (23, 10), (24, 0), (24, 9)] {
        let name = format!("v18_request_of_{len}_answer_of_{room}");
        cases.push(Case::on_queue(Kind::Mem, 0, name, USED0, move |b| {
            ask(b, &mem_request(3, OWN.0, 1), len, room)
        }));
    }
    cases.push(Case::on_queue(Kind::Mem, 0, "v18_request_in_what_is_not_plugged", USED0, |b| {
        b.write(RESPONSE, &[UNTOUCHED; 10]);
        b.send(0, &[(OWN.0, 24, false), (RESPONSE, 10, true)])
    }));
    cases.push(Case::on_queue(Kind::Mem, 0, "v18_answer_in_what_is_not_plugged", USED0, |b| {
        b.write(RESPONSE, &[UNTOUCHED; 10]);
        b.write(HEADER, &mem_request(3, OWN.0, 1));
        b.send(0, &[(HEADER, 24, false), (OWN.0, 10, true)])
    }));
    cases
}

fn ask(b: &mut Bench, request: &[u8], len: u32, room: u32) -> Verdict {
    b.write(HEADER, request);
    b.write(RESPONSE, &[UNTOUCHED; 16]);
    b.send(0, &[(HEADER, len, false), (RESPONSE, room, true)])
}
