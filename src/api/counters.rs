//! How often each request was made, and refused.
use devices::metrics::Counter;

use super::route::{Method, Route, Routes};

/// One for each method and path of the table.
#[derive(Debug)]
pub(crate) struct RequestCounters(Vec<Row>);

/// What is counted of one method and path.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) method: Method,
    /// As in the table, with `{id}`.
    pub(crate) path: String,
    /// Firecracker's name for it, without `_count` and `_fails`.
    pub(crate) key: String,
    pub(crate) count: Counter,
    pub(crate) fails: Counter,
}

/// Firecracker's names, where they do not follow from the path.
const KEYS: [(&str, &str); 7] = [
    ("", "instance_info"),
    ("version", "vmm_version"),
    ("machine-config", "machine_cfg"),
    ("cpu-config", "cpu_cfg"),
    ("drives", "drive"),
    ("network-interfaces", "network"),
    ("mmds/config", "mmds"),
];

impl RequestCounters {
    pub(crate) fn new(routes: &Routes) -> Self {
        let row = |route: &Route| Row {
            method: route.method,
            path: route.path.to_string(),
            key: key(&route.path),
            count: Counter::default(),
            fails: Counter::default(),
        };
        Self(routes.iter().map(row).collect())
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = &Row> {
        self.0.iter()
    }

    /// Those of `route`, if the table has it.
    pub(super) fn of(&self, route: &Route) -> Option<&Row> {
        self.rows().find(|row| row.method == route.method && row.path == route.path)
    }
}

fn key(path: &str) -> String {
    let path = path.trim_matches('/').trim_end_matches("/{id}");
    match KEYS.iter().find(|(other, _)| *other == path) {
        Some((_, key)) => (*key).to_owned(),
        None => path.replace(['/', '-', '.'], "_"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_firecrackers() {
        for (path, name) in [
            ("/", "instance_info"),
            ("/drives/{id}", "drive"),
            ("/network-interfaces/{id}", "network"),
            ("/boot-source", "boot_source"),
            ("/hotplug/memory", "hotplug_memory"),
            ("/mmds", "mmds"),
            ("/mmds/config", "mmds"),
            ("/pmem/{id}", "pmem"),
            ("/openapi.json", "openapi_json"),
        ] {
            assert_eq!(key(path), name);
        }
    }
}
