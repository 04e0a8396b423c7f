//! The log, as it is configured. `crate::logger` writes it.
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Refusal;

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// Failures.
    Error,
    /// What may become one.
    Warning,
    /// What happens.
    #[default]
    Info,
    /// How.
    Debug,
    /// Every step.
    Trace,
}

impl std::str::FromStr for LogLevel {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.to_ascii_lowercase().as_str() {
            "off" => Ok(Self::Off),
            "error" => Ok(Self::Error),
            "warn" | "warning" => Ok(Self::Warning),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(format!(
                "unknown variant `{s}`, expected one of `Off`, `Trace`, `Debug`, `Info`, `Warning`, \
                 `Error`"
            )),
        }
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The log: `PUT /logger`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoggerConfig {
    /// How much; any case.
    #[serde(default)]
    pub level: Option<LogLevel>,
    /// A file or FIFO; standard error (or output, as `firecracker`) if there is none.
    #[serde(default)]
    pub log_path: Option<PathBuf>,
    /// Whether lines show their level.
    #[serde(default)]
    pub show_level: Option<bool>,
    /// Whether lines show the place in the source.
    #[serde(default)]
    pub show_log_origin: Option<bool>,
    /// Only lines of modules whose path starts so.
    #[serde(default)]
    pub module: Option<String>,
}

impl LoggerConfig {
    /// What is given replaces what was: the log is changed, not made anew.
    pub(super) fn merge(&mut self, given: Self) {
        let Self { level, log_path, show_level, show_log_origin, module } = given;
        self.level = level.or(self.level);
        self.log_path = log_path.or(self.log_path.take());
        self.show_level = show_level.or(self.show_level);
        self.show_log_origin = show_log_origin.or(self.show_log_origin);
        self.module = module.or(self.module.take());
    }

    /// Refuses a file that cannot be written to, and does not make it.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        let refuse = |why| Refusal::Field { section: "logger", field: "log_path", why };
        self.log_path.as_deref().map_or(Ok(()), crate::logger::check).map_err(refuse)
    }
}
