//! The balloon: memory given back, statistics, hints and reports.
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Buf, F_EVENT_IDX, F_INDIRECT, HIGH, LOW, Machine, Ring, ram};
use crate::samples::{open, refusal};

const STATS: u64 = 1 << 1;
const OOM: u64 = 1 << 2;
const HINT: u64 = 1 << 3;
const REPORT: u64 = 1 << 5;

/// Queues of a driver that takes all features.
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
const HINTING: usize = 3;
const REPORTING: usize = 4;

/// Where the driver writes lists and commands.
const LIST: u64 = 0x8_0000;
/// Pages that the driver names: the second piece of RAM, all of it.
const FREE: u64 = HIGH.0;
const PAGE: u64 = 4096;
const PAGES: u64 = HIGH.1 / PAGE;

fn config(changes: Value) -> Value {
    let mut config = json!({
        "amount_mib": 1, "deflate_on_oom": false, "stats_polling_interval_s": 60,
        "free_page_hinting": true, "free_page_reporting": true,
    });
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    config
}

fn machine(changes: Value) -> Machine {
    Machine::new(open("balloon", &config(changes)))
}

/// A machine whose driver takes all that is offered, and its rings.
fn started() -> (Machine, Vec<Ring>) {
    let m = machine(json!({}));
    let rings = m.start(STATS | HINT | REPORT);
    (m, rings)
}

/// Makes all pages that the driver may name differ from zero.
fn fill(m: &Machine) {
    m.mem.write_slice(&vec![7; usize::try_from(HIGH.1).unwrap()], GuestAddress(FREE)).unwrap();
}

/// Which of these pages are zero.
fn zero_pages(m: &Machine) -> Vec<u64> {
    let is_zero = |page: &u64| {
        let mut bytes = [1; 4096];
        m.mem.read_slice(&mut bytes, GuestAddress(FREE + page * PAGE)).unwrap();
        assert!(bytes == [0; 4096] || bytes == [7; 4096], "page {page} is neither");
        bytes == [0; 4096]
    };
    (0..PAGES).filter(is_zero).collect()
}

/// A list of pages of `FREE`, as the driver gives it to the device.
fn list(m: &Machine, pages: impl IntoIterator<Item = u64>) -> Buf {
    let frames = pages.into_iter().map(|page| u32::try_from(FREE / PAGE + page).unwrap());
    let bytes: Vec<u8> = frames.flat_map(u32::to_le_bytes).collect();
    m.mem.write_slice(&bytes, GuestAddress(LIST)).unwrap();
    (LIST, u32::try_from(bytes.len()).unwrap(), false)
}

/// Gives one chain to the device and waits until it is back.
fn give(m: &Machine, ring: &mut Ring, buffers: &[Buf]) {
    let before = ring.used_idx();
    ring.add(buffers);
    m.finish(ring, before.wrapping_add(1));
}

fn show(m: &Machine, view: Option<&str>) -> Value {
    m.transport.lock().unwrap().show(view).unwrap()
}

fn update(m: &Machine, view: Option<&str>, patch: Value) {
    m.transport.lock().unwrap().update(view, &patch).unwrap();
}

fn refused(m: &Machine, view: Option<&str>, patch: Value) -> String {
    let e = m.transport.lock().unwrap().update(view, &patch).unwrap_err();
    assert!(e.is_config(), "{e}");
    e.to_string()
}

#[test]
fn pages_in_the_balloon_are_given_back_and_read_zero() {
    let (m, mut rings) = started();
    fill(&m);
    let pages = list(&m, [3, 5, 4, 200, 5]);
    give(&m, &mut rings[INFLATE], &[pages]);
    assert_eq!(zero_pages(&m), [3, 4, 5, 200]);
    assert_eq!((m.counter("inflate_count"), m.counter("inflate_freed")), (1, 4 * PAGE));
    // Back from the balloon they are as good as new.
    let pages = list(&m, [3]);
    give(&m, &mut rings[DEFLATE], &[pages]);
    m.mem.write_slice(&[7; 4096], GuestAddress(FREE + 3 * PAGE)).unwrap();
    assert_eq!(zero_pages(&m), [4, 5, 200]);
    assert_eq!((m.counter("deflate_count"), m.counter("inflate_fails")), (1, 0));
}

#[test]
fn lists_may_be_in_pieces_and_long() {
    let (m, mut rings) = started();
    fill(&m);
    let (at, len, _) = list(&m, (0..PAGES).rev());
    give(&m, &mut rings[INFLATE], &[(at, 6, false), (at + 6, len - 6, false)]);
    assert_eq!(zero_pages(&m).len() as u64, PAGES);
    fill(&m);
    let frames = list(&m, std::iter::repeat_n(9, 1024));
    give(&m, &mut rings[INFLATE], &[frames]);
    assert_eq!(zero_pages(&m), [9]);
}

#[test]
fn lists_that_are_none_come_back_and_change_nothing() {
    let (m, mut rings) = started();
    fill(&m);
    let (at, _, _) = list(&m, 0..2);
    let cases: [&[Buf]; 7] = [
        &[(at, 0, false)],
        &[(at, 3, false)],
        &[(at, 5, false)],
        &[(at, 4 * 1025, false)],
        &[(at, 0x7fff_fffc, false)],
        &[(at, 4, true)],
        &[(at, 4, false), (LOW.1 - 2, 4, false)],
    ];
    for (count, case) in (1..).zip(cases) {
        give(&m, &mut rings[INFLATE], case);
        assert_eq!(m.counter("inflate_fails"), count, "{case:?}");
    }
    assert_eq!(zero_pages(&m), [0; 0]);
    assert_eq!(m.status(), 15);
}

#[test]
fn pages_that_are_not_ram_are_not_touched() {
    let (m, mut rings) = started();
    fill(&m);
    let end = (HIGH.0 + HIGH.1) / PAGE;
    let hole = (LOW.0 + LOW.1) / PAGE;
    let wild = [hole, end, u64::from(u32::MAX), end + 5, FREE / PAGE + 8];
    let bytes: Vec<u8> =
        wild.iter().flat_map(|frame| u32::try_from(*frame).unwrap().to_le_bytes()).collect();
    m.mem.write_slice(&bytes, GuestAddress(LIST)).unwrap();
    give(&m, &mut rings[INFLATE], &[(LIST, 20, false)]);
    // The good one among them is served.
    assert_eq!((zero_pages(&m), m.counter("inflate_fails")), (vec![8], 4));
}

#[test]
fn a_driver_may_discard_its_own_rings() {
    let (m, mut rings) = started();
    let ring = rings[REPORTING].clone();
    give(&m, &mut rings[REPORTING], &[(ring.desc, 0x4000, true)]);
    // The next chain: an available index that goes back is a lie, or there is none.
    rings[REPORTING].add(&[(FREE, 4096, true)]);
    m.kick(&rings[REPORTING]);
    m.transport.lock().unwrap().pause().unwrap();
    m.transport.lock().unwrap().resume().unwrap();
    let mut rings = m.start(STATS | HINT | REPORT);
    give(&m, &mut rings[REPORTING], &[(FREE, 4096, true)]);
}

#[test]
fn more_than_a_turn_is_served_in_several() {
    let (m, mut rings) = started();
    fill(&m);
    // Every other page, so that none can be joined: 128 calls a chain, 16 chains at once.
    let pages = list(&m, (0..PAGES).filter(|page| page % 2 == 0));
    for round in 1..=4u16 {
        for _ in 0..16 {
            rings[INFLATE].add(&[pages]);
        }
        m.finish(&rings[INFLATE], 16 * round);
    }
    assert_eq!(zero_pages(&m).len() as u64, PAGES / 2);
    assert_eq!(m.counter("inflate_freed"), 64 * 128 * PAGE);
}

#[test]
fn reports_are_given_back() {
    let (m, mut rings) = started();
    fill(&m);
    let ranges: [Buf; 3] =
        [(FREE, 8 * 4096, true), (FREE + 16 * PAGE, 4096, true), (FREE + 99, 2 * 4096, true)];
    give(&m, &mut rings[REPORTING], &ranges);
    assert_eq!(zero_pages(&m), [0, 1, 2, 3, 4, 5, 6, 7, 16]);
    assert_eq!(m.counter("free_page_report_count"), 3);
    assert_eq!(m.counter("free_page_report_freed"), 10 * PAGE);
    // Beyond RAM, in the hole, wrapping around; and one that is good.
    let end = HIGH.0 + HIGH.1;
    let ranges: [Buf; 4] = [
        (end - PAGE, 8192, true),
        (LOW.1, 4096, true),
        (u64::MAX - 4095, 8192, true),
        (FREE + 9 * PAGE, 4096, true),
    ];
    give(&m, &mut rings[REPORTING], &ranges);
    assert_eq!(zero_pages(&m).last(), Some(&16));
    assert_eq!((zero_pages(&m).len(), m.counter("free_page_report_fails")), (10, 3));
}

#[test]
fn reports_may_be_many_and_huge() {
    let (m, mut rings) = started();
    rings = {
        drop(rings);
        m.start(STATS | HINT | REPORT | F_INDIRECT)
    };
    fill(&m);
    let pages: Vec<Buf> =
        (0..PAGES).step_by(2).map(|page| (FREE + page * PAGE, 4096, true)).collect();
    rings[REPORTING].add_indirect(LIST, &pages);
    m.finish(&rings[REPORTING], 1);
    assert_eq!(zero_pages(&m).len() as u64, PAGES / 2);
    // 4 GiB in one descriptor: not RAM, whatever it begins with, and cut into what a turn may cost.
    give(&m, &mut rings[REPORTING], &[(FREE, u32::MAX, true)]);
    assert!(m.counter("free_page_report_fails") > 0);
    assert_eq!(zero_pages(&m).len() as u64, PAGES / 2);
}

#[test]
fn what_a_chain_reads_is_no_report() {
    let (m, mut rings) = started();
    fill(&m);
    give(&m, &mut rings[REPORTING], &[(FREE, 4096, false)]);
    assert_eq!((zero_pages(&m).len(), m.counter("free_page_report_count")), (0, 0));
}

fn say(m: &Machine, ring: &mut Ring, command: u32) {
    m.mem.write_obj(command, GuestAddress(LIST)).unwrap();
    give(m, ring, &[(LIST, 4, false)]);
}

fn hint(m: &Machine, ring: &mut Ring, page: u64) {
    give(m, ring, &[(FREE + page * PAGE, 4096, true)]);
}

fn commands(m: &Machine) -> (u32, Value, Value) {
    let space = m.config(8, 4).try_into().unwrap();
    let status = show(m, Some("balloon/hinting/status"));
    (u32::from_le_bytes(space), status["host_cmd"].clone(), status["guest_cmd"].clone())
}

#[test]
fn a_run_of_hints_is_given_back_and_acknowledged() {
    let (m, mut rings) = started();
    fill(&m);
    let ring = &mut rings[HINTING];
    assert_eq!(commands(&m), (0, json!(0), json!(null)));
    hint(&m, ring, 1);
    let before = m.irq.counts().1;
    update(&m, Some("balloon/hinting/start"), json!({"acknowledge_on_stop": true}));
    assert_eq!(m.irq.counts().1, before + 1, "the driver is told");
    assert_eq!(commands(&m), (2, json!(2), json!(null)));
    hint(&m, ring, 2);
    say(&m, ring, 2);
    hint(&m, ring, 3);
    assert_eq!(commands(&m), (2, json!(2), json!(2)));
    say(&m, ring, 0);
    m.irq.wait("the acknowledgement", || commands(&m) == (1, json!(1), json!(0)));
    // The driver is told at the end of the turn, for which a pause waits.
    m.transport.lock().unwrap().pause().unwrap();
    m.transport.lock().unwrap().resume().unwrap();
    assert_eq!(m.irq.counts().1, before + 2);
    hint(&m, ring, 4);
    // Only what came between the run's number and its end.
    assert_eq!(zero_pages(&m), [3]);
    assert_eq!(m.counter("free_page_hint_count"), 1);
    assert_eq!(m.counter("free_page_hint_freed"), PAGE);
}

#[test]
fn a_run_may_be_acknowledged_by_hand() {
    let (m, mut rings) = started();
    let ring = &mut rings[HINTING];
    update(&m, Some("balloon/hinting/start"), json!({"acknowledge_on_stop": false}));
    say(&m, ring, 2);
    say(&m, ring, 0);
    assert_eq!(commands(&m), (2, json!(2), json!(0)));
    update(&m, Some("balloon/hinting/stop"), json!({}));
    assert_eq!(commands(&m), (1, json!(1), json!(0)));
    update(&m, Some("balloon/hinting/start"), json!({}));
    assert_eq!(commands(&m), (3, json!(3), json!(0)));
}

#[test]
fn hints_of_another_run_are_not_taken() {
    let (m, mut rings) = started();
    fill(&m);
    let ring = &mut rings[HINTING];
    update(&m, Some("balloon/hinting/start"), json!({}));
    for stale in [0, 1, 3, u32::MAX] {
        say(&m, ring, stale);
        hint(&m, ring, 1);
    }
    say(&m, ring, 2);
    update(&m, Some("balloon/hinting/start"), json!({}));
    hint(&m, ring, 1);
    // The end of the first run is not that of the second.
    say(&m, ring, 0);
    assert_eq!(commands(&m), (3, json!(3), json!(0)));
    assert_eq!(zero_pages(&m), [0; 0]);
    say(&m, ring, 3);
    hint(&m, ring, 1);
    assert_eq!(zero_pages(&m), [1]);
}

#[test]
fn commands_that_are_none_are_counted() {
    let (m, mut rings) = started();
    update(&m, Some("balloon/hinting/start"), json!({}));
    for (count, case) in (1..).zip([(LIST, 3), (LIST, 8), (LOW.1, 4), (LOW.1 - 2, 4)]) {
        give(&m, &mut rings[HINTING], &[(case.0, case.1, false)]);
        assert_eq!(m.counter("free_page_hint_fails"), count);
    }
    assert_eq!(commands(&m), (2, json!(2), json!(null)));
}

#[test]
fn hinting_needs_a_configuration_and_a_driver() {
    let start = Some("balloon/hinting/start");
    let m = machine(json!({"free_page_hinting": false}));
    let words = "Attempting to use hinting when not enabled.";
    assert_eq!(refused(&m, start, json!({})), words);
    assert_eq!(refused(&m, Some("balloon/hinting/stop"), json!({})), words);
    let shown = m.transport.lock().unwrap().show(Some("balloon/hinting/status"));
    assert_eq!(shown.unwrap_err().to_string(), words);

    let m = machine(json!({}));
    assert_eq!(refused(&m, start, json!({})), "Device not activated yet.");
    m.start(STATS);
    assert!(refused(&m, start, json!({})).contains("does not know free page hinting"));
    m.start(HINT);
    update(&m, start, json!({}));
    m.set(0x70, 0);
    assert_eq!(refused(&m, start, json!({})), "Device not activated yet.");
    // The next driver has a fresh start.
    m.start(HINT);
    assert_eq!(commands(&m), (0, json!(0), json!(null)));
}

/// A buffer with statistics.
fn statistics(m: &Machine, entries: &[(u16, u64)]) -> Buf {
    let bytes: Vec<u8> = entries
        .iter()
        .flat_map(|(tag, value)| tag.to_le_bytes().into_iter().chain(value.to_le_bytes()))
        .collect();
    m.mem.write_slice(&bytes, GuestAddress(LIST)).unwrap();
    (LIST, u32::try_from(bytes.len()).unwrap(), false)
}

/// Gives statistics to the device, which keeps them; waits until it has read them.
fn tell(m: &Machine, ring: &mut Ring, entries: &[(u16, u64)]) {
    let before = m.counter("stats_updates_count");
    let buffer = statistics(m, entries);
    ring.add(&[buffer]);
    m.kick(ring);
    wait_for(m, "statistics", || m.counter("stats_updates_count") == before + 1);
}

/// Waits for what is not announced by an interrupt: a pause waits for the turn in progress.
fn wait_for(m: &Machine, what: &str, is_done: impl Fn() -> bool) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !is_done() {
        assert!(std::time::Instant::now() < end, "waited in vain for {what}");
        m.transport.lock().unwrap().pause().unwrap();
        m.transport.lock().unwrap().resume().unwrap();
    }
}

#[test]
fn statistics_are_shown_as_they_were_told() {
    let (m, mut rings) = started();
    let view = Some("balloon/statistics");
    let empty = json!({"target_pages": 256, "actual_pages": 0, "target_mib": 1, "actual_mib": 0});
    assert_eq!(show(&m, view), empty);
    let all: Vec<_> = (0..16).map(|tag| (tag, 1000 + u64::from(tag))).collect();
    tell(&m, &mut rings[STATISTICS], &all);
    assert_eq!(
        show(&m, view),
        json!({
            "target_pages": 256, "actual_pages": 0, "target_mib": 1, "actual_mib": 0,
            "swap_in": 1000, "swap_out": 1001, "major_faults": 1002, "minor_faults": 1003,
            "free_memory": 1004, "total_memory": 1005, "available_memory": 1006,
            "disk_caches": 1007, "hugetlb_allocations": 1008, "hugetlb_failures": 1009,
            "oom_kill": 1010, "alloc_stall": 1011, "async_scan": 1012, "direct_scan": 1013,
            "async_reclaim": 1014, "direct_reclaim": 1015,
        })
    );
    assert_eq!(rings[STATISTICS].used_idx(), 0, "the device keeps the buffer");
    // Another interval: the next ones are asked for at once. What they do not say stays.
    update(&m, view, json!({"stats_polling_interval_s": 1}));
    m.irq.wait("a request", || rings[STATISTICS].used_idx() == 1);
    tell(&m, &mut rings[STATISTICS], &[(4, u64::MAX), (4, 7)]);
    assert_eq!(
        (&show(&m, view)["free_memory"], &show(&m, view)["swap_in"]),
        (&json!(7), &json!(1000))
    );
    // And then as often as was said.
    m.irq.wait("a request", || rings[STATISTICS].used_idx() == 2);
    assert_eq!(show(&m, None), config(json!({"stats_polling_interval_s": 1})));
}

#[test]
fn statistics_that_do_not_come_are_counted() {
    let m = machine(json!({"stats_polling_interval_s": 1}));
    m.start(STATS);
    wait_for(&m, "a request in vain", || m.counter("stats_update_fails") > 0);
    assert_eq!(m.counter("stats_updates_count"), 0);
}

#[test]
fn a_buffer_with_statistics_survives_pauses_and_changes() {
    let (m, mut rings) = started();
    let ring = &mut rings[STATISTICS];
    tell(&m, ring, &[(4, 1)]);
    for amount in [1, 2, 3] {
        update(&m, None, json!({"amount_mib": amount}));
        m.transport.lock().unwrap().pause().unwrap();
        m.transport.lock().unwrap().resume().unwrap();
    }
    // Kept, read once, and given back when it is time.
    assert_eq!((ring.used_idx(), m.counter("stats_updates_count")), (0, 1));
    update(&m, Some("balloon/statistics"), json!({"stats_polling_interval_s": 59}));
    m.irq.wait("a request", || ring.used_idx() == 1);
    tell(&m, ring, &[(4, 2)]);
    assert_eq!(m.counter("stats_updates_count"), 2);
    // A second buffer sends the first back.
    let buffer = statistics(&m, &[(4, 3)]);
    ring.add(&[buffer]);
    m.finish(ring, 2);
    assert_eq!(show(&m, Some("balloon/statistics"))["free_memory"], 3);
    assert_eq!(m.status(), 15);
}

#[test]
fn statistics_that_are_none_come_back_and_change_nothing() {
    let (m, mut rings) = started();
    let ring = &mut rings[STATISTICS];
    let (at, len, _) = statistics(&m, &[(4, 1), (5, 2)]);
    let cases: [&[Buf]; 8] = [
        &[(at, 0, false)],
        &[(at, 9, false)],
        &[(at, len + 1, false)],
        &[(at, 650, false)],
        &[(at, 0x7fff_fff8, false)],
        &[(at, 10, true)],
        &[(LOW.1, 10, false)],
        &[(at, 10, false), (LOW.1 - 5, 10, false)],
    ];
    for (count, case) in (1..).zip(cases) {
        give(&m, ring, case);
        assert_eq!(m.counter("stats_update_fails"), count, "{case:?}");
    }
    assert!(show(&m, Some("balloon/statistics")).get("free_memory").is_none());
    // A flood of them, each sent back by the next.
    for round in 0..16u16 {
        for _ in 0..16 {
            ring.add(&[(at, len, false)]);
        }
        m.finish(ring, 8 + 16 * round + 15);
        m.kick(ring);
    }
    // Unknown tags do not spoil the others.
    let buffer = statistics(&m, &[(16, 1), (4, 5), (u16::MAX, 1)]);
    ring.add(&[buffer]);
    m.finish(ring, 8 + 256);
    assert_eq!(show(&m, Some("balloon/statistics"))["free_memory"], 5);
    assert_eq!(m.counter("stats_update_fails"), 8 + 2);
}

#[test]
fn statistics_cannot_be_switched() {
    let view = Some("balloon/statistics");
    let words = "Statistics cannot be enabled/disabled after activation.";
    let m = machine(json!({"stats_polling_interval_s": 0}));
    assert_eq!(m.features() & STATS, 0);
    assert_eq!(refused(&m, view, json!({"stats_polling_interval_s": 1})), words);
    update(&m, view, json!({"stats_polling_interval_s": 0}));
    let shown = m.transport.lock().unwrap().show(view).unwrap_err();
    assert_eq!(shown.to_string(), "Received stats query when stats are disabled.");
    let m = machine(json!({}));
    assert_eq!(refused(&m, view, json!({"stats_polling_interval_s": 0})), words);
}

#[test]
fn the_target_is_the_users_and_the_size_the_drivers() {
    let (m, _rings) = started();
    assert_eq!(m.config(0, 16), [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let before = m.irq.counts().1;
    update(&m, None, json!({"amount_mib": 64}));
    assert_eq!(m.irq.counts().1, before + 1, "the driver is told");
    assert_eq!(m.config(0, 4), (64u32 * 256).to_le_bytes());
    assert_eq!(show(&m, None)["amount_mib"], 64);
    m.set(0x104, 16 * 256 + 3);
    let statistics = show(&m, Some("balloon/statistics"));
    assert_eq!(
        (&statistics["actual_pages"], &statistics["actual_mib"]),
        (&json!(4099), &json!(16))
    );
    assert_eq!(m.config(4, 4), 4099u32.to_le_bytes());
    // Nothing else is the driver's, nor are parts of it.
    let whole = m.config(0, 16);
    m.set(0x100, 1);
    m.set(0x108, 7);
    m.device().0.write(0x104, &[1]);
    m.device().0.write(0x104, &[1; 8]);
    m.device().0.write(0x102, &[1; 4]);
    assert_eq!(m.config(0, 16), whole);
    // The balloon of a driver that is gone is empty.
    m.set(0x70, 0);
    assert_eq!(show(&m, Some("balloon/statistics"))["actual_pages"], 0);
    assert_eq!(show(&m, None)["amount_mib"], 64);
}

#[test]
fn offers_what_is_configured() {
    let own = STATS | OOM | HINT | REPORT;
    let off = json!({
        "stats_polling_interval_s": 0, "free_page_hinting": false, "free_page_reporting": false,
    });
    let m = machine(off.clone());
    assert_eq!((m.features() & own, m.queues()), (0, 2));
    for (field, value, feature, queues) in [
        ("stats_polling_interval_s", json!(1), STATS, 3),
        ("free_page_hinting", json!(true), HINT, 3),
        ("free_page_reporting", json!(true), REPORT, 3),
        ("deflate_on_oom", json!(true), OOM, 2),
    ] {
        let mut config = off.clone();
        config[field] = value;
        let m = machine(config);
        assert_eq!((m.features() & own, m.queues()), (feature, queues), "{field}");
    }
    // A driver that takes reports only finds them where its first optional queue is.
    let m = machine(json!({}));
    let mut rings = m.start(REPORT);
    fill(&m);
    give(&m, &mut rings[2], &[(FREE, 4096, true)]);
    give(&m, &mut rings[4], &[(FREE + PAGE, 4096, true)]);
    assert_eq!(zero_pages(&m), [0]);
}

#[test]
fn refuses_what_cannot_be() {
    let error = refusal("balloon", &config(json!({"amount_mib": 1 << 24})));
    assert_eq!(error, "amount_mib: 16777216 is more than 16777215");
    let row = devices::virtio::model("balloon").unwrap();
    for (json, words) in [
        ("{}", "missing field `amount_mib`"),
        (r#"{"amount_mib": 1}"#, "missing field `deflate_on_oom`"),
        (r#"{"amount_mib": -1, "deflate_on_oom": true}"#, "invalid value"),
        (r#"{"amount_mib": 1, "deflate_on_oom": true, "x": 1}"#, "unknown field `x`"),
    ] {
        let e = (row.parse)(json.as_bytes()).unwrap_err().to_string();
        assert!(e.contains(words), "{json}: {e}");
    }
    let recipe = (row.parse)(br#"{"amount_mib": 65, "deflate_on_oom": true}"#).unwrap();
    recipe.check_ram(65).unwrap();
    let e = recipe.check_ram(64).unwrap_err();
    assert!(e.to_string().starts_with("Amount of pages requested is too large."), "{e}");
    let m = machine(json!({}));
    assert!(refused(&m, None, json!({"amount_mib": u32::MAX})).starts_with("amount_mib: "));
}

#[test]
fn a_restored_balloon_is_as_it_was() {
    let (m, mut rings) = started();
    m.set(0x104, 77);
    tell(&m, &mut rings[STATISTICS], &[(4, 1234)]);
    update(&m, Some("balloon/hinting/start"), json!({"acknowledge_on_stop": false}));
    say(&m, &mut rings[HINTING], 2);
    m.transport.lock().unwrap().pause().unwrap();
    let saved = serde_json::to_string(&m.transport.lock().unwrap().save()).unwrap();
    let mem = m.mem.clone();
    drop(m);

    let saved = serde_json::from_str(&saved).unwrap();
    let m = Machine::with(open("balloon", &config(json!({}))), mem, Some(&saved)).unwrap();
    m.transport.lock().unwrap().resume().unwrap();
    let statistics = show(&m, Some("balloon/statistics"));
    assert_eq!(
        (&statistics["free_memory"], &statistics["actual_pages"]),
        (&json!(1234), &json!(77))
    );
    assert_eq!(commands(&m), (2, json!(2), json!(2)));
    fill(&m);
    hint(&m, &mut rings[HINTING], 1);
    say(&m, &mut rings[HINTING], 0);
    assert_eq!((zero_pages(&m), commands(&m)), (vec![1], (2, json!(2), json!(0))));
    // The buffer with statistics is still the device's, and was counted where it was read.
    assert_eq!(m.counter("stats_updates_count"), 0);
    update(&m, Some("balloon/statistics"), json!({"stats_polling_interval_s": 2}));
    m.irq.wait("a request", || rings[STATISTICS].used_idx() == 1);
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let (m, _rings) = started();
    m.transport.lock().unwrap().pause().unwrap();
    let mut saved = serde_json::to_value(m.transport.lock().unwrap().save()).unwrap();
    for bad in [json!(7), json!({"actual_pages": -1}), json!({"actual_pages": 0})] {
        saved["device"] = bad;
        let saved = serde_json::from_value(saved.clone()).unwrap();
        let m = Machine::with(open("balloon", &config(json!({}))), ram(), Some(&saved)).unwrap();
        m.transport.lock().unwrap().resume().unwrap_err();
    }
}

#[test]
fn interrupts_come_by_event_index_too() {
    let m = machine(json!({}));
    let mut rings = m.start(STATS | HINT | REPORT | F_EVENT_IDX);
    tell(&m, &mut rings[STATISTICS], &[(4, 1)]);
    for round in 0..3 {
        rings[STATISTICS].set_used_event(round);
        let interval = json!({"stats_polling_interval_s": 100 + round});
        update(&m, Some("balloon/statistics"), interval);
        m.irq.wait("a request", || rings[STATISTICS].used_idx() == round + 1);
        tell(&m, &mut rings[STATISTICS], &[(4, 1)]);
    }
    assert_eq!(rings[STATISTICS].avail_event(), 4);
}
