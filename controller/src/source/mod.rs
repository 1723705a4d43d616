//! Where resources come from.

pub mod kubernetes;
pub mod ledger;
pub mod read;
pub(crate) mod watch;
pub mod yaml;
