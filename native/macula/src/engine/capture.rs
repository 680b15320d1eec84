//! A hold on the driver of a connection: Quinn spawns it while the connection is made, and gives it to
//! nobody.

use std::cell::RefCell;

/// Where the next driver goes that Quinn spawns on this thread.
pub(crate) struct Captured<D>(RefCell<Option<Option<D>>>);

impl<D> Captured<D> {
    pub(crate) const fn new() -> Self {
        Captured(RefCell::new(None))
    }

    /// Runs `make`, which makes a connection, and answers the driver that came meanwhile.
    pub(crate) fn during<T>(&self, make: impl FnOnce() -> T) -> (T, Option<D>) {
        self.0.replace(Some(None));
        let made = make();
        (made, self.0.take().flatten())
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Nobody gets it unless one is wanted.
    pub(crate) fn put(&self, driver: D) {
        if let Some(captured) = &mut *self.0.borrow_mut() {
            *captured = Some(driver);
        }
    }
}
