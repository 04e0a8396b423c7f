//! The kernel's structures in JSON: their bytes in hexadecimal, without the zeros at their end.
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub(super) fn serialize<T, S>(value: &T, serializer: S) -> Result<S::Ok, S::Error>
where
    T: IntoBytes + Immutable,
    S: Serializer,
{
    serializer.serialize_str(&encode(value.as_bytes()))
}

pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromBytes + IntoBytes,
    D: Deserializer<'de>,
{
    let mut value = T::new_zeroed();
    decode(&String::deserialize(deserializer)?, value.as_mut_bytes()).map_err(Error::custom)?;
    Ok(value)
}

fn encode(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let len = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let digits = bytes[..len].iter().flat_map(|byte| [byte >> 4, byte & 0xf]);
    digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

/// Fills `bytes`, which are zero, from their beginning.
fn decode(hex: &str, bytes: &mut [u8]) -> Result<(), &'static str> {
    let (digits, _) = hex.as_bytes().as_chunks::<2>();
    if !hex.len().is_multiple_of(2) || digits.len() > bytes.len() {
        return Err("it has another length");
    }
    let value = |digit: u8| char::from(digit).to_digit(16).ok_or("it is not hexadecimal");
    for ([high, low], byte) in digits.iter().zip(bytes) {
        *byte = u8::try_from(value(*high)? << 4 | value(*low)?).map_err(|_| "not a byte")?;
    }
    Ok(())
}

/// A list of the kernel's structures.
pub(super) mod list {
    use super::*;

    pub(in super::super) fn serialize<T, S>(list: &[T], serializer: S) -> Result<S::Ok, S::Error>
    where
        T: IntoBytes + Immutable,
        S: Serializer,
    {
        serializer.collect_seq(list.iter().map(|item| encode(item.as_bytes())))
    }

    pub(in super::super) fn deserialize<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
    where
        T: FromBytes + IntoBytes,
        D: Deserializer<'de>,
    {
        let items = Vec::<String>::deserialize(deserializer)?;
        let item = |hex: String| {
            let mut value = T::new_zeroed();
            decode(&hex, value.as_mut_bytes()).map(|()| value)
        };
        items.into_iter().map(item).collect::<Result<_, _>>().map_err(Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_at_the_end_are_left_out() {
        let mut bytes = [0; 4];
        assert_eq!(encode(&[0, 0x5f, 0, 0]), "005f");
        decode("005f", &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0x5f, 0, 0]);
        assert_eq!(encode(&[0; 9]), "");
    }

    #[test]
    fn what_is_not_so_many_bytes_is_refused() {
        for hex in ["0", "0g", "0000000001", "é0", "+1"] {
            assert!(decode(hex, &mut [0; 4]).is_err(), "{hex}");
        }
    }
}
