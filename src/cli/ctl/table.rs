//! JSON as tables for people.
//!
//! ```text
//!  vcpu_count    2                an object: a line for each field
//!  rate_limiter
//!    size  100                    an object in it: below it, further in
//!  drives
//!    drive_id  path_on_host       objects in an array: a row each
//!    root      root.ext4
//!  vsock         -                nothing
//! ```
use serde_json::{Map, Value};

const INDENT: usize = 2;
const GAP: &str = "  ";

/// `value` as lines.
pub(super) fn render(value: &Value) -> String {
    let mut text = String::new();
    match value {
        Value::Object(fields) => object(fields, 0, &mut text),
        Value::Array(rows) => rows_of(rows, 0, &mut text),
        other => text = line(&cell(other)),
    }
    text
}

/// An event, as one line.
pub(super) fn event(line: &str) -> String {
    let Ok(Value::Object(mut fields)) = serde_json::from_str(line) else { return line.to_owned() };
    let time = fields
        .remove("time_us")
        .and_then(|time| time.as_u64())
        .map_or_else(|| "-".to_owned(), |us| format!("{}.{:06} s", us / 1_000_000, us % 1_000_000));
    let name = fields.remove("event").map_or_else(String::new, |name| cell(&name));
    let details = fields.iter().map(|(key, value)| format!("{key}={}", cell(value)));
    let words = [format!("{time:>16}"), name].into_iter().chain(details);
    words.collect::<Vec<_>>().join(GAP)
}

/// The endpoints of an OpenAPI document, a row each.
pub(super) fn endpoints(document: &Value) -> String {
    let paths = document.get("paths").and_then(Value::as_object).into_iter().flatten();
    let rows = paths.flat_map(|(path, item)| {
        let operations = item.as_object().into_iter().flatten();
        operations.map(move |(method, operation)| {
            let summary = operation.get("summary").map_or_else(String::new, cell);
            vec![method.to_ascii_uppercase(), path.clone(), summary]
        })
    });
    let mut text = String::new();
    columns(&rows.collect::<Vec<_>>(), 0, &mut text);
    text
}

fn object(fields: &Map<String, Value>, indent: usize, text: &mut String) {
    let flat = |(_, value): &(&String, &Value)| !is_nested(value);
    let width = fields.iter().filter(flat).map(|(key, _)| key.chars().count()).max().unwrap_or(0);
    for (key, value) in fields {
        let margin = " ".repeat(indent);
        match value {
            value if !is_nested(value) => {
                *text += &line(&format!("{margin}{key:width$}{GAP}{}", cell(value)));
            }
            Value::Object(inner) => {
                *text += &line(&format!("{margin}{key}"));
                object(inner, indent + INDENT, text);
            }
            Value::Array(rows) => {
                *text += &line(&format!("{margin}{key}"));
                rows_of(rows, indent + INDENT, text);
            }
            _ => (),
        }
    }
}

/// Objects as rows: a column for each field that any has, ids first.
fn rows_of(rows: &[Value], indent: usize, text: &mut String) {
    let objects: Vec<&Map<String, Value>> = rows.iter().filter_map(Value::as_object).collect();
    if objects.len() < rows.len() {
        let cells: Vec<_> = rows.iter().map(|row| vec![cell(row)]).collect();
        return columns(&cells, indent, text);
    }
    let mut names: Vec<&String> = objects.iter().flat_map(|object| object.keys()).collect();
    names.sort_by_key(|name| (*name != "id" && !name.ends_with("_id"), *name));
    names.dedup();
    let head = names.iter().map(|&name| name.clone()).collect();
    let body = objects.iter().map(|object| {
        names.iter().map(|&name| object.get(name).map_or_else(|| "-".to_owned(), cell)).collect()
    });
    columns(&std::iter::once(head).chain(body).collect::<Vec<_>>(), indent, text);
}

fn columns(rows: &[Vec<String>], indent: usize, text: &mut String) {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell: &String| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        *text += &line(&format!("{}{}", " ".repeat(indent), cells.collect::<Vec<_>>().join(GAP)));
    }
}

/// Whether a value needs lines of its own.
fn is_nested(value: &Value) -> bool {
    match value {
        Value::Object(fields) => !fields.is_empty(),
        Value::Array(members) => members.iter().any(Value::is_object),
        _ => false,
    }
}

/// A value in one place.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => shown(text),
        Value::Array(members) if members.is_empty() => "-".to_owned(),
        Value::Array(members) if !members.iter().any(Value::is_object) => {
            members.iter().map(cell).collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

/// Text from elsewhere: nothing in it gets to the terminal but as text.
fn shown(text: &str) -> String {
    let escaped = |c: char| match c.is_control() {
        true => c.escape_default().collect(),
        false => c.to_string(),
    };
    text.chars().map(escaped).collect()
}

fn line(text: &str) -> String {
    text.trim_end().to_owned() + "\n"
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn flat_objects_are_aligned() {
        let text = render(&json!({"id": "vm-1", "started": true, "x": null, "n": 1.5}));
        assert_eq!(text, "id       vm-1\nn        1.5\nstarted  true\nx        -\n");
        assert_eq!(render(&json!({"a": [], "b": {}, "c": ["x", "y"]})), "a  -\nb  {}\nc  x, y\n");
        assert_eq!(render(&json!("text")), "text\n");
    }

    #[test]
    fn objects_in_objects_are_further_in() {
        let text = render(&json!({"limiter": {"ops": {"size": 1, "time": 20}}, "a": 1}));
        assert_eq!(text, "a  1\nlimiter\n  ops\n    size  1\n    time  20\n");
    }

    #[test]
    fn objects_in_arrays_are_rows() {
        let drives = json!({"drives": [
            {"path": "root.ext4", "drive_id": "root", "limiter": {"size": 1}},
            {"drive_id": "b", "path": null, "is_root": false},
        ]});
        let lines = [
            "drives",
            "  drive_id  is_root  limiter     path",
            "  root      -        {\"size\":1}  root.ext4",
            "  b         false    -           -",
            "",
        ];
        assert_eq!(render(&drives), lines.join("\n"));
        assert_eq!(render(&json!([{"a": 1}, 2])), "{\"a\":1}\n2\n");
    }

    #[test]
    fn events_are_lines() {
        let text = event(r#"{"event": "ended", "time_us": 1000023, "reason": "killed"}"#);
        assert_eq!(text, "      1.000023 s  ended  reason=killed");
        assert_eq!(event("nonsense"), "nonsense");
    }

    #[test]
    fn endpoints_are_rows() {
        let document = json!({"paths": {"/vm": {"put": {"summary": "Set"}, "patch": {}}}});
        assert_eq!(endpoints(&document), "PATCH  /vm\nPUT    /vm  Set\n");
    }

    #[test]
    fn terminals_are_not_spoken_to() {
        assert_eq!(render(&json!({"a": "\u{1b}[2J\n"})), "a  \\u{1b}[2J\\n\n");
    }
}
