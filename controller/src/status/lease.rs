//! One leader among several controllers, by a Lease (`coordination.k8s.io/v1`), as client-go elects: whoever holds it renews
//! it; who sees it unchanged for longer than it lasts, by the own clock, takes it.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// How long a Lease lasts that is not renewed.
const LASTS: Duration = Duration::from_secs(15);
/// How often it is renewed or looked at.
const PERIOD: Duration = Duration::from_secs(2);

/// Which Lease, and who wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Unlike that of all other candidates.
    pub identity: String,
}

/// Tries to hold the Lease for as long as somebody wants to know whether it is held; then gives it up, and the task ends.
pub fn follow(client: Client, candidate: Candidate) -> (watch::Receiver<bool>, JoinHandle<()>) {
    let (leads, receiver) = watch::channel(false);
    let task = tokio::spawn(async move {
        let mut election = Election::new(Api::namespaced(client, &candidate.namespace), candidate, LASTS);
        let mut failing = false;
        loop {
            let held = election.attempt().await;
            if let Err(error) = &held
                && !std::mem::replace(&mut failing, true)
            {
                let Candidate { namespace, name, .. } = &election.candidate;
                tracing::warn!(%error, lease = format!("{namespace}/{name}"), "the Lease can be neither taken nor renewed");
            }
            failing &= held.is_err();
            // A leader that cannot renew leads no longer than others believe it.
            let now = held.unwrap_or_else(|_| election.renewed.is_some_and(|at| at.elapsed() < LASTS * 2 / 3));
            if leads.send_if_modified(|leads| std::mem::replace(leads, now) != now) {
                tracing::info!(leader = now, identity = election.candidate.identity, "leadership");
            }
            tokio::select! {
                () = sleep(PERIOD) => {}
                () = leads.closed() => break,
            }
        }
        if *leads.borrow()
            && let Err(error) = election.give_up().await
        {
            tracing::warn!(%error, "the Lease is not given up: another takes it when it has run out");
        }
    });
    (receiver, task)
}

struct Election {
    leases: Api<Lease>,
    candidate: Candidate,
    lasts: Duration,
    /// Version of somebody else's Lease, and when it was first seen.
    seen: Option<(String, Instant)>,
    /// When it was last taken or renewed.
    renewed: Option<Instant>,
}

impl Election {
    fn new(leases: Api<Lease>, candidate: Candidate, lasts: Duration) -> Self {
        Election { leases, candidate, lasts, seen: None, renewed: None }
    }

    /// Takes or renews the Lease if that may be; says whether it is held.
    async fn attempt(&mut self) -> kube::Result<bool> {
        let Some(lease) = self.leases.get_opt(&self.candidate.name).await? else {
            let metadata = ObjectMeta { name: Some(self.candidate.name.clone()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(self.spec(None)) };
            return self.taken(self.leases.create(&PostParams::default(), &lease).await.map(drop));
        };
        let held = lease.spec.clone().unwrap_or_default();
        let holder = held.holder_identity.as_deref().unwrap_or_default();
        if holder != self.candidate.identity && !holder.is_empty() && !self.expired(&lease) {
            return Ok(false);
        }
        // The version of the object decides between two who try at the same time.
        let lease = Lease { spec: Some(self.spec(Some(&held))), ..lease };
        self.taken(self.leases.replace(&self.candidate.name, &PostParams::default(), &lease).await.map(drop))
    }

    /// Leaves the Lease to whoever looks next.
    async fn give_up(&mut self) -> kube::Result<()> {
        let mut lease = self.leases.get(&self.candidate.name).await?;
        let Some(spec) = lease.spec.as_mut() else { return Ok(()) };
        if spec.holder_identity.as_ref() == Some(&self.candidate.identity) {
            spec.holder_identity = None;
            self.leases.replace(&self.candidate.name, &PostParams::default(), &lease).await?;
        }
        Ok(())
    }

    fn expired(&mut self, lease: &Lease) -> bool {
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        match &self.seen {
            Some((seen, since)) if *seen == version => {
                let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
                let lasts = seconds.and_then(|s| u64::try_from(s).ok()).map_or(self.lasts, Duration::from_secs);
                since.elapsed() > lasts
            }
            _ => {
                self.seen = Some((version, Instant::now()));
                false
            }
        }
    }

    fn spec(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let mine = before.filter(|spec| spec.holder_identity.as_ref() == Some(&self.candidate.identity));
        let transitions = before.and_then(|spec| spec.lease_transitions).unwrap_or_default();
        LeaseSpec {
            holder_identity: Some(self.candidate.identity.clone()),
            lease_duration_seconds: Some(i32::try_from(self.lasts.as_secs()).unwrap_or(i32::MAX)),
            acquire_time: mine.and_then(|spec| spec.acquire_time.clone()).or_else(|| Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(if mine.is_some() || before.is_none() { transitions } else { transitions + 1 }),
            ..LeaseSpec::default()
        }
    }

    fn taken(&mut self, result: kube::Result<()>) -> kube::Result<bool> {
        match result {
            Ok(()) => {
                self.renewed = Some(Instant::now());
                self.seen = None;
                Ok(true)
            }
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error),
        }
    }
}
