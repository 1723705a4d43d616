//! Listening sockets that systemd opened (socket activation): it keeps them across restarts, so that no client is
//! refused meanwhile, and may open ports that the proxy itself has no right to.

use std::net::TcpListener;

use listenfd::ListenFd;

/// Sockets by what they are for.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Redirected connections.
    pub transparent: Vec<TcpListener>,
    /// HTTP proxy.
    pub http_proxy: Vec<TcpListener>,
    /// Admin port.
    pub admin: Vec<TcpListener>,
}

/// A socket that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InheritedError {
    /// Its name says nothing.
    #[error(
        "socket {0} that was passed on start is called {1:?}; write FileDescriptorName=transparent, http-proxy or admin \
         in the .socket unit"
    )]
    Name(usize, String),
    /// It is no TCP listener.
    #[error("socket {0} ({1}) that was passed on start is no listening TCP socket; write ListenStream=IP:PORT")]
    Kind(usize, String),
}

impl Inherited {
    /// The sockets that were passed to this process, if any were.
    ///
    /// # Errors
    /// One that nobody knows what to do with.
    pub fn from_environment() -> Result<Self, InheritedError> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        Self::take(ListenFd::from_env(), &names)
    }

    fn take(mut sockets: ListenFd, names: &str) -> Result<Self, InheritedError> {
        let mut names = names.split(':').map(str::to_owned);
        let mut inherited = Self::default();
        for at in 0..sockets.len() {
            let name = names.next().unwrap_or_default();
            let list = match name.as_str() {
                "transparent" => &mut inherited.transparent,
                "http-proxy" => &mut inherited.http_proxy,
                "admin" => &mut inherited.admin,
                _ => return Err(InheritedError::Name(at, name)),
            };
            match sockets.take_tcp_listener(at) {
                Ok(Some(listener)) => list.push(listener),
                _ => return Err(InheritedError::Kind(at, name)),
            }
        }
        Ok(inherited)
    }
}
