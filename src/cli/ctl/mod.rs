//! `husk ctl`: the API from a shell.
//!
//! ```text
//!  verbs.rs   THE TABLE: words to method and path
//!  body.rs    words to a request's body
//!  pass.rs    words to descriptors that come with it
//!  table.rs   a reply to a table
//! ```
mod body;
mod pass;
mod table;
mod verbs;

use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, Subcommand};
use serde_json::Value;

use self::pass::PassArg;
use self::verbs::{Body, GROUPS, Group, Reply, VERBS, Verb};
use super::{fail, print};
use crate::api::client::{Answer, Ask, Client, Patience};
use crate::exit::ExitCode;
use crate::logger;

/// Ask a husk that listens on a socket.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct CtlArgs {
    /// The Unix socket that husk listens on
    #[arg(long, value_name = "SOCKET")]
    api_sock: PathBuf,
    /// Print JSON as it comes, not tables
    #[arg(long, global = true)]
    json: bool,
    /// Open FILE (',ro': to read only), 'tap=NAME' or 'fd=N' here, and pass it with the request: 'passed:0' in the BODY is
    /// the first of them, 'passed:1' the next
    #[arg(long, value_name = "FILE", global = true)]
    pass: Vec<PassArg>,
    #[command(subcommand)]
    call: Call,
}

const EXAMPLES: &str = "\
A BODY is JSON, @FILE, - (standard input), or FIELD=VALUE ... where FIELD may be a.b.

Examples:
  husk ctl --api-sock husk.sock status
  husk ctl --api-sock husk.sock boot set kernel_image_path=vmlinux boot_args=console=ttyS0
  husk ctl --api-sock husk.sock drive set root path_on_host=root.ext4 is_root_device=true
  husk ctl --api-sock husk.sock drive update root path_on_host=passed:0 --pass other.ext4
  husk ctl --api-sock husk.sock launch @vm.json
  husk ctl --api-sock husk.sock snapshot snapshots/warm
  husk ctl --api-sock husk.sock fork 3 paused=true
  husk ctl --api-sock husk.sock --json get /vm/config

Exit codes: 0 done, 2 wrong arguments, 3 husk refused, 4 no answer.";

/// A verb and its arguments.
#[derive(Clone, Debug)]
struct Call {
    verb: &'static Verb,
    /// With the id in it.
    path: String,
    id: Option<String>,
    words: Vec<String>,
}

impl Subcommand for Call {
    fn augment_subcommands(command: Command) -> Command {
        let groups = GROUPS.iter().map(|group| {
            let command = Command::new(group.name).about(group.about).visible_aliases(group.alias);
            command.subcommand_required(true).subcommands(group.verbs.iter().map(describe))
        });
        command
            .subcommand_required(true)
            .subcommands(VERBS.iter().map(describe))
            .subcommands(groups)
    }

    fn augment_subcommands_for_update(command: Command) -> Command {
        Self::augment_subcommands(command)
    }

    fn has_subcommand(name: &str) -> bool {
        VERBS.iter().any(|verb| verb.name == name) || GROUPS.iter().any(|group| group.name == name)
    }
}

fn describe(verb: &'static Verb) -> Command {
    let mut command = Command::new(verb.name).about(verb.about);
    if verb.path.is_empty() {
        let path = Arg::new("path").value_name("PATH").required(true).value_parser(path);
        command = command.arg(path.help("The path: /vm/config"));
    } else if verb.path.contains("{id}") {
        let id = Arg::new("id").value_name("ID").required(true).value_parser(segment);
        command = command.arg(id.help("The device's id"));
    }
    let body = Arg::new("body").num_args(0..);
    match verb.body {
        Body::None | Body::Fixed(_) => command,
        Body::Words | Body::Said | Body::WithId(_) => command.arg(
            body.value_name("BODY").help("JSON, @FILE, - (standard input), or FIELD=VALUE ..."),
        ),
        Body::Count(_) => command.arg(body.value_name("N").help(
            "How many, one by default, then FIELD=VALUE ...; or JSON, @FILE, - (standard input)",
        )),
        Body::In(_) => command.arg(body.value_name("DIR").required(true).help(
            "The directory as husk sees it, then FIELD=VALUE ...; or JSON, @FILE, - (standard input)",
        )),
    }
}

/// What can stand in a request's line, a slash in front.
fn path(text: &str) -> Result<String, String> {
    match text.bytes().all(|byte| byte.is_ascii_graphic()) {
        true if text.starts_with('/') => Ok(text.to_owned()),
        true => Ok(format!("/{text}")),
        false => Err("a path has no spaces and no letters beyond ASCII".to_owned()),
    }
}

fn segment(text: &str) -> Result<String, String> {
    match path(text) {
        Ok(_) if !text.is_empty() && !text.contains(['/', '?', '#']) => Ok(text.to_owned()),
        _ => Err("an id has letters, digits, underscores and hyphens".to_owned()),
    }
}

impl FromArgMatches for Call {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let named = |verbs: &'static [Verb], name: &str| verbs.iter().find(|v| v.name == name);
        let found = matches.subcommand().and_then(|(name, matches)| {
            let is_it = |group: &&Group| group.name == name;
            match GROUPS.iter().find(is_it) {
                None => Some((named(VERBS, name)?, matches)),
                Some(group) => {
                    let (name, matches) = matches.subcommand()?;
                    Some((named(group.verbs, name)?, matches))
                }
            }
        });
        let (verb, matches) =
            found.ok_or_else(|| clap::Error::raw(ErrorKind::MissingSubcommand, "no verb"))?;
        let one = |name: &str| matches.try_get_one::<String>(name).ok().flatten().cloned();
        let words = matches.try_get_many::<String>("body").ok().flatten();
        let id = one("id");
        let path = match (one("path"), &id) {
            (Some(path), _) => path,
            (None, Some(id)) => verb.path.replace("{id}", id),
            (None, None) => verb.path.to_owned(),
        };
        Ok(Self { verb, path, id, words: words.into_iter().flatten().cloned().collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Call {
    fn body(&self) -> Result<Option<Vec<u8>>, body::BodyError> {
        Ok(match self.verb.body {
            Body::None => None,
            Body::Fixed(text) => Some(text.as_bytes().to_vec()),
            Body::Said if self.words.is_empty() => None,
            Body::Words | Body::Said => Some(body::read(&self.words)?),
            Body::WithId(field) => {
                let id = self.id.as_deref().unwrap_or_default();
                Some(body::with_id(body::read(&self.words)?, field, id))
            }
            Body::In(field) => Some(body::read(&body::named(field, &self.words))?),
            Body::Count(field) => Some(body::read(&body::counted(field, &self.words))?),
        })
    }
}

impl CtlArgs {
    pub(super) fn carry_out(self) -> ExitCode {
        let Self { api_sock, json, pass, call } = self;
        let client = Client::new(&api_sock);
        let patience = match call.verb.reply {
            Reply::Followed => return follow(&client, &call.path, json),
            Reply::Awaited => Patience::Endless,
            Reply::Shown | Reply::Listed => Patience::Normal,
        };
        let body = match call.body() {
            Ok(body) => body,
            Err(e) => return fail(ExitCode::Usage, &e),
        };
        let passed: Result<Vec<_>, _> = pass.iter().map(PassArg::open).collect();
        let passed = match passed {
            Ok(passed) => passed,
            Err(e) => return fail(ExitCode::Usage, &e),
        };
        let request = Ask { body: body.as_deref(), passed: &passed };
        match client.call(call.verb.method, &call.path, request, patience) {
            Err(e) => fail(ExitCode::Host, &e),
            Ok(answer) if !answer.is_success() => refused(&answer),
            Ok(answer) if answer.body.is_empty() => ExitCode::Clean,
            Ok(answer) => show(&answer.body, json, call.verb.reply),
        }
    }
}

fn refused(answer: &Answer) -> ExitCode {
    logger::complain(&answer.fault());
    ExitCode::Config
}

fn follow(client: &Client, path: &str, json: bool) -> ExitCode {
    let mut printed = ExitCode::Clean;
    let followed = client.follow(path, |line| {
        let text = if json { line.to_owned() } else { table::event(line) };
        printed = print(format!("{text}\n").as_bytes());
        match printed {
            ExitCode::Clean => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    });
    match followed {
        Ok(Some(answer)) => refused(&answer),
        Ok(None) => printed,
        Err(e) => fail(ExitCode::Host, &e),
    }
}

/// Prints a reply; what is not JSON as it comes.
fn show(body: &[u8], json: bool, reply: Reply) -> ExitCode {
    let text = match serde_json::from_slice::<Value>(body) {
        Err(_) => return print(body),
        Ok(_) if json => return print(&[body, b"\n"].concat()),
        Ok(document) if reply == Reply::Listed => table::endpoints(&document),
        Ok(value) => table::render(&value),
    };
    print(text.as_bytes())
}
