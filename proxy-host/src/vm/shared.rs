//! What the VMs of one process share: key-value data, queues and metrics. Only hostcalls of those groups come here, so
//! its locks are not on the path of a request that does not ask for them.

use super::abi::Status;
use super::error::TrapKind;
use super::metrics::Metrics;
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Upper bound of all shared data and queued messages together, so that a guest cannot fill the host's memory.
const MAX_BYTES: usize = 64 << 20;

/// Called with the root context and the queue's id when a message arrives; from any thread.
pub type QueueWaker = Arc<dyn Fn(u32, u32) + Send + Sync>;

/// Shared by all VMs; VMs with one `vm_id` see the same keys and queues.
#[derive(Default)]
pub struct Shared {
    /// Metrics by name, over all VMs.
    pub metrics: Arc<Metrics>,
    /// By [`TrapKind`].
    traps: [AtomicU64; 3],
    data: Mutex<Data>,
    queues: Mutex<Queues>,
}

#[derive(Default)]
struct Data {
    values: HashMap<(String, Bytes), (Bytes, u32)>,
    bytes: usize,
    next_cas: u32,
}

#[derive(Default)]
struct Queues {
    by_name: HashMap<(String, Bytes), u32>,
    queues: Vec<Queue>,
    bytes: usize,
}

struct Queue {
    messages: VecDeque<Bytes>,
    root: u32,
    waker: Option<QueueWaker>,
}

/// A poisoned lock only means that another thread panicked between two whole updates.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Callbacks that did not return, over all VMs since the start. A callback that was not tried counts for nothing.
    pub fn traps(&self, kind: TrapKind) -> u64 {
        self.traps.get(kind as usize).map_or(0, |count| count.load(Relaxed))
    }

    pub(super) fn count_trap(&self, kind: TrapKind) {
        if let Some(count) = self.traps.get(kind as usize) {
            count.fetch_add(1, Relaxed);
        }
    }

    /// The value of `key` and its compare-and-swap number.
    pub(super) fn get(&self, vm_id: &str, key: &[u8]) -> Result<(Bytes, u32), Status> {
        let key = (vm_id.to_owned(), Bytes::copy_from_slice(key));
        lock(&self.data).values.get(&key).cloned().ok_or(Status::NotFound)
    }

    /// Stores a value; with `cas` other than 0 only when the value's number is still that.
    pub(super) fn set(&self, vm_id: &str, key: &[u8], value: &[u8], cas: u32) -> Result<(), Status> {
        let key = (vm_id.to_owned(), Bytes::copy_from_slice(key));
        let mut data = lock(&self.data);
        let old = data.values.get(&key).map(|(old, have)| (old.len(), *have));
        if cas != 0 && old.is_some_and(|(_, have)| have != cas) {
            return Err(Status::CasMismatch);
        }
        let freed = old.map_or(0, |(len, _)| len + key.1.len());
        let bytes = data.bytes - freed + key.1.len() + value.len();
        if bytes > MAX_BYTES {
            return Err(Status::InternalFailure);
        }
        data.bytes = bytes;
        // Zero means "whatever it is".
        data.next_cas = data.next_cas.checked_add(1).unwrap_or(1);
        let next = data.next_cas;
        data.values.insert(key, (Bytes::copy_from_slice(value), next));
        Ok(())
    }

    pub(super) fn register_queue(
        &self,
        vm_id: &str,
        name: &[u8],
        root: u32,
        waker: Option<QueueWaker>,
    ) -> Result<u32, Status> {
        let mut queues = lock(&self.queues);
        let key = (vm_id.to_owned(), Bytes::copy_from_slice(name));
        if let Some(&id) = queues.by_name.get(&key) {
            // The last that registers is woken, so a fresh instance takes over from a dead one.
            if let Some(queue) = queues.queue(id) {
                (queue.root, queue.waker) = (root, waker);
            }
            return Ok(id);
        }
        queues.queues.push(Queue { messages: VecDeque::new(), root, waker });
        let id = u32::try_from(queues.queues.len()).map_err(|_| Status::InternalFailure)?;
        queues.by_name.insert(key, id);
        Ok(id)
    }

    pub(super) fn resolve_queue(&self, vm_id: &str, name: &[u8]) -> Result<u32, Status> {
        let key = (vm_id.to_owned(), Bytes::copy_from_slice(name));
        lock(&self.queues).by_name.get(&key).copied().ok_or(Status::NotFound)
    }

    pub(super) fn enqueue(&self, id: u32, message: &[u8]) -> Result<(), Status> {
        let mut queues = lock(&self.queues);
        let bytes = queues.bytes + message.len();
        let queue = queues.queue(id).ok_or(Status::NotFound)?;
        if bytes > MAX_BYTES {
            return Err(Status::InternalFailure);
        }
        queue.messages.push_back(Bytes::copy_from_slice(message));
        let (root, waker) = (queue.root, queue.waker.clone());
        queues.bytes = bytes;
        drop(queues);
        if let Some(wake) = waker {
            wake(root, id);
        }
        Ok(())
    }

    pub(super) fn dequeue(&self, id: u32) -> Result<Bytes, Status> {
        let mut queues = lock(&self.queues);
        let queue = queues.queue(id).ok_or(Status::NotFound)?;
        let message = queue.messages.pop_front().ok_or(Status::Empty)?;
        queues.bytes -= message.len();
        Ok(message)
    }
}

impl Queues {
    fn queue(&mut self, id: u32) -> Option<&mut Queue> {
        self.queues.get_mut((id as usize).checked_sub(1)?)
    }
}
