//! `subscribers ADDRESS COUNT SCOPES`: that many subscribers of the registry, spread over so many namespaces, which
//! acknowledge what they get and keep nothing of it. Says when all have their snapshot, and ends with standard input.

use std::io::Read;
use std::sync::Arc;

use anyhow::{Context, bail};
use portolan_proto::v1::registry_client::RegistryClient;
use portolan_proto::v1::{Ack, Scope, Subscribe, WatchRequest, watch_request::Message};
use portolan_registry::page::FORMAT;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Endpoint;

/// How many connect at a time, so that none is turned away at the door.
const CONNECTING: usize = 32;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, count, scopes] = arguments.as_slice() else {
        bail!("usage: subscribers http://IP:PORT COUNT SCOPES");
    };
    let (count, scopes): (usize, usize) = (count.parse()?, scopes.parse()?);
    let endpoint = Endpoint::from_shared(address.clone())?;
    let (ready, mut all) = mpsc::unbounded_channel();
    let connecting = Arc::new(Semaphore::new(CONNECTING));
    for index in 0..count {
        let (endpoint, ready, connecting) = (endpoint.clone(), ready.clone(), connecting.clone());
        let namespace = format!("namespace-{}", index % scopes);
        tokio::spawn(async move {
            if let Err(error) = subscribe(endpoint, namespace, index, ready, &connecting).await {
                eprintln!("subscriber {index}: {error:#}");
            }
        });
    }
    drop(ready);
    let mut bytes = 0;
    for _ in 0..count {
        bytes += all.recv().await.context("all subscribers have ended")?;
    }
    println!("{count} subscribers of {scopes} scopes have {bytes} bytes");
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    Ok(())
}

/// Acknowledges every update; reports the size of the first.
async fn subscribe(
    endpoint: Endpoint,
    namespace: String,
    index: usize,
    ready: mpsc::UnboundedSender<usize>,
    connecting: &Semaphore,
) -> anyhow::Result<()> {
    let mut permit = Some(connecting.acquire().await?);
    let channel = endpoint.connect().await?;
    let (say, requests) = mpsc::unbounded_channel();
    let scope = Scope { namespace, ips: vec!["127.0.0.1".into()], ..Scope::default() };
    let subscribe = Subscribe {
        scope: Some(scope),
        subscriber: format!("subscriber-{index}"),
        format: FORMAT.into(),
        ..Subscribe::default()
    };
    say.send(WatchRequest { message: Some(Message::Subscribe(subscribe)) })?;
    let mut updates = RegistryClient::new(channel).watch(UnboundedReceiverStream::new(requests)).await?.into_inner();
    let (mut bytes, mut first) = (0, true);
    while let Some(part) = updates.message().await? {
        bytes += prost::Message::encoded_len(&part);
        if part.last {
            say.send(WatchRequest { message: Some(Message::Ack(Ack { version: part.version })) })?;
            if std::mem::take(&mut first) {
                ready.send(bytes)?;
                drop(permit.take());
            }
        }
    }
    Ok(())
}
