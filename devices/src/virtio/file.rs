//! What devices over a file of the host have in common: how it is claimed, and how a file that will
//! not do is refused.
use std::path::Path;

use super::model::{Claim, DeviceError};
use crate::backend::disk::{self, DiskError};
use crate::backend::file::{self, Access};

/// The field that names the file.
const FIELD: &str = "path_on_host";

/// What no other device of the VM may have: the file at `path`. `None` if there is no such file.
pub(super) fn claim(path: &Path, access: Access) -> Option<Claim> {
    let identity = disk::identity(&file::metadata(path).ok()?);
    Some(Claim {
        key: format!("file {identity:?}"),
        is_shared: access == Access::Read,
        is_of_host: true,
        refusal: refused(DiskError::InUse(path.into())),
    })
}

/// The path is what the user can change, whatever is wrong with the file.
pub(super) fn refused(e: DiskError) -> DeviceError {
    let is_shortage = file::is_shortage(&e);
    let why = match &e {
        DiskError::Host { source, .. } => format!("{e}: {source}"),
        e => e.to_string(),
    };
    match is_shortage {
        true => DeviceError::host(FIELD)(std::io::Error::other(why)),
        false => DeviceError::field(FIELD, why),
    }
}
