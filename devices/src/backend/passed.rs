//! Descriptors that are passed to this process while it runs, and the names by which requests and configurations
//! have them.
//!
//! ```text
//!   passed:0   in what came with descriptors: the first of them
//!   held:17    afterwards, and only here: that descriptor, for as long as a Name has it
//! ```
//!
//! Whoever reads JSON that came with descriptors does so within [`with`]; a [`Name`] in it that says `passed:N` is read
//! as `held:M`, and keeps the descriptor open. Whoever opens files finds it by that name ([`held`]), and copies it.
//! Nothing here knows what a descriptor is open for, or how it got here.
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What precedes the place of a descriptor among those that came along. Alone: of one that another process had.
pub const PASSED: &str = "passed:";
/// What precedes the number of a descriptor that is kept.
pub const HELD: &str = "held:";

/// A descriptor that was passed to this process.
#[derive(Debug)]
pub struct Held {
    number: u64,
    fd: OwnedFd,
}

/// All there are, by their numbers, of which none comes twice.
#[derive(Debug)]
struct All {
    next: u64,
    held: BTreeMap<u64, Weak<Held>>,
}

static ALL: Mutex<All> = Mutex::new(All { next: 1, held: BTreeMap::new() });

thread_local! {
    /// What came with what this thread reads.
    static ARRIVED: RefCell<Arc<[Arc<Held>]>> = RefCell::new(Arc::new([]));
}

fn all() -> MutexGuard<'static, All> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Held {
    /// Keeps a descriptor until nothing names it any more.
    pub fn new(fd: OwnedFd) -> Arc<Self> {
        let mut all = all();
        let held = Arc::new(Self { number: all.next, fd });
        all.next = all.next.saturating_add(1);
        all.held.insert(held.number, Arc::downgrade(&held));
        held
    }

    fn name(&self) -> String {
        format!("{HELD}{}", self.number)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        all().held.remove(&self.number);
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether something that is to be opened is no path, but one of the names above.
pub fn is_descriptor(name: impl AsRef<OsStr>) -> bool {
    let name = name.as_ref().as_encoded_bytes();
    name.starts_with(PASSED.as_bytes()) || name.starts_with(HELD.as_bytes())
}

/// The descriptor that `held:N` names, as long as it is kept.
pub fn held(name: impl AsRef<OsStr>) -> Option<Arc<Held>> {
    let number = number(name.as_ref().to_str()?.strip_prefix(HELD)?)?;
    all().held.get(&number)?.upgrade()
}

/// Does `work`, which reads what came with the descriptors that have `arrived`.
pub fn with<R>(arrived: &Arc<[Arc<Held>]>, work: impl FnOnce() -> R) -> R {
    struct Restore(Arc<[Arc<Held>]>);
    impl Drop for Restore {
        fn drop(&mut self) {
            ARRIVED.set(std::mem::replace(&mut self.0, Arc::new([])));
        }
    }
    let _restore = Restore(ARRIVED.replace(arrived.clone()));
    work()
}

/// A text about what came with the descriptors that have `arrived`, in the words of whoever passed them.
pub fn in_senders_words(text: &str, arrived: &[Arc<Held>]) -> String {
    let (mut said, mut rest) = (String::with_capacity(text.len()), text);
    while let Some((before, after)) = rest.split_once(HELD) {
        let end = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let (digits, left) = after.split_at(end);
        let place = arrived.iter().position(|held| number(digits) == Some(held.number));
        said.push_str(before);
        said.push_str(&match place {
            Some(place) => format!("{PASSED}{place}"),
            None => format!("{HELD}{digits}"),
        });
        rest = left;
    }
    said.push_str(rest);
    said
}

/// The places of descriptors that are named in a piece of JSON.
pub fn named_places(json: &serde_json::Value) -> Vec<usize> {
    match json {
        serde_json::Value::String(text) => text
            .strip_prefix(PASSED)
            .and_then(number)
            .and_then(|place| usize::try_from(place).ok())
            .into_iter()
            .collect(),
        serde_json::Value::Array(all) => all.iter().flat_map(named_places).collect(),
        serde_json::Value::Object(all) => all.values().flat_map(named_places).collect(),
        _ => Vec::new(),
    }
}

/// A number in the one way of writing it.
fn number(digits: &str) -> Option<u64> {
    let number: u64 = digits.parse().ok()?;
    (number.to_string() == digits).then_some(number)
}

/// Why nothing is opened by a name of which nothing is kept.
pub(super) fn missing(name: impl AsRef<OsStr>) -> String {
    let name = name.as_ref().to_string_lossy();
    let why = match &*name {
        PASSED => "a descriptor that another process had, or another VM",
        _ => "no such descriptor is kept",
    };
    format!(
        "{name}: {why}; pass one with a request, by SCM_RIGHTS over the API's socket, and name it {PASSED}0, or name a path"
    )
}

/// Why `passed:` and what follows it names nothing.
fn nothing_passed(name: &str, count: usize) -> String {
    let came = match count {
        0 => "none came with this".to_owned(),
        1 => "one came with this, passed:0".to_owned(),
        count => format!("{count} came with this, passed:0 and so on"),
    };
    format!(
        "{name}: no such descriptor was passed: {came}; descriptors are passed with a request, by SCM_RIGHTS over the \
         API's socket"
    )
}

/// What names something outside to be opened: a path or the like, or a descriptor that was passed, which is then kept
/// open.
#[derive(Clone, Debug, Default)]
pub struct Name<T = PathBuf> {
    name: T,
    _held: Option<Arc<Held>>,
}

impl<T> Deref for Name<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.name
    }
}

impl<T> From<T> for Name<T> {
    fn from(name: T) -> Self {
        Self { name, _held: None }
    }
}

impl From<&str> for Name {
    fn from(name: &str) -> Self {
        PathBuf::from(name).into()
    }
}

impl From<String> for Name {
    fn from(name: String) -> Self {
        PathBuf::from(name).into()
    }
}

impl From<&Path> for Name {
    fn from(name: &Path) -> Self {
        name.to_owned().into()
    }
}

impl From<&str> for Name<String> {
    fn from(name: &str) -> Self {
        name.to_owned().into()
    }
}

impl<T: AsRef<OsStr>> AsRef<OsStr> for Name<T> {
    fn as_ref(&self) -> &OsStr {
        self.name.as_ref()
    }
}

/// By what it says: a number comes once.
impl<T: PartialEq> PartialEq for Name<T> {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl<T: Eq> Eq for Name<T> {}

impl<T: Serialize> Serialize for Name<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.name.serialize(serializer)
    }
}

impl<'de, T: From<String>> Deserialize<'de> for Name<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let Some(place) = name.strip_prefix(PASSED) else {
            let held = held(&name);
            return Ok(Self { name: name.into(), _held: held });
        };
        // What a snapshot has: whoever opens it says what is missing.
        if place.is_empty() {
            return Ok(Self { name: name.into(), _held: None });
        }
        ARRIVED.with_borrow(|arrived| {
            let place = number(place).and_then(|place| usize::try_from(place).ok());
            match place.and_then(|place| arrived.get(place)) {
                Some(held) => Ok(Self { name: held.name().into(), _held: Some(held.clone()) }),
                None => Err(serde::de::Error::custom(nothing_passed(&name, arrived.len()))),
            }
        })
    }
}

impl<T: JsonSchema> JsonSchema for Name<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

impl fmt::Display for Name<String> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use serde_json::json;

    use super::*;

    fn descriptor() -> Arc<Held> {
        Held::new(File::open("/dev/null").unwrap().into())
    }

    fn read(text: &str) -> Result<Name, String> {
        serde_json::from_str(&json!(text).to_string()).map_err(|e| e.to_string())
    }

    #[test]
    fn a_name_keeps_what_was_passed() {
        let arrived: Arc<[_]> = [descriptor(), descriptor()].into();
        let second = with(&arrived, || read("passed:1")).unwrap();
        assert_eq!(**second, *Path::new(&arrived[1].name()));
        drop(arrived);
        assert!(held(&second).is_some());
        // What is shown names the same, for as long as it is there.
        let again = read(second.to_str().unwrap()).unwrap();
        assert_eq!(again, second);
        let name = second.to_path_buf();
        drop(second);
        assert!(held(&name).is_some());
        drop(again);
        assert!(held(&name).is_none());
        assert!(read(name.to_str().unwrap()).is_ok(), "whoever opens it refuses it");
    }

    #[test]
    fn what_was_not_passed_is_refused() {
        let arrived: Arc<[_]> = [descriptor()].into();
        for wrong in ["passed:1", "passed:-1", "passed:00", "passed:+0", "passed:x", "passed: 0"] {
            let said = with(&arrived, || read(wrong)).unwrap_err();
            let words = format!("{wrong}: no such descriptor was passed: one came with this");
            assert!(said.starts_with(&words), "{said}");
        }
        let said = read("passed:0").unwrap_err();
        assert!(said.contains("none came with this"), "{said}");
        // Of a snapshot; and paths.
        for right in ["passed:", "passed", "./passed:0", "fd:0"] {
            assert_eq!(with(&arrived, || read(right)).unwrap().to_str(), Some(right));
        }
    }

    #[test]
    fn places_are_found_wherever_they_are() {
        let json =
            json!({"a": "passed:0", "b": [{"c": "passed:2"}, "passed:x", 1], "passed:1": null});
        assert_eq!(named_places(&json), [0, 2]);
    }

    #[test]
    fn refusals_speak_of_what_was_sent() {
        let arrived = [descriptor(), descriptor()];
        let (first, second) = (arrived[0].name(), arrived[1].name());
        let text = format!("{second} is no {first}: {first}0 held: {HELD}x");
        let said = in_senders_words(&text, &arrived);
        assert_eq!(said, format!("passed:1 is no passed:0: {first}0 held: {HELD}x"));
    }

    #[test]
    fn what_is_read_after_a_request_knows_nothing_of_it() {
        let arrived: Arc<[_]> = [descriptor()].into();
        let unwound = std::panic::catch_unwind(|| {
            with(&arrived, || std::panic::resume_unwind(Box::new("as told")));
        });
        assert!(unwound.is_err() && read("passed:0").is_err());
    }
}
