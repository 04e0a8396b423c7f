//! virtio-blk requests, honest and not.
use std::cell::Cell;

use devices::virtio::model;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Buf, F_EVENT_IDX, F_INDIRECT, HIGH, LOW, Machine, Ring};
use crate::samples::{TempFile, open, refusal};

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the status byte holds before the device writes it.
const UNTOUCHED: u8 = 0xee;

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const HEADER: u64 = HIGH.0;
const STATUS: u64 = HIGH.0 + 0x800;
pub(crate) const DATA: u64 = HIGH.0 + 0x1000;
const SECTORS: u64 = 64;

thread_local! {
    /// How the drives of a test read and write.
    static ENGINE: Cell<&'static str> = const { Cell::new("Sync") };
    /// Whether there is a layer over them.
    static HAS_OVERLAY: Cell<bool> = const { Cell::new(false) };
}

/// A drive of 64 sectors, sector n filled with n, and its driver.
pub(crate) struct Drive {
    pub(crate) machine: Machine,
    ring: Ring,
    pub(crate) file: TempFile,
    count: u16,
}

impl Drive {
    fn new(change: &Value) -> Self {
        let content: Vec<u8> = (0..SECTORS).flat_map(|n| [u8::try_from(n).unwrap(); 512]).collect();
        let file = TempFile::new(&content);
        let mut config = config(&file, change);
        config["io_engine"] = ENGINE.get().into();
        if HAS_OVERLAY.get() {
            config["overlay"] = "Temporary".into();
        }
        Self::of(file, &config)
    }

    /// Another drive with a driver.
    pub(crate) fn of(file: TempFile, config: &Value) -> Self {
        let machine = Machine::new(open("drives", config));
        let features = machine.features() & !F_EVENT_IDX;
        let ring = machine.start(features).remove(0);
        Self { machine, ring, file, count: 0 }
    }

    /// Sends the chain; gives status byte and used length.
    fn send(&mut self, request: u32, sector: u64, buffers: &[Buf]) -> (u8, u32) {
        let mem = &self.machine.mem;
        mem.write_obj(request, GuestAddress(HEADER)).unwrap();
        mem.write_obj(0u32, GuestAddress(HEADER + 4)).unwrap();
        mem.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        mem.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
        self.ring.add(buffers);
        self.count += 1;
        self.machine.finish(&self.ring, self.count);
        let (_, used) = self.ring.used_entry(self.count - 1);
        (self.machine.mem.read_obj(GuestAddress(STATUS)).unwrap(), used)
    }

    /// An honest request with `len` bytes of data.
    pub(crate) fn request(&mut self, request: u32, sector: u64, len: u32) -> (u8, u32) {
        let is_read = matches!(request, IN | GET_ID);
        let header = (HEADER, 16, false);
        let status = (STATUS, 1, true);
        match len {
            0 => self.send(request, sector, &[header, status]),
            _ => self.send(request, sector, &[header, (DATA, len, is_read), status]),
        }
    }

    /// What the drive holds. With a layer over it, its file holds what it always did.
    fn content(&mut self) -> Vec<u8> {
        if !HAS_OVERLAY.get() {
            return self.file.content();
        }
        assert!(self.file.content() == sectors(0..64));
        assert_eq!(self.request(IN, 0, 64 * 512), (OK, 64 * 512 + 1));
        self.data(64 * 512)
    }

    pub(crate) fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.machine.mem.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        data
    }

    fn fill(&self, byte: u8, len: usize) {
        self.machine.mem.write_slice(&vec![byte; len], GuestAddress(DATA)).unwrap();
    }

    /// A discard or write-zeroes request of (sector, count, flags).
    pub(crate) fn erase(&mut self, request: u32, ranges: &[(u64, u32, u32)]) -> (u8, u32) {
        for (at, range) in (DATA..).step_by(16).zip(ranges) {
            self.machine.mem.write_obj(range.0, GuestAddress(at)).unwrap();
            self.machine.mem.write_obj(range.1, GuestAddress(at + 8)).unwrap();
            self.machine.mem.write_obj(range.2, GuestAddress(at + 12)).unwrap();
        }
        self.request(request, 0, u32::try_from(ranges.len() * 16).unwrap())
    }

    pub(crate) fn update(&self, patch: &Value) -> Result<(), String> {
        let row = model("drives").unwrap();
        let patch = (row.patch.unwrap().parse)(patch.to_string().as_bytes()).unwrap();
        self.machine.transport.lock().unwrap().update(None, &patch).map_err(|e| e.to_string())
    }

    fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.machine.config(0, 8).try_into().unwrap())
    }
}

pub(crate) fn config(file: &TempFile, change: &Value) -> Value {
    let mut config = json!({
        "drive_id": "rootfs", "is_root_device": true, "path_on_host": file.path,
    });
    let change = change.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(change);
    config
}

fn sectors(range: std::ops::Range<u8>) -> Vec<u8> {
    range.flat_map(|n| [n; 512]).collect()
}

#[test]
fn reads_and_writes_whole_sectors_anywhere() {
    let mut drive = Drive::new(&json!({}));
    assert_eq!(drive.request(IN, 3, 1024), (OK, 1025));
    assert_eq!(drive.data(1024), sectors(3..5));
    assert_eq!(drive.request(IN, SECTORS - 1, 512), (OK, 513));
    assert_eq!(drive.data(512), sectors(63..64));
    assert_eq!(drive.request(IN, 0, 64 * 512), (OK, 64 * 512 + 1));
    assert_eq!(drive.data(64 * 512), sectors(0..64));
    drive.fill(0xab, 1024);
    assert_eq!(drive.request(OUT, 10, 1024), (OK, 1));
    let m = &drive.machine;
    assert_eq!((m.counter("read_count"), m.counter("write_count")), (3, 1));
    assert_eq!((m.counter("read_bytes"), m.counter("write_bytes")), (66 * 512 + 512, 1024));
    assert_eq!((m.counter("execute_fails"), m.counter("invalid_reqs_count")), (0, 0));
    let mut expected = sectors(0..64);
    expected[10 * 512..12 * 512].fill(0xab);
    assert_eq!(drive.content(), expected);
}

#[test]
fn data_may_lie_in_any_pieces() {
    let mut drive = Drive::new(&json!({}));
    let pieces =
        [(DATA, 1, true), (DATA + 1, 510, true), (DATA + 511, 0, true), (DATA + 511, 513, true)];
    let mut chain = vec![(HEADER, 7, false), (HEADER + 7, 9, false)];
    chain.extend(pieces);
    chain.push((STATUS, 1, true));
    assert_eq!(drive.send(IN, 5, &chain), (OK, 1025));
    assert_eq!(drive.data(1024), sectors(5..7));
    // The status byte may share a buffer with the data, and the header with what is written.
    let (status, used) = drive.send(IN, 9, &[(HEADER, 16, false), (DATA, 513, true)]);
    assert_eq!((status, used), (UNTOUCHED, 513));
    assert_eq!(drive.data(513), [sectors(9..10), vec![OK]].concat());
    drive.machine.mem.write_slice(&[0xcd; 512], GuestAddress(HEADER + 16)).unwrap();
    assert_eq!(drive.send(OUT, 0, &[(HEADER, 16 + 512, false), (STATUS, 1, true)]), (OK, 1));
    assert_eq!(drive.content()[..512], [0xcd; 512]);
}

#[test]
fn serves_indirect_chains_of_the_longest_kind() {
    let mut drive = Drive::new(&json!({}));
    let seg_max = u32::from_le_bytes(drive.machine.config(12, 4).try_into().unwrap());
    assert_eq!(seg_max, 254);
    assert_ne!(drive.machine.features() & F_INDIRECT, 0);
    let mut chain = vec![(HEADER, 16, false)];
    chain.extend((0..u64::from(seg_max)).map(|i| (DATA + i * 64, 64, true)));
    // 254 pieces of 64 bytes are no whole sectors: the last is longer.
    chain.last_mut().unwrap().1 = 64 + 128;
    chain.push((STATUS, 1, true));
    let mem = drive.machine.mem.clone();
    mem.write_obj(IN, GuestAddress(HEADER)).unwrap();
    mem.write_obj(0u64, GuestAddress(HEADER + 8)).unwrap();
    drive.ring.add_indirect(HIGH.0 + 0x8_0000, &chain);
    drive.machine.finish(&drive.ring, 1);
    assert_eq!(drive.ring.used_entry(0).1, 32 * 512 + 1);
    assert_eq!(drive.data(32 * 512), sectors(0..32));
}

#[test]
fn refuses_what_is_out_of_bounds() {
    let mut drive = Drive::new(&json!({}));
    for request in [IN, OUT] {
        let bad = [
            (SECTORS, 512),
            (SECTORS - 1, 1024),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (u64::MAX / 512 + 1, 512),
            (1 << 63, 512),
            (0, 0),
            (0, 1),
            (0, 511),
            (0, 513),
            (0, 65 * 512),
        ];
        for (sector, len) in bad {
            let (status, used) = drive.request(request, sector, len);
            assert_eq!(status, IOERR, "{request} {sector:#x} {len}");
            assert!(used <= 1);
        }
        let huge = [(HEADER, 16, false), (DATA, 0x7fff_fe00, request == IN), (STATUS, 1, true)];
        assert_eq!(drive.send(request, 0, &huge).0, IOERR);
    }
    assert_eq!(drive.content(), sectors(0..64));
    assert_eq!(drive.machine.counter("invalid_reqs_count"), 24);
    assert_eq!(drive.request(IN, 0, 512), (OK, 513));
}

#[test]
fn malformed_requests_get_a_status_where_one_can_be_written() {
    let mut drive = Drive::new(&json!({"cache_type": "Writeback"}));
    let hole = LOW.0 + LOW.1;
    let header = (HEADER, 16, false);
    let status = (STATUS, 1, true);
    type Case<'a> = (&'a str, u32, &'a [Buf], u8);
    let cases: [Case<'_>; 15] = [
        ("no status", IN, &[header], UNTOUCHED),
        ("status readable", IN, &[header, (DATA, 512, false), (STATUS, 1, false)], UNTOUCHED),
        ("status empty", OUT, &[header, (DATA, 512, false), (STATUS, 0, true)], UNTOUCHED),
        ("status in the hole", FLUSH, &[header, (hole, 1, true)], UNTOUCHED),
        ("header writable", IN, &[(HEADER, 16, true), (DATA, 512, true), status], IOERR),
        ("header short", IN, &[(HEADER, 15, false), (DATA, 512, true), status], IOERR),
        ("header missing", IN, &[status], IOERR),
        ("header in the hole", IN, &[(hole, 16, false), (DATA, 512, true), status], IOERR),
        ("order mixed", OUT, &[header, status, (DATA, 512, false)], IOERR),
        ("read into readable", IN, &[header, (DATA, 512, false), status], IOERR),
        ("write from writable", OUT, &[header, (DATA, 512, true), status], IOERR),
        ("read into the hole", IN, &[header, (hole - 256, 512, true), status], IOERR),
        ("write from the hole", OUT, &[header, (hole - 256, 512, false), status], IOERR),
        ("flush with data", FLUSH, &[header, (DATA, 512, false), status], IOERR),
        ("status oversized", OUT, &[header, (DATA, 512, false), (STATUS - 1, 2, true)], IOERR),
    ];
    for (what, request, chain, expected) in cases {
        let (seen, used) = drive.send(request, 0, chain);
        assert_eq!(seen, expected, "{what}");
        assert!(used <= 1, "{what}: {used}");
    }
    assert_eq!(drive.content(), sectors(0..64));
    // The status byte may be the last of a longer buffer.
    assert_eq!(drive.request(IN, 1, 512), (OK, 513));
    assert_eq!(drive.machine.status(), 15);
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut drive = Drive::new(&json!({}));
    for request in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 0x100, 0x8000_0000, u32::MAX] {
        assert_eq!(drive.request(request, 0, 512).0, UNSUPP, "{request}");
        assert_eq!(drive.request(request, 0, 0).0, UNSUPP, "{request}");
    }
}

#[test]
fn tells_its_id() {
    let mut drive = Drive::new(&json!({"drive_id": "a-drive-with-a-long-name"}));
    drive.fill(0xff, 64);
    assert_eq!(drive.request(GET_ID, 0, 20), (OK, 21));
    assert_eq!(&drive.data(21)[..], b"a-drive-with-a-long-\xff");
    assert_eq!(drive.request(GET_ID, 0, 19).0, IOERR);
    assert_eq!(drive.request(GET_ID, 0, 0).0, IOERR);
    // Longer is fine; what is beyond stays as it was.
    assert_eq!(drive.request(GET_ID, 0, 40), (OK, 20));
}

#[test]
fn flushes_only_if_asked_to_offer_it() {
    let mut drive = Drive::new(&json!({}));
    assert_eq!(drive.machine.features() & F_FLUSH, 0);
    assert_eq!(drive.request(FLUSH, 0, 0).0, UNSUPP);
    let mut drive = Drive::new(&json!({"cache_type": "Writeback"}));
    assert_ne!(drive.machine.features() & F_FLUSH, 0);
    assert_eq!(drive.request(FLUSH, 0, 0), (OK, 1));
    assert_eq!(drive.machine.counter("flush_count"), 1);
    // What was not negotiated is not there.
    drive.ring = drive.machine.start(0).remove(0);
    drive.count = 0;
    assert_eq!(drive.request(FLUSH, 0, 0).0, UNSUPP);
    assert_eq!(drive.erase(DISCARD, &[(0, 8, 0)]).0, UNSUPP);
}

#[test]
fn a_read_only_drive_cannot_be_changed() {
    let mut drive = Drive::new(&json!({"is_read_only": true}));
    assert_eq!(drive.machine.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    assert_eq!(drive.request(OUT, 0, 512).0, IOERR);
    assert_eq!(drive.erase(DISCARD, &[(0, 8, 0)]).0, IOERR);
    assert_eq!(drive.erase(WRITE_ZEROES, &[(0, 8, 0)]).0, IOERR);
    assert_eq!(drive.request(IN, 7, 512), (OK, 513));
    assert_eq!(drive.data(512), sectors(7..8));
    assert_eq!(drive.content(), sectors(0..64));
}

#[test]
fn discards_and_writes_zeroes() {
    for (request, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        let mut drive = Drive::new(&json!({}));
        assert_eq!(drive.erase(request, &[(8, 16, flags)]), (OK, 1), "{request} {flags}");
        let mut expected = sectors(0..64);
        expected[8 * 512..24 * 512].fill(0);
        assert!(drive.content() == expected, "{request} {flags}");
        // Single sectors, up to the last.
        assert_eq!(drive.erase(request, &[(SECTORS - 1, 1, flags)]), (OK, 1));
        expected[63 * 512..].fill(0);
        assert!(drive.content() == expected, "{request} {flags}");
    }
    let mut drive = Drive::new(&json!({}));
    let ranges: Vec<_> = (0..16).map(|i| (i * 4, 1, 0)).collect();
    assert_eq!(drive.erase(DISCARD, &ranges), (OK, 1));
    assert_eq!(drive.machine.counter("discard_count"), 1);
}

#[test]
fn refuses_bad_ranges_before_the_first_has_effect() {
    let mut drive = Drive::new(&json!({}));
    let space = drive.machine.config(36, 24);
    let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    let (max_discard, max_segments, max_zeroes) = (word(0), word(4), word(12));
    assert_eq!((max_segments, word(16), space[20]), (16, 1, 1));
    for (request, max) in [(DISCARD, max_discard), (WRITE_ZEROES, max_zeroes)] {
        let bad = [
            (SECTORS, 1),
            (SECTORS - 1, 2),
            (u64::MAX, 1),
            (u64::MAX / 512, 8),
            (0, 0),
            (0, u32::MAX),
            (0, max + 1),
        ];
        for (sector, count) in bad {
            assert_eq!(drive.erase(request, &[(sector, count, 0)]).0, IOERR, "{sector} {count}");
        }
        for flags in [2, 3, 0x8000_0000, u32::MAX] {
            assert_eq!(drive.erase(request, &[(0, 8, flags)]).0, UNSUPP, "{flags:#x}");
        }
        assert_eq!(drive.erase(request, &[]).0, IOERR);
        for len in [1, 15, 17, 31] {
            assert_eq!(drive.request(request, 0, len).0, IOERR, "{len} bytes");
        }
    }
    assert_eq!(drive.erase(DISCARD, &[(0, 8, 1)]).0, UNSUPP);
    assert_eq!(drive.erase(DISCARD, &[(0, 8, 0), (SECTORS, 1, 0)]).0, IOERR);
    assert_eq!(drive.erase(DISCARD, &[(0, 1, 0); 17]).0, IOERR);
    assert_eq!(drive.erase(WRITE_ZEROES, &[(0, 1, 0); 2]).0, IOERR);
    assert!(drive.content() == sectors(0..64));
}

#[test]
fn a_file_that_shrinks_or_goes_is_an_error_or_nothing() {
    let mut drive = Drive::new(&json!({}));
    drive.file.set_len(10 * 512 + 100);
    assert_eq!(drive.request(IN, 9, 512), (OK, 513));
    assert_eq!(drive.request(IN, 10, 512), (IOERR, 0));
    assert_eq!(drive.request(IN, 63, 512), (IOERR, 0));
    assert_eq!(drive.machine.counter("execute_fails"), 2);
    assert_eq!(drive.request(OUT, 20, 512), (OK, 1));
    std::fs::remove_file(&drive.file.path).unwrap();
    assert_eq!(drive.request(IN, 0, 512), (OK, 513));
    assert_eq!(drive.data(512), sectors(0..1));
}

#[test]
fn a_huge_sparse_file_has_its_last_sector() {
    let file = TempFile::new(&[]);
    // As large as the file system allows: ext4 stops at 16 TiB, tmpfs and XFS at 8 EiB.
    let len = [i64::MAX as u64 / 512 * 512, 1 << 43, 1 << 40]
        .into_iter()
        .find(|len| {
            let opened = std::fs::File::options().write(true).open(&file.path).unwrap();
            opened.set_len(*len).is_ok()
        })
        .unwrap();
    let mut config = config(&file, &json!({}));
    if HAS_OVERLAY.get() {
        config["overlay"] = "Memory".into();
    }
    let machine = Machine::new(open("drives", &config));
    let ring = machine.start(machine.features() & !F_EVENT_IDX).remove(0);
    let mut drive = Drive { machine, ring, file, count: 0 };
    assert_eq!(drive.capacity(), len / 512);
    assert_eq!(drive.request(IN, len / 512 - 1, 512), (OK, 513));
    assert_eq!(drive.request(IN, len / 512 - 1, 1024), (IOERR, 0));
    assert_eq!(drive.request(IN, len / 512, 512), (IOERR, 0));
}

#[test]
fn bytes_per_wake_up_are_bounded_and_nothing_is_lost() {
    // 16 requests of 8 MiB are twice what one wake-up may cost.
    let file = TempFile::new(&[]);
    file.set_len(64 << 20);
    let engine = ENGINE.get();
    let machine = Machine::new(open("drives", &config(&file, &json!({"io_engine": engine}))));
    let mut ring = machine.start(machine.features() & !F_EVENT_IDX).remove(0);
    let mem = &machine.mem;
    mem.write_obj([0u64; 2], GuestAddress(HEADER)).unwrap();
    // The same 512 KiB again and again: the device need not know.
    let mut chain = vec![(HEADER, 16, false)];
    chain.extend([(DATA, 0x8_0000, true); 16]);
    chain.push((STATUS, 1, true));
    for i in 0..16 {
        ring.add_indirect(HIGH.0 + 0xc_0000 + i * 0x1000, &chain);
    }
    machine.finish(&ring, 16);
    for slot in 0..16 {
        assert_eq!(ring.used_entry(slot).1, (8 << 20) + 1);
    }
    // What is in flight is waited for without a kick.
    assert!(engine == "Async" || machine.counter("queue_event_count") > 1);
}

#[test]
fn refuses_configurations_that_cannot_work() {
    let file = TempFile::new(&[0; 512]);
    let cases = [
        (json!({"drive_id": ""}), "drive_id: "),
        (json!({"drive_id": "a/b"}), "drive_id: "),
        (json!({"drive_id": "x".repeat(65)}), "drive_id: "),
        (json!({"path_on_host": null}), "path_on_host: is missing"),
        (json!({"path_on_host": "/nowhere/disk"}), "path_on_host: cannot open /nowhere/disk"),
        (json!({"path_on_host": "/tmp"}), "path_on_host: /tmp is a directory"),
        (json!({"path_on_host": "/dev/zero"}), "path_on_host: /dev/zero is a character device"),
        (json!({"socket": "/x"}), "path_on_host: belongs to the back end"),
        (json!({"partuuid": "a b"}), "partuuid: "),
        (json!({"partuuid": "x init=/bin/sh"}), "partuuid: "),
    ];
    for (change, expected) in cases {
        let e = refusal("drives", &config(&file, &change));
        assert!(e.starts_with(expected), "{change}: {e}");
    }
    for size in [0, 1, 511, 513, 1000] {
        let file = TempFile::new(&vec![0; size]);
        let e = refusal("drives", &config(&file, &json!({})));
        assert!(e.contains(&format!("has {size} bytes")), "{e}");
    }
    let row = model("drives").unwrap();
    for bad in [r#"{"drive_id":"a"}"#, r#"{"drive_id":"a","is_root_device":true,"x":1}"#] {
        assert!((row.parse)(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn shows_its_configuration_and_names_the_root_device() {
    let row = model("drives").unwrap();
    let parse = |json: Value| (row.parse)(json.to_string().as_bytes()).unwrap();
    let root = json!({"drive_id": "r_0", "is_root_device": true, "path_on_host": "/d"});
    let recipe = parse(root.clone());
    assert_eq!(
        recipe.to_json(),
        json!({
            "drive_id": "r_0", "is_root_device": true, "path_on_host": "/d", "is_read_only": false,
            "partuuid": null, "cache_type": "Unsafe", "io_engine": "Sync", "rate_limiter": null,
            "socket": null,
        })
    );
    assert_eq!((recipe.model(), recipe.id(), recipe.is_first()), ("drives", "r_0", true));
    assert_eq!(recipe.kernel_args().unwrap(), "root=/dev/vda rw");
    let mut by_id = root.clone();
    by_id["partuuid"] = json!("0eaa91a0-01");
    by_id["is_read_only"] = json!(true);
    assert_eq!(parse(by_id).kernel_args().unwrap(), "root=PARTUUID=0eaa91a0-01 ro");
    let mut data = root;
    data["is_root_device"] = json!(false);
    assert_eq!(parse(data).kernel_args(), None);
}

#[test]
fn a_file_that_is_written_is_used_once() {
    let file = TempFile::new(&[0; 512]);
    let (rw, ro) = (json!({}), json!({"is_read_only": true}));
    let check = |change: &Value| {
        let row = model("drives").unwrap();
        let recipe = (row.parse)(config(&file, change).to_string().as_bytes()).unwrap();
        let (checked, opened) = (recipe.check(), recipe.open(&model::Env::default()));
        assert_eq!(checked.is_ok(), opened.is_ok());
        checked.map_err(|e| e.to_string())
    };
    let writer = open("drives", &config(&file, &rw));
    for change in [&rw, &ro] {
        let e = check(change).unwrap_err();
        assert!(e.contains("in use by another drive or process"), "{e}");
    }
    drop(writer);
    let reader = open("drives", &config(&file, &ro));
    check(&ro).unwrap();
    assert!(check(&rw).is_err());
    drop(reader);
    check(&rw).unwrap();
}

#[test]
fn a_patch_changes_the_file_and_tells_the_driver() {
    let mut drive = Drive::new(&json!({}));
    let generation = drive.machine.get(0xfc);
    let config_interrupts = drive.machine.irq.counts().1;
    // The same file with another size: the usual case. The lock is kept all the while.
    drive.file.set_len(128 * 512);
    drive.update(&json!({"drive_id": "rootfs", "path_on_host": drive.file.path})).unwrap();
    assert_eq!(drive.capacity(), 128);
    assert_ne!(drive.machine.get(0xfc), generation);
    assert_eq!(drive.machine.irq.counts().1, config_interrupts + 1);
    assert_eq!(drive.machine.get(0x60) & 2, 2);
    assert_eq!(drive.request(IN, 127, 512), (OK, 513));
    let e = refusal("drives", &config(&drive.file, &json!({})));
    assert!(e.contains("in use"), "{e}");
    // Another file; the first is free then.
    let other = TempFile::new(&[9; 1024]);
    drive.update(&json!({"drive_id": "rootfs", "path_on_host": other.path})).unwrap();
    assert_eq!(drive.capacity(), 2);
    assert_eq!(drive.request(IN, 1, 512), (OK, 513));
    assert_eq!(drive.data(512), [9; 512]);
    assert_eq!(drive.request(IN, 2, 512).0, IOERR);
    open("drives", &config(&drive.file, &json!({})));
    // Nothing to change is no change.
    drive.update(&json!({"drive_id": "rootfs", "rate_limiter": null})).unwrap();
    assert_eq!(drive.machine.irq.counts().1, config_interrupts + 2);
    assert_eq!(drive.machine.counter("update_count"), 3);
}

#[test]
fn a_patch_that_is_refused_changes_nothing() {
    let mut drive = Drive::new(&json!({}));
    let odd = TempFile::new(&[0; 100]);
    for (patch, expected) in [
        (json!({"drive_id": "rootfs", "path_on_host": "/nowhere"}), "path_on_host: "),
        (json!({"drive_id": "rootfs", "path_on_host": odd.path}), "path_on_host: "),
    ] {
        let e = drive.update(&patch).unwrap_err();
        assert!(e.starts_with(expected), "{e}");
    }
    let row = model("drives").unwrap();
    assert!((row.patch.unwrap().parse)(br#"{"path_on_host": "/x"}"#).is_err());
    assert!(
        (row.patch.unwrap().parse)(br#"{"drive_id": "rootfs", "is_read_only": true}"#).is_err()
    );
    assert_eq!((drive.capacity(), drive.machine.irq.counts().1), (SECTORS, 0));
    assert_eq!(drive.request(IN, 63, 512), (OK, 513));
    assert_eq!(drive.machine.counter("update_fails"), 2);
}

#[test]
fn all_of_it_holds_with_a_layer_over_it() {
    HAS_OVERLAY.set(true);
    for engine in ["Sync", "Async"] {
        ENGINE.set(engine);
        for test in [
            reads_and_writes_whole_sectors_anywhere,
            data_may_lie_in_any_pieces,
            serves_indirect_chains_of_the_longest_kind,
            refuses_what_is_out_of_bounds,
            malformed_requests_get_a_status_where_one_can_be_written,
            unknown_requests_are_unsupported,
            tells_its_id,
            flushes_only_if_asked_to_offer_it,
            discards_and_writes_zeroes,
            refuses_bad_ranges_before_the_first_has_effect,
            a_huge_sparse_file_has_its_last_sector,
        ] {
            test();
        }
    }
}

#[test]
fn all_of_it_holds_with_io_uring() {
    ENGINE.set("Async");
    for test in [
        reads_and_writes_whole_sectors_anywhere,
        data_may_lie_in_any_pieces,
        serves_indirect_chains_of_the_longest_kind,
        refuses_what_is_out_of_bounds,
        malformed_requests_get_a_status_where_one_can_be_written,
        unknown_requests_are_unsupported,
        tells_its_id,
        flushes_only_if_asked_to_offer_it,
        a_read_only_drive_cannot_be_changed,
        discards_and_writes_zeroes,
        refuses_bad_ranges_before_the_first_has_effect,
        a_file_that_shrinks_or_goes_is_an_error_or_nothing,
        a_huge_sparse_file_has_its_last_sector,
        bytes_per_wake_up_are_bounded_and_nothing_is_lost,
        a_patch_changes_the_file_and_tells_the_driver,
        a_patch_that_is_refused_changes_nothing,
    ] {
        test();
    }
}
