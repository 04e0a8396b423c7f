//! What a machine takes over from the one whose place it takes.
use std::sync::Arc;

use devices::legacy::serial::SerialState;
use devices::limiter::TokenBucket;
use devices::virtio::model::Env;

use super::{Machine, Name, Rest, lock};
use crate::error::Refusal;
use crate::parts::{Part, serial_failed};
use crate::takeover::Port;

impl Machine {
    /// Stands for a device in a machine that is to take it over, if it can be.
    pub(crate) fn stand_in(&self, model: &'static str, id: &str) -> Option<Part> {
        let device = &self.devices[self.position(Name { model, id }).ok()?];
        let stand_in = Box::new(lock(&device.transport).stand_in()?);
        let counters = device.counters.clone();
        Some(Part { model, id: id.into(), device: stand_in, counters, watch: None })
    }

    /// Its serial port, for a machine that takes it over.
    pub(crate) fn port(&self) -> Port {
        let Rest(parts) = &self.rest;
        let (serial, io) = (parts.serial.clone(), parts.io.clone());
        let (path, name) = (parts.serial_path.clone(), parts.serial_name.clone());
        Port { serial, io, path, name }
    }

    /// What its devices share.
    pub(crate) fn env(&self) -> &Env {
        &self.rest.0.env
    }

    /// Takes from `old` what this has stand-ins for, the devices `names`; the serial port, if it is the same,
    /// goes on as `serial` and `limit` say. Both are paused. If it is refused, nothing has changed.
    pub(crate) fn take_over(
        &self,
        old: &Self,
        names: &[(&'static str, String)],
        serial: &SerialState,
        limit: Option<&TokenBucket>,
    ) -> Result<(), Refusal> {
        let Rest(parts) = &self.rest;
        let (ours, theirs) = names
            .iter()
            .map(|(model, id)| {
                let name = Name { model, id };
                Ok((&self.devices[self.position(name)?], &old.devices[old.position(name)?]))
            })
            .collect::<Result<(Vec<_>, Vec<_>), Refusal>>()?;
        if Arc::ptr_eq(&parts.serial, &old.rest.0.serial) {
            let line = parts.serial_irq.try_clone();
            let line = line.map_err(Refusal::host("cannot copy an eventfd"))?;
            let moved = lock(&parts.serial).move_to(serial.clone(), Box::new(line));
            moved.map_err(serial_failed)?;
            lock(&parts.serial).limit(limit);
        }
        for (ours, theirs) in ours.iter().zip(theirs) {
            lock(&ours.transport).take_over(&mut lock(&theirs.transport));
        }
        Ok(())
    }

    /// Whether the serial port is another's as well.
    pub(crate) fn shares_port_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.rest.0.serial, &other.rest.0.serial)
    }
}
