#![no_main]
//! What a snapshot says of a device, spoilt: it is refused, or there is a device that works.

use fuzz::bytes::Bytes;
use fuzz::devices::{Balloon, Block, Mem, Pmem, Rng, Vsock};
use fuzz::guest::ram_as_it_is;
use fuzz::json::spoil;
use fuzz::machine::Machine;
use fuzz::session::{Model, Session};
use libfuzzer_sys::fuzz_target;

use devices::virtio::model::VirtioDevice;

fuzz_target!(init: fuzz::begin(), |input: &[u8]| {
    let mut input = Bytes::new(input);
    let (model, kind) = (input.below(6), input.u8());
    match model {
        0 => {
            let (mut model, device) = Block::new(kind);
            run(&mut model, device, input);
        }
        1 => {
            let (mut model, device) = Balloon::new(kind);
            run(&mut model, device, input);
        }
        2 => {
            let (mut model, device) = Mem::new();
            run(&mut model, device, input);
        }
        3 => {
            let (mut model, device) = Pmem::new(kind);
            run(&mut model, device, input);
        }
        4 => {
            let (mut model, device) = Rng::new(kind);
            run(&mut model, device, input);
        }
        _ => {
            let (mut model, device) = Vsock::new();
            run(&mut model, device, input);
        }
    }
});

fn run(model: &mut impl Model, device: Box<dyn VirtioDevice>, mut input: Bytes<'_>) {
    // A driver does something.
    let (before, after) = (input.piece(), input);
    let mut input = after;
    let mut session = Session::new(device, Bytes::new(before), false);
    session.live(model);
    session.machine.pause();
    let saved = session.machine.transport().save();
    drop(session);
    let mut saved = serde_json::to_value(saved).expect("it can be saved");
    spoil(&mut saved, &mut input);
    let Ok(saved) = serde_json::from_value(saved) else { return };
    model.end();
    let Some(device) = model.again() else { return };
    let Ok(machine) = Machine::with(device, ram_as_it_is(), Some(&saved)) else { return };
    let is_up = machine.transport().resume().is_ok();
    if is_up {
        machine.settle();
    }
    machine.transport().tell_again();
    let mut session = Session::restored(machine, input);
    session.run(model);
}
