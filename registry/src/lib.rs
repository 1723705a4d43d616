//! The registry: names, rows, the compiled snapshot and the lookup.
//!
//! A [`row::Row`] says what Envoy would find under one key. [`write::Writer`] keeps rows in pages of about 1 KiB, placed by
//! the hash of their keys; [`snapshot::Snapshot`] reads those pages in place and answers a [`lookup::Request`] or
//! [`lookup::Connection`] with a [`decision::Decision`]. Nothing here does I/O or reads a clock.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![forbid(unsafe_code)]

pub mod authority;
mod blocks;
mod bloom;
pub mod decision;
mod encode;
mod hash;
pub mod lookup;
pub mod name;
pub mod object;
pub mod page;
pub mod route;
pub mod routing;
pub mod row;
pub mod snapshot;
mod wire;
pub mod write;

pub use encode::EncodeError;
