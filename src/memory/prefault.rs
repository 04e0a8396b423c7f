//! Has the pages that a restored VM touches first there before it touches them: a thread takes them while the
//! guest runs already. Which they are was seen of an earlier restore.
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use devices::memory::Behind;
use rustix::fs::Advice as FileAdvice;
use rustix::mm::Advice;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Ram;
use super::pagemap::{PageMap, Touch};
use crate::snapshot::{TouchedRun, WorkingSet};

/// Bytes taken at once: between two of them the thread can be stopped.
const STEP: u64 = 2 << 20;

/// A thread that takes pages. Dropping this stops it, which must be before the memory goes.
#[derive(Debug)]
pub(crate) struct Prefault {
    stops: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Prefault {
    fn drop(&mut self) {
        self.stops.store(true, Ordering::Relaxed);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that takes pages panicked");
        }
    }
}

/// A region of RAM that is an image's: where it is in the image, and in this process.
#[derive(Clone, Debug)]
struct Mapped {
    image: Range<u64>,
    host: u64,
}

impl Ram {
    /// The pages of the image that this VM has touched since it was restored. `None` of memory that is no
    /// image's: then nothing is known of it.
    pub(crate) fn touched(&self) -> io::Result<Option<WorkingSet>> {
        let mapped = self.mapped();
        if mapped.is_empty() {
            return Ok(None);
        }
        let map = PageMap::open()?;
        let mut set = WorkingSet::default();
        for Mapped { image, host } in mapped {
            for run in map.touched(host..host + (image.end - image.start))? {
                let at = |addr: u64| image.start + (addr - host);
                let range = at(run.range.start)..at(run.range.end);
                set.0.push(TouchedRun { range, is_written: run.touch == Touch::Written });
            }
        }
        Ok(Some(set))
    }

    /// Begins to take the pages that `find` gives, which may take its time too.
    pub(crate) fn prefault(&mut self, find: impl FnOnce() -> Option<WorkingSet> + Send + 'static) {
        let Some(file) = self.image.as_ref().map(|image| image.file.clone()) else { return };
        let (mapped, stops) = (self.mapped(), Arc::<AtomicBool>::default());
        let stop = stops.clone();
        let work = move || {
            if let Some(set) = find() {
                take(&set, &mapped, &file, &stop);
            }
        };
        match thread::Builder::new().name("husk_prefault".into()).spawn(work) {
            Ok(thread) => self.prefault = Some(Prefault { stops, thread: Some(thread) }),
            // The guest takes them itself then.
            Err(e) => log::warn!("cannot start the thread that takes pages: {e}"),
        }
    }

    fn mapped(&self) -> Vec<Mapped> {
        let mut start = 0;
        let mut mapped = Vec::new();
        for (region, backing) in self.all.iter().zip(&self.backings) {
            let end = start + region.len();
            if backing.behind() == Behind::Image {
                mapped.push(Mapped { image: start..end, host: region.host() });
            }
            start = end;
        }
        mapped
    }
}

fn take(set: &WorkingSet, mapped: &[Mapped], file: &File, stop: &AtomicBool) {
    let start = Instant::now();
    // Asked for first: the host's disk works on many at once, and in its own order.
    for TouchedRun { range, .. } in &set.0 {
        let len = std::num::NonZeroU64::new(range.end - range.start);
        // Advice again: what the host makes of it is its business.
        let _ = rustix::fs::fadvise(file, range.start, len, FileAdvice::WillNeed);
        if stop.load(Ordering::Relaxed) {
            return;
        }
    }
    for TouchedRun { range, is_written } in &set.0 {
        let advice = match is_written {
            true => Advice::LinuxPopulateWrite,
            false => Advice::LinuxPopulateRead,
        };
        let place =
            mapped.iter().find(|m| m.image.start <= range.start && range.end <= m.image.end);
        let Some(Mapped { image, host }) = place else { continue };
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + STEP);
            if stop.load(Ordering::Relaxed) {
                return;
            }
            if let Err(e) = populate(host + (at - image.start), end - at, advice) {
                log::debug!("cannot take pages before the guest does: {e}");
                return;
            }
            at = end;
        }
    }
    let (kib, took) = (set.bytes() >> 10, start.elapsed());
    log::info!("took {kib} KiB that the guest touches first in {} us", took.as_micros());
}

fn populate(host: u64, len: u64, advice: Advice) -> io::Result<()> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    // SAFETY: the range is guest memory, which goes after this thread has ended; no contents change.
    unsafe { rustix::mm::madvise(host as *mut _, len, advice) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn takes_read_and_written_pages_apart_and_changes_nothing() {
        const PAGES: usize = 64;
        let fd = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        let contents: Vec<u8> = (0..PAGES * 4096).map(|n| u8::try_from(n % 251).unwrap()).collect();
        file.write_all(&contents).unwrap();
        let offset = Some(vm_memory::FileOffset::new(file.try_clone().unwrap(), 0));
        let (both, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        let region: vm_memory::MmapRegion =
            vm_memory::MmapRegion::build(offset, contents.len(), both, private).unwrap();
        let host = region.as_ptr().addr() as u64;
        let mapped = [Mapped { image: 0..contents.len() as u64, host }];
        let run = |first: u64, count: u64, is_written| TouchedRun {
            range: first * 4096..(first + count) * 4096,
            is_written,
        };
        let set = WorkingSet(vec![run(2, 3, true), run(40, 2, false), run(60, 40, true)]);
        let found = || {
            let pages = PageMap::open().unwrap().touched(host..host + PAGES as u64 * 4096).unwrap();
            let has = |n: u64, touch| {
                pages.iter().any(|run| run.touch == touch && run.range.contains(&(host + n * 4096)))
            };
            (
                has(2, Touch::Written),
                has(4, Touch::Written),
                has(5, Touch::Written),
                has(40, Touch::Read),
            )
        };
        take(&set, &mapped, &file, &AtomicBool::new(true));
        assert_eq!(found(), (false, false, false, false));
        take(&set, &mapped, &file, &AtomicBool::new(false));
        assert_eq!(found(), (true, true, false, true));
        let mut read = vec![0; contents.len()];
        vm_memory::VolatileMemory::as_volatile_slice(&region).copy_to(&mut read[..]);
        assert!(read == contents);
    }
}
