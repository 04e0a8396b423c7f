//! docs/hostile-hosts.md and the tests are one list: each row has its tests, each test of a row is in its row.
use std::collections::BTreeMap;
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// The rows there are, by their letters. Those of guests are docs/hostile-guests.md's.
const ROWS: [(char, u32); 8] =
    [('K', 15), ('I', 4), ('C', 4), ('R', 4), ('D', 14), ('S', 5), ('A', 7), ('P', 13)];

/// A line of the page's tables.
#[derive(Debug)]
struct Line {
    letter: char,
    numbers: RangeInclusive<u32>,
    verdict: String,
    tests: Vec<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `K7` or `K1-K6`.
fn numbers(label: &str) -> Option<(char, RangeInclusive<u32>)> {
    let letter = label.chars().next()?;
    let number = |text: &str| text.strip_prefix(letter)?.parse::<u32>().ok();
    let (first, last) = label.split_once('-').unwrap_or((label, label));
    Some((letter, number(first)?..=number(last)?))
}

fn lines() -> Vec<Line> {
    let page = fs::read_to_string(root().join("docs/hostile-hosts.md")).unwrap();
    let line = |line: &str| {
        let cells: Vec<_> = line.strip_prefix("| ")?.split(" | ").map(str::trim).collect();
        let (letter, numbers) = numbers(cells.first()?)?;
        let [_, _, verdict, tests] = cells[..] else { panic!("not four cells: {line}") };
        // What is in backquotes: every second piece.
        let tests = tests.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        Some(Line { letter, numbers, verdict: verdict.to_owned(), tests })
    };
    page.lines().filter_map(line).collect()
}

/// Functions with `#[test]`, by file below `tests`, with neither directory nor ending.
fn tests() -> BTreeMap<String, Vec<String>> {
    let rust_files = |directory: PathBuf| {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|e| e == "rs"))
    };
    let directories = ["tests", "tests/rows"].map(|name| root().join(name));
    let files = directories.into_iter().flat_map(rust_files);
    files.map(|path| (name_of(&path), functions(&fs::read_to_string(path).unwrap()))).collect()
}

fn name_of(path: &Path) -> String {
    let path = path.strip_prefix(root().join("tests")).unwrap().with_extension("");
    path.to_str().unwrap().replace('/', "::")
}

fn functions(source: &str) -> Vec<String> {
    let mut functions = Vec::new();
    for rest in source.split("#[test]\n").skip(1) {
        // What is ignored proves nothing, and has another line here.
        let name = rest.strip_prefix("fn ").and_then(|rest| rest.split_once('(')).map(|f| f.0);
        functions.extend(name.map(str::to_owned));
    }
    functions
}

#[test]
fn every_row_is_on_the_page_once() {
    let lines = lines();
    for (letter, count) in ROWS {
        let numbers = lines.iter().filter(|l| l.letter == letter).flat_map(|l| l.numbers.clone());
        assert!(numbers.eq(1..=count), "rows {letter}1 to {letter}{count} are not these");
    }
    let known = |line: &Line| ROWS.iter().any(|(letter, _)| line.letter == *letter);
    assert!(lines.iter().all(known), "{lines:?}");
}

#[test]
fn every_row_has_tests_that_are_there() {
    let there = tests();
    for line in lines() {
        assert!(!line.tests.is_empty() && !line.verdict.is_empty(), "{line:?}");
        for test in &line.tests {
            let (file, function) = test.rsplit_once("::").unwrap_or_else(|| panic!("{line:?}"));
            // Those of the rows are named without saying so.
            let of =
                |file: &str| there.get(file).is_some_and(|all| all.iter().any(|f| f == function));
            assert!(of(file) || of(&format!("rows::{file}")), "no test {test} ({line:?})");
        }
    }
}

/// `k01_k06_name`, or `k07_name`.
#[test]
fn every_test_of_a_row_is_in_its_row() {
    let lines = lines();
    for (file, functions) in tests() {
        let Some(file) = file.strip_prefix("rows::").filter(|file| *file != "page") else {
            continue;
        };
        for function in functions {
            let mut labels = function.split('_').map_while(|word| {
                let (letter, number) = word.split_at_checked(1)?;
                let letter = letter.chars().next()?.to_ascii_uppercase();
                Some((letter, number.parse::<u32>().ok()?))
            });
            let (letter, first) = labels.next().unwrap_or_else(|| panic!("{function}: of no row"));
            let last = labels.next().map_or(first, |label| label.1);
            for number in first..=last {
                let is_of = |l: &&Line| l.letter == letter && l.numbers.contains(&number);
                let line = lines.iter().find(is_of).unwrap_or_else(|| panic!("{function}: no row"));
                let name = format!("{file}::{function}");
                assert!(line.tests.contains(&name), "{letter}{number} lacks `{name}`");
            }
        }
    }
}
