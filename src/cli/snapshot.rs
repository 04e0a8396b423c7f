//! `husk snapshot`: what is in a snapshot, and whether it is sound. Nothing is restored.
use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::flags::path;
use super::{fail, print};
use crate::error::chain;
use crate::exit::ExitCode;
use crate::snapshot::{
    Compression, Inspection, Named, Over, Overlay, Overrides, SnapshotError, SnapshotParams,
};

/// Look into a snapshot.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct SnapshotArgs {
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLES: &str = "\
Examples:
  husk snapshot inspect warm
  husk snapshot inspect --json warm | jq .config
  husk snapshot verify warm
  husk snapshot verify vm.state vm.mem
  husk snapshot merge monday/11h -o monday/all
  husk snapshot merge warm -o archive --compression zstd

Exit codes: 0 it is sound, 3 it cannot be opened, 4 it cannot be read, 7 it is damaged, or not one
for this husk.";

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show what the state file says: versions, id, devices, sizes
    Inspect {
        #[command(flatten)]
        which: Which,
        /// Print JSON, the VM's configuration included
        #[arg(long)]
        json: bool,
    },
    /// Check everything that a load checks, and read all of the memory
    Verify {
        #[command(flatten)]
        which: Which,
    },
    /// Make one that needs no other of a snapshot of what has changed, or is compressed in another way
    Merge {
        #[command(flatten)]
        which: Which,
        /// The directory for it, made if it is missing
        #[arg(short, long, value_name = "OUT", value_parser = path())]
        output: PathBuf,
        /// How its memory is compressed
        #[arg(long, value_enum, default_value_t, value_name = "HOW")]
        compression: Compression,
    },
}

#[derive(Args, Debug)]
struct Which {
    /// The snapshot's directory, or its state file
    #[arg(value_name = "DIR|STATE", value_parser = path())]
    path: PathBuf,
    /// The memory file, if the state file is elsewhere
    #[arg(value_name = "MEMORY", value_parser = path())]
    memory: Option<PathBuf>,
}

impl SnapshotArgs {
    pub(super) fn carry_out(self) -> ExitCode {
        let text = match self.verb {
            Verb::Inspect { which, json } => which.named().inspect().map(|found| match json {
                true => format!("{:#}\n", serde_json::json!(found)),
                false => table(&found),
            }),
            Verb::Verify { which } => verify(&which.named()),
            Verb::Merge { which, output, compression } => {
                merge(&which.named(), &output, compression)
            }
        };
        text.map_or_else(|e| fail(e.exit_code(), &e), |text| print(text.as_bytes()))
    }
}

impl Which {
    fn named(self) -> Named {
        Named::new(self.path, self.memory)
    }
}

fn verify(named: &Named) -> Result<String, SnapshotError> {
    let image = named.open()?;
    // What a load judges next: the configuration that the VM is to have.
    image.config(&Overrides::default()).map_err(|e| SnapshotError::Inconsistent(chain(&e)))?;
    image.verify()?;
    Ok("the snapshot is sound\n".into())
}

fn merge(named: &Named, output: &Path, compression: Compression) -> Result<String, SnapshotError> {
    let target = SnapshotParams { compression, ..SnapshotParams::to_directory(output) };
    named.open()?.merge(&target)?;
    Ok(String::new())
}

fn table(found: &Inspection) -> String {
    let Inspection { format, husk, arch, id, parent, vcpus, state_bytes, memory, devices, .. } =
        found;
    let mut text = format!("id       {id}\nformat   {format}, written by husk {husk} on {arch}\n");
    let file = memory.file.as_ref().map_or("elsewhere".into(), |file| file.display().to_string());
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let lines = [
        format!("vcpus    {vcpus}"),
        format!("state    {} KiB", state_bytes.div_ceil(1 << 10)),
        format!("memory   {file}"),
        format!(
            "         {} MiB, of which {} MiB are not zero",
            mib(memory.bytes),
            mib(memory.kept_bytes)
        ),
        format!(
            "         {} MiB in the file, in {} extents, compression {}",
            mib(memory.stored_bytes),
            memory.extents,
            memory.compression.name()
        ),
    ];
    lines.iter().for_each(|line| text.push_str(&format!("{line}\n")));
    if let Some(Over { id, state }) = parent {
        let _ = writeln!(text, "over     {id}, {}", state.display());
    }
    for device in devices {
        // Writing to a string does not fail.
        let _ = writeln!(text, "device   {:<2} {} {}", device.place, device.model, device.id);
        if let Some(Overlay { file, disk_bytes, stored_bytes }) = &device.overlay {
            let stored = stored_bytes.map_or("it is missing".into(), |b| format!("{} MiB", mib(b)));
            let (file, disk) = (file.display(), mib(*disk_bytes));
            let _ = writeln!(text, "overlay  {file}, {stored} over a disk of {disk} MiB");
        }
    }
    text
}
