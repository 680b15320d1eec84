use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use loom::sync::Mutex;

use super::inbox::Inbox;
use crate::vm::runtime::{beside, dist};

/// A driver as each of them is: says that it listens, takes what there is, and sleeps.
fn drive(inbox: &Arc<Inbox<usize>>) -> Arc<Mutex<Vec<usize>>> {
    let taken = Arc::new(Mutex::new(Vec::new()));
    let (inbox, all) = (inbox.clone(), taken.clone());
    dist().spawn(poll_fn(move |cx| {
        inbox.listen(cx.waker());
        while let Some(item) = inbox.pop() {
            all.lock().unwrap().push(item);
        }
        Poll::Pending
    }));
    taken
}

#[test]
fn nothing_pushed_stays_while_the_driver_sleeps_and_each_pusher_keeps_its_order() {
    loom::model(|| {
        let inbox = Arc::new(Inbox::new());
        let taken = drive(&inbox);
        for first in [10, 20] {
            let inbox = inbox.clone();
            beside(move || {
                inbox.push(first);
                inbox.push_within(first + 1, 4);
            });
        }
        dist().run();
        let taken = std::mem::take(&mut *taken.lock().unwrap());
        let of = |first: usize| taken.iter().copied().filter(move |n| n / 10 == first / 10);
        assert_eq!(4, taken.len());
        assert!(of(10).eq([10, 11]) && of(20).eq([20, 21]), "{taken:?}");
        dist().end();
    });
}

#[test]
fn a_driver_that_is_woken_for_nothing_looks_again() {
    loom::model(|| {
        let inbox = Arc::new(Inbox::<usize>::new());
        let said = Arc::new(loom::sync::atomic::AtomicUsize::new(0));
        let heard = Arc::new(Mutex::new(0));
        let (listens, sees, hears) = (inbox.clone(), said.clone(), heard.clone());
        dist().spawn(poll_fn(move |cx| {
            listens.listen(cx.waker());
            *hears.lock().unwrap() = sees.load(std::sync::atomic::Ordering::Relaxed);
            Poll::Pending
        }));
        for _ in 0..2 {
            let (inbox, said) = (inbox.clone(), said.clone());
            beside(move || {
                said.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                inbox.wake();
            });
        }
        dist().run();
        assert_eq!(2, *heard.lock().unwrap());
        dist().end();
    });
}

#[test]
fn no_more_wait_than_the_limit() {
    loom::model(|| {
        let inbox = Arc::new(Inbox::new());
        let pushers = [1, 2, 3].map(|n| {
            let inbox = inbox.clone();
            loom::thread::spawn(move || inbox.push_within(n, 2))
        });
        for pusher in pushers {
            pusher.join().unwrap();
        }
        let waiting = std::iter::from_fn(|| inbox.pop()).count();
        assert_eq!(2, waiting);
    });
}
