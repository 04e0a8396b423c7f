//! V15: requests that are none of a drive, or lie about where and how much.

use crate::bench::{Case, Verdict};
use crate::driver::{Buf, HIGH};
use crate::kinds::{DATA, HEADER, Kind, RESPONSE, UNTOUCHED, block_header};

const IOERR: &[Verdict] = &[Verdict::IoErr];
const DONE: &[Verdict] = &[Verdict::Done];

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Of the drive.
const SECTORS: u64 = 128;

/// A request: type, sector, bytes to read, bytes to write besides the status.
type Request = (u32, u64, u32, u32);

const REQUESTS: [(&str, Request, &[Verdict]); 43] = [
    ("type_2_scsi", (2, 0, 0, 512), IOERR),
    ("type_3_scsi_out", (3, 0, 512, 0), IOERR),
    ("type_5", (5, 0, 0, 0), IOERR),
    ("type_7", (7, 0, 0, 0), IOERR),
    ("type_9", (9, 0, 0, 0), IOERR),
    ("type_10_lifetime", (10, 0, 0, 512), IOERR),
    ("type_12", (12, 0, 16, 0), IOERR),
    ("type_14_secure_erase", (14, 0, 16, 0), IOERR),
    ("type_16", (16, 0, 0, 512), IOERR),
    ("type_0x80000000_barrier", (1 << 31, 0, 0, 0), IOERR),
    ("type_largest", (u32::MAX, 0, 0, 512), IOERR),
    ("flush_with_input", (FLUSH, 0, 512, 0), IOERR),
    ("flush_with_output", (FLUSH, 0, 0, 512), IOERR),
    ("flush_with_a_sector", (FLUSH, u64::MAX, 0, 0), DONE),
    ("get_id_of_0", (GET_ID, 0, 0, 0), IOERR),
    ("get_id_of_19", (GET_ID, 0, 0, 19), IOERR),
    ("get_id_of_4096", (GET_ID, 0, 0, 4096), DONE),
    ("get_id_with_input", (GET_ID, 0, 20, 20), IOERR),
    ("read_of_nothing", (IN, 0, 0, 0), IOERR),
    ("read_of_511", (IN, 0, 0, 511), IOERR),
    ("read_of_513", (IN, 0, 0, 513), IOERR),
    ("read_with_input", (IN, 0, 512, 512), IOERR),
    ("read_of_the_last", (IN, SECTORS - 1, 0, 512), DONE),
    ("read_behind_the_last", (IN, SECTORS, 0, 512), IOERR),
    ("read_across_the_end", (IN, SECTORS - 1, 0, 1024), IOERR),
    ("read_at_the_largest", (IN, u64::MAX, 0, 512), IOERR),
    ("read_that_overflows_bytes", (IN, 1 << 55, 0, 512), IOERR),
    ("read_that_wraps_to_0", (IN, (1 << 55) - 1, 0, 1024), IOERR),
    ("read_of_half_the_addresses", (IN, 1 << 54, 0, 512), IOERR),
    ("write_of_nothing", (OUT, 0, 0, 0), IOERR),
    ("write_of_511", (OUT, 0, 511, 0), IOERR),
    ("write_of_513", (OUT, 0, 513, 0), IOERR),
    ("write_with_output", (OUT, 0, 512, 512), IOERR),
    ("write_behind_the_last", (OUT, SECTORS, 512, 0), IOERR),
    ("write_across_the_end", (OUT, SECTORS - 1, 1024, 0), IOERR),
    ("write_at_the_largest", (OUT, u64::MAX, 512, 0), IOERR),
    ("write_that_wraps_to_0", (OUT, (1 << 55) - 1, 1024, 0), IOERR),
    ("discard_of_nothing", (DISCARD, 0, 0, 0), IOERR),
    ("discard_of_15", (DISCARD, 0, 15, 0), IOERR),
    ("discard_of_too_many", (DISCARD, 0, 16 * 200, 0), IOERR),
    ("discard_with_output", (DISCARD, 0, 16, 512), IOERR),
    ("zeroes_of_17", (WRITE_ZEROES, 0, 17, 0), IOERR),
    ("zeroes_of_too_many", (WRITE_ZEROES, 0, 16 * 200, 0), IOERR),
];

/// Ranges to erase: sector, count, flags.
const RANGES: [(&str, (u64, u32, u32)); 8] = [
    ("nothing", (0, 0, 0)),
    ("behind_the_last", (SECTORS, 1, 0)),
    ("across_the_end", (SECTORS - 1, 2, 0)),
    ("at_the_largest", (u64::MAX, 1, 0)),
    ("too_much", (0, u32::MAX, 0)),
    ("that_wraps", (1 << 55, 1, 0)),
    ("unknown_flags", (0, 1, 2)),
    ("all_flags", (0, 1, u32::MAX)),
];

pub(crate) fn cases(kind: Kind) -> Vec<Case> {
    if !kind.is_block() {
        return Vec::new();
    }
    let mut cases = Vec::new();
    for (what, (request, sector, input, output), expected) in REQUESTS {
        cases.push(Case::on_queue(kind, 0, format!("v15_{what}"), expected, move |b| {
            b.write(HEADER, &block_header(request, sector));
            b.write(RESPONSE, &[UNTOUCHED]);
            let all: [Buf; 4] = [
                (HEADER, 16, false),
                (DATA, input, false),
                (DATA, output, true),
                (RESPONSE, 1, true),
            ];
            let some: Vec<Buf> = all.into_iter().filter(|buffer| buffer.1 > 0).collect();
            b.send(0, &some)
        }));
    }
    for (how, request) in [("discard", DISCARD), ("zeroes", WRITE_ZEROES)] {
        for (what, (sector, count, flags)) in RANGES {
            cases.push(Case::on_queue(kind, 0, format!("v15_{how}_{what}"), IOERR, move |b| {
                b.write(HEADER, &block_header(request, 0));
                b.write(RESPONSE, &[UNTOUCHED]);
                b.write(DATA, &sector.to_le_bytes());
                b.write(DATA + 8, &count.to_le_bytes());
                b.write(DATA + 12, &flags.to_le_bytes());
                b.send(0, &[(HEADER, 16, false), (DATA, 16, false), (RESPONSE, 1, true)])
            }));
        }
    }
    // A good range before a bad one: neither has effect.
    cases.push(Case::on_queue(kind, 0, "v15_zeroes_of_good_and_bad", IOERR, move |b| {
        b.write(HEADER, &block_header(WRITE_ZEROES, 0));
        b.write(RESPONSE, &[UNTOUCHED]);
        for (at, sector) in [(DATA, 100), (DATA + 16, SECTORS)] {
            b.write(at, &u64::to_le_bytes(sector));
            b.write(at + 8, &1u32.to_le_bytes());
            b.write(at + 12, &[0; 4]);
        }
        let verdict = b.send(0, &[(HEADER, 16, false), (DATA, 32, false), (RESPONSE, 1, true)]);
        b.write(HEADER, &block_header(IN, 100));
        b.write(RESPONSE, &[UNTOUCHED]);
        let read = b.send(0, &[(HEADER, 16, false), (DATA, 512, true), (RESPONSE, 1, true)]);
        assert_eq!((read, b.read(DATA)), (Verdict::Done, [7; 512]), "sector 100 is what it was");
        verdict
    }));
    // More pieces than one call to the host takes.
    cases.push(Case::on_queue(
        kind,
        0,
        "v15_read_in_1022_pieces",
        &[Verdict::IoErr, Verdict::Done],
        |b| {
            let table = HIGH.0 + 0x1_0000;
            b.write(HEADER, &block_header(IN, 0));
            b.write(RESPONSE, &[UNTOUCHED]);
            let mut buffers = vec![(HEADER, 16, false)];
            buffers.extend((0..1022).map(|i| (DATA + i, if i < 1021 { 32 } else { 96 }, true)));
            buffers.push((RESPONSE, 1, true));
            b.ring(0).add_indirect(table, &buffers);
            b.kick_and_see(0)
        },
    ));
    cases.push(Case::on_queue(kind, 0, "v15_header_in_pieces", DONE, |b| {
        b.write(HEADER, &block_header(IN, 1));
        b.write(RESPONSE, &[UNTOUCHED]);
        let mut buffers: Vec<Buf> = (0..8).map(|i| (HEADER + 2 * i, 2, false)).collect();
        buffers.extend([(DATA, 512, true), (RESPONSE, 1, true)]);
        let verdict = b.send(0, &buffers);
        let data: [u8; 512] = b.read(DATA);
        assert_eq!(data, [7; 512]);
        verdict
    }));
    cases
}
