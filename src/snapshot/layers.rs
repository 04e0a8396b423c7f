//! What drives have written, beside the memory: of each a file, which its description in the state tells from others.
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use devices::backend::overlay::{Description, Frozen};
use devices::backend::passed::is_descriptor;
use serde::{Deserialize, Serialize};

use super::SnapshotError;
use super::document::{DeviceState, MachineState};
use super::files::Files;
use devices::backend::file::parent;

/// What a state says of such a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerDocument {
    /// Its name, in the directory that the state file is in.
    pub(crate) file: PathBuf,
    #[serde(flatten)]
    pub(crate) layer: Description,
}

/// Writes what the devices of a machine have written, unless that is called off; how many bytes.
pub(super) fn write(
    files: &mut Files,
    machine: &mut MachineState,
    is_off: &AtomicBool,
) -> Result<u64, SnapshotError> {
    let mut bytes: u64 = 0;
    for device in &mut machine.devices {
        let Some(frozen) = device.state.files() else { continue };
        let (name, file) = files.add(&format!("overlay-{}", device.id))?;
        let written = frozen.write_to(file, || is_off.load(Ordering::Acquire));
        let layer = written.map_err(SnapshotError::file("cannot write", &name))?;
        bytes = bytes.saturating_add(frozen.bytes());
        device.layer = Some(LayerDocument { file: name, layer });
    }
    Ok(bytes)
}

/// Opens the files beside the state file at `state`.
pub(super) fn open(state: &Path, machine: &mut MachineState) -> Result<(), SnapshotError> {
    for device in &mut machine.devices {
        match &device.layer {
            Some(_) if is_descriptor(state) => {
                let why = format!(
                    "what {} {} has written is beside the state file: name that by its path",
                    device.model, device.id
                );
                return Err(SnapshotError::Field { field: "snapshot_path", why });
            }
            Some(LayerDocument { layer, .. }) => {
                let frozen = Frozen::open(&path(state, device)?, layer)?;
                device.state.set_files(frozen);
            }
            None if device.state.wants_files() => {
                let DeviceState { model, id, .. } = device;
                let why = format!("it does not say where what {model} {id} had written is");
                return Err(SnapshotError::Inconsistent(why));
            }
            None => {}
        }
    }
    Ok(())
}

/// Sums up what is in the files; the first that is not what was written.
pub(super) fn find_damage(machine: &MachineState) -> Result<(), SnapshotError> {
    for device in &machine.devices {
        let (Some(document), Some(frozen)) = (&device.layer, device.state.files()) else {
            continue;
        };
        let path = &document.file;
        let is_right = frozen.verify(&document.layer);
        if !is_right.map_err(SnapshotError::file("cannot read", path))? {
            let why = "checksum: its data are not what was saved".into();
            return Err(SnapshotError::Memory { path: path.clone(), why });
        }
    }
    Ok(())
}

/// Where the file is, whose name must not lead elsewhere.
fn path(state: &Path, device: &DeviceState) -> Result<PathBuf, SnapshotError> {
    let name = device.layer.as_ref().map(|layer| &*layer.file);
    let name = name.filter(|name| name.file_name().is_some_and(|file| file == name.as_os_str()));
    let name = name.ok_or_else(|| {
        SnapshotError::Inconsistent(format!("the file of {} is elsewhere", device.id))
    })?;
    Ok(parent(state).join(name))
}
