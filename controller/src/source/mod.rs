//! Where resources come from.

pub mod read;
