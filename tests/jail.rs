//! `husk jail`: what is in there, who runs in there, how it ends, and what is refused.
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::util::*;

/// Attaches to a process as a debugger does; what the kernel says.
const ATTACH: &str = "
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
attached = libc.ptrace(16, int(sys.argv[1]), None, None)
print('attached' if attached == 0 else 'errno %d' % ctypes.get_errno())
";

/// Opens 200 descriptors, one of them a socket for packets, and becomes husk.
const LEAK: &str = r#"exec python3 -c '
import os, socket, sys
null = os.open("/etc/passwd", os.O_RDONLY)
for number in range(10, 210):
    os.dup2(null, number)
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
os.dup2(ours.fileno(), 50)
os.environ["SECRET"] = "x"
os.execv(sys.argv[1], sys.argv[1:])
' "$0" "$@""#;

fn status(pid: u32) -> Vec<(String, String)> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(key, value)| (key.to_owned(), value.trim().replace('\t', " "))).collect()
}

#[test]
fn one_that_is_killed_for_want_of_memory_is_told_of() {
    let jail = Jail::new();
    let end = jail.guest(&["--memory-max", "1"], "how=poweroff").wait().quickly();
    assert_eq!(end.status.code(), Some(137), "{end}");
    assert!(end.errors.contains("want of memory"), "{end}");
}

/// KVM starts a thread of its own at a guest's first instruction, and says EAGAIN for as long as it cannot.
#[test]
fn too_few_processes_end_the_vm_by_name() {
    let mut without = 0;
    for most in ["1", "2", "3", "4"] {
        let jail = Jail::new();
        let husk = jail.guest(&["--pids-max", most], "how=poweroff");
        let end = husk.serial("none").wait().quickly();
        match end.status.code() {
            Some(0) => {}
            Some(4) => assert!(end.errors.contains("Resource temporarily unavailable"), "{end}"),
            Some(6) => {
                assert!(end.errors.contains("raise the limit on processes"), "{end}");
                without += 1;
            }
            _ => panic!("--pids-max {most}: {end}"),
        }
    }
    assert!(without > 0, "KVM has all its threads");
}

#[test]
fn there_is_only_what_was_named() {
    let jail = Jail::new();
    let file = jail.scratch.file("disk", "a disk");
    let file = format!("{}:/images/disk", file.display());
    let vm = jail.api(&["--file", &file]).start();
    let pid = inside(&vm);
    let scratch = jail.scratch.as_ref().strip_prefix("/").unwrap();
    let above = scratch.ancestors().filter(|path| !path.as_os_str().is_empty());
    let mut expected: BTreeSet<String> =
        ["dev", "dev/kvm", "dev/null", "proc", "images", "images/disk"].map(String::from).into();
    expected.extend(above.map(|path| path.display().to_string()));
    expected.extend(["disk", "api.sock"].map(|name| scratch.join(name).display().to_string()));
    let root = format!("/proc/{pid}/root/");
    assert_eq!(tree(Path::new(&root)), expected.iter().cloned().collect::<Vec<_>>());
    // From within: there is nothing above, and nothing can be made.
    let (here, above, made, written) = among_files_of(pid, || {
        let names = |path: &str| {
            let mut names: Vec<_> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let made = fs::write("/made", "").map_err(|e| e.kind());
        let written = fs::write("/images/disk", "").map_err(|e| e.kind());
        (names("/"), names("/../../.."), made, written)
    });
    assert_eq!(here, above);
    assert_eq!(here.len(), 4, "{here:?}");
    assert_eq!(made, Err(std::io::ErrorKind::ReadOnlyFilesystem));
    assert_eq!(written, Err(std::io::ErrorKind::ReadOnlyFilesystem));
    let kvm = fs::metadata(format!("{root}dev/kvm")).unwrap();
    assert_eq!((kvm.mode() & 0o7777, kvm.uid(), kvm.gid()), (0o600, jail.user, jail.user));
}

#[test]
fn mounts_are_those_that_were_named_and_restricted() {
    let jail = Jail::new();
    let disk = format!("{}:/disk", jail.scratch.file("disk", "a disk").display());
    let log = format!("{}:/log,rw", jail.scratch.file("log", "").display());
    let vm = jail.guest(&["--file", &disk, "--file", &log], "how=hang").start();
    vm.expect("how=hang");
    let text = fs::read_to_string(format!("/proc/{}/mountinfo", inside(&vm))).unwrap();
    let mut mounts: Vec<(&str, &str)> = text
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .map(|fields| (fields[4], fields[5]))
        .collect();
    mounts.sort();
    let kernel = guest("hello");
    let read_only = "ro,nosuid,nodev,noexec,relatime";
    let mut expected = [
        ("/", "ro,nosuid,noexec,relatime"),
        ("/disk", read_only),
        (kernel.to_str().unwrap(), read_only),
        ("/log", "rw,nosuid,nodev,noexec,relatime"),
        ("/proc", read_only),
    ];
    expected.sort();
    assert_eq!(mounts, expected);
}

#[test]
fn namespaces_are_its_own() {
    let jail = Jail::new();
    let vm = jail.api(&["--user-ns"]).start();
    let pid = inside(&vm);
    for name in ["mnt", "pid", "net", "ipc", "uts", "cgroup", "user"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{name}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{name}");
    }
    let interfaces = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    let names: Vec<_> =
        interfaces.lines().filter_map(|line| Some(line.split_once(':')?.0.trim())).collect();
    assert_eq!(names, ["lo"]);
    let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
    let user = jail.user.to_string();
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), [&user, &user, "1"]);
}

#[test]
fn the_process_has_no_rights_left() {
    for flags in [&[][..], &["--user-ns"]] {
        let jail = Jail::new();
        let vm = jail.api(flags).start();
        let pid = inside(&vm);
        let ids = [jail.user; 4].map(|id| id.to_string()).join(" ");
        let none = "0".repeat(16);
        let of_process = status(pid);
        let value = |key: &str| {
            let found = of_process.iter().find(|(known, _)| known == key);
            found.unwrap_or_else(|| panic!("no {key}")).1.as_str()
        };
        assert_eq!((value("Uid"), value("Gid"), value("Groups")), (&*ids, &*ids, ""));
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(value(set), none, "{set}");
        }
        assert_eq!(value("NoNewPrivs"), "1");
        assert_eq!(value("NSpid"), format!("{pid} 1"));
        assert_eq!(value("Umask"), "0077");
        let owner = fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid();
        assert_eq!(owner, 0, "it may be debugged");
    }
}

#[test]
fn another_process_of_the_same_user_cannot_debug_it() {
    let jail = Jail::new();
    let attach = |pid: u32| {
        let mut command = Command::new("python3");
        command.args(["-c", ATTACH, &pid.to_string()]).uid(jail.user).gid(jail.user);
        let said = command.output().unwrap().stdout;
        String::from_utf8(said).unwrap().trim().to_owned()
    };
    let vm = jail.api(&[]).start();
    assert_eq!(attach(inside(&vm)), "errno 1");
    // Any other process of that user can be.
    let mut other = Command::new("sleep").arg("60").uid(jail.user).gid(jail.user).spawn().unwrap();
    assert_eq!(attach(other.id()), "attached");
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn leaked_descriptors_and_variables_stay_outside() {
    let jail = Jail::new();
    let vm = jail.guest(&["--fd", "50"], "how=hang").option("--net", "fd=50").after(LEAK).start();
    vm.expect("how=hang");
    let pid = inside(&vm);
    let target_of = |number: &str| fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap();
    let output = ["1", "2"].map(target_of);
    let mut sockets = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let entry = entry.unwrap();
        let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let target = fs::read_link(entry.path()).unwrap().display().to_string();
        let kind = target.split(':').next().unwrap();
        match kind {
            "socket" => sockets += 1,
            "anon_inode" => {}
            "pipe" => assert!(output.contains(&target.into()), "{number}"),
            "/dev/null" => assert_eq!(number, 0),
            "/dev/kvm" => {}
            _ if target.starts_with("/memfd:") => {}
            // What boots; it stays open for the guest's reset.
            _ => assert_eq!(target, guest("hello").display().to_string(), "{number}"),
        }
    }
    // The one that was named, and the copy that the device has.
    assert_eq!(sockets, 2);
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(!environment.is_empty() && environment.iter().all(|byte| *byte == 0));
    let outside = files_in(&format!("/proc/{}/fd", vm.pid()));
    assert_eq!(outside, 5, "standard streams, the log, and what ties the processes");
}

#[test]
fn limits_are_set_and_cannot_be_raised() {
    let jail = Jail::new();
    let limits = ["nofile=300", "fsize=7000000", "nproc=70", "memlock=65536"];
    let flags: Vec<&str> = limits.iter().flat_map(|limit| ["--rlimit", *limit]).collect();
    let vm = jail.api(&flags).start();
    let text = fs::read_to_string(format!("/proc/{}/limits", inside(&vm))).unwrap();
    for (name, value) in [
        ("Max open files", "300"),
        ("Max file size", "7000000"),
        ("Max processes", "70"),
        ("Max locked memory", "65536"),
        ("Max core file size", "0"),
    ] {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let values: Vec<&str> = line.split_whitespace().take(2).collect();
        assert_eq!(values, [value; 2], "{name}");
    }
}

#[test]
fn a_limit_may_be_above_the_one_that_is_the_default() {
    let jail = Jail::new();
    let vm = jail.api(&["--rlimit", "nofile=4500"]).start();
    let text = fs::read_to_string(format!("/proc/{}/limits", inside(&vm))).unwrap();
    assert!(text.lines().any(|line| line.starts_with("Max open files            4500")), "{text}");
}

#[test]
fn a_parent_of_cgroups_is_a_relative_path() {
    let jail = Jail::new();
    for parent in ["/husk", "../husk", "a/../b"] {
        let flags = ["--pids-max", "9", "--cgroup-parent", parent];
        let husk = Husk::new(["jail", "--id", &jail.id, "--uid", "1000000", "--gid", "1000000"]);
        let husk = flags.iter().fold(husk, |husk, flag| husk.arg(flag)).arg("--").arg("run");
        let why = husk.wait().quickly().refused(3);
        assert!(why.contains(&format!("'{parent}' is no relative path")), "{why}");
    }
}

#[test]
fn of_many_starts_with_one_id_one_is_made() {
    let jail = Jail::new();
    let start = |_| jail.guest(&["--pids-max", "40"], "how=hang").start_unheard();
    let all: Vec<_> = (0..6).map(start).collect();
    crate::fork::wait_until(|| all.iter().filter(|vm| vm.is_running()).count() <= 1);
    let (running, refused): (Vec<_>, Vec<_>) = all.into_iter().partition(TestVm::is_running);
    for vm in refused {
        let why = vm.wait().refused(3);
        assert!(why.contains("another VM has that id"), "{why}");
    }
    let [vm] = <[TestVm; 1]>::try_from(running).expect("one that runs");
    vm.expect("how=hang");
    vm.signal(Signal::TERM);
    vm.wait().code(143);
    assert_eq!(jail.cgroups(), []);
}

#[test]
fn a_cgroup_is_made_joined_and_removed() {
    let jail = Jail::new();
    let disks = fs::read_dir("/sys/block").unwrap();
    let device = disks.map(|entry| entry.unwrap().path().join("dev")).max().unwrap();
    let device = fs::read_to_string(device).unwrap().trim().to_owned();
    let io = format!("{device},rbps=1000000,wiops=77");
    let limits = ["--memory-max", "256M", "--cpu-max", "150000/100000", "--pids-max", "40"];
    let vm = jail.api(&[&limits[..], &["--io-max", &io]].concat()).start();
    let pid = inside(&vm).to_string();
    let groups = jail.cgroups();
    for (_, group) in &groups {
        let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        // The other one makes children.
        assert!(processes.lines().any(|line| line == pid), "{}: {processes}", group.display());
    }
    let memory = (256 << 20).to_string();
    // Where version 2 has a controller, version 1 has not.
    let is_v1 = Path::new(CGROUPS).join("memory").exists();
    let expected: &[(&str, String)] = if is_v1 {
        &[
            ("memory.limit_in_bytes", memory.clone()),
            ("memory.memsw.limit_in_bytes", memory),
            ("cpu.cfs_quota_us", "150000".into()),
            ("cpu.cfs_period_us", "100000".into()),
            ("pids.max", "40".into()),
            ("blkio.throttle.read_bps_device", format!("{device} 1000000")),
            ("blkio.throttle.write_iops_device", format!("{device} 77")),
        ]
    } else {
        &[
            ("memory.max", memory),
            ("cpu.max", "150000 100000".into()),
            ("pids.max", "40".into()),
            ("io.max", format!("{device} rbps=1000000 wbps=max riops=max wiops=77")),
        ]
    };
    assert_eq!(groups.len(), if is_v1 { 4 } else { 1 }, "{groups:?}");
    let read = |file: &str| {
        let controller = file.split('.').next().unwrap();
        let (_, group) = groups.iter().find(|(name, _)| !is_v1 || name == controller).unwrap();
        fs::read_to_string(group.join(file)).unwrap().trim().to_owned()
    };
    for (file, value) in expected {
        assert_eq!(read(file), *value, "{file}");
    }
    // The same id a second time, while the first is there.
    let e = jail.api(&["--pids-max", "9"]).start_unheard().wait().refused(3);
    assert!(e.contains("another VM has that id; choose another --id"), "{e}");
    assert_eq!(read("pids.max"), "40");
    vm.signal(Signal::TERM);
    vm.wait().code(143);
    assert_eq!(jail.cgroups(), []);
}

#[test]
fn the_exit_code_is_that_of_the_guests_end() {
    for (how, code) in [("poweroff", 0), ("triple", 5), ("internal-error", 6)] {
        let jail = Jail::new();
        let end = jail.guest(&["--memory-max", "512M"], &format!("how={how}")).wait().code(code);
        assert!(end.output.contains("hello=world"), "{end}");
        assert_eq!(jail.cgroups(), []);
    }
}

#[test]
fn signals_go_through_and_come_back_as_codes() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 143)] {
        let jail = Jail::new();
        let vm = jail.api(&[]).start();
        vm.signal(signal);
        let end = vm.wait().code(code);
        assert!(end.errors.lines().last().unwrap().contains("stopped by SIG"), "{end}");
    }
    // The process inside dies of one, which is not husk's to handle, or crashes.
    for (signal, code) in [(Signal::KILL, 137), (Signal::ABORT, 134), (Signal::SEGV, 139)] {
        let jail = Jail::new();
        let vm = jail.guest(&["--pids-max", "50"], "how=hang").start();
        vm.expect("how=hang");
        let pid = rustix::process::Pid::from_raw(inside(&vm).cast_signed()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
        vm.wait().code(code);
        assert_eq!(jail.cgroups(), []);
    }
}

#[test]
fn a_signal_before_there_are_handlers_is_not_lost() {
    for _ in 0..20 {
        let jail = Jail::new();
        let vm = jail.guest(&[], "how=hang").start();
        // Before it can have come to anything; the guest would hang for ever.
        vm.signal(Signal::TERM);
        let code = vm.wait().status;
        // It may not have come to take signals at all.
        let is_known = code.code() == Some(143)
            || std::os::unix::process::ExitStatusExt::signal(&code) == Some(15);
        assert!(is_known, "{code}");
    }
}

#[test]
fn what_is_inside_dies_with_what_is_outside() {
    let jail = Jail::new();
    let vm = jail.api(&["--pids-max", "50"]).start();
    let inside = rustix::process::Pid::from_raw(inside(&vm).cast_signed()).unwrap();
    let pidfd = rustix::process::pidfd_open(inside, rustix::process::PidfdFlags::empty()).unwrap();
    vm.signal(Signal::KILL);
    assert_eq!(vm.wait().signal(), Some(9));
    let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    let patience = rustix::time::Timespec::try_from(PATIENCE).unwrap();
    assert_eq!(rustix::event::poll(&mut fds, Some(&patience)), Ok(1), "it lives on");
    // Its group and its socket are left, and do not keep the next one from starting.
    assert_eq!(jail.cgroups().len(), 1);
    let vm = jail.api(&["--pids-max", "50"]).start();
    vm.signal(Signal::TERM);
    vm.wait().code(143);
    assert_eq!(jail.cgroups(), []);
}

#[test]
fn snapshots_are_made_and_restored_inside() {
    let jail = Jail::new();
    let kernel = guest("hello");
    let vm = jail.api(&["--file", kernel.to_str().unwrap()]).start();
    let source = json!({"kernel_image_path": kernel, "boot_args": "how=hang"});
    vm.api().put("/boot-source", source).done();
    vm.api().act("InstanceStart").done();
    let directory = jail.scratch.path("snapshot");
    vm.api().put("/snapshot/create", json!({ "directory": directory })).done();
    assert_eq!(vm.api().state(), "Running");
    vm.signal(Signal::TERM);
    vm.wait().code(143);
    let mapped = format!("{},rw", jail.scratch.as_ref().display());
    let vm = jail.husk(&["--dir", &mapped, "--", "restore"]).arg(&directory).serial("none");
    let vm = vm.listening_at(&jail.scratch.path("api.sock")).start();
    assert_eq!(vm.api().state(), "Running");
    // Somebody else's eyes: it may not be debugged afterwards either.
    let owner = fs::metadata(format!("/proc/{}/environ", inside(&vm))).unwrap().uid();
    assert_eq!(owner, 0);
}

#[test]
fn a_network_namespace_is_joined_with_its_tap() {
    let jail = Jail::new();
    let network = Network::new();
    network.ip(&format!("tuntap add tap0 mode tap vnet_hdr user {}", jail.user));
    let handle = jail.scratch.file("netns", "");
    let flags = ["--netns", handle.to_str().unwrap(), "--device", "/dev/net/tun"];
    let mount = format!("mount --bind /proc/self/ns/net {}", handle.display());
    let vm = jail.guest(&flags, "how=hang").network(&network, "").after(&mount).start();
    vm.expect("how=hang");
    let interfaces = fs::read_to_string(format!("/proc/{}/net/dev", inside(&vm))).unwrap();
    assert!(interfaces.contains("tap0:"), "{interfaces}");
    // Anything else is no network.
    let e = jail.guest(&flags, "").wait().refused(3);
    assert!(e.contains("--netns is no network namespace; name one"), "{e}");
}

#[test]
fn what_cannot_be_is_refused_with_what_to_do() {
    let jail = Jail::new();
    let scratch = &jail.scratch;
    let file = scratch.file("file", "");
    let link = scratch.path("link");
    symlink(&file, &link).unwrap();
    let beyond = scratch.path("directory");
    symlink(scratch, &beyond).unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let directory = path(scratch.as_ref());
    for (flags, code, wanted) in [
        (vec!["--file".into(), path(&link)], 3, "give its real path: realpath"),
        (vec!["--file".into(), path(&beyond.join("file"))], 3, "give its real path: realpath"),
        (vec!["--file".into(), path(&scratch.path("none"))], 3, "No such file"),
        (vec!["--file".into(), directory.clone()], 3, "is a directory, want a regular file; use"),
        (vec!["--dir".into(), path(&file)], 3, "is a regular file, want a directory; use"),
        (vec!["--device".into(), path(&file)], 3, "is a regular file, want a device; use"),
        (vec!["--file".into(), path(&scratch.fifo("fifo"))], 3, "is a FIFO, want a regular file"),
        (vec!["--file".into(), format!("{}:/a/../b", path(&file))], 3, "has no '..'; say where"),
        (vec!["--dir".into(), format!("{directory}:/")], 3, "cannot be replaced; say where"),
        (vec!["--kvm".into(), "/dev/none".into()], 3, "No such file"),
        (vec!["--fd".into(), "1000".into()], 3, "whoever starts husk has to open it"),
        (vec!["--netns".into(), "/proc/self/ns/net".into()], 3, "give its real path"),
        (vec!["--rlimit".into(), "nofile=1000000000".into()], 4, "cannot be exceeded"),
        (
            vec!["--memory-max".into(), "0".into(), "--cgroup-root".into(), "/none".into()],
            3,
            "cannot open /none",
        ),
    ] {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let e = jail.guest(&flags, "").wait().refused(code);
        assert!(e.starts_with("husk: ") && e.contains(wanted), "{flags:?}: {e}");
    }
    let twice = format!("{}:/x", path(&file));
    let flags = ["--file", &twice, "--file", &twice, "--pids-max", "50"];
    let e = jail.guest(&flags, "").wait().refused(3);
    assert!(e.contains("remove it or choose another"), "{e}");
    // The process inside had joined it by then.
    assert_eq!(jail.cgroups(), []);
    // A file of the jail in a directory of the host: nothing is made there.
    let (inner, outer) = (format!("{}:/d/new/file", path(&file)), format!("{directory}:/d,rw"));
    let e = jail.guest(&["--dir", &outer, "--file", &inner], "").wait().refused(3);
    assert!(e.contains("is in a directory of the host; choose another place"), "{e}");
    assert!(!scratch.path("new").exists());
}

#[test]
fn words_that_are_wrong_are_refused() {
    let jail = Jail::new();
    let user = jail.user.to_string();
    let own = ["--id", &jail.id, "--uid", &user, "--gid", &user];
    let run = ["--", "run"];
    for words in [
        [&own[..], &["--no-such-flag"], &run].concat(),
        [&["--id", "a/b", "--uid", "1", "--gid", "1"][..], &run].concat(),
        [&["--id", "a_b", "--uid", "1", "--gid", "1"][..], &run].concat(),
        [&["--id", "a", "--uid", "0", "--gid", "1"][..], &run].concat(),
        [&["--id", "a", "--uid", "1", "--gid", "0"][..], &run].concat(),
        [&["--id", "a", "--uid", "4294967295", "--gid", "1"][..], &run].concat(),
        [&["--id", "a", "--uid", "1"][..], &run].concat(),
        [&own[..], &["--rlimit", "core=5"], &run].concat(),
        own.to_vec(),
        [&own[..], &["--", "ctl"]].concat(),
        [&own[..], &["--", "jail"]].concat(),
        [&own[..], &["--", "run", "--cpus", "many"]].concat(),
    ] {
        let end = Husk::new(["jail"].iter().chain(&words)).wait().code(2);
        assert!(!end.errors.is_empty(), "{words:?}");
    }
}

#[test]
fn who_is_not_root_is_told_so() {
    let jail = Jail::new();
    let user = jail.user.to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
    command.args(["jail", "--id", "a", "--uid", &user, "--gid", &user, "--", "run"]);
    let output = command.uid(jail.user).gid(jail.user).output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    let e = String::from_utf8(output.stderr).unwrap();
    assert!(e.contains("root"), "{e}");
}

#[test]
fn a_terminal_works_as_without_a_jail() {
    let jail = Jail::new();
    let vm = jail.guest(&[], "how=hang").on_terminal().start();
    vm.expect("how=hang");
    vm.type_in("\x01x");
    vm.wait().code(0);
}

#[test]
fn forks_are_made_inside_and_end_with_the_jail() {
    let jail = Jail::new();
    let kernel = guest("hello");
    let vm = jail.api(&["--file", kernel.to_str().unwrap()]).start();
    let source = json!({"kernel_image_path": kernel, "boot_args": "how=hang"});
    vm.api().put("/boot-source", source).done();
    vm.api().act("InstanceStart").done();
    let reply = vm.api().request("POST", "/fork", "{}");
    assert_eq!(reply.status, 200, "{}", reply.body);
    let child = Api::new(&jail.scratch.path("api.sock.1"));
    assert_eq!(child.state(), "Running");
    let connection = child.connect();
    vm.api().act("Kill").done();
    vm.wait().code(0);
    // Nobody is at its other end.
    assert_eq!(std::io::Read::read(&mut &connection, &mut [0]).unwrap_or(0), 0);
    assert!(std::os::unix::net::UnixStream::connect(jail.scratch.path("api.sock.1")).is_err());
}
