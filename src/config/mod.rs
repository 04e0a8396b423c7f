//! What the user asked for: plain data, nothing opened; a name of a descriptor that a client has passed keeps that.
//! One schema for the command line, the configuration file, the API and the library.
//!
//! Sections are data: [`sections`] lists those that are not virtio devices, the device table
//! (`devices::virtio::MODELS`) the others. Routes, the configuration file and the OpenAPI document
//! all come from these two lists.
mod boot_source;
mod document;
mod log;
mod machine;
mod metrics;
mod payload;
mod rate_limit_group;
mod restored;
mod sections;
mod serial;

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use arch::{CpuChoice, CpuConfig, CpuTemplate, layout};
use devices::backend::passed::Name;
use devices::backend::tap;
use devices::mmds;
use devices::virtio::model::{Claim, DeviceError, Model, Recipe, recipe};
use devices::virtio::{self, balloon, mem, net};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::boot_source::{BootSource, DEMO_GUEST};
pub(crate) use self::boot_source::{DEFAULT_BOOT_ARGS, SECTION as BOOT_SOURCE};
pub use self::log::{LogLevel, LoggerConfig};
pub use self::machine::{HugePages, MachineConfig, OnReboot, VCPUS_MAX};
pub use self::metrics::MetricsConfig;
pub use self::payload::Payload;
pub use self::rate_limit_group::RateLimitGroup;
pub(crate) use self::rate_limit_group::SECTION as RATE_LIMIT_GROUPS;
pub(crate) use self::sections::sections;
use self::sections::{MMDS_CONFIG, SECTIONS, fixed, is_many};
pub use self::serial::{SerialConfig, SerialTo};
use crate::error::Refusal;
use crate::memory::Sharing;
use crate::parts;

/// What holds where the user says nothing: the choice of whoever starts the VM, not of its
/// configuration, so that a `PUT` that leaves a field out does not undo it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defaults {
    /// Where the serial port leads.
    pub serial: SerialTo,
    /// What a guest's own reset does.
    pub on_reboot: OnReboot,
    /// Whether there is a boot timer, which the guest tells that it has booted.
    pub has_boot_timer: bool,
    /// Bytes that the guest's metadata may have as JSON.
    pub mmds_size_limit: usize,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            serial: SerialTo::Stdio,
            on_reboot: OnReboot::Restart,
            has_boot_timer: false,
            mmds_size_limit: mmds::DEFAULT_SIZE_LIMIT,
        }
    }
}

/// Everything the user asked for.
#[derive(Clone, Debug, Default)]
pub struct VmConfig {
    /// What holds where nothing is said.
    pub defaults: Defaults,
    /// What boots. Nothing can start without it.
    pub boot_source: Option<BootSource>,
    /// vCPUs and memory.
    pub machine: MachineConfig,
    /// Where the serial port leads.
    pub serial: SerialConfig,
    /// How the guest's CPU differs from the host's, bit by bit; then [`MachineConfig`]'s template
    /// does not count.
    pub cpu_config: Option<CpuConfig>,
    /// The log, if it was asked for here.
    pub logger: Option<LoggerConfig>,
    /// Where the metrics are written to, if anywhere.
    pub metrics: Option<MetricsConfig>,
    /// How the guest reaches its metadata, if it does.
    pub mmds: Option<mmds::Config>,
    /// What this VM is given, and no clone of it.
    pub payload: Option<Payload>,
    rate_limit_groups: Vec<RateLimitGroup>,
    devices: Vec<Box<dyn Recipe>>,
}

impl VmConfig {
    /// A configuration that boots `kernel` and is otherwise as it comes: 1 vCPU, 128 MiB, the
    /// serial port leading nowhere.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            boot_source: Some(BootSource {
                kernel_image_path: Name::from(kernel.into()),
                initrd_path: None,
                boot_args: None,
            }),
            defaults: Defaults { serial: SerialTo::None, ..Defaults::default() },
            ..Self::default()
        }
    }

    /// Adds a device, or replaces the one with the same id.
    pub fn add<M: Model>(&mut self, config: M::Config) -> Result<(), Refusal> {
        self.insert(recipe::<M>(config))
    }

    /// Adds a device; refuses a second one with the same id.
    pub(crate) fn add_another<M: Model>(&mut self, config: M::Config) -> Result<(), Refusal> {
        let recipe = recipe::<M>(config);
        let (section, id) = (recipe.model(), recipe.id());
        if self.devices.iter().any(|other| other.model() == section && other.id() == id) {
            return Err(Refusal::SameId { section, id: id.into() });
        }
        self.insert(recipe)
    }

    /// Makes an interface lead to the guest's metadata; all of them by the same version.
    pub(crate) fn add_to_mmds(&mut self, id: &str, version: mmds::Version) -> Result<(), Refusal> {
        let mmds = self.mmds.get_or_insert_with(|| mmds::Config {
            version,
            network_interfaces: Vec::new(),
            ipv4_address: None,
            imds_compat: false,
        });
        mmds.network_interfaces.push(id.into());
        match mmds.version == version {
            true => Ok(()),
            false => Err(Refusal::Field {
                section: MMDS_CONFIG,
                field: "version",
                why: "all interfaces that lead to the metadata must have the same".into(),
            }),
        }
    }

    /// Whether an interface leads to the guest's metadata.
    pub(crate) fn leads_to_mmds(&self, id: &str) -> bool {
        self.mmds.as_ref().is_some_and(|mmds| mmds.network_interfaces.iter().any(|i| i == id))
    }

    /// Stores one section, as `PUT` by the API. Checked against the host as far as is possible
    /// without keeping anything.
    pub fn put(&mut self, section: &str, id: Option<&str>, body: &[u8]) -> Result<(), Refusal> {
        let mut changed = self.clone();
        changed.put_alone(section, id, body)?;
        changed.check_ram()?;
        *self = changed;
        Ok(())
    }

    /// The same, whatever the other sections say.
    fn put_alone(&mut self, section: &str, id: Option<&str>, body: &[u8]) -> Result<(), Refusal> {
        if let Some(fixed) = fixed(section) {
            return fixed.put(self, id, body);
        }
        let recipe = parse_device(section, id, body)?;
        self.check_groups_of(&*recipe)?;
        self.insert(recipe)
    }

    /// How many entries there are in a section of which there may be several.
    fn count(&self, section: &str) -> usize {
        match section {
            RATE_LIMIT_GROUPS => self.rate_limit_groups.len(),
            model => self.devices.iter().filter(|recipe| recipe.model() == model).count(),
        }
    }

    /// Changes part of a section before start.
    pub fn patch(&mut self, section: &str, body: &[u8]) -> Result<(), Refusal> {
        match fixed(section).and_then(|fixed| fixed.patch) {
            Some(patch) => {
                let mut changed = self.clone();
                patch(&mut changed, body)?;
                changed.check_ram()?;
                *self = changed;
                Ok(())
            }
            None if virtio::model(section).is_some()
                || virtio::view(section).is_some()
                || section == RATE_LIMIT_GROUPS =>
            {
                Err(Refusal::NotStarted)
            }
            None => Err(no_section("PATCH", section, None)),
        }
    }

    /// Whether `PATCH` of `section` belongs before start.
    pub(crate) fn is_patched_before_start(section: &str) -> bool {
        section != RATE_LIMIT_GROUPS && fixed(section).is_some()
    }

    /// One section as JSON.
    pub fn show(&self, section: &str) -> Result<Value, Refusal> {
        if virtio::view(section).is_some() {
            return Err(Refusal::NotStarted);
        }
        if let Some(row) = virtio::model(section).filter(|row| row.shown.is_some()) {
            let recipe = self.devices.iter().find(|recipe| recipe.model() == row.name);
            let none = || Refusal::NoSuchDevice { section: row.name, id: row.name.into() };
            return recipe.map(|recipe| recipe.to_json()).ok_or_else(none);
        }
        match fixed(section) {
            Some(fixed) if fixed.section.get.is_some() => Ok((fixed.show)(self)),
            _ => Err(no_section("GET", section, None)),
        }
    }

    /// Forgets a device.
    pub(crate) fn remove(&mut self, model: &str, id: &str) {
        self.devices.retain(|recipe| recipe.model() != model || recipe.id() != id);
        // What `GET /vm/config` shows can be put again.
        if let Some(mmds) = self.mmds.as_mut().filter(|_| model == net::Net::NAME) {
            mmds.network_interfaces.retain(|interface| interface != id);
        }
        self.mmds.take_if(|mmds| mmds.network_interfaces.is_empty());
    }

    /// Everything as JSON, with explicit nulls.
    pub fn to_json(&self) -> Value {
        let mut all = serde_json::Map::new();
        for fixed in SECTIONS {
            all.insert(fixed.section.name.into(), (fixed.show)(self));
        }
        for row in virtio::MODELS {
            let members: Vec<Value> = self
                .devices
                .iter()
                .filter(|recipe| recipe.model() == row.name)
                .map(|recipe| recipe.to_json())
                .collect();
            let value = match row.is_many {
                true => Value::Array(members),
                false => members.into_iter().next().unwrap_or(Value::Null),
            };
            all.insert(row.name.into(), value);
        }
        Value::Object(all)
    }

    /// Where the serial port leads.
    pub fn serial_to(&self) -> SerialTo {
        let file = self.serial.serial_out_path.clone().map(SerialTo::File);
        self.serial.to.clone().or(file).unwrap_or_else(|| self.defaults.serial.clone())
    }

    /// What a guest's own reset does.
    pub fn on_reboot(&self) -> OnReboot {
        self.machine.on_reboot.unwrap_or(self.defaults.on_reboot)
    }

    /// The numbers of the descriptors that it names (`fd:N`).
    pub(crate) fn named_descriptors(&self) -> Vec<RawFd> {
        let mut numbers = Vec::new();
        for recipe in self.devices() {
            let json = recipe.to_json();
            let fields = virtio::model(recipe.model()).map_or(&[][..], |row| row.descriptors);
            numbers
                .extend(fields.iter().filter_map(|field| tap::descriptor(json[*field].as_str()?)));
        }
        numbers
    }

    /// Devices in the order in which they attach: those that must come first, then as they were
    /// added.
    pub(crate) fn devices(&self) -> impl Iterator<Item = &dyn Recipe> {
        let first = self.devices.iter().filter(|r| r.is_first());
        first.chain(self.devices.iter().filter(|r| !r.is_first())).map(|r| &**r)
    }

    /// Whether there is a device by which the guest gives memory back.
    pub(crate) fn gives_memory_back(&self) -> bool {
        self.devices.iter().any(|recipe| recipe.model() == balloon::Balloon::NAME)
    }

    /// Who has to map guest memory.
    pub(crate) fn sharing(&self) -> Sharing {
        match self.devices.iter().any(|recipe| recipe.needs_shared_memory()) {
            true => Sharing::Shared,
            false => Sharing::Private,
        }
    }

    /// Another process maps RAM once. It would not see what is plugged later.
    fn check_sharing(&self) -> Result<(), Refusal> {
        let model = mem::Mem::NAME;
        if self.machine.forkable && self.sharing() == Sharing::Shared {
            let why = "there is a drive that another process serves, which would serve every child";
            let (section, field) = ("machine-config", "forkable");
            return Err(Refusal::Field { section, field, why: why.into() });
        }
        let plugs = self.devices.iter().any(|recipe| recipe.model() == model);
        if !plugs || self.sharing() == Sharing::Private {
            return Ok(());
        }
        let why = "there is a drive that another process serves, which would not see such memory";
        Err(Refusal::Field { section: model, field: "total_size_mib", why: why.into() })
    }

    /// Refuses what can be seen to be wrong without starting anything, and leaves no trace.
    pub fn check(&self) -> Result<(), Refusal> {
        let source = self.boot_source()?;
        self.check_values()?;
        let kernel = parts::open_kernel(&source.kernel_image_path)?;
        let initrd = source.open_initrd()?;
        self.check_boot(&kernel, initrd.as_ref())?;
        self.devices.iter().try_for_each(|recipe| check_device(&**recipe))?;
        self.serial_to().check()?;
        parts::check_cpu(self.cpu())?;
        self.logger.as_ref().map_or(Ok(()), LoggerConfig::check)?;
        self.metrics.as_ref().map_or(Ok(()), MetricsConfig::check)
    }

    /// The part of [`Self::check`] that looks at no files: what is left to whoever opens them
    /// anyway.
    pub(crate) fn check_values(&self) -> Result<(), Refusal> {
        self.machine.check()?;
        self.check_groups()?;
        self.check_ram()?;
        self.mmds.as_ref().map_or(Ok(()), |mmds| self.check_mmds(mmds))?;
        self.check_sharing()?;
        self.serial.check_values()
    }

    /// Refuses devices that need more RAM than there is.
    fn check_ram(&self) -> Result<(), Refusal> {
        self.devices.iter().try_for_each(|recipe| self.check_ram_for(&**recipe))
    }

    fn check_ram_for(&self, recipe: &dyn Recipe) -> Result<(), Refusal> {
        let checked = recipe.check_ram(self.machine.mem_size_mib);
        checked.map_err(|e| device_refusal(recipe.model(), Some(recipe.id()), e))
    }

    /// Refuses a metadata service that is nowhere, or that no interface leads to.
    fn check_mmds(&self, mmds: &mmds::Config) -> Result<(), Refusal> {
        let interfaces = self.devices.iter().filter(|recipe| recipe.model() == net::Net::NAME);
        let interfaces: Vec<_> = interfaces.map(|recipe| recipe.id()).collect();
        Ok(mmds.check(&interfaces)?)
    }

    /// Refuses a kernel, an initrd or a command line that has no room in this machine.
    pub(crate) fn check_boot(
        &self,
        kernel: &arch::Kernel,
        initrd: Option<&arch::Initrd>,
    ) -> Result<(), Refusal> {
        let ram_size = self.machine.mem_size_bytes();
        kernel.check(ram_size)?;
        kernel.check_cmdline(crate::machine::command_line(self).trim())?;
        initrd.map_or(Ok(()), |initrd| initrd.check(kernel, ram_size))?;
        Ok(())
    }

    /// Makes the log what the configuration says. Not for a check, and without effect in a library.
    pub(crate) fn start_log(&self) -> Result<(), Refusal> {
        self.logger.as_ref().map_or(Ok(()), crate::logger::configure)
    }

    /// The same for the `body` of a `PUT`: what it does not give stays as it is, a file open.
    pub(crate) fn change_log(body: &[u8]) -> Result<(), Refusal> {
        crate::logger::configure(&sections::parse(body)?)
    }

    /// Whether the guest is the one built into husk.
    pub(crate) fn is_demo(&self) -> bool {
        self.boot_source
            .as_ref()
            .is_some_and(|s| s.kernel_image_path.as_path() == Path::new(DEMO_GUEST))
    }

    /// Refuses a run-time change of a device that does not fit the VM.
    pub(crate) fn check_update(&self, model: &str, id: &str, patch: &Value) -> Result<(), Refusal> {
        match self.updated(model, id, patch) {
            Some((_, changed)) => self.check_ram_for(&*changed),
            None => Ok(()),
        }
    }

    /// Keeps what a run-time change of a device says, for `GET /vm/config`.
    pub(crate) fn note_update(&mut self, model: &str, id: &str, patch: &Value) {
        if let Some((position, changed)) = self.updated(model, id, patch) {
            self.devices[position] = changed;
        }
    }

    /// A device as a run-time change makes it, and its position. None if the change is of nothing that
    /// is configured.
    fn updated(&self, model: &str, id: &str, patch: &Value) -> Option<(usize, Box<dyn Recipe>)> {
        let row = virtio::model(model)?;
        let position = self.devices.iter().position(|r| r.model() == model && r.id() == id)?;
        let mut all = self.devices[position].to_json();
        for (field, value) in patch.as_object()?.iter().filter(|(_, value)| !value.is_null()) {
            merge(&mut all[field], value);
        }
        Some((position, (row.parse)(all.to_string().as_bytes()).ok()?))
    }

    /// What boots, or what to do about it.
    pub(crate) fn boot_source(&self) -> Result<&BootSource, Refusal> {
        self.boot_source.as_ref().ok_or_else(|| Refusal::Field {
            section: "boot-source",
            field: "kernel_image_path",
            why: "no kernel is configured: name one in the configuration file, by PUT /boot-source or by --kernel".into(),
        })
    }

    /// What CPU the guest gets.
    pub(crate) fn cpu(&self) -> CpuChoice<'_> {
        match (&self.cpu_config, self.machine.cpu_template) {
            (Some(config), _) => CpuChoice::Config(config),
            (None, Some(template)) => CpuChoice::Template(template),
            (None, None) => CpuChoice::Host,
        }
    }

    /// Of a template and a CPU configuration the one set later holds: a template that is `given`,
    /// `None` too, ends the configuration.
    fn set_machine(&mut self, machine: MachineConfig, given: Option<CpuTemplate>) {
        self.machine = machine;
        if given.is_some() {
            self.cpu_config = None;
        }
    }

    fn insert(&mut self, recipe: Box<dyn Recipe>) -> Result<(), Refusal> {
        check_device(&*recipe)?;
        let is_same =
            |other: &dyn Recipe| other.model() == recipe.model() && other.id() == recipe.id();
        let has_other_first = self.devices.iter().any(|o| o.is_first() && !is_same(&**o));
        if recipe.is_first() && has_other_first {
            return Err(Refusal::SecondRoot);
        }
        let claimed: Vec<Claim> =
            self.devices.iter().filter(|o| !is_same(&***o)).flat_map(|o| o.claims()).collect();
        for claim in recipe.claims() {
            if let Some(refusal) = claim.against(&claimed) {
                return Err(device_refusal(recipe.model(), Some(recipe.id()), refusal));
            }
        }
        let room = layout::VIRTIO_IRQS.len();
        if self.devices.len() >= room && !self.devices.iter().any(|o| is_same(&**o)) {
            return Err(Refusal::TooManyDevices(room));
        }
        match self.devices.iter_mut().find(|other| is_same(&***other)) {
            Some(same) => *same = recipe,
            None => self.devices.push(recipe),
        }
        Ok(())
    }
}

/// Puts a change in the place of what was. In a rate limiter, a bucket that is not named stays.
fn merge(whole: &mut Value, change: &Value) {
    match (whole.as_object_mut(), change.as_object()) {
        (Some(parts), Some(changes)) => {
            let changes = changes.iter().filter(|(_, value)| !value.is_null());
            parts.extend(changes.map(|(name, value)| (name.clone(), value.clone())));
        }
        _ => *whole = change.clone(),
    }
}

fn parse_device(section: &str, id: Option<&str>, body: &[u8]) -> Result<Box<dyn Recipe>, Refusal> {
    let row = virtio::model(section).ok_or_else(|| no_section("PUT", section, id))?;
    let recipe = (row.parse)(body).map_err(|e| device_refusal(row.name, id, e))?;
    match id.is_some_and(|id| id != recipe.id()) {
        true => Err(Refusal::IdMismatch),
        false => Ok(recipe),
    }
}

fn check_device(recipe: &dyn Recipe) -> Result<(), Refusal> {
    recipe.check().map_err(|e| device_refusal(recipe.model(), Some(recipe.id()), e))
}

fn device_refusal(section: &'static str, id: Option<&str>, source: DeviceError) -> Refusal {
    match source {
        DeviceError::Json(e) => Refusal::Body(e),
        source => Refusal::Device { section, id: id.unwrap_or_default().into(), source },
    }
}

fn no_section(method: &'static str, section: &str, id: Option<&str>) -> Refusal {
    let path = id.map_or_else(|| section.to_owned(), |id| format!("{section}/{id}"));
    Refusal::Route { method, path }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn of_a_cpu_template_and_a_cpu_config_the_later_holds() {
        let mut config = VmConfig::default();
        let put = |config: &mut VmConfig, section, body: Value| {
            config.put(section, None, body.to_string().as_bytes()).unwrap();
        };
        let machine = |template: Option<&str>| {
            let mut machine = json!({"vcpu_count": 1, "mem_size_mib": 64});
            if let Some(template) = template {
                machine["cpu_template"] = json!(template);
            }
            machine
        };
        put(&mut config, "machine-config", machine(Some("T2")));
        assert!(matches!(config.cpu(), CpuChoice::Template(CpuTemplate::T2)));
        put(&mut config, "machine-config", machine(None));
        assert!(matches!(config.cpu(), CpuChoice::Template(CpuTemplate::T2)));

        put(&mut config, "cpu-config", json!({}));
        assert!(matches!(config.cpu(), CpuChoice::Config(_)));
        assert_eq!(config.to_json()["machine-config"].get("cpu_template"), None);
        put(&mut config, "machine-config", machine(None));
        config.patch("machine-config", br#"{"vcpu_count": 2}"#).unwrap();
        assert!(matches!(config.cpu(), CpuChoice::Config(_)));

        config.patch("machine-config", br#"{"cpu_template": "C3"}"#).unwrap();
        assert!(matches!(config.cpu(), CpuChoice::Template(CpuTemplate::C3)));
        assert_eq!(config.to_json()["cpu-config"], Value::Null);
        put(&mut config, "cpu-config", json!({}));
        put(&mut config, "machine-config", machine(Some("None")));
        assert!(matches!(config.cpu(), CpuChoice::Host));
        assert_eq!(config.to_json()["cpu-config"], Value::Null);
    }
}
