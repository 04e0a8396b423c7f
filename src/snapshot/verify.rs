//! All of a memory file against what its state file says of it: what no load reads by itself.
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::extent::checksum;
use super::image::{Own, Rest};
use super::{Extent, Image, Kind, SnapshotError};

/// Bytes read at once of what should be zero.
const PIECE: usize = Extent::LEN_MAX as usize;

impl Image {
    /// Reads all of the memory: what the state file has a sum of must have it, the rest must be zero; and
    /// so must that of the snapshots that it goes over. Of what others have merged into the file nobody has sums. An
    /// image in memory has no file that somebody else could have changed.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        let Some(own) = &self.own else { return Ok(()) };
        let wrong = |why: String| SnapshotError::Memory { path: own.path.clone(), why };
        let failed = SnapshotError::file("cannot read", &own.path);
        let len = self.document.memory.len;
        let damage = if own.is_unpacked { None } else { own.find_damage(len).map_err(failed)? };
        damage.map_or(Ok(()), |why| Err(wrong(why)))?;
        super::layers::find_damage(&self.document.machine)?;
        match &own.rest {
            Rest::Parent(parent) => parent.verify(),
            Rest::Zeroes | Rest::Merged => Ok(()),
        }
    }
}

impl Own {
    /// What is wrong with a file of `len` bytes, and where, if something is.
    fn find_damage(&self, len: u64) -> std::io::Result<Option<String>> {
        let file = &*self.file;
        let is_merged = matches!(self.rest, Rest::Merged);
        let find_stray = |at, end| match is_merged {
            true => Ok(None),
            false => find_data(file, at, end),
        };
        let mut end = 0;
        let mut bytes = Vec::new();
        for extent in self.extents.iter().filter(|extent| extent.kind != Kind::Zero) {
            if let Some(at) = find_stray(end, extent.start)? {
                return Ok(Some(stray(at)));
            }
            bytes.resize(usize::try_from(extent.len).unwrap_or(0), 0);
            file.read_exact_at(&mut bytes, extent.start)?;
            if checksum(&bytes) != extent.sum {
                let Extent { start, len, .. } = extent;
                let why = format!("checksum: the {len} bytes at {start:#x} are not what was saved");
                return Ok(Some(why));
            }
            end = extent.end();
        }
        Ok(find_stray(end, len)?.map(stray))
    }
}

fn stray(at: u64) -> String {
    format!("zeros: at {at:#x} there is something, where nothing was saved")
}

/// Where between two places of a file there is something other than zeros.
fn find_data(file: &File, mut at: u64, end: u64) -> std::io::Result<Option<u64>> {
    let mut piece = Vec::new();
    while at < end {
        at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // A hole up to its end; or a file system that does not know holes.
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL) => at,
            Err(e) => return Err(e.into()),
        };
        let len = end.saturating_sub(at).min(PIECE as u64);
        piece.resize(usize::try_from(len).map_err(|_| ErrorKind::InvalidInput)?, 0);
        file.read_exact_at(&mut piece, at)?;
        if let Some(offset) = piece.iter().position(|byte| *byte != 0) {
            return Ok(Some(at + offset as u64));
        }
        at += len;
    }
    Ok(None)
}
