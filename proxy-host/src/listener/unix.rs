//! Unix sockets to which applications connect: egress listeners of a Sidecar with `bind: unix://PATH`.

use std::{
    io,
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt as _,
        unix::{
            fs::FileTypeExt as _,
            net::{SocketAddr, UnixListener as StdListener},
        },
    },
    rc::Rc,
};

use tokio::net::{TcpStream, UnixListener, UnixStream};

use super::{ACCEPT_PAUSE, Kind, gateway::NOWHERE, take};
use crate::worker::Worker;

/// Listens at a path, or under an abstract name that follows `@`. A socket that somebody left there is replaced, as Envoy
/// replaces it; any other file is not.
///
/// # Errors
/// The system's.
pub(super) fn listen(path: &str) -> io::Result<UnixListener> {
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => {
            if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
                std::fs::remove_file(path)?;
            }
            SocketAddr::from_pathname(path)?
        }
    };
    let listener = StdListener::bind_addr(&address)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Accepts connections until the process is to end.
pub(super) async fn accept(worker: Rc<Worker>, listener: UnixListener, path: String) {
    let _open = worker.opened();
    let mut stop = worker.stop.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match accepted.and_then(|(stream, _)| as_any(stream)) {
            Ok(stream) => take(&worker, stream, NOWHERE, Kind::Gateway, Some(path.clone())),
            Err(error) => {
                worker.log.stats().accept_failures.add(1);
                tracing::warn!(%path, "accept: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Bytes go through a stream socket in one way, whatever its family; only its addresses and TCP's options are not to be had.
fn as_any(stream: UnixStream) -> io::Result<TcpStream> {
    TcpStream::from_std(OwnedFd::from(stream.into_std()?).into())
}
