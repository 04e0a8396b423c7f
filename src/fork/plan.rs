//! The configuration of each child: its parent's, with what names the outside replaced. Refuses what a
//! child cannot have because its parent has it, or a sibling, before anything is made.
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use devices::virtio::model::Claim;
use devices::virtio::{model::is_id, vsock};
use serde_json::{Value, json};

use super::{ChildOverrides, ForkError, ForkParams, Spec};
use crate::config::{SerialTo, VmConfig};
use crate::parts;
use crate::snapshot::{Overrides, forget_passed};

/// What children are the children of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parent<'a> {
    pub(crate) config: &'a VmConfig,
    pub(crate) id: &'a str,
    /// Where it listens, if it does.
    pub(crate) api_sock: Option<&'a Path>,
    /// How many children it has had.
    pub(crate) children: u64,
}

/// What each child is to be.
pub(crate) fn plan(parent: Parent<'_>, params: &ForkParams) -> Result<Vec<Spec>, ForkError> {
    let count = params.count()?;
    check_parent(parent.config)?;
    let mut saved = parent.config.to_json();
    // No child has what was passed to its parent.
    forget_passed(&mut saved);
    let order: Vec<_> = parent.config.devices().map(|d| (d.model(), d.id())).collect();
    let mut taken = host_claims(parent.config);
    let mut ids = BTreeSet::new();
    (0..count)
        .map(|index| {
            let ChildOverrides { api_sock, overrides } = params.of(index);
            let number = parent.children + index as u64 + 1;
            let mut config = saved.clone();
            overrides.apply(&mut config).map_err(|e| ForkError::child(index, &e))?;
            part_from(parent.config, &saved, &mut config, number);
            let child =
                VmConfig::restored(&config, &order).map_err(|e| ForkError::child(index, &e))?;
            if overrides.name_boot_files() {
                parts::open_boot(&child).map_err(|e| ForkError::child(index, &e))?;
            }
            let id = overrides.id.unwrap_or_else(|| format!("{}-{number}", parent.id));
            if !is_id(&id) {
                let why = format!("id: '{id}' is too long: give one by an override");
                return Err(ForkError::Child { number: index, why });
            }
            if !ids.insert(id.clone()) {
                let why = format!("id: '{id}' is that of another child");
                return Err(ForkError::Child { number: index, why });
            }
            claim(index, &child, &mut taken)?;
            let api_sock = api_sock.or_else(|| parent.api_sock.map(|path| numbered(path, number)));
            let ForkParams { paused: is_paused, end_with_parent: ends_with_parent, .. } = *params;
            let Overrides { mmds, payload, .. } = overrides;
            Ok(Spec { id, api_sock, config, mmds, payload, is_paused, ends_with_parent })
        })
        .collect()
}

/// Refuses a VM of which no copy can be made.
fn check_parent(config: &VmConfig) -> Result<(), ForkError> {
    for device in config.devices() {
        let (model, id) = (device.model(), device.id());
        if device.needs_shared_memory() {
            let why = format!("{model} {id} is served by another process, which has its memory");
            return Err(ForkError::Unforkable(why));
        }
    }
    Ok(())
}

/// Gives a child places of its own where the parent's can be followed by another. The serial port
/// leads nowhere: what it led to is the parent's.
fn part_from(parent: &VmConfig, saved: &Value, config: &mut Value, number: u64) {
    if config["serial"] == saved["serial"] && parent.serial_to() != SerialTo::Pty {
        config["serial"]["serial_out_path"] = Value::Null;
        config["serial"]["to"] = json!(SerialTo::None);
    }
    let name = <vsock::Vsock as devices::virtio::model::Model>::NAME;
    let path = &mut config[name]["uds_path"];
    if *path == saved[name]["uds_path"]
        && let Some(own) = path.as_str().map(|path| numbered(Path::new(path), number))
    {
        *path = json!(own);
    }
    // Indexing has made an object of what there is not.
    if saved[name].is_null() {
        config[name] = Value::Null;
    }
}

fn numbered(path: &Path, number: u64) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// What no other VM may have either.
fn host_claims(config: &VmConfig) -> Vec<Claim> {
    config.devices().flat_map(|device| device.claims()).filter(|claim| claim.is_of_host).collect()
}

/// Adds what a child has, unless it is taken.
fn claim(index: usize, child: &VmConfig, taken: &mut Vec<Claim>) -> Result<(), ForkError> {
    for device in child.devices() {
        for claim in device.claims().into_iter().filter(|claim| claim.is_of_host) {
            if let Some(refusal) = claim.against(taken) {
                let (model, id) = (device.model(), device.id());
                let why = format!(
                    "{model} {id}: {refusal}: its parent or a sibling has it; give each its own by \
                     an override"
                );
                return Err(ForkError::Child { number: index, why });
            }
        }
    }
    taken.extend(host_claims(child));
    Ok(())
}
