//! The table of sections that are not virtio devices.
use arch::CpuConfig;
use devices::mmds;
use devices::virtio;
use serde::Deserialize;
use serde_json::{Value, json};

use super::machine::MachinePatch;
use super::{
    BOOT_SOURCE, BootSource, LoggerConfig, MachineConfig, MetricsConfig, Payload,
    RATE_LIMIT_GROUPS, RateLimitGroup, SerialConfig, VmConfig, payload,
};
use crate::api::{Deprecated, DeprecatedValue, Id, Logged, Section};
use crate::error::Refusal;

/// Name of the section of the metadata service, which names interfaces.
pub(super) const MMDS_CONFIG: &str = "mmds-config";

/// Applies JSON to a configuration.
type Apply = fn(&mut VmConfig, &[u8]) -> Result<(), Refusal>;

/// A section that is not a virtio device.
pub(super) struct Fixed {
    pub(super) section: Section,
    pub(super) put: Apply,
    /// Before start.
    pub(super) patch: Option<Apply>,
    pub(super) show: fn(&VmConfig) -> Value,
}

impl Fixed {
    /// Stores it. `id` is that in the path, if there was one.
    pub(super) fn put(
        &self,
        config: &mut VmConfig,
        id: Option<&str>,
        body: &[u8],
    ) -> Result<(), Refusal> {
        let mut changed = config.clone();
        (self.put)(&mut changed, body)?;
        if let Some(id) = id.filter(|_| self.section.id == Id::Needed)
            && parse::<Named>(body)?.id != id
        {
            return Err(Refusal::IdMismatch);
        }
        *config = changed;
        Ok(())
    }
}

/// What all sections have of which there may be several.
#[derive(Deserialize)]
struct Named {
    id: String,
}

pub(super) const SECTIONS: &[Fixed] = &[
    Fixed {
        section: Section {
            name: BOOT_SOURCE,
            path: BOOT_SOURCE,
            about: "What boots: kernel, initrd, command line",
            put: Some(|g| g.subschema_for::<BootSource>()),
            openable: BootSource::FILES,
            ..Section::PLAIN
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
            path: "machine-config",
            about: "vCPUs and memory",
            get: Some(|g| g.subschema_for::<MachineConfig>()),
            put: Some(|g| g.subschema_for::<MachineConfig>()),
            patch: Some(|g| g.subschema_for::<MachinePatch>()),
            deprecated: Deprecated { fields: &["cpu_template"], ..Deprecated::NOTHING },
            ..Section::PLAIN
        },
        put: |config, body| {
            let mut machine: MachineConfig = parse(body)?;
            machine.check()?;
            let given = std::mem::replace(&mut machine.cpu_template, config.machine.cpu_template);
            machine.set_cpu_template(given);
            config.set_machine(machine, given);
            Ok(())
        },
        patch: Some(|config, body| {
            let mut machine = config.machine.clone();
            let patch: MachinePatch = parse(body)?;
            if patch == MachinePatch::default() {
                return Err(Refusal::EmptyPatch);
            }
            let given = patch.cpu_template;
            machine.merge(patch);
            machine.check()?;
            config.set_machine(machine, given);
            Ok(())
        }),
        show: |config| json!(config.machine),
    },
    Fixed {
        section: Section {
            name: "cpu-config",
            path: "cpu-config",
            about: "How the guest's CPU differs from the host's",
            put: Some(|g| g.subschema_for::<CpuConfig>()),
            logged: Logged::AtDebug("the CPU template"),
            ..Section::PLAIN
        },
        put: |config, body| {
            config.cpu_config = Some(parse(body)?);
            config.machine.cpu_template = None;
            Ok(())
        },
        patch: None,
        show: |config| json!(config.cpu_config),
    },
    Fixed {
        section: Section {
            name: "serial",
            path: "serial",
            about: "Where the serial port leads",
            put: Some(|g| g.subschema_for::<SerialConfig>()),
            ..Section::PLAIN
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
            path: "logger",
            about: "What is logged, and where to",
            put: Some(|g| g.subschema_for::<LoggerConfig>()),
            ..Section::PLAIN
        },
        put: |config, body| {
            let logger: LoggerConfig = parse(body)?;
            logger.check()?;
            config.logger.get_or_insert_default().merge(logger);
            Ok(())
        },
        patch: None,
        show: |config| json!(config.logger),
    },
    Fixed {
        section: Section {
            name: MMDS_CONFIG,
            path: "mmds/config",
            about: "How the guest reaches its metadata",
            put: Some(|g| g.subschema_for::<mmds::Config>()),
            deprecated: Deprecated {
                value: Some(DeprecatedValue {
                    field: "version",
                    value: "V1",
                    is_default: true,
                    instead: "V2",
                }),
                ..Deprecated::NOTHING
            },
            ..Section::PLAIN
        },
        put: |config, body| {
            let mut mmds: mmds::Config = parse(body)?;
            config.check_mmds(&mmds)?;
            // As Firecracker shows it.
            mmds.ipv4_address = Some(mmds.address());
            config.mmds = Some(mmds);
            Ok(())
        },
        patch: None,
        show: |config| json!(config.mmds),
    },
    Fixed {
        section: Section {
            name: RATE_LIMIT_GROUPS,
            path: RATE_LIMIT_GROUPS,
            about: "Limits that devices share",
            id: Id::Needed,
            put: Some(|g| g.subschema_for::<RateLimitGroup>()),
            patch: Some(|g| g.subschema_for::<RateLimitGroup>()),
            ..Section::PLAIN
        },
        put: |config, body| config.add_rate_limit_group(parse(body)?),
        patch: None,
        show: |config| json!(config.rate_limit_groups),
    },
    Fixed {
        section: Section {
            name: payload::SECTION,
            path: payload::SECTION,
            about: "What this VM is given and no clone of it: any JSON",
            put: Some(|_| true.into()),
            logged: Logged::Never,
            ..Section::PLAIN
        },
        put: |config, body| {
            let payload: Value = parse(body)?;
            config.payload =
                Some(&payload).filter(|p| !p.is_null()).map(Payload::new).transpose()?;
            Ok(())
        },
        patch: None,
        // It may be a secret.
        show: |_| Value::Null,
    },
    Fixed {
        section: Section {
            name: "metrics",
            path: "metrics",
            about: "The file that metrics are written to",
            put: Some(|g| g.subschema_for::<MetricsConfig>()),
            ..Section::PLAIN
        },
        put: |config, body| {
            let metrics: MetricsConfig = parse(body)?;
            metrics.check()?;
            config.metrics = Some(metrics);
            Ok(())
        },
        patch: None,
        show: |config| json!(config.metrics),
    },
];

/// Every section, in the order of the documentation.
pub(crate) fn sections() -> impl Iterator<Item = Section> {
    let devices = virtio::MODELS.iter().flat_map(|row| {
        let section = Section {
            name: row.name,
            path: row.path,
            about: row.about,
            id: match row {
                row if row.is_many => Id::Needed,
                row if row.ignores_rest => Id::Ignored,
                _ => Id::None,
            },
            get: row.shown,
            put: Some(row.schema),
            patch: row.patch.map(|patch| patch.schema),
            is_removable: row.is_removable,
            openable: row.openable,
            deprecated: Deprecated { fields: row.deprecated, ..Deprecated::NOTHING },
            ..Section::PLAIN
        };
        std::iter::once(section).chain(row.views.iter().map(|view| Section {
            name: view.path,
            path: view.path,
            about: view.about,
            get: view.shown,
            patch: view.patch.map(|patch| patch.schema),
            is_patch_optional: view.patch.is_some_and(|patch| patch.is_optional),
            ..Section::PLAIN
        }))
    });
    SECTIONS.iter().map(|fixed| fixed.section).chain(devices)
}

/// The section called `name`, if it is no device.
pub(super) fn fixed(name: &str) -> Option<&'static Fixed> {
    SECTIONS.iter().find(|fixed| fixed.section.name == name)
}

/// Whether there is a section called `name`.
pub(super) fn is_known(name: &str) -> bool {
    fixed(name).is_some() || virtio::model(name).is_some()
}

/// The names that a document may have.
pub(super) fn known() -> impl Iterator<Item = &'static str> {
    let fixed = SECTIONS.iter().map(|fixed| fixed.section.name);
    fixed.chain(virtio::MODELS.iter().map(|row| row.name))
}

/// Whether there may be several of the section called `name`.
pub(super) fn is_many(name: &str) -> bool {
    fixed(name).is_some_and(|fixed| fixed.section.id == Id::Needed)
        || virtio::model(name).is_some_and(|row| row.is_many)
}

/// Reads the body of a request, or a part of a document.
pub(super) fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(Refusal::Body)
}
