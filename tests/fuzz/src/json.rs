//! JSON that is changed in some places: what is random from end to end is refused by the first parser.
use serde_json::{Map, Value, json};

use crate::bytes::Bytes;

/// Items or bytes that a node is made to have: several changes of one node add up.
const LEN_MAX: usize = 4096;

/// Changes `value` in as many places as the input says.
pub fn spoil(value: &mut Value, input: &mut Bytes<'_>) {
    for _ in 0..1 + input.below(4) {
        let count = count(value);
        let at = usize::from(input.u16()) % count;
        let mut left = at;
        change(value, &mut left, &mut |node| {
            let was = std::mem::take(node);
            *node = other(was, input);
        });
    }
}

/// How many nodes there are.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Object(fields) => fields.values().map(count).sum(),
        Value::Array(items) => items.iter().map(count).sum::<usize>(),
        _ => 0,
    }
}

/// Calls `f` with the node that `left` others come before.
fn change(value: &mut Value, left: &mut usize, f: &mut dyn FnMut(&mut Value)) -> bool {
    if *left == 0 {
        f(value);
        return true;
    }
    *left -= 1;
    match value {
        Value::Object(fields) => fields.values_mut().any(|value| change(value, left, f)),
        Value::Array(items) => items.iter_mut().any(|value| change(value, left, f)),
        _ => false,
    }
}

fn other(was: Value, input: &mut Bytes<'_>) -> Value {
    match (input.below(10), was) {
        (0, Value::Object(mut fields)) => {
            let name = fields.keys().nth(usize::from(input.u8()) % fields.len().max(1)).cloned();
            fields.remove(&name.unwrap_or_default());
            Value::Object(fields)
        }
        (0, Value::Array(mut items)) => {
            items.truncate(usize::from(input.u8()) % (items.len() + 1));
            Value::Array(items)
        }
        (0, Value::String(text)) => {
            let end = usize::from(input.u8()).min(text.len());
            json!(text.get(..end).unwrap_or_default())
        }
        (1, Value::Array(items)) if !items.is_empty() => {
            let len = items.len() * (1 + usize::from(input.below(40)));
            json!(items.iter().cycle().take(len.min(LEN_MAX)).collect::<Vec<_>>())
        }
        (1, Value::String(text)) => {
            let len = text.chars().count() * usize::from(input.u8());
            json!(text.chars().cycle().take(len.min(LEN_MAX)).collect::<String>())
        }
        (1, Value::Number(number)) => {
            let (number, by) = (number.as_u64().unwrap_or(0), u64::from(input.u16()));
            json!(if input.flip() { number.wrapping_add(by) } else { number.wrapping_sub(by) })
        }
        (2, Value::String(text)) => {
            let (at, by) = (usize::from(input.u16()) % text.len().max(1), char::from(input.u8()));
            json!(
                text.chars()
                    .enumerate()
                    .map(|(n, c)| if n == at { by } else { c })
                    .collect::<String>()
            )
        }
        (2, Value::Number(number)) => {
            json!(number.as_u64().unwrap_or(0) ^ 1 << input.below(64))
        }
        (3, _) => json!(u64::from(input.u8())),
        (4, _) => json!(input.u64()),
        (5, _) => input
            .of(&[
                u64::MAX,
                1 << 63,
                u32::MAX.into(),
                1 << 32,
                u16::MAX.into(),
                1 << 16,
                4095,
                4096,
                0x1fff,
            ])
            .into(),
        (6, _) => json!(input.u16().cast_signed()),
        (7, _) => {
            let text = input.u8();
            json!(String::from_utf8_lossy(input.take(text.into())))
        }
        (8, was) => match input.below(8) {
            0 => Value::Null,
            1 => json!(true),
            2 => json!([]),
            3 => Value::Object(Map::new()),
            4 => json!([was]),
            5 => json!(0.5),
            _ => json!({"a": was}),
        },
        (_, was) => {
            let text = input.piece();
            serde_json::from_slice(text).unwrap_or(was)
        }
    }
}
