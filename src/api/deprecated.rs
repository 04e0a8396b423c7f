//! What clients should no longer send. It is data, next to the section or the route that takes it;
//! whoever sends it is served all the same, and told by a header and a line in the log, as by
//! Firecracker.
use serde_json::{Map, Value};

/// What is deprecated in the body of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deprecated {
    /// Fields, whatever their value.
    pub(crate) fields: &'static [&'static str],
    /// A value of a field.
    pub(crate) value: Option<DeprecatedValue>,
}

/// A value of a field.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeprecatedValue {
    pub(crate) field: &'static str,
    pub(crate) value: &'static str,
    /// Whether the field has this value when it is left out.
    pub(crate) is_default: bool,
    /// The value to send.
    pub(crate) instead: &'static str,
}

impl Deprecated {
    /// Nothing is.
    pub(crate) const NOTHING: Self = Self { fields: &[], value: None };

    /// Whether there is nothing to look for.
    pub(super) fn is_nothing(&self) -> bool {
        self.fields.is_empty() && self.value.is_none()
    }

    /// What to tell about `body`, in Firecracker's words; nothing if it has none of this.
    pub(super) fn find(&self, body: &[u8]) -> Option<String> {
        if self.is_nothing() {
            return None;
        }
        let sent: Map<String, Value> = serde_json::from_slice(body).ok()?;
        let value_of = |field: &str| sent.get(field).filter(|value| !value.is_null());
        if self.fields.iter().any(|field| value_of(field).is_some()) {
            return Some(match self.fields {
                [field] => format!("{field} field is deprecated."),
                fields => format!("{} fields are deprecated.", fields.join(" and ")),
            });
        }
        let DeprecatedValue { field, value, is_default, instead } = self.value?;
        let is_sent = value_of(field).map_or(is_default, |sent| sent == value);
        is_sent.then(|| format!("{value} is deprecated. Use {instead} instead."))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_count_if_they_have_a_value() {
        let one = Deprecated { fields: &["old"], ..Deprecated::NOTHING };
        assert_eq!(one.find(br#"{"old": "None"}"#).unwrap(), "old field is deprecated.");
        assert_eq!(one.find(br#"{"old": null}"#), None);
        assert_eq!(one.find(br#"{"new": {"old": 1}}"#), None);
        assert_eq!(one.find(b"[]"), None);
        let two = Deprecated { fields: &["old", "older"], ..Deprecated::NOTHING };
        let said = two.find(br#"{"older": 1}"#).unwrap();
        assert_eq!(said, "old and older fields are deprecated.");
        assert_eq!(Deprecated::NOTHING.find(br#"{"old": 1}"#), None);
    }

    #[test]
    fn a_value_counts_where_it_is_meant() {
        let value =
            DeprecatedValue { field: "version", value: "V1", is_default: true, instead: "V2" };
        let table = |is_default| Deprecated {
            value: Some(DeprecatedValue { is_default, ..value }),
            ..Deprecated::NOTHING
        };
        let said = Some("V1 is deprecated. Use V2 instead.".to_owned());
        assert_eq!(table(true).find(br#"{"version": "V1"}"#), said);
        assert_eq!(table(true).find(b"{}"), said);
        assert_eq!(table(false).find(b"{}"), None);
        assert_eq!(table(true).find(br#"{"version": "V2"}"#), None);
    }
}
