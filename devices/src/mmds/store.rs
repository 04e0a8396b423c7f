//! The data: any JSON, one limit on its size, and what the guest sees of it.
use serde_json::Value;

/// Why data are refused or not there. Firecracker's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Nothing was put yet, so there is nothing to patch.
    #[error("The MMDS data store is not initialized.")]
    NotInitialized,
    /// The data would be larger than the limit.
    #[error("The MMDS patch request doesn't fit.")]
    TooLarge,
    /// Nothing is at that path.
    #[error("The MMDS resource does not exist.")]
    NotFound,
    /// Neither an object nor a string, which is all that text shows.
    #[error("Cannot retrieve value. The value has an unsupported type.")]
    UnsupportedType,
}

/// How the guest wants to see data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    /// Text, as EC2's service: the keys of an object one a line, those of objects with a slash; a
    /// string as it is.
    Imds,
}

/// The data. `None` until they are put.
#[derive(Debug)]
pub(super) struct Store {
    data: Option<Value>,
    size_limit: usize,
}

impl Store {
    pub(super) fn new(size_limit: usize) -> Self {
        Self { data: None, size_limit }
    }

    pub(super) fn show(&self) -> Value {
        match &self.data {
            None | Some(Value::Null) => Value::Object(serde_json::Map::new()),
            Some(data) => data.clone(),
        }
    }

    pub(super) fn check(&self, data: &Value) -> Result<(), StoreError> {
        match data.to_string().len() > self.size_limit {
            true => Err(StoreError::TooLarge),
            false => Ok(()),
        }
    }

    pub(super) fn put(&mut self, data: Value) -> Result<(), StoreError> {
        self.check(&data)?;
        self.data = Some(data);
        Ok(())
    }

    pub(super) fn patch(&mut self, patch: &Value) -> Result<(), StoreError> {
        let mut data = self.data.clone().ok_or(StoreError::NotInitialized)?;
        merge(&mut data, patch);
        self.put(data)
    }

    /// What the guest sees at `path`, a JSON pointer (RFC 6901) that may end in a slash.
    pub(super) fn value(&self, path: &str, format: Format) -> Result<String, StoreError> {
        let pointer = path.strip_suffix('/').unwrap_or(path);
        let data = self.data.as_ref().ok_or(StoreError::NotFound)?;
        let value = data.pointer(pointer).ok_or(StoreError::NotFound)?;
        match (format, value) {
            (Format::Json, value) => Ok(value.to_string()),
            (Format::Imds, Value::String(text)) => Ok(text.clone()),
            (Format::Imds, Value::Object(entries)) => Ok(entries
                .iter()
                .map(|(key, value)| if value.is_object() { format!("{key}/") } else { key.clone() })
                .collect::<Vec<_>>()
                .join("\n")),
            (Format::Imds, _) => Err(StoreError::UnsupportedType),
        }
    }
}

/// Changes `target` by a JSON Merge Patch (RFC 7396, 2). As deep as the patch, which its parser bounds.
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(entries) = target else { return };
    for (key, change) in changes {
        if change.is_null() {
            entries.remove(key);
        } else {
            merge(entries.entry(key.clone()).or_insert(Value::Null), change);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn store(data: Value) -> Store {
        let mut store = Store::new(1000);
        store.put(data).unwrap();
        store
    }

    /// The examples of RFC 7396, appendix A.
    #[test]
    fn patches_as_the_rfc_has_it() {
        for (target, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (
                json!({"a": {"b": "c"}}),
                json!({"a": {"b": "d", "c": null}}),
                json!({"a": {"b": "d"}}),
            ),
            (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a": "b"}), json!(["c"]), json!(["c"])),
            (json!({"a": "foo"}), json!("bar"), json!("bar")),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let mut store = store(target);
            store.patch(&patch).unwrap();
            assert_eq!(store.show(), result, "{patch}");
        }
    }

    #[test]
    fn there_is_nothing_to_patch_before_data_are_put() {
        let mut store = Store::new(100);
        let e = store.patch(&json!({"a": 1})).unwrap_err();
        assert_eq!(e.to_string(), "The MMDS data store is not initialized.");
        assert_eq!(store.show(), json!({}));
        assert_eq!(store.value("/", Format::Json), Err(StoreError::NotFound));
        store.put(json!({})).unwrap();
        store.patch(&json!({"a": 1})).unwrap();
        assert_eq!(store.value("/", Format::Json).unwrap(), r#"{"a":1}"#);
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let mut store = Store::new(10);
        store.put(json!({"a": 1234})).unwrap();
        let e = store.put(json!({"a": 12345})).unwrap_err();
        assert_eq!(e.to_string(), "The MMDS patch request doesn't fit.");
        assert_eq!(store.patch(&json!({"b": 1})), Err(StoreError::TooLarge));
        assert_eq!(store.show(), json!({"a": 1234}));
        // What shrinks fits, whatever the size of the patch.
        store.patch(&json!({"a": null, "looked for and not found": null})).unwrap();
        assert_eq!(store.show(), json!({}));
    }

    #[test]
    fn shows_objects_and_strings_as_text_and_everything_as_json() {
        let store = store(json!({
            "name": {"first": "John", "last": {}},
            "age": 43, "phones": ["+40", {"home": "+44"}], "is": false, "none": null, "a/b": "c",
            "quoted": "\"x\"\n",
        }));
        let text = |path: &str| store.value(path, Format::Imds).map_err(|e| e.to_string());
        let json = |path: &str| store.value(path, Format::Json).unwrap();
        assert_eq!(text("/").unwrap(), "a/b\nage\nis\nname/\nnone\nphones\nquoted");
        assert_eq!(text("/name").unwrap(), "first\nlast/");
        assert_eq!(text("/name/").unwrap(), "first\nlast/");
        assert_eq!(text("/name/last").unwrap(), "");
        assert_eq!(text("/name/first").unwrap(), "John");
        assert_eq!(text("/quoted").unwrap(), "\"x\"\n");
        assert_eq!(text("/phones/0").unwrap(), "+40");
        assert_eq!(text("/phones/1/home").unwrap(), "+44");
        assert_eq!(text("/a~1b").unwrap(), "c");
        for path in ["/age", "/phones", "/is", "/none"] {
            let e = text(path).unwrap_err();
            assert_eq!(e, "Cannot retrieve value. The value has an unsupported type.", "{path}");
        }
        for path in ["/nope", "/name/first/x", "/phones/2", "/phones/00", "name", "/age//"] {
            assert_eq!(text(path).unwrap_err(), "The MMDS resource does not exist.", "{path}");
        }
        assert_eq!(json("/name"), r#"{"first":"John","last":{}}"#);
        assert_eq!(json("/age"), "43");
        assert_eq!(json("/quoted"), r#""\"x\"\n""#);
        assert_eq!(json("/none"), "null");
    }
}
