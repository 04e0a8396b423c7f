//! The configuration in a snapshot: what `GET /vm/config` showed, judged when it is opened rather than
//! when it is read, because what it names may be elsewhere now.
use devices::virtio;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{BOOT_SOURCE, MMDS_CONFIG, RATE_LIMIT_GROUPS, VmConfig, is_many, parse_device};
use crate::error::Refusal;
use crate::snapshot::SnapshotError;

impl VmConfig {
    /// What a snapshot holds of a configuration: not the log and the metrics, which are of the process.
    /// `order` says in which order the devices were attached.
    pub(crate) fn restored(saved: &Value, order: &[(&str, &str)]) -> Result<Self, Refusal> {
        let mut config = Self {
            boot_source: section(saved, BOOT_SOURCE)?,
            machine: section(saved, "machine-config")?,
            cpu_config: section(saved, "cpu-config")?,
            serial: section(saved, "serial")?,
            mmds: section(saved, MMDS_CONFIG)?,
            rate_limit_groups: section(saved, RATE_LIMIT_GROUPS)?,
            ..Self::default()
        };
        for row in virtio::MODELS {
            let one = std::slice::from_ref(&saved[row.name]);
            let all = match is_many(row.name) {
                true => saved[row.name].as_array().map_or(&[][..], |all| &all[..]),
                false => one,
            };
            for device in all.iter().filter(|device| !device.is_null()) {
                config.devices.push(parse_device(row.name, None, device.to_string().as_bytes())?);
            }
        }
        config.devices.sort_by_key(|recipe| {
            order.iter().position(|(model, id)| *model == recipe.model() && *id == recipe.id())
        });
        Ok(config)
    }
}

/// A section that is not a device, as it is by itself if it is not there.
fn section<T: DeserializeOwned + Default>(saved: &Value, name: &str) -> Result<T, SnapshotError> {
    match &saved[name] {
        Value::Null => Ok(T::default()),
        value => T::deserialize(value).map_err(SnapshotError::Document),
    }
}
