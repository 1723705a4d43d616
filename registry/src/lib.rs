//! The registry: names, rows, the compiled snapshot and the lookup.
//!
//! A [`row::Row`] says what Envoy would find under one key. [`write::Writer`] keeps rows in pages of about 1 KiB, placed by
//! the hash of their keys; [`snapshot::Snapshot`] reads those pages in place and answers a [`lookup::Request`] or
//! [`lookup::Connection`] with a [`decision::Decision`]. Nothing here does I/O or reads a clock.

pub mod decision;
pub mod name;
pub mod row;
