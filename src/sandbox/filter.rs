//! Seccomp: which system calls a thread may make. build.rs compiles the lists in `resources/seccomp` to BPF.
#![expect(unsafe_code, reason = "seccomp(2) has no safe wrapper in our libraries")]
use std::io;

use libc::{sock_filter, sock_fprog};

use super::Role;

/// What becomes of a system call that is in no list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Seccomp {
    /// It ends the process (SIGSYS), and is in the host's audit log.
    #[default]
    Kill,
    /// It fails (EPERM).
    Errno,
    /// It is made, and is in the host's audit log: to find out what a list lacks.
    Log,
    /// There are no lists.
    Off,
}

impl Seccomp {
    /// What the kernel calls it (linux/seccomp.h).
    fn action(self) -> u32 {
        match self {
            Self::Kill => libc::SECCOMP_RET_KILL_PROCESS,
            Self::Errno => libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned(),
            Self::Log => libc::SECCOMP_RET_LOG,
            Self::Off => libc::SECCOMP_RET_ALLOW,
        }
    }
}

/// `BPF_RET | BPF_K`: ends a program with a constant.
const RETURN: u16 = 0x06;

/// `BPF_JMP | BPF_JEQ | BPF_K`: compares with a constant.
const EQUAL: u16 = 0x15;

/// The compiled list of `role`: as bytes, each instruction as the kernel has it.
fn list(role: Role) -> &'static [u8] {
    macro_rules! lists {
        ($($role:ident $file:literal),*) => {
            match role {
                $(Role::$role => include_bytes!(concat!(env!("OUT_DIR"), "/seccomp/", $file)),)*
            }
        };
    }
    lists!(Vcpu "vcpu", Io "io", Connect "connect", Api "api", Main "main", Files "files", Names "names", Zygote "zygote")
}

/// What the lists have for the number of this process.
const THIS_PROCESS: u32 = i32::MAX.cast_unsigned() - 1;

/// The program of `role`, in which what is in no list is dealt with as `mode` says.
fn program(role: Role, mode: Seccomp) -> Vec<sock_filter> {
    let (instructions, rest) = list(role).as_chunks::<8>();
    debug_assert!(rest.is_empty(), "build.rs writes whole instructions");
    let decoded = instructions.iter().map(|&[c0, c1, jt, jf, k @ ..]| {
        let (code, k) = (u16::from_ne_bytes([c0, c1]), u32::from_ne_bytes(k));
        let k = match code {
            RETURN if k == Seccomp::Kill.action() => mode.action(),
            EQUAL if k == THIS_PROCESS => std::process::id(),
            _ => k,
        };
        sock_filter { code, jt, jf, k }
    });
    decoded.collect()
}

/// Closes the calling thread, and those that it starts from now on. Needs no_new_privs.
pub(super) fn install(role: Role, mode: Seccomp) -> io::Result<()> {
    if mode == Seccomp::Off {
        return Ok(());
    }
    let mut program = program(role, mode);
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = sock_fprog { len, filter: program.as_mut_ptr() };
    // Where Spectre has to be mitigated for such threads and no others, the guest must not pay for it on every exit.
    let flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: the program is there for as long as the call takes, with as many instructions as it says.
    let done = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the kernel has filters, and can do with a system call what `mode` says.
pub(super) fn is_available(mode: Seccomp) -> bool {
    // Without what goes with it: the kernel wants the kind.
    let action = mode.action() & libc::SECCOMP_RET_ACTION_FULL;
    // SAFETY: the kernel reads the action, which is there for as long as the call takes.
    let found = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action)
    };
    found == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `BPF_LD | BPF_W | BPF_ABS`, `BPF_JMP | BPF_JGE | BPF_K`, `BPF_JMP | BPF_JA`, `BPF_ALU | BPF_AND | BPF_K`.
    const LOAD: u16 = 0x20;
    const AT_LEAST: u16 = 0x35;
    const JUMP: u16 = 0x05;
    const AND: u16 = 0x54;
    const X86_64: u32 = 0xc000_003e;

    /// What the kernel would do with a system call, and after how many instructions.
    fn verdict(program: &[sock_filter], arch: u32, number: u32, second: u32) -> (u32, usize) {
        let (mut at, mut value, mut steps) = (0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            let branch = |is_so| usize::from(if is_so { jt } else { jf });
            steps += 1;
            at += 1 + match code {
                RETURN => return (k, steps),
                EQUAL => branch(value == k),
                AT_LEAST => branch(value >= k),
                JUMP => k as usize,
                LOAD => {
                    value = match k {
                        0 => number,
                        4 => arch,
                        24 => second,
                        _ => 0,
                    };
                    0
                }
                AND => {
                    value &= k;
                    0
                }
                other => panic!("{other:#x} is in no program"),
            };
        }
    }

    #[test]
    fn what_is_in_no_list_is_killed_and_what_is_in_one_is_found_soon() {
        const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
        const ABSENT: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
        let kill = Seccomp::Kill.action();
        let number = |n: libc::c_long| u32::try_from(n).unwrap();
        for role in Role::ALL {
            let program = program(role, Seccomp::Kill);
            let of = |number| verdict(&program, X86_64, number, 0).0;
            assert_eq!(of(number(libc::SYS_read)), ALLOW, "{role:?}");
            assert_eq!(of(number(libc::SYS_clone3)), ABSENT, "{role:?}");
            assert_eq!(of(u32::MAX), ALLOW, "{role:?}");
            let never = [libc::SYS_execve, libc::SYS_execveat, libc::SYS_ptrace, libc::SYS_bpf];
            for never in never.map(number).into_iter().chain([600, 0x4000_0000, u32::MAX - 1]) {
                assert_eq!(of(never), kill, "{role:?} {never}");
            }
            for n in 0..1024 {
                assert_eq!(verdict(&program, 0x4000_0003, n, 0).0, kill, "{role:?} {n}");
                let steps = verdict(&program, X86_64, n, 0).1;
                assert!(steps < 128, "{role:?} {n}: {steps}");
            }
        }
        const KVM_RUN: u32 = 0xae80;
        let vcpu = program(Role::Vcpu, Seccomp::Kill);
        let (action, steps) = verdict(&vcpu, X86_64, number(libc::SYS_ioctl), KVM_RUN);
        assert!(action == ALLOW && steps < 24, "{steps}");
        let api = program(Role::Api, Seccomp::Kill);
        assert_eq!(verdict(&api, X86_64, number(libc::SYS_ioctl), KVM_RUN).0, kill);
    }

    #[test]
    fn programs_are_what_the_kernel_takes_and_small() {
        for role in Role::ALL {
            let killing = program(role, Seccomp::Kill);
            assert!((10..512).contains(&killing.len()), "{role:?}: {}", killing.len());
            for mode in [Seccomp::Errno, Seccomp::Log] {
                let program = program(role, mode);
                let returns = |of: &[sock_filter], action| {
                    of.iter().filter(|i| i.code == RETURN && i.k == action).count()
                };
                assert_eq!(
                    returns(&killing, Seccomp::Kill.action()),
                    returns(&program, mode.action()),
                    "{role:?}"
                );
            }
        }
    }
}
