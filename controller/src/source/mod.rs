//! Where resources come from.

pub mod ledger;
pub mod read;
mod watch;
pub mod yaml;
