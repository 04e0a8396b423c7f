//! The API thread: accepts connections, makes room for new ones, and goes when the VM has.
use std::cell::{Cell, OnceCell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
#[cfg(fuzzing)]
use std::io::Read as _;
use std::os::unix::net::UnixListener as StdListener;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use devices::backend::unix::{Listener, SocketName};
use devices::sys::again::{again, spawn};
use devices::sys::errand::Errands;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, oneshot};
use tokio::task::{AbortHandle, LocalSet, spawn_local};

use super::chime::{Chime, Ear};
use super::counters::RequestCounters;
use super::hangups::Hangups;
use super::http::{self, Api};
use super::route::{Routes, Section};
use super::stream::{Deadlines, Phase, Progress, Stream};
use crate::arrived::Room;
use crate::metrics;
use crate::request::Handle;
use crate::sandbox::{self, Role};

/// How a server behaves.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// `husk_api`; `fc_api` under the name `firecracker`.
    pub(crate) thread_name: String,
    /// What is counted of the API.
    pub(crate) counters: Arc<metrics::Counters>,
    /// The sections of the configuration.
    pub(crate) sections: Vec<Section>,
    /// At which level refusals are logged. To Firecracker they are errors; to husk they are the
    /// client's, which is told.
    pub(crate) refusals: log::Level,
    /// Largest body, in bytes.
    pub(crate) body_limit: usize,
    /// How long clients may take.
    pub(crate) deadlines: Deadlines,
    /// Connections at a time; one more and the oldest idle one goes.
    pub(crate) connections_max: usize,
    /// What there is of it for descriptors that come with requests.
    pub(crate) room: Room,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            thread_name: "husk_api".to_owned(),
            counters: Arc::default(),
            sections: Vec::new(),
            refusals: log::Level::Info,
            // Firecracker's.
            body_limit: 51200,
            deadlines: Deadlines {
                head: Duration::from_secs(5),
                body: Duration::from_secs(10),
                write: Duration::from_secs(10),
            },
            connections_max: 64,
            room: Room::of(None),
        }
    }
}

/// tokio and hyper need a fraction of this, and so does the JSON of a request but for the deepest that serde
/// reads, 128 levels, in a build without optimization. Pages not touched cost nothing.
const STACK_SIZE: usize = 2 << 20;
/// Largest head, and the size to which hyper's buffers grow.
const HEAD_LIMIT: usize = 16 << 10;
/// Readiness reports fetched at a time: tokio's default of 1024 takes 12 KiB.
const IO_EVENTS: usize = 64;
/// Before accepting again when the host refuses and there is nothing to give up.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A running API thread. Dropping it cuts every connection; see [`Server::shutdown`].
#[derive(Debug)]
pub(crate) struct Server {
    /// Removed while the socket still listens: see [`Listener`].
    name: Option<SocketName>,
    running: Option<(oneshot::Sender<Duration>, JoinHandle<()>)>,
}

impl Server {
    /// Starts the thread. It inherits the signal mask of this one.
    pub(crate) fn spawn(
        listener: Listener,
        handle: Handle,
        mut options: Options,
    ) -> io::Result<Self> {
        let mut builder = Builder::new_current_thread();
        builder.enable_io().enable_time().max_io_events_per_tick(IO_EVENTS);
        let runtime = again(|| builder.build())?;
        let (name, socket) = listener.into_parts();
        let chime = Chime::new()?;
        // What cannot be waited for is a refusal; on the thread nobody would hear of it.
        let ends = {
            let _inside = runtime.enter();
            let socket = again(|| UnixListener::from_std(StdListener::from(socket.try_clone()?)))?;
            Ends { socket, ear: chime.ear()?, chime, hangups: Hangups::new()? }
        };
        // Known before the thread is closed.
        let limit = getrlimit(Resource::Nofile).current;
        options.connections_max = connections_max(options.connections_max, limit);
        options.room = Room::of(limit);
        let (stop, stopped) = oneshot::channel();
        let name_of_thread = options.thread_name.clone();
        let builder = || std::thread::Builder::new().name(name_of_thread.clone());
        let thread = spawn(
            |work| builder().stack_size(STACK_SIZE).spawn(work),
            move || {
                sandbox::enter(Role::Api);
                run(&runtime, ends, handle, options, stopped);
            },
        )?;
        Ok(Self { name: Some(name), running: Some((stop, thread)) })
    }

    /// Removes the socket file and ends the thread. Clients that are owed a reply or the last lines
    /// of events get them, but not after `grace`. For those to be answered at all, the VMM's end of
    /// the requests, and its event sinks, must have answered or be dropped. `files` removes the file, if this thread
    /// may not.
    pub(crate) fn shutdown(mut self, grace: Duration, files: Option<&Errands>) {
        let name = self.name.take();
        match files {
            Some(files) => files.run(|| drop(name)),
            None => drop(name),
        }
        self.stop(grace);
    }

    fn stop(&mut self, grace: Duration) {
        let Some((stop, thread)) = self.running.take() else { return };
        drop(self.name.take());
        // Without a receiver the thread has ended already.
        let _ = stop.send(grace);
        if thread.join().is_err() {
            log::error!("the API thread has panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

/// What the thread waits for.
struct Ends {
    socket: UnixListener,
    ear: Ear,
    chime: Arc<Chime>,
    hangups: Hangups,
}

fn run(
    runtime: &Runtime,
    ends: Ends,
    handle: Handle,
    options: Options,
    stopped: oneshot::Receiver<Duration>,
) {
    let Ends { socket, ear, chime, hangups } = ends;
    let Options { deadlines, connections_max, ref room, .. } = options;
    let room = room.clone();
    let api = api(handle, chime.clone(), options);
    let connections = Rc::new(Connections::new(connections_max, room, hangups));
    let accept = accept(socket, api, deadlines, connections.clone());
    LocalSet::new().block_on(runtime, async {
        spawn_local(ear.listen());
        spawn_local(connections.clone().heed_hangups());
        let accepting = spawn_local(accept);
        log::info!("API server started.");
        let grace = chime.hear(stopped).await.unwrap_or_default();
        finish(&accepting.abort_handle(), &connections, grace).await;
    });
}

/// What connections have in common.
fn api(handle: Handle, chime: Arc<Chime>, options: Options) -> Rc<Api> {
    let Options { counters, sections, refusals, body_limit, .. } = options;
    let routes = Routes::new(sections);
    counters.requests.get_or_init(|| RequestCounters::new(&routes));
    Rc::new(Api {
        handle,
        chime,
        routes,
        counters,
        refusals,
        body_limit,
        document: OnceCell::new(),
    })
}

async fn finish(accepting: &AbortHandle, connections: &Connections, grace: Duration) {
    accepting.abort();
    connections.close();
    if tokio::time::timeout(grace, connections.gone()).await.is_err() {
        log::info!("API clients did not take their replies within {grace:?}");
    }
}

async fn accept(
    socket: UnixListener,
    api: Rc<Api>,
    deadlines: Deadlines,
    connections: Rc<Connections>,
) {
    loop {
        match socket.accept().await {
            Ok((stream, _)) => {
                connections.start(stream, &api, deadlines);
                // Let connections come and go one by one: a crowd takes no memory then.
                tokio::task::yield_now().await;
            }
            // Without a descriptor to be had accept4 fails whether somebody is there or not.
            Err(e) if is_short_of_resources(&e) && !is_anybody_there(&socket) => {
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            // One goes, and is gone when this task runs again; the one that waits gets its place.
            Err(e) if is_short_of_resources(&e) && connections.evict() => {
                tokio::task::yield_now().await;
            }
            Err(e) => {
                log::warn!("cannot accept an API connection: {e}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether a client waits to be accepted.
fn is_anybody_there(socket: &UnixListener) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())) != Ok(0)
}

fn is_short_of_resources(e: &io::Error) -> bool {
    let errno = Errno::from_io_error(e);
    errno.is_some_and(|e| [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM].contains(&e))
}

/// No more than `max`, and no more than leaves most of the process's descriptors to the VM.
fn connections_max(max: usize, limit: Option<u64>) -> usize {
    let share = limit.map_or(max, |count| usize::try_from(count / 4).unwrap_or(max));
    max.min(share).max(1)
}

/// The connections there are.
#[derive(Debug)]
struct Connections {
    entries: RefCell<Vec<Entry>>,
    hangups: Hangups,
    max: usize,
    room: Room,
    next_id: Cell<u64>,
    changed: Notify,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    progress: Rc<Progress>,
    task: AbortHandle,
}

impl Connections {
    fn new(max: usize, room: Room, hangups: Hangups) -> Self {
        let entries = RefCell::default();
        Self { entries, hangups, max, room, next_id: Cell::new(0), changed: Notify::new() }
    }

    fn start(self: &Rc<Self>, stream: UnixStream, api: &Rc<Api>, deadlines: Deadlines) {
        if self.entries.borrow().len() >= self.max {
            self.evict();
        }
        let id = self.next_id.replace(self.next_id.get().wrapping_add(1));
        let progress = Rc::new(Progress::new(deadlines, self.room.clone()));
        if let Err(e) = self.hangups.watch(&stream, id) {
            log::warn!("an API client that hangs up while it waits will not be noticed: {e}");
        }
        let leave = Leave { connections: self.clone(), id };
        let connection = converse(stream, api.clone(), progress.clone(), leave);
        let task = spawn_local(connection).abort_handle();
        self.entries.borrow_mut().push(Entry { id, progress, task });
    }

    /// Drops the connection that is worth least: one that no reply is owed to, the one that has
    /// been so for longest; failing that, one that waits for the VM's end or events; failing that,
    /// any. Returns whether there was one.
    fn evict(&self) -> bool {
        let mut entries = self.entries.borrow_mut();
        let worth = |entry: &Entry| match entry.progress.phase() {
            Phase::Serving => 2,
            Phase::Waiting => 1,
            _ => 0,
        };
        let least = entries
            .iter()
            .enumerate()
            .min_by_key(|(_, entry)| (worth(entry), entry.progress.since()))
            .map(|(index, _)| index);
        let Some(index) = least else { return false };
        let entry = entries.swap_remove(index);
        log::info!("API connection closed to make room: it was {:?}", entry.progress.phase());
        entry.task.abort();
        true
    }

    /// Tells connections whose client is gone, for ever.
    async fn heed_hangups(self: Rc<Self>) {
        // It fails when the runtime ends, and this with it.
        while let Ok(gone) = self.hangups.next().await {
            for entry in self.entries.borrow().iter().filter(|entry| gone.contains(&entry.id)) {
                entry.progress.hang_up();
            }
        }
    }

    /// Ends connections, those that are owed a reply after it.
    fn close(&self) {
        for entry in self.entries.borrow().iter() {
            if entry.progress.is_busy() {
                entry.progress.close();
            } else {
                entry.task.abort();
            }
        }
    }

    async fn gone(&self) {
        while !self.entries.borrow().is_empty() {
            self.changed.notified().await;
        }
    }
}

/// Takes a connection off the list when its task ends, however it does.
struct Leave {
    connections: Rc<Connections>,
    id: u64,
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.connections.entries.borrow_mut().retain(|entry| entry.id != self.id);
        self.connections.changed.notify_one();
    }
}

/// Serves one connection until its end or its deadline.
async fn converse(stream: UnixStream, api: Rc<Api>, progress: Rc<Progress>, _leave: Leave) {
    let io = TokioIo::new(Stream::new(stream, progress.clone()));
    let service = service_fn(|request| http::serve(api.clone(), progress.clone(), request));
    let mut connection = pin!(
        http1::Builder::new()
            .auto_date_header(false)
            .title_case_headers(true)
            .max_buf_size(HEAD_LIMIT)
            .serve_connection(io, service)
    );
    let mut alarm = pin!(tokio::time::sleep(progress.deadlines().head));
    let mut is_closing = false;
    poll_fn(|cx| {
        if progress.poll_closing(cx) && !is_closing {
            is_closing = true;
            connection.as_mut().graceful_shutdown();
        }
        if let Poll::Ready(end) = connection.as_mut().poll(cx) {
            if let Err(e) = end {
                log::debug!("API connection: {e}");
            }
            return Poll::Ready(());
        }
        // Otherwise what was sent before is still heeded: who sends a request need not stay for the reply.
        if progress.is_hung_up() && progress.phase() == Phase::Waiting {
            return Poll::Ready(());
        }
        let Some(deadline) = progress.deadline() else { return Poll::Pending };
        if alarm.deadline() != deadline {
            alarm.as_mut().reset(deadline);
        }
        let is_over = alarm.as_mut().poll(cx);
        if is_over.is_ready() {
            log::info!("API connection dropped: the client took too long ({:?})", progress.phase());
        }
        is_over
    })
    .await;
}

/// A server without a thread and without a socket that listens, for one connection at a time.
#[cfg(fuzzing)]
pub(crate) struct ByHand {
    runtime: Runtime,
    api: Rc<Api>,
    connections: Rc<Connections>,
    deadlines: Deadlines,
}

#[cfg(fuzzing)]
impl ByHand {
    /// Rounds without a byte or a request after which nothing more will come.
    const QUIET: u32 = 8;

    pub(crate) fn new(handle: Handle, options: Options) -> io::Result<Self> {
        // So that each round looks at the socket.
        let runtime =
            Builder::new_current_thread().enable_io().enable_time().event_interval(1).build()?;
        let deadlines = options.deadlines;
        let hangups = {
            let _inside = runtime.enter();
            Hangups::new()?
        };
        let connections = Rc::new(Connections::new(1, options.room.clone(), hangups));
        let api = api(handle, Chime::new()?, options);
        Ok(Self { runtime, api, connections, deadlines })
    }

    /// What a client gets that sends each of `pieces` when all before has been seen, stops sending, and hangs up when
    /// nothing more comes. `serve` answers requests; whether there were any.
    pub(crate) fn converse(&self, pieces: &[&[u8]], mut serve: impl FnMut() -> bool) -> Vec<u8> {
        let Self { runtime, api, connections, deadlines } = self;
        let mut got = Vec::new();
        LocalSet::new().block_on(runtime, async {
            let (client, server) = UnixStream::pair().expect("there are descriptors");
            spawn_local(api.chime.ear().expect("there are descriptors").listen());
            spawn_local(connections.clone().heed_hangups());
            connections.start(server, api, *deadlines);
            let mut pieces = pieces.iter();
            let mut piece: &[u8] = &[];
            let mut quiet = 0;
            while quiet < Self::QUIET && !connections.entries.borrow().is_empty() {
                quiet += 1;
                tokio::task::yield_now().await;
                if let Ok(count) = client.try_write(piece) {
                    piece = &piece[count..];
                    quiet = if count > 0 { 0 } else { quiet };
                }
                if piece.is_empty() && quiet > 2 {
                    match pieces.next() {
                        Some(next) => (piece, quiet) = (next, 0),
                        None => {
                            let _ = rustix::net::shutdown(&client, rustix::net::Shutdown::Write);
                        }
                    }
                }
                let mut bytes = [0; 4096];
                if let Ok(count) = client.try_read(&mut bytes)
                    && count > 0
                {
                    got.extend_from_slice(&bytes[..count]);
                    quiet = 0;
                }
                if serve() {
                    quiet = 0;
                }
            }
            // What a server has sent that has hung up; another has been quiet for long enough.
            let mut client = client.into_std().expect("it is a socket");
            let rest = client.read_to_end(&mut got);
            assert!(!rest.is_err_and(|e| e.kind() != io::ErrorKind::WouldBlock), "the end is read");
            drop(client);
            serve();
            let gone = tokio::time::timeout(Duration::from_secs(1), connections.gone()).await;
            assert!(gone.is_ok(), "a connection outlives its client");
        });
        got
    }
}
