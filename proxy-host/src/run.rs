//! A proxy from its arguments to its end: limits, signals, and what systemd is told.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use sd_notify::NotifyState;
use tokio::{
    runtime::Builder,
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{
    access_log::AccessLog,
    app::{App, AppError},
    config::{Args, Config},
    inherited::Inherited,
    limits, logging,
};

/// How long the reader of the access log gets for the last lines.
const LAST_LINES: Duration = Duration::from_secs(5);

/// Runs a proxy until SIGTERM or SIGINT.
///
/// # Errors
/// It does not start, or a thread of it ends.
pub fn run(args: Args) -> Result<(), AppError> {
    let begun = Instant::now();
    let log = AccessLog::stdout(args.access_log)?;
    let limited = args.max_connections.is_some();
    let mut config = Config::from(args);
    match limits::raise_open_files() {
        Ok(files) if !limited => config.max_connections = limits::connections(files),
        Ok(files) if limits::connections(files) < config.max_connections => {
            let (most, enough) = (config.max_connections, limits::connections(files));
            tracing::warn!(most, enough, "the limit of open files ({files}) is too low for --max-connections");
        }
        Ok(_) => {}
        Err(error) => tracing::warn!("the limit of open files stays as it is: {error}"),
    }
    let folders = [
        ("--credentials", config.credentials.as_deref()),
        ("--mesh-certificates", config.identity.mesh_certificates.as_deref().map(Path::new)),
    ];
    for (option, folder) in folders {
        if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
            tracing::warn!(
                "{option}: {} is no folder yet; what needs its files is refused until it is",
                folder.display()
            );
        }
    }
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let mut signals = {
        let _in = runtime.enter();
        Signals::new()?
    };
    let app = App::start_with(config, log.clone(), Inherited::from_environment()?)?;
    let ended = runtime.block_on(serve(app, &mut signals, begun));
    if !log.finish(LAST_LINES) {
        logging::announce("the last lines of the access log were not read in time, and are lost");
    }
    ended
}

async fn serve(mut app: App, signals: &mut Signals, begun: Instant) -> Result<(), AppError> {
    tokio::select! {
        ready = app.ready() => ready?,
        () = signals.end() => return Ok(()),
    }
    logging::announce(&format!("ready after {} ms: {}", begun.elapsed().as_millis(), app.describe()));
    tell_systemd(NotifyState::Ready);
    loop {
        tokio::select! {
            error = app.failed() => return Err(error),
            _ = signals.terminate.recv() => break,
            _ = signals.interrupt.recv() => break,
            _ = signals.hangup.recv() => app.reload(),
        }
    }
    tell_systemd(NotifyState::Stopping);
    // What is announced is true by then: whoever reads the line may ask the admin port.
    app.drain();
    logging::announce("ending: no new connections are taken, and those that are open may end");
    tokio::select! {
        () = app.drained() => {}
        () = signals.end() => logging::announce("ending at once"),
    }
    Ok(())
}

fn tell_systemd(state: NotifyState<'_>) {
    // Without systemd there is nobody to tell, and with it nothing to do about a failure.
    let _ = sd_notify::notify(&[state]);
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
