//! One device of each model, what a driver asks of it, and what happens to it on the host.
mod balloon;
mod block;
mod disk;
mod memory;
mod net;
mod rng;
mod vsock;

use devices::virtio::model::{Env, VirtioDevice};
use devices::virtio::{MODELS, model};
use serde_json::{Value, json};

pub use self::balloon::Balloon;
pub use self::block::Block;
pub use self::memory::{Mem, Pmem};
pub use self::net::{Net, service};
pub use self::rng::Rng;
pub use self::vsock::Vsock;
use crate::bytes::Bytes;
use crate::session::{Model, Session};

/// Runs an input on the device of the model that it names, whichever that is; raw if nobody has touched it.
pub fn any(input: &[u8], is_raw: bool) {
    let mut input = Bytes::new(input);
    let (row, kind) = (usize::from(input.u8()) % MODELS.len(), input.u8());
    one(MODELS[row].name, kind, input, is_raw);
}

/// Runs an input on a device of the model called `name`.
pub fn one(name: &str, kind: u8, input: Bytes<'_>, is_raw: bool) {
    fn run(mut model: impl Model, device: Box<dyn VirtioDevice>, input: Bytes<'_>, is_raw: bool) {
        Session::new(device, input, is_raw).run(&mut model);
    }
    match name {
        "drives" => {
            let (mut block, device) = Block::new(kind);
            Session::new(device, input, is_raw).run(&mut block);
            block.check();
        }
        "pmem" => {
            let (mut pmem, device) = Pmem::new(kind);
            Session::new(device, input, is_raw).run(&mut pmem);
            pmem.check();
        }
        "network-interfaces" => {
            let (model, device) = Net::new(kind);
            run(model, device, input, is_raw);
        }
        "vsock" => {
            let (model, device) = Vsock::new();
            run(model, device, input, is_raw);
        }
        "balloon" => {
            let (model, device) = Balloon::new(kind);
            run(model, device, input, is_raw);
        }
        "memory-hotplug" => {
            let (model, device) = Mem::new();
            run(model, device, input, is_raw);
        }
        "entropy" => {
            let (model, device) = Rng::new(kind);
            run(model, device, input, is_raw);
        }
        _ => panic!("no target for {name}: add one in tests/fuzz/src/devices"),
    }
}

/// The device that a configuration makes.
pub fn open(name: &str, config: &Value) -> Box<dyn VirtioDevice> {
    let row = model(name).expect("there is such a model");
    let recipe = (row.parse)(config.to_string().as_bytes()).expect("it is as it should be");
    recipe.open(&Env::default()).expect("the host has what it needs")
}

/// Limits that are met often, and not for long.
fn limiter() -> Value {
    json!({"ops": {"size": 3, "refill_time": 1}, "bandwidth": {"size": 9000, "refill_time": 1}})
}

/// One of several, by a number that is at hand.
fn s_of<T: Copy>(n: u8, choices: &[T]) -> T {
    choices[usize::from(n) % choices.len()]
}
