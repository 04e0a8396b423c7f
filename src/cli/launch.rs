//! Bringing a VM up in this process: signals, socket, threads; and seeing it off.
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use devices::backend::file::is_shortage;
use devices::backend::unix::{Listener, StalePolicy};
use devices::sys::{heap, stack};
use devices::virtio::model::{ID_LEN_MAX, is_id};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::ClockId;

use super::flags::number;
use crate::api::{self, Server};
use crate::arrived::Arrived;
use crate::bell::Bell;
use crate::config::{self, VmConfig};
use crate::controller::{Controller, Instance};
use crate::error::{Refusal, chain};
use crate::exit::{Ending, ExitCode};
use crate::fork::{Household, Nursery};
use crate::machine::ThreadNames;
use crate::metrics::{self, micros_since};
use crate::request::{Call, Reply, Request, Requests};
use crate::sandbox::{self, Wanted};
use crate::signals::ProcessSignals;
use crate::vmm;

/// Firecracker's limit on the body of a request.
pub(super) const BODY_LIMIT: usize = 51200;
/// How long clients that are owed a last reply may take to read it.
const LAST_WORDS: Duration = Duration::from_millis(400);

/// Most requests that are told that they came too late; clients that go on asking must not keep us.
const LATE: usize = 1024;

/// Whose manners to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Husk,
    Firecracker,
}

/// A socket to listen on.
#[derive(Debug)]
pub(super) struct Api {
    pub(super) path: PathBuf,
    pub(super) body_limit: usize,
}

/// All that makes a process with a VM in it.
#[derive(Debug)]
pub(super) struct Launch {
    pub(super) config: VmConfig,
    /// What is asked before anybody else can ask: to start, or to restore.
    pub(super) first: Option<Request>,
    pub(super) api: Option<Api>,
    pub(super) id: String,
    pub(super) style: Style,
    pub(super) timing: Timing,
    /// The guest's metadata from a file.
    pub(super) metadata: Option<PathBuf>,
    pub(super) sandbox: Sandbox,
}

/// How the process is confined.
#[derive(Debug)]
pub(super) enum Sandbox {
    /// As is said.
    Wanted(Wanted),
    /// As the process is that it was forked from: it has what that had.
    AsParent,
}

/// When the process was started, as whoever started it says: microseconds of the monotonic clock, of
/// processor time, and the processor time that came before.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(super) struct Timing {
    /// Process start time (monotonic clock, microseconds)
    #[arg(long, value_name = "US", allow_negative_numbers = true, value_parser = number::<u64>)]
    start_time_us: Option<u64>,
    /// Process start CPU time (microseconds)
    #[arg(long, value_name = "US", allow_negative_numbers = true, value_parser = number::<u64>)]
    start_time_cpu_us: Option<u64>,
    /// Parent process CPU time (microseconds)
    #[arg(long, value_name = "US", allow_negative_numbers = true, value_parser = number::<u64>)]
    parent_cpu_time_us: Option<u64>,
}

impl Timing {
    /// Says in the metrics how long it has taken until now.
    fn report(self, started: Instant, counters: &metrics::ApiServer) {
        let now_us = |clock| {
            let now = rustix::time::clock_gettime(clock);
            u64::try_from(now.tv_sec * 1_000_000 + now.tv_nsec / 1000).unwrap_or_default()
        };
        let wall_us = match self.start_time_us {
            Some(start) => now_us(ClockId::Monotonic).saturating_sub(start),
            None => micros_since(started),
        };
        let cpu_us = now_us(ClockId::ProcessCPUTime)
            .saturating_sub(self.start_time_cpu_us.unwrap_or_default())
            .saturating_add(self.parent_cpu_time_us.unwrap_or_default());
        counters.process_startup_time_us().set(wall_us);
        counters.process_startup_time_cpu_us().set(cpu_us);
    }
}

/// A VM's id: what Firecracker allows, and the underscore.
pub(super) fn id(s: &str) -> Result<String, String> {
    match is_id(s) {
        true => Ok(s.into()),
        false => Err(format!("want 1 to {ID_LEN_MAX} letters, digits, '-' or '_'")),
    }
}

impl Launch {
    /// Runs the VM to its end; the exit code, which a line on standard error explains unless it is 0.
    pub(super) fn carry_out(self, started: Instant) -> Result<ExitCode, Refusal> {
        Ok(self.begin(started)?.run())
    }

    /// Brings the process up, and does what is to be done first.
    pub(super) fn begin(self, started: Instant) -> Result<Process, Refusal> {
        self.config.start_log()?;
        allow_descriptors();
        if let Sandbox::Wanted(wanted) = &self.sandbox {
            sandbox::begin(wanted)?;
        }
        let held = ProcessSignals::hold().map_err(Refusal::host("cannot block signals"))?;
        let listener = self.api.as_ref().map(|api| listen(api, self.style)).transpose()?;
        // Before there are threads, signals taken or much memory.
        let parent = listener.as_ref().zip(self.api.as_ref());
        let nursery = parent.filter(|_| !sandbox::opens_nothing()).map(|(listener, api)| {
            let household = Household {
                is_firecracker: self.style == Style::Firecracker,
                api_sock: api.path.clone(),
                body_limit: api.body_limit,
            };
            Nursery::begin(household, listener.name().file(), &held, super::child::live)
        });
        let nursery = nursery
            .transpose()
            .map_err(Refusal::host("cannot start the process that makes children"))?;
        let signals = ProcessSignals::take().map_err(Refusal::host("cannot take signals"))?;
        let quit = Bell::new().map(Arc::new).map_err(Refusal::host("cannot make an eventfd"))?;
        let quit_writer = quit.clone();
        let instance = Instance {
            id: self.id,
            names: self.style.thread_names(),
            started,
            counters: Arc::default(),
            tells_more: self.style == Style::Husk,
            quit: Arc::new(move || quit_writer.ring()),
            announce: |path| {
                crate::logger::complain(&format!("serial console: {}", path.display()));
            },
        };
        let counters = instance.counters.clone();
        self.timing.report(started, &counters.api_server);
        let mut controller = Controller::new(instance, self.config);
        controller.open_configured_metrics()?;
        if let Some(path) = &self.metadata {
            let metadata = VmConfig::read_metadata(path)?;
            controller
                .put_metadata(metadata)
                .map_err(|why| Refusal::ConfigFile { path: path.clone(), why: Box::new(why) })?;
            log::info!("Successfully added metadata to mmds from file");
        }
        if let Some(api) = &self.api {
            controller.set_socket(api.path.clone());
        }
        if let Some(nursery) = nursery {
            controller.set_nursery(nursery);
        }
        let (handle, requests) = Requests::channel()?;
        let server = listener
            .zip(self.api)
            .map(|(listener, api)| serve_api(listener, &api, &handle, counters, self.style));
        let server = server.transpose()?;
        if let Some(request) = self.first {
            let started = controller.answer_now(request).map(drop);
            if self.style == Style::Firecracker {
                tell_of_start(&started);
            }
            started?;
        }
        Ok(Process { controller, requests, quit, signals, server })
    }
}

/// A process that is up.
#[derive(Debug)]
pub(super) struct Process {
    controller: Controller,
    requests: Requests,
    quit: Arc<Bell>,
    signals: ProcessSignals,
    server: Option<Server>,
}

impl Process {
    /// Asks what can be answered at once.
    pub(super) fn ask(&mut self, request: Request) -> Reply {
        self.controller.answer_now(request)
    }

    /// Runs the VM to its end; the exit code, which a line on standard error explains unless it is 0.
    pub(super) fn run(self) -> ExitCode {
        let mut this = self;
        // Arguments, their descriptions, the configuration's text: read, and of no use to a guest.
        heap::give_back();
        stack::give_back();
        let Self { controller, requests, quit, signals, .. } = &mut this;
        let ending = vmm::serve(controller, requests, quit, signals);
        this.leave();
        report(&ending)
    }

    /// Ends the VM, if it is there, and the API.
    pub(super) fn leave(self) {
        let Self { mut controller, requests, server, .. } = self;
        // What was asked too late is told so, before the socket goes.
        for call in std::iter::from_fn(|| requests.next()).take(LATE) {
            controller.answer(call);
        }
        let files = controller.into_files();
        // What is asked from here on is refused at once rather than waited for.
        drop(requests);
        if let Some(server) = server {
            server.shutdown(LAST_WORDS, files.as_ref());
        }
    }
}

/// Allows this process as many descriptors as it may allow itself: each stream of a vsock device is one.
fn allow_descriptors() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        log::debug!("cannot raise the limit on descriptors: {e}");
    }
}

/// Tells the log how the machine of a configuration file starts, in Firecracker's words.
fn tell_of_start(started: &Result<(), Refusal>) {
    match started {
        Ok(()) => {
            log::info!("Successfully started microvm that was configured from one single json");
        }
        Err(e) => log::error!("Building VMM configured from cmdline json failed: {e}"),
    }
}

fn listen(api: &Api, style: Style) -> Result<Listener, Refusal> {
    let stale = match style {
        Style::Husk => StalePolicy::Replace,
        Style::Firecracker => StalePolicy::Fail,
    };
    api::bind(&api.path, stale).map_err(|e| match is_shortage(&e) {
        true => Refusal::host("the API")(std::io::Error::other(chain(&e))),
        false => Refusal::Socket(chain(&e)),
    })
}

fn serve_api(
    listener: Listener,
    api: &Api,
    handle: &crate::Handle,
    counters: Arc<metrics::Counters>,
    style: Style,
) -> Result<Server, Refusal> {
    log::info!("Listening on API socket ({:?}).", api.path);
    let options = api::Options {
        thread_name: style.thread_names().api.to_owned(),
        counters,
        sections: config::sections().collect(),
        refusals: match style {
            Style::Husk => log::Level::Info,
            Style::Firecracker => log::Level::Error,
        },
        body_limit: api.body_limit,
        ..api::Options::default()
    };
    let server = Server::spawn(listener, handle.clone(), options)
        .map_err(Refusal::host("cannot start the API thread"))?;
    // From here on whatever is asked for may keep this thread waiting.
    ProcessSignals::leave_to_others().map_err(Refusal::host("cannot block signals"))?;
    Ok(server)
}

/// Silence for a clean end, one line for any other.
fn report(ending: &Ending) -> ExitCode {
    let code = ending.exit_code();
    if code != ExitCode::Clean {
        crate::logger::complain(&ending.to_string());
    }
    code
}

impl Style {
    /// Firecracker's thread names are looked for by tools.
    fn thread_names(self) -> ThreadNames {
        match self {
            Self::Husk => ThreadNames {
                io: "husk_io",
                vcpu: "husk_vcpu ",
                api: "husk_api",
                files: "husk_files",
            },
            Self::Firecracker => {
                ThreadNames { io: "fc_io", vcpu: "fc_vcpu ", api: "fc_api", files: "fc_files" }
            }
        }
    }
}

impl Controller {
    /// Does what can be done at once.
    fn answer_now(&mut self, request: Request) -> Reply {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let respond = Box::new(move |reply| drop(sender.send(reply)));
        self.answer(Call { request, arrived: Arrived::default(), respond });
        receiver.recv().unwrap_or(Err(Refusal::Gone))
    }
}
