//! What the user wants a guest's CPU to be, other than the host's: bits of CPUID and of MSRs, and
//! what KVM must be able to do. The JSON is that of Firecracker's custom CPU templates.
use std::fmt::{self, Display};
use std::num::ParseIntError;
use std::str::FromStr;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::template::CpuTemplate;

/// A CPU configuration: `PUT /cpu-config`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Numbers of KVM's capabilities that must be there: "171"; or, with "!" in front, that need
    /// not be, though they would otherwise be asked for.
    #[serde(default)]
    pub kvm_capabilities: Vec<Capability>,
    /// What to change in CPUID.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// What to change in model-specific registers.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// Changes to one leaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// The leaf: "0x7".
    pub leaf: Number,
    /// The subleaf: "0x0".
    pub subleaf: Number,
    /// KVM's flags for it: 1 if the subleaf matters.
    pub flags: u32,
    /// What to change in it.
    pub modifiers: Vec<RegisterModifier>,
}

/// Changes to one register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// Which.
    pub register: Register,
    /// Its bits.
    pub bitmap: Bitmap<32>,
}

/// A register that CPUID fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Changes to one model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its address: "0x10a".
    pub addr: Number,
    /// Its bits.
    pub bitmap: Bitmap<64>,
}

/// A capability of KVM by its number, as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// Must be there.
    Needed(u32),
    /// Is not asked for.
    Waived(u32),
}

/// A number, as text with its base in front: "0x10a" or "0b101".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number(pub u32);

/// Bits to set, to clear and to leave, the highest first: "0bxxx1_0xxx". What is left out is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap<const BITS: u32> {
    /// The bits that change.
    mask: u64,
    /// What they become.
    value: u64,
}

/// The CPU that was asked for cannot be had on this host. Firecracker's words, where it has some.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// A template for processors of another make.
    #[error(
        "{template:?} is for {makers} processors: CPU vendor mismatched between actual CPU and CPU \
         template"
    )]
    Vendor {
        /// Which.
        template: CpuTemplate,
        /// Whose processors it is for.
        makers: &'static str,
    },
    /// A template for later processors.
    #[error(
        "{template:?} is for {models} and later: The current CPU model is not permitted to apply \
         the CPU template"
    )]
    Model {
        /// Which.
        template: CpuTemplate,
        /// The first processors that it is for.
        models: &'static str,
    },
    /// KVM cannot do something.
    #[error("Missing KVM capabilities: {0}")]
    NoCapability(u32),
    /// KVM does not have the leaf.
    #[error(
        "Template changes a CPUID entry not supported by KVM: Leaf: {leaf:#x}, Subleaf: \
         {subleaf:#x}"
    )]
    NoLeaf {
        /// Which leaf.
        leaf: u32,
        /// Which part of it.
        subleaf: u32,
    },
    /// KVM does not let a vCPU have the CPUID that the changes make.
    #[error("KVM refuses the CPUID that the changes make: {0}")]
    CpuidRefused(kvm_ioctls::Error),
    /// KVM does not have the MSR.
    #[error("Template changes an MSR entry not supported by KVM: Register Address: {0:#x}")]
    NoMsr(u32),
    /// KVM does not let the MSR have the value.
    #[error("KVM refuses to change MSR {index:#x} from {before:#x} to {after:#x}")]
    MsrRefused {
        /// Its address.
        index: u32,
        /// Its value.
        before: u64,
        /// The value it was to get.
        after: u64,
    },
}

impl CpuError {
    /// The field of a [`CpuConfig`] that it is about; none for what only templates can have wrong.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::Vendor { .. } | Self::Model { .. } => None,
            Self::NoCapability(_) => Some("kvm_capabilities"),
            Self::NoLeaf { .. } | Self::CpuidRefused(_) => Some("cpuid_modifiers"),
            Self::NoMsr(_) | Self::MsrRefused { .. } => Some("msr_modifiers"),
        }
    }
}

impl CpuConfig {
    /// Changes `cpuid`, which is what KVM supports.
    pub(crate) fn apply_to(&self, cpuid: &mut CpuId) -> Result<(), CpuError> {
        for CpuidModifier { leaf, subleaf, flags, modifiers } in &self.cpuid_modifiers {
            let (leaf, subleaf) = (leaf.0, subleaf.0);
            let mut entries = cpuid.as_mut_slice().iter_mut();
            let entry = entries
                .find(|entry| entry.function == leaf && entry.index == subleaf)
                .ok_or(CpuError::NoLeaf { leaf, subleaf })?;
            entry.flags = *flags;
            for RegisterModifier { register, bitmap } in modifiers {
                let register = register.of(entry);
                *register = bitmap.apply_to(*register);
            }
        }
        Ok(())
    }
}

impl Register {
    fn of(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }
}

impl Bitmap<32> {
    fn apply_to(self, register: u32) -> u32 {
        let changed = u64::from(register) & !self.mask | self.value;
        u32::try_from(changed).expect("a bitmap of 32 bits has no others")
    }
}

impl Bitmap<64> {
    pub(crate) fn apply_to(self, register: u64) -> u64 {
        register & !self.mask | self.value
    }
}

impl<const BITS: u32> FromStr for Bitmap<BITS> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse =
            |why: &dyn Display| format!("Failed to parse string [{text}] as a bitmap - {why}");
        let digits = text.strip_prefix("0b").unwrap_or(text);
        let (mut mask, mut value) = (0, 0);
        let mut bit = 1_u64;
        let mut left = BITS;
        for digit in digits.chars().rev().filter(|&digit| digit != '_') {
            if left == 0 {
                return Err(refuse(&format_args!("string is too long: it is for {BITS} bits")));
            }
            match digit {
                'x' => {}
                '0' => mask |= bit,
                '1' => (mask, value) = (mask | bit, value | bit),
                other => return Err(refuse(&format_args!("unknown character: {other}"))),
            }
            left -= 1;
            bit = bit.rotate_left(1);
        }
        Ok(Self { mask, value })
    }
}

impl<const BITS: u32> Display for Bitmap<BITS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0b")?;
        (0..BITS).rev().try_for_each(|bit| {
            f.write_str(match (self.mask >> bit & 1, self.value >> bit & 1) {
                (0, _) => "x",
                (_, 0) => "0",
                _ => "1",
            })
        })
    }
}

impl FromStr for Number {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, base) = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(digits), _) => (digits, 16),
            (_, Some(digits)) => (digits, 2),
            (None, None) => {
                return Err(format!(
                    "No supported number system prefix found in value [{text}]. Make sure to prefix \
                     the number with '0x' for hexadecimal numbers or '0b' for binary numbers."
                ));
            }
        };
        unsigned(digits, base).map(Self).map_err(|e| {
            format!("Failed to parse string [{text}] as a number for CPU template - {e}")
        })
    }
}

impl Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl FromStr for Capability {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, make): (_, fn(u32) -> Self) = match text.strip_prefix('!') {
            Some(digits) => (digits, Self::Waived),
            None => (text, Self::Needed),
        };
        unsigned(digits, 10).map(make).map_err(|e| {
            format!(
                "Failed to parse string [{text}] as a kvm capability - can not convert to numeric: {e}"
            )
        })
    }
}

impl Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Needed(number) => write!(f, "{number}"),
            Self::Waived(number) => write!(f, "!{number}"),
        }
    }
}

/// Without the plus sign that the standard library takes.
fn unsigned(digits: &str, base: u32) -> Result<u32, ParseIntError> {
    let digits = if digits.starts_with('+') { "+" } else { digits };
    u32::from_str_radix(digits, base)
}

/// JSON strings that are read by a type's `FromStr` and written by its `Display`.
macro_rules! text {
    ([$($generics:tt)*] $type:ty, $name:literal, $pattern:literal) => {
        impl<'de, $($generics)*> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }

        impl<$($generics)*> Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<$($generics)*> JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> std::borrow::Cow<'static, str> {
                $name.into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "pattern": $pattern })
            }
        }
    };
}

text!([const BITS: u32] Bitmap<BITS>, "Bitmap", "^(0b)?[01x_]*$");
text!([] Number, "Number", "^(0x[0-9a-fA-F]+|0b[01]+)$");
text!([] Capability, "Capability", "^!?[0-9]+$");

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(text: &str) -> Bitmap<32> {
        text.parse().unwrap()
    }

    fn refusal<T: serde::de::DeserializeOwned + fmt::Debug>(json: &str) -> String {
        serde_json::from_str::<T>(json).unwrap_err().to_string()
    }

    #[test]
    fn a_bitmap_sets_clears_and_leaves() {
        assert_eq!(bitmap("0b1x0x").apply_to(0b0110), 0b1100);
        assert_eq!(bitmap("1x_0x").apply_to(0xffff_fff6), 0xffff_fffc);
        assert_eq!(bitmap("").apply_to(7), 7);
        assert_eq!(bitmap("0b1xxx_xxxx_xxxx_xxxx_xxxx_xxxx_xxxx_xxx0").apply_to(3), 0x8000_0002);
        let wide: Bitmap<64> = format!("0b1{}0", "x".repeat(62)).parse().unwrap();
        assert_eq!(wide.apply_to(1), 1 << 63);
    }

    #[test]
    fn texts_are_written_as_they_are_read() {
        for text in ["0b1xxxxxxxxxxxxxxxxxxxxxxxxxxxxx01", "0bxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"] {
            assert_eq!(bitmap(text).to_string(), text);
        }
        assert_eq!(bitmap("_1_").to_string(), "0bxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx1");
        assert_eq!("0b101".parse::<Number>().unwrap().to_string(), "0x5");
        for text in ["171", "!172"] {
            assert_eq!(text.parse::<Capability>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn refuses_in_firecrackers_words_and_says_the_value() {
        let said = refusal::<Bitmap<32>>(&format!("{:?}", "0".repeat(33)));
        assert!(said.contains(" as a bitmap - string is too long: it is for 32 bits"), "{said}");
        let said = refusal::<Bitmap<64>>(r#""0b0_xϽ1""#);
        assert!(said.contains("[0b0_xϽ1] as a bitmap - unknown character: Ͻ"), "{said}");
        let said = refusal::<Number>(r#""69""#);
        assert!(
            said.starts_with("No supported number system prefix found in value [69]"),
            "{said}"
        );
        for number in ["0jj0", "0x", "0xg", "0b2", "0x100000000", "0x+1"] {
            assert!(refusal::<Number>(&format!("{number:?}")).contains(number), "{number}");
        }
        for capability in ["", "!", "x", "-1", "+1", "4294967296"] {
            let said = refusal::<Capability>(&format!("{capability:?}"));
            assert!(said.starts_with(&format!("Failed to parse string [{capability}]")), "{said}");
        }
        let said = refusal::<RegisterModifier>(r#"{"register": "ekx", "bitmap": "0b1"}"#);
        assert!(said.starts_with("unknown variant `ekx`, expected one of `eax`, `ebx`"), "{said}");
        let said = refusal::<CpuConfig>(r#"{"reg_modifiers": []}"#);
        assert!(said.starts_with("unknown field `reg_modifiers`, expected one of"), "{said}");
        let said = refusal::<MsrModifier>(r#"{"addr": "0x10a"}"#);
        assert!(said.starts_with("missing field `bitmap`"), "{said}");
    }

    #[test]
    fn changes_the_leaf_that_is_meant() {
        let leaf = |function, index, ecx| kvm_cpuid_entry2 {
            function,
            index,
            ecx,
            ..kvm_cpuid_entry2::default()
        };
        let mut cpuid =
            CpuId::from_entries(&[leaf(7, 0, 1), leaf(7, 1, 1), leaf(1, 0, 1)]).unwrap();
        let change = |leaf: &str, subleaf: &str| -> CpuConfig {
            let json = format!(
                r#"{{"cpuid_modifiers": [{{"leaf": "{leaf}", "subleaf": "{subleaf}", "flags": 1,
                "modifiers": [{{"register": "ecx", "bitmap": "0b1x0"}},
                              {{"register": "edx", "bitmap": "0b1"}}]}}]}}"#
            );
            serde_json::from_str(&json).unwrap()
        };
        change("0x7", "0b1").apply_to(&mut cpuid).unwrap();
        let changed = kvm_cpuid_entry2 { edx: 1, flags: 1, ..leaf(7, 1, 4) };
        assert_eq!(cpuid.as_slice(), [leaf(7, 0, 1), changed, leaf(1, 0, 1)]);
        let lacking = change("0x7", "0x2").apply_to(&mut cpuid).unwrap_err();
        assert_eq!(lacking, CpuError::NoLeaf { leaf: 7, subleaf: 2 });
    }
}
