//! Tasks of the thread they are started on.

use std::future::Future;

/// Runs hyper's tasks on the thread that created them, so that nothing needs to be `Send`.
#[derive(Debug, Clone, Copy)]
pub struct LocalExec;

impl<F> hyper::rt::Executor<F> for LocalExec
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

/// Starts a task on this thread's `LocalSet`.
pub fn spawn<F: Future<Output = ()> + 'static>(future: F) {
    tokio::task::spawn_local(future);
}
