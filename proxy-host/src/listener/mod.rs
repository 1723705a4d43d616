//! The ways in: connections that were redirected to us, and requests to the HTTP proxy.

pub mod calm;
mod client_certificate;
pub mod frames;
pub mod gateway;
pub mod guard;
pub mod http;
mod keep_alive;
pub mod plan;
pub mod relay;
pub mod rewind;
pub mod server;
pub mod sniff;
pub mod strict;
mod target;
pub mod tcp;
pub mod termination;
pub mod tunnel;
mod unix;

use std::{io, net::SocketAddr, rc::Rc, time::Duration};

use bytes::BytesMut;
use futures_util::FutureExt as _;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::Sleep,
};

use crate::{
    exec,
    filter::Via,
    limits::{self, Place},
    stats::{self, DownstreamOpen},
    worker::{Opened, Worker},
};
use rewind::Rewind;
use sniff::{Inspection, Sniffed};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;
/// Pause after the system refused to accept, as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// What a listener takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Redirected connections.
    Transparent,
    /// Requests of clients that know us as their proxy.
    HttpProxy,
    /// Connections to a gateway's servers.
    Gateway,
}

/// What an open connection counts as, for as long as anything of it goes on.
pub type Open = (Opened, DownstreamOpen, Place);

/// Reserves an address. Workers bind the same one, and the kernel spreads connections over them. Nothing is accepted
/// before [`accept`] starts.
///
/// # Errors
/// The system's.
pub fn bind(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // `[::]` takes IPv4 as well, as Istio's listeners do on two stacks.
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Starts to listen.
///
/// # Errors
/// The system's.
pub fn listen(socket: Socket) -> io::Result<TcpListener> {
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Where a redirected connection was meant to go, by the kernel's connection tracking.
///
/// # Errors
/// The connection was not redirected.
pub fn original_destination(stream: &TcpStream) -> io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let address = if stream.local_addr()?.ip().to_canonical().is_ipv4() {
        socket.original_dst_v4()?
    } else {
        socket.original_dst_v6()?
    };
    address.as_socket().ok_or_else(|| io::Error::other("original destination is not an IP address"))
}

/// Accepts connections until the process is to end; those that the kernel has accepted by then are still taken.
pub async fn accept(worker: Rc<Worker>, listener: TcpListener, kind: Kind) {
    // The process does not end before what is in the queue has been taken.
    let _open = worker.opened();
    let mut stop = worker.stop.clone();
    worker.refusals.hold_spare();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        match accepted {
            Ok((stream, source)) => take(&worker, stream, source, kind, None),
            Err(error) => {
                worker.log.stats().accept_failures.add(1);
                // The descriptor that was kept back lets a client know, where it would hang otherwise.
                if limits::out_of_descriptors(&error) && worker.refusals.use_spare() {
                    if let Some(Ok((stream, _))) = listener.accept().now_or_never() {
                        worker.refusals.refuse(stream, kind);
                    }
                    worker.refusals.hold_spare();
                }
                tracing::warn!("accept: {error}; connections are refused until others have ended");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    let Ok(listener) = listener.into_std() else { return };
    while let Ok((stream, source)) = listener.accept() {
        if stream.set_nonblocking(true).is_ok()
            && let Ok(stream) = TcpStream::from_std(stream)
        {
            take(&worker, stream, source, kind, None);
        }
    }
}

/// `path`: of the Unix socket that it came by.
fn take(worker: &Rc<Worker>, stream: TcpStream, source: SocketAddr, kind: Kind, path: Option<String>) {
    let stats = worker.log.stats();
    let Some(place) = Place::take(&worker.stats, worker.config.max_connections) else {
        stats.over_limit.add(1);
        return worker.refusals.refuse(stream, kind);
    };
    stats.accepted[stats::of(kind)].add(1);
    // Only costs latency where it cannot be set.
    let _ = stream.set_nodelay(true);
    let worker = worker.clone();
    exec::spawn(async move {
        let open = Rc::new((worker.opened(), DownstreamOpen::new(worker.log.stats(), kind), place));
        match kind {
            Kind::Transparent => captured(worker, stream, source, open).await,
            Kind::HttpProxy => http_proxy(worker, stream, source, open).await,
            Kind::Gateway => gateway::serve(worker, stream, source, open, path).await,
        }
    });
}

async fn captured(worker: Rc<Worker>, stream: TcpStream, source: SocketAddr, open: Rc<Open>) {
    let destination = (worker.config.original_destination)(&stream);
    let own = stream.local_addr().map(|own| own.port());
    let destination = match (destination, own) {
        // Dialled itself, as istiod's virtualOutbound refuses it: it would only come back here.
        (Ok(destination), Ok(own)) if destination.port() != own => canonical(destination),
        (destination, _) => {
            tracing::debug!(%source, ?destination, "a connection that was not redirected is refused");
            tcp::reset(&Rewind::new(bytes::Bytes::new(), stream));
            return;
        }
    };
    let entry = worker.plans().entry(destination);
    let mut connection = worker.connection(source, destination, Via::Captured);
    let time = worker.config.http.header_time;
    let Some((sniffed, client)) = inspect(worker.stop.clone(), stream, entry.inspection, time).await else { return };
    match sniffed {
        Sniffed::Http1 | Sniffed::Http2 if !entry.tcp => {
            http::serve(worker, Rc::new(connection), client, sniffed == Sniffed::Http2, open).await;
        }
        Sniffed::Tls(name) => {
            connection.server_name = name;
            tcp::proxy(&worker, Rc::new(connection), client).await;
        }
        _ => tcp::proxy(&worker, Rc::new(connection), client).await,
    }
}

async fn http_proxy(worker: Rc<Worker>, stream: TcpStream, source: SocketAddr, open: Rc<Open>) {
    let Ok(own) = stream.local_addr() else { return };
    let connection = Rc::new(worker.connection(source, canonical(own), Via::HttpProxy));
    let Some((http2, client)) = version(worker.stop.clone(), stream, worker.config.http.header_time).await else {
        return;
    };
    http::serve(worker, connection, client, http2, open).await;
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Reads as many bytes as the inspection needs, without any where it needs none. As under Istio there is no limit of
/// time: a client that says nothing is waited for, unless the process is to end; but where heads have one (`time`), what
/// took longer is neither TLS nor HTTP. `None`: the client has gone, or is not waited for any more.
async fn inspect(
    stop: watch::Receiver<bool>,
    mut stream: TcpStream,
    inspection: Inspection,
    time: Duration,
) -> Option<(Sniffed, Rewind)> {
    let mut read = BytesMut::new();
    let sniffed = read_until(stop, &mut stream, &mut read, time, |read| match sniff::sniff(read, inspection) {
        Sniffed::NeedMore => None,
        sniffed => Some(sniffed),
    });
    let sniffed = sniffed.await?.unwrap_or(Sniffed::Tcp);
    Some((sniffed, Rewind::new(read.freeze(), stream)))
}

/// Whether a client that is known to speak HTTP speaks HTTP/2. `None`: as for [`inspect`].
pub(crate) async fn version(
    stop: watch::Receiver<bool>,
    mut stream: TcpStream,
    time: Duration,
) -> Option<(bool, Rewind)> {
    let mut read = BytesMut::new();
    let http2 = read_until(stop, &mut stream, &mut read, time, is_http2).await?.unwrap_or(false);
    Some((http2, Rewind::new(read.freeze(), stream)))
}

/// Whether the bytes begin as HTTP/2 does; `None`: more of them are needed.
fn is_http2(read: &[u8]) -> Option<bool> {
    match read.len() {
        0 => None,
        length if length < sniff::H2_PREFACE.len() && sniff::H2_PREFACE.starts_with(read) => None,
        _ => Some(read.starts_with(sniff::H2_PREFACE)),
    }
}

/// Reads until something is found, which is `None` where that takes too long after the first byte.
async fn read_until<T, S: AsyncRead + Unpin>(
    mut stop: watch::Receiver<bool>,
    stream: &mut S,
    read: &mut BytesMut,
    time: Duration,
    find: impl Fn(&[u8]) -> Option<T>,
) -> Option<Option<T>> {
    let mut deadline = std::pin::pin!(None::<Sleep>);
    loop {
        if let Some(found) = find(read) {
            return Some(Some(found));
        }
        let silent = read.is_empty();
        if !silent && !time.is_zero() && deadline.is_none() {
            deadline.set(Some(tokio::time::sleep(time)));
        }
        let late = async {
            match deadline.as_mut().as_pin_mut() {
                Some(deadline) => deadline.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            n = stream.read_buf(read) => if n.ok()? == 0 {
                return None;
            },
            () = late => return Some(None),
            _ = stop.wait_for(|stop| *stop), if silent => return None,
        }
    }
}
