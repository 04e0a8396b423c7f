//! A5, A7: requests in orders that make no sense, and by several at once. Each is answered as a small model of the
//! program says, whatever came before; of those that exclude each other, one is done.
use std::thread;

use serde_json::{Value, json};

use super::subject::{Subject, differs, is_husks_alone};
use crate::util::*;

/// What there is to know of a program, to say how it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    NotStarted { has_kernel: bool, has_metrics: bool },
    Running { has_metrics: bool },
    Paused { has_metrics: bool },
}

impl State {
    const FIRST: Self = Self::NotStarted { has_kernel: false, has_metrics: false };

    fn has_metrics(self) -> bool {
        match self {
            Self::NotStarted { has_metrics, .. }
            | Self::Running { has_metrics }
            | Self::Paused { has_metrics } => has_metrics,
        }
    }

    /// As `GET /` has it.
    fn name(self) -> &'static str {
        match self {
            Self::NotStarted { .. } => "Not started",
            Self::Running { .. } => "Running",
            Self::Paused { .. } => "Paused",
        }
    }
}

/// What can be asked.
#[derive(Clone, Copy, Debug)]
enum Step {
    Kernel,
    BadKernel,
    Machine,
    MachinePatch,
    BadMachine,
    Entropy,
    Metrics,
    Start,
    Pause,
    Resume,
    CtrlAltDel,
    Flush,
    Snapshot,
    BadLoad,
    BadDrivePatch,
    ChangeMetadata,
    Unknown,
}

const STEPS: [Step; 17] = [
    Step::Kernel,
    Step::BadKernel,
    Step::Machine,
    Step::MachinePatch,
    Step::BadMachine,
    Step::Entropy,
    Step::Metrics,
    Step::Start,
    Step::Pause,
    Step::Resume,
    Step::CtrlAltDel,
    Step::Flush,
    Step::Snapshot,
    Step::BadLoad,
    Step::BadDrivePatch,
    Step::ChangeMetadata,
    Step::Unknown,
];

impl Step {
    fn request(self, scratch: &Scratch) -> (&'static str, &'static str, Value) {
        let action = |name| ("PUT", "/actions", json!({ "action_type": name }));
        let change = |state| ("PATCH", "/vm", json!({ "state": state }));
        let kernel = |path| json!({"kernel_image_path": path, "boot_args": "how=hang"});
        match self {
            Self::Kernel => ("PUT", "/boot-source", kernel(guest("hello"))),
            Self::BadKernel => ("PUT", "/boot-source", kernel("/nope".into())),
            Self::Machine => {
                ("PUT", "/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 4}))
            }
            Self::MachinePatch => ("PATCH", "/machine-config", json!({"mem_size_mib": 8})),
            Self::BadMachine => {
                ("PUT", "/machine-config", json!({"vcpu_count": 0, "mem_size_mib": 4}))
            }
            Self::Entropy => ("PUT", "/entropy", json!({})),
            Self::Metrics => ("PUT", "/metrics", json!({"metrics_path": scratch.path("metrics")})),
            Self::Start => action("InstanceStart"),
            Self::Pause => change("Paused"),
            Self::Resume => change("Resumed"),
            Self::CtrlAltDel => action("SendCtrlAltDel"),
            Self::Flush => action("FlushMetrics"),
            Self::Snapshot => {
                let (state, memory) = (scratch.path("state"), scratch.path("memory"));
                (
                    "PUT",
                    "/snapshot/create",
                    json!({"snapshot_path": state, "mem_file_path": memory}),
                )
            }
            Self::BadLoad => {
                let backend = json!({"backend_type": "File", "backend_path": "/nope"});
                let load = json!({"snapshot_path": "/nope", "mem_backend": backend});
                ("PUT", "/snapshot/load", load)
            }
            Self::BadDrivePatch => {
                ("PATCH", "/drives/nope", json!({"drive_id": "nope", "path_on_host": "/nope"}))
            }
            Self::ChangeMetadata => ("PUT", "/mmds", json!({"a": 1})),
            Self::Unknown => ("PUT", "/nope", json!({})),
        }
    }

    /// The state after it if it is done, or `None` if it is refused.
    fn follows(self, state: State) -> Option<State> {
        use State::{NotStarted, Paused, Running};
        let has_metrics = state.has_metrics();
        match (self, state) {
            (Self::Kernel, NotStarted { .. }) => Some(NotStarted { has_kernel: true, has_metrics }),
            (Self::Machine | Self::MachinePatch | Self::Entropy, NotStarted { .. }) => Some(state),
            (Self::Metrics, NotStarted { has_kernel, has_metrics: false }) => {
                Some(NotStarted { has_kernel, has_metrics: true })
            }
            (Self::Start, NotStarted { has_kernel: true, .. }) => Some(Running { has_metrics }),
            (Self::Pause, Running { .. } | Paused { .. }) => Some(Paused { has_metrics }),
            (Self::Resume, Running { .. } | Paused { .. }) => Some(Running { has_metrics }),
            (Self::CtrlAltDel | Self::Flush | Self::Snapshot, Running { .. } | Paused { .. }) => {
                Some(state)
            }
            (Self::ChangeMetadata, _) => Some(state),
            _ => None,
        }
    }
}

/// A simple generator of numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

const WALKS: u64 = 16;
const STEPS_OF_A_WALK: usize = 60;

#[test]
fn a05_any_order_is_answered_as_the_model_says() {
    let mut seen = std::collections::BTreeSet::new();
    for walk in 1..=WALKS {
        let scratch = Scratch::new();
        let subject = Subject::start("A5");
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ walk << 32);
        let mut state = State::FIRST;
        let mut steps = Vec::new();
        for _ in 0..STEPS_OF_A_WALK {
            let step = STEPS[random.below(STEPS.len())];
            steps.push(step);
            let (method, path, body) = step.request(&scratch);
            let (status, said) = subject.ask(method, path, &body.to_string());
            let next = step.follows(state);
            seen.insert((format!("{step:?}"), state.name(), next.is_some()));
            let wanted = if next.is_some() { 204 } else { 400 };
            if is_another() {
                if status != wanted {
                    println!("A5 {step:?} while {state:?}: {status} {}", said.trim_end());
                }
                // Its own model is not known.
                break;
            }
            assert_eq!(status, wanted, "walk {walk}, {steps:?} while {state:?}: {said}");
            state = next.unwrap_or(state);
            assert_eq!(subject.api().state(), state.name(), "walk {walk}, {steps:?}");
        }
        drop(subject);
    }
    // Each step in each state, or too few walks were made.
    let wanted = STEPS.len() * 3;
    let states: std::collections::BTreeSet<_> =
        seen.iter().map(|(step, state, _)| (step, state)).collect();
    assert!(states.len() == wanted || differs("A5"), "{} of {wanted}", states.len());
}

fn is_another() -> bool {
    crate::hostile::other().is_some()
}

/// What is said of a request that comes out of turn names the turn.
#[test]
fn a05_refusals_name_the_state() {
    let scratch = Scratch::new();
    let subject = Subject::start("A5");
    let refused = |step: Step, word: &str| {
        let (method, path, body) = step.request(&scratch);
        let (status, said) = subject.ask(method, path, &body.to_string());
        println!("A5 {step:?}: {status} {}", said.trim_end());
        assert!(status == 400 && said.contains(word) || differs("A5"), "{step:?}: {said}");
    };
    for step in [Step::Pause, Step::Resume, Step::CtrlAltDel, Step::Flush, Step::Snapshot] {
        refused(step, "before starting the microVM");
    }
    refused(Step::Start, "kernel");
    let config =
        json!({"boot-source": {"kernel_image_path": guest("hello"), "boot_args": "how=hang"}});
    assert!(subject.refusal(&config).is_none() || differs("A5"));
    for step in
        [Step::Kernel, Step::Machine, Step::MachinePatch, Step::Entropy, Step::Metrics, Step::Start]
    {
        refused(step, "after starting the microVM");
    }
    assert_eq!(subject.ask("GET", "/", "").0, 200);
}

/// Clients at the same time, several of each kind.
fn race<T: Send>(count: usize, ask: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let barrier = std::sync::Barrier::new(count);
    thread::scope(|scope| {
        let (ask, barrier) = (&ask, &barrier);
        let all: Vec<_> = (0..count)
            .map(|n| {
                scope.spawn(move || {
                    barrier.wait();
                    ask(n)
                })
            })
            .collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    })
}

#[test]
fn a07_of_several_starts_one_is_done() {
    for _ in 0..10 {
        let subject = Subject::start("A7");
        let source = json!({"kernel_image_path": guest("hello"), "boot_args": "how=hang"});
        subject.ask("PUT", "/boot-source", &source.to_string());
        let start = json!({"action_type": "InstanceStart"}).to_string();
        // Others change what is to start, as long as they may.
        let machine = json!({"vcpu_count": 2, "mem_size_mib": 64}).to_string();
        let statuses = race(12, |n| match n % 3 {
            0 => ("machine", subject.ask("PUT", "/machine-config", &machine).0),
            _ => ("start", subject.ask("PUT", "/actions", &start).0),
        });
        let starts = statuses.iter().filter(|one| **one == ("start", 204)).count();
        let answered = statuses.iter().all(|(_, status)| [204, 400].contains(status));
        println!("A7: {starts} of 8 starts are done");
        assert!(starts == 1 && answered || differs("A7"), "{statuses:?}");
        if is_another() {
            return;
        }
        assert_eq!(subject.api().state(), "Running");
        // What runs is what was shown: two CPUs if one of the changes came first.
        let is_changed = statuses.contains(&("machine", 204));
        let shown = subject.ask("GET", "/machine-config", "").1;
        assert_eq!(shown.contains("\"vcpu_count\":2"), is_changed, "{shown}");
    }
}

/// Snapshots, pauses and resumes at once: each is done or refused, and what is there afterwards is whole.
#[test]
fn a07_snapshots_pauses_and_resumes_at_once() {
    if is_husks_alone("A7") {
        return;
    }
    let scratch = Scratch::new();
    let vm = Husk::guest("warm", "pages=64 every=5").memory(8).listening().start();
    vm.expect("tick=");
    let directory = scratch.path("warm");
    let statuses = race(12, |n| {
        let reply = match n % 3 {
            0 => vm.api().put("/snapshot/create", json!({ "directory": directory })),
            1 => vm.api().patch("/vm", json!({"state": "Paused"})),
            _ => vm.api().patch("/vm", json!({"state": "Resumed"})),
        };
        (n % 3, reply.status, reply.body)
    });
    println!("A7: {statuses:?}");
    let is_right = |(kind, status, said): &(usize, u16, String)| match (kind, status) {
        (_, 204) => true,
        (0, 400) => said.contains("a snapshot is being written: wait until it is there"),
        _ => false,
    };
    assert!(statuses.iter().all(is_right), "{statuses:?}");
    assert!(statuses.iter().any(|(kind, status, _)| (*kind, *status) == (0, 204)), "{statuses:?}");
    vm.api().patch("/vm", json!({"state": "Resumed"})).done();
    vm.expect("tick=");
    Husk::new(["snapshot", "verify"]).arg(&directory).wait().code(0);
}

/// Whoever ends it, it ends once, with the code of that; everybody is answered or hung up on.
#[test]
fn a07_several_ends_at_once() {
    if is_husks_alone("A7") {
        return;
    }
    for _ in 0..5 {
        let vm = Husk::guest("hello", "how=hang").listening().start();
        vm.expect("how=hang");
        let kill = json!({"action_type": "Kill"}).to_string();
        let replies = race(8, |n| {
            let request =
                if n % 2 == 0 { ("PUT", "/actions", &*kill) } else { ("GET", "/wait", "") };
            let reply = vm.api().try_request(request, PATIENCE);
            (n % 2, reply.map(|reply| reply.status).ok())
        });
        println!("A7: {replies:?}");
        assert!(replies.contains(&(0, Some(204))), "{replies:?}");
        // Refused, if it was too late; hung up on, if it was later than that.
        assert!(replies.iter().all(|(_, status)| matches!(status, None | Some(200 | 204 | 400))));
        let end = vm.wait().code(0);
        assert!(!end.errors.contains("panicked"), "{end}");
    }
}
