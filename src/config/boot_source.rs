//! What boots: kernel, initrd, command line.
use arch::{Initrd, layout};
use devices::backend::passed::Name;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Refusal;
use crate::parts;

/// Its name among the sections.
pub(crate) const SECTION: &str = "boot-source";

/// The kernel image path that means the guest built into husk.
pub const DEMO_GUEST: &str = "builtin:demo";

/// The command line of a kernel for which none was given: Firecracker's.
pub(crate) const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 \
     i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// What boots: `PUT /boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An ELF or bzImage kernel; `builtin:demo` is the guest built into husk, `passed:N` a descriptor that came with the
    /// request.
    pub kernel_image_path: Name,
    /// An initial RAM disk; `passed:N` is a descriptor that came with the request.
    #[serde(default)]
    pub initrd_path: Option<Name>,
    /// The kernel command line. Devices are appended to it.
    #[serde(default)]
    pub boot_args: Option<String>,
}

impl BootSource {
    /// Fields that name files. The command line is not among what can be another of a restored VM: it says where
    /// devices are.
    pub(crate) const FILES: &[&str] = &["kernel_image_path", "initrd_path"];

    /// Opens the initrd, if there is one.
    pub(crate) fn open_initrd(&self) -> Result<Option<Initrd>, Refusal> {
        self.initrd_path.as_ref().map(|path| parts::open_initrd(path)).transpose()
    }

    /// Opens and reads what can be judged of it before the machine is known.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        if let Some(text) = &self.boot_args {
            arch::check_cmdline(text, layout::CMDLINE_MAX)?;
        }
        parts::open_kernel(&self.kernel_image_path)?;
        self.open_initrd()?;
        Ok(())
    }
}
