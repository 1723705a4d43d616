//! Parts of a short message, written as one piece: the system takes less time for one than for a list of them.

use std::{
    cell::RefCell,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{io::AsyncWrite as _, net::TcpStream};

/// Bytes of the longest message that is copied.
const MOST: usize = 1024;

thread_local! {
    static PIECE: RefCell<[u8; MOST]> = const { RefCell::new([0; MOST]) };
}

/// Writes these parts, or as many bytes of them as the connection takes.
///
/// # Errors
/// The connection's.
pub fn poll_write(stream: &mut TcpStream, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
    PIECE.with_borrow_mut(|piece| {
        let mut length = 0;
        for part in parts {
            let Some(place) = piece.get_mut(length..length + part.len()) else {
                return Pin::new(stream).poll_write_vectored(cx, parts);
            };
            place.copy_from_slice(part);
            length += part.len();
        }
        Pin::new(stream).poll_write(cx, &piece[..length])
    })
}
