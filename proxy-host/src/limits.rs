//! What the system lets this process have: descriptors, and with them connections.

use std::{
    cell::Cell,
    fs::File,
    io,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{exec, listener::Kind, stats::Stats};

/// Descriptors that are left for files, the controller, and all that is no traffic.
const RESERVE: u64 = 64;
/// Clients of one worker that are told at the same time that there is no place; others are only hung up on.
const TOLD: usize = 16;
/// How long a client gets to take in that there is no place.
const TELL: Duration = Duration::from_secs(1);
/// What a client of the HTTP proxy is told.
const REFUSAL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\ncontent-length: 46\r\n\
    retry-after: 1\r\nconnection: close\r\n\r\nportolan: too many connections; try again soon";

/// Raises the soft limit of open files to the hard one, and says what it is now.
///
/// # Errors
/// The system refuses.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        setrlimit(Resource::Nofile, limit)?;
    }
    Ok(limit.current.unwrap_or(u64::MAX))
}

/// The connections that so many descriptors suffice for: each needs one on both sides.
#[must_use]
pub fn connections(open_files: u64) -> usize {
    usize::try_from(open_files.saturating_sub(RESERVE) / 2).unwrap_or(usize::MAX).max(1)
}

/// One of the connections that there may be, for as long as it lives.
#[derive(Debug)]
pub struct Place(Arc<Stats>);

impl Place {
    /// Takes a place if there is one.
    #[must_use]
    pub fn take(stats: &Arc<Stats>, most: usize) -> Option<Self> {
        // Counted before it is compared, so that two threads never share the last one.
        let place = Self(stats.clone());
        (stats.connections.fetch_add(1, Relaxed) < most).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}

/// Refuses connections of one worker.
#[derive(Default)]
pub struct Refusals {
    telling: Rc<Cell<usize>>,
    spare: Cell<Option<File>>,
}

impl Refusals {
    /// Refuses a connection: an HTTP client is told why; any other sees it closed.
    pub fn refuse(&self, stream: TcpStream, kind: Kind) {
        if kind != Kind::HttpProxy || self.telling.get() >= TOLD {
            return;
        }
        let telling = self.telling.clone();
        telling.set(telling.get() + 1);
        exec::spawn(async move {
            // It is refused in any case.
            let _ = tokio::time::timeout(TELL, tell(stream)).await;
            telling.set(telling.get() - 1);
        });
    }

    /// Keeps a descriptor back, so that there is one to refuse a connection with when all others are in use.
    pub fn hold_spare(&self) {
        let held = self.spare.take();
        self.spare.set(held.or_else(|| File::open("/dev/null").ok()));
    }

    /// Gives the descriptor up for an accept that would fail without it; false where there is none.
    #[must_use]
    pub fn use_spare(&self) -> bool {
        self.spare.take().is_some()
    }
}

/// Whether an accept failed because there are no descriptors left.
#[must_use]
pub fn out_of_descriptors(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| {
        code == rustix::io::Errno::MFILE.raw_os_error() || code == rustix::io::Errno::NFILE.raw_os_error()
    })
}

async fn tell(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(REFUSAL).await?;
    stream.shutdown().await?;
    // To close with its request unread would reset the connection, and take the answer with it.
    let mut rest = [0; 1024];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_places_are_taken_than_there_are() {
        let stats = Arc::new(Stats::new(1));
        let first = Place::take(&stats, 2).unwrap();
        let second = Place::take(&stats, 2).unwrap();
        assert!(Place::take(&stats, 2).is_none());
        drop(first);
        assert!(Place::take(&stats, 2).is_some());
        drop(second);
        assert_eq!(stats.connections.load(Relaxed), 0);
    }

    #[test]
    fn the_refusal_is_as_long_as_it_says() {
        let text = std::str::from_utf8(REFUSAL).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{}", body.len());
    }

    #[test]
    fn descriptors_are_shared_between_both_sides() {
        assert_eq!(connections(1064), 500);
        assert_eq!(connections(10), 1);
    }
}
