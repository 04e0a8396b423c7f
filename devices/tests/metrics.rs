//! A declared counter that nothing increments does not compile.
use std::process::Command;

/// Compiles `source`, which has the macro `counters!`; the compiler's words if it refuses.
fn compile(name: &str, source: &str) -> Result<(), String> {
    let dir = env!("CARGO_TARGET_TMPDIR");
    let file = format!("{dir}/counters-{name}.rs");
    let metrics = concat!(env!("CARGO_MANIFEST_DIR"), "/src/metrics.rs");
    std::fs::write(&file, format!("#[path = {metrics:?}]\npub mod metrics;\n{source}")).unwrap();
    let rustc = std::env::var("RUSTC").unwrap_or("rustc".into());
    let output = Command::new(rustc)
        .args(["--edition=2024", "--crate-type=lib", "--emit=metadata", "--out-dir", dir, &file])
        .output()
        .expect("rustc");
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(words) }
}

fn lamp(visibility: &str, uses: &str) -> String {
    format!(
        r#"
pub mod lamp {{
    crate::counters! {{
        /// What a lamp counts.
        {visibility} struct Counters as "lamp" {{
            /// Times it was switched.
            switch_count: Counter,
        }}
    }}
    {uses}
}}
"#
    )
}

#[test]
fn what_nothing_counts_does_not_compile() {
    // To make one, to read it and to count in a function that nobody calls are no increments.
    let uses = "
    pub fn read() -> Vec<crate::metrics::Value> {
        crate::metrics::CounterSet::values(&Counters::default())
    }
    fn switch(counters: &Counters) {
        counters.switch_count().inc();
    }";
    for (name, visibility) in [("private", ""), ("public", "pub")] {
        let words = compile(name, &lamp(visibility, uses)).unwrap_err();
        assert!(words.contains("method `switch_count` is never used"), "{words}");
        let counted = uses.replace(
            "fn switch(counters: &Counters) {",
            "pub fn switch() { let counters = Counters::default();",
        );
        compile(&format!("{name}-counted"), &lamp(visibility, &counted)).unwrap();
    }
}
