//! Configuration text: files found on disk, cut into documents, each read into a [`tree::Node`] that knows its lines.

pub mod documents;
pub mod files;
mod scalar;
pub mod tree;
