//! The control group of a jail: found by what is mounted, made, filled with limits, joined, and removed.
//!
//! Knows both versions. A setting is a file and what is written to it; which file a limit is differs by version, and
//! is said here for the limits that husk has flags for.
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::JailError;
use super::path::Beneath;

/// Where the kernel says what is mounted.
const MOUNTS: &str = "/proc/self/mounts";
/// How long the kernel may take to notice that the last process of a group has gone.
const EMPTY_PATIENCE: Duration = Duration::from_secs(2);

/// Which kind of hierarchy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    V1,
    V2,
}

/// What a file of a group is set to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    file: String,
    value: String,
    /// The kernel may have been built without it.
    is_optional: bool,
}

impl Setting {
    /// `file`, of the controller that its name begins with.
    pub(crate) fn new(file: impl Into<String>, value: impl Into<String>) -> Self {
        Self { file: file.into(), value: value.into(), is_optional: false }
    }

    fn optional(file: &str, value: &str) -> Self {
        Self { is_optional: true, ..Self::new(file, value) }
    }

    fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

/// Bytes and requests a second of a disk, in the order of version 2's words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct IoMax {
    /// `MAJ:MIN`
    pub(crate) device: String,
    /// Each with its word: `rbps`, `wbps`, `riops`, `wiops`.
    pub(crate) limits: Vec<(String, u64)>,
}

/// The words of `io.max`, and the files that they are in version 1.
pub(crate) const IO_WORDS: [(&str, &str); 4] = [
    ("rbps", "blkio.throttle.read_bps_device"),
    ("wbps", "blkio.throttle.write_bps_device"),
    ("riops", "blkio.throttle.read_iops_device"),
    ("wiops", "blkio.throttle.write_iops_device"),
];

/// What a jail may use.
#[derive(Clone, Debug, Default)]
pub(crate) struct Limits {
    /// Bytes; none of it goes to swap.
    pub(crate) memory: Option<u64>,
    /// Microseconds of processor time in a period of so many.
    pub(crate) cpu: Option<(u64, u64)>,
    /// Processes and threads.
    pub(crate) pids: Option<u64>,
    pub(crate) io: Vec<IoMax>,
}

impl Limits {
    /// Which files that is.
    pub(crate) fn settings(&self, version: Version) -> Vec<Setting> {
        let is_v1 = version == Version::V1;
        let mut settings = Vec::new();
        if let Some(bytes) = self.memory {
            let bytes = bytes.to_string();
            if is_v1 {
                settings.push(Setting::new("memory.limit_in_bytes", &*bytes));
                settings.push(Setting::optional("memory.memsw.limit_in_bytes", &bytes));
                settings.push(Setting::optional("memory.swappiness", "0"));
            } else {
                settings.push(Setting::new("memory.max", bytes));
                settings.push(Setting::optional("memory.swap.max", "0"));
            }
        }
        match self.cpu {
            Some((quota, period)) if is_v1 => {
                settings.push(Setting::new("cpu.cfs_period_us", period.to_string()));
                settings.push(Setting::new("cpu.cfs_quota_us", quota.to_string()));
            }
            Some((quota, period)) => {
                settings.push(Setting::new("cpu.max", format!("{quota} {period}")));
            }
            None => {}
        }
        settings.extend(self.pids.map(|most| Setting::new("pids.max", most.to_string())));
        for IoMax { device, limits } in &self.io {
            if is_v1 {
                let files = limits.iter().filter_map(|(word, most)| {
                    let (_, file) = IO_WORDS.iter().find(|(known, _)| known == word)?;
                    Some(Setting::new(*file, format!("{device} {most}")))
                });
                settings.extend(files);
            } else {
                let words = limits.iter().map(|(word, most)| format!(" {word}={most}"));
                let value = device.clone() + &words.collect::<String>();
                settings.push(Setting::new("io.max", value));
            }
        }
        settings
    }
}

/// The hierarchies that are mounted.
#[derive(Clone, Debug)]
pub(crate) struct Mounted {
    /// Options, which name the controllers, and where.
    v1: Vec<(String, PathBuf)>,
    v2: Option<PathBuf>,
}

impl Mounted {
    /// Looks for them; `root` is the one of version 2 if it is given.
    pub(crate) fn find(root: Option<&Path>) -> Result<Self, JailError> {
        match root {
            Some(root) => Ok(Self { v1: Vec::new(), v2: Some(root.into()) }),
            None => fs::read_to_string(MOUNTS)
                .map(|text| Self::parse(&text))
                .map_err(JailError::host("read what is mounted")),
        }
    }

    fn parse(text: &str) -> Self {
        let mut mounted = Self { v1: Vec::new(), v2: None };
        for line in text.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            match fields[..] {
                [_, path, "cgroup", options, ..] => mounted.v1.push((options.into(), path.into())),
                [_, path, "cgroup2", ..] => mounted.v2 = mounted.v2.or(Some(path.into())),
                _ => {}
            }
        }
        mounted
    }

    /// Version 2 if it has all the controllers that `limits` want, else version 1.
    pub(crate) fn version_for(&self, limits: &Limits) -> Version {
        let known =
            self.v2.as_ref().map(|root| fs::read_to_string(root.join("cgroup.controllers")));
        let known = known.and_then(Result::ok).unwrap_or_default();
        let settings = limits.settings(Version::V2);
        let mut wanted = settings.iter().map(Setting::controller);
        let has_all = wanted.all(|wanted| known.split_whitespace().any(|known| known == wanted));
        if self.v1.is_empty() || has_all && self.v2.is_some() { Version::V2 } else { Version::V1 }
    }

    fn root_of(&self, version: Version, controller: &str) -> Result<&Path, JailError> {
        let mut v1 = self.v1.iter();
        let found = match version {
            Version::V1 => v1
                .find(|(options, _)| options.split(',').any(|option| option == controller))
                .map(|(_, path)| path),
            Version::V2 => self.v2.as_ref(),
        };
        found.map(PathBuf::as_path).ok_or_else(|| {
            let number = if version == Version::V1 { 1 } else { 2 };
            JailError::Refused(format!(
                "no cgroup hierarchy of version {number} for '{controller}' is mounted; mount it, or ask for \
                 the other version"
            ))
        })
    }
}

/// What to do about a group that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existing {
    /// One that is empty is left over, and is made anew; one with processes is another VM's.
    Replace,
    /// It is used as it is.
    Use,
}

/// A group that was made: a directory in each hierarchy that is needed.
#[derive(Debug, Default)]
pub(crate) struct Group {
    places: Vec<Place>,
    /// Whether it goes when this does.
    is_owned: bool,
}

#[derive(Debug)]
struct Place {
    root: PathBuf,
    parent: OwnedFd,
    name: PathBuf,
    group: OwnedFd,
}

impl Group {
    /// Makes `parent`/`id`, and sets what is to be set.
    pub(crate) fn make(
        mounted: &Mounted,
        version: Version,
        (parent, id): (&Path, &str),
        settings: &[Setting],
        existing: Existing,
    ) -> Result<Self, JailError> {
        if !parent.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(JailError::Refused(format!(
                "the cgroup's parent '{}' is no relative path of names",
                parent.display()
            )));
        }
        let mut group = Self { places: Vec::new(), is_owned: existing == Existing::Replace };
        for setting in settings {
            let controller = setting.controller();
            let root = mounted.root_of(version, controller)?;
            let made = group.places.iter().position(|place| place.root == root);
            let index = match made {
                Some(index) => index,
                None => {
                    let wanted = settings.iter().map(Setting::controller);
                    let place = Place::make(root, version, parent, id, wanted, existing)?;
                    group.places.push(place);
                    group.places.len() - 1
                }
            };
            write(&group.places[index].group, setting)?;
        }
        Ok(group)
    }

    /// The group `path` of version 2, which is there.
    pub(crate) fn open(mounted: &Mounted, path: &Path) -> Result<Self, JailError> {
        let root = mounted.root_of(Version::V2, "")?;
        let shown = path.display();
        let top = top(root)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let group = Beneath::new(&top).open(path, flags, Mode::empty());
        let group = group.map_err(JailError::path(format!("cannot open the cgroup {shown}")))?;
        let place = Place { root: root.into(), parent: top, name: path.into(), group };
        Ok(Self { places: vec![place], is_owned: false })
    }

    /// Puts this process into it.
    pub(crate) fn join(&self) -> Result<(), JailError> {
        for place in &self.places {
            write(&place.group, &Setting::new("cgroup.procs", "0"))?;
        }
        Ok(())
    }

    /// What of it is open.
    pub(crate) fn descriptors(&self) -> Vec<RawFd> {
        self.places
            .iter()
            .flat_map(|place| [&place.parent, &place.group])
            .map(AsRawFd::as_raw_fd)
            .collect()
    }

    /// Leaves it to another process to remove it.
    pub(crate) fn disown(&mut self) {
        self.is_owned = false;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for Place { parent, name, .. } in self.places.iter().filter(|_| self.is_owned) {
            let deadline = Instant::now() + EMPTY_PATIENCE;
            // No event of version 1 tells when the last process has left.
            while rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) == Err(Errno::BUSY)
                && Instant::now() < deadline
            {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

impl Place {
    fn make<'a>(
        root: &Path,
        version: Version,
        parent: &Path,
        id: &str,
        controllers: impl Iterator<Item = &'a str> + Clone,
        existing: Existing,
    ) -> Result<Self, JailError> {
        let mut reached = top(root)?;
        let mode = Mode::from_raw_mode(0o755);
        for name in parent {
            if version == Version::V2 {
                delegate(&reached, controllers.clone())?;
            }
            let next = Beneath::new(&reached).directory(Path::new(name), mode)?;
            inherit_cpuset(&reached, &next)?;
            reached = next;
        }
        if version == Version::V2 {
            delegate(&reached, controllers)?;
        }
        let name = PathBuf::from(id);
        let path = root.join(parent).join(id);
        if existing == Existing::Replace {
            make_anew(&reached, &name, &path)?;
        }
        let group = Beneath::new(&reached).directory(&name, mode)?;
        if existing == Existing::Replace {
            take(&reached, &name, &path, &group)?;
        }
        inherit_cpuset(&reached, &group)?;
        Ok(Self { root: root.into(), parent: reached, name, group })
    }
}

fn top(root: &Path) -> Result<OwnedFd, JailError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let opened = rustix::fs::openat2(CWD, root, flags, Mode::empty(), resolve);
    opened.map_err(JailError::path(format!("cannot open {}", root.display())))
}

/// Refuses the group of somebody else.
fn taken(path: &Path) -> JailError {
    JailError::Refused(format!(
        "the cgroup {} has processes or groups in it, or is about to: another VM has that id; choose another --id",
        path.display()
    ))
}

/// Locks a group that was made, until it has somebody in it: another start of that id would take an empty one away.
fn take(parent: &OwnedFd, name: &Path, path: &Path, group: &OwnedFd) -> Result<(), JailError> {
    rustix::fs::flock(group, FlockOperation::NonBlockingLockExclusive).map_err(|_| taken(path))?;
    let number = |found: rustix::io::Result<Stat>| found.map(|found| found.st_ino);
    let there = number(rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW));
    // Taken away before it was locked.
    if there.is_ok() && there == number(rustix::fs::fstat(group)) {
        Ok(())
    } else {
        Err(taken(path))
    }
}

fn make_anew(parent: &OwnedFd, name: &Path, path: &Path) -> Result<(), JailError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let there = rustix::fs::openat(parent, name, flags, Mode::empty());
    if let Ok(there) = &there {
        rustix::fs::flock(there, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| taken(path))?;
    }
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(_) => return Err(taken(path)),
    }
    let made = rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755));
    if made == Err(Errno::EXIST) {
        return Err(taken(path));
    }
    made.map_err(JailError::path(format!("cannot make the cgroup {}", path.display())))
}

/// Lets groups in `group` have the controllers (version 2).
fn delegate<'a>(
    group: &OwnedFd,
    controllers: impl Iterator<Item = &'a str>,
) -> Result<(), JailError> {
    let mut words: Vec<String> = controllers.map(|controller| format!("+{controller}")).collect();
    words.sort();
    words.dedup();
    let known = read(group, "cgroup.controllers");
    for word in &words {
        let has = |known: &String| known.split_whitespace().any(|name| &word[1..] == name);
        if known.as_ref().is_some_and(|known| !has(known)) {
            return Err(JailError::Refused(format!(
                "the cgroup's parent has no controller '{}' of version 2, only those in its \
                 cgroup.controllers: let it have that by the cgroup.subtree_control of its own parent, or ask for version 1",
                &word[1..]
            )));
        }
    }
    write(group, &Setting::new("cgroup.subtree_control", words.join(" ")))
}

/// A cpuset of version 1 is empty at first, and takes no process until it is not.
fn inherit_cpuset(parent: &OwnedFd, group: &OwnedFd) -> Result<(), JailError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (Some(theirs), Some(own)) = (read(parent, file), read(group, file)) else { continue };
        if own.trim().is_empty() && !theirs.trim().is_empty() {
            write(group, &Setting::new(file, theirs.trim()))?;
        }
    }
    Ok(())
}

fn read(group: &OwnedFd, file: &str) -> Option<String> {
    let file = Beneath::new(group).open(Path::new(file), OFlags::RDONLY, Mode::empty()).ok()?;
    std::io::read_to_string(fs::File::from(file)).ok()
}

fn write(group: &OwnedFd, Setting { file, value, is_optional }: &Setting) -> Result<(), JailError> {
    // There is no file to be made in a real hierarchy.
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
    let opened = Beneath::new(group).open(Path::new(file), flags, Mode::RUSR | Mode::WUSR);
    let written = match opened {
        Err(_) if *is_optional => return Ok(()),
        // In a real hierarchy, which the error does not say.
        Err(Errno::ACCESS | Errno::PERM) if is_missing(group, file) => {
            return Err(JailError::Refused(format!("cgroups have no file '{file}' on this host")));
        }
        opened => opened.and_then(|fd| rustix::io::write(&fd, value.as_bytes())),
    };
    written
        .map(drop)
        .map_err(JailError::path(format!("cannot write '{value}' to {file} of the cgroup")))
}

fn is_missing(group: &OwnedFd, file: &str) -> bool {
    matches!(rustix::fs::statat(group, file, AtFlags::SYMLINK_NOFOLLOW), Err(Errno::NOENT))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const HYBRID: &str = "\
proc /proc proc rw 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nsdelegate 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
";

    /// What looks like a hierarchy of version 2, gone when this is.
    struct Fake(PathBuf);

    impl Fake {
        fn new(name: &str) -> Self {
            let name = format!("husk-cgroup-{name}-{}", std::process::id());
            let root = std::env::temp_dir().canonicalize().unwrap().join(name);
            let _ = fs::remove_dir_all(&root);
            fs::create_dir(&root).unwrap();
            fs::write(root.join("cgroup.controllers"), "cpuset cpu io memory pids\n").unwrap();
            Self(root)
        }

        fn make(&self, parent: &str, existing: Existing) -> Result<Group, JailError> {
            let mounted = Mounted::find(Some(&self.0)).unwrap();
            assert_eq!(mounted.version_for(&limits()), Version::V2);
            let settings = limits().settings(Version::V2);
            Group::make(&mounted, Version::V2, (Path::new(parent), "a"), &settings, existing)
        }

        fn read(&self, file: &str) -> String {
            fs::read_to_string(self.0.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn limits() -> Limits {
        let limits = [("rbps", 5), ("wiops", 6)].map(|(word, most)| (word.to_owned(), most));
        Limits {
            memory: Some(1 << 20),
            cpu: Some((50_000, 100_000)),
            pids: Some(7),
            io: vec![IoMax { device: "8:0".into(), limits: limits.into() }],
        }
    }

    #[test]
    fn version_2_is_delegated_filled_and_joined() {
        let fake = Fake::new("v2");
        // Left over of one that was killed.
        fs::create_dir_all(fake.0.join("x/y/a")).unwrap();
        let group = fake.make("x/y", Existing::Replace).unwrap();
        for above in ["", "x/", "x/y/"] {
            let control = fake.read(&format!("{above}cgroup.subtree_control"));
            assert_eq!(control, "+cpu +io +memory +pids");
        }
        for (file, value) in [
            ("memory.max", "1048576"),
            ("memory.swap.max", "0"),
            ("cpu.max", "50000 100000"),
            ("pids.max", "7"),
            ("io.max", "8:0 rbps=5 wiops=6"),
        ] {
            assert_eq!(fake.read(&format!("x/y/a/{file}")), value, "{file}");
        }
        assert!(!fake.0.join("x/y/a/cgroup.procs").exists());
        group.join().unwrap();
        assert_eq!(fake.read("x/y/a/cgroup.procs"), "0");
        drop(group);
        // Files are in it, as processes would be.
        let e = fake.make("x/y", Existing::Replace).unwrap_err().to_string();
        assert!(e.contains("x/y/a has processes or groups in it"), "{e}");
        fake.make("x/y", Existing::Use).unwrap();
    }

    #[test]
    fn a_link_is_not_followed() {
        let (fake, other) = (Fake::new("link"), Fake::new("other"));
        symlink(&other.0, fake.0.join("x")).unwrap();
        let e = fake.make("x", Existing::Replace).unwrap_err().to_string();
        assert!(e.contains("symbolic link"), "{e}");
        assert!(fake.make("../x", Existing::Replace).is_err());
        fs::remove_file(fake.0.join("cgroup.subtree_control")).unwrap();
        symlink(other.0.join("stolen"), fake.0.join("cgroup.subtree_control")).unwrap();
        assert!(fake.make("y", Existing::Replace).is_err());
        let left: Vec<_> = fs::read_dir(&other.0).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn an_empty_group_goes_when_it_is_dropped() {
        let fake = Fake::new("drop");
        let parent = top(&fake.0).unwrap();
        let name = PathBuf::from("a");
        make_anew(&parent, &name, &fake.0.join("a")).unwrap();
        let group = Beneath::new(&parent).directory(&name, Mode::RWXU).unwrap();
        let places = vec![Place { root: fake.0.clone(), parent, name, group }];
        drop(Group { places, is_owned: true });
        assert!(!fake.0.join("a").exists());
    }

    #[test]
    fn controllers_are_found_where_they_are_mounted() {
        let mounted = Mounted::parse(HYBRID);
        let root = |version, controller| mounted.root_of(version, controller).map(Path::to_owned);
        assert_eq!(root(Version::V1, "cpu").unwrap(), Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(root(Version::V1, "memory").unwrap(), Path::new("/sys/fs/cgroup/memory"));
        assert_eq!(root(Version::V2, "cpu").unwrap(), Path::new("/sys/fs/cgroup/unified"));
        let e = root(Version::V1, "pids").unwrap_err().to_string();
        assert!(e.contains("of version 1 for 'pids' is mounted; mount it"), "{e}");
    }

    #[test]
    fn limits_of_version_1_have_files_of_their_own() {
        let settings = limits().settings(Version::V1);
        let written: Vec<_> =
            settings.iter().map(|setting| format!("{}={}", setting.file, setting.value)).collect();
        assert_eq!(
            written,
            [
                "memory.limit_in_bytes=1048576",
                "memory.memsw.limit_in_bytes=1048576",
                "memory.swappiness=0",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000",
                "pids.max=7",
                "blkio.throttle.read_bps_device=8:0 5",
                "blkio.throttle.write_iops_device=8:0 6",
            ]
        );
    }
}
