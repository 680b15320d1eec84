use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use loom::sync::atomic::AtomicUsize;
use loom::thread;

use super::outcome::Outcome;
use super::runtime::{beside, dist};
use super::turns::{Half, Rung, Turns};

/// Rings bells after saying something; the task of each has heard it all when nothing is left to do.
fn heard(bells: usize, says: &'static [&'static [usize]]) {
    loom::model(move || {
        let all: Vec<_> = (0..bells)
            .map(|_| {
                let bell = dist().bell();
                let said: Arc<Vec<_>> =
                    Arc::new(says.iter().map(|_| AtomicUsize::new(0)).collect());
                let heard = Arc::new(loom::sync::Mutex::new(0));
                let (rings, sees, hears) = (bell.clone(), said.clone(), heard.clone());
                dist().spawn(async move {
                    loop {
                        rings.rung().await;
                        *hears.lock().unwrap() = sees.iter().map(|n| n.load(Relaxed)).sum();
                    }
                });
                (bell, said, heard)
            })
            .collect();
        for (ringer, rung) in says.iter().enumerate() {
            let all: Vec<_> = all.iter().map(|(b, s, _)| (b.clone(), s.clone())).collect();
            beside(move || {
                for &bell in *rung {
                    let (bell, said) = &all[bell];
                    said[ringer].fetch_add(1, Relaxed);
                    bell.ring();
                }
            });
        }
        dist().run();
        for (bell, (_, _, heard)) in all.iter().enumerate() {
            let rings = says
                .iter()
                .flat_map(|rung| rung.iter())
                .filter(|b| **b == bell);
            assert_eq!(rings.count(), *heard.lock().unwrap());
        }
        dist().end();
    });
}

#[test]
fn a_ring_is_never_lost() {
    heard(1, &[&[0, 0], &[0]]);
}

#[test]
fn bells_of_one_queue_do_not_silence_each_other() {
    heard(2, &[&[0, 1], &[1, 0]]);
}

#[test]
fn work_is_done_in_turn_with_the_rings() {
    loom::model(|| {
        let bell = dist().bell();
        let done = Arc::new(AtomicUsize::new(0));
        let seen = Arc::new(AtomicUsize::new(0));
        let (rings, does, sees) = (bell.clone(), done.clone(), seen.clone());
        dist().spawn(async move {
            rings.rung().await;
            sees.store(does.load(Relaxed), Relaxed);
        });
        beside(move || {
            dist().errands().run(move || done.store(1, Relaxed));
            bell.ring();
        });
        dist().run();
        assert_eq!(1, seen.load(Relaxed));
        dist().end();
    });
}

#[test]
fn an_answer_is_there_when_cancel_returns_or_never_comes() {
    loom::model(|| {
        let outcome = Arc::new(Outcome::new());
        let mailbox = Arc::new(AtomicUsize::new(0));
        let answers = [1, 2].map(|_| {
            let (outcome, mailbox) = (outcome.clone(), mailbox.clone());
            thread::spawn(move || {
                outcome.answer(|| mailbox.fetch_add(1, Relaxed));
            })
        });
        let cancelled = outcome.cancel();
        let come = mailbox.load(Relaxed);
        assert_eq!(usize::from(!cancelled), come);
        for answer in answers {
            answer.join().unwrap();
        }
        assert_eq!(come, mailbox.load(Relaxed));
    });
}

#[test]
fn a_task_hears_that_its_caller_gave_up() {
    loom::model(|| {
        let outcome = Arc::new(Outcome::new());
        let hears = outcome.clone();
        dist().spawn(async move {
            loop {
                let woken = hears.given_up();
                if hears.is_cancelled() {
                    return;
                }
                woken.await;
            }
        });
        beside(move || assert!(outcome.cancel()));
        dist().run();
        assert_eq!(1, dist().tasks(), "the one that passes on rings is left");
        dist().end();
    });
}

/// What has turns: those who ring say something before.
struct Player {
    rung: Rung,
    said: AtomicUsize,
    heard: AtomicUsize,
    turns: AtomicUsize,
}

impl Turns for Player {
    fn ring(self: Arc<Self>, half: Half) {
        if self.rung.ring() {
            dist().errands().turn(self, half);
        }
    }

    fn turn(self: Arc<Self>, _half: Half) {
        self.rung.begin_turn();
        self.heard.store(self.said.load(Relaxed), Relaxed);
        self.turns.fetch_add(1, Relaxed);
    }
}

#[test]
fn a_turn_hears_all_that_was_said_before_a_ring() {
    loom::model(|| {
        let player = Arc::new(Player {
            rung: Rung::new(),
            said: AtomicUsize::new(0),
            heard: AtomicUsize::new(0),
            turns: AtomicUsize::new(0),
        });
        for rings in [2, 1] {
            let player = player.clone();
            beside(move || {
                for _ in 0..rings {
                    player.said.fetch_add(1, Relaxed);
                    player.clone().ring(Half::Receiving);
                }
            });
        }
        dist().run();
        assert_eq!(3, player.heard.load(Relaxed));
        assert!((1..=3).contains(&player.turns.load(Relaxed)));
        dist().end();
    });
}
