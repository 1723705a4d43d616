//! Copies of requests for other clusters: sent once the request is complete, and nobody waits for the answer.

use std::{rc::Rc, time::Duration};

use http_body_util::BodyExt as _;

use super::{choose, speaks_http2, towards};
use crate::{
    body::RequestBody,
    exec,
    headers::{Retries, authority_parts},
    replay::Held,
    upstream::{Wanted, http},
    vm::RequestHead,
    worker::Worker,
};

/// A copy is given up after this time, where the request has no time of its own.
const LONGEST: Duration = Duration::from_secs(300);

/// Starts a task that sends a copy; the host is that of the request. A request whose body is too long to be kept, or
/// does not come to its end, has none.
pub(super) fn start(
    worker: &Rc<Worker>,
    name: String,
    mut head: RequestHead,
    body: &Held,
    client: bool,
    timeout: Option<Duration>,
) {
    let (worker, body) = (worker.clone(), body.copy());
    exec::spawn(async move {
        let Ok(body) = body.await else { return };
        let sending = async {
            // A cluster that does not exist is ignored, as by Envoy.
            let Ok(cluster) = worker.cluster(&name).await else { return };
            let (host, port) = authority_parts(head.authority.as_ref());
            let wanted = Wanted { destination: None, host, port, hash: None, client: None };
            let http2 = speaks_http2(&cluster, client);
            let Ok(request) = towards(&mut head, http2, RequestBody::Copy(body)) else { return };
            let Ok(endpoint) = choose(&worker, &cluster, &wanted, &[], Retries::default()).await else { return };
            let apart = cluster.apart(&wanted);
            let sent = http::send(&cluster, &endpoint, &mut Some(request), http2, apart.as_ref(), None).await;
            if let Ok(response) = sent {
                let mut carried = response.into_body();
                while let Some(Ok(_)) = carried.body.frame().await {}
                carried.finish();
            }
        };
        // How it went is nobody's business.
        let _ = tokio::time::timeout(timeout.unwrap_or(LONGEST), sending).await;
    });
}
