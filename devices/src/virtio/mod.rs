//! Virtio devices. To add one: write its file, then declare it and list it here.

pub mod chain;
mod file;
pub mod mmio;
pub mod model;
pub mod notifier;
pub mod queue;

pub mod balloon;
pub mod block;
pub mod mem;
pub mod net;
pub mod pmem;
pub mod rng;
pub mod vsock;

use model::{Row, View, row};

/// Every device model husk knows.
pub const MODELS: &[Row] = &[
    row::<block::Block>(),
    row::<mem::Mem>(),
    row::<net::Net>(),
    row::<pmem::Pmem>(),
    row::<rng::Rng>(),
    row::<vsock::Vsock>(),
    row::<balloon::Balloon>(),
];

/// The row whose name (config key) is `name`.
pub fn model(name: &str) -> Option<&'static Row> {
    MODELS.iter().find(|m| m.name == name)
}

/// The row and the view whose path in the API is `path`.
pub fn view(path: &str) -> Option<(&'static Row, &'static View)> {
    MODELS.iter().find_map(|m| Some((m, m.views.iter().find(|v| v.path == path)?)))
}
