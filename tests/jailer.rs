//! husk under the name `jailer`: whoever spawns Firecracker's jailer can spawn this one.
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde_json::json;

use crate::util::*;

/// How often a path is another thing while jails start.
const FLIPS: u32 = 100_000;

/// Where its jails are, and the flags that every one has.
fn base(jail: &Jail) -> PathBuf {
    jail.scratch.path("base")
}

fn flags(jail: &Jail) -> Vec<String> {
    let (user, base) = (jail.user.to_string(), base(jail).display().to_string());
    let words = ["--id", &jail.id, "--uid", &user, "--gid", &user, "--chroot-base-dir", &base];
    words.map(String::from).into()
}

fn jailer(jail: &Jail, more: &[&str]) -> Husk {
    let flags = flags(jail);
    Husk::jailer(flags.iter().map(String::as_str).chain(more.iter().copied()))
}

/// The directory that is the root of one that starts husk.
fn root(jail: &Jail) -> PathBuf {
    base(jail).join("firecracker").join(&jail.id).join("root")
}

/// Puts a kernel into the jail and has it boot there, as clients do.
fn drive(jail: &Jail) {
    let root = root(jail);
    fs::copy(guest("hello"), root.join("vmlinux")).unwrap();
    fs::set_permissions(root.join("vmlinux"), PermissionsExt::from_mode(0o644)).unwrap();
    let api = Api::new(&root.join("run/firecracker.socket"));
    api.put("/boot-source", json!({"kernel_image_path": "vmlinux", "boot_args": "how=hang"}))
        .done();
    api.act("InstanceStart").done();
    assert_eq!(api.get("/").json()["id"], jail.id);
    let paths = json!({"snapshot_path": "/run/state", "mem_file_path": "/run/memory"});
    api.patch("/vm", json!({"state": "Paused"})).done();
    api.put("/snapshot/create", paths).done();
    assert!(root.join("run/memory").metadata().unwrap().len() > 0);
}

/// Waits until a file can be read that another process writes, and is whole.
#[track_caller]
fn number_in(path: &Path) -> i32 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(number) = fs::read_to_string(path).ok().and_then(|text| text.parse().ok()) {
            return number;
        }
        assert!(Instant::now() < deadline, "{} does not come", path.display());
        thread::yield_now();
    }
}

#[test]
fn its_version_is_firecrackers() {
    let end = Husk::jailer(["--version"]).wait().code(0);
    assert!(end.output.starts_with("Jailer v1."), "{end}");
}

#[test]
fn it_makes_firecrackers_directory_and_is_firecracker_in_it() {
    let jail = Jail::new();
    let vm = jailer(&jail, &["--", "--level", "Info"]).start();
    vm.expect("API server started.");
    let pid = vm.pid();
    let root = root(&jail);
    // It is the same process, without a copy of anything.
    assert_eq!(number_in(&root.join("firecracker.pid")), pid.cast_signed());
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/comm")).unwrap(), "firecracker\n");
    let mut expected: Vec<&str> = vec![
        "dev",
        "dev/kvm",
        "dev/net",
        "dev/net/tun",
        "dev/null",
        "dev/urandom",
        "firecracker.pid",
        "proc",
        "run",
        "run/firecracker.socket",
    ];
    if Path::new("/dev/userfaultfd").exists() {
        expected.push("dev/userfaultfd");
    }
    expected.sort_unstable();
    assert_eq!(tree(&root), expected);
    for path in ["", "dev", "dev/net", "run", "dev/kvm", "dev/net/tun", "dev/urandom"] {
        let found = fs::metadata(root.join(path)).unwrap();
        assert_eq!((found.uid(), found.gid()), (jail.user, jail.user), "/{path}");
        let mode = if found.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(found.mode() & 0o7777, mode, "/{path}");
    }
    let names = |path: &str| fs::read_dir(path).unwrap().count();
    assert_eq!(among_files_of(pid, || names("/..")), names(root.to_str().unwrap()));
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"] {
        assert!(status.contains(line), "{line} of {status}");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert!(files.contains(" 2048 "), "{files}");
    drive(&jail);
    vm.signal(Signal::TERM);
    vm.wait().code(143);
}

/// A process that is nobody's child, gone when the test is.
struct Daemon(OwnedFd);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended, unless the test has failed.
        let _ = pidfd_send_signal(&self.0, Signal::KILL);
    }
}

#[test]
fn it_goes_to_the_background_with_a_namespace_limits_and_a_network() {
    let jail = Jail::new();
    let network = Network::new();
    let handle = jail.scratch.file("netns", "");
    // As where /var/run is a link.
    let link = jail.scratch.path("link");
    symlink(&jail.scratch, &link).unwrap();
    let mount = format!("mount --bind /proc/self/ns/net {}", handle.display());
    let netns = link.join("netns").display().to_string();
    let parent = format!("husk-{}", jail.id);
    let is_v1 = Path::new(CGROUPS).join("pids").exists();
    let end = jailer(&jail, &["--new-pid-ns", "--daemonize", "--netns", &netns])
        .option("--parent-cgroup", &parent)
        .option("--cgroup-version", if is_v1 { "1" } else { "2" })
        .option("--cgroup", "cpuset.cpus=0")
        .option("--cgroup", "pids.max=100")
        .option("--resource-limit", "no-file=512")
        .option("--resource-limit", "fsize=100000000000")
        .within(&network)
        .after(&mount)
        .wait()
        .code(0);
    assert_eq!((end.output.as_str(), end.errors.as_str()), ("", ""));
    let root = root(&jail);
    let pid = number_in(&root.join("firecracker.pid"));
    let process = Pid::from_raw(pid).unwrap();
    let daemon = Daemon(pidfd_open(process, PidfdFlags::empty()).unwrap());
    let socket = root.join("run/firecracker.socket");
    let deadline = Instant::now() + PATIENCE;
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < deadline, "it does not listen");
        thread::yield_now();
    }
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    assert!(read("status").contains(&format!("NSpid:\t{pid}\t1\n")));
    assert_eq!(read("comm"), "firecracker\n");
    let null = fs::metadata("/dev/null").unwrap().rdev();
    let opened = |number: &str| format!("/proc/{pid}/fd/{number}");
    for number in ["0", "1", "2"] {
        assert_eq!(fs::metadata(opened(number)).unwrap().rdev(), null, "{number}");
    }
    for entry in fs::read_dir(opened("")).unwrap().map(|entry| entry.unwrap()) {
        // One of a connection that has ended is gone by now.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.display().to_string();
        let is_known = target.starts_with("anon_inode:") || target.starts_with("socket:");
        assert!(is_known || target.ends_with("/null"), "{target} is open");
    }
    assert!(read("limits").lines().any(|line| line.starts_with("Max open files            512")));
    let network_of = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).unwrap();
    let theirs = network.within(|| network_of("thread-self"));
    assert_eq!(network_of(&pid.to_string()), theirs);
    let groups = jail.cgroups();
    assert_eq!(groups.len(), if is_v1 { 2 } else { 1 }, "{groups:?}");
    for (name, group) in &groups {
        let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        assert!(processes.lines().any(|line| line == pid.to_string()), "{name}: {processes}");
    }
    drive(&jail);
    pidfd_send_signal(&daemon.0, Signal::TERM).unwrap();
    let mut fds = [rustix::event::PollFd::new(&daemon.0, rustix::event::PollFlags::IN)];
    let patience = rustix::time::Timespec::try_from(PATIENCE).unwrap();
    assert_eq!(rustix::event::poll(&mut fds, Some(&patience)), Ok(1));
    assert!(!socket.exists());
}

/// A setting of a controller that version 2 has on this host, and its value.
fn setting_of_version_2() -> (&'static str, &'static str) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let is_v2 = |line: &&str| line.split(' ').nth(2) == Some("cgroup2");
    let mount = mounts.lines().find(is_v2).expect("a hierarchy of version 2: mount -t cgroup2");
    let controllers = Path::new(mount.split(' ').nth(1).unwrap()).join("cgroup.controllers");
    let controllers = fs::read_to_string(controllers).unwrap();
    let has = |file: &str| controllers.split_whitespace().any(|name| file.starts_with(name));
    let known = [("pids.max", "100"), ("memory.max", "1073741824"), ("hugetlb.2MB.max", "2097152")];
    known.into_iter().find(|(file, _)| has(file)).expect("a controller of version 2")
}

#[test]
fn a_cgroup_of_version_2_is_made_and_joined() {
    let jail = Jail::new();
    let (file, value) = setting_of_version_2();
    let setting = format!("{file}={value}");
    let version = ["--cgroup-version", "2", "--cgroup", &setting];
    let more = ["--parent-cgroup", &jail.parent, "--", "--level", "Info"];
    let vm = jailer(&jail, &[&version[..], &more].concat()).start();
    vm.expect("API server started.");
    let groups = jail.cgroups();
    let [(_, group)] = &groups[..] else { panic!("{groups:?}") };
    let read = |file: &str| fs::read_to_string(group.join(file)).unwrap();
    assert_eq!(read(file).trim(), value);
    let processes = read("cgroup.procs");
    assert!(processes.lines().any(|line| line == vm.pid().to_string()), "{processes}");
    drive(&jail);
    vm.signal(Signal::TERM);
    vm.wait().code(143);
}

#[test]
fn a_daemon_whose_number_cannot_be_written_is_refused_by_the_one_who_waits() {
    let jail = Jail::new();
    let root = root(&jail);
    fs::create_dir_all(&root).unwrap();
    fs::write(root.join("firecracker.pid"), "1").unwrap();
    let why = jailer(&jail, &["--daemonize"]).wait().quickly().refused(3);
    assert!(why.contains("firecracker.pid"), "{why}");
}

#[test]
fn another_program_is_copied_and_executed() {
    let jail = Jail::new();
    let program = jail.scratch.file("fire-cracker", linux_program("jailed"));
    fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).unwrap();
    let flags = flags(&jail);
    let start = |program: &Path| {
        let mut command = Command::new(jail.scratch.path("jailer"));
        command.arg("--exec-file").arg(program).args(&flags).args(["--", "--extra", "x"]).output()
    };
    symlink(env!("CARGO_BIN_EXE_husk"), jail.scratch.path("jailer")).unwrap();
    let output = start(&program).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    let value = |key: &str| {
        let prefix = format!("{key}=");
        let found = text.lines().find_map(|line| line.strip_prefix(&prefix));
        found.unwrap_or_else(|| panic!("no {key} in {text}"))
    };
    let args = value("args");
    assert!(
        args.starts_with(&format!("/fire-cracker --id {} --start-time-us ", jail.id)),
        "{args}"
    );
    assert!(args.contains(" --start-time-cpu-us ") && args.contains(" --parent-cpu-time-us "));
    assert!(args.ends_with(" --extra x"), "{args}");
    assert_eq!(value("variables"), "0");
    assert_eq!(value("root"), "dev fire-cracker fire-cracker.pid run");
    assert_eq!(value("directory"), "/");
    for what in ["above", "socket", "kvm"] {
        assert_eq!(value(what), "true", "{what}");
    }
    // One that needs a loader, which is not there.
    let e = String::from_utf8(start(Path::new("/bin/true")).unwrap().stderr).unwrap();
    assert!(e.contains("needs shared libraries, which are not in the jail: give a static"), "{e}");
    // The same jail again: what is left of the first is in the way.
    let again = start(&program).unwrap();
    assert_eq!(again.status.code(), Some(3));
    let e = String::from_utf8(again.stderr).unwrap();
    assert!(e.starts_with("jailer: fire-cracker is in the jail already"), "{e}");
}

#[test]
fn what_cannot_be_is_refused() {
    let jail = Jail::new();
    for (more, code) in [
        (&["--no-such-flag"][..], 2),
        (&["--cgroup", "cpu"], 2),
        (&["--cgroup", "../x.y=1"], 2),
        (&["--cgroup-version", "3"], 2),
        (&["--resource-limit", "core=1"], 2),
        (&["--netns", "/none"], 3),
        (&["--cgroup", "none.such=1"], 3),
    ] {
        let end = jailer(&jail, more).wait().code(code);
        assert!(!end.errors.is_empty(), "{more:?}");
    }
    for (version, setting, says) in [
        ("1", "pids.none=1", "cgroups have no file 'pids.none' on this host"),
        ("2", "cgroup.none=1", "has no controller 'cgroup' of version 2"),
    ] {
        let parent = ["--parent-cgroup", &jail.parent];
        let more = [&["--cgroup-version", version, "--cgroup", setting][..], &parent].concat();
        let e = jailer(&jail, &more).wait().refused(3);
        assert!(e.contains(says), "{e}");
    }
    for words in [["--id", "a/b", "--uid", "1"], ["--id", "a", "--uid", "0"]] {
        Husk::jailer(words.iter().chain(&["--gid", "1"])).wait().code(2);
    }
    // A link below the base, of whoever was jailed there before.
    fs::create_dir_all(base(&jail).join("firecracker")).unwrap();
    let other = jail.scratch.path("other");
    fs::create_dir(&other).unwrap();
    symlink(&other, base(&jail).join("firecracker").join(&jail.id)).unwrap();
    let e = jailer(&jail, &[]).wait().refused(3);
    assert!(e.starts_with("jailer: ") && e.contains("a part of it is a symbolic link"), "{e}");
    assert_eq!(fs::read_dir(other).unwrap().count(), 0);
}

/// Names that are swapped, over and over, until it is dropped.
fn flip<T>(one: &Path, other: &Path, flips: &AtomicU32, f: impl FnOnce() -> T) -> T {
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                // One of them may not be there for a moment.
                if renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok() {
                    flips.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let result = f();
        is_done.store(true, Ordering::Relaxed);
        result
    })
}

#[test]
fn links_that_come_and_go_lead_nowhere() {
    let jail = Jail::new();
    let sentinel = jail.scratch.path("sentinel");
    fs::create_dir_all(sentinel.join("net")).unwrap();
    let file = jail.scratch.file("sentinel/file", "of the host");
    let state = || {
        let of = |path: &Path| {
            let found = fs::symlink_metadata(path).unwrap();
            (found.ino(), found.uid(), found.gid(), found.mode(), found.mtime_nsec(), found.nlink())
        };
        let paths = [&*sentinel, &sentinel.join("net"), &*file].map(of);
        (tree(&sentinel), paths, fs::read_to_string(&file).unwrap())
    };
    fs::set_permissions(&sentinel, PermissionsExt::from_mode(0o755)).unwrap();
    let before = state();
    let (flips, mut starts, mut made) = (AtomicU32::new(0), 0, 0);
    let program = jail.scratch.file("static", linux_program("jailed"));
    fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).unwrap();
    let jailer = jail.scratch.path("jailer");
    symlink(env!("CARGO_BIN_EXE_husk"), &jailer).unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    // Whoever has the jail's directory swaps a directory or a file of it and a link, as fast as it can.
    while flips.load(Ordering::Relaxed) < FLIPS || starts < 30 {
        assert!(Instant::now() < deadline, "{flips:?} flips");
        let id = format!("{}-{starts}", jail.id);
        let above = base(&jail).join("static").join(&id);
        let root = above.join("root");
        fs::create_dir_all(root.join("dev/net")).unwrap();
        fs::create_dir_all(root.join("run")).unwrap();
        chown(&root, Some(jail.user), Some(jail.user)).unwrap();
        let (one, target) = match starts % 5 {
            0 => (root.join("dev"), &sentinel),
            1 => (root.join("dev/net"), &sentinel),
            2 => (root.join("run"), &sentinel),
            3 => (root.clone(), &sentinel),
            // What is to be copied: now a link to a file of the host, now another name.
            _ => (root.join("static"), &file),
        };
        let other = above.join("link");
        symlink(target, &other).unwrap();
        if starts % 5 == 4 {
            symlink("/none", &one).unwrap();
        }
        let user = jail.user.to_string();
        let status = flip(&one, &other, &flips, || {
            let mut command = Command::new(&jailer);
            command.arg("--exec-file").arg(&program).args(["--id", &id]);
            command.args(["--uid", &user, "--gid", &user, "--chroot-base-dir"]).arg(base(&jail));
            command.output().unwrap()
        });
        assert!(state() == before, "start {starts} reached {:?}, was {before:?}", state());
        let e = String::from_utf8_lossy(&status.stderr).into_owned();
        match status.status.code() {
            Some(0) => made += 1,
            // A step that finds a link fails closed; so does one that finds its file elsewhere.
            code => assert!(matches!(code, Some(3 | 4)), "{code:?} {e}"),
        }
        starts += 1;
    }
    assert!(made < starts, "no start of {starts} met a link");
    eprintln!("{starts} starts, {made} of them made a jail, {flips:?} flips");
}

#[test]
fn a_file_that_is_swapped_for_a_link_is_itself_or_refused() {
    let jail = Jail::new();
    let secret = jail.scratch.file("secret", "a secret of the host");
    let (one, other) =
        (jail.scratch.file("disk", "a disk of the guest"), jail.scratch.path("link"));
    symlink(&secret, &other).unwrap();
    let flips = AtomicU32::new(0);
    let (mut own, mut refused) = (0, 0);
    let deadline = Instant::now() + Duration::from_secs(120);
    while flips.load(Ordering::Relaxed) < FLIPS || own + refused < 30 {
        assert!(Instant::now() < deadline, "{flips:?} flips");
        let given = format!("{}:/disk", one.display());
        let socket = jail.scratch.path("api.sock");
        let vm = flip(&one, &other, &flips, || {
            let vm = jail.api(&["--file", &given]).start_unheard();
            while !socket.exists() && vm.is_running() {
                thread::yield_now();
            }
            vm
        });
        if vm.is_running() {
            vm.errors.line("Listening", Instant::now() + PATIENCE).unwrap();
            let disk = fs::read_to_string(format!("/proc/{}/root/disk", inside(&vm))).unwrap();
            assert_eq!(disk, "a disk of the guest");
            vm.signal(Signal::TERM);
            vm.wait().code(143);
            own += 1;
        } else {
            let e = vm.wait().refused(3);
            assert!(e.contains("give its real path"), "{e}");
            refused += 1;
        }
        assert_eq!(fs::read_to_string(&secret).unwrap(), "a secret of the host");
    }
    assert!(refused > 0, "none of {own} starts met a link");
    eprintln!("{own} jails had the file, {refused} were refused, {flips:?} flips");
}
