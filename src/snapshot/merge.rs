//! A snapshot by itself made of one of what has changed, and of those that it goes over.
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;

use super::document::Document;
use super::extent::checksum;
use super::files::Files;
use super::format::StateFile;
use super::layers;
use super::params::SnapshotParams;
use super::{Extent, Image, Kind, SnapshotError};

/// Bytes of a page.
const PAGE: usize = 4096;

impl Image {
    /// Writes it to another place, all of it. It is the same snapshot: what goes over this one may go over
    /// that.
    pub fn merge(&self, target: &SnapshotParams) -> Result<(), SnapshotError> {
        let place = target.place()?;
        let id = &self.document.id;
        let path = place.memory(id);
        if path.exists() {
            let why = format!("{} is there already: name another", path.display());
            return Err(SnapshotError::Field { field: "output", why });
        }
        let mut files = Files::create(place, id, self.document.memory.len, target.sync)?;
        let extents = self.write_memory(files.memory());
        let extents = extents.map_err(SnapshotError::file("cannot write", &path))?;
        let mut document = Document::clone(&self.document);
        document.memory.file = files.memory_name();
        document.memory.parent = None;
        layers::write(&mut files, &mut document.machine, &AtomicBool::new(false))?;
        let json = serde_json::to_vec(&document).map_err(SnapshotError::Document)?;
        files.commit(&StateFile::encode(&json, &extents))
    }

    /// Writes what of the memory is not zero.
    fn write_memory(&self, to: &std::fs::File) -> std::io::Result<Vec<Extent>> {
        let mut extents = Vec::new();
        let mut bytes = Vec::new();
        for found in self.memory.extents.iter() {
            bytes.resize(usize::try_from(found.len).unwrap_or(0), 0);
            self.memory.read(found.start, &mut bytes)?;
            let is_full = |page: &[u8]| page.iter().any(|byte| *byte != 0);
            let Some(first) = bytes.chunks(PAGE).position(is_full) else { continue };
            let last = bytes.chunks(PAGE).rposition(is_full).unwrap_or(first);
            for (n, page) in bytes.chunks(PAGE).enumerate().filter(|(_, page)| is_full(page)) {
                to.write_all_at(page, found.start + (n * PAGE) as u64)?;
            }
            let start = found.start + (first * PAGE) as u64;
            let kept = &bytes[first * PAGE..(last + 1) * PAGE];
            let len = u32::try_from(kept.len()).unwrap_or(Extent::LEN_MAX);
            let (kind, sum) = (Kind::Plain, checksum(kept));
            extents.push(Extent { start, len, kind, at: start, stored: len, sum });
        }
        Ok(extents)
    }
}
