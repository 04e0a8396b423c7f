//! The table of verbs: what `husk ctl` calls each endpoint of the API. A test fails for an endpoint
//! that no verb reaches.

/// A verb: its words, and the request that they stand for.
#[derive(Debug)]
pub(super) struct Verb {
    pub(super) name: &'static str,
    pub(super) about: &'static str,
    pub(super) method: &'static str,
    /// `{id}` stands for the argument of that name; empty: the path is an argument.
    pub(super) path: &'static str,
    pub(super) body: Body,
    pub(super) reply: Reply,
}

/// Where a request's body comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// There is none.
    None,
    /// Always the same.
    Fixed(&'static str),
    /// The arguments; none of them are `{}`.
    Words,
    /// The arguments; where there are none, there is no body: what is replaced by `{}` is lost.
    Said,
    /// The arguments, and the id under this name.
    WithId(&'static str),
    /// The arguments, the first of which may be the value of this field by itself.
    In(&'static str),
    /// The arguments, the first of which may be a number by itself: the value of this field.
    Count(&'static str),
}

/// What to do with a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// Show it.
    Shown,
    /// Show it, however long it takes.
    Awaited,
    /// Show its lines as they come.
    Followed,
    /// Show its endpoints: it is the OpenAPI document.
    Listed,
}

/// Verbs about one thing: `husk ctl drive set`.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) name: &'static str,
    /// As the API calls it.
    pub(super) alias: Option<&'static str>,
    pub(super) about: &'static str,
    pub(super) verbs: &'static [Verb],
}

/// Verbs that are one word.
pub(super) const VERBS: &[Verb] = &[
    get("status", "Show what the VM is doing", "/"),
    get("version", "Show which version of Firecracker's API this is", "/version"),
    get("config", "Show the whole configuration", "/vm/config"),
    put("launch", "Set the whole configuration, and start", "/vm"),
    act("start", "Start what is configured", r#"{"action_type": "InstanceStart"}"#),
    state("pause", "Stop the guest where it is", r#"{"state": "Paused"}"#),
    state("resume", "Let it go on", r#"{"state": "Resumed"}"#),
    Verb {
        method: "POST",
        body: Body::Count("n"),
        reply: Reply::Awaited,
        ..put("fork", "Make children of the VM: N, then paused=true, overrides=[...]", "/fork")
    },
    act("shutdown", "Press the power button", r#"{"action_type": "Shutdown"}"#),
    act("ctrl-alt-del", "Press Ctrl-Alt-Del", r#"{"action_type": "SendCtrlAltDel"}"#),
    act("kill", "End the VM at once", r#"{"action_type": "Kill"}"#),
    Verb {
        body: Body::In("directory"),
        reply: Reply::Awaited,
        ..put("snapshot", "Write a snapshot into a directory", "/snapshot/create")
    },
    Verb {
        body: Body::In("directory"),
        ..put(
            "load",
            "Restore the snapshot in a directory; resume_vm=true lets it go on",
            "/snapshot/load",
        )
    },
    Verb {
        body: Body::Fixed("{}"),
        ..put("record", "Note which pages a restored VM has touched", "/snapshot/working-set")
    },
    put("rewind", "Go back to the snapshot that was restored or written last", "/snapshot/rewind"),
    Verb {
        reply: Reply::Awaited,
        ..get("wait", "Wait until the VM has ended, and say why", "/wait")
    },
    Verb {
        reply: Reply::Followed,
        ..get("events", "Show state changes as they happen", "/events")
    },
    Verb { reply: Reply::Listed, ..get("openapi", "List every endpoint", "/openapi.json") },
    get("get", "GET any path", ""),
    said(put("put", "PUT to any path", "")),
    said(patch("patch", "PATCH any path", "")),
    Verb { method: "DELETE", ..get("delete", "DELETE any path", "") },
];

/// Verbs that are two.
pub(super) const GROUPS: &[Group] = &[
    Group {
        name: "boot",
        alias: Some("boot-source"),
        about: "What boots",
        verbs: &[put("set", "Set kernel, initrd and command line", "/boot-source")],
    },
    Group {
        name: "machine",
        alias: Some("machine-config"),
        about: "vCPUs and memory",
        verbs: &[
            get("get", "Show them", "/machine-config"),
            put("set", "Set them", "/machine-config"),
            patch("update", "Change some of them", "/machine-config"),
        ],
    },
    Group {
        name: "cpu",
        alias: Some("cpu-config"),
        about: "What the guest sees of the CPU",
        verbs: &[put("set", "Set masks for CPUID, MSRs and KVM's capabilities", "/cpu-config")],
    },
    Group {
        name: "drive",
        alias: Some("drives"),
        about: "Disks",
        verbs: &[
            set_one("Add or replace a disk", "/drives/{id}", "drive_id"),
            update_one("Change a disk's file or limits", "/drives/{id}", "drive_id"),
            remove_one("Unplug a disk", "/drives/{id}"),
        ],
    },
    Group {
        name: "net",
        alias: Some("network-interfaces"),
        about: "Network interfaces",
        verbs: &[
            set_one("Add or replace an interface", "/network-interfaces/{id}", "iface_id"),
            update_one("Change an interface's limits", "/network-interfaces/{id}", "iface_id"),
            remove_one("Unplug an interface", "/network-interfaces/{id}"),
        ],
    },
    Group {
        name: "limits",
        alias: Some("rate-limit-groups"),
        about: "Limits that devices share",
        verbs: &[
            set_one("Add or replace a group", "/rate-limit-groups/{id}", "id"),
            update_one("Change a group's limits", "/rate-limit-groups/{id}", "id"),
        ],
    },
    Group {
        name: "pmem",
        alias: None,
        about: "Persistent memory",
        verbs: &[
            set_one("Add or replace a device", "/pmem/{id}", "id"),
            update_one("Change a device's limits", "/pmem/{id}", "id"),
            remove_one("Unplug a device", "/pmem/{id}"),
        ],
    },
    Group {
        name: "vsock",
        alias: None,
        about: "Sockets between host and guest",
        verbs: &[put("set", "Set the guest's address and the host's socket", "/vsock")],
    },
    Group {
        name: "entropy",
        alias: None,
        about: "The source of random numbers",
        verbs: &[put("set", "Give the guest one", "/entropy")],
    },
    Group {
        name: "serial",
        alias: None,
        about: "The serial port",
        verbs: &[put("set", "Set where it leads", "/serial")],
    },
    Group {
        name: "balloon",
        alias: None,
        about: "Memory that the guest gives back",
        verbs: &[
            get("get", "Show its configuration", "/balloon"),
            put("set", "Give the VM a balloon", "/balloon"),
            patch("update", "Change its size", "/balloon"),
            get("stats", "Show what the guest tells of its memory", "/balloon/statistics"),
            patch("update-stats", "Change how often it tells", "/balloon/statistics"),
            patch("start-hinting", "Start a run of free-page hinting", "/balloon/hinting/start"),
            get("hinting-status", "Show how the run is doing", "/balloon/hinting/status"),
            patch("stop-hinting", "Stop the run", "/balloon/hinting/stop"),
        ],
    },
    Group {
        name: "memory",
        alias: Some("hotplug"),
        about: "Memory that is plugged while the guest runs",
        verbs: &[
            get("get", "Show how much is plugged", "/hotplug/memory"),
            put("set", "Give the VM room for it", "/hotplug/memory"),
            patch("update", "Plug or unplug", "/hotplug/memory"),
        ],
    },
    Group {
        name: "mmds",
        alias: None,
        about: "The metadata service",
        verbs: &[
            get("get", "Show the data", "/mmds"),
            said(put("set", "Replace the data", "/mmds")),
            said(patch("update", "Merge into the data", "/mmds")),
            put("config", "Set version, interfaces and address", "/mmds/config"),
        ],
    },
    Group {
        name: "payload",
        alias: None,
        about: "What this VM is given and no clone of it",
        verbs: &[said(put("set", "Set it", "/payload"))],
    },
    Group {
        name: "metrics",
        alias: None,
        about: "Counters",
        verbs: &[
            get("get", "Show all, as Prometheus reads them", "/metrics"),
            put("set", "Set the file that they are written to", "/metrics"),
            act("flush", "Write them now", r#"{"action_type": "FlushMetrics"}"#),
        ],
    },
    Group {
        name: "logger",
        alias: None,
        about: "The log",
        verbs: &[put("set", "Set its level and file", "/logger")],
    },
];

/// Every verb with its words.
#[cfg(test)]
pub(super) fn all() -> impl Iterator<Item = (String, &'static Verb)> {
    let single = VERBS.iter().map(|verb| (verb.name.to_owned(), verb));
    let grouped = GROUPS.iter().flat_map(|group| {
        group.verbs.iter().map(|verb| (format!("{} {}", group.name, verb.name), verb))
    });
    single.chain(grouped)
}

const fn get(name: &'static str, about: &'static str, path: &'static str) -> Verb {
    Verb { name, about, method: "GET", path, body: Body::None, reply: Reply::Shown }
}

const fn put(name: &'static str, about: &'static str, path: &'static str) -> Verb {
    Verb { method: "PUT", body: Body::Words, ..get(name, about, path) }
}

const fn patch(name: &'static str, about: &'static str, path: &'static str) -> Verb {
    Verb { method: "PATCH", ..put(name, about, path) }
}

const fn said(verb: Verb) -> Verb {
    Verb { body: Body::Said, ..verb }
}

const fn act(name: &'static str, about: &'static str, body: &'static str) -> Verb {
    Verb { body: Body::Fixed(body), ..put(name, about, "/actions") }
}

const fn state(name: &'static str, about: &'static str, body: &'static str) -> Verb {
    Verb { body: Body::Fixed(body), ..patch(name, about, "/vm") }
}

const fn set_one(about: &'static str, path: &'static str, id: &'static str) -> Verb {
    Verb { body: Body::WithId(id), ..put("set", about, path) }
}

const fn update_one(about: &'static str, path: &'static str, id: &'static str) -> Verb {
    Verb { body: Body::WithId(id), ..patch("update", about, path) }
}

const fn remove_one(about: &'static str, path: &'static str) -> Verb {
    Verb { method: "DELETE", ..get("remove", about, path) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::route::{RouteError, Routes};

    fn routes() -> Routes {
        Routes::new(crate::config::sections().collect())
    }

    #[test]
    fn every_endpoint_has_a_verb() {
        let routes = routes();
        let lacks_verb = |(method, path): &(&str, &str)| {
            !all().any(|(_, verb)| (verb.method, verb.path) == (*method, *path))
        };
        let missing: Vec<String> = routes
            .iter()
            .map(|route| (route.method.name(), route.path.as_ref()))
            .filter(lacks_verb)
            .map(|(method, path)| format!("{method} {path}"))
            .collect();
        assert!(missing.is_empty(), "src/cli/ctl/verbs.rs lacks {}", missing.join(", "));
    }

    #[test]
    fn every_verb_has_an_endpoint() {
        let routes = routes();
        for (name, verb) in all().filter(|(_, verb)| !verb.path.is_empty()) {
            let found = routes.find(verb.method, &verb.path.replace("{id}", "a"));
            assert!(!matches!(found, Err(RouteError::Unknown { .. })), "{name}: {found:?}");
        }
    }

    #[test]
    fn verbs_that_take_an_id_put_it_into_the_path() {
        for (name, verb) in all().filter(|(_, verb)| !verb.path.is_empty()) {
            let has_id = matches!(verb.body, Body::WithId(_)) || verb.method == "DELETE";
            assert_eq!(verb.path.contains("{id}"), has_id, "{name}");
        }
    }
}
