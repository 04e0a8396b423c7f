//! What Firecracker has and husk does not yet: refused by its name, so that nobody takes it for a
//! mistyped path.

/// Something to come.
#[derive(Debug)]
pub(crate) struct Missing {
    /// How to call it.
    pub(crate) what: &'static str,
    /// Its key in a configuration file, if it has one.
    pub(crate) key: Option<&'static str>,
    /// The first segment of its paths.
    segment: &'static str,
    methods: &'static [&'static str],
}

/// All of it.
pub(crate) const NOT_YET: &[Missing] = &[missing("snapshot", None, "snapshot", &["PUT"])];

const fn missing(
    what: &'static str,
    key: Option<&'static str>,
    segment: &'static str,
    methods: &'static [&'static str],
) -> Missing {
    Missing { what, key, segment, methods }
}

impl Missing {
    /// What a request asks for, if it is to come.
    pub(super) fn find(method: &str, segments: &[&str]) -> Option<&'static Self> {
        let first = segments.first()?;
        NOT_YET.iter().find(|m| m.segment == *first && m.methods.contains(&method))
    }
}
