//! The table of everything the API offers besides the sections of the configuration.
use std::borrow::Cow;

use schemars::{Schema, SchemaGenerator, json_schema};
use serde::de::DeserializeOwned;

use super::deprecated::Deprecated;
use super::message::{Action, ActionType, StateLine, Version, Vm, VmState};
use super::route::{Act, Content, Logged, Method, Openable, Route, Shape};
use crate::error::Refusal;
use crate::events::Event;
use crate::exit::Ending;
use crate::fork::{ForkParams, Forked};
use crate::instance::InstanceInfo;
use crate::request::Request;
use crate::snapshot::{LoadParams, RecordParams, RewindParams, SnapshotParams};

/// One row for each endpoint.
pub(super) const ROUTES: &[Route] = &[
    get(
        "/",
        "Who this is, and what the microVM is doing",
        Content::Json(shape::<InstanceInfo>()),
        Act::Ask(|_| Ok(Request::Describe)),
    ),
    get("/version", "The version of the API", Content::Json(shape::<Version>()), Act::Version),
    get(
        "/vm/config",
        "The whole configuration",
        Content::Json(Shape::Configuration),
        Act::Ask(|_| Ok(Request::Config)),
    ),
    change(
        Method::Put,
        "/actions",
        "Start the microVM, or press one of its buttons",
        shape::<Action>(),
        act,
    ),
    opening(
        &[],
        change(
            Method::Put,
            "/vm",
            "Set the whole configuration, and start",
            Shape::Configuration,
            |body| Ok(Request::Launch { body: body.to_vec() }),
        ),
    ),
    change(Method::Patch, "/vm", "Pause the microVM, or let it go on", shape::<Vm>(), set_state),
    change(
        Method::Put,
        "/snapshot/create",
        "Write a snapshot; answered when it is there",
        shape::<SnapshotParams>(),
        snapshot,
    ),
    // Overrides may have metadata in them.
    private(deprecating(
        Deprecated { fields: &["mem_file_path", "enable_diff_snapshots"], ..Deprecated::NOTHING },
        opening(
            LoadParams::OPENABLE,
            change(
                Method::Put,
                "/snapshot/load",
                "Restore a microVM from a snapshot",
                shape::<LoadParams>(),
                load,
            ),
        ),
    )),
    change(
        Method::Put,
        "/snapshot/rewind",
        "Put the microVM back to a snapshot of it",
        shape::<RewindParams>(),
        |body| Ok(Request::Rewind(parse(body)?)),
    ),
    change(
        Method::Put,
        "/snapshot/working-set",
        "Note which pages a restored microVM has touched, for restores to come",
        shape::<RecordParams>(),
        |body| parse::<RecordParams>(body).map(|_| Request::Record),
    ),
    private(make(
        "/fork",
        "Make children of the microVM, in processes of their own; answered when they run",
        shape::<ForkParams>(),
        Content::Json(shape::<Forked>()),
        |body| Ok(Request::Fork(parse(body)?)),
    )),
    get(
        "/mmds",
        "The guest's metadata",
        Content::Json(Shape::Type(any_json)),
        Act::Ask(|_| Ok(Request::Metadata)),
    ),
    private(change(
        Method::Put,
        "/mmds",
        "Set the guest's metadata",
        Shape::Type(any_json),
        |body| Ok(Request::PutMetadata { data: parse(body)? }),
    )),
    private(change(
        Method::Patch,
        "/mmds",
        "Change the guest's metadata (RFC 7396)",
        Shape::Type(any_json),
        |body| Ok(Request::PatchMetadata { patch: parse(body)? }),
    )),
    get(
        "/events",
        "What happens to the microVM until its end, one JSON object a line",
        Content::Lines(Shape::Type(event_line)),
        Act::Events,
    ),
    get(
        "/metrics",
        "Everything that is counted, as Prometheus reads it",
        Content::Text(crate::metrics::MIME),
        Act::Ask(|_| Ok(Request::Metrics)),
    ),
    get(
        "/wait",
        "Why the microVM ended; answered when it has",
        Content::Json(shape::<Ending>()),
        Act::Wait,
    ),
    get("/openapi.json", "This document", Content::Json(Shape::Type(anything)), Act::Document),
];

const fn get(path: &'static str, summary: &'static str, reply: Content, act: Act) -> Route {
    Route {
        method: Method::Get,
        path: Cow::Borrowed(path),
        summary: Cow::Borrowed(summary),
        body: None,
        is_body_optional: false,
        reply,
        act,
        ignores_rest: false,
        deprecated: Deprecated::NOTHING,
        logged: Logged::Whole,
        is_limited: false,
        openable: Openable::Fields(&[]),
    }
}

const fn change(
    method: Method,
    path: &'static str,
    summary: &'static str,
    body: Shape,
    ask: fn(&[u8]) -> Result<Request, Refusal>,
) -> Route {
    Route {
        method,
        path: Cow::Borrowed(path),
        summary: Cow::Borrowed(summary),
        body: Some(body),
        is_body_optional: false,
        reply: Content::Nothing,
        act: Act::Ask(ask),
        ignores_rest: false,
        deprecated: Deprecated::NOTHING,
        logged: Logged::Whole,
        is_limited: false,
        openable: Openable::Fields(&[]),
    }
}

/// Has something in its body that clients should no longer send.
const fn deprecating(deprecated: Deprecated, mut route: Route) -> Route {
    route.deprecated = deprecated;
    route
}

/// Opens what these fields name, and what sections do.
const fn opening(fields: &'static [&'static str], mut route: Route) -> Route {
    route.openable = Openable::Sections(fields);
    route
}

/// Makes something, and says what it has made. What is to be made has defaults.
const fn make(
    path: &'static str,
    summary: &'static str,
    body: Shape,
    reply: Content,
    ask: fn(&[u8]) -> Result<Request, Refusal>,
) -> Route {
    let mut route = change(Method::Post, path, summary, body, ask);
    (route.reply, route.is_body_optional) = (reply, true);
    route
}

/// Sets data of the guest, which may be secrets, and have a limit.
const fn private(mut route: Route) -> Route {
    route.logged = Logged::Never;
    route.is_limited = true;
    route
}

const fn shape<T: schemars::JsonSchema>() -> Shape {
    Shape::Type(|generator| generator.subschema_for::<T>())
}

fn event_line(generator: &mut SchemaGenerator) -> Schema {
    let state = generator.subschema_for::<StateLine>();
    let event = generator.subschema_for::<Event>();
    json_schema!({ "oneOf": [state, event] })
}

fn any_json(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "description": "Any JSON" })
}

fn anything(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object" })
}

fn act(body: &[u8]) -> Result<Request, Refusal> {
    Ok(match parse::<Action>(body)?.action_type {
        ActionType::InstanceStart => Request::Start,
        ActionType::SendCtrlAltDel => Request::CtrlAltDel,
        ActionType::FlushMetrics => Request::FlushMetrics,
        ActionType::Shutdown => Request::Shutdown,
        ActionType::Kill => Request::Kill,
    })
}

fn snapshot(body: &[u8]) -> Result<Request, Refusal> {
    let params: SnapshotParams = parse(body)?;
    params.check_form()?;
    Ok(Request::Snapshot(params))
}

fn load(body: &[u8]) -> Result<Request, Refusal> {
    let params: LoadParams = parse(body)?;
    params.check_form()?;
    Ok(Request::Load(Box::new(params)))
}

fn set_state(body: &[u8]) -> Result<Request, Refusal> {
    Ok(match parse::<Vm>(body)?.state {
        VmState::Paused => Request::Pause,
        VmState::Resumed => Request::Resume,
    })
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(Refusal::Body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_actions_in_serde_words() {
        assert!(matches!(act(br#"{"action_type":"Kill"}"#), Ok(Request::Kill)));
        let text = act(br#"{"action_type":"Nope"}"#).unwrap_err().to_string();
        assert!(text.contains("unknown variant `Nope`, expected one of `InstanceStart`"), "{text}");
        assert!(text.ends_with("at line 1 column 21."), "{text}");
        let text = act(br#"{"action_type":"Kill","x":1}"#).unwrap_err().to_string();
        assert!(text.contains("unknown field `x`"), "{text}");
        assert!(matches!(set_state(br#"{"state":"Paused"}"#), Ok(Request::Pause)));
    }
}
