//! What is asked of a fork, and what is answered: `POST /fork`.
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{CHILDREN_MAX, ForkError};
use crate::snapshot::Overrides;

/// How many children a microVM is to have, and how they differ from it: `POST /fork`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkParams {
    /// How many, 1 to 1000. As many as `overrides` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub n: Option<u32>,
    /// How children differ from their parent: one entry for each, or one for all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<ChildOverrides>,
    /// Whether the children's guests stand still until they are resumed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// Whether children are sent SIGTERM when their parent ends, however it does. Otherwise they go on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub end_with_parent: bool,
}

/// How a child differs from its parent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChildOverrides {
    /// The Unix socket that the child listens on; by default the parent's, a dot and the child's number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_sock: Option<PathBuf>,
    /// What names the outside.
    #[serde(flatten)]
    pub overrides: Overrides,
}

/// A child that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Child {
    /// Its id, as `GET /` shows it.
    pub id: String,
    /// Its process.
    pub pid: u32,
    /// The socket it listens on.
    pub api_sock: PathBuf,
    /// What leads to its serial port, if that is a pseudo-terminal or a socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_path: Option<PathBuf>,
}

/// What `POST /fork` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Forked {
    /// How long the parent stood still, in microseconds; 0 if it did so anyway.
    pub paused_us: u64,
    /// The children, in the order of the request.
    pub children: Vec<Child>,
}

impl ForkParams {
    /// How many children there are to be.
    pub(super) fn count(&self) -> Result<usize, ForkError> {
        let given = u32::try_from(self.overrides.len()).unwrap_or(u32::MAX);
        let count = self.n.unwrap_or(given.max(1));
        let wrong = |field, why| Err(ForkError::Field { field, why });
        if !(1..=CHILDREN_MAX).contains(&count) {
            let field = if self.n.is_some() { "n" } else { "overrides" };
            return wrong(field, format!("{count} is not between 1 and {CHILDREN_MAX}"));
        }
        if given > 1 && given != count {
            let why = format!("there are {given} for {count} children: give one for each, or one");
            return wrong("overrides", why);
        }
        Ok(usize::try_from(count).unwrap_or(usize::MAX))
    }

    /// What is to be different of child `number`.
    pub(super) fn of(&self, number: usize) -> ChildOverrides {
        let one_for_all = self.overrides.first();
        self.overrides.get(number).or(one_for_all).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_children() {
        let count = |body: &str| {
            let params: ForkParams = serde_json::from_str(body).unwrap();
            params.count().map_err(|e| e.to_string())
        };
        assert_eq!(count("{}"), Ok(1));
        assert_eq!(count(r#"{"n": 1000}"#), Ok(1000));
        assert_eq!(count(r#"{"overrides": [{}, {}]}"#), Ok(2));
        assert_eq!(count(r#"{"n": 3, "overrides": [{"id": "a"}]}"#), Ok(3));
        assert_eq!(count(r#"{"n": 0}"#), Err("n: 0 is not between 1 and 1000".into()));
        assert_eq!(count(r#"{"n": 1001}"#), Err("n: 1001 is not between 1 and 1000".into()));
        let wrong = count(r#"{"n": 3, "overrides": [{}, {}]}"#).unwrap_err();
        assert!(wrong.starts_with("overrides: there are 2 for 3 children"), "{wrong}");
    }

    #[test]
    fn one_override_is_for_all() {
        let params = r#"{"n": 2, "overrides": [{"id": "a", "api_sock": "s"}]}"#;
        let params: ForkParams = serde_json::from_str(params).unwrap();
        assert_eq!(params.of(0), params.of(1));
        assert_eq!(params.of(1).overrides.id.as_deref(), Some("a"));
        assert_eq!(params.of(1).api_sock, Some("s".into()));
    }
}
