//! Hostile files, clients, signals and hosts against the real program, row by row: docs/hostile-hosts.md has the rows, what
//! is answered, and how another program is attacked in the same way.
mod boots;
mod disk_faults;
mod disks;
mod http;
mod json;
mod kernels;
mod neighbours;
mod order;
mod page;
mod process;
mod scarcity;
mod snapshots;
mod subject;

pub(crate) use self::subject::no_files;
