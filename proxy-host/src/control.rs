//! The control thread: what discovery says becomes listener plans and clusters that workers can use at once. DNS is
//! asked here, for the clusters that are in use.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
};

use crate::{
    ads::Update,
    dns::Resolver,
    dns_proxy::names::Names,
    listener::plan::Plans,
    upstream::{
        EndpointReport, Resolved,
        cluster::{Address, Discovery, Dns, Endpoint, Spec, Target},
    },
};

/// The shortest time between two resolutions of one name.
const SHORTEST_TTL: Duration = Duration::from_secs(1);

/// What a worker is told.
#[derive(Debug, Clone)]
pub enum ToWorker {
    /// All listener plans.
    Plans(Arc<Plans>),
    /// A cluster; `None`: there is none of that name (any more).
    Cluster(String, Option<Arc<Resolved>>),
    /// Say what you have to do with each endpoint.
    Report(mpsc::UnboundedSender<Vec<EndpointReport>>),
}

/// What the admin port asks.
#[derive(Debug)]
pub enum Question {
    /// The plans and clusters in force.
    State(oneshot::Sender<State>),
    /// What each worker has to do with each endpoint; as many answers as there are workers.
    Endpoints(mpsc::UnboundedSender<Vec<EndpointReport>>),
}

/// The plans and clusters in force.
#[derive(Debug, Default)]
pub struct State {
    /// Listener plans.
    pub plans: Plans,
    /// Clusters that were asked for; `None`: there is none of that name, or it is not known yet.
    pub clusters: BTreeMap<String, Option<Arc<Resolved>>>,
}

/// A worker needs a cluster.
#[derive(Debug)]
pub struct Need {
    /// Number of the worker.
    pub worker: usize,
    /// Name of the cluster.
    pub cluster: String,
}

/// Serves workers until all of them or discovery are gone.
pub async fn run(
    mut needs: mpsc::UnboundedReceiver<Need>,
    mut updates: mpsc::UnboundedReceiver<Update>,
    wanted: mpsc::UnboundedSender<String>,
    workers: Vec<mpsc::UnboundedSender<ToWorker>>,
    mut questions: mpsc::UnboundedReceiver<Question>,
    resolver: Resolver,
    names: Rc<RefCell<Names>>,
) {
    let (resolved, mut resolutions) = mpsc::unbounded_channel();
    let mut table = Table {
        clusters: HashMap::new(),
        plans: Plans::default(),
        generation: 0,
        resolver: Rc::new(resolver),
        names,
        resolved,
        wanted,
        workers,
    };
    loop {
        tokio::select! {
            need = needs.recv() => match need {
                Some(need) => table.need(&need),
                None => return,
            },
            update = updates.recv() => match update {
                Some(update) => table.update(update),
                None => return,
            },
            Some(resolution) = resolutions.recv() => table.resolved(resolution),
            Some(question) = questions.recv() => table.answer(question),
        }
    }
}

struct Table {
    clusters: HashMap<String, Known>,
    plans: Plans,
    generation: u64,
    resolver: Rc<Resolver>,
    /// What DNS clients are told.
    names: Rc<RefCell<Names>>,
    resolved: mpsc::UnboundedSender<Resolution>,
    wanted: mpsc::UnboundedSender<String>,
    workers: Vec<mpsc::UnboundedSender<ToWorker>>,
}

/// A cluster that was asked for.
#[derive(Default)]
struct Known {
    published: Option<Arc<Resolved>>,
    /// Stops the resolution of the names of the current state.
    resolving: Option<(u64, AbortHandle)>,
}

impl Drop for Known {
    fn drop(&mut self) {
        if let Some((_, task)) = &self.resolving {
            task.abort();
        }
    }
}

struct Resolution {
    generation: u64,
    cluster: Resolved,
}

impl Table {
    fn tell(&self, message: &ToWorker) {
        for worker in &self.workers {
            // A worker that is gone needs nothing.
            let _ = worker.send(message.clone());
        }
    }

    fn answer(&self, question: Question) {
        match question {
            Question::State(answer) => {
                let known = |(name, known): (&String, &Known)| (name.clone(), known.published.clone());
                let clusters = self.clusters.iter().map(known).collect();
                // Whoever asked may have given up.
                let _ = answer.send(State { plans: self.plans.clone(), clusters });
            }
            Question::Endpoints(answer) => self.tell(&ToWorker::Report(answer)),
        }
    }

    fn need(&mut self, need: &Need) {
        match self.clusters.get(&need.cluster) {
            Some(Known { published: Some(cluster), .. }) => {
                if let Some(worker) = self.workers.get(need.worker) {
                    let _ = worker.send(ToWorker::Cluster(need.cluster.clone(), Some(cluster.clone())));
                }
            }
            // All workers hear of it when it comes.
            Some(_) => {}
            None => {
                self.clusters.insert(need.cluster.clone(), Known::default());
                let _ = self.wanted.send(need.cluster.clone());
            }
        }
    }

    fn update(&mut self, update: Update) {
        match update {
            Update::Plan(port, Some(plan)) => {
                self.plans.0.insert(port, plan);
            }
            Update::Plan(port, None) => {
                self.plans.0.remove(&port);
            }
            Update::PlansComplete => self.tell(&ToWorker::Plans(Arc::new(self.plans.clone()))),
            Update::Name(host, answer) => self.names.borrow_mut().set(&host, answer.as_ref()),
            Update::NamesComplete => self.names.borrow_mut().complete(),
            Update::Cluster(name, None) => {
                self.clusters.remove(&name);
                self.tell(&ToWorker::Cluster(name, None));
            }
            Update::Cluster(name, Some(spec)) => self.cluster(name, *spec),
        }
    }

    fn cluster(&mut self, name: String, spec: Spec<Target>) {
        self.generation += 1;
        let known = self.clusters.entry(name).or_default();
        if let Some((_, task)) = known.resolving.take() {
            task.abort();
        }
        match spec.dns {
            // Published with its first addresses, so that nobody meets an empty cluster before.
            Some(dns) => {
                let task = resolve(spec, dns, self.generation, self.resolver.clone(), self.resolved.clone());
                known.resolving = Some((self.generation, tokio::task::spawn_local(task).abort_handle()));
            }
            None => {
                let none = vec![Vec::new(); names(&spec)];
                self.publish(with_addresses(&spec, &none));
            }
        }
    }

    fn resolved(&mut self, resolution: Resolution) {
        let current = self.clusters.get(&resolution.cluster.name).and_then(|known| known.resolving.as_ref());
        if current.is_some_and(|(generation, _)| *generation == resolution.generation) {
            self.publish(resolution.cluster);
        }
    }

    fn publish(&mut self, mut cluster: Resolved) {
        let known = self.clusters.entry(cluster.name.clone()).or_default();
        if let Some(before) = &known.published {
            // What is known of endpoints outlives a change.
            cluster.shared = before.shared.clone();
            cluster.shared.tidy();
        }
        let cluster = Arc::new(cluster);
        if known.published.as_ref() != Some(&cluster) {
            known.published = Some(cluster.clone());
            self.tell(&ToWorker::Cluster(cluster.name.clone(), Some(cluster)));
        }
    }
}

fn names(spec: &Spec<Target>) -> usize {
    match &spec.discovery {
        Discovery::Endpoints(endpoints) => endpoints.len(),
        _ => 0,
    }
}

/// Resolves the names of a cluster again and again; addresses of a name that fails stay until it answers.
async fn resolve(
    spec: Spec<Target>,
    dns: Dns,
    generation: u64,
    resolver: Rc<Resolver>,
    resolved: mpsc::UnboundedSender<Resolution>,
) {
    let Discovery::Endpoints(endpoints) = &spec.discovery else { return };
    let mut addresses = vec![Vec::new(); endpoints.len()];
    loop {
        let lookups = endpoints.iter().map(|endpoint| async {
            match &endpoint.at {
                Target::Address(_) => None,
                Target::Name(name, port) => Some((resolver.lookup(name, dns.family).await, *port, name)),
            }
        });
        let mut pause: Option<Duration> = None;
        for (answer, slot) in join_all(lookups).await.into_iter().zip(&mut addresses) {
            let Some((answer, port, name)) = answer else { continue };
            let again = match answer {
                Ok(answer) => {
                    let at = |ip| Address::Ip(SocketAddr::new(ip, port));
                    *slot = answer.addresses.into_iter().map(at).collect();
                    let ttl = answer.valid_until.saturating_duration_since(Instant::now());
                    // As with Envoy, a TTL of 0 says nothing.
                    if dns.respect_ttl && !ttl.is_zero() { ttl } else { dns.refresh }
                }
                Err(error) => {
                    tracing::debug!(cluster = spec.name, name, "dns: {error}");
                    dns.failure_refresh
                }
            };
            pause = Some(pause.map_or(again, |pause| pause.min(again)));
        }
        if resolved.send(Resolution { generation, cluster: with_addresses(&spec, &addresses) }).is_err() {
            return;
        }
        let Some(pause) = pause else { return };
        tokio::time::sleep(pause.max(SHORTEST_TTL)).await;
    }
}

/// The cluster with these addresses in place of the names, one list for each endpoint.
fn with_addresses(spec: &Spec<Target>, resolved: &[Vec<Address>]) -> Resolved {
    let logical = spec.dns.is_some_and(|dns| dns.logical);
    let discovery = match &spec.discovery {
        Discovery::OriginalDst { port } => Discovery::OriginalDst { port: *port },
        Discovery::DynamicForwardProxy { port } => Discovery::DynamicForwardProxy { port: *port },
        Discovery::Endpoints(endpoints) => {
            let mut out = Vec::new();
            for (endpoint, addresses) in endpoints.iter().zip(resolved) {
                let with = |at| Endpoint {
                    at,
                    weight: endpoint.weight,
                    priority: endpoint.priority,
                    locality: endpoint.locality,
                };
                match &endpoint.at {
                    Target::Address(address) => out.push(with(vec![address.clone()])),
                    Target::Name(..) if logical && !addresses.is_empty() => out.push(with(addresses.clone())),
                    Target::Name(..) if logical => {}
                    // A name that is listed twice counts twice.
                    Target::Name(..) => out.extend(addresses.iter().map(|a| with(vec![a.clone()]))),
                }
            }
            Discovery::Endpoints(out)
        }
    };
    Spec {
        name: spec.name.clone(),
        connect_timeout: spec.connect_timeout,
        discovery,
        policy: spec.policy,
        weighted_localities: spec.weighted_localities,
        protocol: spec.protocol,
        options: spec.options.clone(),
        shared: spec.shared.clone(),
        dns: spec.dns,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::cluster::{Family, Policy, Protocol};

    fn spec(logical: bool) -> Spec<Target> {
        let at = |at| Endpoint { at, weight: 1, priority: 0, locality: (0, 0) };
        Spec {
            name: "c".into(),
            connect_timeout: Duration::from_secs(1),
            discovery: Discovery::Endpoints(vec![
                at(Target::Name("a.com".into(), 80)),
                at(Target::Address(Address::Unix("/s".into()))),
            ]),
            policy: Policy::Random,
            weighted_localities: false,
            protocol: Protocol::Http1,
            options: crate::upstream::options::Options::default(),
            shared: crate::upstream::health::Shared::default(),
            dns: Some(Dns {
                logical,
                family: Family::V4,
                respect_ttl: true,
                refresh: Duration::from_secs(1),
                failure_refresh: Duration::from_secs(1),
            }),
        }
    }

    fn lists(cluster: &Resolved) -> Vec<Vec<String>> {
        let Discovery::Endpoints(endpoints) = &cluster.discovery else { panic!("{cluster:?}") };
        endpoints.iter().map(|e| e.at.iter().map(ToString::to_string).collect()).collect()
    }

    #[test]
    fn strict_dns_has_an_endpoint_for_each_address_and_logical_dns_one() {
        let found = ["1.1.1.1:80", "2.2.2.2:80"].map(|a| Address::Ip(a.parse().unwrap())).to_vec();
        let strict = with_addresses(&spec(false), &[found.clone(), vec![]]);
        assert_eq!(lists(&strict), [vec!["1.1.1.1:80"], vec!["2.2.2.2:80"], vec!["/s"]]);
        let logical = with_addresses(&spec(true), &[found, vec![]]);
        assert_eq!(lists(&logical), [vec!["1.1.1.1:80", "2.2.2.2:80"], vec!["/s"]]);
        assert_eq!(lists(&with_addresses(&spec(true), &[vec![], vec![]])), [vec!["/s"]]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_cluster_is_asked_for_once_and_all_workers_hear_of_it() {
        let (need, needs) = mpsc::unbounded_channel();
        let (update, updates) = mpsc::unbounded_channel();
        let (wanted, mut asked) = mpsc::unbounded_channel();
        let (first, mut one) = mpsc::unbounded_channel();
        let (second, mut two) = mpsc::unbounded_channel();
        tokio::task::LocalSet::new()
            .run_until(async move {
                let task = tokio::task::spawn_local(run(
                    needs,
                    updates,
                    wanted,
                    vec![first, second],
                    mpsc::unbounded_channel().1,
                    Resolver::default(),
                    Rc::default(),
                ));
                for worker in 0..2 {
                    need.send(Need { worker, cluster: "c".into() }).unwrap();
                }
                assert_eq!(asked.recv().await.unwrap(), "c");
                let spec = Spec { dns: None, discovery: Discovery::OriginalDst { port: None }, ..spec(false) };
                update.send(Update::Cluster("c".into(), Some(Box::new(spec)))).unwrap();
                for worker in [&mut one, &mut two] {
                    assert!(matches!(worker.recv().await, Some(ToWorker::Cluster(name, Some(_))) if name == "c"));
                }
                need.send(Need { worker: 1, cluster: "c".into() }).unwrap();
                assert!(matches!(two.recv().await, Some(ToWorker::Cluster(_, Some(_)))));
                update.send(Update::Cluster("c".into(), None)).unwrap();
                assert!(matches!(one.recv().await, Some(ToWorker::Cluster(_, None))));
                drop(need);
                task.await.unwrap();
                assert!(asked.recv().await.is_none());
            })
            .await;
    }
}
