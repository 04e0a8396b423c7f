//! How many cases there are: as many as the documentation says.
use std::collections::{BTreeMap, BTreeSet};

use crate::ROWS;
use crate::bench::alone;
use crate::kinds::KINDS;
use crate::samples;

const DOCUMENT: &str = include_str!("../../../docs/hostile-guests.md");

/// Rows of the first table of the document: `| V1 | … | 171 |`.
fn documented() -> BTreeMap<&'static str, usize> {
    let cells = |line: &'static str| {
        let cells: Vec<_> = line.strip_prefix("| ")?.split('|').map(str::trim).collect();
        let count = cells.iter().rev().find(|cell| !cell.is_empty())?;
        Some((*cells.first()?, count.replace(',', "").parse().ok()?))
    };
    let table = DOCUMENT.lines().skip_while(|line| *line != "## Without KVM");
    let table = table.take_while(|line| !line.starts_with("## On KVM"));
    table.filter_map(cells).collect()
}

#[test]
fn there_are_as_many_cases_as_documented() {
    let _alone = alone();
    let documented = documented();
    let mut names = BTreeSet::new();
    let mut counts = BTreeMap::new();
    for (row, cases) in ROWS {
        let mut count = 0;
        for case in KINDS.into_iter().flat_map(cases) {
            assert!(names.insert(case.name.clone()), "{} is there twice", case.name);
            count += 1;
        }
        counts.insert(row, count);
    }
    counts.insert("All", names.len());
    assert!(names.len() >= 400);
    assert_eq!(documented, counts, "the document's counts are others");
}

#[test]
fn every_device_of_the_table_is_attacked() {
    let _alone = alone();
    let attacked: BTreeSet<_> = KINDS.iter().map(|kind| kind.sample()).collect();
    for kind in samples::kinds() {
        assert!(attacked.contains(kind), "no attack on {kind}: add it to kinds.rs");
    }
    for model in devices::virtio::MODELS {
        assert!(attacked.contains(model.name), "no attack on {}", model.name);
    }
}
