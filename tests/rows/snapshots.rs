//! S3, S5: snapshots that are damaged, and one that is restored twice at once.
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::subject::{Subject, differs, is_husks_alone};
use crate::util::*;

/// A snapshot in two files, as every program that speaks the API can make it.
struct Saved {
    state: PathBuf,
    memory: PathBuf,
}

impl Saved {
    /// Of a guest that has started. `None` if the program under attack cannot.
    fn make(row: &'static str, scratch: &Scratch, name: &str) -> Option<Self> {
        let subject = Subject::start_with(row, Husk::typing);
        let config = json!({
            "boot-source": {"kernel_image_path": guest("steps"), "boot_args": "pages=16"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 4},
        });
        let refusal = subject.refusal(&config);
        assert!(refusal.is_none() || differs(row), "{refusal:?}");
        if refusal.is_some() {
            return None;
        }
        if !subject.is_ready("ready=1") {
            return None;
        }
        let saved = Self {
            state: scratch.path(&format!("{name}.state")),
            memory: scratch.path(&format!("{name}.memory")),
        };
        subject.ask("PATCH", "/vm", &json!({"state": "Paused"}).to_string());
        let place = json!({"snapshot_path": saved.state, "mem_file_path": saved.memory});
        let (status, said) = subject.ask("PUT", "/snapshot/create", &place.to_string());
        assert!(status == 204 || differs(row), "{said}");
        (status == 204).then_some(saved)
    }

    /// The body of `PUT /snapshot/load`.
    fn load(state: &Path, memory: &Path) -> Value {
        let backend = json!({"backend_type": "File", "backend_path": memory});
        json!({"snapshot_path": state, "mem_backend": backend, "resume_vm": true})
    }
}

/// Loads that must be refused, by one process that then loads what is whole.
struct Loader {
    subject: Subject,
    row: &'static str,
    count: usize,
}

impl Loader {
    fn start(row: &'static str) -> Self {
        let mut subject = Subject::start_with(row, Husk::typing);
        subject.settle();
        Self { subject, row, count: 0 }
    }

    #[track_caller]
    fn refuses(&mut self, name: &str, state: &Path, memory: &Path, words: &[&str]) {
        let body = Saved::load(state, memory).to_string();
        let (status, said) = self.subject.ask("PUT", "/snapshot/load", &body);
        self.count += 1;
        if crate::hostile::other().is_some() {
            println!("{} {name}: {status} {}", self.row, said.trim_end());
            if status != 400 || !self.subject.vm().is_running() {
                self.subject = Subject::start_with(self.row, Husk::typing);
            }
            return;
        }
        assert_eq!(status, 400, "{name}: {said}");
        assert!(words.iter().any(|word| said.contains(word)), "{name}: want {words:?}: {said}");
        assert_eq!(self.subject.api().state(), "Not started", "{name}");
    }

    /// What is whole can be loaded in the end, and the guest goes on.
    fn loads(self, saved: &Saved) {
        println!("{}: {} loads are refused", self.row, self.count);
        let body = Saved::load(&saved.state, &saved.memory).to_string();
        let (status, said) = self.subject.ask("PUT", "/snapshot/load", &body);
        if crate::hostile::other().is_some() {
            println!("{} whole: {status} {said}", self.row);
            return;
        }
        assert_eq!(status, 204, "{said}");
        self.subject.vm().type_in("c");
        self.subject.vm().expect("count=1");
        self.subject.vm().type_in("q");
        self.subject.ends(0);
    }
}

#[test]
fn s03_state_files_that_are_damaged() {
    let scratch = Scratch::new();
    let Some(saved) = Saved::make("S3", &scratch, "good") else { return };
    let good = fs::read(&saved.state).unwrap();
    let mut loader = Loader::start("S3");
    let bad = scratch.path("bad");
    // Each byte of the head, in which version, lengths and sums are, and one in 61 of the rest.
    let places = (0..64).chain((64..good.len()).step_by(61));
    for at in places {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&bad, &bytes).unwrap();
        let words = ["the state file is damaged", "format version", "id: it belongs to"];
        loader.refuses(&format!("byte {at}"), &bad, &saved.memory, &words);
    }
    for len in (0..64).chain((64..good.len()).step_by(512)).chain([good.len() - 1]) {
        fs::write(&bad, &good[..len]).unwrap();
        let words = ["the state file is damaged", "truncated", "the file is empty"];
        loader.refuses(&format!("{len} bytes"), &bad, &saved.memory, &words);
    }
    for (name, bytes) in [
        ("and more", [&good[..], b"\0"].concat()),
        ("zeroes", vec![0; good.len()]),
        ("text", b"a snapshot\n".to_vec()),
        ("a kernel", fs::read(guest("hello")).unwrap()),
    ] {
        fs::write(&bad, &bytes).unwrap();
        loader.refuses(name, &bad, &saved.memory, &["the state file is damaged"]);
    }
    if !is_husks_alone("S3") {
        let line = Husk::new(["restore"]).arg(&bad).option("--memory", &saved.memory).wait();
        let line = line.quickly().refused(7);
        assert!(line.contains("the state file is damaged"), "{line}");
    }
    loader.loads(&saved);
}

#[test]
fn s03_memory_files_that_are_not_its_own() {
    let scratch = Scratch::new();
    let Some(saved) = Saved::make("S3", &scratch, "good") else { return };
    let Some(other) = Saved::make("S3", &scratch, "other") else { return };
    let mut loader = Loader::start("S3");
    loader.refuses("of another", &saved.state, &other.memory, &["id: it belongs to snapshot"]);
    loader.refuses("the other way", &other.state, &saved.memory, &["id: it belongs to snapshot"]);
    loader.refuses("twice the state", &saved.state, &saved.state, &["length: ", "id: "]);
    loader.refuses(
        "twice the memory",
        &saved.memory,
        &saved.memory,
        &["the state file is damaged"],
    );
    let bad = scratch.path("bad");
    fs::copy(&saved.memory, &bad).unwrap();
    let file = File::options().read(true).write(true).open(&bad).unwrap();
    let len = file.metadata().unwrap().len();
    for cut in (4096..=len).step_by(16 << 12) {
        file.set_len(len - cut).unwrap();
        loader.refuses(&format!("{cut} bytes less"), &saved.state, &bad, &["length: ", "empty"]);
    }
    file.set_len(0).unwrap();
    loader.refuses("nothing", &saved.state, &bad, &["length: ", "empty"]);
    for (name, path) in super::no_files(&scratch).into_iter().map(|(path, word)| (word, path)) {
        loader.refuses(name, &saved.state, &path, &[name]);
        loader.refuses(name, &path, &saved.memory, &[name]);
    }
    loader.loads(&saved);
}

/// A page that is another is not looked at by a load, which maps it, but by `verify`.
#[test]
fn s03_memory_with_a_page_that_is_another() {
    if is_husks_alone("S3") {
        return;
    }
    let scratch = Scratch::new();
    let saved = Saved::make("S3", &scratch, "good").expect("a snapshot");
    let verify = || Husk::new(["snapshot", "verify"]).arg(&saved.state).arg(&saved.memory).wait();
    verify().code(0);
    let file = File::options().read(true).write(true).open(&saved.memory).unwrap();
    let mut page = vec![0; 4096];
    // The guest's code, which is in no hole of the file.
    file.read_exact_at(&mut page, 1 << 20).unwrap();
    assert!(page.iter().any(|byte| *byte != 0));
    page.reverse();
    file.write_all_at(&page, 1 << 20).unwrap();
    let line = verify().refused(7);
    assert!(line.contains("checksum: ") && line.contains("0x100000"), "{line}");
}

/// Both run, neither writes to what both have come from, and neither is the other.
#[test]
fn s05_two_restores_of_one_snapshot_at_once() {
    let scratch = Scratch::new();
    let Some(saved) = Saved::make("S5", &scratch, "good") else { return };
    let before = [&saved.state, &saved.memory].map(|path| fs::read(path).unwrap());
    let both = [(); 2].map(|()| Subject::start_with("S5", Husk::typing));
    let body = Saved::load(&saved.state, &saved.memory).to_string();
    let statuses = std::thread::scope(|scope| {
        let asked = both
            .each_ref()
            .map(|subject| scope.spawn(|| subject.ask("PUT", "/snapshot/load", &body)));
        asked.map(|one| one.join().unwrap())
    });
    println!("S5: {statuses:?}");
    if is_husks_alone("S5") {
        return;
    }
    assert!(statuses.iter().all(|(status, _)| *status == 204), "{statuses:?}");
    let mut identities = Vec::new();
    for subject in both {
        // Counts in all of its memory, and would find what the other has written there.
        assert_eq!(tell(subject.vm(), "ccc").trim(), "count=3");
        let identity = tell(subject.vm(), "i");
        identities.push(identity.split(' ').next().unwrap().to_owned());
        subject.vm().type_in("q");
        subject.ends(0);
    }
    assert_ne!(identities[0], identities[1], "one generation id");
    assert!(identities[0].starts_with("identity=") && identities[0].len() > 30, "{identities:?}");
    let after = [&saved.state, &saved.memory].map(|path| fs::read(path).unwrap());
    assert!(after == before, "the snapshot has changed");
}
