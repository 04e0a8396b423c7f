//! `husk ctl`: the API from a shell.
use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::{fail, print};
use crate::api::client::{Client, Patience};
use crate::exit::ExitCode;
use crate::logger;

/// Ask a husk that listens on a socket.
#[derive(Args, Debug)]
pub(super) struct CtlArgs {
    /// The Unix socket that husk listens on
    #[arg(long, value_name = "SOCKET")]
    api_sock: PathBuf,
    /// Print JSON as it comes
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Verb {
    /// Show what the VM is doing
    Status,
    /// Show the whole configuration
    Config,
    /// Start what is configured
    Start,
    /// Stop the guest where it is
    Pause,
    /// Let it go on
    Resume,
    /// Press the power button
    Shutdown,
    /// Press Ctrl-Alt-Del
    CtrlAltDel,
    /// End the VM at once
    Kill,
    /// Wait until the VM has ended, and say why
    Wait,
    /// Show state changes as they happen
    Events,
}

impl CtlArgs {
    pub(super) fn carry_out(self) -> ExitCode {
        let client = Client::new(&self.api_sock);
        let action = |name: &str| Some(format!(r#"{{"action_type": "{name}"}}"#));
        let state = |name: &str| Some(format!(r#"{{"state": "{name}"}}"#));
        let (method, path, body) = match self.verb {
            Verb::Status => ("GET", "/", None),
            Verb::Config => ("GET", "/vm/config", None),
            Verb::Start => ("PUT", "/actions", action("InstanceStart")),
            Verb::Pause => ("PATCH", "/vm", state("Paused")),
            Verb::Resume => ("PATCH", "/vm", state("Resumed")),
            Verb::Shutdown => ("PUT", "/actions", action("Shutdown")),
            Verb::CtrlAltDel => ("PUT", "/actions", action("SendCtrlAltDel")),
            Verb::Kill => ("PUT", "/actions", action("Kill")),
            Verb::Wait => ("GET", "/wait", None),
            Verb::Events => return follow(&client),
        };
        let patience =
            if matches!(self.verb, Verb::Wait) { Patience::Endless } else { Patience::Normal };
        match client.call(method, path, body.as_deref().map(str::as_bytes), patience) {
            Err(e) => fail(ExitCode::Host, &e),
            Ok(answer) if !answer.is_success() => {
                logger::complain(&answer.fault());
                ExitCode::Config
            }
            Ok(answer) if answer.body.is_empty() => ExitCode::Clean,
            Ok(answer) if self.json => print(&[&answer.body[..], b"\n"].concat()),
            Ok(answer) => show(&answer.body),
        }
    }
}

fn follow(client: &Client) -> ExitCode {
    let followed = client.follow("/events", |line| match print(format!("{line}\n").as_bytes()) {
        ExitCode::Clean => ControlFlow::Continue(()),
        _ => ControlFlow::Break(()),
    });
    match followed {
        Ok(Some(answer)) => {
            logger::complain(&answer.fault());
            ExitCode::Config
        }
        Ok(None) => ExitCode::Clean,
        Err(e) => fail(ExitCode::Host, &e),
    }
}

/// Prints flat objects as a table, the rest as indented JSON.
fn show(body: &[u8]) -> ExitCode {
    let Ok(value) = serde_json::from_slice::<Value>(body) else { return print(body) };
    let is_flat = |v: &Value| !v.is_object() && !v.is_array();
    let text = match value.as_object() {
        Some(fields) if fields.values().all(is_flat) => {
            let width = fields.keys().map(String::len).max().unwrap_or(0);
            let line = |(key, value): (&String, &Value)| match value {
                Value::String(text) => format!("{key:width$}  {text}\n"),
                other => format!("{key:width$}  {other}\n"),
            };
            fields.iter().map(line).collect()
        }
        _ => format!("{value:#}\n"),
    };
    print(text.as_bytes())
}
