//! A child of another husk: a process that came to be by fork(2), restores its VM, and is a husk like
//! any other from then on.
use std::path::PathBuf;
use std::time::Instant;

use super::fail;
use super::launch::{Api, Launch, Process, Sandbox, Style, Timing};
use crate::config::VmConfig;
use crate::error::{Refusal, chain};
use crate::exit::ExitCode;
use crate::fork::Newborn;
use crate::logger::{self, Stream};
use crate::request::Request;
use crate::snapshot::Restore;

/// Lives as the husk that `newborn` is to be; the exit code of its process.
pub(super) fn live(newborn: Newborn) -> ExitCode {
    let started = Instant::now();
    let (mut process, serial_path) = match begin(&newborn, started) {
        Ok(begun) => begun,
        Err(e) => {
            // The parent says it to whoever asked. If it is gone, nobody wants to know.
            let _ = newborn.report(Err(chain(&e)));
            return e.exit_code();
        }
    };
    if newborn.report(Ok(serial_path)).is_err() || !newborn.may_live() {
        // Nobody has seen it; `newborn` goes last, which is what the parent waits for.
        process.leave();
        return ExitCode::Clean;
    }
    let first =
        if newborn.spec.is_paused { Ok(()) } else { process.ask(Request::Resume).map(drop) };
    drop(newborn);
    match first {
        Ok(()) => process.run(),
        Err(e) => fail(e.exit_code(), &e),
    }
}

/// A process whose guest stands still where its parent's was, and what leads to its serial port.
fn begin(newborn: &Newborn, started: Instant) -> Result<(Process, Option<PathBuf>), Refusal> {
    let Newborn { household, defaults, logger, spec, image, .. } = newborn;
    let instance = household.is_firecracker.then(|| spec.id.clone());
    // Standard output is the serial port's, which the child does not have.
    logger::init(logger.level.unwrap_or_default(), Stream::Error, instance);
    logger::configure(logger)?;
    let mut restore = Restore::new(image);
    restore.is_paused = true;
    restore.overrides.mmds.clone_from(&spec.mmds);
    restore.overrides.payload.clone_from(&spec.payload);
    let mut config = VmConfig::default();
    config.defaults.clone_from(defaults);
    let api = spec.api_sock.clone().map(|path| Api { path, body_limit: household.body_limit });
    let style = if household.is_firecracker { Style::Firecracker } else { Style::Husk };
    let launch = Launch {
        config,
        first: Some(Request::Restore(Box::new(restore))),
        api,
        id: spec.id.clone(),
        style,
        timing: Timing::default(),
        metadata: None,
        sandbox: Sandbox::AsParent,
    };
    let mut process = launch.begin(started)?;
    let info = process.ask(Request::Describe)?;
    let serial_path = info["serial_path"].as_str().map(PathBuf::from);
    Ok((process, serial_path))
}
