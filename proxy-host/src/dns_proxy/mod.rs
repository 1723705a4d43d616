//! A DNS proxy over UDP and TCP: it answers for the hosts of the registry, as Istio's agent does, and passes every other
//! question on as it came, and the answer too.

pub mod names;

use std::{cell::RefCell, io, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use hickory_resolver::{
    proto::op::{Message, ResponseCode},
    system_conf::read_system_conf,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    time::timeout,
};

use self::names::{Names, reply};
use crate::exec;

/// How long another name server may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a client may leave a TCP connection idle.
const IDLE: Duration = Duration::from_secs(10);
/// Most questions over UDP, and most TCP connections, at a time; more wait in the system's queues.
const MOST: usize = 512;
/// Length of an answer over UDP that every client takes.
const SHORT: u16 = 512;

/// The sockets of a DNS proxy.
#[derive(Debug)]
pub struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Sockets {
    /// Binds both to one address; with port 0 the system chooses a port that is free for both.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let tcp = TcpListener::bind(address).await?;
        let udp = UdpSocket::bind(tcp.local_addr()?).await?;
        Ok(Self { udp, tcp })
    }

    /// Where they are bound.
    ///
    /// # Errors
    /// The system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

/// Who is asked for all other names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Others {
    servers: Vec<SocketAddr>,
    /// The first search domain.
    pub search: Option<String>,
}

impl Others {
    /// These name servers, else those of `resolv.conf`; the search domain is the latter's.
    #[must_use]
    pub fn new(servers: &[SocketAddr]) -> Self {
        let system = read_system_conf().map(|(config, _)| config).inspect_err(|error| {
            tracing::warn!(%error, "resolv.conf cannot be read: the DNS proxy knows no search domain from it");
        });
        let Ok(system) = system else { return Self { servers: servers.to_vec(), search: None } };
        let mut all = servers.to_vec();
        if all.is_empty() {
            for server in system.name_servers() {
                let port = server.connections.first().map_or(53, |connection| connection.port);
                let at = SocketAddr::new(server.ip, port);
                if !all.contains(&at) {
                    all.push(at);
                }
            }
        }
        Self { servers: all, search: system.search().first().map(ToString::to_string) }
    }

    async fn over_udp(&self, question: &[u8]) -> Option<Vec<u8>> {
        for server in &self.servers {
            match timeout(PATIENCE, ask_udp(*server, question)).await {
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => tracing::debug!(%server, %error, "name server failed"),
                Err(_) => tracing::debug!(%server, "name server did not answer"),
            }
        }
        None
    }

    async fn over_tcp(&self, question: &[u8]) -> Option<Vec<u8>> {
        for server in &self.servers {
            match timeout(PATIENCE, ask_tcp(*server, question)).await {
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(error)) => tracing::debug!(%server, %error, "name server failed"),
                Err(_) => tracing::debug!(%server, "name server did not answer"),
            }
        }
        None
    }
}

async fn ask_udp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr = if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    // A port of its own for each question: nobody can guess where the answer is awaited.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // The id is what the first two bytes say.
        if length > 2 && buffer.get(..2) == question.get(..2) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn ask_tcp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write(&mut stream, question).await?;
    read(&mut stream).await
}

/// Reads a message with its length before it.
async fn read(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

/// Answers for as long as the process lives.
pub async fn serve(sockets: Sockets, names: Rc<RefCell<Names>>, others: Others) {
    let others = Rc::new(others);
    let Sockets { udp, tcp } = sockets;
    exec::spawn(over_tcp(tcp, names.clone(), others.clone()));
    let (udp, room) = (Rc::new(udp), Arc::new(Semaphore::new(MOST)));
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        // The semaphore is never closed.
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let (length, from) = match udp.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // Of an earlier answer that nobody took.
                tracing::debug!(%error, "dns over udp");
                continue;
            }
        };
        let question = buffer.get(..length).unwrap_or_default().to_vec();
        let (udp, names, others) = (udp.clone(), names.clone(), others.clone());
        exec::spawn(async move {
            let _permit = permit;
            let answer = match own(&question, &names) {
                Own::Answer(answer, most) => Some(fit(&answer, most)),
                Own::Others => others.over_udp(&question).await.or_else(|| failure(&question)),
                Own::Nothing => None,
            };
            if let Some(answer) = answer
                && let Err(error) = udp.send_to(&answer, from).await
            {
                tracing::debug!(%error, %from, "dns over udp");
            }
        });
    }
}

async fn over_tcp(tcp: TcpListener, names: Rc<RefCell<Names>>, others: Rc<Others>) {
    let room = Arc::new(Semaphore::new(MOST));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let mut stream = match tcp.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "dns over tcp");
                // Out of descriptors: some will be free in a moment.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (names, others) = (names.clone(), others.clone());
        exec::spawn(async move {
            let _permit = permit;
            while let Ok(Ok(question)) = timeout(IDLE, read(&mut stream)).await {
                let answer = match own(&question, &names) {
                    Own::Answer(answer, _) => answer.to_vec().ok(),
                    Own::Others => others.over_tcp(&question).await.or_else(|| failure(&question)),
                    Own::Nothing => None,
                };
                let Some(answer) = answer else { return };
                if !matches!(timeout(IDLE, write(&mut stream, &answer)).await, Ok(Ok(()))) {
                    return;
                }
            }
        });
    }
}

enum Own {
    /// The registry's, and the longest that the client takes over UDP.
    Answer(Box<Message>, u16),
    /// Others are to be asked.
    Others,
    /// It is no question.
    Nothing,
}

fn own(question: &[u8], names: &Rc<RefCell<Names>>) -> Own {
    let Ok(request) = Message::from_vec(question) else { return Own::Nothing };
    let names = names.borrow();
    let [query] = request.queries.as_slice() else { return Own::Others };
    let most = request.edns.as_ref().map_or(SHORT, |edns| edns.max_payload().max(SHORT));
    if !names.is_complete() {
        // As Istio's agent: what is not known yet is not asked of others.
        let mut out = reply(&request);
        out.metadata.response_code = ResponseCode::ServFail;
        return Own::Answer(Box::new(out), most);
    }
    match names.answer(query, &request) {
        Some(answer) => Own::Answer(Box::new(answer), most),
        None => Own::Others,
    }
}

/// An answer in so many bytes; one that is longer is to be asked for over TCP.
fn fit(answer: &Message, most: u16) -> Vec<u8> {
    let whole = answer.to_vec().unwrap_or_default();
    if whole.len() <= usize::from(most) { whole } else { answer.truncate().to_vec().unwrap_or_default() }
}

fn failure(question: &[u8]) -> Option<Vec<u8>> {
    let mut out = reply(&Message::from_vec(question).ok()?);
    out.metadata.response_code = ResponseCode::ServFail;
    out.to_vec().ok()
}
