//! As the library's `distribution`.

#[path = "../../native/macula/src/distribution/driver.rs"]
mod driver;
#[path = "../../native/macula/src/distribution/lent.rs"]
mod lent;
mod tests;
#[path = "../../native/macula/src/distribution/visit.rs"]
mod visit;
