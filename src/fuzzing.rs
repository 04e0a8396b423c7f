//! What fuzzing needs of this crate besides its interface. Only there with `--cfg fuzzing`: tests/fuzz.
use std::path::PathBuf;

use arch::GuestRam;
use serde_json::json;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::api::{ByHand, Options};
use crate::config::sections;
use crate::error::Refusal;
use crate::events::{Hub, What};
use crate::request::{Call, Reply, Request, Requests, Respond};
use crate::snapshot::{Decompressor, Image, Kind, Named, Noted, Overrides};
use crate::{VmConfig, memory};

/// The API's server, and in the VMM's place a configuration that never becomes a VM.
pub struct Api {
    server: ByHand,
    requests: Requests,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

impl Default for Api {
    fn default() -> Self {
        Self::new()
    }
}

impl Api {
    /// A server at which nobody is.
    pub fn new() -> Self {
        let (handle, requests) = Requests::channel().expect("there are descriptors");
        let options = Options { sections: sections().collect(), ..Options::default() };
        let server = ByHand::new(handle, options).expect("there are descriptors");
        Self { server, requests }
    }

    /// What a client gets that sends each of `pieces` after all before has been seen, and how many requests it
    /// made.
    pub fn converse(&self, pieces: &[&[u8]]) -> (Vec<u8>, usize) {
        let mut vmm = Vmm::default();
        let mut count = 0;
        let got = self.server.converse(pieces, || {
            let before = count;
            while let Some(call) = self.requests.next() {
                count += 1;
                vmm.answer(call);
            }
            if count == before {
                // Who waits for the end has it now.
                return vmm.end();
            }
            true
        });
        (got, count)
    }
}

/// Answers as before the start.
struct Vmm {
    config: VmConfig,
    hub: Hub,
    waiting: Vec<Respond>,
}

impl Default for Vmm {
    fn default() -> Self {
        let hub = Hub::new(std::time::Instant::now());
        Self { config: VmConfig::default(), hub, waiting: Vec::new() }
    }
}

impl Vmm {
    fn answer(&mut self, Call { request, respond, .. }: Call) {
        let info =
            || json!({"id": "f", "state": "Not started", "app_name": "husk", "vmm_version": "0"});
        let null = |()| serde_json::Value::Null;
        let reply: Reply = match request {
            Request::Put { section, id, body } => {
                self.config.put(&section, id.as_deref(), &body).map(null)
            }
            Request::Patch { section, body, .. } => self.config.patch(&section, &body).map(null),
            Request::Get { section } => self.config.show(&section),
            Request::Launch { body } => self.config.put_all(&body).map(null),
            Request::Config => Ok(self.config.to_json()),
            Request::Describe => Ok(info()),
            Request::Subscribe(sink) => {
                self.hub.subscribe(sink);
                self.hub.publish(What::Paused);
                Ok(info())
            }
            Request::Wait => return self.waiting.push(respond),
            Request::Metrics => Ok("# no metrics".into()),
            Request::PutMetadata { data } | Request::PatchMetadata { patch: data } => Ok(data),
            _ => Err(Refusal::NotStarted),
        };
        respond(reply);
    }

    /// Nobody waits any more; whether somebody did.
    fn end(&mut self) -> bool {
        let had_any = !self.waiting.is_empty();
        self.waiting.drain(..).for_each(|respond| respond(Err(Refusal::Gone)));
        had_any
    }
}

/// What opening a snapshot in a directory comes to; and if it can be opened, what the rest of a restore comes to that
/// needs no KVM: its working set, its configuration, and its memory. With `verifies`, which takes its time, all of the
/// memory is read.
pub fn restore(directory: PathBuf, verifies: bool) -> Result<(), String> {
    let text = |e: &dyn std::error::Error| e.to_string();
    // People may look at what no host can restore.
    let _ = Named::new(directory.clone(), None).inspect();
    let image = Image::open(directory).map_err(|e| text(&e))?;
    if let Some(set) = Noted::find(&image).and_then(Noted::read) {
        let len = image.document.memory.len;
        assert!(set.0.iter().all(|run| run.range.start < run.range.end && run.range.end <= len));
    }
    let is_whole = if verifies { image.verify() } else { Ok(()) };
    let config = image.config(&Overrides::default()).map_err(|e| text(&e))?;
    let ram = memory::map(&config.machine, config.sharing(), Some(&image.memory))
        .map_err(|e| text(&e))?;
    image.check_memory(&ram).map_err(|e| text(&e))?;
    if verifies {
        touch(&ram.guest);
    }
    is_whole.map_err(|e| text(&e))
}

/// Reads from each page of memory that is small, else from the ends of it.
fn touch(ram: &GuestRam) {
    const SMALL: u64 = 8 << 20;
    for region in ram.iter() {
        let (start, len) = (region.start_addr().0, region.len());
        let step = if len <= SMALL { 4096 } else { len - 4096 };
        for at in (0..len).step_by(usize::try_from(step.max(1)).unwrap_or(usize::MAX)) {
            ram.read_obj::<u8>(GuestAddress(start + at)).expect("it is RAM");
        }
    }
}

/// What a memory file that is compressed has in the place of an extent of `len` bytes, if `stored` is such: for sums
/// that are right.
pub fn decompress(kind: u32, stored: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut content = vec![0; len];
    let kind = match kind {
        2 => Kind::Lz4,
        3 => Kind::Zstd,
        _ => return None,
    };
    Decompressor::new().decompress(kind, stored, &mut content).then_some(content)
}
