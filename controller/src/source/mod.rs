//! Where resources come from.

pub mod ledger;
pub mod read;
pub(crate) mod watch;
pub mod yaml;
