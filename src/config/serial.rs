//! The serial port.
use std::path::PathBuf;

use devices::backend::console::Console;
use devices::limiter::TokenBucket;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Refusal;

/// Where the serial port leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SerialTo {
    /// The terminal, or whatever husk's standard streams are.
    Stdio,
    /// A new pseudo-terminal, whose name is logged.
    Pty,
    /// Nowhere.
    None,
    /// A file or FIFO; output only.
    File(PathBuf),
    /// A Unix socket that husk listens on.
    Socket(PathBuf),
}

impl SerialTo {
    /// Refuses a place that the port cannot lead to, and leaves no trace there.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        match self {
            Self::Stdio | Self::Pty | Self::None => Ok(()),
            Self::File(path) => Console::check_file(path),
            Self::Socket(path) => Console::check_socket(path),
        }
        .map_err(Refusal::Console)
    }
}

impl std::str::FromStr for SerialTo {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once('=') {
            None if s == "stdio" => Ok(Self::Stdio),
            None if s == "pty" => Ok(Self::Pty),
            None if s == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err("want stdio, file=PATH, pty, socket=PATH or none".into()),
        }
    }
}

/// The serial port: `PUT /serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// A file or FIFO that output goes to.
    #[serde(default)]
    pub serial_out_path: Option<PathBuf>,
    /// How many bytes the guest may write. What goes beyond is lost, and counted.
    #[serde(default)]
    pub rate_limiter: Option<TokenBucket>,
    /// Where the port leads, in place of `serial_out_path`. husk only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<SerialTo>,
}

impl SerialConfig {
    pub(crate) fn check_values(&self) -> Result<(), Refusal> {
        let refuse =
            |field, why: &str| Err(Refusal::Field { section: "serial", field, why: why.into() });
        if self.serial_out_path.is_some() && self.to.is_some() {
            return refuse("to", "serial_out_path says the same: give one of them");
        }
        Ok(())
    }

    /// What [`Self::check_values`] refuses, and a place that the port cannot lead to.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        self.check_values()?;
        let file = self.serial_out_path.clone().map(SerialTo::File);
        self.to.clone().or(file).map_or(Ok(()), |to| to.check())
    }
}
