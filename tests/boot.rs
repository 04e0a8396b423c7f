//! Kernels of each kind boot, with RAM from very little to more than 4 GiB and one to many vCPUs.
use crate::util::*;

#[test]
fn elf_by_pvh() {
    let end = Husk::guest("info", "some words").wait().ok();
    assert_eq!(end.value("protocol"), "PVH");
    assert_eq!(end.value("cmdline"), "some words");
}

#[test]
fn elf_by_linux_protocol() {
    let scratch = Scratch::new();
    let kernel = without_pvh(&scratch, &guest("info"));
    let end = Husk::run(kernel).cmdline("some words").wait().ok();
    assert_ne!(end.value("protocol"), "PVH");
    assert_eq!(end.value("cmdline"), "some words");
}
