//! The subcommands, one module each.

pub mod bootstrap;
pub mod crds;
pub mod serve;
pub mod validate;
