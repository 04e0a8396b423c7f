//! A request's body from the words of a command line: JSON as it stands, JSON from a file or from
//! standard input, or `FIELD=VALUE`s.
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use serde_json::{Map, Value};

/// More than any server takes.
const SIZE_MAX: u64 = 64 << 20;

/// Why there is no body.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    /// A file that cannot be read.
    #[error("cannot read the body from {from}")]
    Read { from: String, source: io::Error },
    /// A file without end.
    #[error("the body from {from} is larger than {SIZE_MAX} bytes")]
    TooLarge { from: String },
    /// Not of the form.
    #[error("'{0}' is neither FIELD=VALUE nor JSON in braces, nor @FILE, nor - (standard input)")]
    Word(String),
    /// A field that is an object by another word and a value by this one.
    #[error("'{0}' is set twice, once as a part of it")]
    Twice(String),
}

/// What the words say.
pub(super) fn read(words: &[String]) -> Result<Vec<u8>, BodyError> {
    match words {
        [word] if word == "-" => read_all("standard input", io::stdin().lock()),
        [word] if word.starts_with('@') => {
            let path = PathBuf::from(&word[1..]);
            let from = path.display().to_string();
            match File::open(&path) {
                Ok(file) => read_all(&from, file),
                Err(source) => Err(BodyError::Read { from, source }),
            }
        }
        [word] if word.trim_start().starts_with(['{', '[', '"']) => Ok(word.as_bytes().to_vec()),
        fields => Ok(object(fields)?.to_string().into_bytes()),
    }
}

/// Adds `id` under `field` to an object that lacks it; leaves anything else to the server's judgement.
pub(super) fn with_id(body: Vec<u8>, field: &str, id: &str) -> Vec<u8> {
    match serde_json::from_slice(&body) {
        Ok(Value::Object(mut object)) if !object.contains_key(field) => {
            object.insert(field.to_owned(), id.into());
            Value::Object(object).to_string().into_bytes()
        }
        _ => body,
    }
}

/// The words, of which the first may be the value of `field` without saying so. What could be a body by
/// itself is none.
pub(super) fn named(field: &str, words: &[String]) -> Vec<String> {
    let mut words = words.to_vec();
    if let Some(first) = words.first_mut()
        && !is_field(first)
        && !first.starts_with(['@', '{', '[', '"'])
        && first != "-"
    {
        *first = format!("{field}={}", Value::from(first.as_str()));
    }
    words
}

/// Whether a word says of itself which field it is of. A path that has a `=` somewhere does not.
fn is_field(word: &str) -> bool {
    let is_name = |field: &str| {
        field.starts_with(|c: char| c.is_ascii_alphabetic())
            && field.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
    };
    word.split_once('=').is_some_and(|(field, _)| is_name(field))
}

/// The words, of which the first may be a number: the value of `field`.
pub(super) fn counted(field: &str, words: &[String]) -> Vec<String> {
    let mut words = words.to_vec();
    if let Some(first) = words.first_mut()
        && !first.is_empty()
        && first.bytes().all(|byte| byte.is_ascii_digit())
    {
        *first = format!("{field}={first}");
    }
    words
}

fn read_all(from: &str, source: impl Read) -> Result<Vec<u8>, BodyError> {
    let mut body = Vec::new();
    source
        .take(SIZE_MAX + 1)
        .read_to_end(&mut body)
        .map_err(|source| BodyError::Read { from: from.to_owned(), source })?;
    if body.len() as u64 > SIZE_MAX {
        return Err(BodyError::TooLarge { from: from.to_owned() });
    }
    Ok(body)
}

/// `a=1 b.c=x` is `{"a": 1, "b": {"c": "x"}}`. A value that is JSON is that JSON, another a string.
fn object(words: &[String]) -> Result<Value, BodyError> {
    let mut object = Map::new();
    for word in words {
        let (field, text) = word.split_once('=').ok_or_else(|| BodyError::Word(word.clone()))?;
        let value = serde_json::from_str(text).unwrap_or_else(|_| text.into());
        let (parents, name) = match field.rsplit_once('.') {
            Some((parents, name)) => (Some(parents), name),
            None => (None, field),
        };
        let mut place = &mut object;
        for parent in parents.into_iter().flat_map(|parents| parents.split('.')) {
            let inner = place.entry(parent).or_insert_with(|| Map::new().into());
            place = inner.as_object_mut().ok_or_else(|| BodyError::Twice(parent.to_owned()))?;
        }
        if place.insert(name.to_owned(), value).is_some() {
            return Err(BodyError::Twice(field.to_owned()));
        }
    }
    Ok(Value::Object(object))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn body(words: &[&str]) -> Result<Value, String> {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        let body = read(&words).map_err(|e| e.to_string())?;
        Ok(serde_json::from_slice(&body).unwrap())
    }

    #[test]
    fn fields_make_an_object() {
        let words = ["a=1", "b=true", "c=06:00:AC", "d.e.f=2", "d.e.g=x=y", "h=[1, 2]", "i="];
        let all = json!({"a": 1, "b": true, "c": "06:00:AC", "d": {"e": {"f": 2, "g": "x=y"}},
                         "h": [1, 2], "i": ""});
        assert_eq!(body(&words), Ok(all));
        assert_eq!(body(&[]), Ok(json!({})));
    }

    #[test]
    fn json_is_taken_as_it_stands() {
        assert_eq!(read(&[r#" {"a":  1}"#.to_owned()]).unwrap(), br#" {"a":  1}"#);
        assert_eq!(body(&["[1]"]), Ok(json!([1])));
        assert_eq!(body(&[r#""x""#]), Ok(json!("x")));
    }

    #[test]
    fn refuses_what_is_no_body() {
        for words in [&["a"][..], &["a=1", "b"], &["{}", "{}"], &["@x", "a=1"], &["-", "-"]] {
            assert!(body(words).unwrap_err().contains("neither"), "{words:?}");
        }
        for words in [&["a=1", "a=2"][..], &["a=1", "a.b=2"], &["a.b=2", "a=1"]] {
            assert!(body(words).unwrap_err().contains("'a' is set twice"), "{words:?}");
        }
        let said = body(&["@/nonexistent/body"]).unwrap_err();
        assert_eq!(said, "cannot read the body from /nonexistent/body");
        assert!(body(&["@/dev/zero"]).unwrap_err().contains("larger than"));
    }

    #[test]
    fn the_first_word_may_go_without_its_field() {
        let body = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            body(&named("directory", &words).iter().map(String::as_str).collect::<Vec<_>>())
        };
        assert_eq!(body(&["a/b"]), Ok(json!({ "directory": "a/b" })));
        assert_eq!(body(&["7", "x=1"]), Ok(json!({ "directory": "7", "x": 1 })));
        assert_eq!(body(&["snapshot_path=a"]), Ok(json!({ "snapshot_path": "a" })));
        for path in ["./a=b", "/a=b", "a/b=c", "=", ".=", "2026=a"] {
            assert_eq!(body(&[path]), Ok(json!({ "directory": path })));
        }
        assert_eq!(body(&[r#"{"directory": "b"}"#]), Ok(json!({ "directory": "b" })));
        assert!(body(&["a", "b"]).unwrap_err().contains("'b' is neither"));
    }

    #[test]
    fn the_first_word_may_be_a_number() {
        let body = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            body(&counted("n", &words).iter().map(String::as_str).collect::<Vec<_>>())
        };
        assert_eq!(body(&["3"]), Ok(json!({ "n": 3 })));
        assert_eq!(body(&["3", "paused=true"]), Ok(json!({ "n": 3, "paused": true })));
        assert_eq!(body(&["n=3"]), Ok(json!({ "n": 3 })));
        assert_eq!(body(&[]), Ok(json!({})));
        assert!(body(&["3", "n=4"]).unwrap_err().contains("'n' is set twice"));
        assert!(body(&["three"]).unwrap_err().contains("'three' is neither"));
        assert!(body(&["-3"]).unwrap_err().contains("'-3' is neither"));
    }

    #[test]
    fn id_is_added_where_it_is_missing() {
        let with = |body: &str| String::from_utf8(with_id(body.into(), "id", "a")).unwrap();
        assert_eq!(with("{}"), r#"{"id":"a"}"#);
        assert_eq!(with(r#"{"id": "b"}"#), r#"{"id": "b"}"#);
        assert_eq!(with("nonsense"), "nonsense");
    }
}
