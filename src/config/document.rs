//! Configuration files, and the body of `PUT /vm`: an object whose keys are sections, whose values
//! are what `PUT` takes, or arrays of it.
//!
//! A section's JSON is a part of the document's, so what is wrong in it is reported by its place in
//! the document.
use std::io::Read;
use std::path::{Path, PathBuf};

use devices::backend::file::{self, Access, Kind};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::VmConfig;
use super::sections::{MMDS_CONFIG, is_known, is_many, known, parse};
use super::{Payload, RATE_LIMIT_GROUPS};
use crate::error::Refusal;

/// More than any configuration has.
const SIZE_MAX: u64 = 1 << 20;
/// In a document it may also be the path of a file that holds it: Firecracker knows no other form.
const CPU_CONFIG: &str = "cpu-config";

impl VmConfig {
    /// Reads a configuration file, in Firecracker's format.
    pub fn from_file(path: &Path) -> Result<Self, Refusal> {
        read("configuration file", path, |text| {
            let mut config = Self::default();
            config.put_all(text)?;
            Ok(config)
        })
    }

    /// Reads a CPU configuration from a file of its own.
    pub(crate) fn read_cpu_config(&mut self, path: &Path) -> Result<(), Refusal> {
        read("CPU configuration", path, |text| self.put(CPU_CONFIG, None, text))
    }

    /// Reads a payload from a file, or from standard input if that is called `-`.
    pub(crate) fn read_payload(path: &Path) -> Result<Payload, Refusal> {
        if path != Path::new("-") {
            return read("payload", path, |text| Payload::new(&parse(text)?));
        }
        let (path, mut text) = (Path::new("standard input"), Vec::new());
        let read = std::io::stdin().lock().take(SIZE_MAX).read_to_end(&mut text);
        let payload = read.map_err(Refusal::host("cannot read it"));
        let payload = payload.and_then(|_| Payload::new(&parse(&text)?));
        payload.map_err(|why| Refusal::ConfigFile { path: path.into(), why: Box::new(why) })
    }

    /// Reads the guest's metadata from a file.
    pub(crate) fn read_metadata(path: &Path) -> Result<Value, Refusal> {
        read("metadata", path, |text| parse(text))
    }

    /// Replaces the whole configuration, but not its [`Self::defaults`], by what a configuration
    /// file or `PUT /vm` holds. All or nothing.
    pub fn put_all(&mut self, json: &[u8]) -> Result<(), Refusal> {
        let mut config = Self { defaults: self.defaults.clone(), ..Self::default() };
        let mut sections = parse::<Document<'_>>(json)?.0;
        sections.sort_by_key(|(name, _)| match name.as_str() {
            // First, so that devices can be in them.
            RATE_LIMIT_GROUPS => 0,
            // Last, so that it holds whatever template the machine names, as in Firecracker.
            CPU_CONFIG => 2,
            // After the interfaces that it names.
            MMDS_CONFIG => 2,
            _ => 1,
        });
        for (name, value) in sections {
            config.put_section(json, &name, value)?;
        }
        // Only now, because sections come in any order.
        config.check_ram()?;
        *self = config;
        Ok(())
    }

    fn put_section(&mut self, json: &[u8], name: &str, value: &RawValue) -> Result<(), Refusal> {
        let text = value.get();
        // What `GET /vm/config` shows of a section that is not there.
        if text == "null" {
            return Ok(());
        }
        let place = |place: &str, part: &RawValue, why| within(json, place, part, why);
        if name == CPU_CONFIG && text.starts_with('"') {
            let path: PathBuf = parse(text.as_bytes()).map_err(|e| place(name, value, e))?;
            return self.read_cpu_config(&path);
        }
        if !is_many(name) {
            return self.put_alone(name, None, text.as_bytes()).map_err(|e| place(name, value, e));
        }
        let members: Vec<&RawValue> = parse(text.as_bytes()).map_err(|e| place(name, value, e))?;
        for (i, member) in members.into_iter().enumerate() {
            self.put_alone(name, None, member.get().as_bytes())
                .and_then(|()| match self.count(name) > i {
                    true => Ok(()),
                    // It has replaced one: the user would miss that.
                    false => {
                        let why = "an earlier one has the same id";
                        Err(Refusal::Body(serde::de::Error::custom(why)))
                    }
                })
                .map_err(|e| place(&format!("{name}[{i}]"), member, e))?;
        }
        Ok(())
    }
}

/// Makes something of a file, of which it may not have more than is sensible.
fn read<T>(
    what: &'static str,
    path: &Path,
    make: impl FnOnce(&[u8]) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    let failed = |why| Refusal::ConfigFile { path: path.into(), why: Box::new(why) };
    let file = file::open(path, Access::Read, Kind::Regular)
        .map_err(|source| Refusal::Open { what, source })?;
    let mut text = Vec::new();
    file.take(SIZE_MAX + 1)
        .read_to_end(&mut text)
        .map_err(Refusal::host("cannot read it"))
        .map_err(failed)?;
    if text.len() as u64 > SIZE_MAX {
        let why = format!("larger than {SIZE_MAX} bytes");
        return Err(failed(Refusal::Body(serde::de::Error::custom(why))));
    }
    make(&text).map_err(failed)
}

/// A refusal of `part` of a document: where, then why. Only what is wrong with the JSON lacks a
/// place, and a name.
fn within(json: &[u8], name: &str, part: &RawValue, why: Refusal) -> Refusal {
    let Refusal::Body(e) = why else { return why };
    let message = e.to_string();
    let relative = format!(" at line {} column {}", e.line(), e.column());
    let message = message.strip_suffix(&relative).unwrap_or(&message);
    let before = part.get().as_ptr().addr().saturating_sub(json.as_ptr().addr());
    let before = json.get(..before).unwrap_or_default();
    let line = before.iter().filter(|&&byte| byte == b'\n').count() + e.line().max(1);
    let column = match e.line() {
        0 | 1 => before.iter().rev().take_while(|&&byte| byte != b'\n').count() + e.column(),
        _ => e.column(),
    };
    let text = format!("{name}: {message} at line {line} column {column}");
    Refusal::Body(serde::de::Error::custom(text))
}

/// An object whose keys are sections. A key given twice is an error, not a silent last word.
struct Document<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Document<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Document<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of configuration sections")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> Result<Document<'de>, A::Error> {
                let mut sections: Vec<(String, _)> = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if sections.iter().any(|(other, _)| *other == name) {
                        let message = format!("duplicate field `{name}`");
                        return Err(serde::de::Error::custom(message));
                    }
                    if !is_known(&name) {
                        let known: Vec<_> = known().map(|name| format!("`{name}`")).collect();
                        let message =
                            format!("unknown field `{name}`, expected one of {}", known.join(", "));
                        return Err(serde::de::Error::custom(message));
                    }
                    sections.push((name, map.next_value()?));
                }
                Ok(Document(sections))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(text: &str) -> String {
        match VmConfig::default().put_all(text.as_bytes()).unwrap_err() {
            Refusal::Body(e) => e.to_string(),
            other => other.to_string(),
        }
    }

    #[test]
    fn places_are_those_of_the_document() {
        let text = "{\n  \"entropy\": {\n    \"x\": 1\n  }\n}";
        let start = "entropy: unknown field `x`, expected `rate_limiter` or `rate_limit_group` at line 3 column 7";
        assert_eq!(refusal(text), start);
        let text = "{\"entropy\": {\"x\": 1}}";
        assert!(refusal(text).ends_with(" at line 1 column 16"), "{}", refusal(text));
        let drives = "{\n \"drives\": [\n  {\"drive_id\": \"a\",\n   \"y\": 1}]}";
        let said = refusal(drives);
        assert!(said.starts_with("drives[0]: unknown field `y`, expected"), "{said}");
        assert!(said.ends_with(" at line 4 column 6"), "{said}");
        assert!(refusal("{\n\n\"drives\": {}}").ends_with(" at line 3 column 10"));
    }

    #[test]
    fn no_entry_of_a_list_is_lost() {
        let group = r#"{"id": "g"}"#;
        let said = refusal(&format!("{{\"rate-limit-groups\": [{group},\n {group}]}}"));
        let why = "rate-limit-groups[1]: an earlier one has the same id at line 2";
        assert!(said.starts_with(why), "{said}");
        let disk = std::env::temp_dir().join(format!("husk-same-id-{}", std::process::id()));
        std::fs::write(&disk, [0; 512]).unwrap();
        let drive = |id| json!({"drive_id": id, "is_root_device": false, "is_read_only": true, "path_on_host": disk});
        let said = refusal(&json!({"drives": [drive("a"), drive("b"), drive("a")]}).to_string());
        assert!(said.starts_with("drives[2]: an earlier one has the same id"), "{said}");
        std::fs::remove_file(disk).unwrap();
    }

    #[test]
    fn what_is_shown_can_be_put_again() {
        let everything = json!({
            "boot-source": {"kernel_image_path": "builtin:demo", "boot_args": "a b"},
            "machine-config": {"vcpu_count": 4, "mem_size_mib": 64, "smt": true, "pit": true,
                               "huge_pages": "Transparent", "cpu_template": "None",
                               "on_reboot": "Exit"},
            "serial": {"to": "Pty", "rate_limiter": {"size": 1, "refill_time": 1}},
            "logger": {"level": "trace", "show_level": true, "show_log_origin": false,
                       "module": "husk"},
            "drives": [{"drive_id": "a", "path_on_host": "Cargo.toml", "is_root_device": false}],
            "entropy": {"rate_limiter": {}},
        });
        // A file of a fitting size, whatever this one's is.
        let disk = std::env::temp_dir().join(format!("husk-config-{}", std::process::id()));
        std::fs::write(&disk, [0; 512]).unwrap();
        let mut everything = everything;
        everything["drives"][0]["path_on_host"] = json!(disk);
        for given in [json!({}), everything] {
            let mut config = VmConfig::default();
            config.put_all(given.to_string().as_bytes()).unwrap();
            let shown = config.to_json();
            let mut again = VmConfig::default();
            again.put_all(shown.to_string().as_bytes()).unwrap();
            assert_eq!(again.to_json(), shown);
        }
        std::fs::remove_file(disk).unwrap();
    }

    #[test]
    fn a_document_replaces_everything_or_nothing() {
        let mut config = VmConfig::default();
        config.defaults.serial = crate::SerialTo::None;
        config.put("entropy", None, b"{}").unwrap();
        let before = config.to_json();
        config
            .put_all(br#"{"machine-config": {"vcpu_count": 2, "mem_size_mib": 64}, "x": 1}"#)
            .unwrap_err();
        assert_eq!(config.to_json(), before);
        config.put_all(b"{}").unwrap();
        assert_eq!(config.to_json()["entropy"], Value::Null);
        assert_eq!(config.serial_to(), crate::SerialTo::None);
    }
}
