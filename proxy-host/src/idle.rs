//! Times of silence, after which connections and streams are ended (Envoy's idle timeouts).
//!
//! Nobody notes a time when something moves: movements are counted, and the count is looked at eight times in the time
//! allowed. So an end comes never early, and at most an eighth late.

use std::{
    cell::Cell,
    future::Future,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional, split};

/// Looks in the time allowed.
const LOOKS: u32 = 8;

/// Ends once `look` has given the same count for `time`; `None` is given while silence means nothing. Never ends where
/// `time` is zero.
pub async fn quiet(time: Duration, mut look: impl FnMut() -> Option<u64>) {
    if time.is_zero() {
        return std::future::pending().await;
    }
    let step = (time / LOOKS).max(Duration::from_millis(1));
    let mut last = look();
    let mut silent = Duration::ZERO;
    while silent < time {
        tokio::time::sleep(step).await;
        let now = look();
        if now.is_some() && now == last {
            silent += step;
        } else {
            (last, silent) = (now, Duration::ZERO);
        }
    }
}

/// The result of `work`, or `None` once `look` has given the same count for `time` (see [`quiet`]).
pub async fn within<T>(
    time: Duration,
    look: impl FnMut() -> Option<u64>,
    work: Pin<&mut impl Future<Output = T>>,
) -> Option<T> {
    if time.is_zero() {
        return Some(work.await);
    }
    // Rare, and its state must not weigh on those who have no limit.
    Box::pin(async move {
        tokio::select! {
            biased;
            done = work => Some(done),
            () = quiet(time, look) => None,
        }
    })
    .await
}

/// One side of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Who asked for it.
    Client,
    /// Who was asked.
    Upstream,
}

/// How a copy ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Copied {
    /// All was said; by this side first, where its end was the end of both.
    Whole(Option<Side>),
    /// This side failed.
    Broken(Side),
    /// Nothing moved for too long.
    Idle,
}

/// Bytes that have gone each way, however it ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    /// From the client.
    pub received: u64,
    /// To the client.
    pub sent: u64,
}

/// Copies both ways until both sides have ended, or nothing has moved for `time`; zero: however long that is.
pub async fn copy<A, B>(client: A, upstream: B, time: Duration) -> (Copied, Bytes)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    counted(client, upstream, time, async |client, upstream| copy_bidirectional(client, upstream).await.map(|_| None))
        .await
}

/// The same until one side has ended: what it said is written, and nobody waits for the other.
pub async fn copy_until_one_ends<A, B>(client: A, upstream: B, time: Duration) -> (Copied, Bytes)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    counted(client, upstream, time, async |client, upstream| {
        let ((mut from_client, mut to_client), (mut from_upstream, mut to_upstream)) = (split(client), split(upstream));
        tokio::select! {
            biased;
            down = tokio::io::copy(&mut from_upstream, &mut to_client) => down.map(|_| Some(Side::Upstream)),
            up = tokio::io::copy(&mut from_client, &mut to_upstream) => up.map(|_| Some(Side::Client)),
        }
    })
    .await
}

async fn counted<A, B>(
    mut client: A,
    mut upstream: B,
    time: Duration,
    copy: impl AsyncFnOnce(&mut Counted<&mut A>, &mut Counted<&mut B>) -> io::Result<Option<Side>>,
) -> (Copied, Bytes)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (of_client, of_upstream) = (Rc::<Moves>::default(), Rc::<Moves>::default());
    let mut client = Counted { inner: &mut client, moves: of_client.clone() };
    let mut upstream = Counted { inner: &mut upstream, moves: of_upstream.clone() };
    let copied = {
        let copying = std::pin::pin!(copy(&mut client, &mut upstream));
        let moved =
            || Some([&of_client, &of_upstream].iter().map(|moves| moves.read.get() + moves.written.get()).sum());
        within(time, moved, copying).await
    };
    let copied = match copied {
        Some(Ok(first)) => Copied::Whole(first),
        Some(Err(_)) if of_upstream.failed.get() => Copied::Broken(Side::Upstream),
        Some(Err(_)) => Copied::Broken(Side::Client),
        None => Copied::Idle,
    };
    (copied, Bytes { received: of_client.read.get(), sent: of_upstream.read.get() })
}

/// What one side did.
#[derive(Debug, Default)]
struct Moves {
    read: Cell<u64>,
    written: Cell<u64>,
    failed: Cell<bool>,
}

impl Moves {
    fn told<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(_)) = &polled {
            self.failed.set(true);
        }
        polled
    }
}

/// Notes what a side does.
struct Counted<T> {
    inner: T,
    moves: Rc<Moves>,
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        ready!(self.moves.told(read))?;
        self.moves.read.set(self.moves.read.get() + (buf.filled().len() - before) as u64);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, buf);
        let written = ready!(self.moves.told(written))?;
        self.moves.written.set(self.moves.written.get() + written as u64);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.inner).poll_flush(cx);
        self.moves.told(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.moves.told(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::Instant,
    };

    const TIME: Duration = Duration::from_secs(80);

    async fn after(seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn silence_ends_after_its_time_and_at_most_an_eighth_late() {
        let begun = Instant::now();
        let count = Cell::new(Some(0));
        let moves = async {
            for n in 1..4 {
                after(79).await;
                count.set(Some(n));
            }
            // Silence that means nothing.
            count.set(None);
            after(1000).await;
            count.set(Some(3));
            let since = Instant::now();
            std::future::pending::<()>().await;
            since
        };
        let last = 79 * 3 + 1000;
        tokio::select! {
            _ = moves => unreachable!(),
            () = quiet(TIME, || count.get()) => {}
        }
        let silent = begun.elapsed().as_secs() - last;
        assert!((80..=90).contains(&silent), "{silent}");
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn without_a_time_there_is_no_end() {
        let work = std::pin::pin!(after(1 << 30));
        assert_eq!(within(Duration::ZERO, || Some(0), work).await, Some(()));
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn a_copy_ends_when_nothing_moves() {
        let ((mut client, near), (far, server)) = (tokio::io::duplex(64), tokio::io::duplex(64));
        let begun = Instant::now();
        let talk = async {
            for _ in 0..5 {
                after(60).await;
                client.write_all(b"12345").await.unwrap();
            }
        };
        let (copied, ()) = tokio::join!(copy(near, far, TIME), talk);
        assert_eq!(copied, (Copied::Idle, Bytes { received: 25, sent: 0 }));
        assert!((380..=390).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
        drop(server);
    }

    #[tokio::test]
    async fn a_copy_may_end_with_its_first_side() {
        for (first, moved) in [(Side::Client, (2, 0)), (Side::Upstream, (0, 2))] {
            let ((mut client, near), (far, mut server)) = (tokio::io::duplex(64), tokio::io::duplex(64));
            let (ends, hears) =
                if first == Side::Client { (&mut client, &mut server) } else { (&mut server, &mut client) };
            ends.write_all(b"hi").await.unwrap();
            ends.shutdown().await.unwrap();
            let (copied, bytes) = copy_until_one_ends(near, far, TIME).await;
            assert_eq!(copied, Copied::Whole(Some(first)));
            assert_eq!((bytes.received, bytes.sent), moved);
            let mut heard = Vec::new();
            hears.read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, b"hi");
        }
    }
}
