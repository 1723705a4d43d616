//! A proxy in this process before an origin whose answers a test writes.

use std::{
    fs,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use portolan_proxy_host::{access_log::AccessLog, app::App, config::Config};

/// Long enough for anything that happens at all.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A proxy whose registry holds `a.test`.
pub struct Proxy {
    pub app: App,
    pub address: SocketAddr,
    pub log: Receiver<String>,
    _folder: tempfile::TempDir,
}

impl Proxy {
    /// `protocol` is that of the port of `a.test`.
    pub fn start(origin: SocketAddr, protocol: &str) -> Self {
        Self::start_with(origin, protocol, |_| {})
    }

    /// The same with other settings.
    pub fn start_with(origin: SocketAddr, protocol: &str, configure: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let entry = format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: a, namespace: default}}\nspec:\n  \
             hosts: [a.test]\n  resolution: STATIC\n  ports: [{{number: 80, name: p, protocol: {protocol}, targetPort: {}}}]\n  \
             endpoints: [{{address: {}}}]\n",
            origin.port(),
            origin.ip()
        );
        fs::write(folder.path().join("entries.yaml"), entry).unwrap();
        let mut config = Config::of_files(vec![folder.path().to_owned()]);
        config.http_proxies = vec!["127.0.0.1:0".parse().unwrap()];
        config.threads = 1;
        configure(&mut config);
        let (writer, log) = AccessLog::channel();
        let app = App::start(config, writer).unwrap();
        let address = app.http_proxies[0];
        Self { app, address, log, _folder: folder }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends bytes on a connection of their own; what comes back until its end.
    pub fn send(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // A refusal may close the connection before all is written.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// The next line of the access log.
    pub fn line(&self) -> String {
        self.log.recv_timeout(PATIENCE).unwrap()
    }
}

/// A request as the origin read it.
#[derive(Debug)]
pub struct Seen {
    pub head: String,
    pub body: Vec<u8>,
}

/// The origin's end of one connection.
pub struct Peer {
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

impl Peer {
    fn more(&mut self) -> io::Result<()> {
        let mut part = [0; 4096];
        let count = self.stream.read(&mut part)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.buffer.extend_from_slice(&part[..count]);
        Ok(())
    }

    /// So many bytes.
    pub fn take(&mut self, count: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < count {
            self.more()?;
        }
        Ok(self.buffer.drain(..count).collect())
    }

    fn until(&mut self, end: &[u8]) -> io::Result<String> {
        loop {
            if let Some(at) = self.buffer.windows(end.len()).position(|w| w == end) {
                return Ok(String::from_utf8_lossy(&self.take(at + end.len())?).into_owned());
            }
            self.more()?;
        }
    }

    pub fn head(&mut self) -> io::Result<String> {
        self.until(b"\r\n\r\n")
    }

    /// A whole request.
    pub fn request(&mut self) -> io::Result<Seen> {
        let head = self.head()?;
        let lower = head.to_ascii_lowercase();
        let mut body = Vec::new();
        if lower.contains("\r\ntransfer-encoding: chunked\r\n") {
            loop {
                let size = self.until(b"\r\n")?;
                let size = usize::from_str_radix(size.trim(), 16).unwrap();
                if size == 0 {
                    // Trailers, and the empty line.
                    while self.until(b"\r\n")? != "\r\n" {}
                    break;
                }
                body.extend(self.take(size)?);
                self.take(2)?;
            }
        } else if let Some((_, rest)) = lower.split_once("\r\ncontent-length: ") {
            let length = rest.split("\r\n").next().unwrap().parse().unwrap();
            body = self.take(length)?;
        }
        Ok(Seen { head, body })
    }

    pub fn say(&mut self, text: &str) -> io::Result<()> {
        self.stream.write_all(text.as_bytes())
    }
}

/// An origin that serves each connection with `serve`, which gets the connection's number.
pub fn origin(serve: impl Fn(Peer, usize) -> io::Result<()> + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            let serve = serve.clone();
            // A connection that ends early is for the test to notice.
            thread::spawn(move || serve(Peer { stream, buffer: Vec::new() }, number));
        }
    });
    address
}

/// An origin that answers each request with 200 and tells the test of it.
pub fn answering() -> (SocketAddr, Receiver<Seen>) {
    let (sender, seen): (Sender<Seen>, _) = channel();
    let address = origin(move |mut peer, _| {
        loop {
            let request = peer.request()?;
            // The test may not care.
            let _ = sender.send(request);
            peer.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
    });
    (address, seen)
}

/// The statuses of the responses in these bytes.
pub fn statuses(answer: &str) -> Vec<u16> {
    answer.split("HTTP/1.1 ").skip(1).map(|rest| rest[..3].parse().unwrap()).collect()
}

/// A server on a thread of its own, with a runtime for it.
pub fn serve<F: Future<Output = ()>>(serve: impl FnOnce(tokio::net::TcpListener) -> F + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { serve(tokio::net::TcpListener::from_std(listener).unwrap()).await });
    });
    address
}
