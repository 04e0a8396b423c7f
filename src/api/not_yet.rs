//! What Firecracker has and husk does not yet: refused by its name, so that nobody takes it for a
//! mistyped path.

/// Something to come.
#[derive(Debug)]
pub(super) struct Missing {
    /// How to call it: the first segment of its paths.
    pub(super) what: &'static str,
    methods: &'static [&'static str],
}

/// All of it.
const NOT_YET: &[Missing] = &[Missing { what: "snapshot", methods: &["PUT"] }];

impl Missing {
    /// What a request asks for, if it is to come.
    pub(super) fn find(method: &str, segments: &[&str]) -> Option<&'static Self> {
        let first = segments.first()?;
        NOT_YET.iter().find(|m| m.what == *first && m.methods.contains(&method))
    }
}
