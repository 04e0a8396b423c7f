//! The metrics, as they are configured. `crate::metrics` writes them.
use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Refusal;

/// Firecracker's limits on what is repeated with every line.
const PROPERTIES_MAX: usize = 10;
const KEY_BYTES_MAX: usize = 64;
const VALUE_BYTES_MAX: usize = 512;

/// The metrics: `PUT /metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// A file, made if it is missing, or a FIFO, which nobody needs to read: one JSON object a line, at
    /// start, on request, every 60 seconds and at the end.
    pub metrics_path: PathBuf,
    /// Whether each line has the VM's id, under `id`.
    #[serde(default)]
    pub emit_id: bool,
    /// What each line has under `properties`: 10 at most, with keys of 64 bytes and values of 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}

impl MetricsConfig {
    /// Lines to `path`, without id and properties.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { metrics_path: path.into(), emit_id: false, properties: None }
    }

    /// Refuses what no line could have.
    pub(super) fn check_values(&self) -> Result<(), Refusal> {
        let Some(properties) = &self.properties else { return Ok(()) };
        let refuse = |why| Err(Refusal::Field { section: "metrics", field: "properties", why });
        if properties.len() > PROPERTIES_MAX {
            let count = properties.len();
            return refuse(format!(
                "Too many metrics properties: {count} (maximum is {PROPERTIES_MAX})."
            ));
        }
        if properties.keys().any(|key| key.len() > KEY_BYTES_MAX) {
            return refuse(format!(
                "A metrics property key exceeds the maximum length of {KEY_BYTES_MAX} bytes."
            ));
        }
        if properties.values().any(|value| value.len() > VALUE_BYTES_MAX) {
            return refuse(format!(
                "A metrics property value exceeds the maximum length of {VALUE_BYTES_MAX} bytes."
            ));
        }
        Ok(())
    }

    /// Refuses a file that cannot be written to, and does not make it.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        self.check_values()?;
        crate::logger::check(&self.metrics_path).map_err(Refusal::Metrics)
    }
}
