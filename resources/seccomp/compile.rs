//! From the lists of system calls in this directory to BPF, as the kernel takes it. Run by build.rs.
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use seccompiler::{compile_from_json, sock_filter};
use serde_json::{Value, json};

/// Which lists of `resources/seccomp` make up what the threads of each role may do. Whoever starts threads may do what
/// they may: a filter is inherited, and never loosened. Of rules for one system call those of the first list are first
/// compared.
const ROLES: [(&str, &[&str]); 8] = [
    ("vcpu", &["vcpu", "common"]),
    ("io", &["io", "common"]),
    ("connect", &["common", "connect"]),
    ("api", &["common", "api"]),
    ("main", &["common", "vcpu", "io", "main"]),
    ("files", &["common", "vcpu", "io", "connect", "main", "files"]),
    ("names", &["common", "vcpu", "io", "main", "names"]),
    ("zygote", &["common", "vcpu", "io", "connect", "api", "main", "files", "zygote"]),
];

/// Of every program. What has another architecture is killed, and the number is loaded.
const FIRST: [(u16, u8, u8, u32); 4] = [
    (BPF_LD_W_ABS, 0, 0, 4),
    (BPF_JEQ_K, 1, 0, AUDIT_ARCH_X86_64),
    (BPF_RET_K, 0, 0, SECCOMP_RET_KILL_PROCESS),
    (BPF_LD_W_ABS, 0, 0, 0),
];
const BPF_LD_W_ABS: u16 = 0x20;
const BPF_JEQ_K: u16 = 0x15;
const BPF_JGE_K: u16 = 0x35;
const BPF_JA: u16 = 0x05;
const BPF_RET_K: u16 = 0x06;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const SECCOMP_RET_ERRNO: u32 = 0x0005_0000;
const SECCOMP_RET_ALLOW: u32 = 0x7fff_0000;
const SECCOMP_RET_KILL_PROCESS: u32 = 0x8000_0000;
/// clone3(2), whose flags are in memory where no filter sees them, does not exist (ENOSYS), so that the C library calls
/// clone(2).
const SYS_CLONE3: u32 = 435;
/// A system call that a tracer has replaced by none (-1) is none: the kernel does nothing but return what the tracer says.
const NONE: u32 = u32::MAX;
const ENOSYS: u32 = 38;
const EACCES: u32 = 13;
/// What a rule has whose system call fails (EACCES).
const DENIED: &str = "denied";

/// Writes the BPF of each role into `out`, each instruction as the kernel has it.
pub(crate) fn compile(lists: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
    let lists: BTreeMap<String, Vec<Value>> = serde_json::from_slice(&std::fs::read(lists)?)?;
    let mut filters = BTreeMap::new();
    for (role, names) in ROLES {
        let mut rules = Vec::new();
        for name in names {
            rules.extend(lists.get(*name).ok_or_else(|| format!("there is no list {name}"))?);
        }
        filters.insert(role, merged(&rules)?);
    }
    std::fs::create_dir_all(out)?;
    for (role, rules) in filters {
        std::fs::write(out.join(role), bytes(&program(&rules)?))?;
    }
    Ok(())
}

/// The rules of each system call, without those that another makes needless: of one that is allowed whatever its
/// arguments, there must be no other, or the compiler takes that for a restriction.
fn merged(rules: &[&Value]) -> Result<Vec<Vec<Value>>, Box<dyn Error>> {
    let mut by_name: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for rule in rules {
        let name = rule["syscall"].as_str().ok_or("a rule names no system call")?;
        by_name.entry(name).or_default().push(rule);
    }
    let merged = by_name.into_values().map(|rules| {
        match rules.iter().find(|rule| rule.get("args").is_none()) {
            Some(rule) => vec![(*rule).clone()],
            None => rules.into_iter().cloned().collect(),
        }
    });
    Ok(merged.collect())
}

/// What becomes of a system call by its number alone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Allowed,
    Killed,
    /// There is none such (ENOSYS).
    Absent,
    /// Its arguments decide: the link of this number.
    Asked(usize),
}

/// The program of a role. The compiler makes a chain: each system call's number is compared with one after the other. The
/// kernel runs a new filter for every number there is, to learn which need not be filtered, and translates every
/// instruction, so that how long a filter is, is most of what it costs at a start. So the compiler makes but the links of
/// those whose arguments matter, and they are put behind a tree that finds out by halves in which range a number is.
fn program(rules: &[Vec<Value>]) -> Result<Vec<sock_filter>, Box<dyn Error>> {
    let mut verdicts = BTreeMap::from([
        (0, Verdict::Killed),
        (SYS_CLONE3, Verdict::Absent),
        (SYS_CLONE3 + 1, Verdict::Killed),
        (NONE, Verdict::Allowed),
    ]);
    let mut links = Vec::new();
    for rules in rules {
        let (number, link) = link(rules)?;
        let is_free = rules.iter().all(|rule| rule.get("args").or(rule.get(DENIED)).is_none());
        let verdict = match is_free {
            true => Verdict::Allowed,
            false => {
                links.push(link);
                Verdict::Asked(links.len() - 1)
            }
        };
        verdicts.insert(number, verdict);
        verdicts.entry(number + 1).or_insert(Verdict::Killed);
    }
    let mut ranges: Vec<_> = verdicts.into_iter().collect();
    ranges.dedup_by_key(|(_, verdict)| *verdict);

    // From its end: jumps lead forward only.
    let mut program = vec![ret(SECCOMP_RET_ALLOW), ret(SECCOMP_RET_KILL_PROCESS)];
    let mut ends = Ends { allowed: 0, killed: 1, links: vec![0; links.len()] };
    for (link, at) in links.iter().zip(&mut ends.links).rev() {
        program.extend(link.iter().rev().cloned());
        *at = program.len() - 1;
    }
    let tree = ends.grow(&mut program, &ranges)?;
    if tree != program.len() - 1 {
        return Err("a role needs more than one verdict".into());
    }
    let first = FIRST.iter().rev();
    program.extend(first.map(|&(code, jt, jf, k)| sock_filter { code, jt, jf, k }));
    program.reverse();
    Ok(program)
}

/// The number of a system call, and what the compiler makes of its rules: what comes after it is for those that fit none.
fn link(rules: &[Value]) -> Result<(u32, Vec<sock_filter>), Box<dyn Error>> {
    // Such as would kill the process for what somebody asks of it: it is told that it may not.
    let is_denied = rules.iter().any(|rule| rule.get(DENIED).is_some());
    let action = if is_denied { json!({ "errno": EACCES }) } else { json!("allow") };
    let mut rules = rules.to_vec();
    rules.iter_mut().filter_map(Value::as_object_mut).for_each(|rule| drop(rule.remove(DENIED)));
    let filter = json!({ "one": {
        "mismatch_action": "kill_process", "match_action": action, "filter": rules,
    }});
    let mut compiled = compile_from_json(filter.to_string().as_bytes(), "x86_64".try_into()?)?;
    let compiled = compiled.remove("one").ok_or("the compiler gave nothing")?;
    // What comes first checks the architecture and loads the number, what comes last is for those in no link.
    let (link, compares) = match compiled.as_slice() {
        [_, _, _, load, link @ .., last]
            if load.code == BPF_LD_W_ABS && *last == ret(SECCOMP_RET_KILL_PROCESS) =>
        {
            (link, link.first().filter(|first| first.code == BPF_JEQ_K))
        }
        _ => return Err("the compiler makes programs of another form".into()),
    };
    let number = compares.ok_or("a link does not begin with its number")?.k;
    Ok((number, link.to_vec()))
}

fn ret(k: u32) -> sock_filter {
    sock_filter { code: BPF_RET_K, jt: 0, jf: 0, k }
}

/// Where a program that is made from its end has what its tree leads to: places counted from the end.
struct Ends {
    allowed: usize,
    killed: usize,
    links: Vec<usize>,
}

impl Ends {
    /// Adds a tree that leads from each number of `ranges`, which are told by where they begin, to its verdict. Where it
    /// begins.
    fn grow(
        &mut self,
        program: &mut Vec<sock_filter>,
        ranges: &[(u32, Verdict)],
    ) -> Result<usize, Box<dyn Error>> {
        if let [(_, verdict)] = ranges {
            return Ok(match verdict {
                Verdict::Asked(link) => self.links[*link],
                Verdict::Killed => near(program, &mut self.killed, SECCOMP_RET_KILL_PROCESS),
                Verdict::Allowed => near(program, &mut self.allowed, SECCOMP_RET_ALLOW),
                Verdict::Absent => {
                    program.push(ret(SECCOMP_RET_ERRNO | ENOSYS));
                    program.len() - 1
                }
            });
        }
        let (lower, upper) = ranges.split_at(ranges.len() / 2);
        let (first, _) = upper.first().ok_or("a role may do nothing")?;
        let (upper, lower) = (self.grow(program, upper)?, self.grow(program, lower)?);
        let (upper, lower) = (within_reach(program, upper)?, within_reach(program, lower)?);
        let distance = |to: usize| u8::try_from(program.len() - to - 1);
        let (jt, jf) = (distance(upper)?, distance(lower)?);
        program.push(sock_filter { code: BPF_JGE_K, jt, jf, k: *first });
        Ok(program.len() - 1)
    }
}

/// How far from a comparison what it leads to may be at most: less than 256 instructions, of which some may yet come.
const REACH: usize = 240;

/// A place where the program ends so: the one that is `known`, or another if that is too far away.
fn near(program: &mut Vec<sock_filter>, known: &mut usize, so: u32) -> usize {
    if program.len() - *known > REACH {
        *known = program.len();
        program.push(ret(so));
    }
    *known
}

/// A place that leads to this one and that the next comparison can reach.
fn within_reach(program: &mut Vec<sock_filter>, to: usize) -> Result<usize, Box<dyn Error>> {
    let distance = program.len() - to - 1;
    if distance <= REACH {
        return Ok(to);
    }
    program.push(sock_filter { code: BPF_JA, jt: 0, jf: 0, k: u32::try_from(distance)? });
    Ok(program.len() - 1)
}

fn bytes(program: &[sock_filter]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for sock_filter { code, jt, jf, k } in program {
        bytes.extend(code.to_ne_bytes());
        bytes.extend([*jt, *jf]);
        bytes.extend(k.to_ne_bytes());
    }
    bytes
}
