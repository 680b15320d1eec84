//! Panics are not contained: they end the model.

use std::future::Future;

#[derive(Debug)]
pub(crate) enum Panicked {}

pub(crate) async fn contain<F: Future>(future: F) -> Result<F::Output, Panicked> {
    Ok(future.await)
}

pub(crate) fn attempt<T>(act: impl FnOnce() -> T) -> Result<T, Panicked> {
    Ok(act())
}

#[derive(Default)]
pub(crate) struct Fate;

impl Fate {
    pub(crate) fn fail(&self) {}
}
