//! The table of routes as an OpenAPI 3.1 document.
use devices::virtio::model::ID_PATTERN;
use schemars::generate::SchemaSettings;
use schemars::{Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::message::FaultMessage;
use super::route::{Content, Id, Method, Route, Routes, Shape};

/// Where a document keeps types, as a JSON pointer.
const SCHEMAS: &str = "/components/schemas";

/// Describes `routes`.
pub(super) fn document(routes: &Routes) -> Value {
    let mut generator = settings().into_generator();
    let mut paths = Map::new();
    for route in routes.iter() {
        let operation = operation(route, &mut generator);
        let path = paths.entry(route.path.to_string()).or_insert_with(|| json!({}));
        if let Value::Object(path) = path {
            path.insert(route.method.name().to_ascii_lowercase(), operation);
        }
    }
    let fault = generator.subschema_for::<FaultMessage>();
    let configuration = configuration(routes, &mut generator);
    let mut schemas = generator.take_definitions(true);
    for route in routes.iter() {
        mark_deprecated(route, &mut schemas);
    }
    schemas.insert("Configuration".to_owned(), configuration);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "husk",
            "summary": "Firecracker's API, and more, over a Unix socket",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "http://localhost" }],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                "Fault": {
                    "description": "Refused; nothing has changed",
                    "content": { "application/json": { "schema": fault } },
                },
            },
        },
    })
}

/// OpenAPI 3.1 schemas are JSON schemas of this draft.
fn settings() -> SchemaSettings {
    SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = SCHEMAS.into();
        settings.meta_schema = None;
    })
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let mut operation = json!({
        "operationId": operation_id(route),
        "summary": route.summary,
        "responses": { "400": { "$ref": "#/components/responses/Fault" } },
    });
    let (status, response) = match route.reply {
        Content::Nothing => ("204", json!({ "description": "Done" })),
        Content::Json(shape) => ("200", content("application/json", schema(shape, generator))),
        Content::Text(mime) => ("200", content(mime, json!({ "type": "string" }))),
        Content::Lines(shape) => ("200", content("application/x-ndjson", schema(shape, generator))),
    };
    operation["responses"][status] = response;
    if route.is_limited {
        operation["responses"]["413"] = json!({ "$ref": "#/components/responses/Fault" });
    }
    if !route.deprecated.is_nothing() {
        operation["responses"][status]["headers"] = json!({
            "Deprecation": {
                "description": "There if the request used something deprecated",
                "schema": { "const": "true" },
            },
        });
    }
    if let Some(shape) = route.body {
        operation["requestBody"] = json!({
            "required": !route.is_body_optional,
            "content": { "application/json": { "schema": schema(shape, generator) } },
        });
    }
    if route.path.contains("{id}") {
        operation["parameters"] = json!([{
            "name": "id",
            "in": "path",
            "required": true,
            "schema": { "type": "string", "pattern": ID_PATTERN },
        }]);
    }
    operation
}

/// Says so where clients look: at the fields of what the request takes.
fn mark_deprecated(route: &Route, schemas: &mut Map<String, Value>) {
    let Some(Shape::Type(schema)) = route.body else { return };
    if route.deprecated.fields.is_empty() {
        return;
    }
    // Asked again for its name only: the definition is among `schemas`.
    let reference = schema(&mut settings().into_generator()).to_value();
    let name = reference["$ref"].as_str().and_then(|path| path.rsplit('/').next());
    let Some(fields) = name.and_then(|name| schemas.get_mut(name)?.get_mut("properties")) else {
        return;
    };
    for field in route.deprecated.fields {
        if let Some(Value::Object(field)) = fields.get_mut(field) {
            field.insert("deprecated".to_owned(), Value::Bool(true));
        }
    }
}

fn content(mime: &str, schema: Value) -> Value {
    json!({ "description": "As asked", "content": { mime: { "schema": schema } } })
}

fn schema(shape: Shape, generator: &mut SchemaGenerator) -> Value {
    match shape {
        Shape::Type(schema) => schema(generator).to_value(),
        Shape::Configuration => json!({ "$ref": format!("#{SCHEMAS}/Configuration") }),
    }
}

/// Every section that can be set, under its name; `null` where it has not been.
fn configuration(routes: &Routes, generator: &mut SchemaGenerator) -> Value {
    let property = |one: Schema, id| match id {
        Id::Needed => json!({ "type": "array", "items": one }),
        Id::None | Id::Ignored => json!({ "anyOf": [one, { "type": "null" }] }),
    };
    let properties: Map<String, Value> = routes
        .sections()
        .iter()
        .filter_map(|section| {
            let one = section.put?(generator);
            Some((section.name.to_owned(), property(one, section.id)))
        })
        .collect();
    json!({
        "description": "Sections of the configuration, as in a configuration file",
        "type": "object",
        "properties": properties,
    })
}

/// "putDrivesById": the method, and the path's words with capitals; "getRoot" where it has none.
fn operation_id(route: &Route) -> String {
    let method = match route.method {
        Method::Get => "get",
        Method::Put => "put",
        Method::Patch => "patch",
        Method::Post => "post",
        Method::Delete => "delete",
    };
    let path = if route.path == "/" { "root" } else { &route.path };
    let words = path.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let capitalised = words.map(|word| match word.split_at_checked(1) {
        Some(_) if word == "id" => "ById".to_owned(),
        Some((initial, rest)) => initial.to_ascii_uppercase() + rest,
        None => String::new(),
    });
    std::iter::once(method.to_owned()).chain(capitalised).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::api::route::tests::sections;

    #[test]
    fn describes_every_route_once() {
        let routes = Routes::new(sections());
        let document = document(&routes);

        let mut ids = HashSet::new();
        for route in routes.iter() {
            let method = route.method.name().to_ascii_lowercase();
            let operation = &document["paths"][route.path.as_ref()][method];
            assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()));
            assert!(!operation["summary"].as_str().unwrap().is_empty());
            assert_eq!(operation["requestBody"].is_object(), route.body.is_some());
            assert_eq!(operation["parameters"].is_array(), route.path.contains('{'));
            let responses = operation["responses"].as_object().unwrap();
            assert_eq!(responses.len(), 2 + usize::from(route.is_limited), "{}", route.path);
        }
        let described: usize = document["paths"]
            .as_object()
            .unwrap()
            .values()
            .map(|p| p.as_object().unwrap().len())
            .sum();
        assert_eq!(described, ids.len());
        assert!(ids.contains("putDrivesById") && ids.contains("getRoot"));
    }

    #[test]
    fn marks_deprecated_fields() {
        let document = document(&Routes::new(sections()));
        let fields = &document["components"]["schemas"]["InstanceInfo"]["properties"];
        assert_eq!(fields["vmm_version"]["deprecated"], true);
        assert_eq!(fields["app_name"]["deprecated"], Value::Null);
        let reply = |path: &str| &document["paths"][path]["put"]["responses"]["204"];
        assert!(reply("/vsock")["headers"]["Deprecation"].is_object());
        assert_eq!(reply("/actions")["headers"], Value::Null);
    }

    #[test]
    fn leaves_no_reference_open() {
        let document = document(&Routes::new(sections()));

        let mut references = Vec::new();
        collect(&document, &mut references);

        assert!(references.len() > 10);
        for reference in references {
            let pointer = reference.strip_prefix('#').expect("references stay in the document");
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        let text = document.to_string();
        assert!(
            !text.contains("$defs") && !text.contains("$schema") && !text.contains("definitions")
        );
    }

    fn collect<'a>(value: &'a Value, references: &mut Vec<&'a str>) {
        match value {
            Value::Object(map) => {
                references.extend(map.get("$ref").and_then(Value::as_str));
                map.values().for_each(|value| collect(value, references));
            }
            Value::Array(values) => values.iter().for_each(|value| collect(value, references)),
            _ => (),
        }
    }
}
