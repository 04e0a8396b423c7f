//! A snapshot by itself made of one of what has changed, and of those that it goes over.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arch::layout;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::retry_on_intr;

use super::document::Document;
use super::extent::checksum;
use super::files::Files;
use super::format::StateFile;
use super::layers;
use super::params::SnapshotParams;
use super::{Compression, Extent, Image, Kind, Packer, SnapshotError};

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
        let compression = target.compression;
        let len = if compression.is_none() { self.document.memory.len } else { 0 };
        let mut files = Files::create(place, id, len, target.sync)?;
        let mut document = Document::clone(&self.document);
        let extents = self.as_saved().and_then(|image| match compression {
            Compression::None => image.write_memory(files.memory()),
            _ => image.pack_memory(files.memory(), compression),
        });
        let extents = extents.map_err(SnapshotError::file("cannot write", &path))?;
        document.memory.compression = compression;
        document.memory.id_at = if compression.is_none() { layout::SNAPSHOT_ID } else { 0 };
        document.memory.file = files.memory_name();
        document.memory.parent = None;
        layers::write(&mut files, &mut document.machine, &AtomicBool::new(false))?;
        let json = serde_json::to_vec(&document).map_err(SnapshotError::Document)?;
        files.commit(&StateFile::encode(&json, &extents))
    }

    /// The same, with what a file has and memory that is frozen where it is has not: the snapshot's id, and nothing where
    /// the payload is, which is for one VM alone.
    fn as_saved(&self) -> std::io::Result<Self> {
        if self.own.is_some() {
            return Ok(self.clone());
        }
        let id = u128::from_str_radix(&self.document.id, 16).map_err(std::io::Error::other)?;
        let mut page = [0; PAGE];
        let id_page = layout::SNAPSHOT_ID / PAGE as u64 * PAGE as u64;
        self.memory.read(id_page, &mut page)?;
        let file = File::from(retry_on_intr(|| memfd_create("husk-patch", MemfdFlags::CLOEXEC))?);
        file.write_all_at(&page, id_page)?;
        file.write_all_at(&id.to_be_bytes(), layout::SNAPSHOT_ID)?;
        let place = |start, len: u64, kind| {
            let len = u32::try_from(len).map_err(std::io::Error::other)?;
            std::io::Result::Ok(Extent { start, len, kind, at: start, stored: len, sum: 0 })
        };
        let over = [
            place(id_page, PAGE as u64, Kind::Plain)?,
            place(layout::PAYLOAD, layout::PAYLOAD_LEN, Kind::Zero)?,
        ];
        Ok(Self { memory: self.memory.with(&Arc::new(file), &over), ..self.clone() })
    }

    /// Writes what of the memory is not zero, compressed.
    fn pack_memory(&self, to: &File, compression: Compression) -> std::io::Result<Vec<Extent>> {
        let id = u128::from_str_radix(&self.document.id, 16).map_err(std::io::Error::other)?;
        let mut packer = Packer::begin(to, compression, &id.to_be_bytes())?;
        let mut extents = Vec::new();
        self.each_piece(|start, kept| {
            extents.push(packer.add(start, kept)?);
            Ok(())
        })?;
        Ok(extents)
    }

    /// Writes what of the memory is not zero.
    fn write_memory(&self, to: &File) -> std::io::Result<Vec<Extent>> {
        let mut extents = Vec::new();
        self.each_piece(|start, kept| {
            for (n, page) in kept.chunks(PAGE).enumerate().filter(|(_, page)| is_full(page)) {
                to.write_all_at(page, start + (n * PAGE) as u64)?;
            }
            let len = u32::try_from(kept.len()).unwrap_or(Extent::LEN_MAX);
            let (kind, sum) = (Kind::Plain, checksum(kept));
            extents.push(Extent { start, len, kind, at: start, stored: len, sum });
            Ok(())
        })?;
        Ok(extents)
    }

    /// Gives `take` each piece that is not all zero: its place, and it from its first page to its last that are not.
    fn each_piece(
        &self,
        mut take: impl FnMut(u64, &[u8]) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        for found in self.memory.extents.iter() {
            bytes.resize(usize::try_from(found.len).unwrap_or(0), 0);
            self.memory.read(found.start, &mut bytes)?;
            let Some(first) = bytes.chunks(PAGE).position(is_full) else { continue };
            let last = bytes.chunks(PAGE).rposition(is_full).unwrap_or(first);
            take(found.start + (first * PAGE) as u64, &bytes[first * PAGE..(last + 1) * PAGE])?;
        }
        Ok(())
    }
}

fn is_full(page: &[u8]) -> bool {
    page.iter().any(|byte| *byte != 0)
}
