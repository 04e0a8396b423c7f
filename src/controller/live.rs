//! What is shown and changed of the devices of a VM that is live.
use devices::virtio;
use devices::virtio::model::{DeviceError, Row, View};

use super::Live;
use crate::config::{RATE_LIMIT_GROUPS, RateLimitGroup};
use crate::error::Refusal;
use crate::machine::Name;
use crate::metrics::Source;
use crate::request::Reply;

impl Live {
    pub(super) fn show(&self, section: &str) -> Reply {
        match device(section) {
            Some((row, view)) => {
                let name = Name { model: row.name, id: row.name };
                self.machine.show(name, view.map(|view| view.path))
            }
            None => self.config.show(section),
        }
    }

    pub(super) fn update(
        &mut self,
        section: &str,
        id: Option<String>,
        body: &[u8],
    ) -> Result<(), Refusal> {
        if section == RATE_LIMIT_GROUPS {
            return self.update_group(id.as_deref(), body);
        }
        let found = device(section).and_then(|(row, view)| {
            let patch = view.map_or(row.patch, |view| view.patch)?;
            Some((row, view, patch))
        });
        let (row, view, patch) = found.ok_or_else(|| no_route("PATCH", section, id.as_deref()))?;
        let id = id.as_deref().unwrap_or(row.name);
        let patch = (patch.parse)(body).map_err(|source| match source {
            DeviceError::Json(e) => Refusal::Body(e),
            source => Refusal::Device { section: row.name, id: id.into(), source },
        })?;
        // Checked here once, so that no device has to.
        if row.is_many && patch[row.id_field] != id {
            return Err(Refusal::IdMismatch);
        }
        self.config.check_update(row.name, id, &patch)?;
        let name = Name { model: row.name, id };
        self.machine.update(name, view.map(|view| view.path), &patch)?;
        self.config.note_update(row.name, id, &patch);
        Ok(())
    }

    fn update_group(&mut self, id: Option<&str>, body: &[u8]) -> Result<(), Refusal> {
        let patch: RateLimitGroup = serde_json::from_slice(body).map_err(Refusal::Body)?;
        if id.is_some_and(|id| id != patch.id) {
            return Err(Refusal::IdMismatch);
        }
        let limiter = patch.rate_limiter.clone().unwrap_or_default();
        self.machine.update_group(&patch.id, &limiter)?;
        self.config.note_group_update(&patch);
        Ok(())
    }

    /// What counted in the device goes on to be told of.
    pub(super) fn remove(
        &mut self,
        section: &str,
        id: Option<String>,
    ) -> Result<Vec<Source>, Refusal> {
        let row = virtio::model(section)
            .filter(|row| row.is_removable)
            .ok_or_else(|| no_route("DELETE", section, id.as_deref()))?;
        let id = id.as_deref().unwrap_or(row.name);
        let gone = self.machine.remove(Name { model: row.name, id })?;
        self.config.remove(row.name, id);
        Ok(gone)
    }

    pub(super) fn ctrl_alt_del(&mut self) -> Result<(), Refusal> {
        if !self.machine.ctrl_alt_del() {
            log::warn!("Ctrl-Alt-Del: the guest does not read its keyboard");
        }
        Ok(())
    }
}

/// The device, or the view of one, that a section is.
fn device(section: &str) -> Option<(&'static Row, Option<&'static View>)> {
    let row = virtio::model(section).map(|row| (row, None));
    row.or_else(|| virtio::view(section).map(|(row, view)| (row, Some(view))))
}

fn no_route(method: &'static str, section: &str, id: Option<&str>) -> Refusal {
    let path = id.map_or_else(|| section.to_owned(), |id| format!("{section}/{id}"));
    Refusal::Route { method, path }
}
