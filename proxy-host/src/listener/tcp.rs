//! A connection that stays bytes: the filter names a cluster, and both sides are copied until they end.

use std::{pin::pin, rc::Rc};

use socket2::SockRef;

use super::{
    relay::{Moved, Socket, relay},
    rewind::Rewind,
};
use crate::{
    access_log::Entry,
    filter::{Connection, TcpVerdict},
    idle::{self, Copied},
    upstream::{Wanted, connect::ConnectError, hash},
    worker::Worker,
};

/// Carries one connection to where the filter says.
pub async fn proxy(worker: &Worker, connection: Rc<Connection>, mut client: Rewind) {
    let mut entry = Entry::new(&worker.log);
    entry.authority = connection.server_name.as_deref().map(|name| String::from_utf8_lossy(name).into_owned());
    if let Err(flags) = carry(worker, &connection, &mut client, &mut entry).await {
        entry.flags = flags;
        reset(&client);
    }
}

/// Ends a connection so that the client sees a failure and not an end of data.
pub fn reset(client: &Rewind) {
    // Where this fails, the connection is gone already.
    let _ = SockRef::from(client.stream()).set_linger(Some(std::time::Duration::ZERO));
}

/// Envoy's flag of what went wrong.
async fn carry(
    worker: &Worker,
    connection: &Rc<Connection>,
    client: &mut Rewind,
    entry: &mut Entry,
) -> Result<(), &'static str> {
    let (name, _stream) = match worker.filter.connection(connection).await {
        TcpVerdict::Cluster(name, stream) => {
            entry.decision = stream.decision();
            (name, stream)
        }
        TcpVerdict::Close(decision) => {
            entry.decision = decision;
            entry.reason = Some("portolan_denied".into());
            return Err("UH");
        }
    };
    entry.cluster = Some(name.clone());
    let cluster = match worker.cluster(&name).await {
        Ok(cluster) => cluster,
        Err(error) => {
            entry.reason = Some(error.to_string());
            return Err("NC");
        }
    };
    let wanted = Wanted {
        destination: connection.meant_for(),
        host: entry.authority.clone(),
        port: None,
        // Only a cluster that balances by hash asks for it.
        hash: Some(hash::of(connection.source.ip().to_canonical().to_string().as_bytes())),
    };
    let endpoint = match cluster.choose(&wanted, &worker.resolver).await {
        Ok(endpoint) => endpoint,
        Err(error) => {
            entry.reason = Some(error.to_string());
            return Err("UH");
        }
    };
    let _active = endpoint.begin();
    entry.upstream = endpoint.address().map(ToString::to_string);
    let upstream = match cluster.connect(&endpoint).await {
        Ok((upstream, address)) => {
            entry.upstream = Some(address.to_string());
            upstream
        }
        Err(error) => {
            entry.reason = Some(error.to_string());
            return Err(if matches!(error, ConnectError::Overflow) { "UO" } else { "UF" });
        }
    };
    let time = cluster.spec().options.tcp_idle.unwrap_or(worker.config.tcp_idle);
    let ended = if let Some(socket) = upstream.socket().filter(|_| !client.is_secure()) {
        let moved = Moved::default();
        let read = client.take_read();
        let relayed = pin!(relay(Socket::Tcp(client.stream()), read, socket, &moved));
        let ended = tokio::select! {
            biased;
            ended = relayed => Some(ended),
            () = idle::quiet(time, || Some(moved.received.get() + moved.sent.get())) => None,
        };
        (entry.received, entry.sent) = (moved.received.get(), moved.sent.get());
        ended
    } else {
        match idle::copy(client, upstream, time).await {
            Copied::Whole(received, sent) => {
                (entry.received, entry.sent) = (received, sent);
                Some(Ok(()))
            }
            Copied::Broken => Some(Err(std::io::ErrorKind::ConnectionReset.into())),
            Copied::Idle(_) => None,
        }
    };
    match ended {
        Some(Ok(())) => Ok(()),
        // One side was reset; so is the other.
        Some(Err(_)) => Err(""),
        None => {
            entry.reason = Some("tcp_session_idle_timeout".into());
            Ok(())
        }
    }
}
