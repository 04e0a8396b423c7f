//! The escape probe: husk with an attacker in it. A VM is started by the command line as ever, in a process of the test
//! program's own; each thread, as soon as it is closed, tries everything in [`ATTEMPTS`], and says what came of it.
#![expect(unsafe_code, reason = "an attacker makes raw system calls")]
use std::io::Write;
use std::sync::Mutex;

use super::Role;

/// What is asked of the kernel, and the six arguments: pointers are to what is in [`PLACES`].
struct Attempt {
    name: &'static str,
    number: libc::c_long,
    args: [usize; 6],
}

/// A path that everybody may read, and that no VM here is given.
const PASSWD: &std::ffi::CStr = c"/etc/passwd";
const NEW: &std::ffi::CStr = c"/tmp/husk-escape-probe-made-this";
const PROGRAM: &std::ffi::CStr = c"/bin/true";
/// `AF_INET`, any address, port 1.
static INET: [u8; 16] = [2, 0, 0, 1, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
/// `AF_UNIX`, a path at which nobody listens.
static UNIX: [u8; 16] = *b"\x01\0/tmp/nobody\0\0\0";
/// Room for what the kernel writes, and zeros for what it reads.
static ZEROS: [u64; 64] = [0; 64];
/// `struct open_how`: read only.
static HOW: [u64; 3] = [0; 3];
/// `struct clone_args` with CLONE_NEWUSER.
static NEW_USER: [u64; 11] = [libc::CLONE_NEWUSER as u64, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0];
/// The directory that relative paths start from.
const CWD: usize = libc::AT_FDCWD.cast_unsigned() as usize;

fn at(path: &'static std::ffi::CStr) -> usize {
    path.as_ptr() as usize
}

fn of<T>(place: &'static T) -> usize {
    std::ptr::from_ref(place) as usize
}

/// All that is tried.
#[expect(clippy::too_many_lines, reason = "a table")]
fn attempts() -> Vec<Attempt> {
    // Told, as a closed thread may not ask.
    let parent = std::env::var(PARENT).map_or(1, |pid| pid.parse().unwrap_or(1));
    let (zeros, read_write, page) = (of(&ZEROS), 3_usize, 4096_usize);
    let exec = (libc::PROT_READ | libc::PROT_EXEC) as usize;
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
    let tests = attempts as fn() -> Vec<Attempt> as usize & !(page - 1);
    let a = |name, number, args: &[usize]| {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        Attempt { name, number, args: all }
    };
    vec![
        // Files by path.
        a("open", libc::SYS_open, &[at(PASSWD), 0]),
        a("openat", libc::SYS_openat, &[CWD, at(PASSWD), 0]),
        a("openat2", libc::SYS_openat2, &[CWD, at(PASSWD), of(&HOW), 24]),
        a("creat", libc::SYS_creat, &[at(NEW), 0o600]),
        a("open of own memory", libc::SYS_openat, &[CWD, at(c"/proc/self/mem"), 2]),
        a("open of another root", libc::SYS_openat, &[CWD, at(c"/proc/1/root/etc/passwd"), 0]),
        a("open of a device", libc::SYS_openat, &[CWD, at(c"/dev/kvm"), 2]),
        a("open of a terminal", libc::SYS_openat, &[CWD, at(c"/dev/ptmx"), 2]),
        a("mkdir", libc::SYS_mkdir, &[at(NEW), 0o700]),
        a("mkdirat", libc::SYS_mkdirat, &[CWD, at(NEW), 0o700]),
        a("mknod", libc::SYS_mknod, &[at(NEW), 0o020_600, 0x0103]),
        a("mknodat", libc::SYS_mknodat, &[CWD, at(NEW), 0o060_600, 0x0801]),
        a("symlink", libc::SYS_symlink, &[at(PASSWD), at(NEW)]),
        a("link", libc::SYS_link, &[at(PASSWD), at(NEW)]),
        a("rename", libc::SYS_rename, &[at(PASSWD), at(NEW)]),
        a("unlink", libc::SYS_unlink, &[at(PASSWD)]),
        a("rmdir", libc::SYS_rmdir, &[at(c"/tmp")]),
        a("truncate", libc::SYS_truncate, &[at(PASSWD), 0]),
        a("chmod", libc::SYS_chmod, &[at(PASSWD), 0o777]),
        a("chown", libc::SYS_chown, &[at(PASSWD), 1, 1]),
        a("utimensat", libc::SYS_utimensat, &[CWD, at(PASSWD), 0, 0]),
        a("setxattr", libc::SYS_setxattr, &[at(PASSWD), at(c"user.x"), zeros, 1, 0]),
        a("chdir", libc::SYS_chdir, &[at(c"/")]),
        a("chroot", libc::SYS_chroot, &[at(c"/tmp")]),
        a("name_to_handle_at", libc::SYS_name_to_handle_at, &[CWD, at(PASSWD), zeros, zeros, 0]),
        a("open_by_handle_at", libc::SYS_open_by_handle_at, &[CWD, zeros, 0]),
        a("inotify_init1", libc::SYS_inotify_init1, &[0]),
        a("fanotify_init", libc::SYS_fanotify_init, &[0, 0]),
        // Mounts and namespaces.
        a("mount", libc::SYS_mount, &[0, at(c"/tmp"), at(c"tmpfs"), 0, 0]),
        a("umount2", libc::SYS_umount2, &[at(c"/tmp"), 0]),
        a("pivot_root", libc::SYS_pivot_root, &[at(c"/tmp"), at(c"/tmp")]),
        a("open_tree", libc::SYS_open_tree, &[CWD, at(c"/"), 1]),
        a("move_mount", libc::SYS_move_mount, &[CWD, at(c"/tmp"), CWD, at(c"/"), 0]),
        a("fsopen", libc::SYS_fsopen, &[at(c"tmpfs"), 0]),
        a("unshare of users", libc::SYS_unshare, &[libc::CLONE_NEWUSER as usize]),
        a("unshare of mounts", libc::SYS_unshare, &[libc::CLONE_NEWNS as usize]),
        a("setns", libc::SYS_setns, &[0, 0]),
        a("clone into a user namespace", libc::SYS_clone, &[libc::CLONE_NEWUSER as usize | 17]),
        a("clone3 into a user namespace", libc::SYS_clone3, &[of(&NEW_USER), 88]),
        // Programs and processes.
        a("execve", libc::SYS_execve, &[at(PROGRAM), zeros, zeros]),
        a("execveat", libc::SYS_execveat, &[CWD, at(PROGRAM), zeros, zeros, 0]),
        a("vfork", libc::SYS_vfork, &[]),
        a("ptrace of the parent", libc::SYS_ptrace, &[16, parent]),
        a("ptrace by the parent", libc::SYS_ptrace, &[0]),
        a("process_vm_readv", libc::SYS_process_vm_readv, &[parent, zeros, 1, zeros, 1, 0]),
        a("process_vm_writev", libc::SYS_process_vm_writev, &[parent, zeros, 1, zeros, 1, 0]),
        a("kill of the parent", libc::SYS_kill, &[parent, 0]),
        a("kill of all", libc::SYS_kill, &[usize::MAX, 0]),
        a("tkill of the parent", libc::SYS_tkill, &[parent, 0]),
        a("tgkill of the parent", libc::SYS_tgkill, &[parent, parent, 0]),
        a("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &[parent, 0, zeros]),
        a("pidfd_getfd", libc::SYS_pidfd_getfd, &[0, 0, 0]),
        a("kcmp", libc::SYS_kcmp, &[parent, parent, 0, 0, 0]),
        a("prlimit64 of the parent", libc::SYS_prlimit64, &[parent, 7, 0, zeros]),
        a("setpriority", libc::SYS_setpriority, &[0, 0, usize::MAX]),
        a("sched_setaffinity", libc::SYS_sched_setaffinity, &[0, 8, zeros]),
        a("migrate_pages", libc::SYS_migrate_pages, &[parent, 1, zeros, zeros]),
        // Who one is.
        a("setuid", libc::SYS_setuid, &[0]),
        a("setgid", libc::SYS_setgid, &[0]),
        a("setresuid", libc::SYS_setresuid, &[0, 0, 0]),
        a("setgroups", libc::SYS_setgroups, &[0, 0]),
        a("setfsuid", libc::SYS_setfsuid, &[0]),
        a("personality", libc::SYS_personality, &[0x0040_0000]),
        a("a key", libc::SYS_add_key, &[at(c"user"), at(c"x"), zeros, 1, usize::MAX - 3]),
        a("keyctl", libc::SYS_keyctl, &[0, usize::MAX - 3]),
        // The network, and other processes' ears.
        a("socket of TCP", libc::SYS_socket, &[2, 1, 0]),
        a("socket of UDP", libc::SYS_socket, &[2, 2, 0]),
        a("socket of packets", libc::SYS_socket, &[17, 3, 0]),
        a("socket of netlink", libc::SYS_socket, &[16, 3, 0]),
        a("socket of the hypervisor", libc::SYS_socket, &[40, 1, 0]),
        a("socket of Unix", libc::SYS_socket, &[1, 1, 0]),
        a("connect to TCP", libc::SYS_connect, &[0, of(&INET), 16]),
        a("connect to Unix", libc::SYS_connect, &[0, of(&UNIX), 16]),
        a("bind", libc::SYS_bind, &[0, of(&INET), 16]),
        a("listen", libc::SYS_listen, &[0, 1]),
        a("shmget", libc::SYS_shmget, &[1, page, 0o1600]),
        a("semget", libc::SYS_semget, &[1, 1, 0o1600]),
        a("msgget", libc::SYS_msgget, &[1, 0o1600]),
        a("mq_open", libc::SYS_mq_open, &[at(c"x"), 0o102, 0o600, 0]),
        // Code.
        a("mmap to execute", libc::SYS_mmap, &[0, page, exec, anonymous, usize::MAX, 0]),
        a(
            "mmap to write and execute",
            libc::SYS_mmap,
            &[0, page, exec | 2, anonymous, usize::MAX, 0],
        ),
        a("mprotect to execute", libc::SYS_mprotect, &[tests, page, exec | 2]),
        a("pkey_mprotect", libc::SYS_pkey_mprotect, &[tests, page, exec | 2, usize::MAX]),
        a("remap_file_pages", libc::SYS_remap_file_pages, &[tests, page, 0, 0, 0]),
        a("modify_ldt", libc::SYS_modify_ldt, &[0, zeros, 16]),
        a("iopl", libc::SYS_iopl, &[read_write]),
        a("ioperm", libc::SYS_ioperm, &[0, 1, 1]),
        // The kernel.
        a("bpf", libc::SYS_bpf, &[0, zeros, 72]),
        a("io_uring_setup", libc::SYS_io_uring_setup, &[1, zeros]),
        a("io_uring_register", libc::SYS_io_uring_register, &[0, 0, 0, 0]),
        a("userfaultfd", libc::SYS_userfaultfd, &[1]),
        a("perf_event_open", libc::SYS_perf_event_open, &[zeros, 0, usize::MAX, usize::MAX, 0]),
        a("init_module", libc::SYS_init_module, &[zeros, 1, zeros]),
        a("finit_module", libc::SYS_finit_module, &[0, zeros, 0]),
        a("kexec_load", libc::SYS_kexec_load, &[0, 0, 0, 0]),
        a("reboot", libc::SYS_reboot, &[0xfee1_dead, 672_274_793, 0]),
        a("swapon", libc::SYS_swapon, &[at(PASSWD), 0]),
        a("acct", libc::SYS_acct, &[0]),
        a("syslog", libc::SYS_syslog, &[3, zeros, 8]),
        a("quotactl", libc::SYS_quotactl, &[0, 0, 0, 0]),
        a("sethostname", libc::SYS_sethostname, &[at(c"x"), 1]),
        a("clock_settime", libc::SYS_clock_settime, &[0, zeros]),
        a("adjtimex", libc::SYS_adjtimex, &[zeros]),
        a("lookup_dcookie", libc::SYS_lookup_dcookie, &[0, zeros, 8]),
        // The sandbox.
        a("prctl: dumpable", libc::SYS_prctl, &[4, 1]),
        a("prctl: seccomp", libc::SYS_prctl, &[22, 0]),
        a("prctl: a capability", libc::SYS_prctl, &[47, 2, 0]),
        a("prctl: a tracer", libc::SYS_prctl, &[0x5961_6d61, usize::MAX]),
        a("a handler of SIGSYS", libc::SYS_rt_sigaction, &[31, zeros, 0, 8]),
        a("a system call of x32", libc::SYS_open | 0x4000_0000, &[at(PASSWD), 0]),
        // What is open.
        a("ioctl: type for the user", libc::SYS_ioctl, &[0, 0x5412, zeros]),
        a("ioctl: make a tap", libc::SYS_ioctl, &[0, 0x4004_54ca, zeros]),
        a("ioctl: own a socket", libc::SYS_ioctl, &[0, 0x8901, zeros]),
        // Signals to any process, by what is open.
        a("fcntl: own a file", libc::SYS_fcntl, &[0, 8, parent]),
        a("fcntl: own a file, a thread's", libc::SYS_fcntl, &[0, 15, zeros]),
        a("fcntl: a signal", libc::SYS_fcntl, &[0, 10, 9]),
        a("fcntl: signals", libc::SYS_fcntl, &[0, 4, 0x2000]),
        a("fcntl: a lease", libc::SYS_fcntl, &[0, 1024, 0]),
        a("fcntl: notices of a directory", libc::SYS_fcntl, &[0, 1026, 2]),
    ]
}

/// What a role may do of all that, because it is what it is there for; docs/sandbox.md says why.
fn is_allowed(role: Role, name: &str) -> bool {
    let connects = ["socket of Unix", "connect to Unix", "connect to TCP"];
    let restores = [
        "bind",
        "listen",
        "io_uring_setup",
        "io_uring_register",
        "userfaultfd",
        "ioctl: type for the user",
        "ioctl: make a tap",
        "ioctl: own a socket",
        // For the process that copies memory, which has to see its own page map.
        "prctl: dumpable",
        // For a VM in place of this one, and for children.
        "open of a device",
    ];
    match role {
        Role::Vcpu | Role::Io | Role::Api | Role::Main | Role::Names => false,
        Role::Connect => connects.contains(&name),
        Role::Files => connects.contains(&name) || restores.contains(&name),
        Role::Zygote => {
            connects.contains(&name) || restores.contains(&name) || name == "a handler of SIGSYS"
        }
    }
}

/// Tries everything on this thread, once for each role; a line each: role, what, what the kernel said.
pub(super) fn attack(role: Role) {
    static DONE: Mutex<Vec<Role>> = Mutex::new(Vec::new());
    let Ok(attacked) = std::env::var(ATTACKED) else { return };
    if attacked != "all" {
        if attacked == format!("{role:?}") {
            // SAFETY: as below: refused, whatever becomes of the process.
            unsafe { libc::syscall(libc::SYS_mount, 0, at(c"/tmp"), at(c"tmpfs"), 0, 0) };
        }
        return;
    }
    let mut done = DONE.lock().unwrap();
    if done.contains(&role) {
        return;
    }
    done.push(role);
    drop(done);
    for Attempt { name, number, args: [a, b, c, d, e, f] } in attempts() {
        // SAFETY: none: it is what an attacker does. What would harm this process is refused, or the test fails.
        let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
        let errno = if result < 0 { std::io::Error::last_os_error().raw_os_error() } else { None };
        let line = format!("attack:{role:?}:{name}:{}\n", errno.unwrap_or(0));
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }
}

/// Who started that process.
const PARENT: &str = "HUSK_ESCAPE_PARENT";

/// Set in the process that is attacked from within.
const ATTACKED: &str = "HUSK_ESCAPE_PROBE";

mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::process::{Command, Stdio};

    use super::*;

    /// What the kernel says when it refuses: no permission, no access, no such call, and, of a link or a new name, that
    /// the two directories have nothing to do with each other.
    const REFUSED: [i32; 4] = [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::EXDEV];

    /// A husk of the test program's own, in which `attack` is made of each thread.
    fn husk(attack: &str, arguments: &str) -> Command {
        let mut husk = Command::new(std::env::current_exe().unwrap());
        husk.args(["sandbox::escape::tests::attacked", "--exact", "--ignored", "--nocapture"]);
        husk.env(PARENT, std::process::id().to_string());
        husk.env(ATTACKED, attack).env("HUSK_ARGUMENTS", arguments).stdin(Stdio::null());
        husk
    }

    #[test]
    #[ignore = "it is husk with an attacker in it: the other tests start it"]
    fn attacked() {
        let arguments = std::env::var("HUSK_ARGUMENTS").unwrap();
        let words = ["husk"].into_iter().chain(arguments.split(' ')).map(Into::into);
        let code = crate::cli::main(words);
        std::process::exit(code as i32);
    }

    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("husk-{name}-{}", std::process::id()));
            std::fs::create_dir_all(path.join("allowed")).unwrap();
            std::fs::write(path.join("disk"), [0; 512]).unwrap();
            Self(path)
        }

        /// A VM that has every kind of thread there is where files may be used: in a directory, or not at all.
        fn arguments(&self, files: Files, sandbox: &str) -> String {
            let place = self.0.display();
            let allowed = match files {
                Files::InDirectory => format!("{place}/allowed"),
                Files::Nowhere => "none".to_owned(),
            };
            format!(
                "run --api-sock {place}/api --disk {place}/disk --vsock cid=3,uds={place}/vsock \
                 --allow {allowed} {sandbox}"
            )
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    /// Where a VM may use files by path once its guest runs.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Files {
        InDirectory,
        Nowhere,
    }

    impl Files {
        const BOTH: [Self; 2] = [Self::InDirectory, Self::Nowhere];

        /// What there is in such a VM.
        fn roles(self) -> impl Iterator<Item = Role> {
            Role::ALL.into_iter().filter(move |role| match role {
                Role::Files | Role::Zygote => self == Self::InDirectory,
                Role::Names => self == Self::Nowhere,
                Role::Vcpu | Role::Io | Role::Connect | Role::Api | Role::Main => true,
            })
        }
    }

    #[test]
    fn everything_an_attacker_tries_is_refused() {
        let scratch = Scratch::new("escape");
        attack_all(&scratch, Files::InDirectory);
    }

    /// Then there is no thread that may open anything by path, and no process that could be asked to.
    #[test]
    fn everything_is_refused_to_whoever_may_open_nothing() {
        let scratch = Scratch::new("escape-none");
        attack_all(&scratch, Files::Nowhere);
    }

    fn attack_all(scratch: &Scratch, files: Files) {
        let output = husk("all", &scratch.arguments(files, "--seccomp errno")).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        let mut tried: BTreeMap<String, Vec<(String, i32)>> = BTreeMap::new();
        for line in said.lines().filter_map(|line| line.strip_prefix("attack:")) {
            let (role, rest) = line.split_once(':').unwrap();
            let (name, errno) = rest.rsplit_once(':').unwrap();
            tried.entry(role.into()).or_default().push((name.into(), errno.parse().unwrap()));
        }
        let count = attempts().len();
        assert!(count >= 60, "{count}");
        let there: BTreeSet<_> = files.roles().map(|role| format!("{role:?}")).collect();
        assert_eq!(tried.keys().cloned().collect::<BTreeSet<_>>(), there);
        for role in files.roles() {
            let tried =
                tried.get(&format!("{role:?}")).unwrap_or_else(|| panic!("{role:?}: {said}"));
            assert_eq!(tried.len(), count, "{role:?}");
            let may: Vec<_> = tried.iter().filter(|(_, errno)| !REFUSED.contains(errno)).collect();
            let unexpected: Vec<_> =
                may.iter().filter(|(name, _)| !is_allowed(role, name)).collect();
            println!("{role:?}: {count} attempts, {} refused", count - may.len());
            assert!(unexpected.is_empty(), "{role:?}: {unexpected:?}");
        }
        assert!(!std::path::Path::new(NEW.to_str().unwrap()).exists());
    }

    #[test]
    fn what_is_in_no_list_ends_the_process() {
        use std::os::unix::process::ExitStatusExt;
        let scratch = Scratch::new("escape-kill");
        let all =
            Files::BOTH.into_iter().flat_map(|files| files.roles().map(move |role| (files, role)));
        for (files, role) in all.filter(|(_, role)| *role != Role::Zygote) {
            let arguments = scratch.arguments(files, "--require-sandbox");
            let output = husk(&format!("{role:?}"), &arguments).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{role:?}: {said}");
        }
    }
}
