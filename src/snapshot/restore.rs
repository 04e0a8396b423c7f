//! How a VM goes on from a snapshot.
use std::path::{Path, PathBuf};

use arch::Clock;
use devices::virtio::model::DeviceError;

use super::{Image, LoadParams, Overrides, SnapshotError};
use crate::config::{HugePages, VmConfig};
use crate::error::Refusal;
use crate::parts;

/// What goes on, and how.
#[derive(Clone, Debug)]
pub struct Restore {
    /// The snapshot.
    pub image: Image,
    /// What is to be different.
    pub overrides: Overrides,
    /// Whether the guest stands still until it is resumed.
    pub is_paused: bool,
    /// Whether KVM remembers the pages that the guest writes.
    pub track_dirty_pages: bool,
    /// Whether the guest's clock shows the time that has passed since the snapshot; else it goes on.
    pub clock_realtime: bool,
    /// After how many milliseconds the pages that the guest has touched are noted beside the snapshot, for
    /// restores to come.
    pub record_ms: Option<u64>,
    /// Whether the guest takes every page itself, though it is known which it needs first.
    pub ignores_working_set: bool,
    /// Which pages back guest RAM, if not those that the snapshot says.
    pub huge_pages: Option<HugePages>,
    /// The socket of a process that serves guest RAM in place of the image, by userfaultfd(2).
    pub handler: Option<PathBuf>,
}

impl Restore {
    /// The VM as it was, going on at once.
    pub fn new(image: &Image) -> Self {
        Self {
            image: image.clone(),
            overrides: Overrides::default(),
            is_paused: false,
            track_dirty_pages: false,
            clock_realtime: false,
            record_ms: None,
            ignores_working_set: false,
            huge_pages: None,
            handler: None,
        }
    }

    /// Opens what a request names.
    pub(crate) fn open(params: &LoadParams) -> Result<Self, Refusal> {
        Ok(Self {
            image: Image::load(params)?,
            overrides: params.overrides(),
            is_paused: !params.resume_vm,
            track_dirty_pages: params.track_dirty_pages || params.enable_diff_snapshots,
            clock_realtime: params.clock_realtime,
            record_ms: params.record_ms,
            ignores_working_set: params.ignore_working_set,
            huge_pages: params.huge_pages.into(),
            handler: params.handler().map(Path::to_owned),
        })
    }

    /// The configuration of the VM that goes on. What is of the process is not in it.
    pub(crate) fn config(&self) -> Result<VmConfig, Refusal> {
        if self.handler.is_some() && !self.image.document.memory.plugged.is_empty() {
            let why = "Uffd serves RAM, and this snapshot has memory that is plugged".into();
            return Err(SnapshotError::Field { field: "mem_backend", why }.into());
        }
        if self.record_ms.is_some() && self.image.working_set_path().is_none() {
            let why = "what is touched is noted beside a memory file, and there is none".into();
            return Err(SnapshotError::Field { field: "record_ms", why }.into());
        }
        let mut config = self.image.config(&self.overrides)?;
        // One that was saved may be gone: then the guest's own reset ends the VM. One that is named is wanted.
        if self.overrides.name_boot_files() {
            parts::open_boot(&config)?;
        }
        // What another process serves cannot be frozen in place; it is copied.
        config.machine.forkable &= self.handler.is_none();
        config.payload.clone_from(&self.overrides.payload);
        config.machine.track_dirty_pages = self.track_dirty_pages;
        config.machine.huge_pages = self.huge_pages.unwrap_or(config.machine.huge_pages);
        Ok(config)
    }

    /// Says of what is refused, if it is not the overrides that ask for it, what to do about it.
    pub(crate) fn explain(&self, refusal: Refusal) -> Refusal {
        match &refusal {
            Refusal::Device { source: DeviceError::Saved(_), .. } => refusal,
            Refusal::Device { section, id, .. } if self.overrides.could_name(section, id) => {
                Refusal::AsSaved(Box::new(refusal))
            }
            _ => refusal,
        }
    }

    /// Whether pages are to be there before the guest asks. Not while it is noted which it asks for.
    pub(crate) fn prefaults(&self) -> bool {
        !self.ignores_working_set && self.record_ms.is_none()
    }

    /// What the guest's clock does.
    pub(crate) fn clock(&self) -> Clock {
        if self.clock_realtime { Clock::CatchesUp } else { Clock::GoesOn }
    }
}
