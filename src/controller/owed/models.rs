//! The thread that owes an answer against the controller at the VM's end, whose patience may end first.
use std::sync::Arc;

use devices::sync::atomic::{AtomicUsize, Ordering};
use devices::sync::models::explore;
use devices::sync::thread;
use serde_json::Value;

use super::*;

#[test]
fn there_is_one_answer_and_who_waited_for_it_finds_it_given() {
    explore(4000, || {
        let answers = Arc::<AtomicUsize>::default();
        let counted = answers.clone();
        let respond: Respond = Box::new(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let (owing, owed) = owe(respond);
        let working = thread::spawn(move || {
            if let Some(respond) = owing.claim() {
                respond(Ok(Value::Null));
            }
        });
        if owed.wait(Instant::now()) || owed.is_settled() {
            assert_eq!(answers.load(Ordering::SeqCst), 1, "settled, but not answered");
        }
        owed.answer(Refusal::Gone);
        working.join().unwrap();
        assert!(owed.is_settled());
        assert_eq!(answers.load(Ordering::SeqCst), 1);
    });
}
