//! A connection that stays bytes: the filter names a cluster, and both sides are copied until they end.

use std::{pin::pin, rc::Rc, time::Duration};

use socket2::SockRef;

use super::{
    relay::{Moved, Socket, relay},
    rewind::Rewind,
    tunnel::{self, TunnelError},
};
use crate::{
    access_log::Entry,
    filter::{Connection, TcpVerdict},
    idle::{self, Copied, Side},
    upstream::{
        Wanted,
        connect::{ConnectError, Stream},
        hash,
    },
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
    let (name, tunnel, _stream) = match worker.filter.connection(connection).await {
        TcpVerdict::Cluster(name, tunnel, stream) => {
            entry.decision = stream.decision();
            (name, tunnel, stream)
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
        client: Some(connection.clone()),
    };
    let endpoint = match cluster.choose(&wanted, &worker.resolver).await {
        Ok(endpoint) => endpoint,
        Err(error) => {
            entry.reason = Some(error.to_string());
            return Err("UH");
        }
    };
    let _active = endpoint.begin();
    entry.upstream = endpoint.address().cloned();
    let mut upstream = match cluster.connect(&endpoint, &wanted, None).await {
        Ok((upstream, address)) => {
            entry.upstream = Some(address);
            upstream
        }
        Err(error) => {
            entry.reason = Some(error.to_string());
            return Err(if matches!(error, ConnectError::Overflow) { "UO" } else { "UF,URX" });
        }
    };
    if let Some(to) = &tunnel {
        let asked = tokio::time::timeout(cluster.spec().connect_timeout, tunnel::ask(&mut upstream, to)).await;
        if let Err(error) = asked.unwrap_or(Err(TunnelError::Silent)) {
            entry.reason = Some(error.to_string());
            return Err("UF,URX");
        }
    }
    let options = &cluster.spec().options;
    let time = options.tcp_idle.unwrap_or(worker.config.tcp_idle);
    let ended = {
        let moving = pin!(move_bytes(client, upstream, time, entry));
        match options.tcp_life {
            None => moving.await,
            Some(life) => tokio::time::timeout(life, moving).await.unwrap_or(Ended::Old),
        }
    };
    let (reason, flags) = match ended {
        Ended::Whole => return Ok(()),
        // One side was reset; so is the other.
        Ended::Broken(Side::Client) => return Err(""),
        Ended::Broken(Side::Upstream) => return Err("UR"),
        Ended::Idle => ("tcp_session_idle_timeout", ""),
        Ended::Old => ("max_connection_duration_reached", "DT"),
    };
    entry.reason = Some(reason.into());
    entry.flags = flags;
    Ok(())
}

/// How a connection ended.
enum Ended {
    /// Both sides said all.
    Whole,
    /// This side failed.
    Broken(Side),
    /// Nothing moved for too long.
    Idle,
    /// It was there for as long as it may be.
    Old,
}

async fn move_bytes(client: &mut Rewind, upstream: Stream, time: Duration, entry: &mut Entry) -> Ended {
    if let Some(socket) = upstream.socket().filter(|_| !client.is_secure()) {
        let moved = Counts { moved: Moved::default(), entry };
        let read = client.take_read();
        let relayed = pin!(relay(Socket::Tcp(client.stream()), read, socket, &moved.moved));
        tokio::select! {
            biased;
            ended = relayed => ended.map_or_else(Ended::Broken, |()| Ended::Whole),
            () = idle::quiet(time, || Some(moved.moved.received.get() + moved.moved.sent.get())) => Ended::Idle,
        }
    } else {
        let (copied, bytes) = idle::copy(client, upstream, time).await;
        (entry.received, entry.sent) = (bytes.received, bytes.sent);
        match copied {
            Copied::Whole(_) => Ended::Whole,
            Copied::Broken(side) => Ended::Broken(side),
            Copied::Idle => Ended::Idle,
        }
    }
}

/// What has moved, for the access log however it ends.
struct Counts<'e> {
    moved: Moved,
    entry: &'e mut Entry,
}

impl Drop for Counts<'_> {
    fn drop(&mut self) {
        (self.entry.received, self.entry.sent) = (self.moved.received.get(), self.moved.sent.get());
    }
}
