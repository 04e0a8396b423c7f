//! Drives with a layer over a file that others share.
use std::path::Path;

use devices::backend::overlay::Frozen;
use devices::virtio::mmio::Saved;
use devices::virtio::model::Left;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use crate::block::{DATA, DISCARD, Drive, FLUSH, IN, IOERR, OK, OUT, WRITE_ZEROES, config};
use crate::samples::{TempDir, TempFile, open, refusal};

/// Sectors of a base: not a whole number of granules.
const SECTORS: u64 = 2 * 1024 + 3;
/// Most sectors of a request here.
const MOST: u64 = 100;

/// Reproducible noise.
struct Noise(u64);

impl Noise {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next(256).to_le_bytes()[0]).collect()
    }

    fn range(&mut self) -> (u64, u64) {
        let sector = self.next(SECTORS);
        (sector, 1 + self.next((SECTORS - sector).min(MOST)))
    }
}

fn base() -> (TempFile, Vec<u8>) {
    let content = Noise(77).bytes(usize::try_from(SECTORS * 512).unwrap());
    (TempFile::new(&content), content)
}

fn drive(file: TempFile, change: &Value) -> Drive {
    let config = config(&file, change);
    Drive::of(file, &config)
}

/// A second drive on the file of a first.
fn sibling(path: &Path, overlay: &Value) -> Drive {
    let unused = TempFile::new(&[0; 512]);
    let mut config = config(&unused, &json!({"overlay": overlay, "cache_type": "Writeback"}));
    config["path_on_host"] = json!(path);
    Drive::of(unused, &config)
}

impl Drive {
    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.machine.mem.write_slice(bytes, GuestAddress(DATA)).unwrap();
        self.request(OUT, sector, u32::try_from(bytes.len()).unwrap()).0
    }

    fn read(&mut self, sector: u64, count: u64) -> Vec<u8> {
        let len = u32::try_from(count * 512).unwrap();
        assert_eq!(self.request(IN, sector, len), (OK, len + 1));
        self.data(usize::try_from(len).unwrap())
    }

    fn all(&mut self) -> Vec<u8> {
        let starts = (0..SECTORS).step_by(usize::try_from(MOST).unwrap());
        starts.flat_map(|at| self.read(at, MOST.min(SECTORS - at))).collect()
    }

    fn freeze(&mut self) -> Frozen {
        let mut transport = self.machine.transport.lock().unwrap();
        transport.pause().unwrap();
        let mut saved = transport.save();
        transport.save_files(&mut saved).unwrap();
        transport.resume().unwrap();
        saved.files().unwrap().clone()
    }

    fn adopt(&mut self, frozen: &Frozen) -> Result<(), String> {
        let mut transport = self.machine.transport.lock().unwrap();
        transport.pause().unwrap();
        let mut saved = transport.save();
        saved.set_files(frozen.clone());
        let adopted = transport.rewind(&saved).map_err(|e| e.to_string());
        if adopted.is_ok() {
            transport.resume().unwrap();
        }
        adopted.map(|left| assert_eq!(left, Left::Nothing))
    }
}

/// Writes what was frozen to a file, and opens it again.
fn through_a_file(frozen: &Frozen) -> Frozen {
    let file = TempFile::new(&[]);
    let opened = std::fs::File::options().read(true).write(true).open(&file.path).unwrap();
    let description = frozen.write_to(&opened, || false).unwrap();
    let again = Frozen::open(&file.path, &description).unwrap();
    assert!(again.verify(&description).unwrap());
    again
}

fn at(sector: u64) -> usize {
    usize::try_from(sector * 512).unwrap()
}

#[test]
fn is_what_was_written_frozen_and_gone_back_to() {
    for (engine, place) in [("Sync", "Memory"), ("Async", "Temporary"), ("Async", "Memory")] {
        for seed in 1..=4 {
            let (file, content) = base();
            let change = json!({"io_engine": engine, "overlay": place, "cache_type": "Writeback"});
            let mut drive = drive(file, &change);
            let (mut noise, mut model) = (Noise(seed), content.clone());
            let mut kept: Vec<(Frozen, Vec<u8>)> = Vec::new();
            for step in 0..300 {
                let (sector, count) = noise.range();
                let here = at(sector)..at(sector + count);
                match noise.next(16) {
                    0..5 => {
                        let bytes = noise.bytes(here.len());
                        assert_eq!(drive.write(sector, &bytes), OK);
                        model[here].copy_from_slice(&bytes);
                    }
                    5..10 => assert!(drive.read(sector, count) == model[here], "step {step}"),
                    10 => assert_eq!(drive.request(FLUSH, 0, 0).0, OK),
                    11 | 12 => {
                        let count = u32::try_from(count).unwrap();
                        let (request, flags) = match noise.next(3) {
                            0 => (DISCARD, 0),
                            flags => (WRITE_ZEROES, u32::try_from(flags - 1).unwrap()),
                        };
                        assert_eq!(drive.erase(request, &[(sector, count, flags)]).0, OK);
                        model[here].fill(0);
                    }
                    13 | 14 => kept.push((drive.freeze(), model.clone())),
                    _ if kept.is_empty() => {}
                    _ => {
                        let which = usize::try_from(noise.next(kept.len() as u64)).unwrap();
                        if noise.next(4) == 0 {
                            kept[which].0 = through_a_file(&kept[which].0);
                        }
                        drive.adopt(&kept[which].0).unwrap();
                        model.clone_from(&kept[which].1);
                    }
                }
            }
            assert!(drive.all() == model, "{engine} {place} {seed}");
            for (frozen, model) in &kept {
                drive.adopt(frozen).unwrap();
                assert!(drive.all() == *model, "{engine} {place} {seed}: what was frozen changed");
            }
            assert!(drive.file.content() == content, "the base was written");
        }
    }
}

#[test]
fn stays_what_it_was_however_often_it_is_frozen() {
    let (file, mut model) = base();
    let mut drive = drive(file, &json!({"overlay": "Memory"}));
    let mut noise = Noise(5);
    let mut first = None;
    for _ in 0..150 {
        let (sector, count) = noise.range();
        let bytes = if noise.next(3) == 0 { vec![0; at(count)] } else { noise.bytes(at(count)) };
        assert_eq!(drive.write(sector, &bytes), OK);
        model[at(sector)..at(sector + count)].copy_from_slice(&bytes);
        let frozen = drive.freeze();
        first.get_or_insert_with(|| (frozen, model.clone()));
    }
    assert!(drive.all() == model);
    let (frozen, model) = first.unwrap();
    drive.adopt(&frozen).unwrap();
    assert!(drive.all() == model);
}

#[test]
fn drives_that_share_a_base_or_a_frozen_layer_do_not_share_what_they_write() {
    let (file, content) = base();
    let path = file.path.clone();
    let mut one = drive(file, &json!({"overlay": "Temporary"}));
    let mut two = sibling(&path, &json!("Temporary"));
    assert_eq!(one.write(0, &[1; 512]), OK);
    assert_eq!(two.write(0, &[2; 512]), OK);
    assert_eq!((one.read(0, 1), two.read(0, 1)), (vec![1; 512], vec![2; 512]));
    let frozen = through_a_file(&one.freeze());
    two.adopt(&frozen).unwrap();
    assert_eq!(two.read(0, 1), [1; 512]);
    assert_eq!(two.write(1, &[3; 512]), OK);
    assert_eq!(one.read(1, 1), content[512..1024]);
    assert_eq!(one.write(0, &[4; 512]), OK);
    assert_eq!(two.read(0, 2), [[1; 512], [3; 512]].concat());
    // Others may read the file meanwhile, but not write it.
    let plain = config(&two.file, &json!({"path_on_host": path}));
    assert!(refusal("drives", &plain).contains("in use"));
    let _reader =
        open("drives", &config(&two.file, &json!({"path_on_host": path, "is_read_only": true})));
}

#[test]
fn a_named_layer_is_there_the_next_time() {
    let dir = TempDir::new();
    let layer = json!({"File": dir.path("layer")});
    let (file, content) = base();
    let path = file.path.clone();
    for cache in ["Writeback", "Unsafe"] {
        let _ = std::fs::remove_file(dir.path("layer"));
        let (mut noise, mut model) = (Noise(9), content.clone());
        for _ in 0..4 {
            let unused = TempFile::new(&[0; 512]);
            let change = json!({"overlay": layer, "cache_type": cache, "path_on_host": path});
            let mut drive = drive(unused, &change);
            assert!(drive.all() == model, "{cache}");
            for _ in 0..10 {
                let (sector, count) = noise.range();
                let bytes = noise.bytes(at(count));
                assert_eq!(drive.write(sector, &bytes), OK);
                model[at(sector)..at(sector + count)].copy_from_slice(&bytes);
            }
            // It is no part of a snapshot, but at that moment it is what it should be.
            let mut transport = drive.machine.transport.lock().unwrap();
            transport.pause().unwrap();
            let mut saved = transport.save();
            transport.save_files(&mut saved).unwrap();
            assert!(saved.files().is_none());
            assert_eq!(transport.rewind(&saved).unwrap(), Left::File);
            let copy = dir.path("copy");
            std::fs::copy(dir.path("layer"), &copy).unwrap();
            assert!(sibling(&path, &json!({"File": copy})).all() == model);
        }
        assert!(std::fs::read(&path).unwrap() == content);
    }
}

/// What a killed husk leaves: nobody has closed the layer.
#[test]
fn a_named_layer_keeps_what_was_flushed_or_all_of_it() {
    for (cache, has_late) in [("Writeback", false), ("Unsafe", true)] {
        let dir = TempDir::new();
        let (file, content) = base();
        let path = file.path.clone();
        let change = json!({"overlay": {"File": dir.path("layer")}, "cache_type": cache});
        let mut first = drive(file, &change);
        assert_eq!(first.write(3, &[0xaa; 512]), OK);
        if cache == "Writeback" {
            assert_eq!(first.request(FLUSH, 0, 0).0, OK);
        }
        assert_eq!(first.write(1003, &[0xbb; 512]), OK);
        std::fs::copy(dir.path("layer"), dir.path("as it was")).unwrap();
        let mut second = sibling(&path, &json!({"File": dir.path("as it was")}));
        assert_eq!(second.read(2, 2)[..512], content[1024..1536]);
        assert_eq!(second.read(3, 1), [0xaa; 512], "{cache}");
        let late = second.read(1003, 1);
        assert_eq!(late == [0xbb; 512], has_late, "{cache}");
        assert!(has_late || late == content[at(1003)..at(1004)]);
    }
}

#[test]
fn refuses_layers_and_bases_that_will_not_do() {
    let dir = TempDir::new();
    let (file, content) = base();
    let of = |change: Value| refusal("drives", &config(&file, &change));
    let named = |name: &str| json!({"overlay": {"File": dir.path(name)}});
    let layer_of = |content: &[u8], name: &str| drop(drive(TempFile::new(content), &named(name)));
    layer_of(&content, "mine");
    let mut other = content.clone();
    other[600] ^= 1;
    layer_of(&other, "other");
    layer_of(&[content.clone(), vec![0; 512]].concat(), "larger");
    layer_of(&content[..1 << 16], "smaller");
    std::fs::write(dir.path("notes"), "all about husk").unwrap();
    std::fs::write(dir.path("long notes"), content.repeat(3)).unwrap();
    std::fs::create_dir(dir.path("directory")).unwrap();
    let mut damaged = std::fs::read(dir.path("mine")).unwrap();
    let last = damaged.len() - 1;
    damaged[last] = 1;
    std::fs::write(dir.path("damaged"), &damaged).unwrap();
    std::fs::write(dir.path("short"), &damaged[..last]).unwrap();
    for (name, expected) in [
        ("other", "is a layer of another disk"),
        ("larger", "is a layer of a disk of 1050624 bytes, this one has 1050112"),
        ("smaller", "is a layer of a disk of 65536 bytes, this one has 1050112"),
        ("notes", "is there, and is no layer"),
        ("long notes", "is there, and is no layer"),
        ("directory", "is a directory, want a regular file"),
        ("nowhere/layer", "cannot make "),
        ("damaged", "is damaged: map: it goes on behind the end of the disk"),
        ("short", "is damaged: length"),
    ] {
        let e = of(named(name));
        assert!(e.starts_with("overlay: ") && e.contains(expected), "{name}: {e}");
    }
    for byte in 0..64 {
        let mut bytes = std::fs::read(dir.path("mine")).unwrap();
        let trailer = content.len().next_multiple_of(4096);
        bytes[trailer + byte] ^= 0x10;
        std::fs::write(dir.path("flipped"), &bytes).unwrap();
        let e = of(named("flipped"));
        assert!(e.starts_with("overlay: "), "byte {byte}: {e}");
    }
    let mut writer = drive(TempFile::new(&content), &named("mine"));
    assert!(of(named("mine")).contains("in use by another drive"));
    let path = json!({"drive_id": "rootfs", "path_on_host": file.path});
    assert!(writer.update(&path).unwrap_err().starts_with("path_on_host: what is under"));
    assert_eq!(writer.read(0, 1), content[..512]);
    for (change, expected) in [
        (json!({"overlay": "Memory", "is_read_only": true}), "overlay: nothing is written"),
        (
            json!({"overlay": "Memory", "path_on_host": null, "socket": "/x"}),
            "overlay: belongs to the back end",
        ),
        (json!({"overlay": "Memory", "path_on_host": "/dev/zero"}), "path_on_host: /dev/zero is"),
    ] {
        let e = of(change);
        assert!(e.starts_with(expected), "{e}");
    }
    for bad in ["Disk", "memory"] {
        let json = config(&file, &json!({"overlay": bad})).to_string();
        assert!((devices::virtio::model("drives").unwrap().parse)(json.as_bytes()).is_err());
    }
}

#[test]
fn what_was_frozen_fits_its_base_only() {
    let (file, content) = base();
    let mut first = drive(file, &json!({"overlay": "Memory"}));
    let frozen = first.freeze();
    let mut other = content.clone();
    other[1100] ^= 1;
    let mut second = drive(TempFile::new(&other), &json!({"overlay": "Memory"}));
    assert!(second.adopt(&frozen).unwrap_err().contains("of another disk"));
    let mut third = drive(TempFile::new(&content[..512]), &json!({"overlay": "Memory"}));
    assert!(third.adopt(&frozen).unwrap_err().contains("1050112 bytes, this one has 512"));
    assert!(
        drive(TempFile::new(&content), &json!({})).adopt(&frozen).unwrap_err().contains("overlay")
    );
    drive(TempFile::new(&content), &json!({"overlay": "Memory"})).adopt(&frozen).unwrap();
}

#[test]
fn what_was_saved_without_its_files_is_not_gone_on_with() {
    let (file, _) = base();
    let mut drive = drive(file, &json!({"overlay": "Memory"}));
    drive.freeze();
    let mut transport = drive.machine.transport.lock().unwrap();
    transport.pause().unwrap();
    let mut saved = transport.save();
    transport.save_files(&mut saved).unwrap();
    let mut read: Saved = serde_json::from_value(json!(saved)).unwrap();
    assert!(read.wants_files() && !saved.wants_files());
    assert!(transport.rewind(&read).unwrap_err().to_string().contains("is missing"));
    read.set_files(saved.files().unwrap().clone());
    transport.rewind(&read).unwrap();
}

#[test]
fn damage_to_a_sealed_layer_is_found() {
    let (file, _) = base();
    let mut drive = drive(file, &json!({"overlay": "Memory"}));
    assert_eq!(drive.write(100, &[7; 1024]), OK);
    let sealed = TempFile::new(&[]);
    let opened = std::fs::File::options().read(true).write(true).open(&sealed.path).unwrap();
    let description = drive.freeze().write_to(&opened, || false).unwrap();
    let good = sealed.content();
    let trailer = good.len() - 4096 - 512;
    assert!(drive.freeze().write_to(&opened, || true).is_err());
    // The trailer and the map are checked at once, data when it is asked for.
    for bit in (trailer * 8..(trailer + 64) * 8).chain((good.len() - 512) * 8..good.len() * 8) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&sealed.path, &bad).unwrap();
        assert!(Frozen::open(&sealed.path, &description).is_err(), "bit {bit}");
    }
    for byte in (at(100)..at(102)).step_by(97) {
        let mut bad = good.clone();
        bad[byte] ^= 4;
        std::fs::write(&sealed.path, &bad).unwrap();
        let frozen = Frozen::open(&sealed.path, &description).unwrap();
        assert!(!frozen.verify(&description).unwrap(), "byte {byte}");
    }
    std::fs::write(&sealed.path, &good).unwrap();
    let e = refusal("drives", &config(&drive.file, &json!({"overlay": {"File": sealed.path}})));
    assert!(e.contains("is part of a snapshot"), "{e}");
}

#[test]
fn a_base_that_shrinks_is_an_error_where_it_was() {
    let (file, content) = base();
    let mut drive = drive(file, &json!({"overlay": "Memory"}));
    drive.file.set_len(8192);
    assert_eq!(drive.request(IN, 100, 512).0, IOERR);
    // Part of a granule cannot be written then, a whole one can.
    assert_eq!(drive.write(100, &[1; 512]), IOERR);
    assert_eq!(drive.write(104, &[1; 4096]), OK);
    assert_eq!(drive.read(104, 8), [1; 4096]);
    assert_eq!(drive.read(0, 16), content[..8192]);
    assert_eq!(drive.machine.counter("execute_fails"), 2);
}
