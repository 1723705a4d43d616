//! Tasks of the thread they are started on.

use std::{future::Future, rc::Rc};

use tokio::{sync::Notify, task_local};

task_local! {
    /// Ends the [`endable`] work around the code that asks.
    static END: Rc<Notify>;
}

/// Runs `work` to its end, or until something in it has taken [`end`] and notified it; then `work` is dropped.
pub async fn endable<F: Future>(work: F) -> Option<F::Output> {
    let end = Rc::new(Notify::new());
    tokio::select! {
        biased;
        done = END.scope(end.clone(), work) => Some(done),
        () = end.notified() => None,
    }
}

/// What ends the [`endable`] work that asks, if it is one.
#[must_use]
pub fn end() -> Option<Rc<Notify>> {
    END.try_with(Rc::clone).ok()
}

/// As [`LocalExec`], for a server's streams.
#[derive(Debug, Clone, Copy)]
pub struct StreamExec {
    /// Each of them can be ended.
    pub endable: bool,
}

impl<F> hyper::rt::Executor<F> for StreamExec
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        if self.endable {
            tokio::task::spawn_local(endable(future));
        } else {
            tokio::task::spawn_local(future);
        }
    }
}

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
