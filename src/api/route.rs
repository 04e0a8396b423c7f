//! What a route is, and which one a method and a path mean. Dispatch and the OpenAPI document both read
//! routes, so that neither can know an endpoint that the other does not.
//!
//! To add an endpoint: a row in [`ROUTES`], or a [`Section`] where the configuration has a new one.
use std::borrow::Cow;

use devices::virtio::model::{ID_LEN_MAX, SchemaFn, is_id};

use super::deprecated::Deprecated;
use super::table::ROUTES;
use crate::error::Refusal;
use crate::request::Request;

/// A section of the configuration, as the API offers it. A method without a schema is not offered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Section {
    /// Its key in the configuration: "boot-source", "drives". A view of a device has its path here.
    pub(crate) name: &'static str,
    /// Its path.
    pub(crate) path: &'static str,
    /// What follows the name in the path.
    pub(crate) id: Id,
    /// One line for people: what it is.
    pub(crate) about: &'static str,
    /// What `GET` shows.
    pub(crate) get: Option<SchemaFn>,
    /// What `PUT` takes: the section, or one entry where there are several.
    pub(crate) put: Option<SchemaFn>,
    /// What `PATCH` takes.
    pub(crate) patch: Option<SchemaFn>,
    /// Whether a `PATCH` need not have a body: none means `{}`.
    pub(crate) is_patch_optional: bool,
    /// Whether `DELETE` takes it away.
    pub(crate) is_removable: bool,
    /// What clients should no longer send.
    pub(crate) deprecated: Deprecated,
    /// How much of a request's body the log shows.
    pub(crate) logged: Logged,
    /// Fields that name what is opened on the host: a descriptor that was passed will do.
    pub(crate) openable: &'static [&'static str],
}

impl Section {
    /// A section with nothing special about it, to be completed by `..Section::PLAIN`.
    pub(crate) const PLAIN: Self = Self {
        name: "",
        path: "",
        id: Id::None,
        about: "",
        get: None,
        put: None,
        patch: None,
        is_patch_optional: false,
        is_removable: false,
        deprecated: Deprecated::NOTHING,
        logged: Logged::Whole,
        openable: &[],
    };
}

/// How much of a request's body the log shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Logged {
    /// All that fits into a line.
    Whole,
    /// The same, at level Debug and below; else that there is this to be seen.
    AtDebug(&'static str),
    /// Nothing, ever: it may hold secrets.
    Never,
}

/// What follows a section's name in the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Id {
    /// Nothing: there is one.
    None,
    /// The id of one of several.
    Needed,
    /// Nothing, or anything: Firecracker's clients send `/vsock/vsock0`.
    Ignored,
}

/// The methods that routes know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// Show.
    Get,
    /// Set, or do.
    Put,
    /// Change.
    Patch,
    /// Make.
    Post,
    /// Take away.
    Delete,
}

impl Method {
    /// As HTTP spells it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Post => "POST",
            Self::Delete => "DELETE",
        }
    }
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) method: Method,
    /// `{id}` stands for one segment.
    pub(crate) path: Cow<'static, str>,
    pub(crate) summary: Cow<'static, str>,
    /// What the request's body is.
    pub(crate) body: Option<Shape>,
    /// Whether it may be absent: that means `{}`.
    pub(crate) is_body_optional: bool,
    pub(crate) reply: Content,
    pub(crate) act: Act,
    /// Whether more path may follow, and is ignored.
    pub(crate) ignores_rest: bool,
    /// What clients should no longer send.
    pub(crate) deprecated: Deprecated,
    /// How much of the request's body the log shows.
    pub(crate) logged: Logged,
    /// Whether what it sets may be too large: then the status is 413.
    pub(crate) is_limited: bool,
    /// What in the body can be a descriptor that was passed.
    pub(crate) openable: Openable,
}

/// Fields of a body that name what is opened on the host: descriptors that were passed will do for them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Openable {
    /// These.
    Fields(&'static [&'static str]),
    /// These, and those of all sections.
    Sections(&'static [&'static str]),
}

/// What a piece of JSON looks like.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Shape {
    Type(SchemaFn),
    /// Every section under its name.
    Configuration,
}

/// What a reply holds when all went well.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content {
    Nothing,
    Json(Shape),
    /// Text of this media type.
    Text(&'static str),
    /// JSON, one value a line, as things happen.
    Lines(Shape),
}

/// What a route does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    /// Asks the VMM what the function makes of the body.
    Ask(fn(&[u8]) -> Result<Request, Refusal>),
    /// Asks the VMM about a section.
    Section(&'static str),
    /// Asks the VMM to say when the VM has ended: may take for ever.
    Wait,
    /// Follows the VM.
    Events,
    /// Says which API this is.
    Version,
    /// Shows the OpenAPI document.
    Document,
}

/// All routes, the sections' included.
#[derive(Debug)]
pub(crate) struct Routes {
    routes: Vec<Route>,
    sections: Vec<Section>,
}

impl Routes {
    pub(crate) fn new(sections: Vec<Section>) -> Self {
        Self { routes: sections.iter().flat_map(section_routes).collect(), sections }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Route> {
        ROUTES.iter().chain(&self.routes)
    }

    pub(crate) fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Fields of the body of a request in which a descriptor that was passed will do.
    pub(crate) fn openable(&self, route: &Route) -> Vec<&'static str> {
        match route.openable {
            Openable::Fields(fields) => fields.to_vec(),
            Openable::Sections(fields) => {
                let sections = self.sections.iter().flat_map(|section| section.openable);
                let mut all: Vec<_> = sections.chain(fields).copied().collect();
                all.sort_unstable();
                all.dedup();
                all
            }
        }
    }

    /// The route that `method` and `path` mean, and the id in the path. A query is part of the
    /// path, and of no route.
    pub(crate) fn find(
        &self,
        method: &str,
        path: &str,
    ) -> Result<(&Route, Option<String>), RouteError> {
        let segments = split(path);
        let with_method = || self.iter().filter(|route| route.method.name() == method);
        let found = with_method().find_map(|route| Some((route, route.captures(&segments)?)));
        match found {
            Some((route, None)) => Ok((route, None)),
            Some((route, Some(raw))) => Ok((route, Some(checked_id(raw)?))),
            None if with_method().any(|route| route.lacks_only_id(&segments)) => {
                Err(RouteError::EmptyId)
            }
            None => Err(RouteError::unknown(method, path)),
        }
    }
}

/// Why a request does not get as far as the VMM. The texts are Firecracker's where it has one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RouteError {
    #[error("Invalid request method and/or path: {method} {path}.")]
    Unknown { method: String, path: String },
    #[error("The ID cannot be empty.")]
    EmptyId,
    #[error(
        "API Resource IDs can only contain alphanumeric characters, underscores and hyphens, \
         {ID_LEN_MAX} at most."
    )]
    InvalidId,
}

impl RouteError {
    /// Of a path that may be anything, shown as far as is sensible.
    fn unknown(method: &str, path: &str) -> Self {
        let path = path.trim_start_matches('/').chars().take(SHOWN_PATH_LEN).collect();
        Self::Unknown { method: method.chars().take(SHOWN_PATH_LEN).collect(), path }
    }
}

const SHOWN_PATH_LEN: usize = 128;
const ID_PLACE: &str = "{id}";

impl Route {
    /// `None` if the route is not meant; otherwise the segment in the id's place, if it has one.
    fn captures<'a>(&self, segments: &[&'a str]) -> Option<Option<&'a str>> {
        let mut segments = segments.iter();
        let mut id = None;
        for part in split(&self.path) {
            let segment = segments.next()?;
            if part == ID_PLACE {
                id = Some(*segment);
            } else if part != *segment {
                return None;
            }
        }
        (self.ignores_rest || segments.next().is_none()).then_some(id)
    }

    fn lacks_only_id(&self, segments: &[&str]) -> bool {
        split(&self.path)
            .split_last()
            .is_some_and(|(&last, rest)| last == ID_PLACE && rest == segments)
    }
}

/// Slashes in front and one at the end mean nothing, as in Firecracker.
fn split(path: &str) -> Vec<&str> {
    path.trim_start_matches('/').split_terminator('/').collect()
}

fn section_routes(section: &Section) -> impl Iterator<Item = Route> + use<> {
    let Section { name, path, id, about, is_patch_optional, deprecated, logged, openable, .. } =
        *section;
    let plain = format!("/{path}");
    let one = if id == Id::Needed { format!("/{path}/{ID_PLACE}") } else { plain.clone() };
    let route = move |method, path: &str, verb, body: Option<SchemaFn>, reply| Route {
        method,
        path: Cow::Owned(path.to_owned()),
        summary: Cow::Owned(format!("{verb} {name}. {about}")),
        body: body.map(Shape::Type),
        is_body_optional: method == Method::Patch && is_patch_optional,
        reply,
        act: Act::Section(name),
        ignores_rest: id == Id::Ignored,
        deprecated,
        logged,
        is_limited: false,
        openable: match body {
            Some(_) => Openable::Fields(openable),
            None => Openable::Fields(&[]),
        },
    };
    let get = section
        .get
        .map(|f| route(Method::Get, &plain, "Show", None, Content::Json(Shape::Type(f))));
    let put = section.put.map(|f| route(Method::Put, &one, "Set", Some(f), Content::Nothing));
    let patch =
        section.patch.map(|f| route(Method::Patch, &one, "Change", Some(f), Content::Nothing));
    let delete =
        section.is_removable.then(|| route(Method::Delete, &one, "Remove", None, Content::Nothing));
    [get, put, patch, delete].into_iter().flatten()
}

fn checked_id(raw: &str) -> Result<String, RouteError> {
    let id = percent_decoded(raw).ok_or(RouteError::InvalidId)?;
    match id.as_str() {
        "" => Err(RouteError::EmptyId),
        id if is_id(id) => Ok(id.to_owned()),
        _ => Err(RouteError::InvalidId),
    }
}

/// `None` if a percent sign is not followed by two hexadecimal digits or the text is not ASCII,
/// which no id is.
fn percent_decoded(raw: &str) -> Option<String> {
    let mut bytes = raw.bytes();
    let mut text = String::with_capacity(raw.len());
    while let Some(byte) = bytes.next() {
        let byte = if byte == b'%' {
            let mut digit = || char::from(bytes.next()?).to_digit(16);
            u8::try_from(digit()? * 16 + digit()?).ok()?
        } else {
            byte
        };
        text.push(byte.is_ascii().then_some(char::from(byte))?);
    }
    Some(text)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::instance::InstanceInfo;

    /// Sections of each kind.
    pub(crate) fn sections() -> Vec<Section> {
        let schema: SchemaFn = |generator| generator.subschema_for::<InstanceInfo>();
        let section = |name, id| Section {
            name,
            path: name,
            id,
            about: "something",
            get: (id == Id::None).then_some(schema),
            put: Some(schema),
            patch: (id != Id::Ignored).then_some(schema),
            is_removable: id == Id::Needed,
            deprecated: Deprecated { fields: &["vmm_version"], ..Deprecated::NOTHING },
            ..Section::PLAIN
        };
        vec![
            section("machine-config", Id::None),
            section("drives", Id::Needed),
            section("vsock", Id::Ignored),
        ]
    }

    fn found(method: &str, path: &str) -> Result<(String, Option<String>), RouteError> {
        let routes = Routes::new(sections());
        routes.find(method, path).map(|(route, id)| (route.path.to_string(), id))
    }

    fn text(method: &str, path: &str) -> String {
        found(method, path).unwrap_err().to_string()
    }

    #[test]
    fn finds_fixed_routes_and_sections() {
        assert_eq!(found("GET", "/"), Ok(("/".into(), None)));
        assert_eq!(found("GET", "//vm/config/"), Ok(("/vm/config".into(), None)));
        assert_eq!(found("PATCH", "/vm"), Ok(("/vm".into(), None)));
        assert_eq!(found("GET", "/machine-config"), Ok(("/machine-config".into(), None)));
        assert_eq!(
            found("PUT", "/drives/r-0_t"),
            Ok(("/drives/{id}".into(), Some("r-0_t".into())))
        );
        assert_eq!(
            found("PUT", "/drives/%72oot"),
            Ok(("/drives/{id}".into(), Some("root".into())))
        );
        assert_eq!(found("PUT", "/vsock/vsock0"), Ok(("/vsock".into(), None)));
        assert_eq!(found("PUT", "/vsock"), Ok(("/vsock".into(), None)));
    }

    #[test]
    fn refuses_what_is_in_no_table() {
        assert_eq!(text("GET", "/nope"), "Invalid request method and/or path: GET nope.");
        assert_eq!(text("GET", "/vsock"), "Invalid request method and/or path: GET vsock.");
        assert_eq!(text("GET", "/mmds/x"), "Invalid request method and/or path: GET mmds/x.");
        assert_eq!(text("PUT", "/snapshot"), "Invalid request method and/or path: PUT snapshot.");
        assert_eq!(
            text("DELETE", "/machine-config"),
            "Invalid request method and/or path: DELETE machine-config."
        );
        assert_eq!(text("DELETE", "/vm"), "Invalid request method and/or path: DELETE vm.");
        assert_eq!(text("POST", "/"), "Invalid request method and/or path: POST .");
        assert_eq!(text("PUT", "/actions/x"), "Invalid request method and/or path: PUT actions/x.");
        assert_eq!(text("GET", "/version?x"), "Invalid request method and/or path: GET version?x.");
        assert!(text("GET", &format!("/{}", "x".repeat(5000))).len() < 200);
    }

    #[test]
    fn refuses_bad_ids() {
        assert_eq!(text("PUT", "/drives"), "The ID cannot be empty.");
        assert_eq!(text("PUT", "/drives/"), "The ID cannot be empty.");
        for id in ["..", "%2e%2e", "a%2fb", "%00", "%", "%4", "%zz", "caf%c3%a9", "a b"] {
            assert_eq!(found("PUT", &format!("/drives/{id}")), Err(RouteError::InvalidId), "{id}");
        }
        assert!(found("PUT", &format!("/drives/{}", "x".repeat(64))).is_ok());
        assert_eq!(
            found("PUT", &format!("/drives/{}", "x".repeat(65))),
            Err(RouteError::InvalidId)
        );
    }
}
