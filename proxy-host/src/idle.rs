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

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};

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

/// How a copy ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Copied {
    /// Both sides said all; bytes from the first and from the second.
    Whole(u64, u64),
    /// One side failed.
    Broken,
    /// Nothing moved for too long; bytes both ways.
    Idle(u64),
}

/// Copies both ways until both sides have ended, or nothing has moved for `time`; zero: however long that is.
pub async fn copy<A, B>(mut first: A, mut second: B, time: Duration) -> Copied
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let moved = Rc::new(Cell::new(0));
    let mut first = Counted { inner: &mut first, moved: moved.clone() };
    let copying = std::pin::pin!(copy_bidirectional(&mut first, &mut second));
    match within(time, || Some(moved.get()), copying).await {
        Some(Ok((from_first, from_second))) => Copied::Whole(from_first, from_second),
        Some(Err(_)) => Copied::Broken,
        None => Copied::Idle(moved.get()),
    }
}

/// Counts the bytes that move.
struct Counted<T> {
    inner: T,
    moved: Rc<Cell<u64>>,
}

impl<T> Counted<T> {
    fn count(&self, bytes: usize) {
        self.moved.set(self.moved.get() + bytes as u64);
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        self.count(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, buf))?;
        self.count(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{io::AsyncWriteExt as _, time::Instant};

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
        // Read of one side; the other one is written uncounted.
        assert_eq!(copied, Copied::Idle(25));
        assert!((380..=390).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
        drop(server);
    }
}
