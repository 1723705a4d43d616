//! The proxy-wasm ABI 0.2.1: the calls out of the VM, and the callbacks into it.
//!
//! The proxy-wasm SDK is not used: its wrappers and its dispatcher panic where a host gives a status that they do not
//! expect, and only they can tell its dispatcher of a stream. Pointers and symbols of the ABI cannot be had without
//! `unsafe`, so it is allowed below here, and nowhere else.
#![allow(unsafe_code)]

mod callbacks;
mod calls;

pub(crate) use calls::Abi;
