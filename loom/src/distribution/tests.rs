use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;

use super::driver::Driver;
use super::lent::Lent;
use crate::engine::transport::{Connection, connection};
use crate::vm::bell::Bell;
use crate::vm::runtime::{beside, dist};

fn driven() -> (Connection, Arc<Driver>) {
    let (connection, stepper) = connection();
    (connection, Driver::spawn(stepper))
}

/// A process that sends: on a visit, where that is possible.
fn send(connection: &Connection, driver: &Driver) {
    let visit = driver.visit();
    connection.write();
    if let Some(mut visit) = visit {
        visit.drive();
    }
}

/// Lets these run beside the worker: so many packets have left when nothing is left to do.
fn leaves(packets: usize, acts: &[fn(&Connection, &Driver)]) {
    let acts = acts.to_vec();
    loom::model(move || {
        let (connection, driver) = driven();
        for act in acts.clone() {
            let (connection, driver) = (connection.clone(), driver.clone());
            beside(move || act(&connection, &driver));
        }
        dist().run();
        assert_eq!((0, packets), connection.packets());
        dist().end();
    });
}

#[test]
fn what_two_processes_send_leaves() {
    leaves(2, &[send, send]);
}

#[test]
fn what_is_written_beside_a_visit_leaves() {
    leaves(2, &[send, |connection, _| connection.write()]);
}

#[test]
fn what_comes_during_a_visit_is_answered() {
    leaves(2, &[send, |connection, _| connection.receive()]);
}

#[test]
fn what_is_written_while_a_process_looks_leaves() {
    leaves(
        1,
        &[
            |connection, _| connection.write(),
            |_, driver| drop(driver.visit()),
        ],
    );
}

#[test]
fn the_task_ends_with_the_connection_whoever_finds_its_end() {
    loom::model(|| {
        let (connection, driver) = driven();
        let visited = connection.clone();
        beside(move || send(&visited, &driver));
        beside(move || connection.lose());
        dist().run();
        assert_eq!(1, dist().tasks(), "the one that passes on rings is left");
        dist().end();
    });
}

#[test]
fn a_process_waits_for_nobody_who_looks_at_the_connection() {
    loom::model(|| {
        let (connection, driver) = driven();
        connection.write();
        connection.look(|_| {
            let process = thread::spawn(move || {
                if let Some(mut visit) = driver.visit() {
                    visit.drive();
                }
            });
            process.join().unwrap();
        });
        dist().run();
        assert_eq!((0, 1), connection.packets());
        dist().end();
    });
}

#[test]
fn the_worker_waits_for_no_process_at_the_driver() {
    loom::model(|| {
        let (connection, driver) = driven();
        dist().run();
        let visit = driver.visit();
        assert!(visit.is_some());
        connection.write();
        let sends = driver.clone();
        let worker = thread::spawn(move || sends.send_now());
        worker.join().unwrap();
        assert_eq!((1, 0), connection.packets());
        drop(visit);
        dist().run();
        assert_eq!((0, 1), connection.packets());
        dist().end();
    });
}

/// What a task brings out of a queue, or a process in its place.
#[derive(Clone)]
struct Lanes {
    queue: Arc<Mutex<usize>>,
    out: Arc<Lent<usize>>,
    task: Arc<Bell>,
}

impl Lanes {
    fn bring(&self, out: &mut usize) {
        *out += std::mem::take(&mut *self.queue.lock().unwrap());
    }

    /// Queues one, and brings it out, or has the task do it.
    fn send(&self) {
        *self.queue.lock().unwrap() += 1;
        match self.out.borrow() {
            Some(mut out) => self.bring(&mut out),
            None => self.task.ring(),
        }
    }

    /// Takes the lanes, and does nothing with them.
    fn look(&self) {
        let looks = self.out.borrow();
        // Others come in between only where something is done.
        drop(self.queue.lock());
        drop(looks);
    }
}

/// Lets these run beside the task: so many have come out when nothing is left to do.
fn comes_out(count: usize, acts: [fn(&Lanes); 2]) {
    loom::model(move || {
        let task = dist().bell();
        let lanes = Lanes {
            queue: Arc::default(),
            out: Arc::new(Lent::new(0, task.clone())),
            task,
        };
        let writer = lanes.clone();
        dist().spawn(async move {
            loop {
                if let Some(mut out) = writer.out.try_lock() {
                    writer.bring(&mut out);
                }
                writer.task.rung().await;
            }
        });
        for act in acts {
            let lanes = lanes.clone();
            beside(move || act(&lanes));
        }
        dist().run();
        let queued = *lanes.queue.lock().unwrap();
        assert_eq!((0, count), (queued, *lanes.out.lock()));
        dist().end();
    });
}

#[test]
fn what_is_queued_comes_out_whoever_has_the_lanes() {
    comes_out(2, [Lanes::send, Lanes::send]);
}

#[test]
fn a_process_that_only_looks_at_the_lanes_keeps_nothing_in_the_queue() {
    comes_out(1, [Lanes::send, Lanes::look]);
}
