//! What the user asked for: plain data, no descriptors, nothing to drop. One schema for the
//! command line, the configuration file, the API and the library.
//!
//! Sections are data: [`SECTIONS`] lists those that are not virtio devices, the device table
//! (`devices::virtio::MODELS`) the others. Routes, the configuration file and the OpenAPI document
//! all come from these two lists.
use std::path::{Path, PathBuf};

use arch::layout;
use devices::backend::file::{self, Access, Kind};
use devices::virtio::model::{DeviceError, Model, Recipe, recipe};
use devices::virtio::{self};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::api::{Id, Section};
use crate::error::Refusal;

/// The kernel image path that means the guest built into husk.
pub const DEMO_GUEST: &str = "builtin:demo";

/// The command line of a kernel for which none was given: Firecracker's.
pub(crate) const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 \
     i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// Most vCPUs a VM can have.
pub const VCPUS_MAX: u8 = 32;

/// What boots: `PUT /boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An ELF or bzImage kernel; `builtin:demo` is the guest built into husk.
    pub kernel_image_path: PathBuf,
    /// An initial RAM disk.
    #[serde(default)]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line. Devices are appended to it.
    #[serde(default)]
    pub boot_args: Option<String>,
}

/// Which pages back guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HugePages {
    /// As the host is set up.
    #[default]
    None,
    /// Transparent huge pages are asked for.
    Transparent,
    /// Pages of 2 MiB from the host's pool (hugetlbfs).
    #[serde(rename = "2M")]
    Hugetlb2M,
}

/// What a guest's own reset does.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
pub enum OnReboot {
    /// The VM boots again, in the same process.
    #[default]
    Restart,
    /// The VM ends.
    Exit,
}

/// The machine: `PUT /machine-config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// How many vCPUs, 1-32.
    pub vcpu_count: u8,
    /// RAM in MiB, from 1.
    pub mem_size_mib: u64,
    /// Whether two vCPUs share a core.
    #[serde(default)]
    pub smt: bool,
    /// Whether the pages that the guest writes are remembered.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Which pages back guest RAM.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// A named set of CPU features. Not supported yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether there is a PIT (i8254), for kernels that do not know kvm-clock. husk only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pit: bool,
    /// What a guest's own reset does, if not what [`Defaults`] say. husk only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_reboot: Option<OnReboot>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            cpu_template: None,
            pit: false,
            on_reboot: None,
        }
    }
}

/// Named sets of CPU features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum CpuTemplate {
    /// None of them.
    None,
    /// Not supported yet.
    C3,
    /// Not supported yet.
    T2,
    /// Not supported yet.
    T2S,
    /// Not supported yet.
    T2CL,
    /// Not supported yet.
    T2A,
    /// Not supported yet.
    V1N1,
}

/// `PATCH /machine-config`: what is given replaces what was.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachinePatch {
    vcpu_count: Option<u8>,
    mem_size_mib: Option<u64>,
    smt: Option<bool>,
    track_dirty_pages: Option<bool>,
    huge_pages: Option<HugePages>,
    cpu_template: Option<CpuTemplate>,
    pit: Option<bool>,
    on_reboot: Option<OnReboot>,
}

impl MachineConfig {
    /// RAM in bytes. The size has been checked.
    pub fn mem_size_bytes(&self) -> u64 {
        self.mem_size_mib << 20
    }

    fn check(&self) -> Result<(), Refusal> {
        let refuse = |field, why| Err(Refusal::Field { section: "machine-config", field, why });
        let vcpus = self.vcpu_count;
        if !(1..=VCPUS_MAX).contains(&vcpus) {
            return refuse("vcpu_count", format!("{vcpus} is not between 1 and {VCPUS_MAX}"));
        }
        if self.smt && vcpus > 1 && vcpus % 2 == 1 {
            return refuse("vcpu_count", format!("{vcpus} is odd, with smt it must be 1 or even"));
        }
        let (min, max) = (layout::RAM_MIN >> 20, layout::RAM_MAX >> 20);
        if !(min..=max).contains(&self.mem_size_mib) {
            let why = format!("{} is not between {min} and {max}", self.mem_size_mib);
            return refuse("mem_size_mib", why);
        }
        if self.huge_pages == HugePages::Hugetlb2M && self.mem_size_mib % 2 == 1 {
            let why = format!("{} is odd, with huge_pages 2M it must be even", self.mem_size_mib);
            return refuse("mem_size_mib", why);
        }
        if self.track_dirty_pages {
            let why = "dirty page tracking is not supported yet".into();
            return refuse("track_dirty_pages", why);
        }
        match self.cpu_template {
            None | Some(CpuTemplate::None) => Ok(()),
            Some(other) => {
                refuse("cpu_template", format!("{other:?}: CPU templates are not supported yet"))
            }
        }
    }

    fn merge(&mut self, patch: MachinePatch) {
        fn set<T>(to: &mut T, from: Option<T>) {
            if let Some(value) = from {
                *to = value;
            }
        }
        set(&mut self.vcpu_count, patch.vcpu_count);
        set(&mut self.mem_size_mib, patch.mem_size_mib);
        set(&mut self.smt, patch.smt);
        set(&mut self.track_dirty_pages, patch.track_dirty_pages);
        set(&mut self.huge_pages, patch.huge_pages);
        set(&mut self.pit, patch.pit);
        self.on_reboot = patch.on_reboot.or(self.on_reboot);
        self.cpu_template = patch.cpu_template.or(self.cpu_template);
    }
}

/// Where the serial port leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SerialTo {
    /// The terminal, or whatever husk's standard streams are.
    Stdio,
    /// A new pseudo-terminal, whose name is logged.
    Pty,
    /// Nowhere.
    None,
    /// A file or FIFO; output only.
    File(PathBuf),
    /// A Unix socket that husk listens on.
    Socket(PathBuf),
}

impl std::str::FromStr for SerialTo {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once('=') {
            None if s == "stdio" => Ok(Self::Stdio),
            None if s == "pty" => Ok(Self::Pty),
            None if s == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err("want stdio, file=PATH, pty, socket=PATH or none".into()),
        }
    }
}

/// The serial port: `PUT /serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// A file or FIFO that output goes to.
    #[serde(default)]
    pub serial_out_path: Option<PathBuf>,
    /// Not supported yet.
    #[serde(default)]
    pub rate_limiter: Option<Value>,
    /// Where the port leads, in place of `serial_out_path`. husk only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<SerialTo>,
}

impl SerialConfig {
    fn check(&self) -> Result<(), Refusal> {
        let refuse =
            |field, why: &str| Err(Refusal::Field { section: "serial", field, why: why.into() });
        if self.rate_limiter.is_some() {
            return refuse("rate_limiter", "rate limiters are not supported yet");
        }
        if self.serial_out_path.is_some() && self.to.is_some() {
            return refuse("to", "serial_out_path says the same: give one of them");
        }
        Ok(())
    }
}

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// Failures.
    Error,
    /// What may become one.
    Warning,
    /// What happens.
    #[default]
    Info,
    /// How.
    Debug,
    /// Every step.
    Trace,
}

impl std::str::FromStr for LogLevel {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.to_ascii_lowercase().as_str() {
            "off" => Ok(Self::Off),
            "error" => Ok(Self::Error),
            "warn" | "warning" => Ok(Self::Warning),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(format!(
                "unknown variant `{s}`, expected one of `Off`, `Trace`, `Debug`, `Info`, `Warning`, \
                 `Error`"
            )),
        }
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The log: `PUT /logger`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoggerConfig {
    /// How much; any case.
    #[serde(default)]
    pub level: Option<LogLevel>,
    /// A file or FIFO; standard error (or output, as `firecracker`) if there is none.
    #[serde(default)]
    pub log_path: Option<PathBuf>,
    /// Whether lines show their level.
    #[serde(default)]
    pub show_level: Option<bool>,
    /// Whether lines show the place in the source.
    #[serde(default)]
    pub show_log_origin: Option<bool>,
    /// Only lines of modules whose path starts so.
    #[serde(default)]
    pub module: Option<String>,
}

/// Applies JSON to a configuration.
type Apply = fn(&mut VmConfig, &[u8]) -> Result<(), Refusal>;

/// A section that is not a virtio device.
struct Fixed {
    section: Section,
    put: Apply,
    /// Before start.
    patch: Option<Apply>,
    show: fn(&VmConfig) -> Value,
}

const SECTIONS: &[Fixed] = &[
    Fixed {
        section: Section {
            name: "boot-source",
            about: "What boots: kernel, initrd, command line",
            id: Id::None,
            get: None,
            put: Some(|g| g.subschema_for::<BootSource>()),
            patch: None,
        },
        put: |config, body| {
            let source: BootSource = parse(body)?;
            source.check()?;
            config.boot_source = Some(source);
            Ok(())
        },
        patch: None,
        show: |config| json!(config.boot_source),
    },
    Fixed {
        section: Section {
            name: "machine-config",
            about: "vCPUs and memory",
            id: Id::None,
            get: Some(|g| g.subschema_for::<MachineConfig>()),
            put: Some(|g| g.subschema_for::<MachineConfig>()),
            patch: Some(|g| g.subschema_for::<MachinePatch>()),
        },
        put: |config, body| {
            let machine: MachineConfig = parse(body)?;
            machine.check()?;
            config.machine = machine;
            Ok(())
        },
        patch: Some(|config, body| {
            let mut machine = config.machine.clone();
            machine.merge(parse(body)?);
            machine.check()?;
            config.machine = machine;
            Ok(())
        }),
        show: |config| json!(config.machine),
    },
    Fixed {
        section: Section {
            name: "serial",
            about: "Where the serial port leads",
            id: Id::None,
            get: None,
            put: Some(|g| g.subschema_for::<SerialConfig>()),
            patch: None,
        },
        put: |config, body| {
            let serial: SerialConfig = parse(body)?;
            serial.check()?;
            config.serial = serial;
            Ok(())
        },
        patch: None,
        show: |config| json!(config.serial),
    },
    Fixed {
        section: Section {
            name: "logger",
            about: "What is logged, and where to",
            id: Id::None,
            get: None,
            put: Some(|g| g.subschema_for::<LoggerConfig>()),
            patch: None,
        },
        put: |config, body| {
            let logger: LoggerConfig = parse(body)?;
            crate::logger::configure(&logger)?;
            config.logger = Some(logger);
            Ok(())
        },
        patch: None,
        show: |config| json!(config.logger),
    },
];

/// Sections of Firecracker's configuration file that husk does not have yet; `null` and `[]` are
/// accepted.
const NOT_YET: &[&str] =
    &["balloon", "cpu-config", "memory-hotplug", "metrics", "mmds-config", "pmem", "vsock"];

/// Every section, in the order of the documentation.
pub(crate) fn sections() -> impl Iterator<Item = Section> {
    let devices = virtio::MODELS.iter().map(|row| Section {
        name: row.name,
        about: row.about,
        id: if row.is_many { Id::Needed } else { Id::None },
        get: None,
        put: Some(row.schema),
        patch: row.is_many.then_some(row.patch_schema),
    });
    SECTIONS.iter().map(|fixed| fixed.section).chain(devices)
}

fn fixed(name: &str) -> Option<&'static Fixed> {
    SECTIONS.iter().find(|fixed| fixed.section.name == name)
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(Refusal::Body)
}

/// What holds where the user says nothing: the choice of whoever starts the VM, not of its
/// configuration, so that a `PUT` that leaves a field out does not undo it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// Where the serial port leads.
    pub serial: SerialTo,
    /// What a guest's own reset does.
    pub on_reboot: OnReboot,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { serial: SerialTo::Stdio, on_reboot: OnReboot::Restart }
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
    /// The log, if it was asked for here.
    pub logger: Option<LoggerConfig>,
    devices: Vec<Box<dyn Recipe>>,
}

impl VmConfig {
    /// A configuration that boots `kernel` and is otherwise as it comes: 1 vCPU, 128 MiB, the
    /// serial port leading nowhere.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            boot_source: Some(BootSource {
                kernel_image_path: kernel.into(),
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

    /// Reads a configuration file, in Firecracker's format.
    pub fn from_file(path: &Path) -> Result<Self, Refusal> {
        /// More than any configuration has.
        const SIZE_MAX: u64 = 1 << 20;
        let failed = |why| Refusal::ConfigFile { path: path.display().to_string(), why };
        let file =
            file::open(path, Access::Read, Kind::Regular).map_err(|e| failed(e.to_string()))?;
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut std::io::Read::take(file, SIZE_MAX + 1), &mut text)
            .map_err(|e| failed(e.to_string()))?;
        if text.len() as u64 > SIZE_MAX {
            return Err(failed(format!("larger than {SIZE_MAX} bytes")));
        }
        let mut config = Self::default();
        config.put_all(&text).map_err(|e| failed(e.to_string()))?;
        Ok(config)
    }

    /// Sets several sections, as a configuration file or `PUT /vm` has them: an object whose keys
    /// are sections, whose values are what `PUT` takes, or arrays of it.
    pub fn put_all(&mut self, json: &[u8]) -> Result<(), Refusal> {
        for (name, value) in parse::<Sections<'_>>(json)?.0 {
            let text = value.get();
            // What `GET /vm/config` shows of a section that is not there.
            let is_none = match NOT_YET.contains(&name.as_str()) {
                true => matches!(text, "null" | "[]"),
                false => text == "null" && known(&name),
            };
            if is_none {
                continue;
            }
            let members: Vec<&serde_json::value::RawValue> =
                match virtio::model(&name).is_some_and(|row| row.is_many) {
                    true => parse(text.as_bytes()).map_err(|e| within(&name, &e))?,
                    false => vec![value],
                };
            for (i, member) in members.iter().enumerate() {
                let place = if members.len() > 1 { format!("{name}[{i}]") } else { name.clone() };
                self.put(&name, None, member.get().as_bytes()).map_err(|e| within(&place, &e))?;
            }
        }
        Ok(())
    }

    /// Stores one section, as `PUT` by the API. Checked against the host as far as is possible
    /// without keeping anything.
    pub fn put(&mut self, section: &str, id: Option<&str>, body: &[u8]) -> Result<(), Refusal> {
        if let Some(fixed) = fixed(section) {
            return (fixed.put)(self, body);
        }
        let row = virtio::model(section).ok_or_else(|| no_route("PUT", section, id))?;
        let recipe = (row.parse)(body).map_err(|e| device_refusal(row.name, id, e))?;
        if id.is_some_and(|id| id != recipe.id()) {
            return Err(Refusal::IdMismatch);
        }
        self.insert(recipe)
    }

    /// Changes part of a section before start.
    pub fn patch(&mut self, section: &str, body: &[u8]) -> Result<(), Refusal> {
        match fixed(section).and_then(|fixed| fixed.patch) {
            Some(patch) => patch(self, body),
            None if virtio::model(section).is_some() => Err(Refusal::NotStarted),
            None => Err(no_route("PATCH", section, None)),
        }
    }

    /// Whether `PATCH` of `section` belongs before start.
    pub(crate) fn is_patched_before_start(section: &str) -> bool {
        fixed(section).is_some()
    }

    /// One section as JSON.
    pub fn show(&self, section: &str) -> Result<Value, Refusal> {
        match fixed(section) {
            Some(fixed) if fixed.section.get.is_some() => Ok((fixed.show)(self)),
            _ => Err(no_route("GET", section, None)),
        }
    }

    /// Everything as JSON, with explicit nulls, also for what husk does not have yet.
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
        for name in NOT_YET {
            let value = if *name == "pmem" { json!([]) } else { Value::Null };
            all.insert((*name).into(), value);
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

    /// Devices in the order in which they attach: those that must come first, then as they were
    /// added.
    pub(crate) fn devices(&self) -> impl Iterator<Item = &dyn Recipe> {
        let first = self.devices.iter().filter(|r| r.is_first());
        first.chain(self.devices.iter().filter(|r| !r.is_first())).map(|r| &**r)
    }

    /// Refuses what can be seen to be wrong without starting anything.
    pub fn check(&self) -> Result<(), Refusal> {
        let kernel = self.boot_source()?.check()?;
        self.check_values()?;
        kernel.check(self.machine.mem_size_bytes())?;
        self.devices.iter().try_for_each(|recipe| check_device(&**recipe))
    }

    /// The part of [`Self::check`] that looks at nothing but the configuration: what is left to
    /// whoever opens the files anyway.
    pub(crate) fn check_values(&self) -> Result<(), Refusal> {
        self.machine.check()?;
        self.serial.check()
    }

    /// Whether the guest is the one built into husk.
    pub(crate) fn is_demo(&self) -> bool {
        self.boot_source.as_ref().is_some_and(|s| s.kernel_image_path == Path::new(DEMO_GUEST))
    }

    /// Keeps what a run-time change of a device says, for `GET /vm/config`.
    pub(crate) fn note_update(&mut self, model: &str, id: &str, patch: &Value) {
        let Some(row) = virtio::model(model) else { return };
        let Some(recipe) = self.devices.iter_mut().find(|r| r.model() == model && r.id() == id)
        else {
            return;
        };
        let (mut all, Some(changes)) = (recipe.to_json(), patch.as_object()) else { return };
        for (field, value) in changes.iter().filter(|(_, value)| !value.is_null()) {
            all[field] = value.clone();
        }
        if let Ok(changed) = (row.parse)(all.to_string().as_bytes()) {
            *recipe = changed;
        }
    }

    /// What boots, or what to do about it.
    pub(crate) fn boot_source(&self) -> Result<&BootSource, Refusal> {
        self.boot_source.as_ref().ok_or_else(|| Refusal::Field {
            section: "boot-source",
            field: "kernel_image_path",
            why: "no kernel is configured: PUT /boot-source or give --kernel".into(),
        })
    }

    fn insert(&mut self, recipe: Box<dyn Recipe>) -> Result<(), Refusal> {
        check_device(&*recipe)?;
        let is_same =
            |other: &dyn Recipe| other.model() == recipe.model() && other.id() == recipe.id();
        let has_other_first = self.devices.iter().any(|o| o.is_first() && !is_same(&**o));
        if recipe.is_first() && has_other_first {
            return Err(Refusal::SecondRoot);
        }
        match self.devices.iter_mut().find(|other| is_same(&***other)) {
            Some(same) => *same = recipe,
            None => self.devices.push(recipe),
        }
        Ok(())
    }
}

impl BootSource {
    /// Opens and reads what can be judged of it before there is RAM.
    fn check(&self) -> Result<arch::Kernel, Refusal> {
        let kernel = crate::parts::open_kernel(&self.kernel_image_path)?;
        if let Some(path) = &self.initrd_path {
            crate::parts::open_initrd(path)?;
        }
        Ok(kernel)
    }
}

fn known(name: &str) -> bool {
    fixed(name).is_some() || virtio::model(name).is_some()
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

fn no_route(method: &'static str, section: &str, id: Option<&str>) -> Refusal {
    let path = id.map_or_else(|| section.to_owned(), |id| format!("{section}/{id}"));
    Refusal::Route { method, path }
}

/// A refusal inside a larger document: where, then why.
fn within(place: &str, why: &Refusal) -> Refusal {
    Refusal::Body(serde::de::Error::custom(format!("{place}: {why}")))
}

/// An object whose keys are sections. A key given twice is an error, not a silent last word.
struct Sections<'a>(Vec<(String, &'a serde_json::value::RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Sections<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Sections<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of configuration sections")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> Result<Sections<'de>, A::Error> {
                let mut sections: Vec<(String, _)> = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if sections.iter().any(|(other, _)| *other == name) {
                        let message = format!("duplicate field `{name}`");
                        return Err(serde::de::Error::custom(message));
                    }
                    if !known(&name) && !NOT_YET.contains(&name.as_str()) {
                        return Err(serde::de::Error::custom(format!("unknown field `{name}`")));
                    }
                    sections.push((name, map.next_value()?));
                }
                Ok(Sections(sections))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}
