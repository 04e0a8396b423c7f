//! The VMM thread in its sandbox: closed before the guest runs. What needs paths from then on is done by the one
//! thread that may use them, while this one waits for it.
use std::path::{Path, PathBuf};

use devices::backend::file::parent;
use devices::backend::passed::is_descriptor;
use devices::sys::errand::Errands;
use devices::virtio;
use serde_json::Value;

use super::Controller;
use crate::config::{SerialTo, VmConfig};
use crate::error::{Refusal, chain};
use crate::request::{Request, Respond};
use crate::sandbox::{self, Prepared, Role};

/// Whether the VMM thread is closed, and who does what it may not.
#[derive(Debug, Default)]
pub(super) struct Confinement {
    is_closed: bool,
    /// There if something may need paths. Away while it works.
    files: Option<Errands>,
    /// The API's socket, which is removed in the end.
    socket: Option<PathBuf>,
}

impl Request {
    /// Whether it may need paths: to open files, or to remove sockets of what ends.
    fn may_need_paths(&self) -> bool {
        match self {
            Self::Put { .. }
            | Self::Patch { .. }
            | Self::Delete { .. }
            | Self::Launch { .. }
            | Self::Start
            | Self::Snapshot(_)
            | Self::Load(_)
            | Self::Restore(_)
            | Self::Rewind(_)
            | Self::Record
            | Self::Fork(_)
            | Self::Freeze(_)
            | Self::Kill
            | Self::Quit => true,
            Self::Get { .. }
            | Self::Pause
            | Self::Resume
            | Self::Shutdown
            | Self::CtrlAltDel
            | Self::FlushMetrics
            | Self::Metrics
            | Self::Metadata
            | Self::PutMetadata { .. }
            | Self::PatchMetadata { .. }
            | Self::Describe
            | Self::Config
            | Self::Wait
            | Self::Subscribe(_) => false,
        }
    }
}

/// Whether the host denied access to something. By its words: not every refusal keeps the error that it is of.
fn is_denied(e: &Refusal) -> bool {
    let said = chain(e);
    [libc::EACCES, libc::EXDEV]
        .map(|errno| std::io::Error::from_raw_os_error(errno).to_string())
        .iter()
        .any(|words| said.contains(words))
}

/// Refuses a change of a device that names something by its path.
fn check_no_path(section: &str, body: &[u8]) -> Result<(), Refusal> {
    let Some(row) = virtio::model(section) else { return Ok(()) };
    // What is no JSON is refused by whoever reads it.
    let Ok(body) = serde_json::from_slice::<Value>(body) else { return Ok(()) };
    let is_path = |field: &&str| body[*field].as_str().is_some_and(|name| !is_descriptor(name));
    match row.openable.iter().copied().find(is_path) {
        Some(field) => Err(Refusal::ByPath { section: row.name, field }),
        None => Ok(()),
    }
}

impl Controller {
    /// Does `work` where paths may be used: on the thread that may, once this one may not.
    pub(crate) fn with_paths<R: Send>(&mut self, work: impl FnOnce(&mut Self) -> R + Send) -> R {
        match self.confinement.files.take() {
            None => work(self),
            Some(files) => {
                let given = files.run(|| work(self));
                self.confinement.files = Some(files);
                given
            }
        }
    }

    /// The same, for a request that may need paths.
    pub(super) fn with_paths_if_needed<R: Send>(
        &mut self,
        request: Request,
        work: impl FnOnce(&mut Self, Request) -> R + Send,
    ) -> R {
        match request.may_need_paths() {
            true => self.with_paths(|this| work(this, request)),
            false => work(self, request),
        }
    }

    /// Says where the API's socket is, which is removed in the end.
    pub(crate) fn set_socket(&mut self, path: PathBuf) {
        self.confinement.socket = Some(path);
    }

    /// Refuses what needs paths of a VM that is live, where nothing may be opened by path any more.
    pub(super) fn check_paths(&self, request: &Request) -> Result<(), Refusal> {
        if !self.confinement.is_closed || !sandbox::opens_nothing() || self.ending().is_some() {
            return Ok(());
        }
        let needs = |what| Err(Refusal::NeedsPaths(what));
        match request {
            Request::Snapshot(_) => needs("a snapshot is written to files"),
            Request::Load(_) => needs("a VM that takes another's place is opened anew"),
            Request::Rewind(_) => needs("which pages the guest has written is read in /proc"),
            Request::Record => needs("which pages the guest has touched is read in /proc"),
            Request::Fork(_) => needs("children open what they are made of"),
            Request::Patch { section, body, .. } => check_no_path(section, body),
            _ => Ok(()),
        }
    }

    /// Says of a refusal for want of access that it may be the sandbox's.
    pub(super) fn explain(&self, respond: Respond) -> Respond {
        if !self.confinement.is_closed || !sandbox::has_roots() {
            return respond;
        }
        Box::new(|reply| {
            respond(reply.map_err(|e| match is_denied(&e) {
                true => Refusal::OutOfReach(Box::new(e)),
                false => e,
            }));
        })
    }

    /// Ends the VMM's side, and gives the thread that may use paths, for what is to be removed after it.
    pub(crate) fn into_files(mut self) -> Option<Errands> {
        let files = self.confinement.files.take();
        // What makes children is ended by this thread: the other may not send signals out of its sandbox.
        let nursery = self.nursery.take();
        match &files {
            None => drop(self),
            Some(files) => files.run(|| drop(self)),
        }
        if let Some(nursery) = nursery {
            nursery.end();
        }
        files
    }

    /// Closes this thread, whose guest is about to run for the first time: from here on nothing is opened that is not
    /// asked for. `config` is what runs; `noted` is where it is to be noted which pages the guest touches, if it is.
    pub(super) fn close_sandbox(
        &mut self,
        config: &VmConfig,
        noted: Option<PathBuf>,
    ) -> Result<(), Refusal> {
        if self.confinement.is_closed || !sandbox::is_on() {
            return Ok(());
        }
        let removable = self.directories(config);
        let usable: Vec<_> = noted.iter().map(|path| parent(path).to_owned()).collect();
        if !removable.is_empty() || !usable.is_empty() {
            let prepared = Prepared::new(&removable, &usable)
                .map_err(Refusal::host("cannot close the thread that uses paths"))?;
            let files = Errands::spawn(self.instance.names.files, || prepared.enter());
            self.confinement.files =
                Some(files.map_err(Refusal::host("cannot start the thread that uses paths"))?);
        }
        sandbox::close_inherited(&config.named_descriptors());
        sandbox::enter(Role::Main);
        self.confinement.is_closed = true;
        Ok(())
    }

    /// Where husk removes sockets of its own when the VM ends.
    fn directories(&self, config: &VmConfig) -> Vec<PathBuf> {
        let api = self.confinement.socket.clone();
        let devices = config.devices().filter_map(|recipe| recipe.listens_at().map(Path::to_owned));
        let serial = match config.serial_to() {
            SerialTo::Socket(path) => Some(path),
            _ => None,
        };
        let sockets = devices.chain(api).chain(serial);
        sockets.map(|socket| parent(&socket).to_owned()).collect()
    }
}
