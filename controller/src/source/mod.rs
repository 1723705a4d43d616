//! Where resources come from.

pub mod read;
mod watch;
pub mod yaml;
