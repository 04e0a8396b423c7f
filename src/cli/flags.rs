//! Flags as a table: for languages of a dozen words that are read once. What clap derives from a structure makes a few
//! hundred bytes of code for each.
use std::num::{IntErrorKind, ParseIntError};
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{NonEmptyStringValueParser, OsStringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Command};

/// A flag: its name, what its value is called if it has one, and what it means.
pub(super) type Flag = (&'static str, Option<&'static str>, &'static str);

/// Adds flags to a command, each of which may be given repeatedly as far as clap knows.
pub(super) fn add(command: Command, flags: &[Flag]) -> Command {
    flags.iter().fold(command, |command, (name, value, help)| {
        let arg = Arg::new(*name).long(*name).help(*help);
        command.arg(match value {
            Some(value) => arg
                .value_name(*value)
                .allow_negative_numbers(true)
                .action(ArgAction::Append)
                .value_parser(NonEmptyStringValueParser::new()),
            None => arg.action(ArgAction::SetTrue),
        })
    })
}

/// What was given.
#[derive(Debug)]
pub(super) struct Given<'a>(pub(super) &'a ArgMatches);

impl Given<'_> {
    /// Whether a flag without a value was given.
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.get_flag(name)
    }

    /// All values of a flag.
    pub(super) fn all<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Vec<T>, clap::Error> {
        let values = self.0.get_many::<String>(name).into_iter().flatten();
        let parsed = values.map(|value| {
            parse(value)
                .map_err(|why| refuse(format!("invalid value '{value}' for '--{name}': {why}")))
        });
        parsed.collect()
    }

    /// The value of a flag that can be given once.
    pub(super) fn one<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, clap::Error> {
        let mut values = self.all(name, parse)?;
        match values.len() {
            0 | 1 => Ok(values.pop()),
            _ => Err(refuse(format!("'--{name}' cannot be given more than once"))),
        }
    }

    /// The value of a flag that must be given.
    pub(super) fn needed<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, clap::Error> {
        self.one(name, parse)?.ok_or_else(|| refuse(format!("'--{name}' is missing")))
    }
}

/// Text as it is.
#[expect(clippy::unnecessary_wraps, reason = "it is one of those that parse")]
pub(super) fn text<T: for<'a> From<&'a str>>(s: &str) -> Result<T, String> {
    Ok(s.into())
}

/// A path, which may have to be told in JSON.
pub(super) fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().try_map(|given| match given.to_str() {
        Some("") => Err("the path is empty"),
        Some(_) => Ok(PathBuf::from(given)),
        None => Err("a name that is not UTF-8: give it another, or a link with one"),
    })
}

/// A number.
pub(super) fn number<T: FromStr<Err = ParseIntError>>(s: &str) -> Result<T, String> {
    s.parse().map_err(|e: ParseIntError| match e.kind() {
        IntErrorKind::PosOverflow => "the number is too large".into(),
        IntErrorKind::NegOverflow => "the number is too small".into(),
        _ => "want a number".into(),
    })
}

fn refuse(why: String) -> clap::Error {
    clap::Error::raw(ErrorKind::ValueValidation, why + "; say --help\n")
}
