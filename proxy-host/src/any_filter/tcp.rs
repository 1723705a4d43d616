//! Connections through a network filter, in the order in which Envoy's connection calls it.
//!
//! Bytes that the filter holds back are shown again with the next ones. A connection that is paused when it is new is
//! connected to the upstream once it is continued, or once the filter lets bytes pass.

use std::{pin::pin, rc::Rc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::{
    Proxy,
    attributes::{Connection, Info},
    client::{Cluster, Failure},
    host::{Abort, Step, Stream},
    pump::LIMIT,
};
use crate::idle::{self, Copied, Side};
use crate::vm::{NetworkState, PeerType, StreamType};

/// The filter state by which a filter chooses another cluster.
const CLUSTER: &str = "envoy.tcp_proxy.cluster";
/// Envoy's response flags `UR` and `URX`.
const UPSTREAM_RESET: i64 = 0x10;
const GIVEN_UP: i64 = 0x8000;
/// Read at once.
const PIECE: usize = 16 * 1024;

/// How a connection ended.
enum Ended {
    /// The client went away.
    Remote,
    /// We closed it: both sides have said all, the filter asked for it, or the upstream failed.
    Local,
}

/// Carries one connection.
pub async fn serve(proxy: Rc<Proxy>, connection: Connection, client: TcpStream) {
    let info = Rc::new(Info::new(connection, None).counted(proxy.recorder.clone()));
    // As Envoy with a filter that fails closed.
    let Ok(stream) = proxy.host.network(info) else { return };
    let mut stop = proxy.stop.clone();
    let ended = tokio::select! {
        biased;
        abort = stream.aborted() => match abort {
            Abort::Failed => return,
            _ => Ended::Local,
        },
        ended = carry(&proxy, &stream, client) => ended,
        _ = stop.wait_for(|stop| *stop) => Ended::Local,
    };
    let by = match ended {
        Ended::Remote => PeerType::Remote,
        Ended::Local => PeerType::Local,
    };
    stream.tell(|vm, context| vm.on_downstream_connection_close(context, by));
}

async fn carry(proxy: &Proxy, stream: &Stream, client: TcpStream) -> Ended {
    stream.pausing(StreamType::Downstream);
    let step = stream.call(|vm, context| vm.on_new_connection(context));
    let (mut from_client, to_client) = client.into_split();
    let mut first = None;
    match step {
        Step::Go => {}
        Step::Abort(_) => return Ended::Local,
        Step::Wait => match held_back(stream, &mut from_client).await {
            Ok(bytes) => first = bytes,
            Err(ended) => return ended,
        },
    }
    let Some(cluster) = cluster(proxy, stream) else { return Ended::Local };
    let (upstream, peers) = match cluster.connect().await {
        Ok(connected) => connected,
        Err(failure) => {
            let given_up = if matches!(failure, Failure::NoEndpoint) { 0 } else { GIVEN_UP };
            stream.info.flag(failure.flag().0 | given_up);
            return Ended::Local;
        }
    };
    stream.info.upstream.set(Some(peers));
    stream.info.cluster.replace(cluster.name.clone());
    if !stream.wants.downstream_data && !stream.wants.upstream_data && first.is_none() {
        return plain(stream, from_client, to_client, upstream, proxy.tcp_idle).await;
    }
    let (from_upstream, mut to_upstream) = upstream.into_split();
    let down = async {
        if let Some((bytes, end)) = first
            && (write(&mut to_upstream, bytes, end).await.is_err() || end)
        {
            return Ok(());
        }
        downstream(stream, from_client, to_upstream).await
    };
    let up = upstream_to_client(stream, from_upstream, to_client);
    let both = pin!(async { tokio::try_join!(down, up) });
    match idle::within(proxy.tcp_idle, || Some(stream.info.moved.get()), both).await {
        Some(Ok(_)) | None => Ended::Local,
        Some(Err(ended)) => ended,
    }
}

async fn plain(
    stream: &Stream,
    from_client: OwnedReadHalf,
    to_client: OwnedWriteHalf,
    upstream: TcpStream,
    time: Duration,
) -> Ended {
    let Ok(client) = from_client.reunite(to_client) else { return Ended::Local };
    match idle::copy(client, upstream, time).await.0 {
        Copied::Broken(Side::Client) => return Ended::Remote,
        Copied::Broken(Side::Upstream) => stream.info.flag(UPSTREAM_RESET),
        Copied::Whole(_) | Copied::Idle => {}
    }
    Ended::Local
}

fn cluster(proxy: &Proxy, stream: &Stream) -> Option<Rc<Cluster>> {
    match stream.filter_state(CLUSTER) {
        None => Some(proxy.upstream.clone()),
        Some(name) => std::str::from_utf8(&name).ok().and_then(|name| proxy.clusters.get(name)),
    }
}

/// Waits until a new connection that the filter paused may go on: when it is continued, or when bytes of it may pass;
/// gives those, and whether they are the last.
async fn held_back(stream: &Stream, client: &mut OwnedReadHalf) -> Result<Option<(Bytes, bool)>, Ended> {
    let mut read = BytesMut::new();
    let mut ended = false;
    loop {
        tokio::select! {
            biased;
            () = stream.continued(StreamType::Downstream) => {
                let bytes = take(stream, true);
                return Ok((!bytes.is_empty() || ended).then_some((bytes, ended)));
            }
            bytes = piece(client, &mut read), if !ended && has_room(stream, true) => {
                let (bytes, end) = bytes.map_err(|_| Ended::Remote)?;
                ended = end;
                match show(stream, true, bytes, end) {
                    Step::Go => return Ok(Some((take(stream, true), end))),
                    Step::Wait => {}
                    Step::Abort(_) => return Err(Ended::Local),
                }
            }
        }
    }
}

async fn downstream(stream: &Stream, mut client: OwnedReadHalf, mut upstream: OwnedWriteHalf) -> Result<(), Ended> {
    let mut read = BytesMut::new();
    let (mut held, mut ended) = (false, false);
    loop {
        let pass = tokio::select! {
            biased;
            () = stream.continued(StreamType::Downstream), if held => true,
            bytes = piece(&mut client, &mut read), if !ended && has_room(stream, true) => {
                let (bytes, end) = bytes.map_err(|_| Ended::Remote)?;
                ended = end;
                match show(stream, true, bytes, end) {
                    Step::Go => true,
                    Step::Wait => false,
                    Step::Abort(_) => return Err(Ended::Local),
                }
            }
        };
        held = !pass;
        if pass {
            // The upstream went away: its own side tells how it ends.
            if write(&mut upstream, take(stream, true), ended).await.is_err() || ended {
                return Ok(());
            }
        }
    }
}

async fn upstream_to_client(
    stream: &Stream,
    mut upstream: OwnedReadHalf,
    mut client: OwnedWriteHalf,
) -> Result<(), Ended> {
    let mut read = BytesMut::new();
    loop {
        if !has_room(stream, false) {
            // As Envoy: nothing can continue this side, so nothing more comes.
            std::future::pending::<()>().await;
        }
        let (bytes, end) = piece(&mut upstream, &mut read).await.map_err(|_| {
            stream.info.flag(UPSTREAM_RESET);
            Ended::Local
        })?;
        let step = show(stream, false, bytes, end);
        if end {
            stream.tell(|vm, context| vm.on_upstream_connection_close(context, PeerType::Unknown));
        }
        match step {
            Step::Go => write(&mut client, take(stream, false), end).await.map_err(|_| Ended::Remote)?,
            Step::Wait if end => std::future::pending::<()>().await,
            Step::Wait => {}
            Step::Abort(_) => {
                // What came before is flushed by the kernel.
                return Err(Ended::Local);
            }
        }
        if end {
            return Ok(());
        }
    }
}

/// The next bytes, and whether the other end has said all. May be dropped and called again.
async fn piece(from: &mut OwnedReadHalf, buffer: &mut BytesMut) -> std::io::Result<(Bytes, bool)> {
    buffer.reserve(PIECE);
    let read = from.read_buf(buffer).await?;
    Ok((buffer.split().freeze(), read == 0))
}

async fn write(to: &mut OwnedWriteHalf, bytes: Bytes, end: bool) -> std::io::Result<()> {
    if !bytes.is_empty() {
        to.write_all(&bytes).await?;
    }
    if end { to.shutdown().await } else { Ok(()) }
}

fn buffer(network: &mut NetworkState, is_downstream: bool) -> &mut Bytes {
    if is_downstream { &mut network.downstream } else { &mut network.upstream }
}

fn has_room(stream: &Stream, is_downstream: bool) -> bool {
    stream.network(|network| buffer(network, is_downstream).len() <= LIMIT).unwrap_or(true)
}

fn take(stream: &Stream, is_downstream: bool) -> Bytes {
    stream.network(|network| std::mem::take(buffer(network, is_downstream))).unwrap_or_default()
}

fn show(stream: &Stream, is_downstream: bool, bytes: Bytes, end: bool) -> Step {
    stream.info.touch();
    let wants = if is_downstream { stream.wants.downstream_data } else { stream.wants.upstream_data };
    stream.network(|network| {
        let held = buffer(network, is_downstream);
        if held.is_empty() {
            *held = bytes;
        } else if !bytes.is_empty() {
            let mut joined = BytesMut::with_capacity(held.len() + bytes.len());
            joined.extend_from_slice(held);
            joined.extend_from_slice(&bytes);
            *held = joined.freeze();
        }
    });
    if !wants {
        return Step::Go;
    }
    if is_downstream {
        stream.pausing(StreamType::Downstream);
        stream.call(|vm, context| vm.on_downstream_data(context, end))
    } else {
        stream.call(|vm, context| vm.on_upstream_data(context, end))
    }
}
