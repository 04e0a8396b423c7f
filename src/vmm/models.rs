//! The end of a VM against requests: the VMM thread's loop, the controller and the handle are the real ones;
//! only poll(2) does not sleep.
use std::sync::Arc;

use devices::sync::models::explore;
use devices::sync::{mpsc, thread};
use serde_json::json;

use super::tests::{One, controller};
use super::*;
use crate::error::Refusal;
use crate::request::Request;

#[test]
fn every_request_is_answered_or_its_sender_told_that_the_vmm_is_gone() {
    explore(1000, || {
        let (handle, requests) = Requests::channel().unwrap();
        // Asked before all others, and so never too late.
        let (sender, first) = mpsc::sync_channel(1);
        handle.send(Request::Wait, move |reply| sender.send(reply).unwrap());
        let asking: Vec<_> = [Request::Describe, Request::Wait, Request::Quit, Request::Wait]
            .map(|request| {
                let handle = handle.clone();
                thread::spawn(move || match (format!("{request:?}"), handle.call(request)) {
                    (_, Err(Refusal::Gone)) => false,
                    (asked, Ok(reply)) if asked == "Wait" => {
                        assert_eq!(reply, json!(Ending::Killed));
                        true
                    }
                    (_, Ok(_)) => true,
                    (asked, Err(e)) => panic!("{asked}: {e}"),
                })
            })
            .into();
        let vmm = thread::spawn(move || {
            let quit = Arc::new(Bell::new().unwrap());
            serve(&mut controller(), &requests, &quit, &mut NoSignals(&quit))
        });
        assert_eq!(vmm.join().unwrap(), Ending::Killed);
        assert_eq!(first.recv().expect("an answer").unwrap(), json!(Ending::Killed));
        let answered: Vec<_> = asking.into_iter().map(|asking| asking.join().unwrap()).collect();
        assert!(answered[2], "the request that ended it was not answered");
        assert!(matches!(handle.call(Request::Describe), Err(Refusal::Gone)));
    });
}

#[test]
fn a_signal_against_a_request_for_the_end_leaves_one_ending() {
    explore(1000, || {
        let (handle, requests) = Requests::channel().unwrap();
        let waiting = handle.clone();
        let waiting = thread::spawn(move || waiting.call(Request::Wait));
        let quitting = thread::spawn(move || handle.call(Request::Quit));
        let vmm = thread::spawn(move || {
            let mut signals = One(Bell::new().unwrap(), Some(15));
            serve(&mut controller(), &requests, &Bell::new().unwrap(), &mut signals)
        });
        let ending = vmm.join().unwrap();
        match waiting.join().unwrap() {
            Ok(told) => assert_eq!(told, json!(ending)),
            Err(e) => assert!(matches!(e, Refusal::Gone), "{e}"),
        }
        match quitting.join().unwrap() {
            // The ending that came first stays.
            Ok(_) | Err(Refusal::Gone) => {}
            Err(e) => panic!("{e}"),
        }
    });
}
