//! What of a VM is to be different when it is restored: what names the outside. Which fields that are
//! is said by the device table (`Model::OUTSIDE`); nothing here knows a device.
use std::borrow::Cow;

use devices::backend::passed::{PASSED, is_descriptor};
use devices::backend::tap::DESCRIPTOR;
use devices::mmds::merge;
use devices::virtio::{
    self,
    model::{ID_LEN_MAX, Row, is_id},
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::SnapshotError;
use crate::config::{BOOT_SOURCE, BootSource, Payload, SerialConfig};

/// What names the outside of a VM, where it is to be another than when the snapshot was made. Devices
/// have the shape of `PUT /vm`, with the fields that change: `{"drives": [{"drive_id": "root",
/// "path_on_host": "other.ext4"}], "vsock": {"guest_cid": 5}}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overrides {
    /// The VM's id, as `GET /` shows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Where the serial port leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialConfig>,
    /// The guest's metadata, any JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmds: Option<Value>,
    /// What this VM is given and no clone of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<Payload>,
    /// Devices, and what boots (`boot-source`): of each section an object, or an array of objects with an id, that are
    /// merged over what the snapshot says (RFC 7396).
    #[serde(flatten)]
    pub devices: Map<String, Value>,
}

impl Overrides {
    /// Adds what is to be different of a device: `fields` of the `section` ("drives"), the id among
    /// them where there can be several.
    pub fn add(&mut self, section: &str, fields: Value) {
        if virtio::model(section).is_none_or(|row| !row.is_many) {
            self.devices.insert(section.into(), fields);
            return;
        }
        let members = self.devices.entry(section).or_insert_with(|| json!([]));
        // What is not an array is refused when it is applied.
        if let Some(members) = members.as_array_mut() {
            members.push(fields);
        }
    }

    /// Whether what boots is to be another file.
    pub(crate) fn name_boot_files(&self) -> bool {
        self.devices.contains_key(BOOT_SOURCE)
    }

    /// Whether a device could be overridden, and is not.
    pub(super) fn could_name(&self, section: &str, id: &str) -> bool {
        let Some(row) = overridable().find(|row| row.name == section) else { return false };
        match self.devices.get(section) {
            None => true,
            Some(Value::Array(all)) => all.iter().all(|device| device[row.id_field] != id),
            Some(_) => false,
        }
    }

    /// Changes a configuration as `GET /vm/config` shows it.
    pub(crate) fn apply(&self, saved: &mut Value) -> Result<(), SnapshotError> {
        if let Some(id) = self.id.as_deref().filter(|id| !is_id(id)) {
            let want = format!("want 1 to {ID_LEN_MAX} letters, digits, underscores or hyphens");
            return Err(refused(format!("id: {id:?}: {want}")));
        }
        if let Some(serial) = &self.serial {
            serial.check_values().map_err(|e| refused(e.to_string()))?;
            saved["serial"] = json!(serial);
        }
        self.devices.iter().try_for_each(|(section, given)| {
            if section == BOOT_SOURCE {
                return apply_boot_files(given, &mut saved[section]);
            }
            let row = virtio::model(section).ok_or_else(|| {
                let known: Vec<_> = overridable().map(|row| row.name).collect();
                let known = known.join(", ");
                refused(format!(
                    "unknown field '{section}', expected id, serial, mmds, payload, {BOOT_SOURCE}, {known}"
                ))
            })?;
            if row.outside.is_empty() {
                return Err(refused(format!("{section}: it has nothing to do with the outside")));
            }
            if row.is_many {
                apply_all(row, given, &mut saved[section])
            } else {
                let given = given.as_object().ok_or_else(|| shape(row, "an object"))?;
                match &mut saved[section] {
                    Value::Null => Err(refused(format!("{section}: the snapshot has none"))),
                    device => apply_one(row, row.name, given, device),
                }
            }
        })
    }
}

/// Takes the numbers from descriptors that a process had: of this one they are others. What is left is refused unless
/// an override says which it is to be.
pub(super) fn forget_descriptors(saved: &mut Value) {
    forget_passed(saved);
    for_each_field(
        saved,
        |row| row.descriptors,
        |value| {
            if value.as_str().is_some_and(|name| name.starts_with(DESCRIPTOR)) {
                *value = DESCRIPTOR.into();
            }
        },
    );
}

/// The same, of those that were passed to it.
pub(crate) fn forget_passed(saved: &mut Value) {
    let forget = |value: &mut Value| {
        if value.as_str().is_some_and(is_descriptor) {
            *value = PASSED.into();
        }
    };
    for_each_field(saved, |row| row.openable, forget);
    let boot = saved.get_mut(BOOT_SOURCE).and_then(Value::as_object_mut);
    for (_, value) in boot.into_iter().flatten().filter(|(f, _)| BootSource::FILES.contains(&&***f))
    {
        forget(value);
    }
}

/// Does something to `fields` of all devices that there are.
fn for_each_field(
    saved: &mut Value,
    fields: fn(&Row) -> &'static [&'static str],
    mut act: impl FnMut(&mut Value),
) {
    for row in overridable() {
        // Indexing would make sections that there are not.
        let devices = saved.get_mut(row.name).and_then(Value::as_array_mut);
        for device in devices.into_iter().flatten() {
            for field in fields(row) {
                if let Some(value) = device.get_mut(*field) {
                    act(value);
                }
            }
        }
    }
}

/// Changes devices that are told apart by id.
fn apply_all(row: &Row, given: &Value, saved: &mut Value) -> Result<(), SnapshotError> {
    let many = || shape(row, "an array of objects");
    let mut seen = Vec::new();
    for fields in given.as_array().ok_or_else(many)? {
        let fields = fields.as_object().ok_or_else(many)?;
        let id = fields.get(row.id_field).and_then(Value::as_str);
        let id = id.ok_or_else(|| shape(row, &format!("a {} in each", row.id_field)))?;
        if seen.contains(&id) {
            return Err(refused(format!("{} {id}: it is there twice", row.name)));
        }
        seen.push(id);
        let all = saved.as_array_mut().map(|all| &mut all[..]).unwrap_or_default();
        let ids: Vec<_> = all.iter().filter_map(|d| d[row.id_field].as_str()).collect();
        let absent = || match &ids[..] {
            [] => refused(format!("{}: the snapshot has none", row.name)),
            ids => {
                let ids = ids.join(", ");
                refused(format!("{}: the snapshot has none with id '{id}': {ids}", row.name))
            }
        };
        let at = ids.iter().position(|other| *other == id).ok_or_else(absent)?;
        apply_one(row, &format!("{} {id}", row.name), fields, &mut all[at])?;
    }
    Ok(())
}

fn apply_one(
    row: &Row,
    name: &str,
    given: &Map<String, Value>,
    saved: &mut Value,
) -> Result<(), SnapshotError> {
    let is_id = |field: &str| field == row.id_field;
    apply_fields(name, row.outside, given.iter().filter(|(field, _)| !is_id(field)), saved)?;
    (row.parse)(saved.to_string().as_bytes())
        .map(drop)
        .map_err(|e| refused(format!("{name}: {}", without_place(&e.to_string()))))
}

/// Changes where the files are that the guest's own reset boots.
fn apply_boot_files(given: &Value, saved: &mut Value) -> Result<(), SnapshotError> {
    let wrong = |why: &dyn std::fmt::Display| refused(format!("{BOOT_SOURCE}: {why}"));
    let given = given.as_object().ok_or_else(|| wrong(&"want an object"))?;
    apply_fields(BOOT_SOURCE, BootSource::FILES, given.iter(), saved)?;
    BootSource::deserialize(&*saved).map(drop).map_err(|e| wrong(&e))
}

/// Merges fields over what was saved. Refuses what are not among those of the `outside`.
fn apply_fields<'a>(
    name: &str,
    outside: &[&str],
    given: impl Iterator<Item = (&'a String, &'a Value)>,
    saved: &mut Value,
) -> Result<(), SnapshotError> {
    let mut fields = Map::new();
    for (field, value) in given {
        if !outside.contains(&field.as_str()) {
            let outside = outside.join(", ");
            return Err(refused(format!(
                "{name}: {field}: the guest knows it as it was, or it does not exist; these can be others: {outside}"
            )));
        }
        fields.insert(field.clone(), value.clone());
    }
    merge(saved, &Value::Object(fields));
    Ok(())
}

/// A place in a document that nobody has seen.
fn without_place(message: &str) -> &str {
    message.split(" at line ").next().unwrap_or(message)
}

fn shape(row: &Row, want: &str) -> SnapshotError {
    refused(format!("{}: want {want}", row.name))
}

fn refused(why: String) -> SnapshotError {
    SnapshotError::Field { field: "overrides", why }
}

/// The models of which something can be overridden.
fn overridable() -> impl Iterator<Item = &'static Row> {
    virtio::MODELS.iter().filter(|row| !row.outside.is_empty())
}

impl JsonSchema for Overrides {
    fn schema_name() -> Cow<'static, str> {
        "Overrides".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut properties = json!({
            "id": { "description": "The VM's id", "type": ["string", "null"] },
            "serial": { "anyOf": [generator.subschema_for::<SerialConfig>(), { "type": "null" }] },
            "mmds": { "description": "The guest's metadata: any JSON" },
            "payload": { "description": "What this VM is given and no clone of it: any JSON" },
        });
        let boot = generator.subschema_for::<BootSource>();
        properties[BOOT_SOURCE] = part_of(boot, BootSource::FILES, None, generator);
        for row in overridable() {
            let whole = (row.schema)(generator);
            let id = row.is_many.then_some(row.id_field);
            let one = part_of(whole, row.outside, id, generator);
            properties[row.name] = match row.is_many {
                true => json!({ "type": "array", "items": one }),
                false => one,
            };
        }
        json_schema!({
            "description": "What names the outside of a VM, where it is to be another",
            "type": "object",
            "properties": properties,
            "additionalProperties": false,
        })
    }
}

/// The schema of what can be overridden of a section, and of the field that says of which member, as the `whole`
/// section's has them.
fn part_of(
    whole: Schema,
    outside: &[&str],
    id: Option<&str>,
    generator: &mut SchemaGenerator,
) -> Value {
    let whole = whole.to_value();
    let name = whole["$ref"].as_str().and_then(|path| path.rsplit('/').next());
    let whole = name.and_then(|name| generator.definitions().get(name)).unwrap_or(&whole);
    let fields = outside.iter().copied().chain(id);
    let properties: Map<_, _> =
        fields.map(|field| (field.into(), whole["properties"][field].clone())).collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": Vec::from_iter(id),
        "additionalProperties": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> Value {
        json!({
            "serial": { "to": "Pty" },
            "boot-source": { "kernel_image_path": "k", "initrd_path": "i", "boot_args": "a" },
            "drives": [
                { "drive_id": "a", "path_on_host": "a.img", "is_root_device": true,
                  "rate_limiter": { "bandwidth": { "size": 1, "refill_time": 1 } } },
                { "drive_id": "b", "path_on_host": "b.img", "is_root_device": false },
            ],
            "vsock": { "guest_cid": 3, "uds_path": "a.sock" },
            "network-interfaces": [],
            "pmem": [],
            "entropy": null,
            "balloon": { "amount_mib": 1, "deflate_on_oom": true },
        })
    }

    fn apply(overrides: Value) -> Result<Value, String> {
        let overrides: Overrides = serde_json::from_value(overrides).map_err(|e| e.to_string())?;
        let mut config = saved();
        overrides.apply(&mut config).map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn what_names_the_outside_is_replaced() {
        let config = apply(json!({
            "id": "clone", "serial": { "to": { "File": "out" } }, "mmds": { "x": 1 },
            "drives": [{ "drive_id": "b", "path_on_host": "c.img" },
                       { "drive_id": "a", "rate_limiter": null }],
            "vsock": { "guest_cid": 9 },
            "boot-source": { "kernel_image_path": "moved", "initrd_path": null },
        }))
        .unwrap();
        assert_eq!(
            config["boot-source"],
            json!({ "kernel_image_path": "moved", "boot_args": "a" })
        );
        assert_eq!(config["serial"]["to"], json!({ "File": "out" }));
        assert_eq!(config["drives"][0].get("rate_limiter"), None);
        assert_eq!(config["drives"][0]["path_on_host"], "a.img");
        assert_eq!(config["drives"][1]["path_on_host"], "c.img");
        assert_eq!(config["vsock"], json!({ "guest_cid": 9, "uds_path": "a.sock" }));
        assert_eq!(apply(json!({})).unwrap(), saved());
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_name() {
        for (overrides, words) in [
            (
                json!({ "disks": [] }),
                "overrides: unknown field 'disks', expected id, serial, mmds, payload, boot-source, drives, ",
            ),
            (json!({ "balloon": { "amount_mib": 2 } }), "overrides: balloon: it has nothing"),
            (json!({ "drives": {} }), "overrides: drives: want an array of objects"),
            (json!({ "drives": [1] }), "overrides: drives: want an array of objects"),
            (
                json!({ "drives": [{ "path_on_host": "x" }] }),
                "overrides: drives: want a drive_id in each",
            ),
            (
                json!({ "drives": [{ "drive_id": "z" }] }),
                "overrides: drives: the snapshot has none with id 'z': a, b",
            ),
            (
                json!({ "drives": [{ "drive_id": "a" }, { "drive_id": "a" }] }),
                "overrides: drives a: it is there twice",
            ),
            (
                json!({ "drives": [{ "drive_id": "a", "is_read_only": true }] }),
                "overrides: drives a: is_read_only: the guest knows it",
            ),
            (
                json!({ "drives": [{ "drive_id": "a", "path_on_host": 5 }] }),
                "overrides: drives a: invalid type: integer `5`",
            ),
            (
                json!({ "network-interfaces": [{ "iface_id": "e" }] }),
                "overrides: network-interfaces: the snapshot has none",
            ),
            (
                json!({ "entropy": { "rate_limiter": null } }),
                "overrides: entropy: the snapshot has none",
            ),
            (
                json!({ "boot-source": { "boot_args": "x" } }),
                "overrides: boot-source: boot_args: the guest knows it",
            ),
            (json!({ "boot-source": [] }), "overrides: boot-source: want an object"),
            (
                json!({ "boot-source": { "kernel_image_path": null } }),
                "overrides: boot-source: missing field `kernel_image_path`",
            ),
            (json!({ "id": "a b" }), "overrides: id: \"a b\": want 1 to 64"),
            (json!({ "vsock": [] }), "overrides: vsock: want an object"),
            (json!({ "serial": { "to": "Pty", "serial_out_path": "x" } }), "overrides: serial:"),
        ] {
            let said = apply(overrides).unwrap_err();
            assert!(said.starts_with(words), "{said}");
            assert!(!said.contains(" at line "), "{said}");
        }
    }

    #[test]
    fn no_descriptor_of_another_process_is_taken() {
        let mut config = json!({ "network-interfaces": [
            { "iface_id": "a", "host_dev_name": "fd:7" },
            { "iface_id": "b", "host_dev_name": "tap0" },
            { "iface_id": "held:1", "host_dev_name": "held:1" },
        ], "drives": [
            { "drive_id": "fd:", "path_on_host": "fd:7" },
            { "drive_id": "b", "path_on_host": "held:12", "overlay": { "File": "held:12" } },
        ], "boot-source": { "kernel_image_path": "held:3", "boot_args": "held:3" } });
        let mut expected = config.clone();
        forget_descriptors(&mut config);
        expected["network-interfaces"][2]["host_dev_name"] = PASSED.into();
        expected["drives"][1]["path_on_host"] = PASSED.into();
        expected["boot-source"]["kernel_image_path"] = PASSED.into();
        expected["network-interfaces"][0]["host_dev_name"] = "fd:".into();
        assert_eq!(config, expected);
        let other = json!({ "network-interfaces": [{ "iface_id": "a", "host_dev_name": "fd:8" }] });
        let other: Overrides = serde_json::from_value(other).unwrap();
        other.apply(&mut config).unwrap();
        assert_eq!(config["network-interfaces"][0]["host_dev_name"], "fd:8");
    }

    #[test]
    fn what_is_not_overridden_could_be() {
        let overrides = json!({ "drives": [{ "drive_id": "a" }], "vsock": {} });
        let overrides: Overrides = serde_json::from_value(overrides).unwrap();
        for (section, id, could) in [
            ("drives", "a", false),
            ("drives", "b", true),
            ("vsock", "vsock", false),
            ("pmem", "a", true),
            ("balloon", "balloon", false),
        ] {
            assert_eq!(overrides.could_name(section, id), could, "{section} {id}");
        }
    }

    #[test]
    fn devices_are_added_as_their_sections_are() {
        let mut overrides = Overrides::default();
        overrides.add("drives", json!({ "drive_id": "a" }));
        overrides.add("drives", json!({ "drive_id": "b" }));
        overrides.add("vsock", json!({ "guest_cid": 7 }));
        let all = json!({ "drives": [{ "drive_id": "a" }, { "drive_id": "b" }],
                          "vsock": { "guest_cid": 7 } });
        assert_eq!(json!(overrides), all);
    }

    /// The schema is made of the devices' own; every name in the table must be in one.
    #[test]
    fn the_table_names_fields_that_there_are() {
        let schema = SchemaGenerator::default().into_root_schema_for::<Overrides>().to_value();
        for row in overridable() {
            let one = match row.is_many {
                true => &schema["properties"][row.name]["items"],
                false => &schema["properties"][row.name],
            };
            for field in row.outside {
                assert!(
                    one["properties"][field].is_object() || one["properties"][field].is_boolean(),
                    "{}: {field}: {one}",
                    row.name
                );
            }
        }
    }
}
