//! As `tokio::sync`.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use loom::sync::Mutex;

#[derive(Default)]
pub struct Notify(Mutex<Notices>);

#[derive(Default)]
struct Notices {
    /// One notice is kept for whoever waits next.
    kept: bool,
    /// How often all that waited were told.
    calls: usize,
    waiting: Vec<Waker>,
}

pub struct Notified<'n> {
    notify: &'n Notify,
    calls: usize,
}

impl Notify {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn notify_one(&self) {
        let mut notices = self.0.lock().unwrap();
        notices.kept = true;
        let waiting = std::mem::take(&mut notices.waiting);
        drop(notices);
        waiting.into_iter().for_each(Waker::wake);
    }

    pub fn notify_waiters(&self) {
        let mut notices = self.0.lock().unwrap();
        notices.calls += 1;
        let waiting = std::mem::take(&mut notices.waiting);
        drop(notices);
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Hears what is told to all from now on.
    pub fn notified(&self) -> Notified<'_> {
        let calls = self.0.lock().unwrap().calls;
        Notified {
            notify: self,
            calls,
        }
    }
}

impl Future for Notified<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut notices = self.notify.0.lock().unwrap();
        if notices.calls != self.calls || std::mem::take(&mut notices.kept) {
            return Poll::Ready(());
        }
        notices.waiting.push(cx.waker().clone());
        Poll::Pending
    }
}

pub mod mpsc {
    use std::collections::VecDeque;
    use std::future::poll_fn;
    use std::sync::Arc;
    use std::task::{Poll, Waker};

    use loom::sync::Mutex;

    struct Channel<T> {
        queue: VecDeque<T>,
        receiver: Option<Waker>,
    }

    pub struct UnboundedSender<T>(Arc<Mutex<Channel<T>>>);

    pub struct UnboundedReceiver<T>(Arc<Mutex<Channel<T>>>);

    pub fn unbounded_channel<T>() -> (UnboundedSender<T>, UnboundedReceiver<T>) {
        let channel = Arc::new(Mutex::new(Channel {
            queue: VecDeque::new(),
            receiver: None,
        }));
        (UnboundedSender(channel.clone()), UnboundedReceiver(channel))
    }

    impl<T> Clone for UnboundedSender<T> {
        fn clone(&self) -> Self {
            UnboundedSender(self.0.clone())
        }
    }

    impl<T> UnboundedSender<T> {
        /// No receiver ends before its senders here.
        pub fn send(&self, item: T) -> Result<(), T> {
            let mut channel = self.0.lock().unwrap();
            channel.queue.push_back(item);
            let receiver = channel.receiver.take();
            drop(channel);
            if let Some(receiver) = receiver {
                receiver.wake();
            }
            Ok(())
        }
    }

    impl<T> UnboundedReceiver<T> {
        pub fn is_empty(&self) -> bool {
            self.0.lock().unwrap().queue.is_empty()
        }

        /// Takes what is there, up to a limit, and waits for the first.
        pub async fn recv_many(&mut self, buffer: &mut Vec<T>, limit: usize) -> usize {
            poll_fn(|cx| {
                let mut channel = self.0.lock().unwrap();
                if channel.queue.is_empty() {
                    channel.receiver = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                let count = limit.min(channel.queue.len());
                buffer.extend(channel.queue.drain(..count));
                Poll::Ready(count)
            })
            .await
        }
    }
}
