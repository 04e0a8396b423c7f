//! What the user gives this VM and no clone of it: any JSON, which may be a secret.
use std::fmt;

use arch::layout;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::error::Refusal;
use crate::identity::HEADER_LEN;

/// Its name among the sections.
pub(super) const SECTION: &str = "payload";
/// Bytes of a payload at most.
const LEN_MAX: u64 = layout::PAYLOAD_LEN - HEADER_LEN as u64;

/// What the guest finds in its memory before its first instruction. Not shown, not logged, not in
/// snapshots.
#[derive(Clone, PartialEq, Eq)]
pub struct Payload {
    json: Value,
    text: String,
}

impl Payload {
    /// A payload, which as text has 65,472 bytes at most.
    pub fn new(json: &Value) -> Result<Self, Refusal> {
        let (json, text) = (json.clone(), json.to_string());
        if text.len() as u64 > LEN_MAX {
            let why =
                format!("it has {} bytes as JSON, of which it may have {LEN_MAX}", text.len());
            return Err(Refusal::Body(serde::de::Error::custom(format!("{SECTION}: {why}"))));
        }
        Ok(Self { json, text })
    }

    /// As text.
    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({} bytes)", self.text.len())
    }
}

/// For a request that is to be sent.
impl Serialize for Payload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.json.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = Value::deserialize(deserializer)?;
        Self::new(&json).map_err(|why| match why {
            Refusal::Body(e) => serde::de::Error::custom(e),
            other => serde::de::Error::custom(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn is_not_shown_and_fits() {
        let payload = Payload::new(&json!({"key": "secret"})).unwrap();
        assert_eq!(format!("{payload:?}"), "Payload(16 bytes)");
        // With its quotes.
        let most = usize::try_from(LEN_MAX).unwrap() - 2;
        Payload::new(&json!("x".repeat(most))).unwrap();
        let long = json!("x".repeat(most + 1));
        let said = "payload: it has 65473 bytes as JSON, of which it may have 65472";
        let refusal = Payload::new(&long).unwrap_err().to_string();
        assert!(refusal.contains(said), "{refusal}");
        let refusal = serde_json::from_value::<Payload>(long).unwrap_err().to_string();
        assert_eq!(refusal, said);
    }

    #[test]
    fn is_sent_as_it_was_given() {
        let json = json!({"key": ["secret", 1]});
        let payload: Payload = serde_json::from_value(json.clone()).unwrap();
        assert_eq!((json!(payload), payload.as_str()), (json.clone(), &*json.to_string()));
    }
}
