//! Several causes of the end at once, against the thread that waits for it.
use devices::sync::models::{explore, wait_until};
use devices::sync::thread;

use super::*;

#[test]
fn who_hears_the_bell_finds_an_ending_and_it_stays() {
    explore(4000, || {
        let outcome = Outcome::new().unwrap();
        let causes = [Ending::PoweredOff, Ending::Reset, Ending::Killed].map(|ending| {
            let outcome = outcome.clone();
            thread::spawn(move || {
                outcome.set(ending);
                outcome.get().cloned().unwrap()
            })
        });
        wait_until(|| outcome.bell().hush());
        let ending = outcome.get().cloned().expect("the bell rang before there was an ending");
        for cause in causes {
            assert_eq!(cause.join().unwrap(), ending);
        }
        assert!(!outcome.bell().hush(), "rung twice");
    });
}
