//! What a hostile guest says of its cases: `case=NAME verdict=WORD want=WORD,WORD`.

/// One case, as the guest tells it.
#[derive(Debug)]
pub(crate) struct Case<'a> {
    pub(crate) name: &'a str,
    pub(crate) verdict: &'a str,
    wanted: &'a str,
}

impl Case<'_> {
    pub(crate) fn is_as_wanted(&self) -> bool {
        self.wanted.split(',').any(|word| word == self.verdict)
    }
}

/// The cases in a guest's output, in order.
pub(crate) fn cases(said: &str) -> Vec<Case<'_>> {
    let case = |line| {
        let fields = str::trim(line).strip_prefix("case=")?;
        let (name, rest) = fields.split_once(" verdict=")?;
        let (verdict, wanted) = rest.split_once(" want=")?;
        Some(Case { name, verdict, wanted })
    };
    said.lines().filter_map(case).collect()
}

/// Prints them as a table, those that are not as wanted marked.
pub(crate) fn print(cases: &[Case<'_>]) {
    for case in cases {
        let mark = if case.is_as_wanted() { "" } else { "  <-- wanted " };
        let wanted = if case.is_as_wanted() { "" } else { case.wanted };
        println!("{:<48} {}{mark}{wanted}", case.name, case.verdict);
    }
}
