//! Limits that devices of a VM share, on whatever threads they run.
use std::sync::Arc;

use devices::limiter::{Groups, Pool, RateLimiter};
use devices::virtio::model::{DeviceError, Recipe, check_id, no_group};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{VmConfig, device_refusal};
use crate::error::Refusal;

/// Name of the section: `PUT` before start, `PATCH` afterwards.
pub(crate) const SECTION: &str = "rate-limit-groups";

/// A group of devices that share limits: those whose `rate_limit_group` is its id. husk only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimitGroup {
    /// The id: 1 to 64 letters, digits, underscores or hyphens.
    pub id: String,
    /// What its devices may use together; in a `PATCH`, the buckets to replace.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

impl VmConfig {
    /// Adds a group, or replaces the one with the same id.
    pub fn add_rate_limit_group(&mut self, group: RateLimitGroup) -> Result<(), Refusal> {
        check_id("id", &group.id).map_err(|e| device_refusal(SECTION, Some(&group.id), e))?;
        match self.rate_limit_groups.iter_mut().find(|other| other.id == group.id) {
            Some(same) => *same = group,
            None => self.rate_limit_groups.push(group),
        }
        Ok(())
    }

    /// Whether there is a group with this id.
    pub(crate) fn has_rate_limit_group(&self, id: &str) -> bool {
        self.rate_limit_groups.iter().any(|group| group.id == id)
    }

    /// Whether the groups are the same as another configuration's.
    pub(crate) fn has_same_rate_limit_groups(&self, other: &Self) -> bool {
        self.rate_limit_groups == other.rate_limit_groups
    }

    /// The groups as devices share them, their buckets full.
    pub(crate) fn limit_pools(&self) -> Groups {
        let pool = |group: &RateLimitGroup| Arc::new(Pool::new(group.rate_limiter.as_ref()));
        self.rate_limit_groups.iter().map(|group| (group.id.clone(), pool(group))).collect()
    }

    /// Keeps what a run-time change of a group says, for `GET /vm/config`.
    pub(crate) fn note_group_update(&mut self, patch: &RateLimitGroup) {
        let group = self.rate_limit_groups.iter_mut().find(|group| group.id == patch.id);
        if let (Some(group), Some(patch)) = (group, &patch.rate_limiter) {
            group.rate_limiter.get_or_insert_default().merge(patch);
        }
    }

    /// Refuses devices in groups that there are not.
    pub(super) fn check_groups(&self) -> Result<(), Refusal> {
        self.devices.iter().try_for_each(|recipe| self.check_groups_of(&**recipe))
    }

    pub(super) fn check_groups_of(&self, recipe: &dyn Recipe) -> Result<(), Refusal> {
        let mut wanted = recipe.rate_limit_groups().into_iter();
        match wanted.find(|(_, id)| !self.has_rate_limit_group(id)) {
            None => Ok(()),
            Some((field, id)) => {
                let why = DeviceError::field(field, no_group(id));
                Err(device_refusal(recipe.model(), Some(recipe.id()), why))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::error::chain;

    fn put(config: &mut VmConfig, section: &str, id: Option<&str>, body: &Value) -> String {
        let put = config.put(section, id, body.to_string().as_bytes());
        put.map_or_else(|e| chain(&e), |()| String::new())
    }

    #[test]
    fn a_group_must_be_there_before_its_devices() {
        let mut config = VmConfig::new("builtin:demo");
        let device = json!({"rate_limit_group": "slow"});
        let refusal = put(&mut config, "entropy", None, &device);
        assert!(refusal.contains("there is no rate limit group \"slow\""), "{refusal}");
        assert_eq!(config.to_json()["entropy"], Value::Null);
        let group = json!({"id": "slow", "rate_limiter": {"ops": {"size": 1, "refill_time": 2}}});
        let refusal = put(&mut config, SECTION, Some("fast"), &group);
        assert_eq!(refusal, Refusal::IdMismatch.to_string());
        let refusal = put(&mut config, SECTION, None, &json!({"id": "a b"}));
        assert!(refusal.contains("\"a b\" is not 1 to 64 letters"), "{refusal}");
        assert_eq!(config.to_json()[SECTION], json!([]));
        assert_eq!(put(&mut config, SECTION, Some("slow"), &group), "");
        assert_eq!(put(&mut config, SECTION, Some("fast"), &json!({"id": "fast"})), "");
        assert_eq!(put(&mut config, "entropy", None, &device), "");
        assert_eq!(config.limit_pools().into_keys().collect::<Vec<_>>(), ["fast", "slow"]);
        // One with the same id takes its place.
        assert_eq!(put(&mut config, SECTION, Some("slow"), &json!({"id": "slow"})), "");
        let shown = config.to_json();
        assert_eq!(shown[SECTION][0], json!({"id": "slow", "rate_limiter": null}));
        assert_eq!(shown["entropy"]["rate_limit_group"], "slow");
    }

    #[test]
    fn the_start_refuses_what_the_library_did_not() {
        let mut config = VmConfig::new("builtin:demo");
        let group = Some("slow".to_owned());
        let device = crate::rng::Config { rate_limit_group: group, ..Default::default() };
        config.add::<crate::rng::Rng>(device).unwrap();
        let refusal = chain(&config.check().unwrap_err());
        assert!(refusal.contains("there is no rate limit group \"slow\""), "{refusal}");
        let group = RateLimitGroup { id: "slow".into(), rate_limiter: None };
        config.add_rate_limit_group(group).unwrap();
        config.check().unwrap();
    }

    #[test]
    fn a_document_may_name_them_in_any_order() {
        let group = json!({"id": "slow", "rate_limiter": null});
        let text =
            format!(r#"{{"entropy": {{"rate_limit_group": "slow"}}, "{SECTION}": [{group}]}}"#);
        let mut config = VmConfig::default();
        config.put_all(text.as_bytes()).unwrap();
        let shown = config.to_json();
        assert_eq!(shown[SECTION], json!([group]));
        let mut again = VmConfig::default();
        again.put_all(shown.to_string().as_bytes()).unwrap();
        assert_eq!(again.to_json(), shown);
        let refusal = config.put_all(br#"{"entropy": {"rate_limit_group": "slow"}}"#).unwrap_err();
        assert!(chain(&refusal).contains("no rate limit group \"slow\""));
    }

    #[test]
    fn what_changes_is_shown_and_what_does_not_stays() {
        let mut config = VmConfig::default();
        let bucket = |size: u64| json!({"size": size, "one_time_burst": null, "refill_time": 9});
        let limiter = json!({"bandwidth": bucket(1), "ops": bucket(2)});
        let group = json!({"id": "g", "rate_limiter": limiter});
        assert_eq!(put(&mut config, SECTION, Some("g"), &group), "");
        let patch = json!({"id": "g", "rate_limiter": {"ops": bucket(3)}});
        config.note_group_update(&serde_json::from_value(patch).unwrap());
        let expected = json!({"bandwidth": bucket(1), "ops": bucket(3)});
        assert_eq!(config.to_json()[SECTION][0]["rate_limiter"], expected);
        let entropy = json!({"rate_limiter": limiter});
        assert_eq!(put(&mut config, "entropy", None, &entropy), "");
        let patch = json!({"rate_limiter": {"bandwidth": null, "ops": bucket(3)}});
        config.note_update("entropy", "entropy", &patch);
        assert_eq!(config.to_json()["entropy"]["rate_limiter"], expected);
    }
}
