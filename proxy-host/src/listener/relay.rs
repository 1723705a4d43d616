//! Bytes between two sockets, until both sides have ended.
//!
//! Small messages are copied through a buffer that all connections of a thread share. Where a read fills it, what
//! follows stays in the kernel: splice(2) moves it through a pipe. A connection has a pipe only while bytes are in it,
//! so that idle ones cost no descriptors. Where the system refuses to splice, bytes are copied.

use std::{
    cell::{Cell, RefCell},
    io,
    net::Shutdown,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    pin::pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use socket2::SockRef;
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
};

use crate::idle::Side;

/// Bytes copied at once.
const COPY: usize = 16 * 1024;
/// Size of a pipe, in bytes; the kernel moves up to as many pages. Where a user has too many, pipes stay smaller.
const PIPE: usize = 256 * 1024;
/// Bytes that may be moved before other connections have their turn.
const TURN: usize = 2 * 1024 * 1024;
/// Pipes that a thread keeps for the next who need one.
const KEPT: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; COPY].into_boxed_slice());
    static PIPES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// One side.
#[derive(Debug, Clone, Copy)]
pub enum Socket<'a> {
    /// TCP.
    Tcp(&'a TcpStream),
    /// Unix-domain socket.
    Unix(&'a UnixStream),
}

/// Bytes that have gone each way, also where the connection broke.
#[derive(Debug, Default)]
pub struct Moved {
    /// From the client.
    pub received: Cell<u64>,
    /// To the client.
    pub sent: Cell<u64>,
}

/// Moves bytes both ways until both sides have ended; `read` has come from the client already. The end of one side is
/// passed on, and the other goes on as long as it likes.
///
/// # Errors
/// One side failed, which is told.
pub async fn relay(client: Socket<'_>, read: Bytes, upstream: Socket<'_>, moved: &Moved) -> Result<(), Side> {
    let mut up = Way::new(client, upstream, &moved.received, read);
    let mut down = Way::new(upstream, client, &moved.sent, Bytes::new());
    let both = std::future::poll_fn(move |cx| {
        let sent_up = up.poll(cx).map_err(|_| if up.writing { Side::Upstream } else { Side::Client })?;
        let sent_down = down.poll(cx).map_err(|_| if down.writing { Side::Client } else { Side::Upstream })?;
        let (up, down) = (sent_up, sent_down);
        if up.is_ready() && down.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    });
    pin!(both).await
}

/// One direction.
struct Way<'a> {
    from: Socket<'a>,
    to: Socket<'a>,
    moved: &'a Cell<u64>,
    /// Copied, and still to be written.
    copied: Bytes,
    /// Spliced, and still to be written.
    piped: Option<(Pipe, usize)>,
    /// The last read gave as much as was asked for.
    bulk: bool,
    /// The system splices between these two.
    splices: bool,
    ended: bool,
    done: bool,
    /// The last thing tried was to write.
    writing: bool,
}

impl<'a> Way<'a> {
    fn new(from: Socket<'a>, to: Socket<'a>, moved: &'a Cell<u64>, copied: Bytes) -> Self {
        Self {
            from,
            to,
            moved,
            copied,
            piped: None,
            bulk: false,
            splices: true,
            ended: false,
            done: false,
            writing: false,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let turn = self.moved.get() + TURN as u64;
        while !self.done {
            if self.moved.get() > turn {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            self.writing = !self.copied.is_empty() || self.piped.is_some() || self.ended;
            if !self.copied.is_empty() {
                ready!(self.to.poll_write_ready(cx))?;
                let written = again(self.to.try_write(&self.copied))?.unwrap_or(0);
                self.copied.advance(written);
                self.count(written);
            } else if let Some((pipe, left)) = self.piped.take() {
                match self.empty(cx, &pipe, left) {
                    Poll::Ready(Ok(0)) => pipe.keep(),
                    Poll::Ready(Ok(left)) => self.piped = Some((pipe, left)),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {
                        self.piped = Some((pipe, left));
                        return Poll::Pending;
                    }
                }
            } else if self.ended {
                self.to.shutdown()?;
                self.done = true;
            } else {
                ready!(self.from.poll_read_ready(cx))?;
                if self.bulk && self.splices { self.fill()? } else { self.copy()? }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads into a pipe.
    fn fill(&mut self) -> io::Result<()> {
        let Ok(pipe) = Pipe::get() else {
            // No descriptors are left.
            self.bulk = false;
            return self.copy();
        };
        match again(self.from.try_splice(Interest::READABLE, |from| pipe.fill(from))) {
            Ok(Some(0)) => self.ended = true,
            Ok(Some(count)) => {
                self.bulk = count >= COPY;
                self.piped = Some((pipe, count));
                return Ok(());
            }
            Ok(None) => {}
            Err(error) if refused(&error) => self.splices = false,
            Err(error) => return Err(error),
        }
        pipe.keep();
        Ok(())
    }

    /// Writes what a pipe holds; how much is left in it.
    fn empty(&mut self, cx: &mut Context<'_>, pipe: &Pipe, left: usize) -> Poll<io::Result<usize>> {
        ready!(self.to.poll_write_ready(cx))?;
        match again(self.to.try_splice(Interest::WRITABLE, |to| pipe.empty(to, left))) {
            Ok(written) => {
                let written = written.unwrap_or(0);
                self.count(written);
                Poll::Ready(Ok(left - written))
            }
            Err(error) if refused(&error) => {
                self.splices = false;
                let mut copied = vec![0; left];
                let mut read = 0;
                while read < left {
                    match rustix::io::read(&pipe.read, &mut copied[read..])? {
                        0 => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                        count => read += count,
                    }
                }
                self.copied = copied.into();
                Poll::Ready(Ok(0))
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    fn copy(&mut self) -> io::Result<()> {
        SCRATCH.with_borrow_mut(|scratch| {
            let count = match again(self.from.try_read(scratch))? {
                None => return Ok(()),
                Some(0) => {
                    self.ended = true;
                    return Ok(());
                }
                Some(count) => count,
            };
            self.bulk = count == scratch.len();
            self.writing = true;
            let written = again(self.to.try_write(&scratch[..count]))?.unwrap_or(0);
            self.count(written);
            if written < count {
                self.copied = Bytes::copy_from_slice(&scratch[written..count]);
            }
            Ok(())
        })
    }

    fn count(&self, bytes: usize) {
        self.moved.set(self.moved.get() + bytes as u64);
    }
}

/// `None`: it has to be waited for.
fn again<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(done) => Ok(Some(done)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether it is not the connection that fails but the way of moving its bytes.
fn refused(error: &io::Error) -> bool {
    let refusals = [rustix::io::Errno::INVAL, rustix::io::Errno::NOSYS, rustix::io::Errno::PERM];
    refusals.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    fn get() -> io::Result<Self> {
        if let Some(pipe) = PIPES.with_borrow_mut(Vec::pop) {
            return Ok(pipe);
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // A smaller one does as well.
        let _ = fcntl_setpipe_size(&write, PIPE);
        Ok(Self { read, write })
    }

    /// Keeps an empty pipe for others.
    fn keep(self) {
        PIPES.with_borrow_mut(|pipes| {
            if pipes.len() < KEPT {
                pipes.push(self);
            }
        });
    }

    fn fill(&self, from: BorrowedFd<'_>) -> io::Result<usize> {
        // The pipe is empty: where it would block, nothing has come.
        Ok(splice(from, None, &self.write, None, TURN, SpliceFlags::NONBLOCK | SpliceFlags::MOVE)?)
    }

    fn empty(&self, to: BorrowedFd<'_>, left: usize) -> io::Result<usize> {
        Ok(splice(&self.read, None, to, None, left, SpliceFlags::NONBLOCK | SpliceFlags::MOVE)?)
    }
}

impl Socket<'_> {
    fn poll_read_ready(self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(socket) => socket.poll_read_ready(cx),
            Self::Unix(socket) => socket.poll_read_ready(cx),
        }
    }

    fn poll_write_ready(self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(socket) => socket.poll_write_ready(cx),
            Self::Unix(socket) => socket.poll_write_ready(cx),
        }
    }

    fn try_read(self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.try_read(into),
            Self::Unix(socket) => socket.try_read(into),
        }
    }

    fn try_write(self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.try_write(bytes),
            Self::Unix(socket) => socket.try_write(bytes),
        }
    }

    fn try_splice(
        self,
        interest: Interest,
        splice: impl FnOnce(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.try_io(interest, || splice(socket.as_fd())),
            Self::Unix(socket) => socket.try_io(interest, || splice(socket.as_fd())),
        }
    }

    fn shutdown(self) -> io::Result<()> {
        let ended = match self {
            Self::Tcp(socket) => SockRef::from(socket).shutdown(Shutdown::Write),
            Self::Unix(socket) => SockRef::from(socket).shutdown(Shutdown::Write),
        };
        match ended {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            ended => ended,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (near.unwrap(), accepted.unwrap().0)
    }

    fn bytes(seed: u64, length: usize) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(seed);
        std::iter::repeat_with(|| random.u8(..)).take(length).collect()
    }

    /// Sends `up` after `read` one way and `down` the other at once; what came out, and what was counted.
    async fn exchange(read: &[u8], up: &[u8], down: &[u8]) -> (Vec<u8>, Vec<u8>, Moved) {
        let ((client, inside), (outside, server)) = (pair().await, pair().await);
        let moved = Moved::default();
        let relayed = relay(Socket::Tcp(&inside), Bytes::copy_from_slice(read), Socket::Tcp(&outside), &moved);
        let talk = |socket: TcpStream, says: Vec<u8>| async move {
            let (mut reading, mut writing) = socket.into_split();
            let mut heard = Vec::new();
            let write = async {
                writing.write_all(&says).await.unwrap();
                writing.shutdown().await.unwrap();
            };
            let (_, heard_all) = tokio::join!(write, reading.read_to_end(&mut heard));
            heard_all.unwrap();
            heard
        };
        let (relayed, at_client, at_server) =
            tokio::join!(relayed, talk(client, up.to_vec()), talk(server, down.to_vec()));
        relayed.unwrap();
        (at_server, at_client, moved)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_goes_in_comes_out_of_the_other_side() {
        for (up, down) in [(0, 0), (5, 0), (COPY, COPY + 1), (3, 5 * TURN + 7), (7 * TURN + 3, 2 * TURN)] {
            let (up, down) = (bytes(1, up), bytes(2, down));
            let (at_server, at_client, moved) = exchange(b"hello", &up, &down).await;
            assert!(at_server == [b"hello", &up[..]].concat(), "{} bytes", up.len());
            assert!(at_client == down, "{} bytes", down.len());
            assert_eq!((moved.received.get(), moved.sent.get()), (up.len() as u64 + 5, down.len() as u64));
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn one_side_may_end_before_the_other_begins() {
        let ((mut client, inside), (outside, mut server)) = (pair().await, pair().await);
        let moved = Moved::default();
        let relayed = relay(Socket::Tcp(&inside), Bytes::new(), Socket::Tcp(&outside), &moved);
        let talk = async {
            client.shutdown().await.unwrap();
            assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
            server.write_all(b"late").await.unwrap();
            drop(server);
            let mut heard = Vec::new();
            client.read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, b"late");
        };
        assert!(tokio::join!(relayed, talk).0.is_ok());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reset_ends_both() {
        let ((client, inside), (outside, server)) = (pair().await, pair().await);
        SockRef::from(&client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(client);
        let moved = Moved::default();
        let ended = relay(Socket::Tcp(&inside), Bytes::new(), Socket::Tcp(&outside), &moved).await;
        assert_eq!(ended, Err(Side::Client));
        drop(server);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reset_by_the_upstream_is_told_as_such() {
        let ((client, inside), (outside, server)) = (pair().await, pair().await);
        SockRef::from(&server).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(server);
        let moved = Moved::default();
        let ended = relay(Socket::Tcp(&inside), Bytes::new(), Socket::Tcp(&outside), &moved).await;
        assert_eq!(ended, Err(Side::Upstream));
        drop(client);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn where_nothing_can_be_spliced_all_is_copied() {
        let ((mut client, inside), (outside, mut server)) = (pair().await, pair().await);
        let counted = Cell::new(0);
        let mut way = Way::new(Socket::Tcp(&inside), Socket::Tcp(&outside), &counted, Bytes::new());
        way.splices = false;
        let sent = bytes(3, 3 * TURN);
        let write = async {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
        };
        let mut heard = Vec::new();
        let (_, moved, read) =
            tokio::join!(write, std::future::poll_fn(|cx| way.poll(cx)), server.read_to_end(&mut heard));
        moved.unwrap();
        read.unwrap();
        assert!(heard == sent);
    }
}
