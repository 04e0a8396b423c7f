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
        let is_known = |id: &str| self.rate_limit_groups.iter().any(|group| group.id == id);
        match recipe.rate_limit_groups().into_iter().find(|(_, id)| !is_known(id)) {
            None => Ok(()),
            Some((field, id)) => {
                let why = DeviceError::field(field, no_group(id));
                Err(device_refusal(recipe.model(), Some(recipe.id()), why))
            }
        }
    }
}
